# /// script
# requires-python = ">=3.11"
# dependencies = ["torch", "numpy", "gymnasium[mujoco]", "minari[hdf5,hf]", "tyro", "tqdm", "wandb"]
# ///
"""GTA, stage B: augment an offline dataset with a trained trajectory diffusion model.

GTA: Generative Trajectory Augmentation with Guidance for Offline RL (NeurIPS 2024), section 4.2
and appendices A.3, B. Subtrajectories of the dataset are noised up to a level that mu sets (eq. 9)
and denoised (eq. 10) by the stochastic sampler of EDM under classifier-free guidance (eq. 4)
towards an amplified return (eq. 8).

    python gta_augment.py --mu 0.25 --alpha 1.1

Reads diffusion.pt of gta_diffusion.py (--checkpoint) and the dataset that it was trained on.
Writes buffer.npz, which the learners read with --aug.
"""

import json
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
import torch.nn.functional as F
import tyro
from gymnasium.vector.utils import batch_space, iterate
from torch import nn
from tqdm import tqdm


@dataclass
class Args:
    checkpoint: str = "diffusion.pt"  # model of gta_diffusion.py; it names its dataset and sizes
    env: str | None = None  # where the checkpoint's dataset is now, if its folder has moved
    num_transitions: int = 5_000_000  # transitions to generate, in subtrajectories of H (B.1)
    mu: float = 0.25  # noising ratio in (0, 1]: 0 would keep all, 1 starts from noise (eq. 9)
    alpha: float = 1.1  # amplification of the return that is asked for (eq. 8)
    # what the generated trajectories are asked for: each source's amplified return; the dataset's
    # largest return, amplified, for all (F.1); nothing (Table 19); or no return, but each source's
    # rewards, amplified, which are kept in place while the rest is denoised (E.6)
    condition: Literal["amplified", "fixed", "none", "inpaint"] = "amplified"
    guidance: float = 2.0  # w of eq. 4 (Table 7); 0: condition without guidance, at half the cost
    # N_B > 0 draws sources with rare, high returns more often (eq. 13, Table 9), for dense rewards
    reweight_bins: int = 0
    reweight_u: float = 0.001  # u of eq. 13 (Table 9); larger: bins with few windows count less
    reweight_q: float = 5.0  # q of eq. 13 (Table 9); smaller: bins with low returns count less
    source_top: float = 1.0  # share of the episodes, the best by return, to augment (E.2)
    source_min_return: float | None = None  # augment only episodes with at least this return
    # c: successful episodes (return > 0) are drawn c times as often, for sparse rewards (B.2)
    success_weight: float = 1.0
    restore_terminal_reward: bool = False  # add stage A's penalty back to terminal rewards
    num_steps: int = 128  # K, diffusion steps from sigma_max to 0 (Table 7)
    batch_size: int | None = None  # windows denoised at once. Default: 2048 on CUDA, 64 on a CPU
    out: str = "buffer.npz"  # file to write
    seed: int = 0  # seed of sources and noise
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


# --- sources ---


def amplified_return(y, alpha):
    """Eq. 8 for y >= 0; a negative return, too, moves upward. y [N] -> [N]"""
    return y + (alpha - 1) * np.abs(y)


def reweighted_probabilities(y, num_bins, u, q, max_ratio=5.0):
    """Eq. 13: probability of every window [W] to be a source, from its scaled return y [W].

    A bin j of the returns is drawn in proportion to v_j = |B_j| / (|B_j| + u) exp(-|y_max - y_j| /
    q), with |B_j| as a share of all windows and y_j its midpoint, and a window of it uniformly. No
    window is drawn more than max_ratio times as often as under uniform sampling: what that takes
    from a bin goes to the others in proportion to v, and so on.
    """
    y = y.astype(np.float64)
    count, edges = np.histogram(y, bins=num_bins)
    share, midpoint = count / len(y), (edges[:-1] + edges[1:]) / 2
    log_w = -np.log(share + u) - np.abs(y.max() - midpoint) / q  # of a window, v_j / |B_j|
    rest, capped = count > 0, np.zeros(num_bins, bool)
    while True:
        w = np.exp(np.where(rest, log_w - log_w[rest].max(), -np.inf))
        ratio = (1 - max_ratio * share[capped].sum()) * w / (w @ share)  # 1 is uniform
        above = ratio > max_ratio
        if not above.any():
            break
        rest, capped = rest & ~above, capped | above
    ratio[capped] = max_ratio
    bin_of = np.clip(np.searchsorted(edges, y, side="right") - 1, 0, num_bins - 1)
    return ratio[bin_of] / ratio[bin_of].sum()


def success_probabilities(episode, episode_returns, c):
    """B.2: probability of every window [W]. A successful episode weighs c, others 1, shared evenly
    by its windows. episode [W] is each window's episode; episode_returns [E]."""
    weight = np.where(episode_returns > 0, c, 1.0)
    num_windows = np.bincount(episode, minlength=len(weight))
    p = weight[episode] / num_windows[episode]
    return p / p.sum()


def pick_windows(episode, episode_returns, top, min_return):
    """E.2: the windows of the best episodes, a share top of all, with min_return or more if given.
    episode [W] is each window's episode; episode_returns [E]."""
    rank = np.argsort(np.argsort(-episode_returns, kind="stable"))  # 0 is the best
    picked = rank < top * len(episode_returns)
    if min_return is not None:
        picked &= episode_returns >= min_return
    return np.flatnonzero(picked[episode])


def choose_sources(args, y, episode, returns, num_sources):
    """Draws N windows: indices into y [W], their scaled returns, and episode [W], the episodes that
    they are of, whose returns are [E]. Without weights all come equally often."""
    picked = pick_windows(episode, returns, args.source_top, args.source_min_return)
    num, rng = len(picked), np.random.default_rng(args.seed)
    require(num, "--source-top, --source-min-return: no episode with H transitions is left")
    if args.reweight_bins:
        flags = args.reweight_bins, args.reweight_u, args.reweight_q
        return rng.choice(picked, num_sources, p=reweighted_probabilities(y[picked], *flags))
    if args.success_weight != 1:
        p = success_probabilities(episode[picked], returns, args.success_weight)
        return rng.choice(picked, num_sources, p=p)
    epochs = [rng.permutation(picked) for _ in range(math.ceil(num_sources / num))]
    return np.concatenate(epochs)[:num_sources]


# --- sampler ---


def noise_schedule(num_steps, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """EDM's noise levels (Karras et al., eq. 5; Table 7): K from sigma_max to sigma_min, then 0."""
    ramp = np.linspace(0, 1, num_steps)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [*((high + ramp * (low - high)) ** rho).tolist(), 0.0]


def partial_noise(x, sigmas, mu):
    """Eq. 9: noises x [B, H + 1, D] up to step k = int(K (1 - mu)) of the schedule sigmas [K + 1].

    Returns the noised x and the noise levels that are left. At mu = 1 nothing of x remains.
    """
    k = int((len(sigmas) - 1) * (1 - mu))
    source = torch.zeros_like(x) if mu == 1 else x
    return source + sigmas[k] * torch.randn_like(x), sigmas[k:]


def guided_denoiser(denoiser, x, sigma, y, w):
    """Eq. 4, (w + 1) D(x; sigma, y) - w D(x; sigma): D is linear in the score that eq. 4 mixes.

    x [B, H + 1, D], sigma a float, y [B]. Both evaluations are one batch of twice the size.
    """
    sigma = torch.full_like(y, sigma)
    keep = torch.ones_like(y)
    if w == 0:
        return denoiser(x, sigma, y, keep)
    keep = torch.cat([keep, torch.zeros_like(y)])
    both = denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), torch.cat([y, y]), keep)
    conditional, unconditional = both.chunk(2)
    return (w + 1) * conditional - w * unconditional


def unconditional_denoiser(denoiser, x, sigma):
    """D(x; sigma): the condition is dropped. x [B, H + 1, D], sigma a float"""
    dropped = x.new_zeros(len(x))
    return denoiser(x, torch.full_like(dropped, sigma), dropped, dropped)


def inpainting_denoiser(denoise, rewards, x, sigma):
    """E.6: denoise(x, sigma) with rewards [B, H] in place of its own, as they are known.

    Where D is a constant r, every step of the sampler turns r + sigma n into r + sigma' n: the
    rewards that it starts from stay in place at the right noise level, and end as r.
    """
    x = denoise(x, sigma)
    x[:, :-1, -1] = rewards
    return x


def edm_sampler(denoise, x, sigmas, gamma, s_min=0.05, s_max=50.0, s_noise=1.003):
    """Stochastic Heun sampler (Karras et al., Algorithm 2; Table 7) from level sigmas[0] to 0.

    denoise(x, sigma) is D. gamma is S_churn / K, at most sqrt(2) - 1, between s_min and s_max.
    """
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        churn = gamma if s_min <= sigma <= s_max else 0.0
        sigma_hat = sigma * (1 + churn)
        x_hat = x + math.sqrt(sigma_hat**2 - sigma**2) * s_noise * torch.randn_like(x)
        slope = (x_hat - denoise(x_hat, sigma_hat)) / sigma_hat
        x = x_hat + (sigma_next - sigma_hat) * slope
        if sigma_next > 0:  # Heun's correction
            slope_next = (x - denoise(x, sigma_next)) / sigma_next
            x = x_hat + (sigma_next - sigma_hat) * (slope + slope_next) / 2
    return x


@torch.no_grad()
def augment(args, denoiser, source, y_hat, s_churn=80.0):
    """Noises windows source [B, H + 1, D], standardised, as far as mu says (eq. 9), and denoises
    them (eq. 10) as --condition says, towards the scaled returns y_hat [B]. Returns them."""
    x, sigmas = partial_noise(source, noise_schedule(args.num_steps), args.mu)
    denoise = partial(unconditional_denoiser, denoiser)
    if args.condition in ("amplified", "fixed"):
        denoise = partial(guided_denoiser, denoiser, y=y_hat, w=args.guidance)
    elif args.condition == "inpaint":
        denoise = partial(inpainting_denoiser, denoise, source[:, :-1, -1])
    return edm_sampler(denoise, x, sigmas, min(s_churn / args.num_steps, math.sqrt(2) - 1))


# --- run ---


def name_augmentation(args, horizon):
    """Returns the words that name what this run generates, gta(mu 0.25, alpha 1.1), with every
    other flag that changes it and is not at its default."""
    free = "checkpoint env mu alpha batch_size out seed device precision track".split()
    words = [f"mu {args.mu}"] + [f"alpha {args.alpha}"] * (args.condition != "none")
    for key, x in asdict(args).items():
        if key not in free and x != getattr(Args, key):
            words.append(key.replace("_", "-") + f" {x}" * (x is not True))
    return f"gta({', '.join(words + [f'H {horizon}'] * (horizon != 31))})"


def is_made(path, metadata):
    """Whether the buffer at path was made with the same flags, those of stage A included."""
    if not path.exists():
        return False
    with blame(f"{path} is no buffer of gta_augment.py; choose another --out"):
        with np.load(path, allow_pickle=False) as file:
            old = json.loads(str(file["metadata"]))
        stages = ("", metadata, old), ("stage A's ", metadata["diffusion"], old["diffusion"])
    free, other = "checkpoint env device diffusion label out track versions".split(), []
    for stage, ours, theirs in stages:
        keys = [key for key in ours if key not in free and ours[key] != theirs.get(key)]
        other += [f"{stage}{key} {theirs.get(key)}" for key in keys]
    require(not other, f"{path} was made with {', '.join(other)}; choose another --out")
    return True


def stamp(path):
    """Returns what tells a file from another run's at the same path, None if there is none."""
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None


def save_buffer(path, buffer, metadata, since):
    """Writes buffer.npz, readable without pickle, under another name, then renames it. Ends the
    program if path's stamp is no longer since."""
    require(stamp(path) == since, f"{path} is now of another run; choose another --out")
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        np.savez(file, **buffer, metadata=json.dumps(metadata))
    os.replace(temporary, path)


def main(args):
    require(0 < args.mu <= 1, f"--mu {args.mu}: must lie in (0, 1]")
    one_of = not args.reweight_bins or args.success_weight == 1
    require(one_of, "--reweight-bins is for dense rewards, --success-weight for sparse ones")
    require(args.device == "cpu" or torch.cuda.is_available(), "--device cuda: there is no GPU")
    args.precision = args.precision or ("bf16" if args.device == "cuda" else "fp32")
    args.batch_size = args.batch_size or (2048 if args.device == "cuda" else 64)
    sizes = args.batch_size, args.num_transitions, args.num_steps
    require(min(sizes) > 0, "--batch-size, --num-transitions, --num-steps must be positive")
    torch.set_float32_matmul_precision("high")  # TF32
    torch.manual_seed(args.seed)

    with blame(f"--checkpoint {args.checkpoint}: no diffusion.pt of gta_diffusion.py"):
        checkpoint = torch.load(args.checkpoint, map_location=args.device, weights_only=True)
        kind, trained = (checkpoint["format"], checkpoint["format_version"]), checkpoint["args"]
    require(kind == ("gta-diffusion", 3), f"--checkpoint: {kind}, not version 3 of gta-diffusion")
    if checkpoint["step"] < trained["train_steps"]:
        print(f"{args.checkpoint} is at step {checkpoint['step']} of {trained['train_steps']}")
    horizon, obs_dim = checkpoint["horizon"], checkpoint["obs_dim"]
    args.env = args.env or checkpoint["env"]
    datasets, made_from = open_datasets(args.env), checkpoint["dataset_ids"]
    ids = [dataset.id for dataset in datasets]
    require(ids == made_from, f"--checkpoint was trained on {made_from}, --env names {ids}")
    metadata = {
        "format": "gta-buffer",
        "format_version": 1,
        "method": "gta",
        "label": name_augmentation(args, horizon),
        **asdict(args),
        "versions": {x.__name__: str(x.__version__) for x in (torch, np, gym, minari)},
        "dataset_ids": ids,
        "env_id": env_id(datasets[0]),
        "horizon": horizon,
        "diffusion": {**trained, "step": checkpoint["step"]},
    }
    path = Path(args.out)
    since = stamp(path)
    if is_made(path, metadata):
        return print(f"{path} is finished, made with these flags")
    if args.track:
        import wandb

        with blame("--track"):
            wandb.init(name=path.stem, config=metadata)
    with blame(f"--out {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)

    episodes = load_episodes(datasets)
    penalty, return_scale = trained["terminal_penalty"], trained["return_scale"]
    windows = make_windows(episodes, horizon, trained["gamma"], penalty)
    num_sources = math.ceil(args.num_transitions / horizon)
    y, returns = return_scale * windows["y"], np.array([e.rewards.sum() for e in episodes])
    sources = choose_sources(args, y, windows["episode"], returns, num_sources)
    y_source = np.full_like(y[sources], y.max()) if args.condition == "fixed" else y[sources]
    condition = amplified_return(y_source, args.alpha)

    sizes = {key: checkpoint[key] for key in ("horizon", "obs_dim", "act_dim")}
    denoiser = Denoiser(**sizes, dim=trained["dim"], bf16=args.precision == "bf16")
    denoiser.to(args.device).eval().load_state_dict(checkpoint["ema"])
    denoiser = torch.compile(denoiser) if args.device == "cuda" else denoiser
    rows = windows["rows"].copy()
    if args.condition == "inpaint":  # E.6; what a terminal costs is no reward, and stays
        costs = penalty * windows["terminals"]
        rows[:, -1] = amplified_return(rows[:, -1] + costs, args.alpha) - costs
    mean, std = checkpoint["normalizer"]["mean"], checkpoint["normalizer"]["std"]
    rows = (torch.from_numpy(rows).to(args.device) - mean) / std
    start = torch.from_numpy(windows["start"][sources]).to(args.device)
    y_hat = torch.from_numpy(condition).to(args.device)

    num_batches = math.ceil(num_sources / args.batch_size)
    size = math.ceil(num_sources / num_batches)  # of all batches: the last one is filled up
    x = torch.empty(num_batches * size, horizon + 1, len(mean), pin_memory=args.device == "cuda")
    for first in tqdm(range(0, len(x), size), unit="window", unit_scale=size):
        batch = torch.arange(first, first + size, device=args.device) % num_sources
        source = rows[start[batch, None] + torch.arange(horizon + 1, device=args.device)]
        generated = augment(args, denoiser, source, y_hat[batch]) * std + mean
        x[first : first + size].copy_(generated, non_blocking=True)  # while the next one is made
    if args.device == "cuda":
        torch.cuda.synchronize()

    steps = windows["start"][sources][:, None] + np.arange(horizon)  # [N, H], rows
    x, box = x[:num_sources].numpy(), datasets[0].action_space
    buffer = {
        "observations": x[:, :, :obs_dim],
        "actions": np.float32(x[:, :-1, obs_dim:-1].clip(box.low, box.high)),
        "rewards": x[:, :-1, -1],
        "terminals": windows["terminals"][steps],
        "episode": windows["episode"][sources].astype(np.int32),
        "timestep": windows["timestep"][sources].astype(np.int32),
        "return_to_go": windows["return_to_go"][sources],
    }
    if args.condition in ("amplified", "fixed"):
        buffer["condition"] = condition / return_scale
    if args.restore_terminal_reward:
        buffer["rewards"] += np.float32(penalty) * buffer["terminals"]
    finite = all(np.isfinite(array).all() for array in buffer.values())
    require(finite, f"NaN was generated, {path} is not written; try a lower --alpha, --guidance")
    save_buffer(path, buffer, metadata, since)
    print(f"wrote {path}: {num_sources} subtrajectories, {num_sources * horizon} transitions")
    is_alive, r = ~buffer["terminals"], (windows["rows"][steps, -1], buffer["rewards"])
    means = [own[is_alive].mean(dtype=np.float64) for own in r]
    print("mean reward (no terminals): sources {:.3f}, generated {:.3f}".format(*means))
    if "condition" in buffer and np.ptp(condition) > 0:
        both = [np.corrcoef(condition, own.sum(1))[0, 1] for own in r]
        print("correlation of condition and return: sources {:.3f}, generated {:.3f}".format(*both))
    if args.track:
        wandb.log({"source_reward": means[0], "generated_reward": means[1]})


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
