"""CQL's update against the equations of its paper, written down for one agent; tanh-Gaussians."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from learners import PlainAgent, draw_inputs, make_agents, make_args, take_update
from torch import nn

import cql


class PlainSAC(PlainAgent):
    """What CQL and MCQ share: a tanh-Gaussian policy, its density in the plainest form."""

    def gaussian(self, s, drop=lambda x: x):
        """Mean and standard deviation before the tanh."""
        raise NotImplementedError

    def sample(self, s, noise, drop=lambda x: x):
        mean, std = self.gaussian(s, drop)
        x = mean + std * noise
        log_pi = torch.distributions.Normal(mean, std).log_prob(x) - torch.log(1 - x.tanh() ** 2)
        return x.tanh(), log_pi.sum(-1)


class PlainCQL(PlainSAC):
    def __init__(self, agents, i, args):
        super().__init__(agents, i)
        self.args = args
        alphas = self.weights["multipliers"]
        self.optimizers = {
            "actor_loss": self.adam(args.actor_lr, "actor"),
            "critic_loss": self.adam(args.lr, "critic"),
            "alpha_loss": torch.optim.Adam([alphas["log_alpha"]], args.actor_lr),
            "alpha_prime_loss": torch.optim.Adam([alphas["log_alpha_prime"]], args.lr),
        }

    def gaussian(self, s, drop=lambda x: x):
        mean, log_std = self.mlp("actor", "net", s).chunk(2, dim=1)
        own = self.weights["actor"]
        log_std = own["log_std_scale"] * log_std + own["log_std_offset"]
        return mean, log_std.clamp(-20, 2).exp()

    def update(self, batch, noise):
        args, alphas = self.args, self.weights["multipliers"]
        s, a, r, s_next, terminal = batch
        n = noise.uniform.shape[1]

        a_new, log_pi = self.sample(s, noise.actor)
        q_new = torch.minimum(*(self.q("critic", net, s, a_new) for net in ("q1", "q2")))
        alpha = alphas["log_alpha"].exp().item()
        losses = {
            "actor_loss": (alpha * log_pi - q_new).mean(),
            "alpha_loss": -(alphas["log_alpha"] * (log_pi.detach() - a.shape[1])).mean(),
        }
        with torch.no_grad():
            q_next = []
            for k in range(noise.target.shape[1]):  # one, or n with the max-target backup
                a_next, _ = self.sample(s_next, noise.target[:, k])
                q_next.append(
                    torch.minimum(
                        *(self.q("critic_target", net, s_next, a_next) for net in ("q1", "q2"))
                    )
                )
            y = r + args.discount * (1 - terminal) * torch.stack(q_next).max(0).values
            sampled = [(noise.uniform[:, k], torch.full((len(s),), 0.5**3)) for k in range(n)]
            for state, eps in ((s, noise.pi), (s_next, noise.pi_next)):
                for k in range(n):
                    action, log_density = self.sample(state, eps[:, k])
                    sampled.append((action, log_density.exp()))
        losses["critic_loss"], multiplier = 0, alphas["log_alpha_prime"].exp()
        excess = 0
        for net in ("q1", "q2"):
            q = self.q("critic", net, s, a)
            total = sum(self.q("critic", net, s, action).exp() / pdf for action, pdf in sampled)
            gap = total.log() - q
            if args.min_gap is not None:
                gap = torch.stack([g if g > args.min_gap else 0 * g + args.min_gap for g in gap])
            losses["critic_loss"] = losses["critic_loss"] + F.mse_loss(q, y)
            if args.target_gap < 0:
                losses["critic_loss"] = losses["critic_loss"] + args.cql_alpha * gap.mean()
            else:
                own = args.cql_alpha * (gap.mean() - args.target_gap)
                losses["critic_loss"] = losses["critic_loss"] + multiplier.item() * own
                excess = excess + own.item()
        if args.target_gap >= 0:
            losses["alpha_prime_loss"] = -multiplier * excess / 2
        # all gradients before any step: the losses share their weights
        gradients = {
            name: torch.autograd.grad(loss, self.leaves(name), retain_graph=True)
            for name, loss in losses.items()
        }
        for name, own in gradients.items():
            for p, g in zip(self.leaves(name), own):
                p.grad = g
            self.optimizers[name].step()
        self.polyak("critic", args.tau)
        return {name: loss.item() for name, loss in losses.items()}

    def leaves(self, name):
        return self.optimizers[name].param_groups[0]["params"]


@pytest.mark.parametrize(
    "env_id, changes",
    [
        ("Hopper-v5", {}),
        ("Hopper-v5", {"num_actions": 3, "tau": 0.1, "discount": 0.9, "actor_lr": 1e-3}),
        ("PointMaze_UMaze-v3", {}),
        ("AntMaze_UMaze-v5", {}),
        ("AntMaze_UMaze-v5", {"min_gap": 7.5}),
    ],
    ids=["fixed weight", "other constants", "lagrange", "lagrange, max target", "clipped gap"],
)
def test_update_is_the_papers_for_every_agent(float64, env_id, changes):
    args = make_args(cql, env_id, num_seeds=3, seed=5, **changes)
    agents = make_agents(cql, args)
    plain = [PlainCQL(agents, i, args) for i in range(3)]
    torch.manual_seed(0)
    for step in range(1, 4):
        batch, noise = draw_inputs(cql, args, B=16)
        losses = take_update(cql, agents, (batch, noise), step, args)
        assert ("alpha_prime_loss" in losses) == (args.target_gap >= 0)
        for i, agent in enumerate(plain):
            own = [type(x)(*(field[i] for field in x)) for x in (batch, noise)]
            expected = agent.update(*own)
            assert set(expected) == set(losses)
            for name, loss in expected.items():
                assert losses[name][i].item() == pytest.approx(loss, rel=1e-9)
    for agent in plain:
        assert agent.largest_difference(agents) < 1e-9
    moved = (agents.multipliers["log_alpha_prime"] != 1).all().item()
    assert moved == (args.target_gap >= 0)


def test_gap_estimates_the_integral_over_actions(float64):
    """The importance-weighted log sum exp Q tends to log of the integral of exp Q, plus log 3n."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    critic = lambda a: 3 * net(a).squeeze(-1)  # noqa: E731
    grid = torch.linspace(-1, 1, 20_001).unsqueeze(1)
    integral = torch.trapezoid(critic(grid).exp(), grid[:, 0]).log()
    n = 200_000
    noise = cql.CQLNoise.draw(torch.zeros(1, 1), make_args(cql, num_actions=n))
    noise = cql.CQLNoise(*(field.unsqueeze(0) for field in noise))
    pi = torch.full((1, 1), 0.3), torch.full((1, 1), -0.5)
    pi_next = torch.full((1, 1), -0.6), torch.full((1, 1), 0.1)
    own = cql.CQLNoise(*(field[0] for field in noise))
    actions, log_density = cql.sample_actions(pi, pi_next, own)
    q_data = torch.tensor([0.7])
    gap = cql.cql_gap(q_data, critic(actions), log_density, make_args(cql))
    assert gap.item() == pytest.approx(integral.item() - 0.7 + math.log(3 * n), abs=0.01)


def test_tanh_gaussian_density_integrates_to_one(float64):
    """Also against PyTorch's transformed distribution, where that is accurate."""
    a = torch.tanh(torch.linspace(-8, 8, 400_001))
    for mean, log_std in ((0.0, 0.0), (0.8, -1.0), (-1.5, 0.5)):
        noise = (torch.atanh(a) - mean) / math.exp(log_std)
        mean, log_std = torch.tensor([mean]), torch.tensor([log_std])
        own, log_density = cql.tanh_gaussian(mean, log_std, noise.unsqueeze(1))
        torch.testing.assert_close(own[:, 0], a)
        assert torch.trapezoid(log_density.exp(), a).item() == pytest.approx(1, abs=1e-4)
        transformed = torch.distributions.TransformedDistribution(
            torch.distributions.Normal(mean, log_std.exp()),
            torch.distributions.transforms.TanhTransform(),
        )
        middle = a.abs() < 0.999
        expected = transformed.log_prob(a[middle])
        torch.testing.assert_close(log_density[middle], expected, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("sign", [-1, 1])
def test_tanh_gaussian_is_finite_where_actions_round_to_the_edge(sign):
    """In float32 tanh(12) is 1. The density there is that of the plain formula in float64."""
    mean = torch.tensor([[sign * 12.0, sign * 30.0]], requires_grad=True)
    log_std = torch.zeros(1, 2, requires_grad=True)
    a, log_density = cql.tanh_gaussian(mean, log_std, torch.full((1, 2), sign * 0.5))
    assert a.abs().tolist() == [[1.0, 1.0]]
    expected = 0.0
    for x, m in ((np.longdouble(12.5), 12.0), (np.longdouble(30.5), 30.0)):
        log_derivative = np.log(4.0) - 2 * np.logaddexp(x, -x)  # log 1 / cosh(x)^2
        expected += -0.5 * float(x - m) ** 2 - 0.5 * math.log(2 * math.pi) - float(log_derivative)
    assert log_density.item() == pytest.approx(expected, rel=1e-5)
    log_density.backward()
    assert mean.grad.isfinite().all() and log_std.grad.isfinite().all()


def test_orthogonal_init():
    torch.manual_seed(0)
    net = cql.mlp(11, 64, 64, 3)
    cql.orthogonal_init(net)
    layers = [layer for layer in net if isinstance(layer, nn.Linear)]
    for layer, gain in zip(layers, (math.sqrt(2), math.sqrt(2), 0.01)):
        w = layer.weight.detach()
        gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
        torch.testing.assert_close(gram, gain**2 * torch.eye(len(gram)), atol=1e-4, rtol=0)
        assert (layer.bias == 0).all()


def test_all_networks_start_orthogonal():
    agents = make_agents(cql, make_args(cql, num_seeds=2))
    nets = [("actor", "net"), ("critic", "q1"), ("critic", "q2")]
    for name, net in nets:
        for i in range(2):
            last = agents.weights[name][f"{net}.6.weight"][i].detach()
            hidden = agents.weights[name][f"{net}.2.weight"][i].detach()
            gram = last @ last.T
            torch.testing.assert_close(gram, 1e-4 * torch.eye(len(gram)), atol=1e-7, rtol=0)
            torch.testing.assert_close(hidden @ hidden.T, 2 * torch.eye(256), atol=1e-4, rtol=0)


def test_antmaze_has_deeper_critics():
    agents = make_agents(cql, make_args(cql, "AntMaze_UMaze-v5"))
    shapes = [p.shape for k, p in agents.critic.params.items() if k.startswith("q2.")]
    assert len(shapes) == 2 * 6  # five hidden layers and the last one, weight and bias
