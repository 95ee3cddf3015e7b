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
"""GTA, stage B: augment an offline dataset with a trained trajectory diffusion model.

GTA: Generative Trajectory Augmentation with Guidance for Offline RL (NeurIPS 2024), section 4.2
and appendices A.3, B. Subtrajectories of the dataset are noised up to a level that mu sets (eq. 9)
and denoised (eq. 10) by the stochastic sampler of EDM under classifier-free guidance (eq. 4)
towards an amplified return (eq. 8).

    python gta_augment.py --mu 0.25 --alpha 1.1

Reads:  diffusion.pt of gta_diffusion.py (--checkpoint) and the dataset that it was trained on
Writes: buffer.npz (--out), which the learners read with --aug
"""

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
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
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
    checkpoint: Path = Path("diffusion.pt")
    """trained model of gta_diffusion.py; it names its dataset, horizon and sizes"""
    out: Path = Path("buffer.npz")
    """file to write"""
    overwrite: bool = False
    """replace --out, whatever it holds"""
    env: str | None = None
    """where the checkpoint's dataset is now, if its folder has moved"""
    num_transitions: int = 5_000_000
    """transitions to generate, in subtrajectories of H (B.1)"""
    mu: float = 0.25
    """noising ratio in (0, 1]: how much of a trajectory is erased; 1 starts from noise (eq. 9)"""
    alpha: float = 1.1
    """amplification of the return that is asked for (eq. 8)"""
    condition: Literal["amplified", "fixed", "none", "inpaint"] = "amplified"
    """what the generated trajectories are asked for: each source's amplified return; the dataset's
    largest return, amplified, for all (F.1); nothing (Table 19); or no return, but each source's
    rewards, amplified, which are kept in place while the rest is denoised (E.6)"""
    guidance: float = 2.0
    """w, scale of the classifier-free guidance (eq. 4, Table 7); 0: condition without guidance, at
    half the cost"""
    reweight_bins: int = 0
    """N_B > 0 draws sources with high returns more often (eq. 13, Table 9), for dense rewards"""
    reweight_u: float = 0.001
    """u of eq. 13 (Table 9); larger: bins with few windows count less"""
    reweight_q: float = 5.0
    """q of eq. 13 (Table 9); smaller: bins with low returns count less"""
    source_top: float = 1.0
    """share of the episodes that are augmented, those with the largest returns (E.2)"""
    source_min_return: float | None = None
    """augment only episodes with at least this return"""
    success_weight: float = 1.0
    """c > 1: successful episodes (return > 0) are drawn c times as often, then a window of the
    episode, for sparse rewards (B.2)"""
    reward_proxy: bool = False
    """replace the generated rewards by those that a network, trained on the dataset, predicts for
    the generated states and actions (E.7)"""
    restore_terminal_reward: bool = False
    """give terminal rewards back the penalty that stage A subtracted from them"""
    num_steps: int = 128
    """K, diffusion steps from sigma_max to 0 (Table 7)"""
    sigma_min: float = 0.002
    """lowest noise level before 0 (Table 7)"""
    sigma_max: float = 80.0
    """highest noise level (Table 7)"""
    rho: float = 7.0
    """bend of the noise schedule; larger: more steps at low noise (EDM, Table 1)"""
    s_churn: float = 80.0
    """noise that the sampler adds back on its way (Table 7); 0 makes it deterministic"""
    s_min: float = 0.05
    """lowest noise level with churn (Table 7)"""
    s_max: float = 50.0
    """highest noise level with churn (Table 7)"""
    s_noise: float = 1.003
    """standard deviation of the churn's noise (Table 7)"""
    batch_size: int | None = None
    """subtrajectories denoised at once, at most. Default: 2048 on CUDA, 64 on a CPU"""
    seed: int = 0
    """seed of sources and noise"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cuda, cuda:1, cpu"""
    precision: Literal["bf16", "fp32"] | None = None
    """of the network's arithmetic; all else is fp32. Default: bf16 on CUDA, fp32 on a CPU. fp32 on
    CUDA multiplies in TF32"""
    compile: bool | None = None
    """compile the denoiser with torch.compile. Default: on CUDA; on a CPU it takes minutes and
    gains little"""
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


# --- sources ---


def amplified_return(y, alpha):
    """Eq. 8 for y >= 0; a negative return, too, moves upward. y [N] -> [N]"""
    return y + (alpha - 1) * np.abs(y)


def reweighted_probabilities(y, num_bins, u, q, max_ratio=5.0):
    """Eq. 13: probability of every window [W] to be a source, from its scaled return y [W].

    A bin j of the returns is drawn in proportion to v_j = |B_j| / (|B_j| + u) exp(-|y_max - y_j| /
    q), with |B_j| as a share of all windows and y_j its midpoint, and a window of it uniformly. No
    window is drawn more than max_ratio times as often as under uniform sampling.
    """
    y = y.astype(np.float64)
    count, edges = np.histogram(y, bins=num_bins)
    share = count / len(y)
    midpoint = (edges[:-1] + edges[1:]) / 2
    v = share / (share + u) * np.exp(-np.abs(y.max() - midpoint) / q)
    bin_of = np.clip(np.searchsorted(edges, y, side="right") - 1, 0, num_bins - 1)
    ratio = (v / v.sum() / np.maximum(share, 1e-12))[bin_of]  # 1 is uniform
    for _ in range(100):  # what the cap takes away goes to the other windows, and again
        ratio = np.minimum(ratio, max_ratio)
        ratio /= ratio.mean()
    return ratio / ratio.sum()


def success_probabilities(episode, episode_returns, c):
    """B.2: probability of every window [W] where a successful episode weighs c, others 1.

    episode [W] names each window's episode; episode_returns [E]. Within an episode windows are
    equally likely.
    """
    weight = np.where(episode_returns > 0, c, 1.0)
    num_windows = np.bincount(episode, minlength=len(weight))
    p = weight[episode] / num_windows[episode]
    return p / p.sum()


def pick_windows(episode, episode_returns, top, min_return):
    """Returns the windows of the share top of the episodes that have the largest returns (E.2).

    episode [W] names each window's episode; episode_returns [E]. min_return leaves out episodes
    with less; None leaves out none.
    """
    best_first = np.argsort(-episode_returns, kind="stable")
    picked = np.zeros(len(episode_returns), bool)
    picked[best_first[: math.ceil(top * len(episode_returns))]] = True
    if min_return is not None:
        picked &= episode_returns >= min_return
    return np.flatnonzero(picked[episode])


def amplify_rewards(rewards, terminals, penalty, alpha):
    """Rewards times alpha (E.6); a negative one, too, moves upward, as returns do. The penalty that
    a terminal one holds is no reward and stays as it is. [R], [R] -> [R]"""
    return amplified_return(rewards + penalty * terminals, alpha) - penalty * terminals


def draw_sources(rng, num_windows, num_sources, probabilities=None):
    """Returns num_sources window indices; without probabilities all windows come equally often."""
    if probabilities is not None:
        return rng.choice(num_windows, num_sources, p=probabilities)
    epochs = math.ceil(num_sources / num_windows)
    return np.concatenate([rng.permutation(num_windows) for _ in range(epochs)])[:num_sources]


# --- sampler ---


def noise_schedule(num_steps, sigma_min, sigma_max, rho):
    """EDM's noise levels (Karras et al., eq. 5): K of them from sigma_max to sigma_min, then 0."""
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


def only_noise(x, sigma):
    """A denoiser that does nothing, for the sake of the random numbers that the sampler draws."""
    return x


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


# --- reward proxy ---


class RewardProxy(nn.Module):
    """The reward that a state and an action earn (E.7). [..., obs_dim + act_dim] -> [...]"""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = mean, std  # [obs_dim + act_dim + 1], of the dataset, reward last
        sizes = (len(mean) - 1, 256)
        self.net = nn.Sequential(
            *(nn.Linear(*sizes), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))
        )

    def forward(self, sa):
        r = self.net((sa - self.mean[:-1]) / self.std[:-1]).squeeze(-1)
        return r * self.std[-1] + self.mean[-1]


def fit_reward_proxy(transitions, mean, std, num_steps=10_000, batch_size=256, lr=1e-3):
    """Trains a RewardProxy on transitions, rows of s, a, r [M, obs_dim + act_dim + 1].

    The learning rate falls to 0 as a cosine. Returns the network and the share of the rewards'
    variance that it explains (R^2) on a twentieth of the transitions, which it has not seen.
    """
    order = torch.randperm(len(transitions), device=transitions.device)
    num_held_out = max(2, len(order) // 20)
    train, held_out = transitions[order[num_held_out:]], transitions[order[:num_held_out]]
    proxy = RewardProxy(mean, std).to(transitions.device)
    optimizer = torch.optim.Adam(proxy.parameters(), lr, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in tqdm(range(num_steps), desc="reward proxy", leave=False, disable=ranks()[0] > 0):
        batch = train[torch.randint(len(train), (batch_size,), device=train.device)]
        loss = ((proxy(batch[:, :-1]) - batch[:, -1]) / std[-1]).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    with torch.no_grad():
        error = (proxy(held_out[:, :-1]) - held_out[:, -1]).pow(2).mean()
    return proxy, 1 - (error / held_out[:, -1].var(correction=0)).item()


def predict_rewards(proxy, buffer, device):
    """Returns the rewards [N, H] that a RewardProxy predicts for a buffer's states and actions."""
    sa = np.concatenate([buffer["observations"][:, :-1], buffer["actions"]], axis=-1)
    chunks = np.array_split(sa, math.ceil(len(sa) / 10_000))
    with torch.no_grad():
        rewards = [proxy(torch.tensor(chunk, device=device)).cpu().numpy() for chunk in chunks]
    return np.concatenate(rewards)


# --- output ---


def send_to_host(x):
    """Starts a copy of x to the host. Returns a function that waits for it and returns the array,
    so that the device works on while the host does."""
    host = x.to("cpu", non_blocking=True)  # into pinned memory, if x is on a GPU
    copied = torch.cuda.current_stream().record_event() if x.is_cuda else None

    def wait():
        if copied:
            copied.synchronize()
        return host.numpy()

    return wait


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


def name_augmentation(args, horizon):
    """Returns the words that name what this run generates: gta(mu 0.25, alpha 1.1)."""
    words = [f"mu {args.mu}"] + [f"alpha {args.alpha}"] * (args.condition != "none")
    words += name_flags(args, {"checkpoint", "mu", "alpha", "batch_size"})
    return f"gta({', '.join(words + [f'H {horizon}'] * (horizon != 31))})"


def hash_weights(network):
    """Returns a hash of a network's weights."""
    digest = hashlib.sha256()
    for p in network.state_dict().values():
        digest.update(np.ascontiguousarray(p.cpu()))
    return digest.hexdigest()


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


def correlation(x, y):
    """Pearson's correlation; NaN if one of the two does not vary. [N], [N] -> float"""
    varies = len(x) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0
    return float(np.corrcoef(x, y)[0, 1]) if varies else float("nan")


def summarise(buffer, source_rewards):
    """Returns what a user wants to know of the generated data at once. source_rewards [N, H]

    Mean rewards leave terminal transitions out, whose rewards hold the penalty. The correlations
    are with the condition, if there is one for each source.
    """
    alive = ~buffer["terminals"]
    summary = {
        "source_reward": float(source_rewards[alive].mean(dtype=np.float64)),
        "generated_reward": float(buffer["rewards"][alive].mean(dtype=np.float64)),
    }
    if "condition" in buffer and np.ptp(buffer["condition"]) > 0:
        summary |= {
            "source_correlation": correlation(buffer["condition"], source_rewards.sum(1)),
            "generated_correlation": correlation(buffer["condition"], buffer["rewards"].sum(1)),
        }
    return summary


@end_in_one_line("--batch-size or --num-transitions")
@join_ranks()
def main(args):
    rank, world_size = ranks()
    args.track &= rank == 0
    require(0 < args.mu <= 1, f"--mu {args.mu}: must lie in (0, 1]")
    require_positive(args, "alpha", "batch_size", "reweight_u", "reweight_q")
    require_between(args, 1, 10**9, "num_transitions")
    require_positive(args, "s_noise")
    require_between(args, 1e-6, 1e6, "sigma_min", "sigma_max")
    require_between(args, 0.1, 1000, "rho")
    require_between(args, 0, 1e6, "guidance", "s_churn", "s_min", "s_max", "reweight_bins")
    require_between(args, 2, 1e6, "num_steps")
    require_between(args, 1, 1e12, "success_weight")
    require(0 < args.source_top <= 1, f"--source-top {args.source_top}: must lie in (0, 1]")
    require_between(args, -1e12, 1e12, "source_min_return")
    require_between(args, 0, 2**32, "seed")
    require(args.sigma_min < args.sigma_max, "--sigma-min must be less than --sigma-max")
    require(args.s_min <= args.s_max, "--s-max must not be less than --s-min")
    require(
        args.reweight_bins == 0 or args.success_weight == 1,
        "--reweight-bins is for dense rewards, --success-weight for sparse ones: choose one",
    )
    require_writable("--out", args.out)
    device = pick_device(own_device(args.device))
    args.precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    args.batch_size = args.batch_size or (2048 if device.type == "cuda" else 64)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    checkpoint = load_checkpoint(args.checkpoint)
    trained = checkpoint["args"]
    types = dict.fromkeys(("gamma", "terminal_penalty", "return_scale"), int | float)
    require_types(f"{args.checkpoint}: args", trained, {**types, "dim": int})
    try:
        horizon, obs_dim, act_dim = (checkpoint[k] for k in ("horizon", "obs_dim", "act_dim"))
        bf16 = args.precision == "bf16"
        denoiser = Denoiser(horizon, obs_dim, act_dim, trained["dim"], bf16=bf16)
        load_weights(denoiser, checkpoint["ema"])
        zeros = torch.zeros(obs_dim + act_dim + 1)
        if not has_form(checkpoint["normalizer"], {"mean": zeros, "std": zeros}):
            raise ValueError("the normalizer is of other data")
        mean, std = (checkpoint["normalizer"][k].to(device) for k in ("mean", "std"))
    except Exception as error:
        sys.exit(f"error: {args.checkpoint}: does not fit together ({first_line(error)})")
    denoiser.to(device).eval()
    dataset = rank_0_first(lambda: load_dataset(args.env or checkpoint["env"]))
    require(
        dataset.ids == checkpoint["dataset_ids"],
        f"--checkpoint {args.checkpoint}: trained on "
        f"{'+'.join(map(str, checkpoint['dataset_ids']))}, not on {'+'.join(dataset.ids)}",
    )
    data_sha256 = fingerprint(dataset)
    same_data = data_sha256 == checkpoint["data_sha256"]
    require(
        same_data, f"--checkpoint {args.checkpoint}: the dataset has changed since its training"
    )
    metadata = {
        **plain_args(args),
        **provenance(),
        "format": "gta-buffer",
        "format_version": 1,
        "method": "gta",
        "label": name_augmentation(args, horizon),
        "env": args.env or checkpoint["env"],
        "dataset_ids": dataset.ids,
        "data_sha256": data_sha256,
        "env_id": dataset.env_id,
        "horizon": horizon,
        "model_sha256": hash_weights(denoiser),
        "diffusion": {**trained, "step": checkpoint["step"]},
    }
    if from_rank_0(lambda: is_there(args, metadata)):
        print(f"{args.out} is there already, made with these flags; --overwrite makes it anew")
        return
    windows = make_windows(dataset, horizon, trained["gamma"], trained["terminal_penalty"])
    if device.type == "cuda" if args.compile is None else args.compile:
        denoiser = torch.compile(denoiser)
    if args.track:
        import wandb

        wandb.init(project=args.wandb_project, entity=args.wandb_entity, config=plain_args(args))

    episode_returns = np.array([e.rewards.sum() for e in dataset.episodes])
    picked = pick_windows(windows.episode, episode_returns, args.source_top, args.source_min_return)
    require(
        len(picked), "--source-top, --source-min-return: no episode is left that has H transitions"
    )
    y = windows.y[picked] * trained["return_scale"]
    probabilities = None
    if args.reweight_bins:
        probabilities = reweighted_probabilities(
            y, args.reweight_bins, args.reweight_u, args.reweight_q
        )
    elif args.success_weight > 1:
        episode = windows.episode[picked]
        probabilities = success_probabilities(episode, episode_returns, args.success_weight)
    num_sources = math.ceil(args.num_transitions / horizon)
    drawn = draw_sources(rng, len(picked), num_sources, probabilities)
    sources = picked[drawn]
    y_source = y[drawn]
    if args.condition == "fixed":
        y_source = np.full(num_sources, windows.y.max() * trained["return_scale"])
    condition = amplified_return(y_source, args.alpha)

    sigmas = noise_schedule(args.num_steps, args.sigma_min, args.sigma_max, args.rho)
    gamma = min(args.s_churn / args.num_steps, math.sqrt(2) - 1)
    penalty = 0.0 if "maze" in dataset.env_id.lower() else trained["terminal_penalty"]
    known = windows.rows.copy()
    if args.condition == "inpaint":
        known[:, -1] = amplify_rewards(known[:, -1], windows.terminals, penalty, args.alpha)
    rows = (torch.tensor(known, device=device) - mean) / std
    low, high = dataset.source.action_space.low, dataset.source.action_space.high

    if args.reward_proxy:
        parts = [(e.observations[:-1], e.actions, e.rewards) for e in dataset.episodes]
        transitions = np.concatenate([np.column_stack(part) for part in parts])
        transitions = torch.tensor(transitions, dtype=torch.float32, device=device)
        proxy, r_squared = fit_reward_proxy(transitions, mean, std)
        print(f"reward proxy: R^2 {r_squared:.4f} on transitions it has not seen")

    num_batches = math.ceil(num_sources / args.batch_size)
    batch_size = math.ceil(num_sources / num_batches)
    start = torch.tensor(windows.start[sources], device=device)
    y_hat = torch.tensor(condition, dtype=torch.float32, device=device)

    @torch.no_grad()
    def generate(number):
        """Augments the windows of a batch; returns their rows [B, H + 1, D] in real units.

        The ranks take batches in turn and send them to rank 0. Of another's batch a rank only draws
        the noise, so that its next batch has the noise that it has in one process.
        """
        batch = torch.arange(number * batch_size, (number + 1) * batch_size, device=device)
        batch %= num_sources  # fills up the last one: all have one shape, which is compiled once
        source = gather_windows(rows, start[batch], horizon, obs_dim)
        x, levels = partial_noise(source, sigmas, args.mu)
        denoise = partial(unconditional_denoiser, denoiser)
        if args.condition in ("amplified", "fixed"):
            denoise = partial(guided_denoiser, denoiser, y=y_hat[batch], w=args.guidance)
        elif args.condition == "inpaint":
            denoise = partial(inpainting_denoiser, denoise, source[:, :-1, -1])
        owner = number % world_size
        if rank != owner:
            denoise = only_noise
        x = edm_sampler(denoise, x, levels, gamma, args.s_min, args.s_max, args.s_noise)
        x = x * std + mean
        if owner > 0 and rank == owner:
            dist.send(x.cpu(), 0)
        if owner > 0 and rank == 0:
            x = torch.empty(x.shape)
            dist.recv(x, owner)
        return x

    def generate_all():
        """Gives all batches as arrays on the host, each while the device makes the next one."""
        previous = None
        for number in range(num_batches):
            current = send_to_host(generate(number))
            if previous:
                yield previous()
            previous = current
        yield previous()

    steps = windows.start[sources][:, None] + np.arange(horizon)  # [N, H] rows of the transitions
    buffer = {
        "observations": np.empty((num_sources, horizon + 1, obs_dim), np.float32),
        "actions": np.empty((num_sources, horizon, act_dim), np.float32),
        "rewards": np.empty((num_sources, horizon), np.float32),
        "terminals": windows.terminals[steps],
        "episode": windows.episode[sources].astype(np.int32),
        "timestep": windows.timestep[sources].astype(np.int32),
        "return_to_go": windows.return_to_go[sources],
    }
    if args.condition in ("amplified", "fixed"):
        buffer["condition"] = (condition / trained["return_scale"]).astype(np.float32)
    started = time.time()
    progress = tqdm(total=num_sources, unit="traj", disable=rank > 0)
    with catch_signals() as caught, progress:
        for number, x in enumerate(generate_all()):
            batch = slice(number * batch_size, min((number + 1) * batch_size, num_sources))
            x = x[: batch.stop - batch.start]
            if rank == 0:  # elsewhere the empty arrays take no memory
                buffer["observations"][batch] = x[:, :, :obs_dim]
                buffer["actions"][batch] = x[:, :-1, obs_dim:-1].clip(low, high)
                buffer["rewards"][batch] = x[:, :-1, -1]
            progress.update(len(x))
            if (number + 1) % world_size == 0 and agree(caught.is_set()):
                progress.close()
                sys.exit(f"interrupted; {args.out} was not written" if rank == 0 else 1)
    if rank > 0:
        return
    if args.reward_proxy:
        buffer["rewards"] = predict_rewards(proxy, buffer, device)
        buffer["rewards"] -= np.float32(penalty) * buffer["terminals"]
    if args.restore_terminal_reward:
        buffer["rewards"] += penalty * buffer["terminals"]

    for key, array in buffer.items():
        finite = np.isfinite(array).all()
        require(
            finite,
            f"generated {key} are not all finite; {args.out} was not written; try --alpha or "
            "--guidance nearer to 1, --sigma-min and --sigma-max nearer to their defaults",
        )
    save_buffer(args.out, buffer, metadata)

    summary = summarise(buffer, windows.rows[steps, -1])
    size, minutes = args.out.stat().st_size / 1e6, (time.time() - started) / 60
    print(
        f"wrote {args.out} ({size:.1f} MB, {minutes:.1f} min): {num_sources} subtrajectories, "
        f"{num_sources * horizon} transitions\n"
        f"mean reward: sources {summary['source_reward']:.3f}, generated "
        f"{summary['generated_reward']:.3f} (terminal transitions left out)"
    )
    if "source_correlation" in summary:
        print(
            "correlation of the condition with a subtrajectory's return: sources "
            f"{summary['source_correlation']:.3f}, generated {summary['generated_correlation']:.3f}"
        )
    if args.track:
        wandb.log(summary)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
