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
"""GTA, stage A: train a return-conditioned diffusion model of trajectories.

GTA: Generative Trajectory Augmentation with Guidance for Offline RL (NeurIPS 2024), section 4.1
and appendix A. A subtrajectory of H transitions (eq. 6) is an image of H + 1 rows. Its condition is
the discounted return from its first step to the end of the episode (section 4.1). The denoiser is a
temporal U-Net of MLP-mixer blocks (A.2), trained with the loss of EDM (Karras et al. 2022).

    python gta_diffusion.py --env hopper-medium

Reads:  an offline dataset (--env)
Writes: diffusion.pt (--out), which gta_augment.py turns into a buffer of augmented trajectories
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
from typing import Literal, NamedTuple

import gymnasium as gym
import minari
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
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
    out: Path = Path("diffusion.pt")
    """checkpoint to write"""
    resume: bool = False
    """continue the run whose checkpoint is --out, if there is one; give it the same flags"""
    overwrite: bool = False
    """start anew and replace --out, whatever it holds"""
    horizon: int = 31
    """H, transitions in a subtrajectory. The U-Net sees H + 1 rows, which must be divisible by 8
    (H = 1 works too, without halvings). 31 is the paper's 32 as its authors ran it (Table 8)"""
    dim: int = 16
    """channels of the U-Net's first level; the others have 2, 4 and 8 times as many"""
    batch_size: int = 256
    """subtrajectories in a batch (Table 6), of all processes together"""
    train_steps: int = 1_000_000
    """gradient steps (Table 6)"""
    lr: float = 3e-4
    """learning rate of Adam (Table 6); cosine annealing, restarted every tenth of the run"""
    condition_dropout: float = 0.25
    """lambda, the probability that a condition is dropped (eq. 5, Table 6)"""
    gamma: float = 0.99
    """discount of the return that conditions the model"""
    terminal_penalty: float = 100.0
    """subtracted from the reward of a terminal transition (A.1); not in mazes"""
    return_scale: float = 0.01
    """the network sees the return times this"""
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
    seed: int = 0
    """seed of initial weights, batches and noise"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cuda, cuda:1, cpu"""
    precision: Literal["bf16", "fp32"] | None = None
    """of the network's arithmetic; all else is fp32. Default: bf16 on CUDA, fp32 on a CPU. fp32 on
    CUDA multiplies in TF32"""
    compile: bool | None = None
    """compile the denoiser with torch.compile and record the step as a CUDA graph. Default: on
    CUDA; on a CPU it takes minutes and gains little"""
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


def ranks():
    """Returns this process's rank and how many there are: 0 and 1, unless torchrun started it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def join_ranks():
    """Connects the processes that torchrun started, if it did. Of these rank 0 alone speaks.

    GPU tensors travel over NCCL, CPU tensors over gloo. Where rank 0 ends with an error, the others
    fail too; torchrun ends them while they wait here, so that the error is shown once. An error of
    their own they show after the wait.
    """
    rank, world_size = ranks()
    if world_size > 1:
        by_torchrun = "LOCAL_RANK" in os.environ
        require(by_torchrun, f"WORLD_SIZE is {world_size}, but torchrun did not start this process")
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    try:
        yield
    except KeyboardInterrupt:
        sys.exit("interrupted" if rank == 0 else 1)
    except (RuntimeError, SystemExit) as error:
        if rank > 0:
            time.sleep(3)
        if "closed by peer" in str(error):
            sys.exit("error: another process of torchrun has ended")
        raise
    if world_size > 1:
        dist.destroy_process_group()


def own_device(name):
    """Returns the name of this rank's device: of several on a machine each has a GPU of its own."""
    world_size = ranks()[1]
    fits = world_size == 1 or name in ("cuda", "cpu")
    require(fits, f"--device {name}: torchrun gives every process its GPU; use cuda or cpu")
    return f"cuda:{os.environ['LOCAL_RANK']}" if world_size > 1 and name == "cuda" else name


def agree(flag):
    """Returns whether flag is true on any rank; the ranks wait for each other.

    It travels between the hosts: no GPU is waited for.
    """
    if ranks()[1] == 1:
        return flag
    votes = torch.tensor(float(flag))
    dist.all_reduce(votes)
    return votes.item() > 0


def from_rank_0(find):
    """Returns on every rank what find() returns on rank 0, which alone calls it."""
    rank, world_size = ranks()
    found = [find() if rank == 0 else None]
    if world_size > 1:
        dist.broadcast_object_list(found)
    return found[0]


def rank_0_first(find):
    """Returns find() on every rank. Rank 0 calls it before the others: it may have to download."""
    rank = ranks()[0]
    if rank > 0:
        agree(False)
    found = find()
    if rank == 0:
        agree(False)
    return found


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


class Windows(NamedTuple):
    """The subtrajectories of a dataset. R = sum of T + 1 over the episodes, W = windows."""

    rows: np.ndarray  # [R, D] float32: s_t, a_t, r_t (penalised); an episode's last row: s_T, 0, 0
    terminals: np.ndarray  # [R] bool
    mean: np.ndarray  # [D] float32, of the transitions, without the terminal penalty
    std: np.ndarray  # [D] float32
    start: np.ndarray  # [W] int64: the row of the window's first transition
    episode: np.ndarray  # [W] int64
    timestep: np.ndarray  # [W] int64: the window's first step in its episode
    y: np.ndarray  # [W] float32: discounted return from there on, with the penalty (4.1, A.1)
    return_to_go: np.ndarray  # [W] float32: undiscounted, without the penalty (eq. 17)


def discounted_cumsum(rewards, gamma):
    """Returns sum_{i >= t} gamma^(i - t) r_i for every t. [T] -> [T] float64"""
    returns = np.zeros(len(rewards) + 1)
    for t in reversed(range(len(rewards))):
        returns[t] = rewards[t] + gamma * returns[t + 1]
    return returns[:-1]


def make_windows(dataset, horizon, gamma, terminal_penalty):
    """Cuts every episode into its windows of H transitions and one more state (eq. 6, A.1)."""
    penalty = 0.0 if "maze" in dataset.env_id.lower() else terminal_penalty
    rows, terminals, start, episode, timestep, y, return_to_go = [], [], [], [], [], [], []
    moments = np.concatenate(
        [np.column_stack([e.observations[:-1], e.actions, e.rewards]) for e in dataset.episodes]
    )
    row, num_short = 0, 0
    for i, e in enumerate(dataset.episodes):
        T = len(e.rewards)
        if T < horizon:
            num_short += 1
            continue
        rewards = e.rewards - penalty * e.terminals
        empty = np.zeros((1, e.actions.shape[1] + 1))
        actions_rewards = np.concatenate([np.column_stack([e.actions, rewards]), empty])
        rows.append(np.column_stack([e.observations, actions_rewards]))
        terminals.append(np.append(e.terminals, False))
        first = np.arange(T - horizon + 1)
        start.append(row + first)
        episode.append(np.full_like(first, i))
        timestep.append(first)
        y.append(discounted_cumsum(rewards, gamma)[first])
        return_to_go.append(discounted_cumsum(e.rewards, 1.0)[first])
        row += T + 1
    require(start, f"--horizon {horizon}: no episode of {dataset.name} is that long")
    windows = Windows(
        rows=np.concatenate(rows).astype(np.float32),
        terminals=np.concatenate(terminals),
        mean=moments.mean(0, dtype=np.float64).astype(np.float32),
        std=(moments.std(0, ddof=1, dtype=np.float64) + 1e-5).astype(np.float32),
        start=np.concatenate(start),
        episode=np.concatenate(episode),
        timestep=np.concatenate(timestep),
        y=np.concatenate(y).astype(np.float32),
        return_to_go=np.concatenate(return_to_go).astype(np.float32),
    )
    print(
        f"windows: {len(windows.start)} of {horizon} transitions, return condition "
        f"{windows.y.min():.1f} to {windows.y.max():.1f}; {num_short} episodes left out for "
        f"being shorter"
    )
    return windows


def gather_windows(rows, start, horizon, obs_dim):
    """Takes windows out of standardised rows [R, D]. start [B] -> [B, H + 1, D]

    The last row keeps only its state: its action and reward belong to the next transition.
    """
    x = rows[start[:, None] + torch.arange(horizon + 1, device=start.device)]
    x[:, -1, obs_dim:] = 0.0
    return x


# --- denoiser ---


class MixerBlock(nn.Module):
    """MLP-mixer block (A.2). [B, R, D, C_in] -> [B, R, D, C_out]: R rows, D dimensions, C channels.

    One MLP mixes the components within each row, one mixes the rows of each component.
    """

    def __init__(self, num_rows, num_dims, c_in, c_out, emb_dim):
        super().__init__()
        width = num_dims * c_in
        self.norm_row = nn.LayerNorm(width)
        self.mix_row = nn.Sequential(
            nn.Linear(width, 4 * c_in), nn.GELU(), nn.Linear(4 * c_in, width)
        )
        self.norm_time = nn.LayerNorm(num_rows)
        self.mix_time = nn.Sequential(
            nn.Linear(num_rows, 4 * num_rows), nn.GELU(), nn.Linear(4 * num_rows, num_rows)
        )
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


class Halve(nn.Module):
    """Halves the rows with a strided convolution. [B, R, D, C] -> [B, R / 2, D, C]"""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=(2, 1), padding=1)

    def forward(self, x):
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Double(nn.Module):
    """Doubles the rows with a transposed convolution. [B, R, D, C] -> [B, 2 R, D, C]"""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.ConvTranspose2d(channels, channels, (4, 3), stride=(2, 1), padding=1)

    def forward(self, x):
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class MixerUNet(nn.Module):
    """Temporal U-Net of MLP-mixer blocks (A.2). Rows are halved three times, if they are not two.

    Channels come last in memory, so that norms, linear layers and 1x1 convolutions need no copy.
    """

    def __init__(self, num_rows, num_dims, dim):
        super().__init__()
        c = [1, dim, 2 * dim, 4 * dim, 8 * dim]
        emb_dim = 2 * dim
        halve, double = (nn.Identity, nn.Identity) if num_rows == 2 else (Halve, Double)
        r = [num_rows // (1 if num_rows == 2 else 2**level) for level in range(4)]

        self.register_buffer("frequencies", torch.randn(8))  # random Fourier features, not learned
        self.emb_noise = nn.Sequential(nn.Linear(17, 4 * dim), nn.Mish(), nn.Linear(4 * dim, dim))
        self.emb_y = nn.Sequential(nn.Linear(1, 2 * dim), nn.Mish(), nn.Linear(2 * dim, dim))

        def level(num_rows, c_in, c_out, resize):
            return nn.ModuleList(
                [
                    MixerBlock(num_rows, num_dims, c_in, c_out, emb_dim),
                    MixerBlock(num_rows, num_dims, c_out, c_out, emb_dim),
                    LinearAttention(c_out),
                    resize(c_out),
                ]
            )

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
            x = resize(x)
        x = self.middle_2(self.middle_attention(self.middle_1(x, emb)), emb)
        for block_1, block_2, attention, resize in self.ups:
            x = block_1(torch.cat([x, skips.pop()], dim=-1), emb)
            x = resize(attention(block_2(x, emb)))
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
    s = sigma[:, None, None]
    weight = (s**2 + denoiser.sigma_data**2) / (s * denoiser.sigma_data) ** 2
    return (weight * (denoiser(x + s * noise, sigma, y, keep) - x) ** 2).mean()


def warm_restarts(step, period):
    """The share of the learning rate at step 1, 2, ...: a cosine from 1 to 0 in every period."""
    return 0.5 * (1 + math.cos(math.pi * ((step - 1) % period) / period))


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """Moves the averaged weights towards the model's.

    The decay warms up from 0 as 1 - step^(-2/3), or a short run would sample its initial weights.
    """
    decay = min(decay, 1 - step ** (-2 / 3))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def record_graph(function):
    """Records what function() does on the GPU; returns a function that does it in one launch."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()

    def replay():
        graph.replay()
        return outputs

    replay.recorded = function  # keeps its tensors, whose addresses the graph knows
    return replay


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


def load_checkpoint(path):
    """Reads diffusion.pt as plain tensors and values; nothing in it is executed."""
    require(path.is_file(), f"{path}: no such file; run gta_diffusion.py first")
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # compares checksums, which torch.load does not
        require(not damaged, f"{path}: not a whole checkpoint, {damaged} in it is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        kind, version = str(checkpoint["format"]), int(checkpoint["format_version"])
    except Exception as error:
        kind = type(error).__name__
        sys.exit(f"error: {path}: not a whole checkpoint of gta_diffusion.py ({kind})")
    require(kind == "gta-diffusion", f"{path}: a {kind} file, not one of gta_diffusion.py")
    require(version == 2, f"{path}: format version {version}; this program reads version 2")
    types = {"args": dict, "env": str, "dataset_ids": list, "data_sha256": str, "step": int}
    types |= {"normalizer": dict, "model": dict, "ema": dict, "rng": dict}
    require_types(path, checkpoint, types)
    try:
        json.dumps(checkpoint["args"], allow_nan=False)
    except Exception as error:
        sys.exit(f"error: {path}: args are no plain values ({first_line(error)})")
    return checkpoint


def find_start(args, data_sha256):
    """Returns the checkpoint that the run goes on from, or None for step 0.

    A run never replaces a checkpoint of other flags or other data, nor one that has got further:
    the program ends with one line unless --resume or --overwrite says what to do.
    """
    require(not (args.resume and args.overwrite), "--resume and --overwrite exclude each other")
    if args.overwrite or not args.out.exists():
        return None
    checkpoint = load_checkpoint(args.out)
    free = {"env", "out", "resume", "overwrite", "save_every", "device", "compile", "track"}
    advice = "give the same flags, another --out, or --overwrite"
    old_args = {"precision": "fp32", **checkpoint["args"]}  # it may be older than that flag
    for key, value in plain_args(args).items():
        old = old_args.get(key)
        same = old == value or key in free or key.startswith("wandb")
        flag = f"--{key.replace('_', '-')}"
        require(same, f"{args.out} was trained with {flag} {old}, not {value}; {advice}")
    same = checkpoint["data_sha256"] == data_sha256
    require(same, f"{args.out} was trained on other data, {args.env} has changed; {advice}")
    step = checkpoint["step"]
    require(0 <= step <= args.train_steps, f"{args.out}: step {step} of {args.train_steps}")
    require(
        args.resume or step == args.train_steps,
        f"{args.out} is at step {step} of {args.train_steps} of the same run; "
        "--resume continues it, --overwrite starts it anew",
    )
    return checkpoint


@end_in_one_line("--batch-size or --dim")
@join_ranks()
def main(args):
    rank, world_size = ranks()
    args.track &= rank == 0
    rows_ok = args.horizon == 1 or (args.horizon > 1 and (args.horizon + 1) % 8 == 0)
    require(rows_ok, f"--horizon {args.horizon}: must be 1 or one less than a multiple of 8")
    require(args.dim > 0 and args.dim % 8 == 0, f"--dim {args.dim}: must be a multiple of 8")
    require_positive(args, "batch_size", "train_steps", "lr", "ema_every", "save_every")
    require_positive(args, "dim", "return_scale", "p_std", "max_grad_norm")
    require_between(args, 0, 1, "condition_dropout", "gamma", "ema_decay")
    require_between(args, 0, 1e6, "terminal_penalty")
    require_between(args, -20, 20, "p_mean")
    require_between(args, 0, 2**32, "seed")
    require_writable("--out", args.out)
    divisible = args.batch_size % world_size == 0
    require(divisible, f"--batch-size {args.batch_size}: {world_size} processes must divide it")
    device = pick_device(own_device(args.device))
    args.precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    torch.manual_seed(args.seed)

    dataset = rank_0_first(lambda: load_dataset(args.env))
    data_sha256 = fingerprint(dataset)
    checkpoint = from_rank_0(lambda: find_start(args, data_sha256))
    if checkpoint and checkpoint["step"] == args.train_steps:
        print(f"{args.out} is there already, made with these flags; --overwrite makes it anew")
        return
    windows = make_windows(dataset, args.horizon, args.gamma, args.terminal_penalty)
    obs_dim = dataset.episodes[0].observations.shape[1]
    act_dim = dataset.episodes[0].actions.shape[1]
    mean, std = torch.tensor(windows.mean), torch.tensor(windows.std)
    rows = ((torch.tensor(windows.rows) - mean) / std).to(device)
    start = torch.tensor(windows.start, device=device)
    y = torch.tensor(windows.y, device=device) * args.return_scale

    compiles = device.type == "cuda" if args.compile is None else args.compile
    bf16 = args.precision == "bf16"
    denoiser = Denoiser(args.horizon, obs_dim, act_dim, args.dim, bf16=bf16).to(device)
    ema = copy.deepcopy(denoiser).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        denoiser.parameters(),
        torch.tensor(args.lr, device=device),  # a tensor can change in a CUDA graph
        betas=(0.9, 0.99),
        weight_decay=0.0,
        fused=True,
        capturable=device.type == "cuda",
    )
    num_parameters = sum(p.numel() for p in denoiser.parameters())
    print(f"denoiser: {num_parameters / 1e6:.1f} M parameters, {args.horizon + 1} rows")

    first_step = 0
    kept = f"{args.out} keeps the last checkpoint, if there is one; try a lower --lr"
    if checkpoint:
        try:
            load_weights(denoiser, checkpoint["model"])
            load_weights(ema, checkpoint["ema"])
            put_moments(optimizer, checkpoint["optimizer"]["state"])
            set_rng_state(checkpoint["rng"], device)
        except Exception as error:
            sys.exit(f"error: {args.out}: does not fit together ({first_line(error)})")
        first_step = checkpoint["step"]
        print(f"resumed {args.out} at step {first_step} of {args.train_steps}")
    elif args.resume:
        print(f"nothing to resume at {args.out}, starting at step 0")

    made_with = provenance()

    def save(step):
        finite = all(p.isfinite().all() for p in denoiser.parameters())
        require(finite, f"step {step}: the weights are no longer finite; {kept}")
        checkpoint = {
            "format": "gta-diffusion",
            "format_version": 2,
            "args": plain_args(args),
            **made_with,
            "env": args.env,
            "dataset_ids": dataset.ids,
            "data_sha256": data_sha256,
            "env_id": dataset.env_id,
            "obs_dim": obs_dim,
            "act_dim": act_dim,
            "horizon": args.horizon,
            "normalizer": {"mean": mean, "std": std},
            "model": denoiser.state_dict(),
            "ema": ema.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "rng": get_rng_state(device),
        }
        write_atomically(args.out, lambda file: torch.save(checkpoint, file))

    network = denoiser
    if world_size > 1:  # averages the gradients over the ranks
        network = nn.parallel.DistributedDataParallel(denoiser, broadcast_buffers=False)
        network.sigma_data = denoiser.sigma_data
    loss_fn = torch.compile(edm_loss) if compiles else edm_loss
    share = args.batch_size // world_size
    own = slice(rank * share, (rank + 1) * share)  # what this rank does of a batch
    loss_sum, num_losses = torch.zeros((), device=device), 0

    def train_step():
        """One gradient step. Batch and noise are the same on every rank; each does its share."""
        index = torch.randint(len(start), (args.batch_size,), device=device)
        x = gather_windows(rows, start[index], args.horizon, obs_dim)
        keep = (torch.rand(len(x), device=device) >= args.condition_dropout).float()
        sigma = torch.exp(args.p_mean + args.p_std * torch.randn(len(x), device=device))
        batch = (x, y[index], keep, sigma, torch.randn_like(x))
        loss = loss_fn(network, *(field[own] for field in batch))
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        loss_sum.add_(loss.detach())

    if args.track:
        import wandb

        wandb.init(project=args.wandb_project, entity=args.wandb_entity, config=plain_args(args))

    train = train_step
    records = device.type == "cuda" and compiles and world_size == 1
    last_eager_step = first_step + 10  # by then all is compiled, and the optimizer's state is there
    lr_period = max(1, args.train_steps // 10)
    recent_losses = deque(maxlen=10)  # means of 100 steps each
    started = time.time()
    progress = tqdm(
        range(first_step + 1, args.train_steps + 1),
        initial=first_step,
        total=args.train_steps,
        disable=rank > 0,
    )
    with catch_signals() as caught:
        for step in progress:
            if records and step == last_eager_step + 1:
                train = record_graph(train_step)
            lr = args.lr * warm_restarts(step, lr_period)
            optimizer.param_groups[0]["lr"].fill_(lr)
            train()
            if step % args.ema_every == 0:
                update_ema(ema, denoiser, step, args.ema_decay)

            num_losses += 1
            if step % 100 == 0:
                if world_size > 1:
                    dist.all_reduce(loss_sum)
                recent_losses.append(loss_sum.item() / num_losses / world_size)
                finite = math.isfinite(recent_losses[-1])
                require(finite, f"step {step}: the loss is {recent_losses[-1]}; {kept}")
                loss_sum.zero_()
                num_losses = 0
                progress.set_postfix(loss=f"{recent_losses[-1]:.3f}")
                if args.track:
                    wandb.log({"loss": recent_losses[-1], "lr": lr}, step=step)
            stop = agree(caught.is_set())
            if rank == 0 and (step % args.save_every == 0 or step == args.train_steps or stop):
                save(step)
            if stop and step < args.train_steps:
                progress.close()
                agree(False)  # until rank 0 has saved: torchrun ends all when one has ended
                message = f"interrupted at step {step}; --resume continues from there"
                sys.exit(message if rank == 0 else 1)
    steps = f"{args.train_steps} steps, {(time.time() - started) / 60:.1f} min"
    if recent_losses:
        steps += f", loss {np.mean(recent_losses):.3f} over the last {100 * len(recent_losses)}"
    print(f"wrote {args.out}: {steps}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
