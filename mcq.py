# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.5", "numpy>=2", "gymnasium[mujoco]>=1", "mujoco<3.12",
#     "minari[hdf5,hf]>=0.5.4", "tyro>=0.9", "tqdm", "wandb"]
# ///
"""MCQ (Lyu et al., 2022) on an offline dataset, alone or with generated trajectories.

    python mcq.py --env hopper-medium               the dataset alone
    python mcq.py --aug buffer.npz --num-seeds 8    and a buffer of gta_augment.py, eight agents

Reads a Minari dataset and buffer.npz. Writes runs/<name>/: checkpoint.pt, config.json, evals.csv.
With the --out of a run that was killed, the same command goes on where that run stopped.
"""

import copy
import importlib
import json
import math
import os
import re
import sys
import zlib
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
import tyro
from gymnasium.vector.utils import batch_space, iterate
from torch import nn
from tqdm import tqdm


@dataclass
class Args:
    # --- MCQ ---
    lr: float = 3e-4  # learning rate of Adam: actor, critics and temperature
    vae_lr: float = 1e-3  # learning rate of Adam: behaviour policy
    discount: float = 0.99  # discount factor
    tau: float = 0.005  # step of the target critics towards the trained ones
    # weight of the loss at the data, lambda; 1 - lambda is that of the policy's actions
    lmbda: float = 0.9
    # sampled actions of the behaviour policy, the best of which gives the target
    num_actions: int = 10
    # added to the rewards of training. Default: -1 in AntMaze, else 0
    reward_bias: float | None = None
    # --- data ---
    # short name (hopper-medium), Minari id, folder of a Minari dataset, or several joined by +.
    # Default: what --aug was made from, else the bundled dataset
    env: str | None = None
    aug: str | None = None  # buffer.npz to train on, too
    aug_only: bool = False  # train on the buffer alone
    # S4RL baseline: standard deviation of noise on standardised states (GTA, C.1: 3e-4)
    s4rl_sigma: float = 0.0
    # --- run ---
    train_steps: int = 1_000_000  # updates (GTA, C.3)
    batch_size: int = 1024  # transitions in a batch (GTA, C.3)
    num_seeds: int = 1  # independent agents, trained at once
    eval_every: int = 50_000  # updates between evaluations, each of which writes a checkpoint
    # episodes of an evaluation; 0: none, and no environment. Default: 10 in locomotion, else 100
    # (GTA, C.3)
    eval_episodes: int | None = None
    env_package: str | None = None  # module to import that registers your own environment
    # folder to write, or to go on with. Default: runs/mcq-<env>-<augmentation>-<seed>-<time>
    out: str | None = None
    seed: int = 0  # seed of weights, batches, noise and evaluation episodes
    # CUDA_VISIBLE_DEVICES picks the card
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    track: bool = False  # log to Weights & Biases; WANDB_PROJECT and WANDB_ENTITY say where


BY_DOMAIN = {  # what a flag is if it is not given (OfflineRL-Kit; episodes: GTA, C.3)
    "reward_bias": {"antmaze": -1.0, "else": 0.0},
    "eval_episodes": {"locomotion": 10, "else": 100},
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


def mlp(S, *dims, dropout=0.0):
    """Linear layers; ReLU and dropout (0: none) between them."""
    layers = [Linear(S, dims[0], dims[1])]
    for d_in, d_out in zip(dims[1:], dims[2:]):
        layers += [nn.ReLU(inplace=True), nn.Dropout(dropout), Linear(S, d_in, d_out)]
    return nn.Sequential(*layers)


class TwinCritic(nn.Module):
    """Q_1 and Q_2, in one product. [S, B, obs_dim], [S, B, act_dim] -> [2, S, B]"""

    def __init__(self, S, obs_dim, act_dim, hidden=(256, 256)):
        super().__init__()
        self.net = mlp(2 * S, obs_dim + act_dim, *hidden, 1)

    def forward(self, s, a):
        x = torch.cat([s, a], dim=-1)
        return self.net(x.repeat(2, 1, 1)).view(2, *x.shape[:2])


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


# --- MCQ ---


class MCQ(nn.Module):
    """S agents. A loss is a sum over them, so that each gets the gradient of its own."""

    def __init__(self, args, scale):
        super().__init__()
        self.args = args
        self.scale = scale
        obs_dim, act_dim = len(scale.mean), len(scale.low)
        S, latent_dim = args.num_seeds, 2 * act_dim
        self.actor = mlp(S, obs_dim, 400, 400, 2 * act_dim, dropout=0.1)
        self.critic = TwinCritic(S, obs_dim, act_dim, hidden=(400, 400))
        self.critic_target = copy.deepcopy(self.critic)
        self.encoder = mlp(S, obs_dim + act_dim, 750, 750, 2 * latent_dim)
        self.decoder = nn.Sequential(mlp(S, obs_dim + latent_dim, 750, 750, act_dim), nn.Tanh())
        self.log_alpha = nn.Parameter(torch.zeros(S))

    def act(self, observations):
        """Actions of the policy, without noise, in the environment's units as the observations are.
        [S, K, obs_dim] -> [S, K, act_dim]"""
        mean, _ = self.actor(self.scale.states(observations)).chunk(2, dim=-1)
        return self.scale.env_actions(mean.tanh())

    def sample(self, s):
        """Draws a = tanh(x), x normal, from pi(. | s). Returns a [S, B, act_dim], log pi [S, B]."""
        mean, log_std = self.actor(s).chunk(2, dim=-1)
        log_std = log_std.clamp(-5, 2)
        noise = torch.randn_like(mean)
        x = mean + log_std.exp() * noise
        log_prob = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
        log_derivative = 2 * (math.log(2) - torch.logaddexp(x, -x))  # log (1 - tanh(x)^2)
        return x.tanh(), (log_prob - log_derivative).sum(-1)

    def vae_loss(self, s, a):
        """Squared error of actions and KL divergence from N(0, 1), both means over dimensions."""
        mean, log_std = self.encoder(torch.cat([s, a], dim=-1)).chunk(2, dim=-1)
        log_std = log_std.clamp(-4, 15)
        z = mean + log_std.exp() * torch.randn_like(mean)  # [S, B, latent_dim]
        recon = self.decoder(torch.cat([s, z], dim=-1))
        kl = -0.5 * (1 + 2 * log_std - mean.square() - (2 * log_std).exp())
        return ((recon - a).square().mean((-2, -1)) + kl.mean((-2, -1))).sum()

    def best_behaviour_q(self, s):
        """The largest of each target Q over n actions of the behaviour policy, then the smaller of
        the two. [S, B, obs_dim] -> [S, B]"""
        q = []
        pieces = 1 if s.is_cuda else len(s)  # on a CPU they fit its cache
        for x in s.repeat_interleave(self.args.num_actions, dim=1).chunk(pieces, dim=1):
            z = torch.randn(*x.shape[:2], 2 * len(self.scale.low), device=s.device).clamp(-0.5, 0.5)
            q.append(self.critic_target(x, self.decoder(torch.cat([x, z], dim=-1))))
        return torch.cat(q, dim=-1).unflatten(-1, (s.shape[1], -1)).amax(-1).amin(0)

    def critic_loss(self, s, a, r, s_next, terminal):
        """The loss at the data and at the policy's own actions (Algorithm 1). Fields [S, B, ...]"""
        with torch.no_grad():
            alpha = self.log_alpha.exp().clamp(max=1)[:, None]
            a_next, log_pi = self.sample(s_next)
            q_next = self.critic_target(s_next, a_next).amin(0) - alpha * log_pi
            target = r + self.args.discount * (1 - terminal) * q_next
            s_both = torch.cat([s, s_next], dim=1)  # [S, 2B, obs_dim]
            target_ood = self.best_behaviour_q(s_both)
            a_ood, _ = self.sample(s_both)
        loss = (self.critic(s, a) - target).square().mean(-1)
        loss_ood = (self.critic(s_both, a_ood) - target_ood).square().mean(-1)
        return (self.args.lmbda * loss + (1 - self.args.lmbda) * loss_ood).sum()

    def actor_loss(self, s):
        """alpha log pi(a | s) - min Q(s, a), a ~ pi (SAC, eq. 7), and the loss of the temperature,
        which moves the entropy of pi to -act_dim (SAC, eq. 18)."""
        a, log_pi = self.sample(s)
        alpha = self.log_alpha.detach().exp().clamp(max=1)[:, None]
        actor_loss = (alpha * log_pi - self.critic(s, a).amin(0)).mean(-1)
        alpha_loss = -self.log_alpha * (log_pi.detach() - a.shape[-1]).mean(-1)
        return actor_loss.sum(), alpha_loss.sum()


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
    """One update of the behaviour policy, of the critics, then of actor and temperature."""
    s, a, r, s_next, terminal = draw_batch()
    vae_loss = descend(optimizers["vae"], agents.vae_loss(s, a))
    critic_loss = descend(optimizers["critic"], agents.critic_loss(s, a, r, s_next, terminal))
    actor_loss, alpha_loss = agents.actor_loss(s)
    descend(optimizers["actor"], actor_loss + alpha_loss)
    polyak(agents.critic_target, agents.critic, agents.args.tau)
    return {
        "vae_loss": vae_loss,
        "critic_loss": critic_loss,
        "actor_loss": actor_loss.detach(),
        "alpha_loss": alpha_loss.detach(),
    }


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


class Transitions(NamedTuple):
    s: np.ndarray  # [N, obs_dim]
    a: np.ndarray  # [N, act_dim]
    r: np.ndarray  # [N]
    s_next: np.ndarray  # [N, obs_dim]
    terminal: np.ndarray  # [N]


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


def make_transitions(episodes, buffer, aug_only=False):
    """Returns the transitions of the episodes, unless the buffer's alone are wanted, and those of
    the buffer's windows."""
    parts = []  # windows [N, H, ...], no copies; an episode is one window
    for s, a, r, terminal in episodes:
        parts.append(Transitions(s[None, :-1], a[None], r[None], s[None, 1:], terminal[None]))
    if buffer:
        s = buffer.observations
        parts.append(
            Transitions(s[:, :-1], buffer.actions, buffer.rewards, s[:, 1:], buffer.terminals)
        )
    num_dropped = 0
    if aug_only:  # the episodes were only there for the check of sizes
        num_dropped = sum(len(episode.rewards) for episode in episodes)
    return Transitions(*concatenate_windows(parts, num_dropped))


def fit_scale(s, box, eps=1e-3):
    """Returns the scale of the states s [N, obs_dim] and of the box of actions."""
    bounded = np.isfinite(box.low).all() and np.isfinite(box.high).all()
    require(bounded, f"the actions have no bounds, {box}")
    mean = s.mean(0, dtype=np.float64)
    std = s.std(0, dtype=np.float64) + eps
    return Scale(*(torch.from_numpy(x).float() for x in (mean, std, box.low, box.high)))


def make_sampler(transitions, scale, args):
    """Returns a function that draws a batch of s, a, r, s', terminal for every agent [S, B, ...].

    The transitions lie on the device as one tensor of rows, so that a batch is one gather.
    """
    obs_dim, act_dim = len(scale.mean), len(scale.low)
    widths = [obs_dim, act_dim, 1, obs_dim, 1]
    rows = torch.from_numpy(np.column_stack(transitions)).to(args.device)
    for part in rows.split(100_000):  # in place: there may be millions of rows
        s, a, _, s_next, _ = part.split(widths, dim=1)
        s.copy_(scale.states(s))
        a.copy_(scale.actions(a))
        s_next.copy_(scale.states(s_next))

    def draw_batch():
        index = torch.randint(len(rows), (args.num_seeds, args.batch_size), device=args.device)
        s, a, r, s_next, terminal = rows[index].split(widths, dim=-1)
        if args.s4rl_sigma:
            s = s + args.s4rl_sigma * torch.randn_like(s)
            s_next = s_next + args.s4rl_sigma * torch.randn_like(s_next)
        return s, a, r.squeeze(-1), s_next, terminal.squeeze(-1)

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
    score. [S], [S]"""
    agents.eval()
    envs = benchmark.envs
    S, K = args.num_seeds, envs.num_envs // args.num_seeds
    total = np.zeros((S, K))
    for first in range(0, args.eval_episodes, K):
        episode = first + np.arange(K)
        seeds = 1000 * (args.seed + np.arange(S))[:, None] + episode  # [S, K]
        s, _ = envs.reset(seed=seeds.ravel().tolist())
        alive = np.tile(episode < args.eval_episodes, (S, 1))  # [S, K]
        while alive.any():
            s = torch.from_numpy(s).to(args.device).view(S, K, -1)
            a = agents.act(s).flatten(0, 1).cpu().numpy()
            s, r, terminated, truncated, _ = envs.step(a)
            total += alive * r.reshape(S, K)
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
    at once: observations [S, K, obs_dim] -> actions [S, K, act_dim]."""
    checkpoint = torch.load(path, map_location=device, weights_only=True)
    weights = checkpoint["agents"]
    scale = Scale(*(weights[f"scale.{key}"] for key in ("mean", "std", "low", "high")))
    agents = MCQ(Args(**checkpoint["args"]), scale).to(device)
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
    benchmark = make_benchmark(datasets[0], args) if args.eval_episodes else None
    if benchmark:
        inputs["dataset_score"] = score_dataset(episodes, benchmark)
    transitions = make_transitions(episodes, buffer, args.aug_only)
    del buffer  # it is as large as they are
    transitions = transitions._replace(r=transitions.r + args.reward_bias)
    scale = fit_scale(transitions.s, datasets[0].action_space)
    agents = MCQ(args, scale).to(args.device)
    adam = partial(torch.optim.Adam, fused=True, capturable=True)
    optimizers = {
        "vae": adam([*agents.encoder.parameters(), *agents.decoder.parameters()], args.vae_lr),
        "critic": adam(agents.critic.parameters(), args.lr),
        "actor": adam([*agents.actor.parameters(), agents.log_alpha], args.lr),
    }
    train = partial(update, agents, optimizers, make_sampler(transitions, agents.scale, args))
    run(args, inputs, agents, optimizers, train, benchmark)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
