# /// script
# requires-python = ">=3.11"
# dependencies = ["torch", "numpy", "gymnasium[mujoco]", "minari[hdf5,hf]", "tyro", "tqdm", "wandb"]
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
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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
    # short name (hopper-medium), Minari id, folder of a Minari dataset, or several joined by +
    env: str = "data/halfcheetah-medium-sample"
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
    save_every: int = 10_000  # steps between two checkpoints; the last step always writes one
    num_transitions: int = 5_000_000  # transitions to generate, as many as GTA does (C.1)
    num_steps: int = 128  # K, diffusion steps from pure noise to none
    terminal_threshold: float = 0.5  # a generated transition is terminal above this
    sample_batch_size: int = 10_000  # transitions denoised at once
    checkpoint: str = "synther.pt"  # model to write, to go on with, or to sample from
    out: str = "buffer.npz"  # buffer of generated transitions to write
    seed: int = 0  # seed of initial weights, batches and noise
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


def make_transitions(episodes):
    """Returns all transitions, rows s, a, r, s', terminal [N, D], and the mean and deviation [D] to
    standardise them with. The terminal stays 0 or 1, as SynthER's configuration has it."""
    transitions = [
        np.column_stack([e.observations[:-1], *e[1:3], e.observations[1:], e.terminations])
        for e in episodes
    ]
    rows = torch.from_numpy(np.concatenate(transitions)).double()
    mean, std = rows.mean(0), rows.std(0) + 1e-5
    mean[-1], std[-1] = 0.0, 1.0
    return rows.float(), mean.float(), std.float()


# --- denoiser ---


class ResidualMLP(nn.Module):
    """SynthER's network: transition and noise level are embedded, added, widened, and pass the
    residual blocks h + W relu(h) + b."""

    def __init__(self, num_dims, width, num_blocks=6, emb_dim=128):
        super().__init__()
        self.register_buffer("frequencies", torch.randn(8))  # random Fourier features, not learned
        layers = nn.Linear(17, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim)
        self.emb_noise = nn.Sequential(*layers)
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


# --- training ---


def transition_loss(denoiser, x, sigma, noise):
    """EDM's weighted denoising loss (Karras et al., Table 1), without a condition. x [B, D] clean
    rows, sigma [B], noise [B, D] unit normal."""
    s = sigma[:, None]
    weight = (s**2 + denoiser.sigma_data**2) / (s * denoiser.sigma_data) ** 2
    return (weight * (denoiser(x + s * noise, sigma) - x) ** 2).mean()


@torch.no_grad()
def average_weights(ema, model, step, decay):
    """Moves the averaged weights towards the model's. Up to step 100 they are a copy; then the
    decay rises as 1 - (step - 100)^(-2/3), so that nothing of the initial weights stays."""
    decay = min(decay, 1 - max(1, step - 100) ** (-2 / 3))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


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


# --- sampler ---


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


def split_transitions(action_space, terminal_threshold, x):
    """Splits generated rows [N, D], in real units, into the arrays of a buffer with H = 1."""
    obs_dim = (x.shape[1] - len(action_space.low) - 2) // 2
    bounds = (bound.astype(x.dtype) for bound in (action_space.low, action_space.high))
    s, a, r, s_next, terminal = np.split(x, [obs_dim, -obs_dim - 2, -obs_dim - 1, -1], axis=1)
    return {
        "observations": np.stack([s, s_next], axis=1),  # [N, 2, obs_dim]
        "actions": a.clip(*bounds)[:, None],  # [N, 1, act_dim]
        "rewards": r,  # [N, 1]
        "terminals": terminal > terminal_threshold,  # [N, 1]
    }


@torch.no_grad()
def sample(denoiser, mean, std, args, s_churn=80.0):
    """Draws --num-transitions rows from pure noise. Returns them in real units [N, D]."""
    sigmas, gamma = noise_schedule(args.num_steps), min(s_churn / args.num_steps, math.sqrt(2) - 1)
    network = torch.compile(denoiser) if args.device == "cuda" else denoiser

    def denoise(x, sigma):
        return network(x, torch.full_like(x[:, 0], sigma))

    noise, parts = sigmas[0] * torch.randn(args.num_transitions, len(mean)), []
    for x in tqdm(noise.split(args.sample_batch_size), unit="batch"):
        parts.append(edm_sampler(denoise, x.to(args.device), sigmas, gamma).cpu())
    return torch.cat(parts) * std + mean


# --- run ---

WHERE = {"device", "track", "out", "checkpoint"}  # flags that do not change what comes out
OF_SAMPLING = {"num_transitions", "num_steps", "terminal_threshold", "sample_batch_size"}


def require_same(flag, old, args, free):
    """Ends the program with one line if the file of a flag was made with other flags, old, than
    args. Those in free may differ."""
    flags = {key: x for key, x in asdict(args).items() if key not in free}
    other = [f"{key} {old.get(key)}" for key, x in flags.items() if x != old.get(key)]
    path = getattr(args, flag)
    require(not other, f"{path} was made with {', '.join(other)}; choose another --{flag}")


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


def train(rows, args, about):
    """Trains on standardised rows [N, D], going on where --checkpoint stopped. Returns the averaged
    denoiser."""
    torch.manual_seed(args.seed)
    denoiser = TransitionDenoiser(rows.shape[1], args.width).to(args.device)
    ema = copy.deepcopy(denoiser).requires_grad_(False)
    options = {"betas": (0.9, 0.99), "weight_decay": 0.0, "fused": True}
    optimizer = torch.optim.AdamW(denoiser.parameters(), args.lr, **options)
    print(f"denoiser: {sum(p.numel() for p in denoiser.parameters()) / 1e6:.1f} M parameters")
    path, first = Path(args.checkpoint), 0
    since = stamp(path)
    if since:
        with blame(f"--checkpoint {path}: no whole model of synther.py for this data"):
            checkpoint = torch.load(path, map_location=args.device, weights_only=True)
            require_same("checkpoint", checkpoint["args"], args, WHERE | OF_SAMPLING)
            denoiser.load_state_dict(checkpoint["model"])
            ema.load_state_dict(checkpoint["ema"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            first = checkpoint["step"]
        print(f"{path} is at step {first} of {args.train_steps}")
    if args.track:
        import wandb

        with blame("--track"):
            wandb.init(name=Path(args.out).stem, config=asdict(args))

    torch.manual_seed(args.seed + first)
    loss_fn = torch.compile(transition_loss) if args.device == "cuda" else transition_loss
    N, losses = args.train_steps, 0.0
    progress = tqdm(range(first + 1, N + 1), initial=first, total=N, unit="step")
    for step in progress:
        optimizer.param_groups[0]["lr"] = args.lr * (1 + math.cos(math.pi * (step - 1) / N)) / 2
        losses = losses + update(denoiser, optimizer, rows, loss_fn, args)
        if step % args.ema_every == 0:
            average_weights(ema, denoiser, step, args.ema_decay)
        if step % args.save_every and step < N:
            continue
        loss, losses, first = losses.item() / (step - first), 0.0, step
        require(math.isfinite(loss), f"step {step}: the loss is {loss}; try a lower --lr")
        networks = {"model": denoiser.state_dict(), "ema": ema.state_dict()}
        state = {"args": asdict(args), **networks, "optimizer": optimizer.state_dict()}
        since = save(path, {**about, **state, "step": step}, since)
        progress.write(f"step {step}: loss {loss:.4g}")
        if args.track:
            wandb.log({"loss": loss}, step=step)
        torch.manual_seed(args.seed + step)  # a run that goes on from here draws the same
    return ema


def save_buffer(path, buffer, metadata, since):
    """Writes buffer.npz, readable without pickle, under another name, then renames it. Ends the
    program if path's stamp is no longer since."""
    require(stamp(path) == since, f"{path} is now of another run; choose another --out")
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        np.savez(file, **buffer, metadata=json.dumps(metadata))
    os.replace(temporary, path)


def main(args):
    require(args.device == "cpu" or torch.cuda.is_available(), "--device cuda: there is no GPU")
    torch.set_float32_matmul_precision("high")  # TF32
    datasets = open_datasets(args.env)
    rows, mean, std = make_transitions(load_episodes(datasets))
    args.batch_size = args.batch_size or (1024 if len(rows) >= 800_000 else 256)
    out, since = Path(args.out), stamp(Path(args.out))
    if since:
        with blame(f"{out} is no buffer of synther.py; choose another --out"):
            with np.load(out, allow_pickle=False) as file:
                require_same("out", json.loads(str(file["metadata"])), args, WHERE)
        print(f"{out} is finished, made with these flags")
        return
    for path in (Path(args.checkpoint), out):
        path.parent.mkdir(parents=True, exist_ok=True)
    about = {"env_id": env_id(datasets[0]), "dataset_ids": [dataset.id for dataset in datasets]}
    about["versions"] = {x.__name__: str(x.__version__) for x in (torch, np, gym, minari)}
    model = {"format": "synther", "format_version": 1, "normalizer": {"mean": mean, "std": std}}
    denoiser = train(((rows - mean) / std).to(args.device), args, {**about, **model})

    torch.manual_seed(args.seed + args.train_steps)
    x = sample(denoiser, mean, std, args)
    require(x.isfinite().all(), f"what was generated is not finite; {out} is not written")
    split = partial(split_transitions, datasets[0].action_space, args.terminal_threshold)
    real, buffer = split(rows.numpy()), split(x.numpy())
    unnamed = WHERE | {"env", "seed", "batch_size", "save_every", "sample_batch_size"}
    flags = {key: x for key, x in asdict(args).items() if key not in unnamed}
    words = [f"{k.replace('_', '-')} {x}" for k, x in flags.items() if x != getattr(Args, k)]
    about["label"] = f"synther({', '.join(words)})" if words else "synther"
    about |= {"format": "gta-buffer", "format_version": 1, "method": "synther", "horizon": 1}
    save_buffer(out, buffer, {**asdict(args), **about}, since)
    for key in ("rewards", "terminals"):
        print(f"mean of {key}: dataset {real[key].mean():.4g}, generated {buffer[key].mean():.4g}")
    print(f"wrote {out}: {args.num_transitions} transitions")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
