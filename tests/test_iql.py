"""IQL: an update against a plain rewrite, the expectile and the density in closed form."""

import math
from types import SimpleNamespace

import numpy as np
import plain
import pytest
import torch
from conftest import random_episodes, write_hopper
from torch.distributions import Normal
from torch.optim import Adam

import iql

S, B, OBS, ACT = 2, 32, 5, 3


def make(**flags):
    torch.manual_seed(0)
    args = iql.Args(num_seeds=S, device="cpu", train_steps=10, lr=1e-3, **flags)
    iql.fill_in_by_domain(args, "locomotion")
    agents = iql.IQL(args, plain.unit_scale(OBS, ACT))
    groups = [
        {"params": agents.actor.parameters(), "lr": torch.tensor(args.lr)},
        {"params": [*agents.critic.parameters(), *agents.value.parameters()]},
    ]
    return agents, {"all": Adam(groups, args.lr, fused=True)}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("i", range(S))
def test_updates_equal_a_plain_rewrite(float64, deterministic, i):
    agents, optimizers = make(deterministic=deterministic)
    actor = plain.network(agents.actor.net, i)
    log_std = torch.zeros(ACT, requires_grad=True)
    value = plain.network(agents.value, i)
    critics = plain.twins(agents.critic, i)
    targets = plain.twins(agents.critic_target, i)
    adam = Adam([*value.parameters(), *critics.parameters()], 1e-3)
    actor_adam = Adam([*actor.parameters(), log_std], 1e-3)

    for step in range(4):
        batch = plain.random_batch(S, B, OBS, ACT)
        iql.update(agents, optimizers, [batch].pop)

        s, a, r, s_next, terminal = (x[i] for x in batch)
        v = value(s)[:, 0]
        u = plain.q(targets, s, a).amin(0).detach() - v
        value_loss = (torch.where(u > 0, 0.7, 0.3) * u**2).mean()
        y = (r + 0.99 * (1 - terminal) * value(s_next)[:, 0]).detach()
        q1, q2 = plain.q(critics, s, a)
        critic_loss = (((q1 - y) ** 2).mean() + ((q2 - y) ** 2).mean()) / 2
        mean = actor(s).tanh()
        log_prob = Normal(mean, log_std.exp()).log_prob(a).sum(1)
        if deterministic:
            log_prob = -((mean - a) ** 2).sum(1)
        weight = (3 * u).exp().clamp(max=100).detach()
        actor_adam.param_groups[0]["lr"] = 1e-3 * (1 + math.cos(math.pi * step / 10)) / 2
        plain.descend((adam, value_loss + critic_loss), (actor_adam, -(weight * log_prob).mean()))
        plain.polyak(targets, critics, 0.005)
    plain.assert_same(plain.network(agents.actor.net, i), actor)
    plain.assert_same(plain.network(agents.value, i), value)
    plain.assert_same(plain.twins(agents.critic, i), critics)
    plain.assert_same(plain.twins(agents.critic_target, i), targets)
    torch.testing.assert_close(agents.actor.log_std[i, 0], log_std, rtol=0, atol=1e-12)


def test_value_loss_is_least_at_the_expectile(float64):
    """The 0.9-expectile m of 0, 1, 2, 10 solves 0.9 (10 - m) = 0.1 (m + (m - 1) + (m - 2))."""
    q = torch.tensor([0.0, 1.0, 2.0, 10.0])
    m = torch.tensor(7.75, requires_grad=True)
    agents = SimpleNamespace(args=iql.Args(expectile=0.9))
    agents.critic_target = lambda s, a: q.expand(2, 1, 4)
    agents.value = lambda s: m.expand(1, 4, 1)
    loss, advantage = iql.IQL.value_loss(agents, None, None)
    loss.backward()
    assert abs(m.grad) < 1e-12
    assert torch.equal(advantage[0], q - m.detach())
    expected = (0.1 * (7.75**2 + 6.75**2 + 5.75**2) + 0.9 * 2.25**2) / 4
    assert loss.item() == pytest.approx(expected)


def test_gaussian_log_prob_is_torchs(float64):
    mean, log_std, x = torch.randn(3, 7, 4)
    expected = Normal(mean, log_std.exp()).log_prob(x).sum(-1)
    torch.testing.assert_close(iql.gaussian_log_prob(mean, log_std, x), expected)


def test_dropout_is_off_in_evaluation_and_differs_between_agents():
    agents, _ = make(actor_dropout=0.5)
    for p in agents.actor.net.parameters():
        p.data[1] = p.data[0]
    s = torch.randn(1, 6, OBS).expand(S, -1, -1)
    first, second = agents.act(s)
    assert not torch.equal(first, second)
    agents.eval()
    assert torch.equal(agents.act(s), agents.act(s))
    assert torch.allclose(*agents.act(s))


def test_normalized_rewards_span_1000_over_the_datasets_returns(tmp_path):
    """What main trains on: the best and the worst return differ by 1000 (IQL's paper)."""
    write_hopper(tmp_path / "x", random_episodes(30, 40))
    seen = []

    def run(args, inputs, agents, optimizers, train, benchmark, **options):
        seen.append(train())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iql, "run", run)
        sampler = iql.make_sampler
        patch.setattr(iql, "make_sampler", lambda t, *x: seen.append(t) or sampler(t, *x))
        flags = {"env": str(tmp_path / "x"), "device": "cpu", "eval_episodes": 0, "batch_size": 8}
        iql.main(iql.Args(normalize_reward=True, **flags))
    transitions, losses = seen
    assert transitions.r.dtype == np.float32 and all(x.isfinite() for x in losses.values())
    returns = transitions.r[:30].sum(), transitions.r[30:].sum()
    assert abs(returns[1] - returns[0]) == pytest.approx(1000, rel=1e-4)
