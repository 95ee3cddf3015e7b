# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch",
#     "numpy",
#     "scipy",
#     "matplotlib",
#     "gymnasium[mujoco]",
#     "minari[hdf5,hf]",
#     "huggingface_hub",
#     "tyro",
#     "tqdm",
#     "wandb",
# ]
# ///
"""Is generated data plausible, novel and better? And: the results of a set of runs.

GTA: Generative Trajectory Augmentation with Guidance for Offline RL (Lee et al., NeurIPS 2024),
sections 5.1 and 5.4, appendices D, F.2, F.4, F.6 and F.7. The metrics are under "metrics" below.

    python metrics.py --aug buffer.npz
    python metrics.py --aug a.npz b.npz --plot metrics.png
    python metrics.py --runs runs/*
    python metrics.py --runs runs/* --table latex

Reads:  buffers of gta_augment.py and the dataset that they were made from; or folders of runs
Writes: metrics.json (--out) and a figure (--plot); with --runs nothing
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
import textwrap
import time
import warnings
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import minari
import numpy as np
import torch
import tyro
from huggingface_hub import HfApi
from minari.storage.datasets_root_dir import get_dataset_path
from scipy.spatial import cKDTree
from scipy.stats import t as student_t
from tqdm import tqdm


@dataclass
class Args:
    aug: tuple[Path, ...] = ()
    """buffers to measure, side by side: --aug a.npz b.npz"""
    runs: tuple[Path, ...] = ()
    """folders of runs to tabulate: --runs runs/*"""
    env: str | None = None
    """where the dataset of --aug is: a short name (hopper-medium), a Minari id, a folder, or
    several of them joined by +. Default: as the buffers name it"""
    s4rl_sigma: float = 0.0
    """> 0 adds a column for the S4RL baseline: the dataset with noise of this standard deviation on
    its standardised states, as the learners' flag makes it (C.1: 3e-4)"""
    num_transitions: int = 1_000_000
    """transitions to measure of each buffer, drawn at random as whole subtrajectories (appendix D),
    and of the dataset; all, where there are fewer"""
    out: Path = Path("metrics.json")
    """file for all numbers of --aug"""
    plot: Path | None = None
    """file for a figure of --aug: returns of subtrajectories (Figures 4c and 8), condition against
    generated return (Figure 7)"""
    table: Literal["text", "markdown", "latex"] = "text"
    """form of the tables"""
    workers: int = os.cpu_count() or 1
    """processes that ask MuJoCo"""
    seed: int = 0
    """seed of what is drawn"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cuda, cuda:1, cpu: where nearest neighbours are searched"""
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


def read_buffer(path):
    """Reads buffer.npz. Returns its arrays (the README lists them) and its metadata.

    Exits with one line if the file is missing, damaged, of another kind or of a newer format.
    """
    require(path.is_file(), f"--aug {path}: no such file; gta_augment.py writes it")
    try:
        with np.load(path, allow_pickle=False) as file:
            buffer = {key: np.asarray(file[key]) for key in file.files}
    except Exception as error:
        sys.exit(f"error: --aug {path}: not a whole buffer.npz ({type(error).__name__})")
    try:
        metadata = json.loads(str(buffer.pop("metadata")))
        kind, version = metadata["format"], metadata["format_version"]
    except Exception:
        sys.exit(f"error: --aug {path}: no buffer, it lacks metadata in JSON with its format")
    require(kind == "gta-buffer", f"--aug {path}: a {kind} file, not a buffer of trajectories")
    require(version == 1, f"--aug {path}: format version {version}; this program reads version 1")
    keys = ("observations", "actions", "rewards", "terminals")
    require(all(key in buffer for key in keys), f"--aug {path}: lacks one of {', '.join(keys)}")
    types = {"method": str, "env": str, "dataset_ids": list, "label": str, "env_id": str}
    optional = {"label": "", "env_id": ""}
    require_types(f"--aug {path}: metadata", {**optional, **metadata}, types)
    observations, actions, rewards, terminals = (buffer[key] for key in keys)
    fits = observations.ndim == actions.ndim == 3 and len(observations) == len(actions) > 0
    fits = fits and observations.shape[1] == actions.shape[1] + 1
    fits &= rewards.shape == terminals.shape == actions.shape[:2] and rewards.size > 0
    for key in ("episode", "timestep", "return_to_go", "condition"):
        fits &= key not in buffer or buffer[key].shape == actions.shape[:1]
    shapes = ", ".join(f"{key} {list(array.shape)}" for key, array in buffer.items())
    require(fits, f"--aug {path}: is empty, or its arrays do not fit together: {shapes}")
    for key, array in buffer.items():
        finite = array.dtype.kind in "biuf" and np.isfinite(array).all()
        require(finite, f"--aug {path}: {key} are not all finite numbers")
    buffer["terminals"] = terminals.astype(bool)
    return buffer, metadata


def require_fit(path, buffer, metadata, dataset):
    """Ends the program with one line unless the buffer was made from the dataset."""
    made_from, ids = "+".join(map(str, metadata["dataset_ids"])), "+".join(dataset.ids)
    require(
        made_from == ids, f"--aug {path}: made from {made_from}, which contradicts --env, {ids}"
    )
    dims, own_dims = (
        [x.shape[-1] for x in pair]
        for pair in ((buffer["observations"], buffer["actions"]), dataset.episodes[0][:2])
    )
    require(
        dims == own_dims,
        f"--aug {path}: observations and actions have {dims} dimensions, not {own_dims}",
    )


def describe_buffer(metadata):
    """Returns the words that name an augmentation: gta(mu 0.25, alpha 1.1)."""
    return str(metadata.get("label", metadata["method"]))


class Sample(NamedTuple):
    """N subtrajectories of H transitions: of a buffer; or a dataset's transitions, H = 1."""

    s: np.ndarray  # [N, H, obs_dim]
    a: np.ndarray  # [N, H, act_dim]
    r: np.ndarray  # [N, H]
    s_next: np.ndarray  # [N, H, obs_dim]
    terminal: np.ndarray  # [N, H] bool
    penalised: np.ndarray  # [N, H] bool: the reward holds stage A's penalty and says nothing
    condition: np.ndarray | None  # [N] the return that was asked for


def sample_dataset(dataset, num_transitions, rng):
    """Draws single transitions of the dataset without replacement."""
    episodes = dataset.episodes
    columns = [
        np.concatenate([e.observations[:-1] for e in episodes]),
        np.concatenate([e.actions for e in episodes]),
        np.concatenate([e.rewards for e in episodes]),
        np.concatenate([e.observations[1:] for e in episodes]),
        np.concatenate([e.terminals for e in episodes]),
    ]
    index = np.arange(len(columns[0]))
    if num_transitions < len(index):
        index = np.sort(rng.choice(index, num_transitions, replace=False))
    columns = [column[index][:, None] for column in columns]
    return Sample(*columns, penalised=np.zeros((len(index), 1), bool), condition=None)


def add_state_noise(sample, std, sigma, rng):
    """S4RL: Gaussian noise of sigma deviations std [obs_dim] on s and s'."""

    def add_noise(s):
        return s + sigma * std * rng.normal(size=s.shape)

    return sample._replace(s=add_noise(sample.s), s_next=add_noise(sample.s_next))


def sample_buffer(buffer, metadata, env_id, num_transitions, rng):
    """Draws whole subtrajectories of a buffer without replacement."""
    actions, condition = buffer["actions"], buffer.get("condition")
    index = np.arange(len(actions))
    num_windows = math.ceil(num_transitions / actions.shape[1])
    if num_windows < len(index):
        index = np.sort(rng.choice(index, num_windows, replace=False))
    observations, terminal = buffer["observations"][index], buffer["terminals"][index]
    penalty = metadata["method"] == "gta" and not metadata.get("restore_terminal_reward")
    penalty &= "maze" not in env_id.lower()  # A.1
    return Sample(
        s=observations[:, :-1],
        a=actions[index],
        r=buffer["rewards"][index],
        s_next=observations[:, 1:],
        terminal=terminal,
        penalised=terminal & penalty,
        condition=None if condition is None else condition[index],
    )


def dataset_returns(dataset, horizon):
    """The reward sums of all windows of horizon transitions in the dataset. [W]"""
    sums = []
    for e in dataset.episodes:
        total = np.concatenate([[0.0], np.cumsum(e.rewards, dtype=np.float64)])
        sums.append(total[horizon:] - total[:-horizon])
    return np.concatenate(sums)


class Reference(NamedTuple):
    """The dataset's N states and actions, to which distances are measured."""

    sa: np.ndarray  # [N, obs_dim + act_dim]
    mean: np.ndarray  # [obs_dim + act_dim]
    std: np.ndarray  # [obs_dim + act_dim]


def make_reference(dataset):
    """Returns all states and actions of the dataset with their mean and deviation."""
    states = np.concatenate([e.observations[:-1] for e in dataset.episodes])
    sa = np.column_stack([states, np.concatenate([e.actions for e in dataset.episodes])])
    sa = sa.astype(np.float64)
    std = sa.std(axis=0)
    # a dimension that is constant keeps its units
    return Reference(sa, sa.mean(axis=0), np.where(std > 1e-6, std, 1.0))


# --- oracle ---


class Answers(NamedTuple):
    """What MuJoCo says, its state set to s and stepped with a. M transitions."""

    s_next: np.ndarray  # [M, obs_dim]; NaN, as r, where the simulation breaks down
    r: np.ndarray  # [M]
    terminal: np.ndarray  # [M] bool: the environment would have terminated
    unhealthy: np.ndarray  # [M] 1 where it calls s so, NaN if it does not judge


def read_env_spec(dataset, which):
    """Returns the arguments with which gymnasium.make makes the dataset's environment.

    which is "env_spec" for the one that was recorded, "eval_env_spec" for that of evaluations. Such
    a spec in a file also names code to run, which is left alone: the code is what Gymnasium or
    gymnasium-robotics has registered for the id. Raises ValueError where that is not enough.
    """
    metadata = dataset.source.storage.metadata
    spec = json.loads(metadata.get(which) or metadata["env_spec"])
    env_id = spec["id"]
    if not re.fullmatch(r"[\w/-]+", env_id):
        raise ValueError(f"{env_id} is not the id of an environment")
    if wrappers := [wrapper["name"] for wrapper in spec.get("additional_wrappers", [])]:
        raise ValueError(f"wrappers are not supported: {', '.join(wrappers)}")
    env_id = env_id if env_id in gym.registry else f"gymnasium_robotics:{env_id}"
    steps = spec.get("max_episode_steps")
    steps = steps and int(steps)  # Minari's PointMaze datasets say 1000000.0
    return {**spec.get("kwargs", {}), "id": env_id, "max_episode_steps": steps}


@lru_cache
def oracle_env(env_spec):
    """Makes the environment of read_env_spec's arguments in JSON, once in a process."""
    return gym.make(**json.loads(env_spec)).unwrapped


def set_state(env, observation):
    """Puts MuJoCo into the state of a flattened observation. What it does not hold, the position in
    the world, is set to 0. Raises ValueError for an environment that it knows no way for."""
    if hasattr(env, "point_env"):  # PointMaze: achieved goal, desired goal, position, velocity
        env.goal = observation[2:4]
        env.point_env.set_state(observation[4:6], observation[6:8])
        return
    nq, nv = env.model.nq, env.model.nv
    if "InvertedDoublePendulum" in type(env).__name__:  # angles by sine and cosine
        angles = np.arctan2(observation[1:3], observation[3:5])
        env.set_state(np.concatenate([observation[:1], angles]), observation[5 : 5 + nv])
        return
    if hasattr(env, "observation_structure"):
        hidden = env.observation_structure.get("skipped_qpos", 0)
    else:  # version 4
        hidden = nq + nv - len(observation)
    if not 0 <= hidden <= 2:
        raise ValueError("how its observations make a state is not known")
    qpos = np.concatenate([np.zeros(hidden), observation[: nq - hidden]])
    env.set_state(qpos, observation[nq - hidden : nq - hidden + nv])


def ask_chunk(env_spec, chunk):
    """Answers for chunk, s and a of some transitions."""
    env = oracle_env(env_spec)
    env.reset(seed=0)
    answers = []
    for s, a in zip(*chunk):
        set_state(env, s.astype(np.float64))
        unhealthy = not env.is_healthy if hasattr(env, "is_healthy") else np.nan
        warnings = getattr(env, "point_env", env).data.warning.number
        warnings[:] = 0
        observation, reward, terminated, _, _ = env.step(a)
        flat = gym.spaces.utils.flatten(env.observation_space, observation)
        if warnings.any():  # numbers out of all bounds: MuJoCo has gone back to its start
            flat, reward = np.full_like(flat, np.nan), np.nan
        answers.append((flat, reward, terminated, unhealthy))
    return Answers(*(np.array(column) for column in zip(*answers)))


def ask_oracle(env_spec, s, a, workers, label):
    """Answers for s [M, obs_dim], a [M, act_dim], by several processes if that is worth it."""
    size = 2000
    chunks = [(s[i : i + size], a[i : i + size]) for i in range(0, len(s), size)]
    ask = partial(ask_chunk, env_spec)
    answers = []
    with tqdm(total=len(s), desc=f"oracle, {label}", unit="", leave=False) as bar:

        def collect(results):
            for result in results:
                answers.append(result)
                bar.update(len(result.r))

        if workers == 1 or len(chunks) < 10:  # to start a process takes 20 000 transitions' time
            collect(map(ask, chunks))
        else:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # processes inherit it
                results = pool.map(ask, chunks)
                signal.signal(signal.SIGINT, interrupt)
                collect(results)
    return Answers(*(np.concatenate(column) for column in zip(*answers)))


def find_oracle(dataset, std):
    """Returns the environment's arguments in JSON if MuJoCo reproduces what was recorded, else
    None, and a sentence that says so.

    It is tried on at most 500 recorded transitions. It fails where velocities were clipped when
    they were observed (for random actions in Walker2d, three quarters of them). If it succeeds for
    less than a twentieth, there is no oracle.
    """
    recorded = sample_dataset(dataset, 500, np.random.default_rng(0))
    try:
        env_spec = json.dumps(read_env_spec(dataset, "env_spec"))
        answers = ask_chunk(env_spec, (recorded.s[:, 0], recorded.a[:, 0]))
        same_state = dynamic_error(recorded.s_next[:, 0], answers.s_next, std) < 1e-6
    except ModuleNotFoundError:
        return None, f"none for {dataset.env_id} (it takes pip install gymnasium-robotics)"
    except Exception as error:  # whatever an unknown environment does
        return None, f"none for {dataset.env_id} ({first_line(error)})"
    same_reward = np.abs(recorded.r[:, 0] - answers.r) < 1e-3
    shares = (
        f"MuJoCo reproduces {same_state.mean():.1%} of the recorded next states, "
        f"{same_reward.mean():.1%} of the rewards"
    )
    if same_state.mean() < 0.05:
        return None, f"none for {dataset.env_id}: {shares}"
    return env_spec, shares


# --- metrics ---


def dynamic_error(s_next, s_true, std):
    """Squared error of s' in standardised dimensions, their mean (eq. 11, 14). [M, d] -> [M]"""
    return (((s_next - s_true) / std) ** 2).mean(axis=-1)


def nearest_by_product(data, half_squares, queries, rank):
    """Distance from every query to its rank-th nearest row of data. [N, d], [N], [B, d] -> [B]

    ||d||^2 / 2 - q . d, one matrix product in float64, ranks the rows; the distance to the ones it
    finds is then taken from their difference, so that a copy's is 0.
    """
    score = torch.addmm(half_squares, queries, data.T, alpha=-1)
    nearest = data[score.topk(min(rank, len(data)), largest=False).indices]  # [B, rank, d]
    return (nearest - queries[:, None]).norm(dim=-1).amax(dim=1)


def nearest_distance(data, queries, rank, device, bar):
    """Euclidean distance from every query to its rank-th nearest row of data. [M, d] -> [M]"""
    if device.type == "cpu":
        size, tree = 10_000, cKDTree(data)
    else:
        size, centre = max(1, 100_000_000 // len(data)), data.mean(axis=0)  # for the product
        data, queries = (torch.from_numpy(x - centre).to(device) for x in (data, queries))
        half_squares = (data**2).sum(dim=1) / 2
    distances = []
    for i in range(0, len(queries), size):
        chunk = queries[i : i + size]
        if device.type == "cpu":
            distances.append(tree.query(chunk, k=[rank], workers=-1)[0][:, 0])
        else:
            distances.append(nearest_by_product(data, half_squares, chunk, rank).cpu().numpy())
        bar.update(len(chunk))
    return np.concatenate(distances)


def novelty(reference, sample, rank, device, label):
    """Mean distance to the nearest transition of the dataset (eq. 12, 15), plain and squared, of
    states, actions and both, in the environment's units and standardised. Returns them by name.

    rank 2 is for the dataset itself: the distance to its nearest other transition.
    """
    obs_dim, numbers = sample.s.shape[-1], {}
    data, mean, std = reference
    queries = np.concatenate([sample.s, sample.a], axis=-1).reshape(-1, len(mean))
    parts = {"state": np.s_[:, :obs_dim], "action": np.s_[:, obs_dim:], "state-action": np.s_[:, :]}
    with tqdm(total=6 * len(queries), desc=f"nearest, {label}", unit="", leave=False) as bar:
        for units in ("raw", "standardised"):
            if units == "standardised":
                data, queries = (data - mean) / std, (queries - mean) / std
            for part, columns in parts.items():
                distance = nearest_distance(data[columns], queries[columns], rank, device, bar)
                numbers[f"{part} novelty, {units}"] = distance.mean()
                numbers[f"{part} novelty, {units}, squared"] = (distance**2).mean()
    return numbers


def correlation(x, y):
    """Pearson's correlation; NaN if one of the two does not vary. [N], [N] -> float"""
    varies = len(x) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0
    return float(np.corrcoef(x, y)[0, 1]) if varies else float("nan")


def measure(dataset, reference, sample, answers, rank, device, label):
    """All numbers of a sample by name; rank is novelty's.

    Rewards that hold a penalty are left out of the rewards, subtrajectories with one out of the
    controllability.
    """
    counted = ~sample.penalised
    whole = counted.all(axis=1)
    space = dataset.source.action_space
    at_bound = (sample.a <= space.low) | (sample.a >= space.high)
    numbers = {
        "transitions": sample.r.size,
        "reward": sample.r[counted].mean(dtype=np.float64),
        "terminal": sample.terminal.mean(),
        "actions at a bound": at_bound.mean(),
    }
    if answers:
        s_next = sample.s_next.reshape(answers.s_next.shape)
        error = dynamic_error(s_next, answers.s_next, reference.std[: s_next.shape[1]])
        numbers |= {
            "oracle reward": np.nanmean(answers.r),
            "oracle reward, not penalised": np.nanmean(answers.r.reshape(counted.shape)[counted]),
            "dynamic MSE": np.nanmean(error),
            "dynamic MSE, median": np.nanmedian(error),
            "broken down": np.isnan(answers.r).mean(),
            "oracle terminal": answers.terminal.mean(),
            "unhealthy states": answers.unhealthy.mean(),
        }
    if sample.condition is not None:
        returns = sample.r.sum(axis=1, dtype=np.float64)
        numbers["controllability"] = correlation(sample.condition[whole], returns[whole])
    return numbers | novelty(reference, sample, rank, device, label)


# --- output ---

SCREEN = {  # number -> what the table on the screen says
    "transitions": "transitions",
    "reward": "reward, as generated",
    "oracle reward, not penalised": "oracle reward of the same",
    "oracle reward": "oracle reward of all (D.3)",
    "dynamic MSE": "dynamic MSE (eq. 14)",
    "dynamic MSE, median": "dynamic MSE, median",
    "state novelty, standardised": "state novelty (eq. 15)",
    "action novelty, standardised": "action novelty",
    "state-action novelty, standardised": "state-action novelty",
    "state-action novelty, standardised, squared": "state-action novelty, squared",
    "state-action novelty, raw": "state-action novelty, raw",
    "state-action novelty, raw, squared": "state-action novelty, raw, squared",
    "broken down": "share that MuJoCo cannot simulate",
    "controllability": "controllability (F.6)",
    "terminal": "share of terminals",
    "oracle terminal": "share of terminals by MuJoCo",
    "unhealthy states": "share of unhealthy states",
    "actions at a bound": "share of actions at their bound",
}


def render(rows, form):
    """Lays out a table, a list of rows of strings whose first is the head."""
    if form == "latex":
        rows = [[re.sub(r"([%&_#])", r"\\\1", cell) for cell in row] for row in rows]
        rows = [[cell.replace("+-", r"$\pm$") for cell in row] for row in rows]
        head, *body = [" & ".join(row) + r" \\" for row in rows]
        begin = r"\begin{tabular}{l" + "r" * (len(rows[0]) - 1) + "}"
        return "\n".join([begin, head, r"\hline", *body, r"\end{tabular}"])
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        lines.append("  ".join(cells) if form == "text" else f"| {' | '.join(cells)} |")
    if form == "markdown":
        lines.insert(1, "|" + "|".join(["---", *["---:"] * (len(rows[0]) - 1)]) + "|")
    return "\n".join(lines)


def show(number):
    """A number as the table shows it."""
    if number is None:
        return "-"
    return str(number) if isinstance(number, int) else f"{number:.4g}"


def draw_figure(path, dataset, samples, answers):
    """Two pictures for every buffer: how the returns of subtrajectories are distributed (Figures
    4c, 8), and condition against generated return (Figure 7). samples and answers are by name."""
    import matplotlib

    matplotlib.use("Agg")  # no window
    import matplotlib.pyplot as plt

    plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    plt.rcParams["pdf.fonttype"] = 42  # TrueType, which publishers ask for
    size, grid = (7.0, 2.6 * len(samples)), (len(samples), 2)
    figure, axes = plt.subplots(*grid, figsize=size, squeeze=False, layout="constrained")
    for (left, right), (name, sample) in zip(axes, samples.items()):
        answer = answers[name]
        whole = ~sample.penalised.any(axis=1)
        returns = {
            "dataset": dataset_returns(dataset, sample.r.shape[1]),
            "generated": sample.r.sum(axis=1)[whole],
        }
        if answer:
            oracle = answer.r.reshape(sample.r.shape).sum(axis=1)[whole]
            returns["oracle"] = oracle[np.isfinite(oracle)]
        returns = {label: values for label, values in returns.items() if len(values)}
        # without outliers, but with all of a small buffer that lies beyond a large dataset
        low, high = zip(*(np.quantile(values, [0.002, 0.998]) for values in returns.values()))
        num_bins = int(np.clip(math.sqrt(whole.sum()), 5, 60))
        bins = np.histogram_bin_edges([], num_bins, (min(low), max(high)))
        for (label, values), colour in zip(returns.items(), ("0.6", "tab:blue", "tab:orange")):
            style = {"alpha": 0.5} if label == "dataset" else {"histtype": "step", "linewidth": 1.4}
            left.hist(values, bins, density=True, color=colour, label=label, **style)
        left.set(xlabel=f"return of {sample.r.shape[1]} transitions", ylabel="density")
        left.set_title(textwrap.fill(name, 45))
        left.legend(frameon=False)
        if sample.condition is None:
            right.set_axis_off()
            continue
        x, y = sample.condition[whole], sample.r.sum(axis=1)[whole]
        shown = np.random.default_rng(0).permutation(len(x))[:5000]
        right.scatter(x[shown], y[shown], s=4, alpha=0.3, linewidths=0, rasterized=True)
        title = f"Pearson's r = {correlation(x, y):.2f}"
        right.set(xlabel="condition", ylabel="generated return", title=title)
    write_atomically(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=200))
    return figure


def plain_number(number):
    """A NumPy number as Python's; None for NaN, which JSON does not know."""
    number = number.item() if isinstance(number, np.generic) else number
    return None if math.isnan(number) else number


def measure_buffers(args):
    """Prints the table of --aug, writes --out and --plot."""
    device = pick_device(args.device)
    require(len(set(args.aug)) == len(args.aug), "--aug: names a buffer twice")
    for path in args.aug:
        require(path.is_file(), f"--aug {path}: no such file; gta_augment.py writes it")
    dataset, loaded = None, []
    for path in args.aug:
        buffer, metadata = read_buffer(path)
        dataset = dataset or load_dataset(args.env or metadata["env"])
        require_fit(path, buffer, metadata, dataset)
        rng = np.random.default_rng(args.seed)
        sample = sample_buffer(buffer, metadata, dataset.env_id, args.num_transitions, rng)
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        about = {**metadata, "file": str(path), "sha256": sha256}
        loaded.append((describe_buffer(metadata), sample, about))
    rng = np.random.default_rng(args.seed)
    samples, buffers = {"dataset": sample_dataset(dataset, args.num_transitions, rng)}, {}
    labels = ["dataset"] + [label for label, _, _ in loaded]
    for label, sample, about in loaded:
        name = label if labels.count(label) == 1 else f"{label} {about['file']}"
        samples[name], buffers[name] = sample, about

    reference = make_reference(dataset)
    state_std = reference.std[: samples["dataset"].s.shape[-1]]
    if args.s4rl_sigma:
        noised = add_state_noise(samples["dataset"], state_std, args.s4rl_sigma, rng)
        samples[f"s4rl({args.s4rl_sigma})"] = noised
    env_spec, oracle = find_oracle(dataset, state_std)
    print(f"oracle: {oracle}")
    answers, numbers = {}, {}
    for name, sample in samples.items():
        s, a = (x.reshape(-1, x.shape[-1]) for x in (sample.s, sample.a))
        answers[name] = ask_oracle(env_spec, s, a, args.workers, name) if env_spec else None
        rank = 2 if name == "dataset" else 1
        own_numbers = measure(dataset, reference, sample, answers[name], rank, device, name)
        numbers[name] = {key: plain_number(number) for key, number in own_numbers.items()}

    rows = [[dataset.name, *samples]]
    for key, title in SCREEN.items():
        rows.append([title, *(show(own_numbers.get(key)) for own_numbers in numbers.values())])
    print(render(rows, args.table))
    report = {
        "numbers": numbers,
        "buffers": buffers,
        "dataset": dataset.name,
        "dataset_ids": dataset.ids,
        "env_id": dataset.env_id,
        "data_sha256": fingerprint(dataset),
        "standardisation": {"mean": reference.mean.tolist(), "std": reference.std.tolist()},
        "oracle": oracle,
        **provenance(),
        "args": {**plain_args(args), "aug": [str(path) for path in args.aug], "runs": []},
    }
    text = json.dumps(report, indent=2) + "\n"
    write_atomically(args.out, lambda file: file.write(text.encode()))
    print(f"wrote {args.out}")
    if args.plot:
        draw_figure(args.plot, dataset, {name: samples[name] for name in buffers}, answers)
        print(f"wrote {args.plot}")
    if args.track:
        import wandb

        entity = args.wandb_entity
        wandb.init(project=args.wandb_project, entity=entity, config=report["args"])
        wandb.log({f"{name}/{key}": x for name, own in numbers.items() for key, x in own.items()})


# --- runs ---


class Run(NamedTuple):
    row: tuple  # algorithm, augmentation
    environment: str
    scores: dict  # seed -> score of the last evaluation
    settings: dict  # what runs of one cell of the table should have in common


def read_run(folder):
    """Reads the folder of a run. None, with a line, for one that has not come to its end."""
    try:
        config = json.loads((folder / "config.json").read_text())
        types = {"script": str, "aug_label": str, "dataset": str, "train_steps": int}
        require_types(f"--runs {folder}", config, {**types, "num_seeds": int})
        evals = folder / "evals.csv"
        lines = evals.read_text().splitlines()[1:] if evals.exists() else []
        last = max((int(line.split(",")[0]) for line in lines), default=0)
        rows = [line.split(",") for line in lines]
        scores = {int(seed): float(score) for step, seed, _, score in rows if int(step) == last}
        require(all(map(math.isfinite, scores.values())), f"--runs {folder}: scores that are NaN")
        steps, num_seeds = config["train_steps"], config["num_seeds"]
        free = {"seed", "num_seeds", "env", "aug", "runs", "resume", "device", "compile", "track"}
        free |= {"wandb_project", "wandb_entity", "reference_returns", "versions", "commit"}
        free |= {"eval_workers"}
        settings = {key: value for key, value in config.items() if key not in free}
        run = Run((config["script"], config["aug_label"]), config["dataset"], scores, settings)
    except Exception as error:
        sys.exit(f"error: --runs {folder}: not a folder of a run, as runs/* ({first_line(error)})")
    if last < steps or len(scores) < num_seeds or steps == 0:
        at = f"is at update {last} of {steps}" if steps else "was only evaluated"
        print(f"left out: {folder} {at}", file=sys.stderr)
        return None
    return run


def collect_runs(folders):
    """Returns the scores of runs as {(algorithm, augmentation): {environment: {seed: score}}}.

    Of two runs of the same seed the later one counts, as their folders' names sort. Says so, and
    also where runs that share a cell were not made alike.
    """
    table, settings = defaultdict(lambda: defaultdict(dict)), {}
    by_time = sorted(folders, key=lambda folder: folder.name.split("-")[-3:])
    for folder in by_time:
        if folder.is_file():
            print(f"left out: {folder} is no folder", file=sys.stderr)
            continue
        run = read_run(folder)
        if run is None:
            continue
        cell, where = table[run.row][run.environment], f"{' + '.join(run.row)}, {run.environment}"
        if again := sorted(cell.keys() & run.scores.keys()):
            print(
                f"{where}: seed {', '.join(map(str, again))} counts as in the later {folder}",
                file=sys.stderr,
            )
        old = settings.setdefault((run.row, run.environment), run.settings)
        differ = [key for key in old | run.settings if old.get(key) != run.settings.get(key)]
        if differ:
            print(f"{where}: runs differ in {', '.join(differ)}; {folder}", file=sys.stderr)
        cell |= run.scores
    return table


def average_scores(scores, environments):
    """Each seed's mean over the environments, whose deviation is the average's (F.2). [seeds]

    scores is {environment: {seed: score}}. Empty unless every environment has the same seeds.
    """
    seeds = [set(scores.get(name, ())) for name in environments]
    if any(own != seeds[0] for own in seeds):
        return np.array([])
    return np.array(
        [np.mean([scores[name][seed] for name in environments]) for seed in sorted(seeds[0])]
    )


def welch_test(mean_a, std_a, n_a, mean_b, std_b, n_b):
    """Welch's t-test (Table 20), given sample deviations: t, degrees of freedom, two-sided p."""
    var_a, var_b = std_a**2 / n_a, std_b**2 / n_b
    if var_a + var_b == 0:
        return math.nan, math.nan, math.nan
    t = (mean_b - mean_a) / math.sqrt(var_a + var_b)
    df = (var_a + var_b) ** 2 / (var_a**2 / (n_a - 1) + var_b**2 / (n_b - 1))
    return t, df, float(2 * student_t.sf(abs(t), df))


def tabulate_runs(args):
    """Prints the results of --runs, and Welch's tests between the augmentations of a learner."""
    table = collect_runs(args.runs)
    require(table, "--runs: no run among them has come to its end")
    environments = sorted({name for scores in table.values() for name in scores})
    columns = {}  # (algorithm, augmentation) -> a list of scores [seeds] for every column
    for row in sorted(table, key=lambda row: (row[0], row[1] != "none", row[1])):
        own = [np.array(list(table[row][name].values())) for name in environments]
        columns[row] = own + [average_scores(table[row], environments)] * (len(environments) > 1)
    heads = [*environments, *["average"] * (len(environments) > 1)]
    rows = [["", *heads]]
    for (algorithm, aug), scores in columns.items():
        cells = [f"{x.mean():.1f} +- {x.std():.1f} ({len(x)})" if len(x) else "-" for x in scores]
        rows.append([algorithm + ("" if aug == "none" else f" + {aug}"), *cells])
    note = "mean +- deviation (number of seeds) of the last evaluation's scores"
    note += "; an average needs the same seeds everywhere" if len(environments) > 1 else ""
    note += "; deviations are over n, the t-test's over n - 1"
    print(note, file=sys.stderr)
    print(render(rows, args.table))
    tests = [["Welch's t-test", "", "difference", "t", "df", "p"]]
    for (row_a, a), (row_b, b) in combinations(columns.items(), 2):
        for head, x, y in zip(heads, a, b):
            if row_a[0] == row_b[0] and min(len(x), len(y)) > 1:
                moments = [m for z in (x, y) for m in (z.mean(), z.std(ddof=1), len(z))]
                t, df, p = welch_test(*moments)
                pair = f"{row_a[0]}: {row_b[1]} against {row_a[1]}"
                cells = [f"{y.mean() - x.mean():.1f}", f"{t:.2f}", f"{df:.1f}", f"{p:.4f}"]
                tests.append([pair, head, *["-" if cell == "nan" else cell for cell in cells]])
    if len(tests) > 1:
        print("\n" + render(tests, args.table))
    else:
        note = "no t-test: it takes two augmentations of a learner with two seeds each"
        print(note, file=sys.stderr)


@end_in_one_line("--num-transitions")
def main(args):
    require(bool(args.aug) != bool(args.runs), "give either --aug buffer.npz or --runs runs/*")
    require_positive(args, "num_transitions", "workers")
    require_between(args, 0, 1e6, "s4rl_sigma")
    require_between(args, 0, 2**32, "seed")
    if args.runs:
        require(args.plot is None and args.env is None, "--runs goes with neither --plot nor --env")
        return tabulate_runs(args)
    require(args.out.suffix == ".json", f"--out {args.out}: must end in .json")
    require_writable("--out", args.out)
    if args.plot:
        known = args.plot.suffix in (".png", ".pdf", ".svg")
        require(known, f"--plot {args.plot}: must end in .png, .pdf or .svg")
        require_writable("--plot", args.plot)
    measure_buffers(args)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
