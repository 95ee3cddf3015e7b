# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.5", "numpy>=2", "gymnasium>=1", "minari[hdf5,hf]>=0.5.4", "tyro>=0.9",
#     "tqdm", "wandb"]
# ///
"""SynthER, a baseline of GTA: generate single transitions with an unconditional diffusion model.

Synthetic Experience Replay (Lu et al. 2023) as GTA's appendix C.1 runs it: learners train on its
samples alone. A transition (s, a, r, s', terminal) is one vector. The denoiser is a residual MLP,
trained with the loss of EDM (Karras et al. 2022) and sampled from pure noise by EDM's stochastic
sampler. Settings are SynthER's (config/resmlp_denoiser.gin), without layer norms in the MLP.

    python baselines/synther.py --env hopper-medium
    python td3bc.py --aug buffer.npz --aug-only

Reads a Minari dataset. Writes synther.pt (--checkpoint) and buffer.npz (--out). After a kill the
same command goes on. A trained synther.pt can be sampled again, to another --out.
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
    # --- training ---
    # of the residual MLP (C.1: 25.6 M parameters). SynthER takes 1024 for some datasets
    width: int = 2048
    # transitions in a batch. Default, as SynthER: 1024, or 256 where the data has under 800 000
    batch_size: int | None = None
    train_steps: int = 100_000  # gradient steps
    lr: float = 3e-4  # learning rate of Adam at the start; it falls to 0 along a cosine
    p_mean: float = -1.2  # mean of ln(sigma) in training (EDM, Table 1)
    p_std: float = 1.2  # standard deviation of ln(sigma) in training (EDM, Table 1)
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    ema_decay: float = 0.995  # decay of the averaged weights, which are the ones that sample
    ema_every: int = 10  # steps between two updates of the average
    # --- sampling ---
    num_transitions: int = 5_000_000  # transitions to generate, as many as GTA does (C.1)
    num_steps: int = 128  # K, diffusion steps from pure noise to none
    terminal_threshold: float = 0.5  # a generated transition is terminal above this
    sample_batch_size: int = 10_000  # transitions denoised at once
    # --- data and run ---
    # short name (hopper-medium), Minari id, folder of a Minari dataset, or several joined by +
    env: str = "data/halfcheetah-medium-sample"
    save_every: int = 10_000  # steps between two checkpoints; the last step always writes one
    checkpoint: str = "synther.pt"  # model to write, to go on with, or to sample from
    out: str = "buffer.npz"  # buffer of generated transitions to write
    seed: int = 0  # seed of initial weights, batches and noise
    # CUDA_VISIBLE_DEVICES picks the card
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    track: bool = False  # log to Weights & Biases; WANDB_PROJECT and WANDB_ENTITY say where


# --- denoiser ---


class ResidualMLP(nn.Module):
    """SynthER's network: transition and noise level are embedded, added, widened, and pass the
    residual blocks h + W relu(h) + b."""

    def __init__(self, num_dims, width, num_blocks=6, emb_dim=128):
        super().__init__()
        self.frequencies = nn.Buffer(torch.randn(8))  # random Fourier features, not learned
        self.emb_noise = nn.Sequential(
            nn.Linear(17, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim)
        )
        self.emb_x = nn.Linear(num_dims, emb_dim)
        self.widen = nn.Linear(emb_dim, width)
        self.blocks = nn.ModuleList([nn.Linear(width, width) for _ in range(num_blocks)])
        self.out = nn.Linear(width, num_dims)

    def forward(self, x, c_noise):
        """x [B, D], c_noise [B] -> [B, D]"""
        angles = 2 * math.pi * c_noise[:, None] * self.frequencies
        features = torch.cat([c_noise[:, None], angles.sin(), angles.cos()], dim=1)
        h = self.widen(self.emb_x(x) + self.emb_noise(features))
        for block in self.blocks:
            h = h + block(h.relu())
        return self.out(h.relu())


class TransitionDenoiser(nn.Module):
    """EDM's preconditioned denoiser D(x; sigma) (Karras et al., eq. 7) of standardised rows."""

    def __init__(self, num_dims, width, sigma_data=1.0):
        super().__init__()
        self.net = ResidualMLP(num_dims, width)
        self.sigma_data = sigma_data

    def forward(self, x, sigma):
        """x [B, D], sigma [B] -> [B, D]"""
        s = sigma[:, None]
        norm = torch.sqrt(s**2 + self.sigma_data**2)
        c_skip = self.sigma_data**2 / norm**2
        c_out = s * self.sigma_data / norm
        c_in = 1 / norm
        c_noise = torch.log(sigma) / 4
        return c_skip * x + c_out * self.net(c_in * x, c_noise)


# --- loss and sampler ---


def transition_loss(denoiser, x, sigma, noise):
    """EDM's weighted denoising loss (Karras et al., Table 1), without a condition. x [B, D] clean
    rows, sigma [B], noise [B, D] unit normal."""
    s = sigma[:, None]
    weight = (s**2 + denoiser.sigma_data**2) / (s * denoiser.sigma_data) ** 2
    return (weight * (denoiser(x + s * noise, sigma) - x) ** 2).mean()


def noise_schedule(num_steps, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """EDM's noise levels (Karras et al., eq. 5; Table 7): K from sigma_max to sigma_min, then 0."""
    ramp = np.linspace(0, 1, num_steps)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [*((high + ramp * (low - high)) ** rho).tolist(), 0.0]


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


# --- training ---


def update(denoiser, optimizer, rows, loss_fn, args):
    """One gradient step on a batch of standardised rows [N, D]. Returns its loss."""
    x = rows[torch.randint(len(rows), (args.batch_size,), device=rows.device)]
    sigma = torch.exp(args.p_mean + args.p_std * torch.randn(len(x), device=rows.device))
    loss = loss_fn(denoiser, x, sigma, torch.randn_like(x))
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(denoiser.parameters(), args.max_grad_norm)
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def average_weights(ema, model, step, every, max_decay):
    """Moves the averaged weights towards the model's at steps 1, 1 + every, 1 + 2 every, ...

    As ema_pytorch 0.1.2, which SynthER uses: they are a copy up to the first of these steps after
    101, so that nothing of the initial weights stays; then the decay rises with the step.
    """
    if (step - 1) % every:
        return
    decay = 0.0
    if step > 101 + every:
        decay = min(max_decay, 1 - (step - 100) ** (-2 / 3))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


class Learner(NamedTuple):
    denoiser: TransitionDenoiser
    ema: TransitionDenoiser  # the average of its weights, which samples
    optimizer: torch.optim.Optimizer


def make_learner(num_dims, args):
    """Returns a new denoiser, the average of its weights, and its optimizer."""
    torch.manual_seed(args.seed)
    denoiser = TransitionDenoiser(num_dims, args.width).to(args.device)
    ema = copy.deepcopy(denoiser).requires_grad_(False)
    options = {"betas": (0.9, 0.99), "weight_decay": 0.0, "fused": True}
    optimizer = torch.optim.AdamW(denoiser.parameters(), args.lr, **options)
    size = sum(p.numel() for p in denoiser.parameters()) / 1e6
    print(f"denoiser: {size:.1f} M parameters")
    return Learner(denoiser, ema, optimizer)


def train_learner(learner, rows, first, args, save):
    """Trains on standardised rows [N, D] from step first to --train-steps. save(step=...) writes
    the learner."""
    torch.manual_seed(args.seed + first)
    loss_fn = torch.compile(transition_loss) if args.device == "cuda" else transition_loss
    N = args.train_steps
    total = 0.0  # of the losses since the last checkpoint
    every = 0.1 if sys.stderr.isatty() else 60  # seconds: a log file takes a line a minute
    bar = {"total": N, "unit": "step", "mininterval": every, "maxinterval": every}
    progress = tqdm(range(first + 1, N + 1), initial=first, **bar)
    for step in progress:
        lr = args.lr * (1 + math.cos(math.pi * (step - 1) / N)) / 2
        learner.optimizer.param_groups[0]["lr"] = lr
        total += update(learner.denoiser, learner.optimizer, rows, loss_fn, args)
        average_weights(learner.ema, learner.denoiser, step, args.ema_every, args.ema_decay)
        if step % args.save_every and step < N:
            continue
        loss = total.item() / (step - first)
        total = 0.0
        first = step
        require(math.isfinite(loss), f"step {step}: the loss is {loss}; try a lower --lr")
        save(step=step)
        progress.write(f"step {step}: loss {loss:.4g}")
        if args.track:
            import wandb

            wandb.log({"loss": loss}, step=step)
        torch.manual_seed(args.seed + step)  # a run that goes on from here draws the same


# --- sampling ---


@torch.no_grad()
def sample(denoiser, mean, std, args, s_churn=80.0):
    """Returns --num-transitions rows drawn from pure noise, in real units. [N, D]"""
    sigmas = noise_schedule(args.num_steps)
    gamma = min(s_churn / args.num_steps, math.sqrt(2) - 1)
    network = torch.compile(denoiser) if args.device == "cuda" else denoiser

    def denoise(x, sigma):
        return network(x, torch.full_like(x[:, 0], sigma))

    noise = sigmas[0] * torch.randn(args.num_transitions, len(mean))
    batches = noise.split(args.sample_batch_size)
    parts = []
    every = 0.1 if sys.stderr.isatty() else 60  # seconds: a log file takes a line a minute
    for x in tqdm(batches, unit="batch", mininterval=every, maxinterval=every):
        x = edm_sampler(denoise, x.to(args.device), sigmas, gamma)
        parts.append(x.cpu())
    return torch.cat(parts) * std + mean


def split_rows(x, box, terminal_threshold, metadata):
    """Returns the buffer, with H = 1, of generated rows x [N, D] in real units. Its actions are
    clipped to the box."""
    obs_dim = (x.shape[1] - len(box.low) - 2) // 2
    s, a, r, s_next, terminal = np.split(x, [obs_dim, -obs_dim - 2, -obs_dim - 1, -1], axis=1)
    return Buffer(
        metadata,
        observations=np.stack([s, s_next], axis=1),
        actions=a.clip(box.low, box.high).astype(np.float32)[:, None],
        rewards=r,
        terminals=terminal > terminal_threshold,
    )


def print_means(episodes, buffer):
    """Prints the mean reward, and the share of terminals, of the data and of what was generated."""
    for key in ("rewards", "terminals"):
        real = np.concatenate([getattr(episode, key) for episode in episodes])
        generated = getattr(buffer, key).mean(dtype=np.float64)
        print(f"mean of {key}: dataset {real.mean():.4g}, generated {generated:.4g}")


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


def make_rows(episodes):
    """Returns all transitions as rows s, a, r, s', terminal. [N, D]"""
    parts = []
    for s, a, r, terminals in episodes:
        parts.append(np.column_stack([s[:-1], a, r, s[1:], terminals]))
    return torch.from_numpy(np.concatenate(parts))


def fit_rows(rows):
    """Returns mean and deviation of rows [N, D] to standardise them with. The terminal stays 0 or
    1, as SynthER's configuration has it. [D], [D]"""
    mean = rows.mean(0)
    std = rows.std(0) + 1e-5
    mean[-1] = 0.0
    std[-1] = 1.0
    return mean.float(), std.float()


# --- files ---

PACKAGES = ("torch", "numpy", "gymnasium", "minari")
# flags that may differ when --out exists: paths (of inputs the checksums count) and the machine
FREE = "env aug checkpoint diffusion data run env_package device track out versions".split()
OF_SAMPLING = ("num_transitions", "num_steps", "terminal_threshold", "sample_batch_size")
NOT_IN_LABEL = ("seed", "batch_size", "save_every", "sample_batch_size", *FREE)


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


def describe_buffer(args, inputs):
    """Returns the metadata of the buffer: all that tells it from others. Its label names the flags
    that change it and are not at their defaults."""
    words = []
    for key, value in asdict(args).items():
        if key not in NOT_IN_LABEL and value != getattr(Args, key):
            words.append(f"{key.replace('_', '-')} {value}")
    return {
        **asdict(args),
        **inputs,
        "format": "gta-buffer",
        "format_version": 1,
        "method": "synther",
        "label": f"synther({', '.join(words)})" if words else "synther",
        "horizon": 1,
        "versions": {package: version(package) for package in PACKAGES},
    }


def read_model(args, inputs):
    """Returns what --checkpoint holds, None if there is no file. Ends the program if it is of a run
    with other flags or data."""
    path = args.checkpoint
    if not Path(path).exists():
        return None
    with or_exit(f"{path} is no synther.pt that can be read; choose another --checkpoint"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        old = {**checkpoint, **checkpoint["args"]}
    new = {"format": "synther", "format_version": 2, **asdict(args), **inputs}
    for key in OF_SAMPLING:
        del new[key]
    require_same(path, old, new, "--checkpoint")
    return checkpoint


def save_model(args, inputs, learner, step, **more):
    """Writes --checkpoint, unless what is there is of another run by now."""
    read_model(args, inputs)
    checkpoint = {
        "format": "synther",
        "format_version": 2,
        "args": asdict(args),
        "versions": {package: version(package) for package in PACKAGES},
        "model": learner.denoiser.state_dict(),
        "ema": learner.ema.state_dict(),
        "optimizer": learner.optimizer.state_dict(),
        "step": step,
        **inputs,
        **more,
    }
    with new_file(args.checkpoint) as file:
        torch.save(checkpoint, file)


def main(args):
    check_flags(args)
    torch.set_float32_matmul_precision("high")  # TF32
    datasets = open_datasets(args.env)
    episodes = load_episodes(datasets)
    rows = make_rows(episodes)
    args.batch_size = args.batch_size or (1024 if len(rows) >= 800_000 else 256)
    inputs = identify_dataset(datasets, episodes)
    metadata = describe_buffer(args, inputs)
    if Path(args.out).exists():
        require_same(args.out, read_metadata(args.out), metadata)
        print(f"{args.out} is finished, made with these flags")
        return
    try_to_write(args.out)
    checkpoint = read_model(args, inputs)
    step = checkpoint["step"] if checkpoint else 0
    if step < args.train_steps:
        try_to_write(args.checkpoint)
    if args.device == "cuda":
        require_compiler()

    mean, std = fit_rows(rows)
    standardised = ((rows.float() - mean) / std).to(args.device)
    learner = make_learner(rows.shape[1], args)
    if checkpoint:
        learner.denoiser.load_state_dict(checkpoint["model"])
        learner.ema.load_state_dict(checkpoint["ema"])
        learner.optimizer.load_state_dict(checkpoint["optimizer"])
        print(f"{args.checkpoint} is at step {step} of {args.train_steps}")
    if args.track:
        with or_exit("--track"):
            import wandb

            wandb.init(name=Path(args.out).stem, config=metadata)
    normalizer = {"mean": mean, "std": std}
    save = partial(save_model, args, inputs, learner, normalizer=normalizer)
    train_learner(learner, standardised, step, args, save)

    torch.manual_seed(args.seed + args.train_steps)
    x = sample(learner.ema, mean, std, args)
    require(x.isfinite().all(), f"what was generated is not finite; {args.out} is not written")
    box = datasets[0].action_space
    buffer = split_rows(x.numpy(), box, args.terminal_threshold, metadata)
    write_buffer(args.out, buffer)
    print_means(episodes, buffer)
    print(f"wrote {args.out}: {args.num_transitions} transitions")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
