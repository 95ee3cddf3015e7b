"""CQL: an update against a plain rewrite, densities by integration, the gap by brute force."""

import math

import plain
import pytest
import torch

import cql

S, B, OBS, ACT, N = 2, 16, 5, 3, 4


def make(env="Hopper-v5", **flags):
    args = cql.Args(num_seeds=S, device="cpu", num_actions=N, lr=1e-3, actor_lr=1e-3, **flags)
    cql.fill_in_by_domain(args, env)
    agents = cql.CQL(args, plain.unit_scale(OBS, ACT))
    actor = [*agents.actor.parameters(), agents.log_alpha]
    critic = [*agents.critic.parameters(), agents.log_alpha_prime]
    optimizers = {"actor": torch.optim.Adam(actor, 1e-3), "critic": torch.optim.Adam(critic, 1e-3)}
    return agents, optimizers


def pi(actor, scale, offset, s):
    mean, log_std = plain.mlp(actor, s).chunk(2, dim=1)
    return torch.distributions.Normal(mean, (scale * log_std + offset).clamp(-20, 2).exp())


def draw(normal, noise):
    """An action, and its log density by the change of variables."""
    x = normal.mean + normal.stddev * noise
    return x.tanh(), (normal.log_prob(x) - (1 - x.tanh() ** 2).log()).sum(-1)


FLAGS = {
    "default": {},
    "lagrange": {"target_gap": 5.0},
    "antmaze": {"target_gap": 0.8, "max_target_backup": True, "min_gap": -2.0, "cql_alpha": 5.0},
}


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("i", range(S))
def test_update_equals_a_plain_rewrite(float64, name, i):
    torch.manual_seed(0)
    agents, optimizers = make(**FLAGS[name])
    args = agents.args
    batches = [plain.random_batch(S, B, OBS, ACT) for _ in range(3)]
    actor = plain.layers(agents.actor.net, i)
    critics = [plain.layers(agents.critic.net, k * S + i) for k in (0, 1)]
    targets = [plain.layers(agents.critic_target.net, k * S + i) for k in (0, 1)]
    values = {"scale": 1.0, "offset": -1.0, "log_alpha": 0.0, "log_alpha_prime": 1.0}
    own = {key: torch.tensor(x, requires_grad=True) for key, x in values.items()}
    actor_params = [*plain.params(actor), own["scale"], own["offset"], own["log_alpha"]]
    actor_adam = torch.optim.Adam(actor_params, 1e-3)
    critic_params = [*plain.params(*critics), own["log_alpha_prime"]]
    critic_adam = torch.optim.Adam(critic_params, 1e-3)

    def q(net, s, a):
        return plain.mlp(net, torch.cat([s, a], dim=-1))[..., 0]

    queue = iter(batches)
    for step, batch in enumerate(batches):
        torch.manual_seed(step)
        cql.update(agents, optimizers, queue.__next__)

        torch.manual_seed(step)  # the same noise, in the same order
        n = N if args.max_target_backup else 1
        noise, noise_target = torch.randn(S, B, ACT)[i], torch.randn(S, B, n, ACT)[i]
        noise_pi, noise_next = torch.randn(S, B, N, ACT)[i], torch.randn(S, B, N, ACT)[i]
        uniform = 2 * torch.rand(S, B, N, ACT)[i] - 1
        s, a, r, s_next, terminal = (x[i] for x in batch)
        here, there = (pi(actor, own["scale"], own["offset"], x) for x in (s, s_next))
        a_pi, log_pi = draw(here, noise)
        q_pi = torch.min(*(q(net, s, a_pi) for net in critics))
        actor_loss = (own["log_alpha"].exp().detach() * log_pi - q_pi).mean()
        alpha_loss = -(own["log_alpha"] * (log_pi.detach() - ACT)).mean()
        critic_loss, excess = 0, 0
        with torch.no_grad():
            q_next = torch.full((B, n), -torch.inf)
            for k in range(n):
                a_next, _ = draw(there, noise_target[:, k])
                q_next[:, k] = torch.min(*(q(net, s_next, a_next) for net in targets))
            y = r + 0.99 * (1 - terminal) * q_next.max(1).values
        for net in critics:
            terms = []  # of the sum over actions: exp Q / density
            for k in range(N):
                terms.append(q(net, s, uniform[:, k]) - math.log(0.5**ACT))
                for normal, own_noise in ((here, noise_pi), (there, noise_next)):
                    action, density = (x.detach() for x in draw(normal, own_noise[:, k]))
                    terms.append(q(net, s, action) - density)
            gap = torch.stack(terms).exp().sum(0).log() - q(net, s, a)
            gap = gap.clamp(min=args.min_gap) if args.min_gap else gap
            critic_loss = critic_loss + ((q(net, s, a) - y) ** 2).mean()
            excess = excess + args.cql_alpha * (gap.mean() - max(args.target_gap, 0))
        alpha_prime = own["log_alpha_prime"].exp() if args.target_gap >= 0 else torch.tensor(1.0)
        critic_loss = critic_loss + alpha_prime.detach() * excess
        if args.target_gap >= 0:
            critic_loss = critic_loss - 0.5 * alpha_prime * excess.detach()
        gradients = torch.autograd.grad(actor_loss + alpha_loss, actor_params)
        plain.descend(critic_adam, critic_loss)
        for p, gradient in zip(actor_params, gradients):
            p.grad = gradient
        actor_adam.step()
        for target, net in zip(targets, critics):
            plain.polyak(target, net, 0.005)
    assert plain.difference(agents.actor.net, actor, i) < 1e-11
    for k in (0, 1):
        assert plain.difference(agents.critic.net, critics[k], k * S + i) < 1e-11
        assert plain.difference(agents.critic_target.net, targets[k], k * S + i) < 1e-11
    ours = (agents.actor.log_std_scale, agents.actor.log_std_offset)
    for p, key in zip((*ours, agents.log_alpha, agents.log_alpha_prime), own):
        assert abs(p[i].item() - own[key].item()) < 1e-11, key


def test_density_of_a_squashed_gaussian_integrates_to_one(float64, monkeypatch):
    a = torch.linspace(-1, 1, 200_001)[1:-1]
    mean, log_std = torch.full((len(a), 1), 0.3), torch.full((len(a), 1), -0.7)
    noise = (torch.atanh(a)[:, None] - mean) / log_std.exp()
    monkeypatch.setattr(torch, "randn_like", lambda x: noise)
    actions, log_density = cql.tanh_gaussian(mean, log_std)
    torch.testing.assert_close(actions[:, 0], a)
    assert abs(torch.trapezoid(log_density.exp(), a) - 1) < 1e-5


def test_density_stays_finite_where_tanh_rounds_to_one():
    mean, log_std = torch.full((1, 3), 50.0), torch.zeros(1, 3)
    action, log_density = cql.tanh_gaussian(mean, log_std)
    assert (action == 1).all() and log_density.isfinite().all()


def test_networks_start_orthogonal_with_outputs_near_zero():
    agents, _ = make()
    for weight in agents.critic.net[3].weight:  # [256, 256], gain sqrt 2
        torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(256), atol=1e-4, rtol=0)
    assert agents.actor.net[-1].weight.abs().max() < 0.01


def test_domains_set_what_corl_sets():
    args = cql.Args()
    cql.fill_in_by_domain(args, "AntMaze_UMaze-v4")
    assert (args.target_gap, args.min_gap, args.critic_layers, args.reward_bias) == (
        0.8,
        -200,
        5,
        -5,
    )
    args = cql.Args(cql_alpha=3.0)
    cql.fill_in_by_domain(args, "PointMaze_UMaze-v3")
    assert (args.target_gap, args.cql_alpha, args.reward_bias) == (5.0, 3.0, 0.0)
