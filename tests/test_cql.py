"""CQL: an update against a plain rewrite, densities by integration, the gap by brute force."""

import math

import plain
import pytest
import torch
from torch.distributions import Normal
from torch.optim import SGD  # a step shows the size of a gradient, which Adam hides

import cql

S, B, OBS, ACT, N = 2, 16, 5, 3, 4


def make(**flags):
    torch.manual_seed(0)
    args = cql.Args(num_seeds=S, device="cpu", num_actions=N, **flags)
    cql.fill_in_by_domain(args, "locomotion")
    agents = cql.CQL(args, plain.unit_scale(OBS, ACT))
    optimizers = {
        "actor": SGD([*agents.actor.parameters(), agents.log_alpha], 1e-3),
        "critic": SGD([*agents.critic.parameters(), agents.log_alpha_prime], 1e-3),
    }
    return agents, optimizers


def draw(normal, noise):
    """Returns actions, and their log densities by the change of variables."""
    x = normal.mean + normal.stddev * noise
    return x.tanh(), (normal.log_prob(x) - (1 - x.tanh() ** 2).log()).sum(-1)


FLAGS = {
    "default": {},
    "lagrange": {"target_gap": 5.0},
    "antmaze": {"target_gap": 0.8, "max_target_backup": True, "min_gap": 4.0, "cql_alpha": 5.0},
}


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("i", range(S))
def test_updates_equal_a_plain_rewrite(float64, name, i):
    agents, optimizers = make(**FLAGS[name])
    args = agents.args
    actor = plain.network(agents.actor.net, i)
    critics = plain.twins(agents.critic, i)
    targets = plain.twins(agents.critic_target, i)
    start = torch.tensor([1.0, -1.0, 0.0, 1.0])
    scale, offset, log_alpha, log_alpha_prime = (x.clone().requires_grad_() for x in start)
    actor_sgd = SGD([*actor.parameters(), scale, offset, log_alpha], 1e-3)
    critic_sgd = SGD([*critics.parameters(), log_alpha_prime], 1e-3)

    def pi(s):
        mean, log_std = actor(s).chunk(2, dim=-1)
        return Normal(mean, (scale * log_std + offset).clamp(-20, 2).exp())

    for step in range(3):
        batch = plain.random_batch(S, B, OBS, ACT)
        torch.manual_seed(step)
        cql.update(agents, optimizers, [batch].pop)

        torch.manual_seed(step)  # the same noise, in the same order
        num_next = N if args.max_target_backup else 1
        noise = [torch.randn(S, B, n, ACT)[i] for n in (1, num_next, N, N)]
        uniform = 2 * torch.rand(S, B, N, ACT)[i] - 1
        s, a, r, s_next, terminal = (x[i].unsqueeze(1) for x in batch)  # [B, 1, ...]
        a_pi, log_pi = draw(pi(s), noise[0])
        q_pi = plain.q(critics, s, a_pi).amin(0)
        actor_loss = (log_alpha.exp().detach() * log_pi - q_pi).mean()
        alpha_loss = -(log_alpha * (log_pi.detach() - ACT)).mean()
        with torch.no_grad():
            a_next, _ = draw(pi(s_next), noise[1])
            q_next = plain.q(targets, s_next, a_next).amin(0).amax(1, keepdim=True)
            y = r + 0.99 * (1 - terminal) * q_next
            a_here, log_here = draw(pi(s), noise[2])
            a_there, log_there = draw(pi(s_next), noise[3])
        q = plain.q(critics, s, a)
        gap = 0  # log of the sum over actions of exp Q / density, less Q of the data's
        gap += (plain.q(critics, s, uniform) - ACT * math.log(0.5)).exp().sum(-1)
        gap += (plain.q(critics, s, a_here) - log_here).exp().sum(-1)
        gap += (plain.q(critics, s, a_there) - log_there).exp().sum(-1)
        gap = gap.log() - q[..., 0]
        if args.min_gap:
            gap = gap.clamp(min=args.min_gap)
        excess = args.cql_alpha * (gap.mean(1) - max(args.target_gap, 0)).sum()
        critic_loss = (q - y).square().mean((1, 2)).sum()
        if args.target_gap >= 0:
            alpha_prime = log_alpha_prime.exp()
            critic_loss = critic_loss - 0.5 * alpha_prime * excess.detach()
            excess = alpha_prime.detach() * excess
        plain.descend((actor_sgd, actor_loss + alpha_loss), (critic_sgd, critic_loss + excess))
        plain.polyak(targets, critics, 0.005)
    plain.assert_same(plain.network(agents.actor.net, i), actor)
    plain.assert_same(plain.twins(agents.critic, i), critics)
    plain.assert_same(plain.twins(agents.critic_target, i), targets)
    ours = [agents.actor.log_std_scale, agents.actor.log_std_offset]
    ours += [agents.log_alpha, agents.log_alpha_prime]
    for p, own in zip(ours, (scale, offset, log_alpha, log_alpha_prime)):
        assert abs(p[i].item() - own.item()) < 1e-12


def test_density_of_a_squashed_gaussian_integrates_to_one(float64, monkeypatch):
    a = torch.linspace(-1, 1, 200_001)[1:-1]
    mean = torch.full((len(a), 1), 0.3)
    log_std = torch.full((len(a), 1), -0.7)
    noise = (torch.atanh(a)[:, None] - mean) / log_std.exp()
    monkeypatch.setattr(torch, "randn_like", lambda x: noise)
    actions, log_density = cql.tanh_gaussian(mean, log_std)
    torch.testing.assert_close(actions[:, 0], a)
    assert abs(torch.trapezoid(log_density.exp(), a) - 1) < 1e-5


def test_density_stays_finite_where_tanh_rounds_to_one():
    action, log_density = cql.tanh_gaussian(torch.full((1, 3), 50.0), torch.zeros(1, 3))
    assert (action == 1).all() and log_density.isfinite().all()


def test_networks_start_orthogonal_with_outputs_near_zero():
    agents, _ = make()
    for weight in agents.critic.net[3].weight:  # [256, 256], gain sqrt 2
        torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(256), atol=1e-4, rtol=0)
    assert agents.actor.net[-1].weight.abs().max() < 0.01
