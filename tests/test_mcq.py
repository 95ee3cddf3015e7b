"""MCQ: updates against a plain rewrite, the density of the policy in closed form, dropout."""

import plain
import pytest
import torch
from torch.distributions import Normal, TanhTransform, TransformedDistribution, kl_divergence
from torch.optim import Adam

import mcq

S, B, OBS, ACT = 2, 16, 5, 3


def make(**flags):
    torch.manual_seed(0)
    args = mcq.Args(num_seeds=S, device="cpu", **flags)
    agents = mcq.MCQ(args, plain.unit_scale(OBS, ACT))
    agents.actor[-1].bias.data[..., ACT:] = torch.tensor([-5.0, 0.0, 2.0])  # log std: its bounds
    agents.encoder[-1].bias.data[..., 2 * ACT :] = torch.linspace(-4, 2, 2 * ACT)
    return agents


class PlainMCQ:
    """Agent i of agents, written down for one agent."""

    def __init__(self, agents, i):
        self.args = agents.args
        self.i = i
        self.actor = plain.network(agents.actor, i)
        self.encoder = plain.network(agents.encoder, i)
        self.decoder = plain.network(agents.decoder[0], i)
        self.critics = plain.twins(agents.critic, i)
        self.targets = plain.twins(agents.critic_target, i)
        self.log_alpha = agents.log_alpha[i].detach().clone().requires_grad_()
        vae = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.vae_adam = Adam(vae, self.args.vae_lr)
        self.critic_adam = Adam(self.critics.parameters(), self.args.lr)
        self.actor_adam = Adam([*self.actor.parameters(), self.log_alpha], self.args.lr)

    def noise(self, *shape):
        return torch.randn(S, *shape)[self.i]

    def sample(self, s):
        """Returns a ~ pi(. | s) and log pi(a | s)."""
        mean, log_std = self.actor(s).chunk(2, dim=1)
        std = log_std.clamp(-5, 2).exp()
        tanh = TanhTransform(cache_size=1)
        a = tanh(mean + std * self.noise(len(s), ACT))
        return a, TransformedDistribution(Normal(mean, std), tanh).log_prob(a).sum(1)

    def decode(self, s, z):
        return self.decoder(torch.cat([s, z], dim=-1)).tanh()

    def vae_loss(self, s, a):
        mean, log_std = self.encoder(torch.hstack([s, a])).chunk(2, dim=1)
        latent = Normal(mean, log_std.clamp(-4, 15).exp())
        z = mean + latent.stddev * self.noise(B, 2 * ACT)
        kl = kl_divergence(latent, Normal(0.0, 1.0)).mean()
        return ((self.decode(s, z) - a) ** 2).mean() + kl

    def critic_loss(self, alpha, s, a, r, s_next, terminal):
        n = self.args.num_actions
        with torch.no_grad():
            a_next, log_pi = self.sample(s_next)
            q_next = plain.q(self.targets, s_next, a_next).amin(0) - alpha * log_pi
            y = r + self.args.discount * (1 - terminal) * q_next
            states = torch.cat([s, s_next])
            z = torch.cat([self.noise(2 * B * n // S, 2 * ACT) for _ in range(S)])  # in S pieces
            repeated = states[:, None].expand(-1, n, -1)
            best = self.decode(repeated, z.view(2 * B, n, -1).clamp(-0.5, 0.5))
            y_policy = plain.q(self.targets, repeated, best).amax(2).amin(0)
            a_policy, _ = self.sample(states)
        at_data = (plain.q(self.critics, s, a) - y).square().mean(1).sum()
        at_policy = (plain.q(self.critics, states, a_policy) - y_policy).square().mean(1).sum()
        return self.args.lmbda * at_data + (1 - self.args.lmbda) * at_policy

    def update(self, s, a, r, s_next, terminal):
        alpha = min(self.log_alpha.exp().item(), 1.0)
        vae_loss = self.vae_loss(s, a)
        plain.descend((self.vae_adam, vae_loss))
        critic_loss = self.critic_loss(alpha, s, a, r, s_next, terminal)
        plain.descend((self.critic_adam, critic_loss))
        a_new, log_pi = self.sample(s)
        actor_loss = (alpha * log_pi - plain.q(self.critics, s, a_new).amin(0)).mean()
        alpha_loss = -(self.log_alpha * (log_pi.detach() - ACT)).mean()
        plain.descend((self.actor_adam, actor_loss + alpha_loss))
        plain.polyak(self.targets, self.critics, self.args.tau)
        return torch.stack([vae_loss, critic_loss, actor_loss, alpha_loss])


@pytest.mark.parametrize("log_alpha, lmbda, num_actions", [(-1.0, 0.9, 1), (0.4, 0.6, 4)])
def test_updates_equal_a_plain_rewrite(float64, log_alpha, lmbda, num_actions):
    agents = make(lmbda=lmbda, num_actions=num_actions, tau=0.1, discount=0.9)
    agents.actor.eval()  # no dropout
    agents.log_alpha.data.fill_(log_alpha)
    expected = [PlainMCQ(agents, i) for i in range(S)]
    vae = [*agents.encoder.parameters(), *agents.decoder.parameters()]
    optimizers = {
        "vae": Adam(vae, agents.args.vae_lr),
        "critic": Adam(agents.critic.parameters(), agents.args.lr),
        "actor": Adam([*agents.actor.parameters(), agents.log_alpha], agents.args.lr),
    }
    for seed in range(3):
        batch = plain.random_batch(S, B, OBS, ACT)
        torch.manual_seed(seed)
        losses = mcq.update(agents, optimizers, [batch].pop)
        total = torch.zeros(4)
        for i, own in enumerate(expected):
            torch.manual_seed(seed)
            total += own.update(*(x[i] for x in batch)).detach()
        torch.testing.assert_close(torch.stack([*losses.values()]), total, rtol=1e-9, atol=0)
    for i, own in enumerate(expected):
        plain.assert_same(plain.network(agents.actor, i), own.actor, 1e-10)
        plain.assert_same(plain.network(agents.encoder, i), own.encoder, 1e-10)
        plain.assert_same(plain.network(agents.decoder[0], i), own.decoder, 1e-10)
        plain.assert_same(plain.twins(agents.critic, i), own.critics, 1e-10)
        plain.assert_same(plain.twins(agents.critic_target, i), own.targets, 1e-10)
        assert abs(agents.log_alpha[i] - own.log_alpha) < 1e-10


def test_log_pi_is_the_slope_of_the_distribution_function(float64):
    """P(a <= y) = Phi((atanh(y) - mean) / std): its numerical derivative is the density."""
    torch.manual_seed(0)
    agents = mcq.MCQ(mcq.Args(device="cpu"), plain.unit_scale(OBS, 1)).eval()
    s = torch.randn(1, 1000, OBS)
    a, log_pi = agents.sample(s)
    mean, log_std = agents.actor(s).chunk(2, dim=-1)
    cdf = Normal(mean, log_std.exp()).cdf
    h = 1e-6 * (1 - a.square())
    slope = (cdf((a + h).atanh()) - cdf((a - h).atanh())) / (2 * h)
    torch.testing.assert_close(log_pi.exp(), slope[..., 0], rtol=1e-5, atol=1e-8)

    agents.actor[-1].bias.data[:, :, 0] = 60.0  # tanh rounds to 1
    a, log_pi = agents.sample(s)
    (gradient,) = torch.autograd.grad(log_pi.sum(), agents.actor[-1].bias)
    assert (a == 1).all() and log_pi.isfinite().all() and gradient.isfinite().all()


def test_dropout_differs_by_agent_and_is_off_in_evaluation():
    agents = make()
    s = torch.randn(1, B, OBS).expand(S, B, OBS)
    for p in agents.actor.parameters():
        p.data[1] = p.data[0]
    dropped = agents.actor(s)
    assert not torch.allclose(dropped[0], dropped[1], atol=1e-3)
    assert [layer.p for layer in agents.actor if isinstance(layer, torch.nn.Dropout)] == [0.1, 0.1]
    agents.eval()
    expected = plain.network(agents.actor, 0)(s[0])[:, :ACT].tanh()
    for actions in agents.act(s):
        torch.testing.assert_close(actions, expected)
