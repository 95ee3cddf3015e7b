"""IQL: an update against a plain rewrite, the expectile and the density in closed form."""

import math
from types import SimpleNamespace

import plain
import pytest
import torch

import iql

S, B, OBS, ACT = 2, 32, 5, 3


def make(**flags):
    args = iql.Args(num_seeds=S, device="cpu", train_steps=10, lr=1e-3, **flags)
    iql.fill_in_by_domain(args, "Hopper-v5")
    agents = iql.IQL(args, plain.unit_scale(OBS, ACT))
    networks = [*agents.critic.parameters(), *agents.value.parameters()]
    groups = [{"params": agents.actor.parameters(), "lr": torch.tensor(args.lr)}]
    optimizer = torch.optim.Adam([*groups, {"params": networks, "lr": args.lr}], fused=True)
    return agents, {"all": optimizer}


@pytest.mark.parametrize("deterministic", [False, True])
def test_update_equals_a_plain_rewrite(float64, deterministic):
    for i in range(S):
        torch.manual_seed(0)
        agents, optimizers = make(deterministic=deterministic)
        batches = [plain.random_batch(S, B, OBS, ACT) for _ in range(4)]
        actor, value = plain.layers(agents.actor.net, i), plain.layers(agents.value, i)
        critics = [plain.layers(agents.critic.net, k * S + i) for k in (0, 1)]
        targets = [plain.layers(agents.critic_target.net, k * S + i) for k in (0, 1)]
        log_std = torch.zeros(ACT, requires_grad=True)
        adam = torch.optim.Adam(plain.params(value, *critics), 1e-3)
        actor_adam = torch.optim.Adam([*plain.params(actor), log_std], 1e-3)

        queue = iter(batches)
        for step, batch in enumerate(batches):
            iql.update(agents, optimizers, queue.__next__)

            s, a, r, s_next, terminal = (x[i] for x in batch)
            x = torch.cat([s, a], dim=1)
            q = torch.min(*(plain.mlp(net, x)[:, 0] for net in targets)).detach()
            v, v_next = (plain.mlp(value, y)[:, 0] for y in (s, s_next))
            value_loss = (torch.where(q > v, 0.7, 0.3) * (q - v) ** 2).mean()
            y = (r + 0.99 * (1 - terminal) * v_next).detach()
            q1, q2 = (plain.mlp(net, x)[:, 0] for net in critics)
            critic_loss = (((q1 - y) ** 2).mean() + ((q2 - y) ** 2).mean()) / 2
            mean = plain.mlp(actor, s).tanh()
            log_prob = torch.distributions.Normal(mean, log_std.exp()).log_prob(a).sum(1)
            log_prob = -((mean - a) ** 2).sum(1) if deterministic else log_prob
            weight = (3 * (q - v)).exp().clamp(max=100).detach()
            actor_adam.param_groups[0]["lr"] = 1e-3 * (1 + math.cos(math.pi * step / 10)) / 2
            plain.descend(adam, value_loss + critic_loss)
            plain.descend(actor_adam, -(weight * log_prob).mean())
            for target, net in zip(targets, critics):
                plain.polyak(target, net, 0.005)
        assert plain.difference(agents.actor.net, actor, i) < 1e-12
        assert plain.difference(agents.value, value, i) < 1e-12
        assert (agents.actor.log_std[i, 0] - log_std).abs().max() < 1e-12
        for k in (0, 1):
            assert plain.difference(agents.critic.net, critics[k], k * S + i) < 1e-12
            assert plain.difference(agents.critic_target.net, targets[k], k * S + i) < 1e-12


def test_value_loss_is_least_at_the_expectile(float64):
    """The 0.9-expectile m of 0, 1, 2, 10 solves 0.9 (10 - m) = 0.1 (m + (m - 1) + (m - 2))."""
    q, m = torch.tensor([0.0, 1.0, 2.0, 10.0]), torch.tensor(7.75, requires_grad=True)
    own = SimpleNamespace(args=iql.Args(expectile=0.9))
    own.critic_target = lambda s, a: q.expand(2, 1, 4)
    own.value = lambda s: m.expand(1, 4, 1)
    loss, advantage = iql.IQL.value_loss(own, None, None)
    loss.backward()
    assert abs(m.grad) < 1e-12 and torch.equal(advantage[0], q - m.detach())
    assert torch.isclose(
        loss, torch.tensor(0.1 * (7.75**2 + 6.75**2 + 5.75**2) + 0.9 * 2.25**2) / 4
    )


def test_gaussian_log_prob_is_torchs(float64):
    mean, log_std, x = torch.randn(3, 7, 4)
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(x).sum(-1)
    torch.testing.assert_close(iql.gaussian_log_prob(mean, log_std, x), expected)


def test_dropout_is_off_in_evaluation_and_differs_between_agents():
    torch.manual_seed(0)
    agents, _ = make(actor_dropout=0.5)
    agents.actor.net.load_state_dict(  # all agents alike
        {k: p[:1].expand_as(p) for k, p in agents.actor.net.state_dict().items()}
    )
    s = torch.randn(1, 6, OBS).expand(S, -1, -1)
    first, second = agents.act(s)
    assert not torch.equal(first, second)
    agents.eval()
    assert torch.equal(agents.act(s), agents.act(s))
    assert torch.allclose(*agents.act(s))
