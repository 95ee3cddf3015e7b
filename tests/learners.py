"""What the tests of the five learners share: how each is made and updated, plain single agents."""

import torch

import cql
import dt
import iql
import mcq
import td3bc

OBS_DIM, ACT_DIM = 11, 3  # Hopper's
LEARNERS = {"td3bc": td3bc, "iql": iql, "cql": cql, "mcq": mcq, "dt": dt}
AGENTS = {td3bc: td3bc.TD3BC, iql: iql.IQL, cql: cql.CQL, mcq: mcq.MCQ, dt: dt.DT}
NO_DROPOUT = {iql: {"actor_dropout": 0.0}, mcq: {"actor_dropout": 0.0}, dt: {"dropout": 0.0}}


def make_args(module, env_id="Hopper-v5", **changes):
    """A learner's arguments, complete as main completes them."""
    args = module.Args(**{"device": "cpu", "compile": False, "eval_episodes": 2, **changes})
    module.fill_in_by_domain(args, env_id)
    return args


def make_agents(module, args):
    return AGENTS[module](args, OBS_DIM, ACT_DIM, torch.device(args.device))


def draw_inputs(module, args, B=32):
    """Random inputs of an update: a batch and, where the learner has it, noise."""

    def normal(*shape):
        return torch.randn(args.num_seeds, B, *shape, device=args.device)

    if module is dt:
        first = torch.randint(900, (args.num_seeds, B, 1), device=args.device)
        step = torch.arange(args.context, device=args.device)
        mask = (step < torch.randint(1, 30, (args.num_seeds, B, 1), device=args.device)) * 1.0
        mask = mask.to(torch.get_default_dtype())
        s, a = normal(args.context, OBS_DIM), normal(args.context, ACT_DIM).clamp(-1, 1)
        return (dt.Sequences(normal(args.context), s, a, first + step, mask),)
    terminal = (torch.rand(args.num_seeds, B, device=args.device) < 0.3) * 1.0
    terminal = terminal.to(torch.get_default_dtype())
    a = normal(ACT_DIM).clamp(-1, 1)
    batch = module.Batch(normal(OBS_DIM), a, normal(), normal(OBS_DIM), terminal)
    if module is td3bc:
        return batch, normal(ACT_DIM)
    if module is cql:
        return batch, cql.CQLNoise.draw(a, args)
    if module is mcq:
        return batch, mcq.MCQNoise.draw(a, args)
    return (batch,)


def of_agent(inputs, i):
    """The inputs of agent i alone, still with a leading [1]."""
    one = slice(i, i + 1)
    return tuple(
        x[one] if torch.is_tensor(x) else type(x)(*(field[one] for field in x)) for x in inputs
    )


def set_schedule(module, agents, step, args):
    """Sets the learning rates of a step, as main does."""
    if module is iql:
        agents.set_actor_lr(args.lr * iql.cosine_decay(step, args.train_steps))
    if module is dt:
        agents.set_lr(args.lr * min(step / args.warmup_steps, 1.0))


def take_update(module, agents, inputs, step, args):
    """The update of main at a step, its schedule included. Returns the losses by name."""
    set_schedule(module, agents, step, args)
    if module is td3bc:
        return td3bc.update(agents, *inputs, step % args.policy_freq == 0, args)
    return module.update(agents, *inputs, args)


class PlainAgent:
    """Agent i of agents: its weights as leaves of their own, and the pieces of a plain update."""

    def __init__(self, agents, i):
        self.i = i
        self.weights = {
            name: {key: p[i].detach().clone().requires_grad_() for key, p in params.items()}
            for name, params in agents.weights.items()
        }

    def adam(self, lr, *names, kind=torch.optim.Adam, **options):
        return kind([p for name in names for p in self.weights[name].values()], lr, **options)

    def mlp(self, name, net, x, drop=lambda x: x):
        """A network of linear layers with ReLU, and drop, between them."""
        weights = self.weights[name]
        keys = [key.removesuffix(".weight") for key in weights if key.endswith(".weight")]
        keys = [key for key in keys if key.startswith(net + ".")]
        for n, key in enumerate(keys):
            x = x @ weights[key + ".weight"].T + weights[key + ".bias"]
            x = drop(x.relu()) if n + 1 < len(keys) else x
        return x

    def q(self, name, net, s, a):
        return self.mlp(name, net, torch.cat([s, a], dim=1))[:, 0]

    def polyak(self, name, tau):
        for key, p in self.weights[name].items():
            target = self.weights[name + "_target"][key]
            target.data = (1 - tau) * target.data + tau * p.data

    def largest_difference(self, agents):
        """The largest difference of a weight from the one of agents."""
        return max(
            (p[self.i] - self.weights[name][key]).abs().max().item()
            for name, params in agents.weights.items()
            for key, p in params.items()
        )


def descend(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
