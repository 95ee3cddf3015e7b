# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch",
#     "numpy",
#     "gymnasium[mujoco]",
#     "minari[hdf5,hf]",
#     "huggingface_hub",
#     "tyro",
#     "tqdm",
#     "wandb",
# ]
# ///
"""SynthER, a baseline of GTA: generate single transitions with an unconditional diffusion model.

Synthetic Experience Replay (Lu et al. 2023) as GTA's appendix C.1 runs it. A transition
(s, a, r, s', terminal) is one vector. The denoiser is a residual MLP, trained with the loss of EDM
(Karras et al. 2022) and sampled from pure noise by EDM's stochastic sampler. Learners train on its
samples alone (--aug-only). Settings are those of SynthER's public configuration
(config/resmlp_denoiser.gin), which has no layer norms in the MLP.

    python baselines/synther.py --env hopper-medium
    python td3bc.py --aug buffer.npz --aug-only

Reads:  an offline dataset (--env)
Writes: synther.pt (--checkpoint), the model; buffer.npz (--out), which the learners read with --aug
"""

import copy
import glob
import hashlib
import importlib.metadata
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import minari
import numpy as np
import torch
import tyro
from huggingface_hub import HfApi
from minari.storage.datasets_root_dir import get_dataset_path
from torch import nn
from tqdm import tqdm


@dataclass
class Args:
    env: str = "data/hopper-medium-sample"
    """dataset: a short name (hopper-medium), a Minari id (mujoco/hopper/medium-v0), a folder that
    holds a Minari dataset, or several of them joined by +"""
    out: Path = Path("buffer.npz")
    """buffer of generated transitions to write"""
    overwrite: bool = False
    """replace --out, whatever it holds"""
    checkpoint: Path = Path("synther.pt")
    """model to write; one that is trained already, with the same flags, is sampled from"""
    resume: bool = False
    """continue the training in --checkpoint, if there is one; give it the same flags"""
    retrain: bool = False
    """start the training anew and replace --checkpoint, whatever it holds"""
    num_transitions: int = 5_000_000
    """transitions to generate, as many as GTA does (C.1)"""
    width: int = 2048
    """of the residual MLP: 25.6 M parameters on halfcheetah (C.1). SynthER takes 1024 for some
    datasets"""
    batch_size: int | None = None
    """transitions in a batch of the training. Default: SynthER's 1024, or 256 where the dataset has
    fewer than 800 000 transitions"""
    train_steps: int = 100_000
    """gradient steps"""
    lr: float = 3e-4
    """learning rate of Adam at the start; it falls to 0 along a cosine"""
    p_mean: float = -1.2
    """mean of ln(sigma) in training (EDM, Table 1)"""
    p_std: float = 1.2
    """standard deviation of ln(sigma) in training (EDM, Table 1)"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm"""
    ema_decay: float = 0.995
    """decay of the averaged weights, which are the ones that sample"""
    ema_every: int = 10
    """steps between two updates of the average"""
    save_every: int = 10_000
    """steps between two checkpoints; the last step always writes one"""
    num_steps: int = 128
    """K, diffusion steps from sigma_max to 0"""
    sigma_min: float = 0.002
    """lowest noise level before 0"""
    sigma_max: float = 80.0
    """highest noise level"""
    rho: float = 7.0
    """bend of the noise schedule; larger: more steps at low noise (EDM, Table 1)"""
    s_churn: float = 80.0
    """noise that the sampler adds back on its way; 0 makes it deterministic"""
    s_min: float = 0.05
    """lowest noise level with churn"""
    s_max: float = 50.0
    """highest noise level with churn"""
    s_noise: float = 1.003
    """standard deviation of the churn's noise"""
    terminal_threshold: float = 0.5
    """a generated transition is terminal above this"""
    sample_batch_size: int = 10_000
    """transitions denoised at once"""
    seed: int = 0
    """seed of initial weights, batches and noise"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cuda, cuda:1, cpu"""
    compile: bool | None = None
    """compile the denoiser with torch.compile. Default: on CUDA; on a CPU it takes minutes and
    gains nothing"""
    track: bool = False
    """log to Weights & Biases"""
    wandb_project: str = "gta"
    """project of --track"""
    wandb_entity: str | None = None
    """user or team of --track"""


def require(condition, message):
    """Ends the program with one line and exit code 1 unless the condition holds."""
    if not condition:
        sys.exit(" ".join(f"error: {message}".split()))  # it may quote a file's line breaks


def require_positive(args, *names):
    """Ends the program with one line unless all named arguments are positive, or None."""
    for name in names:
        value = getattr(args, name)
        flag = f"--{name.replace('_', '-')}"
        fits = value is None or 0 < value < 1e12
        require(fits, f"{flag} {value}: must be positive and less than 1e12")


def require_between(args, low, high, *names):
    """Ends the program with one line unless all named arguments are within the bounds, or None."""
    for name in names:
        value = getattr(args, name)
        flag = f"--{name.replace('_', '-')}"
        fits = value is None or low <= value <= high
        require(fits, f"{flag} {value}: must be between {low} and {high}")


def pick_device(name):
    """Returns the torch device called name, made the current one; says so when it is the CPU."""
    try:
        device = torch.device(name)
    except RuntimeError:
        sys.exit(f"error: --device {name}: no device of PyTorch; use cuda, cuda:1 or cpu")
    known = device.type in ("cuda", "cpu")
    require(known, f"--device {name}: not supported; use cuda, cuda:1 or cpu")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        require(count > 0, f"--device {name}: PyTorch finds no CUDA device; use --device cpu")
        require((device.index or 0) < count, f"--device {name}: there are {count} CUDA devices")
        torch.cuda.set_device(device.index or 0)
        torch.backends.cudnn.deterministic = True  # same seed, same result
        torch.set_float32_matmul_precision("high")  # TF32
        # PyTorch warns that Adam steps outside of a CUDA graph: the first steps do
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
    else:
        print(f"device: {device} (paper-size runs want a GPU)")
    return device


def plain_args(args):
    """Returns the arguments as a dictionary of plain Python values."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(args).items()}


def first_line(error):
    """Returns what an exception says, cut to one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def require_types(where, values, types):
    """Ends the program with one line unless values, a dictionary from a file, holds what types
    names, of these types. Strings must be printable."""
    for key, type_ in types.items():
        value = values.get(key)
        fits = key in values and isinstance(value, type_)
        fits &= not isinstance(value, str) or value.isprintable()
        require(fits, f"{where}: lacks {key}, or it is of another type")


def has_form(x, form):
    """Whether x has the keys, shapes and types of form, nested dictionaries of tensors, and finite
    numbers only."""
    if isinstance(form, dict):
        same_keys = isinstance(x, dict) and x.keys() == form.keys()
        return same_keys and all(has_form(x[key], form[key]) for key in form)
    same = torch.is_tensor(x) and (x.shape, x.dtype) == (form.shape, form.dtype)
    dense = same and x.layout == torch.strided and not x.is_meta
    return dense and bool(x.isfinite().all())


def put_moments(optimizer, state):
    """Puts back the state of an Adam, {number of the parameter: its moments}, from a file. Raises
    ValueError if it belongs to other parameters."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {}
    for i, own in state.items():
        moments[i] = {key: torch.zeros_like(params[i]) for key in ("exp_avg", "exp_avg_sq")}
        moments[i]["step"] = torch.zeros((), dtype=torch.float32)
        if not has_form(own, moments[i]):
            raise ValueError("the optimizer's state is of another network")
        for key, x in moments[i].items():
            x.copy_(own[key])
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def load_weights(network, weights):
    """Copies the weights from a file into a network. Raises ValueError if they do not fit."""
    if not has_form(weights, network.state_dict()):
        raise ValueError("the weights are of another network, or not finite")
    network.load_state_dict(weights)


def write_atomically(path, write):
    """Calls write(file) on a temporary file, then renames it: path is whole or untouched.

    Ends the program with one line if the disk does not take it.
    """
    for other in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        with suppress(FileNotFoundError):
            if time.time() - other.stat().st_mtime > 3600:  # of a run that was killed
                other.unlink()
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it gets its name
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save makes the one of the other
        cause = error if isinstance(error, OSError) else error.__context__
        sys.exit(f"error: {path}: cannot be written ({cause or 'is the disk full?'})")
    finally:
        temporary.unlink(missing_ok=True)


def require_writable(flag, path):
    """Ends the program with one line unless a file can be written under the name path."""
    require(path.parent.is_dir(), f"{flag} {path}: no folder {path.parent}")
    require(not path.is_dir(), f"{flag} {path}: is a folder")
    probe = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        sys.exit(f"error: {flag} {path}: cannot be written there ({error.strerror})")


@contextmanager
def end_in_one_line(flags):
    """Ends the program with one line on Ctrl-C, or if memory runs out: which flags lower it."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (RuntimeError, MemoryError) as error:
        is_it = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if is_it or "can't allocate memory" in str(error):
            sys.exit(f"error: out of memory; lower {flags}")
        raise


@contextmanager
def catch_signals():
    """Gives an event that the first Ctrl-C or SIGTERM sets, so that a loop can save and leave.

    The second one ends the program at once.
    """
    caught = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)

    def catch(number, frame):
        caught.set()
        for own in signals:
            signal.signal(own, signal.SIG_DFL)

    old = [signal.signal(own, catch) for own in signals]
    try:
        yield caught
    finally:
        for own, handler in zip(signals, old):
            signal.signal(own, handler)


def provenance():
    """Returns the versions of the packages, and the git commit if there is one."""
    packages = ("torch", "numpy", "gymnasium", "mujoco", "minari")
    versions = {name: importlib.metadata.version(name) for name in packages}
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        folder = Path(__file__).parent
        commit = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.strip()
    except OSError:  # git is not installed
        commit = ""
    return {"versions": versions, "commit": commit or None}


# --- dataset ---

ROBOTS = "halfcheetah|hopper|walker2d|swimmer|ant|humanoid|humanoidstandup|reacher|pusher"
SHORT_NAMES = {  # pattern of a short name -> Minari ids
    rf"({ROBOTS})-(simple|medium|expert)": ["mujoco/{}/{}-v0"],
    rf"({ROBOTS})-medium-expert": ["mujoco/{0}/medium-v0", "mujoco/{0}/expert-v0"],
    r"maze2d-((?:umaze|medium|large)(?:-dense)?)": ["D4RL/pointmaze/{}-v2"],
    r"antmaze-(umaze|(?:umaze|medium|large)-diverse|(?:medium|large)-play)": ["D4RL/antmaze/{}-v1"],
    r"(pen|door|hammer|relocate)-(human|cloned|expert)": ["D4RL/{}/{}-v2"],
    r"kitchen-(complete|partial|mixed)": ["D4RL/kitchen/{}-v2"],
}


class Episode(NamedTuple):
    observations: np.ndarray  # [T + 1, obs_dim]
    actions: np.ndarray  # [T, act_dim]
    rewards: np.ndarray  # [T]
    terminals: np.ndarray  # [T] bool: the environment terminated; a truncation is no terminal


class Dataset(NamedTuple):
    name: str  # for people: hopper-medium
    ids: list  # Minari ids of what was loaded
    env_id: str  # Gymnasium id: Hopper-v5
    episodes: list  # of Episode
    source: minari.MinariDataset  # the first id's: its environment, spaces, reference scores


def resolve_env(env):
    """Returns the Minari ids and folders that --env stands for."""
    sources = []
    for part in env.split("+"):
        names = [part]
        for pattern, ids in SHORT_NAMES.items():
            if match := re.fullmatch(pattern, part):
                names = [minari_id.format(*match.groups()) for minari_id in ids]
        sources += names
    return sources


def find_minari(source):
    """Returns the folder of a dataset: source itself, or an id's in the local cache, to which an
    id that is not there yet is downloaded from Minari's hub."""
    here = Path(__file__).parent
    for folder in (Path(source), here / source, here.parent / source):  # the last: baselines/
        if source and folder.is_dir():
            metadata = folder / "data" / "metadata.json"
            require(metadata.is_file(), f"--env {source}: no Minari dataset there ({metadata})")
            return folder
    require(
        re.fullmatch(r"([\w-]+/)*[\w-]+-v\d+", source),
        f"--env {source}: not a folder here, a short name that Minari has data for (hopper-medium, "
        "kitchen-partial; there is no medium-replay), or a Minari id (mujoco/hopper/medium-v0)",
    )
    folder = get_dataset_path(source)
    if (folder / "data" / "metadata.json").is_file():
        return folder
    print(f"{source} is not in the local cache, asking Minari's hub")
    try:
        # Minari's own client retries for 23 s; this fails at once where there is no connection
        HfApi().dataset_info(f"farama-minari/{source.split('/')[0]}", timeout=5)
        minari.download_dataset(source, force_download=folder.exists())
    except Exception as error:
        sys.exit(
            f"error: --env {source}: not in the local cache, and the hub did not send it "
            f"({first_line(error)}); check the id and the connection, or give a folder that holds "
            "the dataset"
        )
    return folder


def flatten_observations(space, observations):
    """Stacks observations [T + 1, ...], nested dictionaries too, as gymnasium's flatten does."""
    if isinstance(space, gym.spaces.Dict):
        parts = [flatten_observations(sub, observations[key]) for key, sub in space.items()]
        return np.concatenate(parts, axis=1)
    return np.asarray(observations).reshape(len(observations), -1)


def load_dataset(env):
    """Loads the episodes that --env stands for and prints a line about them.

    Exits with one line if there is no such dataset, it is damaged, its spaces are not vectors of
    real numbers, or several datasets do not fit together.
    """
    sources, episodes, dims = [], [], set()
    for name in resolve_env(env):
        folder = find_minari(name)
        try:
            source = minari.MinariDataset(folder / "data")
            raw_episodes = list(source.iterate_episodes())
        except Exception as error:
            sys.exit(f"error: --env {name}: cannot be read ({first_line(error)})")
        space, action_space = source.observation_space, source.action_space
        flat = gym.spaces.utils.flatten_space(space) if space.is_np_flattenable else None
        is_image = isinstance(space, gym.spaces.Box) and len(space.shape) > 1
        require(
            isinstance(flat, gym.spaces.Box) and not is_image and flat.dtype.kind == "f",
            f"--env {name}: observations must be vectors of real numbers, not {space}",
        )
        require(
            isinstance(action_space, gym.spaces.Box) and len(action_space.shape) == 1,
            f"--env {name}: actions must be vectors of real numbers, not {action_space}",
        )
        require(source.env_spec, f"--env {name}: the dataset does not name its environment")
        require_types(f"--env {name}: metadata", source.storage.metadata, {"dataset_id": str})
        sources.append(source)
        dims.add((*flat.shape, *action_space.shape))
        for e in raw_episodes:
            try:
                observations = flatten_observations(space, e.observations)
                episode = Episode(observations, e.actions, e.rewards, e.terminations)
                T = len(e.rewards)
                shapes = [(T + 1, *flat.shape), (T, *action_space.shape), (T,), (T,)]
                whole = T > 0 and [x.shape for x in episode] == shapes
                finite = all(np.isfinite(x).all() for x in episode)
            except (AttributeError, KeyError, TypeError, ValueError):
                whole = finite = False
            require(whole, f"--env {name}: episode {e.id} is not whole, or not of its space")
            require(finite, f"--env {name}: episode {e.id} holds NaN or infinite numbers")
            episodes.append(episode)
    env_ids = sorted({source.env_spec.id for source in sources})
    require(len(env_ids) == 1, f"--env {env}: different environments, {' and '.join(env_ids)}")
    require(len(dims) == 1, f"--env {env}: different dimensions of states and actions, {dims}")
    require(episodes, f"--env {env}: no episodes")

    ids = [source.id for source in sources]
    name = "+".join(ids) if resolve_env(env) == env.split("+") else env  # short names stay short
    returns = np.array([e.rewards.sum() for e in episodes])
    print(
        f"dataset: {name}, {len(episodes)} episodes, {sum(len(e.rewards) for e in episodes)} "
        f"transitions, {sum(e.terminals.sum() for e in episodes)} terminals, return mean "
        f"{returns.mean():.1f}, min {returns.min():.1f}, max {returns.max():.1f}"
    )
    return Dataset(name, ids, env_ids[0], episodes, sources[0])


def fingerprint(dataset, buffer=None):
    """Returns a hash of all that the dataset and the buffer, if there is one, hold."""
    digest = hashlib.sha256()
    for array in [array for episode in dataset.episodes for array in episode]:
        digest.update(np.ascontiguousarray(array))
    for key in sorted(buffer or ()):
        digest.update(np.ascontiguousarray(buffer[key]))
    return digest.hexdigest()


class Transitions(NamedTuple):
    """All transitions of a dataset, N of them. D = 2 obs_dim + act_dim + 2."""

    rows: np.ndarray  # [N, D] float32: s, a, r, s', terminal (0 or 1)
    mean: np.ndarray  # [D] float32; 0 for the terminal
    std: np.ndarray  # [D] float32; 1 for the terminal


def make_transitions(dataset):
    """Cuts every episode into transitions. All but the terminal is to be standardised, as SynthER's
    configuration has it."""
    rows = np.concatenate(
        [
            np.column_stack(
                [e.observations[:-1], e.actions, e.rewards, e.observations[1:], e.terminals]
            )
            for e in dataset.episodes
        ]
    )
    require(len(rows) > 1, f"--env {dataset.name}: has one transition only")
    mean = rows.mean(0, dtype=np.float64)
    std = rows.std(0, ddof=1, dtype=np.float64) + 1e-5
    mean[-1], std[-1] = 0.0, 1.0
    return Transitions(*(x.astype(np.float32) for x in (rows, mean, std)))


# --- denoiser ---


class ResidualBlock(nn.Module):
    """x + W relu(x) + b. [B, width] -> [B, width]"""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return x + self.linear(x.relu())


class ResidualMLP(nn.Module):
    """SynthER's network: transition and noise level are embedded, added, widened, and pass the
    residual blocks."""

    def __init__(self, num_dims, width, num_blocks=6, emb_dim=128):
        super().__init__()
        self.register_buffer("frequencies", torch.randn(8))  # random Fourier features, not learned
        self.emb_noise = nn.Sequential(
            nn.Linear(17, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim)
        )
        self.emb_x = nn.Linear(num_dims, emb_dim)
        self.widen = nn.Linear(emb_dim, width)
        self.blocks = nn.Sequential(*[ResidualBlock(width) for _ in range(num_blocks)])
        self.out = nn.Linear(width, num_dims)

    def forward(self, x, c_noise):
        """x [B, D], c_noise [B] -> [B, D]"""
        angles = 2 * math.pi * c_noise[:, None] * self.frequencies
        features = torch.cat([c_noise[:, None], angles.sin(), angles.cos()], dim=1)
        h = self.widen(self.emb_x(x) + self.emb_noise(features))
        return self.out(self.blocks(h).relu())


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
    """EDM's weighted denoising loss (Karras et al., Table 1), without a condition.

    x [B, D] clean rows, sigma [B], noise [B, D] unit normal.
    """
    s = sigma[:, None]
    weight = (s**2 + denoiser.sigma_data**2) / (s * denoiser.sigma_data) ** 2
    return (weight * (denoiser(x + s * noise, sigma) - x) ** 2).mean()


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """Moves the averaged weights towards the model's.

    The decay warms up from 0 as 1 - step^(-2/3), or a short run would sample its initial weights.
    """
    decay = min(decay, 1 - step ** (-2 / 3))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def get_rng_state(device):
    """Returns the states of the generators that training draws from, as plain tensors."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state, device):
    """Puts back what get_rng_state returned."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def load_model(path):
    """Reads synther.pt as plain tensors and values; nothing in it is executed."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # compares checksums, which torch.load does not
        require(not damaged, f"{path}: not a whole checkpoint, {damaged} in it is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        kind, version = str(checkpoint["format"]), int(checkpoint["format_version"])
    except Exception as error:
        kind = type(error).__name__
        sys.exit(f"error: {path}: not a whole checkpoint of synther.py ({kind})")
    require(kind == "synther", f"{path}: a {kind} file, not one of synther.py")
    require(version == 1, f"{path}: format version {version}; this program reads version 1")
    types = {"args": dict, "data_sha256": str, "step": int}
    types |= {"model": dict, "ema": dict, "optimizer": dict, "rng": dict}
    require_types(path, checkpoint, types)
    return checkpoint


def find_model(args, data_sha256):
    """Returns the checkpoint to continue, or to sample from if it is trained; None for step 0.

    A run never replaces a checkpoint of other flags or other data, nor one that has got further:
    the program ends with one line unless --resume or --retrain says what to do.
    """
    require(not (args.resume and args.retrain), "--resume and --retrain exclude each other")
    path = args.checkpoint
    if args.retrain or not path.exists():
        return None
    checkpoint = load_model(path)
    advice = "give the same flags, another --checkpoint, or --retrain"
    of_training = ("width", "batch_size", "train_steps", "lr", "p_mean", "p_std", "max_grad_norm")
    for key in (*of_training, "ema_decay", "ema_every", "seed"):
        old, value = checkpoint["args"].get(key), getattr(args, key)
        flag = f"--{key.replace('_', '-')}"
        require(old == value, f"{path} was trained with {flag} {old}, not {value}; {advice}")
    same = checkpoint["data_sha256"] == data_sha256
    require(same, f"{path} was trained on other data than {args.env} holds; {advice}")
    step = checkpoint["step"]
    require(0 <= step <= args.train_steps, f"{path}: step {step} of {args.train_steps}")
    require(
        args.resume or step == args.train_steps,
        f"{path} is at step {step} of {args.train_steps} of the same run; "
        "--resume continues it, --retrain starts it anew",
    )
    return checkpoint


def train(args, transitions, checkpoint, about, device):
    """Trains the denoiser from the checkpoint, or from step 0, to --train-steps.

    Writes --checkpoint, with what is in about, every --save-every steps. Returns the averaged
    denoiser; the random state is the one that the last step has left, resumed or not.
    """
    mean, std = torch.tensor(transitions.mean), torch.tensor(transitions.std)
    rows = ((torch.tensor(transitions.rows) - mean) / std).to(device)
    torch.manual_seed(args.seed)
    denoiser = TransitionDenoiser(rows.shape[1], args.width).to(device)
    ema = copy.deepcopy(denoiser).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        denoiser.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
        optimizer,
        T_0=args.train_steps,  # one cosine: the run ends where it would restart
    )
    num_parameters = sum(p.numel() for p in denoiser.parameters())
    print(f"denoiser: {num_parameters / 1e6:.1f} M parameters, {rows.shape[1]} dimensions")

    first_step = 0
    kept = f"{args.checkpoint} keeps the last checkpoint, if there is one; try a lower --lr"
    if checkpoint:
        try:
            load_weights(denoiser, checkpoint["model"])
            load_weights(ema, checkpoint["ema"])
            put_moments(optimizer, checkpoint["optimizer"]["state"])
            scheduler.step(checkpoint["step"])  # the learning rate depends on nothing else
            set_rng_state(checkpoint["rng"], device)
        except Exception as error:
            sys.exit(f"error: {args.checkpoint}: does not fit together ({first_line(error)})")
        first_step = checkpoint["step"]
        print(f"loaded {args.checkpoint} at step {first_step} of {args.train_steps}")
    elif args.resume:
        print(f"nothing to resume at {args.checkpoint}, starting at step 0")
    if first_step == args.train_steps:
        return ema

    def save(step):
        finite = all(p.isfinite().all() for p in denoiser.parameters())
        require(finite, f"step {step}: the weights are no longer finite; {kept}")
        checkpoint = {
            "format": "synther",
            "format_version": 1,
            "args": plain_args(args),
            **about,
            "normalizer": {"mean": mean, "std": std},
            "model": denoiser.state_dict(),
            "ema": ema.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "rng": get_rng_state(device),
        }
        write_atomically(args.checkpoint, lambda file: torch.save(checkpoint, file))

    loss_fn = torch.compile(transition_loss) if args.compile else transition_loss
    if args.track:
        import wandb

        wandb.init(project=args.wandb_project, entity=args.wandb_entity, config=plain_args(args))

    loss_sum, num_losses = torch.zeros((), device=device), 0
    recent_losses = deque(maxlen=10)  # means of 100 steps each
    started = time.time()
    progress = tqdm(range(first_step, args.train_steps), initial=first_step, total=args.train_steps)
    with catch_signals() as caught:
        for step in progress:
            x = rows[torch.randint(len(rows), (args.batch_size,), device=device)]
            sigma = torch.exp(args.p_mean + args.p_std * torch.randn(len(x), device=device))
            loss = loss_fn(denoiser, x, sigma, torch.randn_like(x))
            loss.backward()
            nn.utils.clip_grad_norm_(denoiser.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            if (step + 1) % args.ema_every == 0:
                update_ema(ema, denoiser, step + 1, args.ema_decay)

            loss_sum += loss.detach()
            num_losses += 1
            if (step + 1) % 100 == 0:
                recent_losses.append(loss_sum.item() / num_losses)
                finite = math.isfinite(recent_losses[-1])
                require(finite, f"step {step + 1}: the loss is {recent_losses[-1]}; {kept}")
                loss_sum, num_losses = torch.zeros_like(loss_sum), 0
                progress.set_postfix(loss=f"{recent_losses[-1]:.3f}")
                if args.track:
                    log = {"loss": recent_losses[-1], "lr": scheduler.get_last_lr()[0]}
                    wandb.log(log, step=step + 1)
            last = step + 1 == args.train_steps
            if (step + 1) % args.save_every == 0 or last or caught.is_set():
                save(step + 1)
            if caught.is_set():
                progress.close()
                sys.exit(f"interrupted at step {step + 1}; --resume continues from there")
    steps = f"{args.train_steps} steps, {(time.time() - started) / 60:.1f} min"
    if recent_losses:
        steps += f", loss {np.mean(recent_losses):.3f} over the last {100 * len(recent_losses)}"
    print(f"wrote {args.checkpoint}: {steps}")
    return ema


# --- sampler ---


def noise_schedule(num_steps, sigma_min, sigma_max, rho):
    """EDM's noise levels (Karras et al., eq. 5): K of them from sigma_max to sigma_min, then 0."""
    ramp = np.linspace(0, 1, num_steps)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [*((high + ramp * (low - high)) ** rho).tolist(), 0.0]


def edm_sampler(denoise, x, sigmas, gamma, s_min, s_max, s_noise):
    """Stochastic Heun sampler (Karras et al., Algorithm 2) from noise level sigmas[0] to 0.

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


# --- output ---


def name_flags(args, free):
    """Returns a word for every flag that is not at its default, such as "num-steps 64"; those in
    free, and those that do not change what comes out, are left out."""
    free = {*free, "out", "overwrite", "env", "seed", "device", "precision", "compile", "track"}
    words = []
    for key, value in plain_args(args).items():
        if key not in free and not key.startswith("wandb") and value != getattr(Args, key):
            name = key.replace("_", "-")
            words.append(name if value is True else f"{name} {value}")
    return words


def is_there(args, metadata):
    """Whether --out is there already, as this run would make it.

    A run never replaces a buffer of other settings, nor any other file: the program ends with one
    line unless --overwrite says so.
    """
    if args.overwrite or not args.out.exists():
        return False
    advice = "give another --out, or --overwrite"
    try:
        with np.load(args.out, allow_pickle=False) as file:
            old = json.loads(str(file["metadata"]))
            old_keys = old.keys()
    except Exception as error:
        kind = type(error).__name__
        sys.exit(f"error: --out {args.out}: there is something else, no buffer ({kind}); {advice}")
    free = {"out", "overwrite", "checkpoint", "env", "device", "compile", "track", "versions"}
    free |= {"commit", "diffusion", "wandb_project", "wandb_entity"}
    for key in [*metadata, *old_keys]:
        same = key in free or old.get(key) == metadata.get(key)
        flag = f"--{key.replace('_', '-')} {old.get(key)}, not {metadata.get(key)}"
        what = flag if hasattr(args, key) else f"another {key}"
        require(same, f"{args.out} was made with {what}; {advice}")
    return True


def save_buffer(path, buffer, metadata):
    """Writes buffer.npz: arrays and a JSON string, readable without pickle."""
    arrays = {**buffer, "metadata": np.array(json.dumps(metadata))}
    write_atomically(path, lambda file: np.savez(file, **arrays))


def split_transitions(x, action_space, terminal_threshold):
    """Splits generated rows [B, D], in real units, into the arrays of a buffer with H = 1."""
    obs_dim = (x.shape[1] - len(action_space.low) - 2) // 2
    bounds = (bound.astype(x.dtype) for bound in (action_space.low, action_space.high))
    s, a, r, s_next, terminal = np.split(x, [obs_dim, -obs_dim - 2, -obs_dim - 1, -1], axis=1)
    return {
        "observations": np.stack([s, s_next], axis=1),  # [B, 2, obs_dim]
        "actions": a.clip(*bounds)[:, None],  # [B, 1, act_dim]
        "rewards": r,  # [B, 1]
        "terminals": terminal > terminal_threshold,  # [B, 1]
    }


def generate(args, denoiser, transitions, action_space, device):
    """Draws --num-transitions transitions from pure noise. Returns the arrays of the buffer."""
    sigmas = noise_schedule(args.num_steps, args.sigma_min, args.sigma_max, args.rho)
    gamma = min(args.s_churn / args.num_steps, math.sqrt(2) - 1)
    mean, std = (torch.tensor(x, device=device) for x in (transitions.mean, transitions.std))
    network = torch.compile(denoiser) if args.compile else denoiser

    def denoise(x, sigma):
        return network(x, torch.full_like(x[:, 0], sigma))

    @torch.no_grad()
    def draw(batch_size):
        """Returns generated rows [B, D] in real units."""
        x = sigmas[0] * torch.randn(batch_size, len(mean), device=device)
        x = edm_sampler(denoise, x, sigmas, gamma, args.s_min, args.s_max, args.s_noise)
        return (x * std + mean).cpu().numpy()

    N, buffer = args.num_transitions, {}
    with catch_signals() as caught, tqdm(total=N, unit="transition") as progress:
        for i in range(0, N, args.sample_batch_size):
            x = draw(min(args.sample_batch_size, N - i))
            for key, part in split_transitions(x, action_space, args.terminal_threshold).items():
                if key not in buffer:
                    buffer[key] = np.empty((N, *part.shape[1:]), part.dtype)
                buffer[key][i : i + len(part)] = part
            progress.update(len(x))
            if caught.is_set():
                progress.close()
                sys.exit(
                    f"interrupted; {args.out} was not written. The same command samples again "
                    f"from {args.checkpoint}, which is trained"
                )
    return buffer


@end_in_one_line("--batch-size, --sample-batch-size, --width or --num-transitions")
def main(args):
    require_positive(args, "width", "train_steps", "lr", "ema_every", "save_every")
    require_positive(args, "batch_size", "p_std", "max_grad_norm", "sample_batch_size")
    require_positive(args, "sigma_min", "sigma_max", "rho", "s_noise")
    require_between(args, 1, 10**9, "num_transitions")
    require_between(args, 0, 1, "ema_decay", "terminal_threshold")
    require_between(args, -20, 20, "p_mean")
    require_between(args, 0, 1e6, "s_churn", "s_min", "s_max")
    require_between(args, 2, 1e6, "num_steps")
    require_between(args, 0, 2**32, "seed")
    require(args.sigma_min < args.sigma_max, "--sigma-min must be less than --sigma-max")
    require(args.s_max >= args.s_min, "--s-max must not be less than --s-min")
    same_file = args.out.resolve() == args.checkpoint.resolve()
    require(not same_file, "--out and --checkpoint must be two files")
    require_writable("--out", args.out)
    require_writable("--checkpoint", args.checkpoint)
    device = pick_device(args.device)

    dataset = load_dataset(args.env)
    transitions = make_transitions(dataset)
    if args.batch_size is None:
        args.batch_size = 1024 if len(transitions.rows) >= 800_000 else 256
    if args.compile is None:
        args.compile = device.type == "cuda"
    about = {
        **provenance(),
        "env": args.env,
        "dataset_ids": dataset.ids,
        "data_sha256": fingerprint(dataset),
        "env_id": dataset.env_id,
    }
    running = {"resume", "retrain", "save_every"}  # how the run goes, not what comes out
    words = name_flags(args, {*running, "checkpoint", "batch_size", "sample_batch_size"})
    metadata = {
        **{key: value for key, value in plain_args(args).items() if key not in running},
        **about,
        "format": "gta-buffer",
        "format_version": 1,
        "method": "synther",
        "label": f"synther({', '.join(words)})" if words else "synther",
        "horizon": 1,
    }
    if is_there(args, metadata) and not args.retrain:
        print(f"{args.out} is there already, made with these flags; --overwrite makes it anew")
        return
    checkpoint = find_model(args, about["data_sha256"])
    denoiser = train(args, transitions, checkpoint, about, device)

    started = time.time()
    buffer = generate(args, denoiser, transitions, dataset.source.action_space, device)
    for key, array in buffer.items():
        finite = np.isfinite(array).all()
        require(finite, f"generated {key} are not all finite; {args.out} was not written")
    save_buffer(args.out, buffer, metadata)
    reward = transitions.rows[:, -len(dataset.episodes[0].observations[0]) - 2]
    size, minutes = args.out.stat().st_size / 1e6, (time.time() - started) / 60
    print(
        f"wrote {args.out} ({size:.1f} MB, {minutes:.1f} min): {args.num_transitions} transitions\n"
        f"mean reward: dataset {reward.mean(dtype=np.float64):.3f}, generated "
        f"{buffer['rewards'].mean(dtype=np.float64):.3f}\n"
        f"terminal: dataset {transitions.rows[:, -1].mean(dtype=np.float64):.3%}, generated "
        f"{buffer['terminals'].mean():.3%}"
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
