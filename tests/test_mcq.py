"""MCQ: updates against a plain rewrite, the density of the policy in closed form, dropout."""

import pytest
import torch
from plain import descend, difference, layers, mlp, params, polyak, random_batch, unit_scale
from torch import hstack
from torch.distributions import Normal, TanhTransform, TransformedDistribution, kl_divergence

import mcq

S, B, OBS, ACT = 2, 16, 5, 3


def make(**flags):
    agents = mcq.MCQ(mcq.Args(num_seeds=S, device="cpu", **flags), unit_scale(OBS, ACT))
    agents.actor[-1].bias.data[..., ACT:] = torch.tensor([-5.0, 0.0, 2.0])  # log std: its bounds
    agents.encoder[-1].bias.data[..., 2 * ACT :] = torch.linspace(-4, 2, 2 * ACT)
    return agents


class PlainMCQ:
    """Agent i of agents, written down for one agent."""

    def __init__(self, agents, i):
        self.args, self.i = agents.args, i
        self.actor, self.encoder = layers(agents.actor, i), layers(agents.encoder, i)
        self.decoder = layers(agents.decoder[0], i)
        self.critics = [layers(agents.critic.net, k * S + i) for k in (0, 1)]
        self.targets = [layers(agents.critic_target.net, k * S + i) for k in (0, 1)]
        self.log_alpha = agents.log_alpha[i].detach().clone().requires_grad_()
        self.adam_vae = torch.optim.Adam(params(self.encoder, self.decoder), self.args.vae_lr)
        self.adam_critic = torch.optim.Adam(params(*self.critics), self.args.lr)
        self.adam_actor = torch.optim.Adam([*params(self.actor), self.log_alpha], self.args.lr)

    def noise(self, *shape):
        return torch.randn(S, *shape)[self.i]

    def sample(self, s, noise):
        """a ~ pi(. | s) and log pi(a | s)."""
        mean, log_std = mlp(self.actor, s).chunk(2, dim=1)
        std, tanh = log_std.clamp(-5, 2).exp(), TanhTransform(cache_size=1)
        a = tanh(mean + std * noise)
        return a, TransformedDistribution(Normal(mean, std), tanh).log_prob(a).sum(1)

    def q(self, nets, s, a):
        return [mlp(net, hstack([s, a]))[:, 0] for net in nets]

    def update(self, seed, s, a, r, s_next, terminal):
        torch.manual_seed(seed)
        args, n = self.args, self.args.num_actions
        alpha = min(self.log_alpha.exp().item(), 1.0)
        mean, log_std = mlp(self.encoder, hstack([s, a])).chunk(2, dim=1)
        latent = Normal(mean, log_std.clamp(-4, 15).exp())
        recon = mlp(self.decoder, hstack([s, mean + latent.stddev * self.noise(B, 2 * ACT)])).tanh()
        kl = kl_divergence(latent, Normal(0.0, 1.0)).mean()
        losses = {"vae_loss": ((recon - a) ** 2).mean() + kl}
        descend(self.adam_vae, losses["vae_loss"])

        with torch.no_grad():
            a_next, log_pi = self.sample(s_next, self.noise(B, ACT))
            y = torch.min(*self.q(self.targets, s_next, a_next)) - alpha * log_pi
            y = r + args.discount * (1 - terminal) * y
            states, y_policy = torch.cat([s, s_next]), []
            z = torch.cat([self.noise(2 * B * n // S, 2 * ACT) for _ in range(S)]).clamp(-0.5, 0.5)
            for state, own in zip(states, z.view(2 * B, n, 2 * ACT)):  # one after the other
                state = state.expand(n, OBS)
                q = self.q(self.targets, state, mlp(self.decoder, hstack([state, own])).tanh())
                y_policy.append(min(q[0].max(), q[1].max()))
            y_policy = torch.stack(y_policy)
            a_policy, _ = self.sample(states, self.noise(2 * B, ACT))
        at_data = sum(((q - y) ** 2).mean() for q in self.q(self.critics, s, a))
        at_policy = self.q(self.critics, states, a_policy)
        at_policy = sum(((q - y_policy) ** 2).mean() for q in at_policy)
        losses["critic_loss"] = args.lmbda * at_data + (1 - args.lmbda) * at_policy
        descend(self.adam_critic, losses["critic_loss"])

        a_new, log_pi = self.sample(s, self.noise(B, ACT))
        q = torch.min(*self.q(self.critics, s, a_new))
        losses["actor_loss"] = (alpha * log_pi - q).mean()
        losses["alpha_loss"] = -(self.log_alpha * (log_pi.detach() - ACT)).mean()
        descend(self.adam_actor, losses["actor_loss"] + losses["alpha_loss"])
        for target, net in zip(self.targets, self.critics):
            polyak(target, net, args.tau)
        return {key: loss.item() for key, loss in losses.items()}


@pytest.mark.parametrize("log_alpha, lmbda, num_actions", [(-1.0, 0.9, 1), (0.4, 0.6, 4)])
def test_updates_equal_a_plain_rewrite(float64, log_alpha, lmbda, num_actions):
    torch.manual_seed(0)
    agents = make(lmbda=lmbda, num_actions=num_actions, tau=0.1, discount=0.9)
    agents.actor.eval()  # no dropout
    agents.log_alpha.data.fill_(log_alpha)
    plain = [PlainMCQ(agents, i) for i in range(S)]
    vae = [*agents.encoder.parameters(), *agents.decoder.parameters()]
    optimizers = {
        "vae": torch.optim.Adam(vae, agents.args.vae_lr),
        "critic": torch.optim.Adam(agents.critic.parameters(), agents.args.lr),
        "actor": torch.optim.Adam([*agents.actor.parameters(), agents.log_alpha], agents.args.lr),
    }
    for seed in range(3):
        batch = random_batch(S, B, OBS, ACT)
        torch.manual_seed(seed)
        losses = mcq.update(agents, optimizers, [batch].pop)
        expected = [own.update(seed, *(x[i] for x in batch)) for i, own in enumerate(plain)]
        for key, loss in losses.items():
            assert loss.item() == pytest.approx(sum(own[key] for own in expected), rel=1e-9)
    for i, own in enumerate(plain):
        assert abs(agents.log_alpha[i] - own.log_alpha) < 1e-9
        nets = (agents.actor, agents.encoder, agents.decoder[0])
        for net, expected in zip(nets, (own.actor, own.encoder, own.decoder)):
            assert difference(net, expected, i) < 1e-9
        for k in (0, 1):
            assert difference(agents.critic.net, own.critics[k], k * S + i) < 1e-9
            assert difference(agents.critic_target.net, own.targets[k], k * S + i) < 1e-9


def test_log_pi_is_the_slope_of_the_distribution_function(float64):
    """P(a <= y) = Phi((atanh(y) - mean) / std): its numerical derivative is the density."""
    torch.manual_seed(0)
    agents = mcq.MCQ(mcq.Args(device="cpu"), unit_scale(OBS, 1)).eval()
    s = torch.randn(1, 1000, OBS)
    a, log_pi = agents.sample(s)
    mean, log_std = agents.actor(s).chunk(2, dim=-1)
    cdf, h = Normal(mean, log_std.exp()).cdf, 1e-6 * (1 - a.square())
    slope = (cdf((a + h).atanh()) - cdf((a - h).atanh())) / (2 * h)
    torch.testing.assert_close(log_pi.exp(), slope[..., 0], rtol=1e-5, atol=1e-8)

    agents.actor[-1].bias.data[:, :, 0] = 60.0  # tanh rounds to 1
    a, log_pi = agents.sample(s)
    (gradient,) = torch.autograd.grad(log_pi.sum(), agents.actor[-1].bias)
    assert (a == 1).all() and log_pi.isfinite().all() and gradient.isfinite().all()


def test_dropout_differs_by_agent_and_is_off_in_evaluation():
    torch.manual_seed(0)
    agents, s = make(), torch.randn(1, B, OBS).expand(S, B, OBS)
    for p in agents.actor.parameters():
        p.data[1] = p.data[0]
    dropped = agents.actor(s)
    assert not torch.allclose(dropped[0], dropped[1], atol=1e-3)
    assert [layer.p for layer in agents.actor if isinstance(layer, torch.nn.Dropout)] == [0.1, 0.1]
    agents.eval()
    expected = mlp(layers(agents.actor, 0), s[0])[:, :ACT].tanh()
    for own in agents.act(s):
        torch.testing.assert_close(own, expected)
