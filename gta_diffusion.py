# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.5", "numpy>=2", "gymnasium[mujoco]>=1", "mujoco<3.12",
#     "minari[hdf5,hf]>=0.5.4", "tyro>=0.9", "tqdm", "wandb"]
# ///
"""GTA, stage A: train a return-conditioned diffusion model of trajectories.

GTA: Generative Trajectory Augmentation with Guidance for Offline RL (NeurIPS 2024), section 4.1
and appendix A. A subtrajectory of H transitions (eq. 6) is an image of H + 1 rows. Its condition is
the discounted return from its first step to the end of the episode (section 4.1). The denoiser is a
temporal U-Net of MLP-mixer blocks (A.2), trained with the loss of EDM (Karras et al. 2022).

    python gta_diffusion.py --env hopper-medium
    torchrun --standalone --nproc-per-node 4 gta_diffusion.py --env hopper-medium

Reads an offline dataset. Writes diffusion.pt, which gta_augment.py turns into a buffer of augmented
trajectories. After a kill the same command goes on from the last checkpoint.
"""

import copy
import json
import math
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import minari
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from gymnasium.vector.utils import batch_space, iterate
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm


@dataclass
class Args:
    # --- model ---
    # H, transitions in a subtrajectory: 1, 7, 15, 23, ..., since the U-Net halves its H + 1 rows
    # thrice. 31 is the paper's 32 as its authors ran it (Table 8)
    horizon: int = 31
    dim: int = 16  # channels of the U-Net's first level; the others have 2, 4 and 8 times as many
    # lambda, the probability that a condition is dropped (eq. 5, Table 6)
    condition_dropout: float = 0.25
    gamma: float = 0.99  # discount of the return that conditions the model
    # subtracted from the reward of a terminal transition. Default: 100 (A.1), 0 in mazes
    terminal_penalty: float | None = None
    return_scale: float = 0.01  # the network sees the return times this
    # --- training ---
    batch_size: int = 256  # subtrajectories in a batch (Table 6), of all processes together
    train_steps: int = 1_000_000  # gradient steps (Table 6)
    # learning rate of Adam (Table 6); cosine annealing, restarted every tenth of the run
    lr: float = 3e-4
    # of the network's arithmetic; all else is fp32. Default: bf16 on CUDA, fp32 on a CPU
    precision: Literal["bf16", "fp32"] | None = None
    # --- data and run ---
    # short name (hopper-medium), Minari id, folder of a Minari dataset, or several joined by +
    env: str = "data/halfcheetah-medium-sample"
    save_every: int = 10_000  # steps between two checkpoints; the last step always writes one
    out: str = "diffusion.pt"  # checkpoint to write, or to go on with
    seed: int = 0  # seed of initial weights, batches and noise
    # CUDA_VISIBLE_DEVICES picks the card
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    track: bool = False  # log to Weights & Biases; WANDB_PROJECT and WANDB_ENTITY say where


BY_DOMAIN = {  # what a flag is if it is not given (A.1)
    "terminal_penalty": {"antmaze": 0.0, "maze": 0.0, "else": 100.0},
}


# --- denoiser ---


class MixerBlock(nn.Module):
    """MLP-mixer block (A.2). [B, R, D, C_in] -> [B, R, D, C_out]: R rows, D dimensions, C channels.

    One MLP mixes the components within each row, one mixes the rows of each component.
    """

    def __init__(self, num_rows, num_dims, c_in, c_out, emb_dim):
        super().__init__()

        def mlp(d, d_hidden):
            return nn.Sequential(nn.Linear(d, d_hidden), nn.GELU(), nn.Linear(d_hidden, d))

        self.norm_row = nn.LayerNorm(num_dims * c_in)
        self.mix_row = mlp(num_dims * c_in, 4 * c_in)
        self.norm_time = nn.LayerNorm(num_rows)
        self.mix_time = mlp(num_rows, 4 * num_rows)
        self.emb = nn.Sequential(nn.Mish(), nn.Linear(emb_dim, c_out))
        self.project = nn.Linear(c_in, c_out) if c_in != c_out else nn.Identity()
        self.skip = nn.Linear(c_in, c_out) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        rows = x.flatten(2)  # [B, R, D * C_in]
        columns = rows.transpose(1, 2)
        h = self.mix_row(self.norm_row(rows))
        h = h + self.mix_time(self.norm_time(columns)).transpose(1, 2)
        return self.project(h.view_as(x)) + self.emb(emb)[:, None, None, :] + self.skip(x)


class LinearAttention(nn.Module):
    """Residual linear attention over all n = R * D positions. [B, R, D, C] -> [B, R, D, C]

    Per head, out = W_o (softmax_n(K)^T V)^T q. Only the keys pass a nonlinearity, so V = W_v x and
    q = W_q x fold into one C x C matrix per sample, and no [n, 3 * heads * head_dim] is ever built.
    """

    def __init__(self, channels, heads=4, head_dim=32):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(channels, channels)  # instance norm
        self.qkv = nn.Linear(channels, 3 * heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, channels)

    def forward(self, x):
        h = self.norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)  # [B, n, C]
        w_q, w_k, w_v = self.qkv.weight.unflatten(0, (3, self.heads, -1))  # [heads, d, C] each
        w_o = self.out.weight.unflatten(1, (self.heads, -1)).permute(1, 2, 0)  # [heads, d, C]
        k = F.linear(h, w_k.flatten(0, 1)).softmax(dim=1)  # [B, n, heads * d]
        kx = (h.transpose(1, 2) @ k).unflatten(2, (self.heads, -1))  # [B, C, heads, d]
        context = kx.permute(0, 2, 3, 1) @ w_v.transpose(1, 2)  # [B, heads, d, d]
        mix = (w_q.transpose(1, 2) @ context @ w_o).sum(1)  # [B, C, C]
        return x + (h @ mix + self.out.bias).view_as(x)


class MixerUNet(nn.Module):
    """Temporal U-Net of MLP-mixer blocks (A.2). Rows are halved three times, if they are not two.

    Channels come last in memory, so that norms, linear layers and 1x1 convolutions need no copy.
    """

    def __init__(self, num_rows, num_dims, dim):
        super().__init__()
        c = [1, dim, 2 * dim, 4 * dim, 8 * dim]
        emb_dim = 2 * dim
        r = [num_rows // (1 if num_rows == 2 else 2**depth) for depth in range(4)]
        halve = partial(nn.Conv2d, kernel_size=3, stride=(2, 1), padding=1)
        double = partial(nn.ConvTranspose2d, kernel_size=(4, 3), stride=(2, 1), padding=1)
        if num_rows == 2:
            halve = double = nn.Identity

        self.frequencies = nn.Buffer(torch.randn(8))  # random Fourier features, not learned
        self.emb_noise = nn.Sequential(nn.Linear(17, 4 * dim), nn.Mish(), nn.Linear(4 * dim, dim))
        self.emb_y = nn.Sequential(nn.Linear(1, 2 * dim), nn.Mish(), nn.Linear(2 * dim, dim))

        def make_level(rows, c_in, c_out, resize):
            block_1 = MixerBlock(rows, num_dims, c_in, c_out, emb_dim)
            block_2 = MixerBlock(rows, num_dims, c_out, c_out, emb_dim)
            return nn.ModuleList([block_1, block_2, LinearAttention(c_out), resize(c_out, c_out)])

        self.downs = nn.ModuleList([make_level(r[i], c[i], c[i + 1], halve) for i in range(3)])
        self.bottom = make_level(r[3], c[3], c[4], nn.Identity)
        self.middle_1 = MixerBlock(r[3], num_dims, c[4], c[4], emb_dim)
        self.middle_attention = LinearAttention(c[4])
        self.middle_2 = MixerBlock(r[3], num_dims, c[4], c[4], emb_dim)
        self.ups = nn.ModuleList([make_level(r[i], 2 * c[i + 1], c[i], double) for i in (3, 2, 1)])
        self.last = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1), nn.GroupNorm(8, dim), nn.Mish(), nn.Conv2d(dim, 1, 1)
        )

    def forward(self, x, c_noise, y, keep):
        """x [B, R, D], c_noise [B], y [B], keep [B]: 1 where the condition counts, 0 where it is
        dropped. Returns [B, R, D]."""
        angles = 2 * math.pi * c_noise[:, None] * self.frequencies
        features = torch.cat([c_noise[:, None], angles.sin(), angles.cos()], dim=1)
        emb_y = self.emb_y(y[:, None]) * keep[:, None]
        emb = torch.cat([emb_y, self.emb_noise(features)], dim=1)

        x = x.unsqueeze(-1)
        skips = []
        for block_1, block_2, attention, resize in [*self.downs, self.bottom]:
            x = attention(block_2(block_1(x, emb), emb))
            skips.append(x)
            x = resize(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = self.middle_2(self.middle_attention(self.middle_1(x, emb)), emb)
        for block_1, block_2, attention, resize in self.ups:
            x = block_1(torch.cat([x, skips.pop()], dim=-1), emb)
            x = attention(block_2(x, emb))
            x = resize(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.last(x.permute(0, 3, 1, 2)).squeeze(1)


class Denoiser(nn.Module):
    """EDM's preconditioned denoiser D(x; sigma, y) (Karras et al., eq. 7) of standardised rows.

    The last row's action and reward are empty cells: zero going in and zero coming out.
    """

    def __init__(self, horizon, obs_dim, act_dim, dim, sigma_data=1.0, bf16=False):
        super().__init__()
        num_dims = obs_dim + act_dim + 1
        self.net = MixerUNet(horizon + 1, num_dims, dim)
        self.sigma_data = sigma_data
        self.bf16 = bf16
        filled = torch.ones(horizon + 1, num_dims)
        filled[-1, obs_dim:] = 0.0
        self.filled = nn.Buffer(filled)

    def forward(self, x, sigma, y, keep):
        """x [B, H + 1, D], sigma [B], y [B] scaled return, keep [B] (0 drops y) -> [B, H + 1, D]"""
        s = sigma[:, None, None]
        norm = torch.sqrt(s**2 + self.sigma_data**2)
        c_skip = self.sigma_data**2 / norm**2
        c_out = s * self.sigma_data / norm
        c_in = 1 / norm
        c_noise = torch.log(sigma) / 4
        x = x * self.filled
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            F_x = self.net(c_in * x, c_noise, y, keep)
        return (c_skip * x + c_out * F_x) * self.filled  # fp32: c_out is


# --- training ---


def edm_loss(denoiser, x, y, keep, sigma, noise):
    """EDM's weighted denoising loss (eq. 2 and 5; Karras et al., Table 1).

    x [B, H + 1, D] clean rows, y [B], keep [B], sigma [B], noise [B, H + 1, D] unit normal.
    """
    x = x * denoiser.filled
    s = sigma[:, None, None]
    weight = (s**2 + denoiser.sigma_data**2) / (s * denoiser.sigma_data) ** 2
    return (weight * (denoiser(x + s * noise, sigma, y, keep) - x) ** 2).mean()


def warm_restarts(step, period):
    """The share of the learning rate at step 1, 2, ...: a cosine from 1 to 0 in every period."""
    return 0.5 * (1 + math.cos(math.pi * ((step - 1) % period) / period))


@torch.no_grad()
def update_ema(ema, model, step, every=10, power=18, max_decay=0.995):
    """Moves the averaged weights, which are those that sample, towards the model's.

    Until the decay is max_decay, the weights of step t count as t^(power - 1) does, whenever they
    are read (EDM2, Karras et al. 2024, sec. 3.1): nothing is left of the initial ones.
    """
    decay = min(max_decay, max(0.0, 1 - every / step) ** power)
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def update(args, network, loss_fn, optimizer, rows, start, y, share):
    """One gradient step. Returns the loss. rows [R, D] are standardised; start, y [W].

    Every rank of torchrun draws the same batch and noise, and takes its own slice of them, share.
    """
    index = torch.randint(len(start), (args.batch_size,), device=start.device)
    x = rows[start[index, None] + torch.arange(args.horizon + 1, device=rows.device)]
    keep = (torch.rand(len(x), device=x.device) >= args.condition_dropout).float()
    sigma = torch.exp(1.2 * torch.randn(len(x), device=x.device) - 1.2)  # EDM, Table 1
    batch = (x, y[index], keep, sigma, torch.randn_like(x))
    loss = loss_fn(network, *(field[share] for field in batch))
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), max_norm=1.0)
    optimizer.step()
    return loss.detach()


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


class Windows(NamedTuple):
    """All W windows of H transitions and one more state (eq. 6, A.1) in R rows: all episodes, one
    after another. Window w is the rows start[w] to start[w] + H."""

    rows: np.ndarray  # [R, D] s_t, a_t, r_t; after an episode's last transition s_T, 0, 0
    terminals: np.ndarray  # [R]
    start: np.ndarray  # [W]
    episode: np.ndarray  # [W]
    timestep: np.ndarray  # [W] the window's first step in its episode
    y: np.ndarray  # [W] the condition: discounted return to go, with the penalty (4.1, A.1)
    return_to_go: np.ndarray  # [W] undiscounted, without the penalty (R_t of eq. 17)


class Normalizer(NamedTuple):
    mean: torch.Tensor  # [D], of s, a, r
    std: torch.Tensor  # [D]


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


def fill_in_by_domain(args, domain):
    """Sets the flags that were not given to what they are in this domain."""
    for name, values in BY_DOMAIN.items():
        if getattr(args, name) is None:
            setattr(args, name, values.get(domain, values["else"]))


def discounted_returns(rewards, gamma):
    """Returns sum_{i >= t} gamma^(i - t) r_i for every t. [T] -> [T]"""
    backwards = accumulate(rewards[::-1].tolist(), lambda y, r: r + gamma * y)
    return np.array([*backwards][::-1])


def cut_windows(episode, number, horizon, gamma, penalty):
    """Returns the rows of one episode, and its windows: none if it has less than H transitions."""
    s, a, r, terminals = episode
    timestep = np.arange(max(0, len(r) - horizon + 1))
    penalised = r - penalty * terminals
    cells = np.pad(np.column_stack([a, penalised]), [(0, 1), (0, 0)])
    return Windows(
        rows=np.column_stack([s, cells]).astype(np.float32),
        terminals=np.append(terminals, False),
        start=timestep,
        episode=np.full(len(timestep), number),
        timestep=timestep,
        y=discounted_returns(penalised, gamma)[timestep].astype(np.float32),
        return_to_go=discounted_returns(r, 1.0)[timestep].astype(np.float32),
    )


def make_windows(episodes, horizon, gamma, penalty):
    """Returns the windows of all episodes."""
    parts = []
    num_rows = 0
    for number, episode in enumerate(episodes):
        part = cut_windows(episode, number, horizon, gamma, penalty)
        parts.append(part._replace(start=part.start + num_rows))
        num_rows += len(part.rows)
    windows = Windows(*(np.concatenate(field) for field in zip(*parts)))
    num = len(windows.start)
    require(num, f"no episode has {horizon} transitions; lower --horizon of gta_diffusion.py")
    num_short = sum(len(episode.rewards) < horizon for episode in episodes)
    condition = f"return condition {windows.y.min():.1f} to {windows.y.max():.1f}"
    print(f"windows: {num} of {horizon} transitions, {condition}; {num_short} episodes are shorter")
    return windows


def fit_normalizer(episodes):
    """Returns mean and deviation of all transitions, computed before the penalty is subtracted."""
    transitions = [np.column_stack([e.observations[:-1], e.actions, e.rewards]) for e in episodes]
    transitions = np.concatenate(transitions, dtype=np.float64)
    states = np.concatenate([e.observations for e in episodes], dtype=np.float64)
    std = transitions.std(0, ddof=1)
    for i in range(states.shape[1]):
        if std[i] < 1e-6:  # it changes in last states alone, if at all
            std[i] = states[:, i].std()
    if std[-1] < 1e-6:  # the penalty would be millions of deviations
        std[-1] = 1.0
    mean = torch.from_numpy(transitions.mean(0))
    return Normalizer(mean.float(), torch.from_numpy(std + 1e-5).float())


def describe_terminals(episodes, penalty):
    """Returns how many transitions are terminal and what they are paid: successes should cost 0."""
    terminals = np.concatenate([e.terminals for e in episodes])
    rewards = np.concatenate([e.rewards for e in episodes])
    if not terminals.any():
        return "terminal transitions: none"
    paid = f"mean reward {rewards[terminals].mean():.3g}"
    if not terminals.all():
        paid += f" (of the others {rewards[~terminals].mean():.3g})"
    advice = "; if they are successes, give --terminal-penalty 0" if penalty else ""
    return f"terminal transitions: {terminals.sum()}, {paid}, each costs {penalty:g}{advice}"


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


def try_to_write(path):
    """Ends the program now if no file could be written at path when the work is done."""
    folder = Path(path).resolve().parent
    with or_exit(f"{path} cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def read_checkpoint(path, args, inputs):
    """Returns the checkpoint at path, None if there is none. Ends the program if it is of a run
    with other flags or data."""
    if not Path(path).exists():
        return None
    with or_exit(f"--out {path} is no diffusion.pt that can be read; choose another --out"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        old = {**checkpoint, **checkpoint["args"]}
    require_same(path, old, {"format_version": 3, **asdict(args), **inputs})
    return checkpoint


# --- run ---


class Ranks(NamedTuple):
    rank: int  # of this process
    size: int  # processes that torchrun has started, 1 without it


class Model(NamedTuple):
    denoiser: Denoiser
    ema: Denoiser  # the average of its weights, which samples
    optimizer: torch.optim.Optimizer


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


def join_ranks(args):
    """Returns the number of this process and of all; joins them if torchrun has started several."""
    ranks = Ranks(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    fits = args.batch_size % ranks.size == 0
    require(fits, f"--batch-size {args.batch_size}: {ranks.size} processes must divide it")
    if ranks.size > 1:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    if ranks.rank > 0:
        sys.stdout = open(os.devnull, "w")
    return ranks


def require_compiler():
    """Ends the program if torch.compile would fail: Triton needs a C compiler and Python.h."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_path("include"), "Python.h")
    found = (compiler and header.exists()) or os.environ.get("TORCH_COMPILE_DISABLE") == "1"
    require(
        found,
        "torch.compile needs a C compiler and Python.h (Debian: apt install gcc python3-dev); "
        "TORCH_COMPILE_DISABLE=1 does without both, and is slower",
    )


def make_one_step(args, ranks, model, data):
    """Returns a function that takes one gradient step: on one GPU it is a CUDA graph; on several
    each has its share of the batch and a compiled denoiser, and gradients are averaged."""
    network = model.denoiser
    loss_fn = edm_loss
    if args.device == "cuda":
        require_compiler()
        if ranks.size == 1:
            loss_fn = torch.compile(edm_loss)
        else:
            network.compile()
    if ranks.size > 1:
        network = DistributedDataParallel(network, gradient_as_bucket_view=True)
        network.sigma_data = model.denoiser.sigma_data
        network.filled = model.denoiser.filled
    share = slice(ranks.rank, None, ranks.size)
    one_step = partial(update, args, network, loss_fn, model.optimizer, *data, share)
    if args.device == "cuda" and ranks.size == 1:
        return record(one_step)
    return one_step


def make_model(args, sizes):
    """Returns a new denoiser, the average of its weights, and its optimizer."""
    torch.manual_seed(args.seed)
    denoiser = Denoiser(**sizes, dim=args.dim, bf16=args.precision == "bf16").to(args.device)
    ema = copy.deepcopy(denoiser).requires_grad_(False)
    lr = torch.tensor(args.lr, device=args.device)  # a tensor can change in a CUDA graph
    options = {"betas": (0.9, 0.99), "weight_decay": 0.0, "capturable": args.device == "cuda"}
    return Model(denoiser, ema, torch.optim.AdamW(denoiser.parameters(), lr, fused=True, **options))


def restore(model, checkpoint):
    """Puts the model into the state of the checkpoint."""
    model.denoiser.load_state_dict(checkpoint["model"])
    model.ema.load_state_dict(checkpoint["ema"])
    groups = model.optimizer.state_dict()["param_groups"]  # the learning rate stays a tensor
    model.optimizer.load_state_dict({**checkpoint["optimizer"], "param_groups": groups})


def save(args, inputs, model, step, **more):
    """Writes --out, unless what is there is of another run by now."""
    read_checkpoint(args.out, args, inputs)
    checkpoint = {
        "format": "gta-diffusion",
        "format_version": 3,
        "args": asdict(args),
        "versions": {package: version(package) for package in PACKAGES},
        "env": args.env,
        "model": model.denoiser.state_dict(),
        "ema": model.ema.state_dict(),
        "optimizer": model.optimizer.state_dict(),
        "step": step,
        **inputs,
        **more,
    }
    with new_file(args.out) as file:
        torch.save(checkpoint, file)


def train(args, ranks, model, data, first, save_model):
    """Trains from step first to --train-steps. data are standardised rows [R, D], the windows'
    first rows [W] and their scaled returns [W]. Returns the last mean loss."""
    lr = model.optimizer.param_groups[0]["lr"]
    period = max(1, args.train_steps // 10)  # of the learning rate
    one_step = make_one_step(args, ranks, model, data)
    torch.manual_seed(args.seed + first)
    total = torch.zeros((), device=args.device)  # of the losses since they were last read
    num_losses = 0
    every = 0.1 if sys.stderr.isatty() else 60  # seconds: a log file takes a line a minute
    bar = {"total": args.train_steps, "mininterval": every, "maxinterval": every}
    steps = range(first + 1, args.train_steps + 1)
    progress = tqdm(steps, initial=first, disable=ranks.rank > 0, **bar)
    for step in progress:
        lr.fill_(args.lr * warm_restarts(step, period))
        total += one_step()
        num_losses += 1
        if step < 10 or step % 10 == 0:
            update_ema(model.ema, model.denoiser, step)
        is_due = step % args.save_every == 0 or step == args.train_steps
        if step % 100 and not is_due:
            continue
        if ranks.size > 1:
            dist.all_reduce(total)
        loss = total.item() / num_losses / ranks.size
        total.zero_()
        num_losses = 0
        finite = all(p.isfinite().all() for p in model.denoiser.parameters())
        finite = finite and math.isfinite(loss)
        require(finite, f"step {step}: loss {loss}; {args.out} stays as it is; try a lower --lr")
        progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if args.track and ranks.rank == 0:
            import wandb

            wandb.log({"loss": loss, "lr": lr.item()}, step=step)
        if is_due:
            if ranks.rank == 0:
                save_model(step=step)
                progress.write(f"step {step}: loss {loss:.3f}")
            torch.manual_seed(args.seed + step)  # a run that goes on from here draws the same
    return loss


def main(args):
    check_flags(args)
    has_rows = args.horizon == 1 or args.horizon % 8 == 7
    require(has_rows, f"--horizon {args.horizon}: must be 1, 7, 15, 23, 31, ...")
    require(args.dim % 8 == 0, f"--dim {args.dim}: must be a multiple of 8")
    require(args.condition_dropout <= 1, "--condition-dropout: must be at most 1")
    require(args.return_scale > 0, "--return-scale: must be greater than 0")
    args.precision = args.precision or ("bf16" if args.device == "cuda" else "fp32")
    torch.set_float32_matmul_precision("high")  # TF32
    ranks = join_ranks(args)
    if ranks.rank > 0:
        dist.barrier()  # rank 0 comes first: it may have to download
    datasets = open_datasets(args.env)
    if ranks.rank == 0 and ranks.size > 1:
        dist.barrier()
    episodes = load_episodes(datasets)
    fill_in_by_domain(args, find_domain(datasets[0]))
    print(describe_terminals(episodes, args.terminal_penalty))
    inputs = identify_dataset(datasets, episodes)
    checkpoint = read_checkpoint(args.out, args, inputs)
    step = checkpoint["step"] if checkpoint else 0
    if step == args.train_steps:
        print(f"{args.out} is finished, {step} steps with these flags")
        return
    try_to_write(args.out)

    windows = make_windows(episodes, args.horizon, args.gamma, args.terminal_penalty)
    normalizer = fit_normalizer(episodes)
    rows = (torch.from_numpy(windows.rows) - normalizer.mean) / normalizer.std
    y = torch.from_numpy(windows.y) * args.return_scale
    data = [x.to(args.device) for x in (rows, torch.from_numpy(windows.start), y)]
    first = episodes[0]
    obs_dim, act_dim = first.observations.shape[1], first.actions.shape[1]
    sizes = {"horizon": args.horizon, "obs_dim": obs_dim, "act_dim": act_dim}
    model = make_model(args, sizes)
    if checkpoint:
        restore(model, checkpoint)
        print(f"{args.out} is at step {step} of {args.train_steps}")
    if args.track and ranks.rank == 0:
        with or_exit("--track"):
            import wandb

            wandb.init(name=Path(args.out).stem, config={**asdict(args), **inputs})
    more = {**sizes, "normalizer": normalizer._asdict()}
    loss = train(args, ranks, model, data, step, partial(save, args, inputs, model, **more))
    print(f"wrote {args.out}: {args.train_steps} steps, loss {loss:.3f}")
    if ranks.size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
