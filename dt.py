# /// script
# requires-python = ">=3.11"
# dependencies = ["torch", "numpy", "gymnasium[mujoco]", "minari[hdf5,hf]", "tyro", "tqdm", "wandb"]
# ///
"""Decision Transformer (Chen et al., 2021) on an offline dataset, alone or with generated windows.

    python dt.py --env hopper-medium               the dataset alone
    python dt.py --aug buffer.npz --num-seeds 4    and a buffer of gta_augment.py, four agents

Reads a Minari dataset and buffer.npz. Writes runs/<name>/: checkpoint.pt, config.json, evals.csv.
With the --out of a run that was killed, the same command goes on where that run stopped.
"""

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
import torch.nn.functional as F
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
    train_steps: int = 100_000  # updates (GTA, C.3)
    batch_size: int = 1024  # windows in a batch (GTA's release)
    num_seeds: int = 1  # independent agents, trained at once
    lr: float = 1e-4  # learning rate of AdamW (GTA's release)
    warmup_steps: int = 10_000  # updates in which the learning rate rises from 0
    context: int = 20  # steps in a window, each of them three tokens: return to go, state, action
    # return to ask for. Default: that of TARGET_RETURNS, else the dataset's best
    target_return: float | None = None
    # factor of the returns that the network sees. Default: 0.001 in locomotion, else 1
    return_scale: float | None = None
    # updates between evaluations, each of which writes a checkpoint; 0: none, write at the end
    eval_every: int = 50_000
    eval_episodes: int = 100  # episodes of an evaluation (GTA, E.4)
    # folder to write, or to go on with. Default: runs/dt-<env>-<augmentation>-<seed>-<time>
    out: str | None = None
    seed: int = 0  # seed of weights, batches, noise and evaluation episodes
    # CUDA_VISIBLE_DEVICES picks the card
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    track: bool = False  # log to Weights & Biases; WANDB_PROJECT and WANDB_ENTITY say where


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


TARGET_RETURNS = {  # CORL
    **{"halfcheetah": 12000.0, "hopper": 3600.0, "walker2d": 5000.0},
    **{"handpen": 3100.0, "handdoor": 2900.0, "handhammer": 12800.0, "handrelocate": 4300.0},
}


def pack_steps(real, episodes, action_space, args):
    """Returns a function that draws windows of L steps, and their scale. Fields of a window:
    returns to go [.., 1], states, actions, [S, B, L, ..], timesteps, is no padding, [S, B, L]."""
    starts = [] if args.aug_only else [(e.rewards.sum(), 0) for e in real]
    if args.aug:
        buffer = read_buffer(args.aug)[0]
        with blame(f"--aug {args.aug}: no returns to go, or no timesteps, which dt.py needs"):
            starts += zip(buffer["return_to_go"], buffer["timestep"])
    steps = []
    for (first, t), e in zip(starts, episodes):
        r, step = e.rewards.astype(np.float64), np.arange(len(e.rewards))
        R = args.return_scale * (first - (r.cumsum() - r))  # GTA, eq. 17
        steps.append((R, e.observations[:-1], e.actions, t + step, step[::-1] + 1))
    R, s, a, t, left = (torch.from_numpy(np.concatenate(x)) for x in zip(*steps))
    scale = make_scale(s, action_space, eps=1e-6)
    s = (s - scale["mean"]) / scale["std"]
    a = (a - scale["center"]) / scale["radius"].where(scale["radius"] > 0, 1.0)  # no width: 0
    columns = [R[:, None], s, a, t[:, None], left[:, None]]
    rows = torch.cat([x.float() for x in columns], dim=1).to(args.device)
    widths = [x.shape[1] for x in columns]

    def draw_batch():  # every step is as likely as another to be a window's first
        first = torch.randint(len(rows), (args.num_seeds, args.batch_size, 1), device=args.device)
        step = torch.arange(args.context, device=args.device)
        window = rows[(first + step).clamp(max=len(rows) - 1)]  # its padding: whatever follows
        R, s, a, t, left = window.split(widths, dim=-1)
        if args.s4rl_sigma:
            s = s + args.s4rl_sigma * torch.randn_like(s)
        return R, s, a, t.squeeze(-1).long(), step < left[..., :1, 0]

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
    """Causal attention of one head and an MLP, both residual. [S, B T, E] -> [S, B tokens, E]
    Positions that are not among the tokens only serve as keys and values."""

    def __init__(self, S, dim, dropout):
        super().__init__()
        self.qkv, self.project = NormLinear(S, dim, 3 * dim), Linear(S, dim, dim)
        self.mlp = nn.Sequential(NormLinear(S, dim, 4 * dim), nn.GELU(), Linear(S, 4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, T, tokens):
        q, k, v = self.qkv(x).view(-1, T, 3 * x.shape[-1]).chunk(3, dim=-1)  # [S B, T, E]
        later = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)[tokens]
        scores = q[:, tokens] @ k.mT / math.sqrt(x.shape[-1])  # [S B, tokens, T]
        out = self.dropout(scores.masked_fill(later, -torch.inf).softmax(-1)) @ v
        x = x.unflatten(1, (-1, T))[:, :, tokens].flatten(1, 2)
        x = x + self.dropout(self.project(out.view(x.shape)))
        return x + self.dropout(self.mlp(x))


# --- Decision Transformer ---


class DT(nn.Module):
    """S agents. A loss is a sum over them, so that each gets the gradient of its own."""

    def __init__(self, args, scale, dim=128, num_layers=3, num_timesteps=1000, dropout=0.1):
        super().__init__()
        self.args, obs_dim, act_dim = args, len(scale["mean"]), len(scale["radius"])
        for key, x in scale.items():
            self.register_buffer(key, x)
        S = args.num_seeds
        self.embed = nn.ModuleList(Linear(S, d_in, dim) for d_in in (1, obs_dim, act_dim))
        self.embed_t = nn.Parameter(0.02 * torch.randn(S, num_timesteps, dim))
        self.scale, self.shift = (nn.Parameter(torch.full((S, 1, dim), x)) for x in (1.0, 0.0))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(S, dim, dropout) for _ in range(num_layers))
        self.head = nn.Sequential(NormLinear(S, dim, act_dim), nn.Tanh())
        for layer in [layer for layer in self.modules() if isinstance(layer, Linear)]:
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        for block in self.blocks:  # as in nn.MultiheadAttention
            nn.init.uniform_(block.qkv.weight, -math.sqrt(1.5 / dim), math.sqrt(1.5 / dim))

    def forward(self, R, s, a, t):
        """The actions [S, B, L, act_dim], each from what came before it. Fields: see pack_steps."""
        agent = torch.arange(len(t), device=t.device)[:, None, None]
        t = t.clamp(max=self.embed_t.shape[1] - 1)  # later timesteps share the last embedding
        embed_t = self.embed_t[agent, t].flatten(1, 2)  # [S, B L, E]
        tokens = [embed(x.flatten(1, 2)) + embed_t for embed, x in zip(self.embed, (R, s, a))]
        x = torch.stack(tokens, dim=2).flatten(1, 2)  # [S, B 3L, E]: return, state, action, ...
        x = F.layer_norm(x, x.shape[-1:])
        x = self.dropout(torch.addcmul(self.shift, self.scale, x))
        for i, block in enumerate(self.blocks, start=1):  # of the last one, only states are wanted
            tokens = slice(1, None, 3) if i == len(self.blocks) else slice(None)
            x = block(x, 3 * t.shape[-1], tokens)
        return self.head(x).unflatten(1, t.shape[1:])

    def loss(self, R, s, a, t, is_step):
        """Squared error of the actions, 0 in the padding: a part of the mean over a batch."""
        error = (self(R, s, a, t) - a).square() * is_step.unsqueeze(-1)
        return error.sum() / (self.args.batch_size * a[0, 0].numel())


def update(agents, optimizers, draw_batch):
    """One update. The learning rate rises from 0 in the first --warmup-steps."""
    args, optimizer = agents.args, optimizers["transformer"]
    optimizer.param_groups[0]["lr"].add_(args.lr / max(1, args.warmup_steps)).clamp_(max=args.lr)
    optimizer.zero_grad()
    pieces = 1 if args.device == "cuda" else math.ceil(args.num_seeds / 2)  # for a CPU's memory
    losses = []
    for part in zip(*(x.chunk(pieces, dim=1) for x in draw_batch())):
        losses.append(agents.loss(*part))
        losses[-1].backward()
    for grads in zip(*(p.grad.unbind() for p in agents.parameters())):  # of one agent
        norm = nn.utils.get_total_norm(grads)
        torch._foreach_mul_(grads, (0.25 / (norm + 1e-6)).clamp(max=1))
    optimizer.step()
    return {"loss": sum(loss.detach() for loss in losses)}


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
    """Returns every agent's mean return [S] of whole episodes, each asked for --target-return."""
    agents.eval()
    S, K = args.num_seeds, envs.num_envs // args.num_seeds
    returns = np.zeros((S, K))
    for first in range(0, args.eval_episodes, K):
        episode = first + np.arange(K)
        seeds = 1000 * (args.seed + np.arange(S))[:, None] + episode
        s, _ = envs.reset(seed=seeds.ravel().tolist())
        alive = np.tile(episode < args.eval_episodes, S)  # [S K]
        steps, to_go = [], np.full((S, K, 1), args.target_return)
        t = torch.zeros(S, K, dtype=torch.int64, device=args.device)
        a = agents.center.float().expand(S, K, -1)  # of a step's own action, nothing is read
        while alive.any():
            s = (torch.from_numpy(s).to(args.device) - agents.mean) / agents.std
            R = args.return_scale * torch.from_numpy(to_go).to(args.device)
            steps = [*steps, [R.float(), s.float().view(S, K, -1), a, t]][-args.context :]
            a = agents(*(torch.stack(x, dim=2) for x in zip(*steps)))[:, :, -1]
            steps[-1][2], t = a, t + 1
            action = agents.center + agents.radius * a.flatten(0, 1)
            s, r, terminated, truncated, _ = envs.step(action.cpu().numpy())
            returns += (r * alive).reshape(S, K)
            to_go -= r.reshape(S, K, 1)
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
    datasets, real, episodes, about = load_data(args)
    name, best = about["env_id"], max(e.rewards.sum().item() for e in real)
    known = [value for word, value in TARGET_RETURNS.items() if word in name.lower()]
    if args.target_return is None:
        args.target_return = known[0] if known else best
    if args.return_scale is None:
        args.return_scale = 1.0 if re.search("Maze|Adroit|Kitchen", name) else 0.001
    print(f"target return: {args.target_return:.6g}; the dataset's best is {best:.6g}")
    envs = make_envs(datasets[0], args, about) if args.eval_every else None
    draw_batch, scale = pack_steps(real, episodes, datasets[0].action_space, args)
    agents = DT(args, scale).to(args.device)
    options = {"weight_decay": 1e-4, "fused": True, "capturable": True}
    lr = torch.tensor(0.0, device=args.device)  # a tensor, so that a CUDA graph can change it
    optimizers = {"transformer": torch.optim.AdamW(agents.parameters(), lr, **options)}
    run(args, about, agents, optimizers, draw_batch, envs)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
