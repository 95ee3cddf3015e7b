# /// script
# requires-python = ">=3.11"
# dependencies = ["torch", "numpy", "gymnasium[mujoco]", "minari[hdf5,hf]", "tyro", "tqdm", "wandb"]
# ///
"""CQL (Kumar et al., 2020) on an offline dataset, alone or with generated trajectories.

    python cql.py --env hopper-medium               the dataset alone
    python cql.py --aug buffer.npz --num-seeds 8    and a buffer of gta_augment.py, eight agents

Reads a Minari dataset and buffer.npz. Writes runs/<name>/: checkpoint.pt, config.json, evals.csv.
With the --out of a run that was killed, the same command goes on where that run stopped.
"""

import copy
import json
import math
import os
import re
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import minari
import numpy as np
import torch
import tyro
from gymnasium.vector.utils import batch_space, iterate
from torch import nn
from tqdm import tqdm


@dataclass
class Args:
    # short name (hopper-medium), Minari id, folder of a Minari dataset, or several joined by +.
    # Default: what --aug was made from, else the bundled dataset
    env: str | None = None
    aug: str | None = None  # buffer.npz to train on, too
    aug_only: bool = False  # train on the buffer alone
    # S4RL baseline: standard deviation of noise on standardised states (GTA, C.1: 3e-4)
    s4rl_sigma: float = 0.0
    train_steps: int = 1_000_000  # updates (GTA, C.3)
    batch_size: int = 1024  # transitions in a batch (GTA, C.3)
    num_seeds: int = 1  # independent agents, trained at once
    lr: float = 3e-4  # learning rate of Adam: critics and Lagrange multiplier
    # learning rate of Adam: actor and temperature. Default: 1e-4 in AntMaze and Adroit, else 3e-5
    actor_lr: float | None = None
    discount: float = 0.99  # discount factor
    tau: float = 0.005  # step of the target critics towards the trained ones
    # weight of the conservative loss (eq. 4). Default: 5 in AntMaze, 1 in Adroit, else 10
    cql_alpha: float | None = None
    # sampled actions, each of a uniform distribution, pi(s) and pi(s'), for log sum exp Q
    num_actions: int = 10
    # >= 0: a Lagrange multiplier keeps log sum exp Q - Q(s, a) at this value (eq. 30). < 0: the
    # weight is fixed. Default: 5 in maze2d, 0.8 in AntMaze, else -1
    target_gap: float | None = None
    # the target takes the best of --num-actions next actions, not one. Default: in AntMaze
    max_target_backup: bool | None = None
    # lower bound of log sum exp Q - Q(s, a) in the loss. Default: -200 in AntMaze, else none
    min_gap: float | None = None
    critic_layers: int | None = None  # hidden layers of a critic. Default: 5 in AntMaze, else 3
    # training sees reward_scale * reward + reward_bias. Default: 10 in AntMaze, else 1
    reward_scale: float | None = None
    reward_bias: float | None = None  # see --reward-scale. Default: -5 in AntMaze, else 0
    # updates between evaluations, each of which writes a checkpoint; 0: none, write at the end
    eval_every: int = 50_000
    # episodes of an evaluation. Default: 10 in locomotion, else 100 (GTA, C.3)
    eval_episodes: int | None = None
    # folder to write, or to go on with. Default: runs/cql-<env>-<augmentation>-<seed>-<time>
    out: str | None = None
    seed: int = 0  # seed of weights, batches, noise and evaluation episodes
    # CUDA_VISIBLE_DEVICES picks the card
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    track: bool = False  # log to Weights & Biases; WANDB_PROJECT and WANDB_ENTITY say where


BY_DOMAIN = {  # by a word in the environment's id, from CORL (AntMaze there: raw states)
    "actor_lr": {"AntMaze": 1e-4, "Adroit": 1e-4, "": 3e-5},
    "cql_alpha": {"AntMaze": 5.0, "Adroit": 1.0, "": 10.0},
    "target_gap": {"AntMaze": 0.8, "Maze": 5.0, "": -1.0},
    "max_target_backup": {"AntMaze": True, "": False},
    "min_gap": {"AntMaze": -200.0, "": None},
    "critic_layers": {"AntMaze": 5, "": 3},
    "reward_scale": {"AntMaze": 10.0, "": 1.0},
    "reward_bias": {"AntMaze": -5.0, "": 0.0},
}


def fill_in_by_domain(args, name):
    """Sets the flags that were left at None: the first word that is in the name decides."""
    for key, values in BY_DOMAIN.items():
        if getattr(args, key) is None:
            setattr(args, key, next(x for word, x in values.items() if word in name))


def require(condition, message):
    """Ends the program with one line and exit code 1 unless the condition holds."""
    if not condition:
        sys.exit("error: " + " ".join(message.split()))


@contextmanager
def blame(message):
    """Turns an exception into one line: what is run inside fails by the user's data or machine."""
    try:
        yield
    except Exception as error:
        require(False, f"{message} ({error})")


# --- data ---

DEFAULT_ENV = "data/halfcheetah-medium-sample"
SHORT_NAMES = {  # of --env, and the Minari ids that they stand for
    r"maze2d-((umaze|medium|large)(-dense)?)": r"D4RL/pointmaze/\1-v2",
    r"antmaze-([a-z-]+)": r"D4RL/antmaze/\1-v1",
    r"(pen|door|hammer|relocate|kitchen)-([a-z]+)": r"D4RL/\1/\2-v2",
    r"([a-z0-9]+)-(simple|medium|expert)": r"mujoco/\1/\2-v0",
    r"([a-z0-9]+)-medium-expert": r"mujoco/\1/medium-v0+mujoco/\1/expert-v0",
}


class Episode(NamedTuple):
    observations: np.ndarray  # [T + 1, obs_dim]
    actions: np.ndarray  # [T, act_dim]
    rewards: np.ndarray  # [T]
    terminations: np.ndarray  # [T] whether the environment terminated; a truncation does not count


def open_datasets(env):
    """Returns the Minari datasets that --env names: folders, ids in the cache, ids on the hub."""
    here, parts = Path(__file__).resolve().parent, env.split("+")
    for n in range(len(parts), 0, -1):  # a folder's own name may hold a +
        name = "+".join(parts[:n])
        folders = [place / name / "data" for place in (Path(), here, here.parent)]
        if folder := next((f for f in folders if (f / "metadata.json").is_file()), None):
            break
    for pattern, ids in SHORT_NAMES.items():
        name = name if folder else re.sub(f"^{pattern}$", ids, name)
    first, *rest = [name] if folder else name.split("+")
    if rest := [*rest, *parts[n:]]:
        return open_datasets(first) + open_datasets("+".join(rest))
    require(folder or name != DEFAULT_ENV, "--env is missing, as in --env hopper-medium")
    with blame(f"--env {name}: no folder of a Minari dataset, short name or id that can be read"):
        return [minari.MinariDataset(folder) if folder else minari.load_dataset(name, True)]


def env_id(dataset):
    """Returns the Gymnasium id of the environment that was recorded, "" if none is named."""
    return getattr(dataset.env_spec, "id", "")


def load_episodes(datasets):
    """Returns all episodes, their observations as gymnasium.spaces.utils.flatten makes them."""
    episodes, first = [], datasets[0]
    for dataset in datasets:
        space, box = dataset.observation_space, dataset.action_space
        image = r"\(\d+, \d+, \d+|\(\d+, \d+\), uint8"  # wherever it is nested
        fits = space.is_np_flattenable and not re.search(image, str(space))
        require(fits, f"{dataset.id}: observations must be vectors of numbers, not {space}")
        fits = isinstance(box, gym.spaces.Box) and len(box.shape) == 1
        require(fits, f"{dataset.id}: actions must be a vector of real numbers, not {box}")
        fits = (env_id(dataset), box) == (env_id(first), first.action_space)
        require(fits, f"{dataset.id}: another environment, or other actions, than {first.id}")
        with blame(f"{dataset.id} cannot be read"):
            raw = list(dataset.iterate_episodes())
        for e in raw:
            T, states = len(e.rewards), iterate(batch_space(space), e.observations)
            with blame(f"{dataset.id}: observations of episode {e.id} do not fit {space}"):
                s = np.stack([gym.spaces.flatten(space, x) for x in states])
            arrays = Episode(s, e.actions, e.rewards, np.asarray(e.terminations, bool))
            shapes = Episode((T + 1, gym.spaces.flatdim(space)), (T, *box.shape), (T,), (T,))
            for key, x, shape in zip(Episode._fields, arrays, shapes):
                name = f"{dataset.id}: {key} of episode {e.id}"
                fits = len(x) == shape[0] and x.size == math.prod(shape)
                require(fits, f"{name} have the shape {x.shape}, not {shape}")
                fits = (np.abs(x) < np.finfo(np.float32).max).all()
                require(fits, f"{name} hold NaN, or numbers too large for float32")
            episodes.append(Episode(*(x.reshape(shape) for x, shape in zip(arrays, shapes))))
    names, num_steps = [d.id for d in datasets], sum(len(e.rewards) for e in episodes)
    print(f"dataset: {' + '.join(names)}, {len(episodes)} episodes, {num_steps} transitions")
    sizes = {e.observations.shape[1] for e in episodes}
    require(len(sizes) == 1, f"--env: no episodes, or states of different sizes {sizes}")
    return episodes


def read_buffer(path):
    """Returns the arrays of buffer.npz, which the README lists, and its metadata."""
    with blame(f"--aug {path}: no buffer of gta_augment.py"):
        with np.load(path, allow_pickle=False) as file:
            buffer = dict(file)
        metadata = json.loads(str(buffer.pop("metadata")))
        kind = metadata["format"], metadata["format_version"]
        finite = all(np.isfinite(x).all() for x in buffer.values())
        buffer["terminals"] = buffer["terminals"].astype(bool)
    require(kind == ("gta-buffer", 1), f"--aug {path}: {kind}, not version 1 of gta-buffer")
    require(finite, f"--aug {path} holds NaN or infinite numbers")
    return buffer, metadata


def load_data(args):
    """Returns the datasets, their episodes, those to train on (a buffer's windows are episodes,
    too, and come last), and what to call the data. Fills in args.env."""
    require(args.aug or not args.aug_only, "--aug-only needs --aug buffer.npz")
    buffer, metadata = read_buffer(args.aug) if args.aug else (None, {})
    args.env = args.env or metadata.get("env", DEFAULT_ENV)
    datasets = open_datasets(args.env)
    real, generated = load_episodes(datasets), []
    labels = [f"s4rl({args.s4rl_sigma})"] if args.s4rl_sigma else []
    about = {"env_id": env_id(datasets[0]), "dataset_ids": [dataset.id for dataset in datasets]}
    if args.aug:
        with blame(f"--aug {args.aug} lacks a part of a buffer"):
            made_from, (N, H) = metadata["dataset_ids"], buffer["rewards"].shape
            label = (metadata.get("label") or metadata["method"]) + " only" * args.aug_only
            columns = [buffer[key] for key in ("observations", "actions", "rewards", "terminals")]
        fits = made_from == about["dataset_ids"]
        require(fits, f"--aug {args.aug} was made from {made_from}, not from --env {args.env}")
        obs_dim, act_dim = real[0].observations.shape[1], real[0].actions.shape[1]
        shapes = [(N, H + 1, obs_dim), (N, H, act_dim), (N, H), (N, H)]
        own = [x.shape for x in columns]
        require(own == shapes, f"--aug {args.aug} holds arrays of {own}, not {shapes}")
        generated, labels = [Episode(*window) for window in zip(*columns)], [label, *labels]
    about["aug_label"] = " + ".join(labels) or "none"
    return datasets, real, generated if args.aug_only else real + generated, about


def make_scale(s, box, eps=1e-3):
    """Returns what standardises states s [N, obs_dim] and maps [-1, 1] to the box of actions."""
    low, high = torch.from_numpy(np.float64([box.low, box.high]))
    require((high - low < 1e30).all(), f"the actions have no bounds, {box}")
    mean, std = s.double().mean(0), s.double().std(0, correction=0) + eps
    return {"mean": mean, "std": std, "center": (high + low) / 2, "radius": (high - low) / 2}


def pack_transitions(episodes, action_space, args):
    """Returns a function that draws s, a, r, s', terminal, all [S, B, ...], and their scale."""
    columns = zip(*((e.observations[:-1], *e[1:], e.observations[1:]) for e in episodes))
    s, a, r, terminal, s_next = (torch.from_numpy(np.concatenate(x)) for x in columns)
    scale = make_scale(s, action_space)
    s, s_next = ((x - scale["mean"]) / scale["std"] for x in (s, s_next))
    width = scale["radius"].where(scale["radius"] > 0, 1.0)  # an action of no width is 0
    a = (a - scale["center"]) / width
    columns = [s, a, r[:, None], s_next, terminal[:, None]]
    rows = torch.cat([x.float() for x in columns], dim=1).to(args.device)
    widths = [x.shape[1] for x in columns]

    def draw_batch():  # one gather
        index = torch.randint(len(rows), (args.num_seeds, args.batch_size), device=args.device)
        s, a, r, s_next, terminal = rows[index].split(widths, dim=-1)
        if args.s4rl_sigma:
            s, s_next = (x + args.s4rl_sigma * torch.randn_like(x) for x in (s, s_next))
        return s, a, r.squeeze(-1), s_next, terminal.squeeze(-1)

    return draw_batch, scale


# --- networks: all agents in one. Weights and activations are [S, ...], S = --num-seeds ---


class Linear(nn.Module):
    """A linear layer of every agent, initialised as nn.Linear. [S, B, d_in] -> [S, B, d_out]"""

    def __init__(self, S, d_in, d_out):
        super().__init__()
        bound = 1 / math.sqrt(d_in)
        self.weight = nn.Parameter(torch.empty(S, d_in, d_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(S, 1, d_out).uniform_(-bound, bound))

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)


def mlp(S, *dims, dropout=0.0):
    """Linear layers with ReLU, and dropout if there is any, between them."""
    layers = []
    for d_in, d_out in zip(dims, dims[1:]):
        layers += [Linear(S, d_in, d_out), nn.ReLU(inplace=True), nn.Dropout(dropout)]
    return nn.Sequential(*layers[:-2])


class TwinCritic(nn.Module):
    """Q_1 and Q_2, in one product. [S, B, obs_dim], [S, B, act_dim] -> [2, S, B]"""

    def __init__(self, S, obs_dim, act_dim, hidden=(256, 256)):
        super().__init__()
        self.net = mlp(2 * S, obs_dim + act_dim, *hidden, 1)

    def forward(self, s, a):
        x = torch.cat([s, a], dim=-1)
        return self.net(x.repeat(2, 1, 1)).view(2, *x.shape[:2])


def orthogonal_init(net):
    """Orthogonal weights and zero biases in a network of mlp; its outputs start near zero."""
    linear = [layer for layer in net if isinstance(layer, Linear)]
    for layer in linear:
        nn.init.zeros_(layer.bias)
        for weight in layer.weight:  # of an agent
            nn.init.orthogonal_(weight, gain=0.01 if layer is linear[-1] else math.sqrt(2))


class CQLActor(nn.Module):
    """Mean and log standard deviation of a before its tanh. [S, B, obs_dim] -> two of [S, B,
    act_dim]"""

    def __init__(self, S, obs_dim, act_dim):
        super().__init__()
        self.net = mlp(S, obs_dim, 256, 256, 256, 2 * act_dim)
        self.log_std_scale = nn.Parameter(torch.ones(S, 1, 1))
        self.log_std_offset = nn.Parameter(-torch.ones(S, 1, 1))
        orthogonal_init(self.net)

    def forward(self, s):
        mean, log_std = self.net(s).chunk(2, dim=-1)
        log_std = self.log_std_scale * log_std + self.log_std_offset
        return mean, log_std.clamp(-20.0, 2.0)


# --- CQL ---


def tanh_gaussian(mean, log_std):
    """Draws a = tanh(x), x ~ N(mean, exp(log_std)^2). Returns a [..., act_dim] and log pi(a) [...],
    which is computed from x: it stays finite where tanh(x) rounds to 1 or -1."""
    noise = torch.randn_like(mean)
    x = mean + log_std.exp() * noise
    log_prob = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
    log_derivative = 2 * (math.log(2) - torch.logaddexp(x, -x))  # log (1 - tanh(x)^2)
    return torch.tanh(x), (log_prob - log_derivative).sum(-1)


def repeat(x, n):
    """[S, B, d] -> [S, B, n, d]"""
    return x.unsqueeze(2).expand(-1, -1, n, -1)


def q_of_several(critic, s, a):
    """Q_1 and Q_2 of n actions a [S, B, n, act_dim] in every state. -> [2, S, B, n]"""
    q, (S, B, n, _) = [], a.shape
    pieces = 1 if a.is_cuda else 2 * S  # which a CPU's cache holds
    for s_i, a_i in zip(s.chunk(pieces, dim=1), a.chunk(pieces, dim=1)):
        q.append(critic(repeat(s_i, n).flatten(1, 2), a_i.flatten(1, 2)))
    return torch.cat(q, dim=2).unflatten(2, (B, n))


class CQL(nn.Module):
    """S agents. A loss is a sum over them, so that each gets the gradient of its own."""

    def __init__(self, args, scale):
        super().__init__()
        self.args, obs_dim, act_dim = args, len(scale["mean"]), len(scale["radius"])
        for key, x in scale.items():
            self.register_buffer(key, x)
        self.actor = CQLActor(args.num_seeds, obs_dim, act_dim)
        self.critic = TwinCritic(args.num_seeds, obs_dim, act_dim, [256] * args.critic_layers)
        orthogonal_init(self.critic.net)
        self.critic_target = copy.deepcopy(self.critic)
        self.log_alpha = nn.Parameter(torch.zeros(args.num_seeds))  # of SAC's entropy
        self.log_alpha_prime = nn.Parameter(torch.ones(args.num_seeds))  # of the gap (eq. 30)

    def act(self, s):
        """The actions to take. [S, K, obs_dim] standardised -> [S, K, act_dim] in [-1, 1]"""
        return torch.tanh(self.actor(s)[0])

    def actor_loss(self, s):
        """alpha log pi(a | s) - min Q(s, a) (SAC, eq. 7), and the loss that moves alpha until the
        entropy of pi is -act_dim (SAC, eq. 18). Returns both."""
        a, log_pi = tanh_gaussian(*self.actor(s))
        alpha = self.log_alpha.exp().detach().unsqueeze(-1)
        actor_loss = (alpha * log_pi - self.critic(s, a).amin(0)).mean(-1).sum()
        alpha_loss = -(self.log_alpha * (log_pi.detach() - a.shape[-1]).mean(-1)).sum()
        return actor_loss, alpha_loss

    def target(self, r, s_next, terminal):
        """r + gamma min Q(s', a') of the targets [S, B], the best of n a' with --max-target-backup.
        The entropy is not in the backup."""
        n = self.args.num_actions if self.args.max_target_backup else 1
        a_next, _ = tanh_gaussian(*(repeat(x, n) for x in self.actor(s_next)))
        q_next = q_of_several(self.critic_target, s_next, a_next).amin(0).amax(-1)
        return r + self.args.discount * (1 - terminal) * q_next

    def sample_actions(self, s, s_next):
        """Actions at s, n each from a uniform distribution, pi(s) and pi(s'), and their log
        densities. [S, B, 3n, act_dim], [S, B, 3n]"""
        n = self.args.num_actions
        a_pi, log_pi = tanh_gaussian(*(repeat(x, n) for x in self.actor(s)))
        a_next, log_pi_next = tanh_gaussian(*(repeat(x, n) for x in self.actor(s_next)))
        uniform = 2 * torch.rand_like(a_pi) - 1
        log_uniform = torch.full_like(log_pi, -a_pi.shape[-1] * math.log(2))
        densities = torch.cat([log_uniform, log_pi, log_pi_next], dim=-1)
        return torch.cat([uniform, a_pi, a_next], dim=2), densities

    def critic_loss(self, s, a, r, s_next, terminal):
        """(Q(s, a) - target)^2 + alpha (log sum_a exp Q(s, a) - Q(s, a of the data)) (eq. 4).

        The sum is by importance sampling; the constant -log 3n is left out. With --target-gap alpha
        is multiplied by a Lagrange multiplier alpha' (eq. 30). Returns the loss and that of alpha'.
        """
        args = self.args
        with torch.no_grad():
            target = self.target(r, s_next, terminal)
            sampled, log_density = self.sample_actions(s, s_next)
        q = q_of_several(self.critic, s, torch.cat([a.unsqueeze(2), sampled], dim=2))
        td_loss = (q[..., 0] - target).square().mean(-1).sum(0)  # [S]
        gap = torch.logsumexp(q[..., 1:] - log_density, dim=-1) - q[..., 0]  # [2, S, B]
        gap = (gap if args.min_gap is None else gap.clamp(min=args.min_gap)).mean(-1)
        if args.target_gap < 0:
            return (td_loss + args.cql_alpha * gap.sum(0)).sum(), torch.zeros_like(td_loss).sum()
        alpha_prime = self.log_alpha_prime.exp().clamp(max=1e6)
        excess = args.cql_alpha * (gap - args.target_gap).sum(0)  # [S]
        critic_loss = (td_loss + alpha_prime.detach() * excess).sum()
        return critic_loss, (-0.5 * alpha_prime * excess.detach()).sum()


def descend(optimizer, loss):
    """Takes a step on the loss, which may also reach networks of other optimizers. Returns it."""
    optimizer.zero_grad()
    loss.backward(inputs=[p for group in optimizer.param_groups for p in group["params"]])
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def polyak(target, network, tau):
    """Moves the target's weights by the share tau towards the network's."""
    torch._foreach_lerp_(list(target.parameters()), list(network.parameters()), tau)


def update(agents, optimizers, draw_batch):
    """One update of all networks, all losses at the same weights."""
    s, a, r, s_next, terminal = draw_batch()
    actor_loss, alpha_loss = agents.actor_loss(s)
    critic_loss, alpha_prime_loss = agents.critic_loss(s, a, r, s_next, terminal)
    actor_loss = descend(optimizers["actor"], actor_loss + alpha_loss)
    critic_loss = descend(optimizers["critic"], critic_loss + alpha_prime_loss)
    polyak(agents.critic_target, agents.critic, agents.args.tau)
    return {"actor_loss": actor_loss, "critic_loss": critic_loss}


def record(function):
    """Returns function as one launch of the GPU: a CUDA graph of it. Calls it three times before,
    as capture needs: updates that --train-steps does not count."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    with torch.cuda.graph(graph):  # waits for them
        outputs = function()
    return lambda: (graph.replay(), outputs)[1]


# --- evaluation ---

REFERENCE_RETURNS = {  # of a random and of an expert policy (D4RL), where a dataset has none
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "pointmaze_umazedense": (68.537689, 193.662856),
    "pointmaze_mediumdense": (44.264742, 297.455255),
    "pointmaze_largedense": (30.569041, 303.485738),
    "pointmaze_umaze(?!.*dense)": (23.85, 161.86),
    "pointmaze_medium(?!.*dense)": (13.13, 277.39),
    "pointmaze_large(?!.*dense)": (6.7, 273.99),
    "antmaze(?!.*dense)": (0.0, 1.0),
    "handpen": (96.262799, 3076.8331),
    "handdoor": (-56.512833, 2880.5693),
    "handhammer": (-274.856578, 12794.134825),
    "handrelocate": (-6.425911, 4233.877797),
    "kitchen": (0.0, 4.0),
}


def make_envs(dataset, args, about):
    """Returns environments, registered here, for up to ten episodes of every agent at once."""
    metadata = dataset.storage.metadata
    recorded = json.loads(metadata.get("env_spec") or "{}")
    spec = json.loads(metadata.get("eval_env_spec") or "{}") or recorded
    require(spec, f"{dataset.id} names no environment; --eval-every 0 trains without one")
    name, kwargs, steps = spec["id"], spec["kwargs"], spec["max_episode_steps"]
    ours, old = ({"id": x["id"], **x["kwargs"]} for x in (spec, recorded or spec))
    if other := sorted(key for key in {*ours, *old} if ours.get(key) != old.get(key)):
        print(f"evaluation: {name}, recorded {old['id']}, with another {', '.join(other)}")
    if wrappers := [wrapper["name"] for wrapper in spec["additional_wrappers"]]:
        print(f"evaluation: {name} without the wrappers {', '.join(wrappers)}")
    if "Kitchen" in name and "ref_max_score" not in metadata:  # D4RL counts a task once
        kwargs |= {"remove_task_when_completed": True, "terminate_on_tasks_completed": True}
    known = [r for key, r in REFERENCE_RETURNS.items() if re.search(key, name.lower())]
    known += [(0.0, 100.0)]  # then the score is the return
    own = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    about["reference_returns"] = known[0] if None in own else own
    if args.eval_episodes is None:
        args.eval_episodes = 100 if re.search("Maze|Adroit|Kitchen", name) else 10
    name = name if name in gym.registry else f"gymnasium_robotics:{name}"
    kwargs |= {"wrappers": [gym.wrappers.FlattenObservation]}
    kwargs |= {"max_episode_steps": steps and int(steps)}  # Minari has 1000000.0
    with blame(f"cannot make {name}, MUJOCO_GL={os.getenv('MUJOCO_GL')}; try --eval-every 0"):
        envs = gym.make_vec(name, args.num_seeds * min(args.eval_episodes, 10), "sync", **kwargs)
    for kind in ("observation_space", "action_space"):
        own = gym.spaces.utils.flatten_space(getattr(dataset, kind))
        other, bounds = getattr(envs, f"single_{kind}"), (own.low, own.high)
        same = own.shape == other.shape and np.allclose(bounds, (other.low, other.high))
        require(same, f"the {kind} of {dataset.id} is {own}, that of {name} is {other}")
    return envs


@torch.no_grad()
def evaluate(agents, envs, args):
    """Returns every agent's mean return [S] of whole episodes, always from the same states."""
    agents.eval()
    S, K = args.num_seeds, envs.num_envs // args.num_seeds
    returns = np.zeros((S, K))
    for first in range(0, args.eval_episodes, K):
        episode = first + np.arange(K)
        seeds = 1000 * (args.seed + np.arange(S))[:, None] + episode
        s, _ = envs.reset(seed=seeds.ravel().tolist())
        alive = np.tile(episode < args.eval_episodes, S)  # [S K]
        while alive.any():
            s = (torch.from_numpy(s).to(args.device) - agents.mean) / agents.std
            a = agents.center + agents.radius * agents.act(s.float().view(S, K, -1)).flatten(0, 1)
            s, r, terminated, truncated, _ = envs.step(a.cpu().numpy())
            returns += (r * alive).reshape(S, K)
            alive &= ~(terminated | truncated)
    agents.train()
    return returns.sum(1) / args.eval_episodes


# --- run ---


def load_checkpoint(path, args):
    """Returns the checkpoint at path. Ends the program if it is of a run with other flags."""
    with blame(f"{path} cannot be read; remove it to start anew"):
        checkpoint = torch.load(path, map_location=args.device, weights_only=True)
        old = {**checkpoint["args"], "device": args.device, "track": args.track, "out": args.out}
    other = [f"{key} {old.get(key)}" for key, x in asdict(args).items() if x != old.get(key)]
    require(not other, f"{path} was made with {', '.join(other)}; choose another --out")
    return checkpoint


def stamp(path):
    """Returns what tells a file from another run's at the same path, None if there is none."""
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None


def save(path, values, since, texts=None):
    """Writes under another name, then renames: what is at path is whole, whenever a run dies. Ends
    the program if path's stamp is no longer since; returns the new one. texts go beside it."""
    require(stamp(path) == since, f"{path} is now of another run; choose another --out")
    for name, text in (texts or {}).items():
        path.with_name(name).write_text(text)
    temporary = f"{path}.{os.getpid()}.tmp"
    torch.save(values, temporary)
    os.replace(temporary, path)
    return stamp(path)


def run(args, about, agents, optimizers, draw_batch, envs, updates=1):
    """Trains until --train-steps updates are done, going on where --out stopped, evaluates and
    writes. A call of update() does so many updates; its losses are sums over the agents."""
    script, now = Path(__file__).stem, datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    name = f"{script}-{args.env}-{about['aug_label']}-{args.seed}-{now}"
    out = Path(args.out or "runs/" + re.sub(r"[^A-Za-z0-9.+-]+", "_", name)[-200:])
    step, evals, path = 0, [], out / "checkpoint.pt"
    since = stamp(path)
    if since:
        checkpoint = load_checkpoint(path, args)
        agents.load_state_dict(checkpoint["agents"])
        for key, optimizer in optimizers.items():
            optimizer.load_state_dict(checkpoint["optimizers"][key])
        step, evals = checkpoint["step"], checkpoint["evals"]
        print(f"{out} is at update {step} of {args.train_steps}, with these flags")
    versions = {package.__name__: package.__version__ for package in (torch, np, gym, minari)}
    config = {"script": script, **asdict(args), **about, "versions": versions}
    if args.track:
        import wandb

        with blame("--track"):
            wandb.init(name=out.name, config=config)
    with blame(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed + step)
    train = partial(update, agents, optimizers, draw_batch)
    train = record(train) if args.device == "cuda" else train
    steps = range(step + updates, args.train_steps + updates, updates)
    progress = tqdm(steps, unit="update", unit_scale=updates)
    for step in progress:
        losses = train()
        is_due = args.eval_every and step % args.eval_every < updates
        if not is_due and step < args.train_steps:
            continue
        log = {key: loss.item() / args.num_seeds for key, loss in losses.items()}
        finite = np.isfinite([*log.values()]).all()
        require(finite, f"update {step}: {log}; {out} stays as it is; try a lower --lr")
        if envs is not None:
            returns, (low, high) = evaluate(agents, envs, args), about["reference_returns"]
            scores = 100 * (returns - low) / (high - low)
            evals += [[step, i, returns[i].item(), x.item()] for i, x in enumerate(scores)]
            log |= {"score": scores.mean(), "deviation": scores.std()}
        state = {"args": asdict(args), "step": step, "evals": evals, "agents": agents.state_dict()}
        state["optimizers"] = {key: own.state_dict() for key, own in optimizers.items()}
        rows = [",".join(map(str, row)) for row in [("update", "agent", "return", "score"), *evals]]
        texts = {"evals.csv": "\n".join(rows) + "\n", "config.json": json.dumps(config, indent=2)}
        since = save(path, state, since, texts)
        progress.write(f"update {step}: {', '.join(f'{k} {v:.4g}' for k, v in log.items())}")
        if args.track:
            wandb.log(log, step=step)
        torch.manual_seed(args.seed + step)  # a run that goes on from here draws the same
    scores = np.array([row[3] for row in evals[-args.num_seeds :]])
    result = f"{scores.mean():.1f} +- {scores.std():.1f}" if evals else "not evaluated"
    algorithm = script if about["aug_label"] == "none" else f"{script} + {about['aug_label']}"
    seeds = f"{args.num_seeds} seed{'s' * (args.num_seeds > 1)}"
    print(f"wrote {out}\n{args.env} | {algorithm} | {result} over {seeds}")


def main(args):
    require(args.device == "cpu" or torch.cuda.is_available(), "--device cuda: there is no GPU")
    torch.set_float32_matmul_precision("high")  # TF32
    torch.manual_seed(args.seed)
    datasets, _, episodes, about = load_data(args)
    fill_in_by_domain(args, about["env_id"])
    envs = make_envs(datasets[0], args, about) if args.eval_every else None
    rewards = [args.reward_scale * e.rewards + args.reward_bias for e in episodes]
    episodes = [e._replace(rewards=r) for e, r in zip(episodes, rewards)]
    draw_batch, scale = pack_transitions(episodes, datasets[0].action_space, args)
    agents = CQL(args, scale).to(args.device)
    adam = partial(torch.optim.Adam, fused=True, capturable=True)
    actor, critic = [*agents.actor.parameters(), agents.log_alpha], [*agents.critic.parameters()]
    critic += [agents.log_alpha_prime] * (args.target_gap >= 0)
    optimizers = {"actor": adam(actor, args.actor_lr), "critic": adam(critic, args.lr)}
    run(args, about, agents, optimizers, draw_batch, envs)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
