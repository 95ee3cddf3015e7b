"""TD3+BC: an update against a plain rewrite, the losses in closed form."""

import plain
import torch

import td3bc

S, B, OBS, ACT = 2, 32, 5, 3


def make(**flags):
    args = td3bc.Args(num_seeds=S, device="cpu", **flags)
    agents = td3bc.TD3BC(args, plain.unit_scale(OBS, ACT))
    names = ("critic", "actor")
    return agents, {n: torch.optim.Adam(getattr(agents, n).parameters(), args.lr) for n in names}


def test_update_equals_a_plain_rewrite(float64):
    torch.manual_seed(0)
    agents, optimizers = make(policy_freq=2, lr=1e-3)
    batches = [plain.random_batch(S, B, OBS, ACT) for _ in range(6)]
    for i in range(S):
        agents, optimizers = make(policy_freq=2, lr=1e-3) if i else (agents, optimizers)
        actor = plain.layers(agents.actor[0], i)
        critics = [plain.layers(agents.critic.net, k * S + i) for k in (0, 1)]
        actor_target = plain.layers(agents.actor_target[0], i)
        targets = [plain.layers(agents.critic_target.net, k * S + i) for k in (0, 1)]

        torch.manual_seed(1)
        queue = iter(batches)
        for _ in range(3):
            td3bc.update(agents, optimizers, queue.__next__)

        torch.manual_seed(1)
        critic_adam = torch.optim.Adam(plain.params(*critics), 1e-3)
        actor_adam = torch.optim.Adam(plain.params(actor), 1e-3)
        for n, batch in enumerate(batches, start=1):
            s, a, r, s_next, terminal = (x[i] for x in batch)
            noise = (0.2 * torch.randn(S, B, ACT)[i]).clamp(-0.5, 0.5)
            with torch.no_grad():
                a_next = (plain.mlp(actor_target, s_next).tanh() + noise).clamp(-1, 1)
                x_next = torch.cat([s_next, a_next], dim=1)
                q_next = torch.min(*(plain.mlp(net, x_next)[:, 0] for net in targets))
                y = r + 0.99 * (1 - terminal) * q_next
            q1, q2 = (plain.mlp(net, torch.cat([s, a], dim=1))[:, 0] for net in critics)
            plain.descend(critic_adam, ((q1 - y) ** 2).mean() + ((q2 - y) ** 2).mean())
            if n % 2 == 0:
                pi = plain.mlp(actor, s).tanh()
                q = plain.mlp(critics[0], torch.cat([s, pi], dim=1))
                lmbda = 2.5 / q.abs().mean().item()
                plain.descend(actor_adam, -lmbda * q.mean() + ((pi - a) ** 2).mean())
                plain.polyak(actor_target, actor, 0.005)
                for target, net in zip(targets, critics):
                    plain.polyak(target, net, 0.005)
        assert plain.difference(agents.actor[0], actor, i) < 1e-12
        assert plain.difference(agents.actor_target[0], actor_target, i) < 1e-12
        for k in (0, 1):
            assert plain.difference(agents.critic.net, critics[k], k * S + i) < 1e-12
            assert plain.difference(agents.critic_target.net, targets[k], k * S + i) < 1e-12


def test_target_of_a_terminal_is_its_reward(float64):
    agents, _ = make()
    s, a, r, s_next, terminal = plain.random_batch(S, B, OBS, ACT)
    loss = agents.critic_loss(s, a, r, s_next, torch.ones_like(terminal))
    expected = (agents.critic(s, a) - r).square().mean(-1).sum()
    torch.testing.assert_close(loss, expected)


def test_a_linear_layer_starts_as_pytorchs_does():
    torch.manual_seed(0)
    layer, reference = td3bc.Linear(50, 20, 40), torch.nn.Linear(20, 40)
    for own, other in ((layer.weight, reference.weight), (layer.bias, reference.bias)):
        assert own.abs().max() <= 20**-0.5 and abs(own.mean()) < 0.01
        assert abs(own.std() - other.std()) < 0.02
