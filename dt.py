# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "numpy>=2", "gymnasium[mujoco]>=1", "mujoco<3.12",
#     "minari[hdf5,hf]>=0.5.4", "tyro>=0.9", "tqdm", "wandb"]
# ///
"""Decision Transformer (Chen et al., 2021) on an offline dataset, alone or with generated windows.

    python dt.py --env hopper-medium               the dataset alone
    python dt.py --aug buffer.npz --num-seeds 4    and a buffer of gta_augment.py, four agents

Reads a Minari dataset and buffer.npz. Writes runs/<name>/: checkpoint.pt, config.json, evals.csv.
With the --out of a run that was killed, the same command goes on where that run stopped.
"""

import importlib
import json
import math
import os
import re
import sys
import zlib
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import minari
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from gymnasium.vector.utils import batch_space, iterate
from torch import nn
from tqdm import tqdm


@dataclass
class Args:
    # --- Decision Transformer ---
    lr: float = 1e-4  # learning rate of AdamW (GTA's release)
    warmup_steps: int = 10_000  # updates in which the learning rate rises from 0
    context: int = 20  # steps in a window, each of them three tokens: return to go, state, action
    # return to ask for. Default: that of TARGET_RETURNS, else the dataset's best
    target_return: float | None = None
    # factor of the returns that the network sees. Default: 0.001 in locomotion, else 1
    return_scale: float | None = None
    # --- data ---
    # short name (hopper-medium), Minari id, folder of a Minari dataset, or several joined by +.
    # Default: what --aug was made from, else the bundled dataset
    env: str | None = None
    aug: str | None = None  # buffer.npz to train on, too
    aug_only: bool = False  # train on the buffer alone
    # S4RL baseline: standard deviation of noise on standardised states (GTA, C.1: 3e-4)
    s4rl_sigma: float = 0.0
    # --- run ---
    train_steps: int = 100_000  # updates (GTA, C.3)
    batch_size: int = 1024  # windows in a batch (GTA's release)
    num_seeds: int = 1  # independent agents, trained at once
    eval_every: int = 50_000  # updates between evaluations, each of which writes a checkpoint
    eval_episodes: int = 100  # episodes of an evaluation (GTA, E.4); 0: none, and no environment
    env_package: str | None = None  # module to import that registers your own environment
    # folder to write, or to go on with. Default: runs/dt-<env>-<augmentation>-<seed>-<time>
    out: str | None = None
    seed: int = 0  # seed of weights, batches, noise and evaluation episodes
    # CUDA_VISIBLE_DEVICES picks the card
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    track: bool = False  # log to Weights & Biases; WANDB_PROJECT and WANDB_ENTITY say where


BY_DOMAIN = {  # what a flag is if it is not given (CORL)
    "return_scale": {"locomotion": 0.001, "else": 1.0},
}
TARGET_RETURNS = {  # by environment: Gymnasium's id or D4RL's name (CORL)
    "halfcheetah": 12000.0,
    "hopper": 3600.0,
    "walker2d": 5000.0,
    r"(hand|\b)pen-": 3100.0,
    r"(hand|\b)door-": 2900.0,
    r"(hand|\b)hammer-": 12800.0,
    r"(hand|\b)relocate-": 4300.0,
}


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


class LayerNorm(nn.Module):
    """A layer normalisation of every agent. [S, B, dim] -> [S, B, dim]"""

    def __init__(self, S, dim):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(S, 1, dim))
        self.shift = nn.Parameter(torch.zeros(S, 1, dim))

    def forward(self, x):
        return torch.addcmul(self.shift, self.scale, F.layer_norm(x, x.shape[-1:]))


class NormLinear(Linear):
    """A layer normalisation, whose scale and shift join the weights, and a linear layer."""

    def __init__(self, S, d_in, d_out):
        super().__init__(S, d_in, d_out)
        self.scale = nn.Parameter(torch.ones(S, d_in, 1))
        self.shift = nn.Parameter(torch.zeros(S, 1, d_in))

    def forward(self, x):
        bias = self.bias + self.shift @ self.weight
        return torch.baddbmm(bias, F.layer_norm(x, x.shape[-1:]), self.scale * self.weight)


class Block(nn.Module):
    """Causal attention of one head and an MLP, both residual. [S, B T, E] -> [S, B queries, E]
    Positions that are not among the queries only serve as keys and values."""

    def __init__(self, S, dim, dropout):
        super().__init__()
        self.qkv = NormLinear(S, dim, 3 * dim)
        self.project = Linear(S, dim, dim)
        self.mlp = nn.Sequential(NormLinear(S, dim, 4 * dim), nn.GELU(), Linear(S, 4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, T, queries):
        q, k, v = self.qkv(x).view(-1, T, 3 * x.shape[-1]).chunk(3, dim=-1)  # [S B, T, E]
        later = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)[queries]
        scores = q[:, queries] @ k.mT / math.sqrt(x.shape[-1])  # [S B, queries, T]
        out = self.dropout(scores.masked_fill(later, -torch.inf).softmax(-1)) @ v
        x = x.unflatten(1, (-1, T))[:, :, queries].flatten(1, 2)
        x = x + self.dropout(self.project(out.view(x.shape)))
        return x + self.dropout(self.mlp(x))


class Scale(nn.Module):
    """Standardises states, and maps actions between the environment's box and [-1, 1]."""

    def __init__(self, mean, std, low, high):
        super().__init__()
        self.mean = nn.Buffer(mean)  # [obs_dim]
        self.std = nn.Buffer(std)
        self.low = nn.Buffer(low)  # [act_dim]
        self.high = nn.Buffer(high)

    def states(self, s):
        return (s.float() - self.mean) / self.std

    def actions(self, a):
        # of a box without width 2 a - high - low is 0, so any width will do
        width = torch.where(self.high > self.low, self.high - self.low, 2.0)
        return (2 * a - self.high - self.low) / width

    def env_actions(self, a):
        a = (self.high + self.low) / 2 + (self.high - self.low) / 2 * a
        return a.clamp(self.low, self.high)  # rounding may lead out of the box


# --- Decision Transformer ---


class DT(nn.Module):
    """S agents. A loss is a sum over them, so that each gets the gradient of its own."""

    def __init__(self, args, scale, dim=128, num_layers=3, num_timesteps=1000, dropout=0.1):
        super().__init__()
        self.args = args
        self.scale = scale
        S = args.num_seeds
        obs_dim, act_dim = len(scale.mean), len(scale.low)
        self.embed = nn.ModuleList(Linear(S, d_in, dim) for d_in in (1, obs_dim, act_dim))
        self.embed_t = nn.Parameter(0.02 * torch.randn(S, num_timesteps, dim))
        self.norm = LayerNorm(S, dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(S, dim, dropout) for _ in range(num_layers))
        self.head = nn.Sequential(NormLinear(S, dim, act_dim), nn.Tanh())
        for layer in self.modules():
            if isinstance(layer, Linear):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        for block in self.blocks:  # as in nn.MultiheadAttention
            nn.init.uniform_(block.qkv.weight, -math.sqrt(1.5 / dim), math.sqrt(1.5 / dim))

    def act(self, returns_to_go, observations, actions, timesteps):
        """The actions to take at the last of L <= --context steps, in the environment's units. The
        action of that step is not known yet, and not read.
        [S, K, L], [S, K, L, obs_dim], [S, K, L, act_dim], [S, K, L] -> [S, K, act_dim]"""
        R = self.args.return_scale * returns_to_go.unsqueeze(-1)
        s = self.scale.states(observations)
        a = self.scale.actions(actions)
        predicted = self(R.float(), s, a.float(), timesteps)
        return self.scale.env_actions(predicted[:, :, -1])

    def forward(self, R, s, a, t):
        """The actions [S, B, L, act_dim], each from what came before it. Fields: see draw_batch."""
        agent = torch.arange(len(t), device=t.device)[:, None, None]
        t = t.clamp(max=self.embed_t.shape[1] - 1)  # later timesteps share the last embedding
        embed_t = self.embed_t[agent, t].flatten(1, 2)  # [S, B L, E]
        tokens = [embed(x.flatten(1, 2)) + embed_t for embed, x in zip(self.embed, (R, s, a))]
        x = torch.stack(tokens, dim=2).flatten(1, 2)  # [S, B 3L, E]: return, state, action, ...
        x = self.dropout(self.norm(x))
        T = 3 * t.shape[-1]
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, T, slice(None))
        x = last(x, T, slice(1, None, 3))  # an action is read off its state's token
        return self.head(x).unflatten(1, t.shape[1:])

    def loss(self, R, s, a, t, is_step):
        """Squared error of the actions, 0 in the padding: a part of the mean over a batch."""
        error = (self(R, s, a, t) - a).square() * is_step.unsqueeze(-1)
        return error.sum() / (self.args.batch_size * a[0, 0].numel())


def clip_gradients(agents, max_norm=0.25):
    """Shortens the gradient of each agent to max_norm, where it is longer."""
    for grads in zip(*(p.grad.unbind() for p in agents.parameters())):  # of one agent
        norm = nn.utils.get_total_norm(grads)
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1))


def update(agents, optimizers, draw_batch):
    """One update. The learning rate rises from 0 in the first --warmup-steps."""
    args = agents.args
    optimizer = optimizers["transformer"]
    optimizer.param_groups[0]["lr"].add_(args.lr / max(1, args.warmup_steps)).clamp_(max=args.lr)
    optimizer.zero_grad()
    num_parts = 1 if args.device == "cuda" else math.ceil(args.num_seeds / 2)  # for a CPU's memory
    losses = []
    for part in zip(*(x.chunk(num_parts, dim=1) for x in draw_batch())):
        loss = agents.loss(*part)
        loss.backward()
        losses.append(loss.detach())
    clip_gradients(agents)
    optimizer.step()
    return {"loss": sum(losses)}


# --- what the user gives ---


def require(condition, message):
    """Ends the program with one line and exit code 1 unless the condition holds."""
    if not condition:
        sys.exit("error: " + " ".join(message.split()))


@contextmanager
def or_exit(message):
    """Ends the program with one line if what is inside fails by the user's data or machine."""
    try:
        yield
    except Exception as error:
        require(False, f"{message} ({error})")


MAY_BE_NEGATIVE = (
    "reward_bias",
    "min_gap",
    "target_gap",
    "target_return",
    "source_min_return",
    "p_mean",
)
MAY_BE_ZERO = ("seed", "eval_episodes", "warmup_steps", "reweight_bins")  # of the integers


def check_flags(args):
    """Ends the program if a flag is an empty text, NaN, a negative number, or a size of 0."""
    for name, value in asdict(args).items():
        flag = f"--{name.replace('_', '-')}"
        require(value != "", f"{flag} is empty")
        require(value == value, f"{flag} is not a number")
        if type(value) in (int, float) and name not in MAY_BE_NEGATIVE:
            least = 1 if type(value) is int and name not in MAY_BE_ZERO else 0
            require(value >= least, f"{flag} {value}: must be at least {least}")
        if name == "seed":
            require(value < 2**32, f"{flag} {value}: must be less than 2**32")
    require(args.device == "cpu" or torch.cuda.is_available(), "--device cuda: there is no GPU")


# --- data ---

DEFAULT_ENV = "data/halfcheetah-medium-sample"
SHORT_NAMES = {  # of --env, and the Minari ids that they stand for
    r"maze2d-((umaze|medium|large)(-dense)?)": r"D4RL/pointmaze/\1-v2",
    r"antmaze-([a-z-]+)": r"D4RL/antmaze/\1-v1",
    r"(pen|door|hammer|relocate|kitchen)-([a-z]+)": r"D4RL/\1/\2-v2",
    r"([a-z0-9]+)-(simple|medium|expert)": r"mujoco/\1/\2-v0",
    r"([a-z0-9]+)-medium-expert": r"mujoco/\1/medium-v0+mujoco/\1/expert-v0",
}
DOMAINS = {  # by environment: Gymnasium's id or D4RL's name. The others are locomotion
    r"ant-?maze": "antmaze",
    r"maze": "maze",
    r"adroit|\b(pen|door|hammer|relocate)-": "adroit",
    r"kitchen": "kitchen",
}


class Episode(NamedTuple):
    observations: np.ndarray  # [T + 1, obs_dim]
    actions: np.ndarray  # [T, act_dim]
    rewards: np.ndarray  # [T], float64: a sum of float16 overflows
    terminals: np.ndarray  # [T] whether the environment terminated; a truncation is no terminal


class Buffer(NamedTuple):
    """What buffer.npz holds: N windows of H transitions, and where they come from."""

    metadata: dict
    observations: np.ndarray  # [N, H + 1, obs_dim]
    actions: np.ndarray  # [N, H, act_dim]
    rewards: np.ndarray  # [N, H]
    terminals: np.ndarray  # [N, H]
    episode: np.ndarray | None = None  # [N] source episode; a buffer of your own has no source
    timestep: np.ndarray | None = None  # [N] the window's first step in it
    return_to_go: np.ndarray | None = None  # [N] of the source from that step on, undiscounted
    condition: np.ndarray | None = None  # [N] the return that was asked for


class Steps(NamedTuple):
    """Steps of episodes and of windows, one after another."""

    R: np.ndarray  # [N] return to go
    s: np.ndarray  # [N, obs_dim]
    a: np.ndarray  # [N, act_dim]
    t: np.ndarray  # [N] timestep in the episode, of a window in that of its source
    left: np.ndarray  # [N] steps to the end of the episode or window, this one among them


def find_folder(name):
    """Returns the folder of a Minari dataset of that name, here or beside this script, or None."""
    here = Path(__file__).resolve().parent
    for folder in (Path(name), here / name, here.parent / name):
        if (folder / "data" / "metadata.json").is_file():
            return folder / "data"


def open_dataset(name):
    """Opens a Minari dataset: a folder, or an id in Minari's cache, else on its hub."""
    folder = find_folder(name)
    with or_exit(f"--env {name} cannot be opened"):
        if folder:
            return minari.MinariDataset(folder)
        require(name != DEFAULT_ENV, "--env is missing, as in --env hopper-medium")
        is_id = re.fullmatch(r"[\w/-]+-v\d+", name)
        require(is_id, f"--env {name}: no folder of a Minari dataset, no short name, no Minari id")
        return minari.load_dataset(name, download=True)


def open_datasets(env):
    """Returns the datasets that --env names: one, or several of the same robot joined by +."""
    names = []
    parts = [env] if find_folder(env) else env.split("+")
    for name in parts:
        for pattern, minari_ids in SHORT_NAMES.items():
            name = re.sub(f"^{pattern}$", minari_ids, name)
        names += [name] if find_folder(name) else name.split("+")  # hopper-medium-expert: two
    datasets = [open_dataset(name) for name in names]
    first = datasets[0]
    box = first.action_space
    is_vector = isinstance(box, gym.spaces.Box) and len(box.shape) == 1
    require(is_vector, f"{first.id}: actions must be a vector of real numbers, not {box}")
    obs_dim = gym.spaces.flatdim(first.observation_space)
    for dataset in datasets[1:]:
        same = env_id(dataset) == env_id(first) and dataset.action_space == box
        same = same and gym.spaces.flatdim(dataset.observation_space) == obs_dim
        require(same, f"{dataset.id} has another environment, states or actions than {first.id}")
    return datasets


def env_id(dataset):
    """Returns the Gymnasium id of the environment that was recorded, "" if none is named."""
    return getattr(dataset.env_spec, "id", "")


def find_domain(dataset):
    """Returns what kind of task a dataset is of: antmaze, maze, adroit, kitchen or locomotion."""
    for pattern, domain in DOMAINS.items():
        if re.search(pattern, env_id(dataset) or dataset.id, re.IGNORECASE):
            return domain
    return "locomotion"


def load_episodes(datasets):
    """Returns all episodes, observations flattened as Gymnasium does. One ends at its terminal."""
    episodes = []
    num_left_out = 0
    for dataset in datasets:
        space = dataset.observation_space
        with or_exit(f"{dataset.id} cannot be read, or its observations are no {space}"):
            for record in dataset.iterate_episodes():
                states = iterate(batch_space(space), record.observations)  # one by one
                s = np.stack([gym.spaces.flatten(space, state) for state in states])
                a = record.actions.reshape(len(record.actions), -1)
                r = record.rewards.reshape(-1).astype(np.float64)
                terminals = record.terminations.reshape(-1).astype(bool)
                T = terminals.argmax() + 1 if terminals.any() else len(r)
                num_left_out += len(r) - T
                episodes.append(Episode(s[: T + 1], a[:T], r[:T], terminals[:T]))
    name = " + ".join(dataset.id for dataset in datasets)
    require(episodes, f"{name} holds no episodes")
    for i, e in enumerate(episodes):
        T = len(e.rewards)
        fits = len(e.observations) == T + 1
        fits = fits and e.actions.shape == (T, *datasets[0].action_space.shape)
        fits = fits and all((np.abs(x) < np.float32(3e38)).all() for x in e)  # what float32 holds
        require(fits, f"{name}: episode {i} has wrong sizes or NaN; see data/make_dataset.py check")
    num_transitions = sum(len(e.rewards) for e in episodes)
    print(f"dataset: {name}, {len(episodes)} episodes, {num_transitions} transitions")
    if num_left_out:
        print(f"left out: {num_left_out} transitions that follow a terminal within their episode")
    return episodes


def read_buffer(path):
    """Returns the buffer at path, of gta_augment.py or a program of your own."""
    with or_exit(f"--aug {path}: no buffer of gta_augment.py"):
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in Buffer._fields if key in file}
        metadata = json.loads(str(arrays.pop("metadata")))
        buffer = Buffer(metadata, **arrays)
        metadata["label"] = metadata.get("label") or metadata.get("method") or Path(path).stem
        found = (metadata["format"], metadata["format_version"])
    require(found == ("gta-buffer", 1), f"--aug {path}: {found}, not version 1 of gta-buffer")
    finite = all(np.isfinite(x).all() for x in arrays.values())
    require(finite, f"--aug {path} holds NaN or infinite numbers")
    return buffer


def checksum(arrays):
    """Returns a CRC of what the arrays hold: an input is that, not the name of its file."""
    crc = 0
    for array in arrays:
        crc = zlib.crc32(np.ascontiguousarray(array), crc)
    return crc


def identify_dataset(datasets, episodes):
    """Returns what tells a dataset from others: what it holds counts, not the name of its file."""
    return {
        "env_id": env_id(datasets[0]),
        "dataset_ids": [dataset.id for dataset in datasets],
        "dataset_crc": checksum(x for episode in episodes for x in episode),
    }


def require_made_from(flag, metadata, inputs):
    """Ends the program if the buffer that a flag names was made from other data than inputs."""
    for key, value in inputs.items():
        found = metadata.get(key, value)  # a buffer of your own may lack it
        require(found == value, f"{flag} was made from {key} {found}, not from {value}")


def identify(args, datasets, episodes, buffer):
    """Returns what tells these data from others, for config.json. Ends the program if the buffer
    was made from other data."""
    inputs = identify_dataset(datasets, episodes)
    labels = []
    if buffer:
        require_made_from(f"--aug {args.aug}", buffer.metadata, inputs)
        inputs["buffer_crc"] = checksum(x for x in buffer[1:] if x is not None)
        label = buffer.metadata["label"]
        labels.append(f"{label} only" if args.aug_only else label)
    if args.s4rl_sigma:
        labels.append(f"s4rl({args.s4rl_sigma})")
    inputs["aug_label"] = " + ".join(labels) or "none"
    return inputs


def fill_in_by_domain(args, domain):
    """Sets the flags that were not given to what they are in this domain."""
    for name, values in BY_DOMAIN.items():
        if getattr(args, name) is None:
            setattr(args, name, values.get(domain, values["else"]))


def find_target_return(dataset):
    """Returns the return that is asked for in the dataset's environment, None if it has none."""
    steps = getattr(dataset.env_spec, "max_episode_steps", None)
    if "HandPen-" in env_id(dataset) and steps == 200:
        return None  # CORL's is of 100 steps
    for pattern, target in TARGET_RETURNS.items():
        if re.search(pattern, env_id(dataset) or dataset.id, re.IGNORECASE):
            return target
    return None


def make_window_steps(s, a, r, return_to_go, timestep):
    """Returns the steps [N, H, ...] of N windows, given the first return to go and timestep [N]."""
    N, H = r.shape
    R_and_r = np.column_stack([return_to_go, r[:, :-1]])
    R = np.subtract.accumulate(R_and_r, axis=1, dtype=np.float64)  # R_t+1 = R_t - r_t (eq. 17)
    t = timestep[:, None] + np.arange(H)
    left = np.tile(np.arange(H, 0, -1), (N, 1))
    return Steps(R, s[:, :-1], a, t, left)


def concatenate_windows(parts, num_dropped):
    """Returns each field, joined over all parts: their windows [N, H, ...] become rows, of which
    the first num_dropped are left out."""
    fields = []
    with or_exit("states or actions of the datasets, or of --aug, differ in size"):
        for windows in zip(*parts):
            flat = [x.reshape(-1, *x.shape[2:]) for x in windows]
            fields.append(np.concatenate(flat, dtype=np.float32)[num_dropped:])
    lengths = {len(field) for field in fields}
    require(
        len(lengths) == 1 and 0 not in lengths, f"arrays have lengths {lengths}, which do not fit"
    )
    return fields


def make_steps(episodes, buffer, aug_only=False):
    """Returns the steps of the episodes, unless the buffer's alone are wanted, and those of the
    buffer's windows."""
    parts = []  # windows [N, H, ...], an episode is one
    for s, a, r, _ in episodes:
        parts.append(make_window_steps(s[None], a[None], r[None], r.sum()[None], np.zeros(1)))
    if buffer:
        s, a, r = buffer[1:4]
        has_source = buffer.return_to_go is not None and buffer.timestep is not None
        require(has_source, "--aug holds no return_to_go, or no timestep, which dt.py needs")
        with or_exit("--aug: its arrays are no N windows of H steps"):
            parts.append(make_window_steps(s, a, r, buffer.return_to_go, buffer.timestep))
    num_dropped = 0
    if aug_only:  # the episodes were only there for the check of sizes
        num_dropped = sum(len(episode.rewards) for episode in episodes)
    return Steps(*concatenate_windows(parts, num_dropped))


def fit_scale(s, box, eps=1e-3):
    """Returns the scale of the states s [N, obs_dim] and of the box of actions."""
    bounded = np.isfinite(box.low).all() and np.isfinite(box.high).all()
    require(bounded, f"the actions have no bounds, {box}")
    mean = s.mean(0, dtype=np.float64)
    std = s.std(0, dtype=np.float64) + eps
    return Scale(*(torch.from_numpy(x).float() for x in (mean, std, box.low, box.high)))


def make_window_sampler(steps, scale, args):
    """Returns a function that draws windows of --context steps for every agent [S, B, L, ...].

    The steps lie on the device as one tensor of rows, so that a batch is one gather.
    """
    widths = [1, len(scale.mean), len(scale.low), 1, 1]
    rows = torch.from_numpy(np.column_stack(steps)).to(args.device)
    for part in rows.split(100_000):  # in place: there may be millions of rows
        R, s, a, _, _ = part.split(widths, dim=1)
        R.mul_(args.return_scale)
        s.copy_(scale.states(s))
        a.copy_(scale.actions(a))

    def draw_batch():
        """Return to go [.., 1], state, action, timestep, and what is no padding. Every step is as
        likely as another to be a window's first."""
        first = torch.randint(len(rows), (args.num_seeds, args.batch_size, 1), device=args.device)
        offset = torch.arange(args.context, device=args.device)
        window = rows[(first + offset).clamp(max=len(rows) - 1)]  # its padding: whatever follows
        R, s, a, t, left = window.split(widths, dim=-1)
        if args.s4rl_sigma:
            s = s + args.s4rl_sigma * torch.randn_like(s)
        is_step = offset < left[:, :, :1, 0]
        return R, s, a, t.squeeze(-1).long(), is_step

    return draw_batch


# --- evaluation ---

REFERENCE_RETURNS = {  # of a random and of an expert policy (D4RL), where a dataset has none
    "^halfcheetah-": (-280.178953, 12135.0),
    "^hopper-": (-20.272305, 3234.3),
    "^walker2d-": (1.629008, 4592.3),
    "pointmaze_umazedense": (68.537689, 193.662856),
    "pointmaze_mediumdense": (44.264742, 297.455255),
    "pointmaze_largedense": (30.569041, 303.485738),
    "pointmaze_umaze(?!.*dense)": (23.85, 161.86),
    "pointmaze_medium(?!.*dense)": (13.13, 277.39),
    "pointmaze_large(?!.*dense)": (6.7, 273.99),
    "antmaze(?!.*dense)": (0.0, 1.0),
    "handpen-": (96.262799, 3076.8331),  # over 100 steps
    "handdoor-": (-56.512833, 2880.5693),
    "handhammer-": (-274.856578, 12794.134825),
    "handrelocate-": (-6.425911, 4233.877797),
    "kitchen": (0.0, 4.0),
}
PEN_OF_200_STEPS = (137.93, 8820.51)  # arXiv 2512.03973: Minari has those of 100 (its issue 303)


def reference_returns(name, max_episode_steps, metadata):
    """Returns the returns that score 0 and 100: the dataset's own, else D4RL's, else 0 and 100."""
    if "HandPen-" in name and max_episode_steps == 200:
        return PEN_OF_200_STEPS
    if "ref_min_score" in metadata and "ref_max_score" in metadata:
        return metadata["ref_min_score"], metadata["ref_max_score"]
    for pattern, references in REFERENCE_RETURNS.items():
        if re.search(pattern, name.lower()):
            return references
    return 0.0, 100.0


class Benchmark(NamedTuple):
    envs: gym.vector.VectorEnv  # up to ten episodes of every agent at once
    low: float  # the return that scores 0
    high: float  # the return that scores 100

    def score(self, returns):
        return 100 * (returns - self.low) / (self.high - self.low)


def make_benchmark(dataset, args):
    """Returns the environments that the dataset names, registered here, and its references."""
    metadata = dataset.storage.metadata
    recorded = json.loads(metadata.get("env_spec") or "{}")
    spec = json.loads(metadata.get("eval_env_spec") or "{}") or recorded
    require(spec, f"{dataset.id} names no environment; --eval-episodes 0 trains without one")
    name, kwargs = spec["id"], spec["kwargs"]
    made = {"id": name, "kwargs": kwargs, "additional_wrappers": []}
    for key, value in made.items():
        if value != recorded.get(key, value):
            print(f"evaluation: {key} {value}, recorded {recorded[key]}")
    if "kitchen" in name.lower() and "ref_max_score" not in metadata:  # D4RL counts a task once
        kwargs |= {"remove_task_when_completed": True, "terminate_on_tasks_completed": True}
    steps = spec["max_episode_steps"] and int(spec["max_episode_steps"])  # Minari has 1000000.0
    low, high = reference_returns(name, steps, metadata)
    print(f"evaluation: {name}, a return of {low} scores 0, {high} scores 100")
    num_envs = args.num_seeds * min(args.eval_episodes, 10)
    kwargs |= {"max_episode_steps": steps, "wrappers": [gym.wrappers.FlattenObservation]}
    kwargs.pop("render_mode", None)  # no window opens
    with or_exit(
        f"cannot make {name}: mazes, Adroit and Kitchen need gymnasium-robotics, an environment of "
        "your own --env-package; --eval-episodes 0 trains without one"
    ):
        if args.env_package:
            sys.path.append(os.getcwd())
            importlib.import_module(args.env_package)
        elif name not in gym.registry:
            importlib.import_module("gymnasium_robotics")
        # a spec, not its name: of "module:name" the module would be imported
        envs = gym.make_vec(gym.spec(name), num_envs, "sync", **kwargs)
        envs.reset()  # what fails here would fail at the first evaluation
    spaces = (gym.spaces.flatten_space(dataset.observation_space).shape, dataset.action_space)
    env_spaces = (envs.single_observation_space.shape, envs.single_action_space)
    message = f"{dataset.id} has states and actions {spaces}, {name} has {env_spaces}"
    require(spaces == env_spaces, message)
    return Benchmark(envs, low, high)


def score_dataset(episodes, benchmark):
    """Returns the mean score of the dataset's episodes, which agents should be compared with."""
    returns = np.array([episode.rewards.sum() for episode in episodes])
    scores = benchmark.score(returns)
    print(f"the dataset's episodes score {scores.mean():.1f}, the best of them {scores.max():.1f}")
    return scores.mean()


@torch.no_grad()
def evaluate(agents, benchmark, args):
    """Returns every agent's mean return of whole episodes, always from the same states, and its
    score. Each episode is asked for --target-return. [S], [S]"""
    agents.eval()
    envs = benchmark.envs
    S, K = args.num_seeds, envs.num_envs // args.num_seeds
    total = np.zeros((S, K))
    for first in range(0, args.eval_episodes, K):
        episode = first + np.arange(K)
        seeds = 1000 * (args.seed + np.arange(S))[:, None] + episode  # [S, K]
        s, _ = envs.reset(seed=seeds.ravel().tolist())
        alive = np.tile(episode < args.eval_episodes, (S, 1))  # [S, K]
        to_go = np.full((S, K), args.target_return)
        t = torch.zeros(S, K, dtype=torch.int64, device=args.device)
        a = torch.zeros(S, K, envs.single_action_space.shape[0], device=args.device)
        history = deque(maxlen=args.context)  # of what DT.act takes, step by step
        while alive.any():
            R = torch.from_numpy(to_go).to(args.device)
            s = torch.from_numpy(s).to(args.device).view(S, K, -1)
            history.append([R, s, a, t])  # an action that is not read, until it is known
            a = agents.act(*(torch.stack(field, dim=2) for field in zip(*history)))
            history[-1][2] = a
            s, r, terminated, truncated, _ = envs.step(a.flatten(0, 1).cpu().numpy())
            r = r.reshape(S, K)
            total += alive * r
            to_go = to_go - r
            t = t + 1
            alive &= ~(terminated | truncated).reshape(S, K)
    agents.train()
    returns = total.sum(1) / args.eval_episodes
    return returns, benchmark.score(returns)


# --- files ---

PACKAGES = ("torch", "numpy", "gymnasium", "minari")
# flags that may differ when --out exists: paths (of inputs the checksums count) and the machine
FREE = "env aug checkpoint diffusion data run env_package device track out versions".split()


def require_same(path, old, new, flag="--out"):
    """Ends the program unless what is at path was made with the same flags from the same inputs."""
    new = json.loads(json.dumps(new))  # as old, which comes from a file
    for key, value in new.items():
        same = key in FREE or old.get(key) == value
        require(same, f"{path} was made with {key} {old.get(key)}; choose another {flag}")


@contextmanager
def new_file(path):
    """Gives a name to write to; what is written takes its place at path when it is whole."""
    path = Path(path).resolve()  # a symbolic link stays one
    temporary = Path(f"{path}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # of PyTorch, for a full disk
        require(False, f"{path} cannot be written ({error})")
    finally:
        with suppress(OSError):
            temporary.unlink()


# --- run ---


def record(function, warm_up=3):
    """Returns function as a CUDA graph, one launch of the GPU. The first warm_up calls run it as it
    is, as CUDA asks before a capture. The next one captures it, which computes nothing, and replays
    it; later ones only replay it."""
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    calls = 0
    outputs = None

    def call():
        nonlocal calls, outputs
        calls += 1
        if calls <= warm_up:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                outputs = function()
            torch.cuda.current_stream().wait_stream(stream)
            return outputs
        if calls == warm_up + 1:
            with torch.cuda.graph(graph):
                outputs = function()
        graph.replay()
        return outputs

    return call


def read_config(out):
    """Returns config.json of a run of this script."""
    with or_exit(f"--out {out} holds files, but no run of {Path(__file__).name}; choose another"):
        config = json.loads((out / "config.json").read_text())
        assert config["script"] == Path(__file__).stem, "another program's"
    return config


def open_run(args, inputs, may_be_longer):
    """Returns the folder of this run, new or begun with the same flags and data, and its config."""
    script = Path(__file__).stem
    now = datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    name = f"{script}-{args.env}-{inputs['aug_label']}-{args.seed}-{now}"
    out = Path(args.out or "runs/" + re.sub(r"[^A-Za-z0-9.+-]+", "_", name)[-200:])
    config = {"script": script, **asdict(args), **inputs}
    config["versions"] = {package: version(package) for package in PACKAGES}
    if any(out.glob("*")):
        old = read_config(out)
        if may_be_longer:
            old["train_steps"] = max(old["train_steps"], args.train_steps)
        require_same(out, old, config)
    return out, config


def load_checkpoint(out, agents, optimizers, args):
    """Puts agents and optimizers into the state in which --out stopped. Returns the update and the
    evaluations until then."""
    path = out / "checkpoint.pt"
    if not path.exists():
        lost = (out / "evals.csv").exists()
        require(not lost, f"{out} holds evals.csv, but no checkpoint.pt; choose another --out")
        return 0, []
    with or_exit(f"{path} cannot be read; choose another --out"):
        checkpoint = torch.load(path, map_location=args.device, weights_only=True)
        agents.load_state_dict(checkpoint["agents"])
        for key, optimizer in optimizers.items():
            optimizer.load_state_dict(checkpoint["optimizers"][key])
    print(f"{out} is at update {checkpoint['step']} of {args.train_steps}")
    return checkpoint["step"], checkpoint["evals"]


def write_evals(out, evals):
    """Writes evals.csv."""
    with new_file(out / "evals.csv") as file:
        np.savetxt(file, evals, "%.10g", ",", header="update,agent,return,score", comments="")


def save_checkpoint(out, config, agents, optimizers, step, evals):
    """Writes checkpoint.pt and evals.csv, unless the folder is another run's by now."""
    require_same(out, read_config(out), config)
    checkpoint = {
        "args": asdict(agents.args),
        "step": step,
        "evals": evals,
        "agents": agents.state_dict(),
        "optimizers": {key: optimizer.state_dict() for key, optimizer in optimizers.items()},
    }
    with new_file(out / "checkpoint.pt") as file:
        torch.save(checkpoint, file)
    write_evals(out, evals)


def load_agents(path, device="cpu"):
    """Returns the trained agents of the checkpoint at path. Their act is the policy of all of them
    at once; it takes the last steps of an episode, as evaluate shows."""
    checkpoint = torch.load(path, map_location=device, weights_only=True)
    weights = checkpoint["agents"]
    scale = Scale(*(weights[f"scale.{key}"] for key in ("mean", "std", "low", "high")))
    agents = DT(Args(**checkpoint["args"]), scale).to(device)
    agents.load_state_dict(weights)
    return agents.eval().requires_grad_(False)


def describe_result(evals, num_seeds):
    """Returns the last score: its mean and deviation over agents."""
    if not evals:
        return "not evaluated"
    scores = np.array([score for _, _, _, score in evals[-num_seeds:]])
    if num_seeds == 1:
        return f"{scores[0]:.1f} over 1 seed"
    return f"{scores.mean():.1f} +- {scores.std():.1f} over {num_seeds} seeds"


def run(args, inputs, agents, optimizers, train, benchmark, updates=1, may_be_longer=True):
    """Trains to --train-steps from where --out stopped, evaluates and writes. A call of train makes
    that many updates, and returns the losses, summed over the agents."""
    out, config = open_run(args, inputs, may_be_longer)
    step, evals = load_checkpoint(out, agents, optimizers, args)
    if step > 0:
        write_evals(out, evals)  # a kill may have come between the two files
    if args.track:
        with or_exit("--track"):
            import wandb

            wandb.init(name=out.name, config=config)
    with new_file(out / "config.json") as file:
        file.write_text(json.dumps(config, indent=2))
    torch.manual_seed(args.seed + step)
    if args.device == "cuda":
        train = record(train)
    steps = range(step + updates, args.train_steps + updates, updates)
    every = 0.1 if sys.stderr.isatty() else 60  # seconds: a log file takes a line a minute
    progress = tqdm(steps, unit="call", mininterval=every, maxinterval=every)
    for step in progress:
        losses = train()
        is_due = step % args.eval_every < updates  # this call has come to a multiple of it
        if not is_due and step < args.train_steps:
            continue
        log = {key: loss.item() / args.num_seeds for key, loss in losses.items()}
        require(all(map(math.isfinite, log.values())), f"update {step}: {log}; try a lower --lr")
        if benchmark:
            returns, scores = evaluate(agents, benchmark, args)
            for i in range(args.num_seeds):
                evals.append([step, i, returns[i].item(), scores[i].item()])
            log["score"] = scores.mean()
            if args.num_seeds > 1:
                log["deviation"] = scores.std()
        save_checkpoint(out, config, agents, optimizers, step, evals)
        progress.write(f"update {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in log.items()))
        if args.track:
            wandb.log(log, step=step)
        torch.manual_seed(args.seed + step)  # a run that goes on from here draws the same
    result = describe_result(evals, args.num_seeds)
    print(f"wrote {out}\n{args.env} | {config['script']} | {inputs['aug_label']} | {result}")


def main(args):
    check_flags(args)
    require(args.aug or not args.aug_only, "--aug-only needs --aug buffer.npz")
    torch.set_float32_matmul_precision("high")  # TF32
    torch.manual_seed(args.seed)
    buffer = read_buffer(args.aug) if args.aug else None
    args.env = args.env or (buffer.metadata if buffer else {}).get("env", DEFAULT_ENV)
    datasets = open_datasets(args.env)
    episodes = load_episodes(datasets)
    inputs = identify(args, datasets, episodes, buffer)
    fill_in_by_domain(args, find_domain(datasets[0]))
    best = max(episode.rewards.sum().item() for episode in episodes)
    if args.target_return is None:
        args.target_return = find_target_return(datasets[0]) or best
    print(f"target return: {args.target_return:.6g}; the dataset's best is {best:.6g}")
    benchmark = make_benchmark(datasets[0], args) if args.eval_episodes else None
    if benchmark:
        inputs["dataset_score"] = score_dataset(episodes, benchmark)
    steps = make_steps(episodes, buffer, args.aug_only)
    del buffer  # it is as large as they are
    scale = fit_scale(steps.s, datasets[0].action_space, eps=1e-6)
    agents = DT(args, scale).to(args.device)
    lr = torch.tensor(0.0, device=args.device)  # a tensor, so that a CUDA graph can change it
    options = {"weight_decay": 1e-4, "fused": True, "capturable": True}
    optimizers = {"transformer": torch.optim.AdamW(agents.parameters(), lr, **options)}
    train = partial(update, agents, optimizers, make_window_sampler(steps, agents.scale, args))
    run(args, inputs, agents, optimizers, train, benchmark)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
