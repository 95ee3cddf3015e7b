# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.5", "numpy>=2", "gymnasium[mujoco]>=1", "mujoco<3.12",
#     "minari[hdf5,hf]>=0.5.4", "tyro>=0.9", "tqdm", "wandb"]
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
import torch.nn.functional as F
import tyro
from gymnasium.vector.utils import batch_space, iterate
from torch import nn
from tqdm import tqdm


@dataclass
class Args:
    # --- augmentation ---
    mu: float = 0.25  # noising ratio in (0, 1]: 0 would keep all, 1 starts from noise (eq. 9)
    alpha: float = 1.1  # amplification of the return that is asked for (eq. 8)
    # what the generated trajectories are asked for. amplified: each source's amplified return;
    # fixed: the dataset's largest return, amplified, for all (F.1); none: nothing (Table 19);
    # inpaint: the source's rewards times alpha, in place while the rest is denoised (E.6)
    condition: Literal["amplified", "fixed", "none", "inpaint"] = "amplified"
    guidance: float = 2.0  # w of eq. 4 (Table 7); 0: condition without guidance, at half the cost
    num_steps: int = 128  # K, diffusion steps from sigma_max to 0 (Table 7)
    # add stage A's penalty back to terminal rewards, else learners train on it
    restore_terminal_reward: bool = False
    # --- sources ---
    num_transitions: int = 5_000_000  # transitions to generate, in subtrajectories of H (B.1)
    # N_B > 0 draws sources with rare, high returns more often (eq. 13, Table 9), for dense rewards
    reweight_bins: int = 0
    reweight_u: float = 0.001  # u of eq. 13 (Table 9); larger: bins with few windows count less
    reweight_q: float = 5.0  # q of eq. 13 (Table 9); smaller: bins with low returns count less
    # c: successful episodes (return > 0) are drawn c times as often, for sparse rewards (B.2)
    success_weight: float = 1.0
    source_top: float = 1.0  # share of the episodes, the best by return, to augment (E.2)
    source_min_return: float | None = None  # augment only episodes with at least this return
    # --- data and run ---
    checkpoint: str = "diffusion.pt"  # model of gta_diffusion.py; it names its dataset and sizes
    env: str | None = None  # where the checkpoint's dataset is now, if its folder has moved
    batch_size: int | None = None  # windows denoised at once. Default: 2048 on CUDA, 64 on a CPU
    out: str = "buffer.npz"  # file to write
    # name of the buffer in tables and folders. Default: gta(mu 0.25, alpha 1.1), with what differs
    label: str | None = None
    seed: int = 0  # seed of sources and noise
    # CUDA_VISIBLE_DEVICES picks the card
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    # of the network's arithmetic; all else is fp32. Default: bf16 on CUDA, fp32 on a CPU
    precision: Literal["bf16", "fp32"] | None = None
    track: bool = False  # log to Weights & Biases; WANDB_PROJECT and WANDB_ENTITY say where


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
    them (eq. 10) as --condition says, towards the scaled returns y_hat [B]. Returns them. To
    inpaint, the source's rewards are amplified already."""
    x, sigmas = partial_noise(source, noise_schedule(args.num_steps), args.mu)
    denoise = partial(unconditional_denoiser, denoiser)
    if args.condition in ("amplified", "fixed"):
        denoise = partial(guided_denoiser, denoiser, y=y_hat, w=args.guidance)
    elif args.condition == "inpaint":
        denoise = partial(inpainting_denoiser, denoise, source[:, :-1, -1])
    return edm_sampler(denoise, x, sigmas, min(s_churn / args.num_steps, math.sqrt(2) - 1))


# --- returns and sources ---


def amplified_return(y, alpha):
    """Eq. 8 for y >= 0; a negative return, too, moves upward. y [N] -> [N]"""
    return y + (alpha - 1) * np.abs(y)


def reweighted_probabilities(y, num_bins, u, q, max_ratio=5.0):
    """Eq. 13: probability of every window [W] to be a source, from its scaled return y [W].

    A bin j of the returns is drawn in proportion to v_j = |B_j| / (|B_j| + u) exp(-|y_max - y_j| /
    q), with |B_j| as a share of all windows and y_j its midpoint, and a window of it uniformly. As
    in the release a window's probability is clipped at max_ratio times the uniform one, then all
    are renormalised.
    """
    y = y.astype(np.float64)
    count, edges = np.histogram(y, bins=num_bins)
    share = count / len(y)
    midpoint = (edges[:-1] + edges[1:]) / 2
    bin_of = np.clip(np.searchsorted(edges, y, side="right") - 1, 0, num_bins - 1)
    log_weight = (-np.log(share + u) - np.abs(y.max() - midpoint) / q)[bin_of]  # log(v_j / |B_j|)
    p = np.exp(log_weight - log_weight.max())
    p = np.minimum(p / p.sum(), max_ratio / len(y))
    return p / p.sum()


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


def choose_sources(args, y, episode, episode_returns, num_sources):
    """Returns the indices of N windows to augment. y [W] are scaled returns, episode [W] is each
    window's episode, episode_returns are [E]. Without weights all come equally often."""
    rng = np.random.default_rng(args.seed)
    picked = pick_windows(episode, episode_returns, args.source_top, args.source_min_return)
    num_picked = len(picked)
    require(num_picked, "--source-top, --source-min-return: no episode with H transitions is left")
    if args.reweight_bins:
        p = reweighted_probabilities(
            y[picked], args.reweight_bins, args.reweight_u, args.reweight_q
        )
        return rng.choice(picked, num_sources, p=p)
    if args.success_weight != 1:
        p = success_probabilities(episode[picked], episode_returns, args.success_weight)
        return rng.choice(picked, num_sources, p=p)
    epochs = [rng.permutation(picked) for _ in range(math.ceil(num_sources / num_picked))]
    return np.concatenate(epochs)[:num_sources]


def take(windows, index):
    """Returns the windows at these indices. Their rows stay whole: start points into them."""
    of_window = ("start", "episode", "timestep", "y", "return_to_go")
    return windows._replace(**{key: getattr(windows, key)[index] for key in of_window})


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


def write_buffer(path, buffer):
    """Writes buffer.npz, readable without pickle, unless what is there is another's by now."""
    if Path(path).exists():
        require_same(path, read_metadata(path), buffer.metadata)
    arrays = {key: x for key, x in buffer._asdict().items() if x is not None}
    arrays["metadata"] = json.dumps(buffer.metadata)
    with new_file(path) as name:
        with open(name, "wb") as file:  # np.savez would add .npz to a name
            np.savez(file, **arrays)


def read_metadata(path):
    """Returns the metadata of the buffer at path."""
    with or_exit(f"{path} is no buffer; choose another --out"):
        with np.load(path, allow_pickle=False) as file:
            return json.loads(str(file["metadata"]))


# --- run ---


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


def load_diffusion(path, device):
    """Returns the checkpoint of gta_diffusion.py at path."""
    with or_exit(f"--checkpoint {path}: no diffusion.pt of gta_diffusion.py"):
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        found = (checkpoint["format"], checkpoint["format_version"])
    require(found == ("gta-diffusion", 3), f"--checkpoint: {found}, not version 3 of gta-diffusion")
    num_steps = checkpoint["args"]["train_steps"]
    if checkpoint["step"] < num_steps:
        print(f"{path} is at step {checkpoint['step']} of {num_steps}")
    return checkpoint


def make_denoiser(args, checkpoint):
    """Returns the averaged denoiser of the checkpoint, on CUDA compiled."""
    sizes = {key: checkpoint[key] for key in ("horizon", "obs_dim", "act_dim")}
    dim = checkpoint["args"]["dim"]
    denoiser = Denoiser(**sizes, dim=dim, bf16=args.precision == "bf16").to(args.device)
    denoiser.load_state_dict(checkpoint["ema"])
    if args.device == "cuda":
        require_compiler()
        return torch.compile(denoiser)
    return denoiser


UNNAMED = {"mu", "alpha", "batch_size", "seed", "precision", "label", *FREE}  # flags, in a label


def name_augmentation(args, horizon):
    """Returns what names this buffer: gta(mu 0.25, alpha 1.1), with every other flag that changes
    it and is not at its default."""
    words = [f"mu {args.mu}"]
    if args.condition != "none":
        words.append(f"alpha {args.alpha}")
    for key, value in asdict(args).items():
        if key not in UNNAMED and value != getattr(Args, key):
            name = key.replace("_", "-")
            words.append(name if value is True else f"{name} {value}")
    if horizon != 31:  # stage A's default, the paper's H = 32
        words.append(f"H {horizon}")
    return f"gta({', '.join(words)})"


def describe(args, checkpoint, datasets, episodes):
    """Returns the metadata of the buffer: all that tells it from others. Ends the program if the
    model was trained on other data."""
    inputs = identify_dataset(datasets, episodes)
    for key, value in inputs.items():
        found = checkpoint.get(key, value)  # an older checkpoint lacks the CRC
        require(found == value, f"--checkpoint was trained on {key} {found}, --env has {value}")
    return {
        **asdict(args),
        **inputs,
        "format": "gta-buffer",
        "format_version": 1,
        "method": "gta",
        "label": args.label or name_augmentation(args, checkpoint["horizon"]),
        "horizon": checkpoint["horizon"],
        "diffusion": {**checkpoint["args"], "step": checkpoint["step"]},
        "diffusion_crc": checksum(x.cpu().numpy() for x in checkpoint["ema"].values()),
        "versions": {package: version(package) for package in PACKAGES},
    }


def generate(args, denoiser, sources, y_hat, normalizer, penalty):
    """Returns the windows that are made of the sources, towards the scaled returns y_hat [N].
    [N, H + 1, D], in the environment's units"""
    rows = sources.rows
    if args.condition == "inpaint":  # rewards times alpha (E.6), but not the penalty in them
        rows = rows.copy()
        costs = penalty * sources.terminals
        rows[:, -1] = args.alpha * (rows[:, -1] + costs) - costs
    mean, std = normalizer["mean"], normalizer["std"]
    rows = (torch.from_numpy(rows).to(args.device) - mean) / std
    start = torch.from_numpy(sources.start).to(args.device)
    y_hat = torch.from_numpy(y_hat).to(args.device)
    window = torch.arange(denoiser.filled.shape[0], device=args.device)  # [H + 1]

    N = len(start)
    num_batches = math.ceil(N / args.batch_size)
    size = math.ceil(N / num_batches)  # the same for all, as a compiled denoiser needs
    x = torch.empty(num_batches * size, *denoiser.filled.shape, pin_memory=args.device == "cuda")
    every = 0.1 if sys.stderr.isatty() else 60  # seconds: a log file takes a line a minute
    bar = {"unit": "window", "unit_scale": size, "mininterval": every, "maxinterval": every}
    for first in tqdm(range(0, len(x), size), **bar):
        batch = torch.arange(first, first + size, device=args.device) % N  # the last is filled up
        generated = augment(args, denoiser, rows[start[batch, None] + window], y_hat[batch])
        x[first : first + size].copy_(generated * std + mean, non_blocking=True)
    if args.device == "cuda":
        torch.cuda.synchronize()  # the last copies have arrived
    return x[:N].numpy()


def make_buffer(args, x, sources, condition, box, metadata):
    """Returns the buffer of generated windows x [N, H + 1, D], their actions clipped to the box."""
    obs_dim = x.shape[2] - len(box.low) - 1
    terminals = sources.terminals[sources.start[:, None] + np.arange(x.shape[1] - 1)]  # [N, H]
    rewards = x[:, :-1, -1]
    if args.restore_terminal_reward:
        rewards = rewards + np.float32(metadata["diffusion"]["terminal_penalty"]) * terminals
    return Buffer(
        metadata,
        observations=x[:, :, :obs_dim],
        actions=x[:, :-1, obs_dim:-1].clip(box.low, box.high).astype(np.float32),
        rewards=rewards,
        terminals=terminals,
        episode=sources.episode.astype(np.int32),
        timestep=sources.timestep.astype(np.int32),
        return_to_go=sources.return_to_go,
        condition=condition if args.condition in ("amplified", "fixed") else None,
    )


def report(buffer, sources, penalty):
    """Prints and returns the mean rewards of the sources and of what was made of them, and prints
    how both follow the condition. Terminals are left out, and windows whose rewards hold their
    penalty."""
    steps = sources.start[:, None] + np.arange(buffer.rewards.shape[1])
    source_rewards = sources.rows[steps, -1]  # [N, H]
    is_alive = ~buffer.terminals
    numbers = {
        "source_reward": source_rewards[is_alive].mean(dtype=np.float64),
        "generated_reward": buffer.rewards[is_alive].mean(dtype=np.float64),
    }
    print("mean reward (no terminals): sources {:.3f}, generated {:.3f}".format(*numbers.values()))
    if buffer.condition is None:
        return numbers
    counted = is_alive.all(1) | (penalty == 0)  # as in metrics.py
    columns = np.stack([buffer.condition, source_rewards.sum(1), buffer.rewards.sum(1)])
    columns = columns[:, counted]
    if columns.size and np.ptp(columns, axis=1).min() > 0:
        _, of_sources, generated = np.corrcoef(columns)[0]
        text = f"sources {of_sources:.3f}, generated {generated:.3f}"
        print(f"correlation of the condition and the window's rewards: {text}")
    return numbers


def main(args):
    check_flags(args)
    require(0 < args.mu <= 1, f"--mu {args.mu}: must lie in (0, 1]")
    weights = (args.reweight_u, args.reweight_q, args.success_weight)
    require(min(weights) > 0, "--reweight-u, --reweight-q, --success-weight: must be > 0")
    at_most_one = not args.reweight_bins or args.success_weight == 1
    require(at_most_one, "--reweight-bins is for dense rewards, --success-weight for sparse ones")
    args.precision = args.precision or ("bf16" if args.device == "cuda" else "fp32")
    args.batch_size = args.batch_size or (2048 if args.device == "cuda" else 64)
    torch.set_float32_matmul_precision("high")  # TF32
    torch.manual_seed(args.seed)

    checkpoint = load_diffusion(args.checkpoint, args.device)
    args.env = args.env or checkpoint["env"]
    datasets = open_datasets(args.env)
    episodes = load_episodes(datasets)
    metadata = describe(args, checkpoint, datasets, episodes)
    if Path(args.out).exists():
        require_same(args.out, read_metadata(args.out), metadata)
        print(f"{args.out} is finished, made with these flags")
        return
    try_to_write(args.out)
    if args.track:
        with or_exit("--track"):
            import wandb

            wandb.init(name=Path(args.out).stem, config=metadata)

    # windows of the dataset (eq. 6), of which sources are drawn (B.2, eq. 13)
    horizon = checkpoint["horizon"]
    trained = checkpoint["args"]
    penalty = trained["terminal_penalty"]
    windows = make_windows(episodes, horizon, trained["gamma"], penalty)
    y = trained["return_scale"] * windows.y
    episode_returns = np.array([episode.rewards.sum() for episode in episodes])
    num_sources = math.ceil(args.num_transitions / horizon)
    index = choose_sources(args, y, windows.episode, episode_returns, num_sources)
    sources = take(windows, index)

    # the return to ask for (eq. 8)
    y_source = np.full_like(y[index], y.max()) if args.condition == "fixed" else y[index]
    y_hat = amplified_return(y_source, args.alpha)

    # noise and denoise (eq. 9, 10, 4)
    denoiser = make_denoiser(args, checkpoint)
    x = generate(args, denoiser, sources, y_hat, checkpoint["normalizer"], penalty)

    # the buffer
    condition = y_hat / trained["return_scale"]
    buffer = make_buffer(args, x, sources, condition, datasets[0].action_space, metadata)
    finite = all(np.isfinite(array).all() for array in buffer[1:] if array is not None)
    require(finite, "NaN was generated, nothing is written; try a lower --alpha, --guidance")
    write_buffer(args.out, buffer)
    print(f"wrote {args.out}: {num_sources} subtrajectories, {buffer.rewards.size} transitions")
    numbers = report(buffer, sources, penalty)
    if args.track:
        wandb.log(numbers)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
