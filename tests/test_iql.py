"""IQL's update against the equations of its paper, written down for one agent."""

import pytest
import torch
import torch.nn.functional as F
from learners import PlainAgent, descend, draw_inputs, make_agents, make_args, take_update

import iql


class PlainIQL(PlainAgent):
    def __init__(self, agents, i, args):
        super().__init__(agents, i)
        self.args = args
        self.optimizers = {name: self.adam(args.lr, name) for name in ("actor", "critic", "value")}
        if args.deterministic:  # log_std has no part in anything
            del self.weights["actor"]["log_std"]
            self.optimizers["actor"] = self.adam(args.lr, "actor")
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizers["actor"], args.train_steps
        )

    def update(self, s, a, r, s_next, terminal, drop=lambda x: x):
        args = self.args
        with torch.no_grad():
            q = torch.minimum(*(self.q("critic_target", net, s, a) for net in ("q1", "q2")))
            v_next = self.mlp("value", "net", s_next)[:, 0]
            y = r + args.discount * (1 - terminal) * v_next
        v = self.mlp("value", "net", s)[:, 0]
        value_loss = 0
        for u in q - v:
            weight = 1 - args.expectile if u < 0 else args.expectile
            value_loss = value_loss + weight * u**2 / len(q)
        advantage = (q - v).detach()
        critic_loss = sum(F.mse_loss(self.q("critic", net, s, a), y) for net in ("q1", "q2")) / 2
        mean = torch.tanh(self.mlp("actor", "net", s, drop))
        if args.deterministic:
            log_prob = -((mean - a) ** 2).sum(1)
        else:
            log_std = self.weights["actor"]["log_std"].clamp(-5, 2)
            log_prob = torch.distributions.Normal(mean, log_std.exp()).log_prob(a).sum(1)
        weight = torch.minimum(torch.exp(args.beta * advantage), torch.tensor(100.0))
        actor_loss = -(weight * log_prob).mean()
        losses = {"value_loss": value_loss, "critic_loss": critic_loss, "actor_loss": actor_loss}
        for name, loss in losses.items():
            descend(self.optimizers[name.removesuffix("_loss")], loss)
        self.schedule.step()
        self.polyak("critic", args.tau)
        return {name: loss.item() for name, loss in losses.items()}


@pytest.mark.parametrize(
    "changes",
    [{}, {"deterministic": True}, {"expectile": 0.9, "beta": 10.0, "tau": 0.1, "discount": 0.9}],
    ids=["gaussian", "deterministic", "other constants"],
)
def test_update_is_the_papers_for_every_agent(float64, changes):
    args = make_args(iql, num_seeds=3, seed=5, train_steps=8, **changes)
    agents = make_agents(iql, args)
    if "log_std" in agents.actor.params:  # one beyond its bound
        agents.actor.params["log_std"].data[:] = torch.tensor([0.3, -1.0, 2.5])
    plain = [PlainIQL(agents, i, args) for i in range(3)]
    torch.manual_seed(0)
    for step in range(1, 6):
        (batch,) = draw_inputs(iql, args)
        losses = take_update(iql, agents, (batch,), step, args)
        for i, agent in enumerate(plain):
            expected = agent.update(*(field[i] for field in batch))
            for name, loss in expected.items():
                assert losses[name][i].item() == pytest.approx(loss, rel=1e-9)
    if args.deterministic:
        del agents.weights["actor"]["log_std"]
    for agent in plain:
        assert agent.largest_difference(agents) < 1e-9


def test_dropout_acts_in_the_actors_loss_only(float64):
    args = make_args(iql, actor_dropout=0.4, train_steps=8)
    agents = make_agents(iql, args)
    plain = PlainIQL(agents, 0, args)
    torch.manual_seed(0)
    (batch,) = draw_inputs(iql, args)
    torch.manual_seed(1)
    losses = take_update(iql, agents, (batch,), 1, args)
    torch.manual_seed(1)
    expected = plain.update(*(field[0] for field in batch), drop=lambda x: F.dropout(x, 0.4))
    assert losses["actor_loss"].item() == pytest.approx(expected["actor_loss"], rel=1e-9)
    assert plain.largest_difference(agents) < 1e-9
    assert torch.equal(agents.act(batch.s), agents.act(batch.s))
    action = torch.tanh(plain.mlp("actor", "net", batch.s[0]))
    torch.testing.assert_close(agents.act(batch.s)[0], action, atol=1e-9, rtol=0)


def test_gaussian_log_density(float64):
    torch.manual_seed(0)
    mean, log_std, x = torch.randn(3, 20, 4)
    own = torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), 1)
    torch.testing.assert_close(iql.gaussian_log_prob(mean, log_std, x), own.log_prob(x))


def test_cosine_decay_is_pytorchs():
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], 1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    for step in range(1, 51):
        assert iql.cosine_decay(step, 50) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()
