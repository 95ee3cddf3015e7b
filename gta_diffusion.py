# /// script
# requires-python = ">=3.11"
# dependencies = ["torch", "numpy", "gymnasium[mujoco]", "minari[hdf5,hf]", "tyro", "tqdm", "wandb"]
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
import math
import os
import re
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
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
from tqdm import tqdm


@dataclass
class Args:
    # short name (hopper-medium), Minari id, folder of a Minari dataset, or several joined by +
    env: str = "data/halfcheetah-medium-sample"
    # H, transitions in a subtrajectory: 1, 7, 15, 23, ..., since the U-Net halves its H + 1 rows
    # thrice. 31 is the paper's 32 as its authors ran it (Table 8)
    horizon: int = 31
    dim: int = 16  # channels of the U-Net's first level; the others have 2, 4 and 8 times as many
    batch_size: int = 256  # subtrajectories in a batch (Table 6), of all processes together
    train_steps: int = 1_000_000  # gradient steps (Table 6)
    # learning rate of Adam (Table 6); cosine annealing, restarted every tenth of the run
    lr: float = 3e-4
    # lambda, the probability that a condition is dropped (eq. 5, Table 6)
    condition_dropout: float = 0.25
    gamma: float = 0.99  # discount of the return that conditions the model
    # subtracted from the reward of a terminal transition. Default: 100 (A.1), 0 in mazes
    terminal_penalty: float | None = None
    return_scale: float = 0.01  # the network sees the return times this
    save_every: int = 10_000  # steps between two checkpoints; the last step always writes one
    out: str = "diffusion.pt"  # checkpoint to write, or to go on with
    seed: int = 0  # seed of initial weights, batches and noise
    # CUDA_VISIBLE_DEVICES picks the card
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    # of the network's arithmetic; all else is fp32. Default: bf16 on CUDA, fp32 on a CPU
    precision: Literal["bf16", "fp32"] | None = None
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


def discounted_returns(rewards, gamma):
    """Returns sum_{i >= t} gamma^(i - t) r_i for every t from 0 to T. [T] -> [T + 1]"""
    backwards = accumulate(rewards[::-1].tolist(), lambda y, r: r + gamma * y, initial=0.0)
    return [*backwards][::-1]


def make_windows(episodes, horizon, gamma, penalty):
    """Lays out all episodes as rows, R = sum of T + 1, and finds the W windows of H transitions and
    one more state in them (eq. 6, A.1): window w is the rows start[w] to start[w] + H."""
    table = []
    for i, e in enumerate(episodes):
        T, rewards = len(e.rewards), e.rewards - penalty * e.terminations
        cells = np.pad(np.column_stack([e.actions, rewards]), [(0, 1), (0, 0)])
        columns = {
            "rows": np.column_stack([e.observations, cells]),  # [R, D] s_t, a_t, r_t; s_T, 0, 0
            "terminals": np.append(e.terminations, False),  # [R]
            "episode": np.full(T + 1, i),  # [W], as all that follows
            "timestep": np.arange(T + 1),  # the window's first step in its episode
            "y": discounted_returns(rewards, gamma),  # the condition, with the penalty (4.1, A.1)
            "return_to_go": discounted_returns(e.rewards, 1.0),  # without it: R_t of eq. 17
            "start": np.arange(T + 1) <= T - horizon,  # the row of the window's first transition
        }
        table.append(columns)
    w = {key: np.concatenate([own[key] for own in table]) for key in columns}
    w["start"] = np.flatnonzero(w["start"])
    w |= {key: w[key][w["start"]] for key in ("episode", "timestep", "y", "return_to_go")}
    w |= {key: w[key].astype(np.float32) for key in ("rows", "y", "return_to_go")}
    num, num_short = len(w["start"]), sum(len(e.rewards) < horizon for e in episodes)
    require(num, f"no episode has {horizon} transitions; lower --horizon of gta_diffusion.py")
    condition = f"return condition {w['y'].min():.1f} to {w['y'].max():.1f}"
    print(f"windows: {num} of {horizon} transitions, {condition}; {num_short} episodes are shorter")
    return w


def choose_penalty(args, episodes, env):
    """Returns what a terminal transition costs: what is asked for, else 100, in mazes 0 (A.1).

    Warns where terminals are the best-paid transitions, as successes are: none is paid more, or
    their reward rises from the step before, too, which that of a fall at high speed does not.
    """
    default = 0.0 if "maze" in env.lower() else 100.0
    penalty = default if args.terminal_penalty is None else args.terminal_penalty
    is_end = np.concatenate([e.terminations for e in episodes]).astype(bool)
    print(f"terminal transitions: {is_end.sum()}, each costs {penalty:g} (--terminal-penalty)")
    pay = [[e.rewards, np.diff(e.rewards, prepend=e.rewards[:1])] for e in episodes]
    pay = np.concatenate(pay, axis=1)  # [2, N]
    if penalty and is_end.any() and not is_end.all():
        own, other = np.median(pay[:, is_end], axis=1), pay[:, ~is_end]
        high, usual = np.quantile(other, 0.99, axis=1), np.median(other, axis=1)
        is_best, rises = (own >= high) & (own > usual)
        if is_best and (rises or own[0] >= other[0].max()):
            print("the best-paid ones: if successes, --terminal-penalty 0 is likely right")
    return penalty


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
        r = [num_rows // (1 if num_rows == 2 else 2**level) for level in range(4)]
        halve = partial(nn.Conv2d, kernel_size=3, stride=(2, 1), padding=1)
        double = partial(nn.ConvTranspose2d, kernel_size=(4, 3), stride=(2, 1), padding=1)
        if num_rows == 2:
            halve = double = nn.Identity

        self.register_buffer("frequencies", torch.randn(8))  # random Fourier features, not learned
        self.emb_noise = nn.Sequential(nn.Linear(17, 4 * dim), nn.Mish(), nn.Linear(4 * dim, dim))
        self.emb_y = nn.Sequential(nn.Linear(1, 2 * dim), nn.Mish(), nn.Linear(2 * dim, dim))

        def level(num_rows, c_in, c_out, resize):
            block_1 = MixerBlock(num_rows, num_dims, c_in, c_out, emb_dim)
            block_2 = MixerBlock(num_rows, num_dims, c_out, c_out, emb_dim)
            return nn.ModuleList([block_1, block_2, LinearAttention(c_out), resize(c_out, c_out)])

        self.downs = nn.ModuleList([level(r[i], c[i], c[i + 1], halve) for i in range(3)])
        self.bottom = level(r[3], c[3], c[4], nn.Identity)
        self.middle_1 = MixerBlock(r[3], num_dims, c[4], c[4], emb_dim)
        self.middle_attention = LinearAttention(c[4])
        self.middle_2 = MixerBlock(r[3], num_dims, c[4], c[4], emb_dim)
        self.ups = nn.ModuleList([level(r[i], 2 * c[i + 1], c[i], double) for i in (3, 2, 1)])
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

        x, skips = x.unsqueeze(-1), []
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
        self.register_buffer("filled", filled)

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
    x, s = x * denoiser.filled, sigma[:, None, None]
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

    Batch and noise are the same on every rank of torchrun, which takes the slice share of them.
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


def main(args):
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    fits = (args.horizon == 1 or args.horizon % 8 == 7) and args.dim % 8 == 0
    require(fits, "--horizon must be 1, 7, 15, 23, 31, ...; --dim a multiple of 8")
    fits = args.batch_size % world_size == 0
    require(fits, f"--batch-size {args.batch_size}: {world_size} processes must divide it")
    require(args.device == "cpu" or torch.cuda.is_available(), "--device cuda: there is no GPU")
    args.precision = args.precision or ("bf16" if args.device == "cuda" else "fp32")
    torch.set_float32_matmul_precision("high")  # TF32
    if world_size > 1:  # torchrun started this process
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
        dist.barrier()  # rank 0 comes first: it may have to download
    datasets = open_datasets(args.env)
    episodes = load_episodes(datasets)
    args.terminal_penalty = choose_penalty(args, episodes, env_id(datasets[0]))
    path = Path(args.out)
    since = stamp(path)
    checkpoint = load_checkpoint(path, args) if since else None
    fits = not checkpoint or checkpoint["format_version"] == 3
    require(fits, f"{path} is of another version of this program; choose another --out")
    if world_size > 1 and rank == 0:
        dist.barrier()
    first = checkpoint["step"] if checkpoint else 0
    if first == args.train_steps:
        return print(f"{path} is finished, {first} steps with these flags")

    windows = make_windows(episodes, args.horizon, args.gamma, args.terminal_penalty)
    transitions = [np.column_stack([e.observations[:-1], e.actions, e.rewards]) for e in episodes]
    transitions = torch.from_numpy(np.concatenate(transitions)).double()  # without the penalty
    mean, std = transitions.mean(0).float(), (transitions.std(0) + 1e-5).float()
    rows = (torch.from_numpy(windows["rows"]) - mean) / std
    y = torch.from_numpy(windows["y"]) * args.return_scale
    data = [x.to(args.device) for x in (rows, torch.from_numpy(windows["start"]), y)]
    sizes = {"horizon": args.horizon, "obs_dim": episodes[0].observations.shape[1]}
    sizes["act_dim"] = episodes[0].actions.shape[1]

    torch.manual_seed(args.seed)
    denoiser = Denoiser(**sizes, dim=args.dim, bf16=args.precision == "bf16").to(args.device)
    ema = copy.deepcopy(denoiser).requires_grad_(False)
    lr = torch.tensor(args.lr, device=args.device)  # a tensor can change in a CUDA graph
    options = {"betas": (0.9, 0.99), "weight_decay": 0.0, "capturable": args.device == "cuda"}
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr, fused=True, **options)
    if checkpoint:
        denoiser.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({**checkpoint["optimizer"], "param_groups": groups})
        print(f"{path} is at step {first} of {args.train_steps}")
    lr = optimizer.param_groups[0]["lr"]
    about = {
        "format": "gta-diffusion",
        "format_version": 3,
        "args": asdict(args),
        "versions": {x.__name__: str(x.__version__) for x in (torch, np, gym, minari)},
        "env": args.env,
        "dataset_ids": [dataset.id for dataset in datasets],
        "env_id": env_id(datasets[0]),
        **sizes,
        "normalizer": {"mean": mean, "std": std},
    }
    if args.track and rank == 0:
        import wandb

        with blame("--track"):
            wandb.init(name=path.stem, config={**about["args"], "versions": about["versions"]})
    with blame(f"--out {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed + first)
    network, loss_fn, share = denoiser, edm_loss, slice(rank, None, world_size)
    period = max(1, args.train_steps // 10)  # of the learning rate
    if world_size > 1:  # averages the gradients over the ranks
        network = nn.parallel.DistributedDataParallel(denoiser)
        network.sigma_data, network.filled = denoiser.sigma_data, denoiser.filled
    elif args.device == "cuda":
        loss_fn = torch.compile(edm_loss)
    one_step = partial(update, args, network, loss_fn, optimizer, *data, share)
    lr.fill_(args.lr * warm_restarts(first + 1, period))
    train = record(one_step) if args.device == "cuda" and world_size == 1 else one_step
    losses, steps = [], range(first + 1, args.train_steps + 1)
    progress = tqdm(steps, initial=first, total=args.train_steps, disable=rank > 0)
    for step in progress:
        lr.fill_(args.lr * warm_restarts(step, period))
        losses.append(train().clone())
        if step < 10 or step % 10 == 0:
            update_ema(ema, denoiser, step)
        is_due = step % args.save_every == 0 or step == args.train_steps
        if step % 100 and not is_due:
            continue
        loss = torch.stack(losses).mean() / world_size
        if world_size > 1:
            dist.all_reduce(loss)
        losses, loss = [], loss.item()
        weights = nn.utils.parameters_to_vector(denoiser.parameters())
        finite = math.isfinite(loss) and weights.isfinite().all().item()
        require(finite, f"step {step}: loss {loss}; {path} stays as it is; try a lower --lr")
        progress.set_postfix(loss=f"{loss:.3f}")
        if args.track and rank == 0:
            wandb.log({"loss": loss, "lr": lr.item()}, step=step)
        if is_due and rank == 0:
            networks = {"model": denoiser.state_dict(), "ema": ema.state_dict()}
            state = {**about, **networks, "optimizer": optimizer.state_dict(), "step": step}
            since = save(path, state, since)
        if is_due:
            torch.manual_seed(args.seed + step)  # a run that goes on from here draws the same
    print(f"wrote {path}: {args.train_steps} steps, loss {loss:.3f}")
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
