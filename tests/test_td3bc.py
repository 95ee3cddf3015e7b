"""TD3+BC: an update against a plain rewrite, the losses in closed form."""

import plain
import pytest
import torch
from torch.optim import Adam

import td3bc

S, B, OBS, ACT = 2, 32, 5, 3


def make(**flags):
    torch.manual_seed(0)
    args = td3bc.Args(num_seeds=S, device="cpu", **flags)
    agents = td3bc.TD3BC(args, plain.unit_scale(OBS, ACT))
    optimizers = {
        "critic": Adam(agents.critic.parameters(), args.lr),
        "actor": Adam(agents.actor.parameters(), args.lr),
    }
    return agents, optimizers


@pytest.mark.parametrize("i", range(S))
def test_updates_equal_a_plain_rewrite(float64, i):
    agents, optimizers = make(policy_freq=2, lr=1e-3)
    actor = plain.network(agents.actor[0], i)
    critics = plain.twins(agents.critic, i)
    actor_target = plain.network(agents.actor_target[0], i)
    targets = plain.twins(agents.critic_target, i)
    batches = [plain.random_batch(S, B, OBS, ACT) for _ in range(6)]

    torch.manual_seed(1)
    queue = iter(batches)
    for _ in range(3):
        td3bc.update(agents, optimizers, queue.__next__)

    torch.manual_seed(1)
    critic_adam = Adam(critics.parameters(), 1e-3)
    actor_adam = Adam(actor.parameters(), 1e-3)
    for n, batch in enumerate(batches, start=1):
        s, a, r, s_next, terminal = (x[i] for x in batch)
        noise = (0.2 * torch.randn(S, B, ACT)[i]).clamp(-0.5, 0.5)
        with torch.no_grad():
            a_next = (actor_target(s_next).tanh() + noise).clamp(-1, 1)
            q_next = plain.q(targets, s_next, a_next).amin(0)
            y = r + 0.99 * (1 - terminal) * q_next
        q1, q2 = plain.q(critics, s, a)
        plain.descend((critic_adam, ((q1 - y) ** 2).mean() + ((q2 - y) ** 2).mean()))
        if n % 2 == 0:
            pi = actor(s).tanh()
            q, _ = plain.q(critics, s, pi)
            lmbda = 2.5 / q.abs().mean().item()
            plain.descend((actor_adam, -lmbda * q.mean() + ((pi - a) ** 2).mean()))
            plain.polyak(actor_target, actor, 0.005)
            plain.polyak(targets, critics, 0.005)
    plain.assert_same(plain.network(agents.actor[0], i), actor)
    plain.assert_same(plain.network(agents.actor_target[0], i), actor_target)
    plain.assert_same(plain.twins(agents.critic, i), critics)
    plain.assert_same(plain.twins(agents.critic_target, i), targets)


def test_target_of_a_terminal_is_its_reward(float64):
    agents, _ = make()
    s, a, r, s_next, terminal = plain.random_batch(S, B, OBS, ACT)
    loss = agents.critic_loss(s, a, r, s_next, torch.ones_like(terminal))
    expected = (agents.critic(s, a) - r).square().mean(-1).sum()
    torch.testing.assert_close(loss, expected)


def test_a_linear_layer_starts_as_pytorchs_does():
    torch.manual_seed(0)
    layer = td3bc.Linear(50, 20, 40)
    reference = torch.nn.Linear(20, 40)
    for own, other in ((layer.weight, reference.weight), (layer.bias, reference.bias)):
        assert own.abs().max() <= 20**-0.5 and abs(own.mean()) < 0.01
        assert abs(own.std() - other.std()) < 0.02
