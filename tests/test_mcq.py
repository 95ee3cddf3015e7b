"""MCQ's update against the equations of its paper, written down for one agent."""

import pytest
import torch
import torch.nn.functional as F
from learners import descend, draw_inputs, make_agents, make_args, take_update
from test_cql import PlainSAC

import mcq


class PlainMCQ(PlainSAC):
    def __init__(self, agents, i, args):
        super().__init__(agents, i)
        self.args = args
        self.optimizers = {
            "vae_loss": self.adam(args.vae_lr, "encoder", "decoder"),
            "critic_loss": self.adam(args.lr, "critic"),
            "actor_loss": self.adam(args.lr, "actor"),
            "alpha_loss": self.adam(args.lr, "temperature"),
        }

    def gaussian(self, s, drop=lambda x: x):
        mean, log_std = self.mlp("actor", "net", s, drop).chunk(2, dim=1)
        return mean, log_std.clamp(-5, 2).exp()

    def decode(self, s, z):
        return torch.tanh(self.mlp("decoder", "net", torch.cat([s, z], dim=1)))

    def update(self, batch, noise, drop=lambda x: x):
        args, B = self.args, len(batch.r)
        s, a, r, s_next, terminal = batch
        log_alpha = self.weights["temperature"]["log_alpha"]
        alpha = min(log_alpha.exp().item(), 1.0)
        losses = {}

        mean, log_std = self.mlp("encoder", "net", torch.cat([s, a], dim=1)).chunk(2, dim=1)
        latent = torch.distributions.Normal(mean, log_std.clamp(-4, 15).exp())
        recon = self.decode(s, latent.mean + latent.stddev * noise.vae)
        unit = torch.distributions.Normal(0.0, 1.0)
        kl = torch.distributions.kl_divergence(latent, unit).mean()
        losses["vae_loss"] = ((recon - a) ** 2).mean() + kl
        descend(self.optimizers["vae_loss"], losses["vae_loss"])

        with torch.no_grad():
            a_next, log_pi = self.sample(s_next, noise.target, drop)
            q = torch.minimum(
                *(self.q("critic_target", net, s_next, a_next) for net in ("q1", "q2"))
            )
            y = r + args.discount * (1 - terminal) * (q - alpha * log_pi)
            states = torch.cat([s, s_next])
            best = []
            for net in ("q1", "q2"):
                q = [
                    self.q(
                        "critic_target", net, states, self.decode(states, z.clamp(-0.5, 0.5))
                    )
                    for z in noise.behaviour.unbind(1)
                ]  # fmt: skip
                best.append(torch.stack(q).max(0).values)
            y_policy = torch.minimum(*best)
            a_policy, _ = self.sample(states, noise.policy, drop)
        losses["critic_loss"] = 0
        for net in ("q1", "q2"):
            at_data = F.mse_loss(self.q("critic", net, s, a), y)
            at_policy = F.mse_loss(self.q("critic", net, states, a_policy), y_policy)
            own = args.lmbda * at_data + (1 - args.lmbda) * at_policy
            losses["critic_loss"] = losses["critic_loss"] + own
        assert len(y_policy) == 2 * B
        descend(self.optimizers["critic_loss"], losses["critic_loss"])

        a_new, log_pi = self.sample(s, noise.actor, drop)
        q = torch.minimum(*(self.q("critic", net, s, a_new) for net in ("q1", "q2")))
        losses["actor_loss"] = (alpha * log_pi - q).mean()
        losses["alpha_loss"] = -(log_alpha * (log_pi.detach() - a.shape[1])).mean()
        for name in ("actor_loss", "alpha_loss"):
            descend(self.optimizers[name], losses[name])
        self.polyak("critic", args.tau)
        return {name: loss.item() for name, loss in losses.items()}


@pytest.mark.parametrize(
    "log_alpha, changes",
    [
        (0.0, {}),
        (0.4, {"lmbda": 0.6, "num_actions": 4, "tau": 0.1, "discount": 0.9}),
        (-1.0, {"vae_lr": 1e-4}),
    ],
    ids=["defaults", "temperature above its bound", "small temperature"],
)
def test_update_is_the_papers_for_every_agent(float64, log_alpha, changes):
    args = make_args(mcq, num_seeds=3, seed=5, actor_dropout=0.0, **changes)
    agents = make_agents(mcq, args)
    agents.temperature["log_alpha"].data.fill_(log_alpha)
    plain = [PlainMCQ(agents, i, args) for i in range(3)]
    torch.manual_seed(0)
    for step in range(1, 4):
        batch, noise = draw_inputs(mcq, args, B=16)
        losses = take_update(mcq, agents, (batch, noise), step, args)
        for i, agent in enumerate(plain):
            own = [type(x)(*(field[i] for field in x)) for x in (batch, noise)]
            expected = agent.update(*own)
            assert set(expected) == set(losses)
            for name, loss in expected.items():
                assert losses[name][i].item() == pytest.approx(loss, rel=1e-9)
    for agent in plain:
        assert agent.largest_difference(agents) < 1e-9


def test_dropout_acts_in_the_actor_in_targets_and_losses_alike(float64):
    args = make_args(mcq)
    assert args.actor_dropout == 0.1
    agents = make_agents(mcq, args)
    plain = PlainMCQ(agents, 0, args)
    torch.manual_seed(0)
    batch, noise = draw_inputs(mcq, args, B=16)
    torch.manual_seed(1)
    losses = take_update(mcq, agents, (batch, noise), 1, args)
    torch.manual_seed(1)
    own = [type(x)(*(field[0] for field in x)) for x in (batch, noise)]
    expected = plain.update(*own, drop=lambda x: F.dropout(x, 0.1))
    for name, loss in expected.items():
        assert losses[name].item() == pytest.approx(loss, rel=1e-9)
    assert plain.largest_difference(agents) < 1e-9
    assert torch.equal(agents.act(batch.s), agents.act(batch.s))


def test_behaviour_policy_learns_the_actions(float64):
    """Two actions, each in its own half of the states: the decoder tells them apart."""
    args = make_args(mcq, num_actions=1)
    agents = make_agents(mcq, args)
    torch.manual_seed(0)
    for _ in range(150):
        batch, noise = draw_inputs(mcq, args, B=64)
        side = batch.s[..., :1].sign()
        take_update(mcq, agents, (batch._replace(a=0.6 * side.expand(-1, -1, 3)), noise), 1, args)
    s = batch.s[0][batch.s[0, :, 0].abs() > 0.5]
    z = torch.randn(len(s), 6).clamp(-0.5, 0.5)
    params = {k: p[0].detach() for k, p in agents.decoder.params.items()}
    a = agents.decoder.bind(params)(s, z)
    assert (a * s[:, :1].sign() > 0.3).float().mean() > 0.9
