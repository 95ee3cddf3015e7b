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
"""MCQ on an offline dataset, alone or with trajectories that GTA generated.

Mildly Conservative Q-Learning for Offline Reinforcement Learning (Lyu, Ma, Li and Lu, NeurIPS
2022). Soft actor-critic whose critics are also trained at the policy's own actions, towards the
largest Q among actions of a behaviour policy, a conditional VAE of the dataset's actions. The
algorithm is under "MCQ" below. References such as C.3 are to the appendix of the GTA paper.

    python mcq.py --env hopper-medium          the dataset alone
    python mcq.py --aug buffer.npz             the dataset and the buffer
    python mcq.py --aug buffer.npz --aug-only  the buffer alone
    python mcq.py --resume runs/<name>         a run that was killed, from its last evaluation

Reads:  an offline dataset (--env) and a buffer of gta_augment.py (--aug)
Writes: runs/<script>-<env>-<aug>-<seed>-<time>/ with config.json, evals.csv, policy.pt
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
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import minari
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from huggingface_hub import HfApi
from minari.storage.datasets_root_dir import get_dataset_path
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from tqdm import tqdm


@dataclass
class Args:
    env: str | None = None
    """dataset: a short name (hopper-medium), a Minari id (mujoco/hopper/medium-v0), a folder that
    holds a Minari dataset, or several of them joined by +. Default: the one that --aug was made
    from, else data/hopper-medium-sample"""
    aug: Path | None = None
    """buffer.npz of generated trajectories to train on, too"""
    aug_only: bool = False
    """train on the buffer alone"""
    s4rl_sigma: float = 0.0
    """> 0 is the S4RL baseline: standard deviation of noise on standardised states (C.1: 3e-4)"""
    train_steps: int = 1_000_000
    """updates (C.3)"""
    batch_size: int = 1024
    """transitions in a batch (C.3)"""
    num_seeds: int = 1
    """independent agents trained at once, with seeds --seed, --seed + 1, ..."""
    lr: float = 3e-4
    """learning rate of Adam: actor, critics and temperature"""
    vae_lr: float = 1e-3
    """learning rate of Adam: behaviour policy"""
    discount: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """step of the target networks towards the trained ones (Polyak averaging)"""
    lmbda: float = 0.9
    """weight of the loss at the data, lambda; 1 - lambda is that of the policy's actions"""
    num_actions: int = 10
    """sampled actions of the behaviour policy, the best of which gives the target"""
    actor_dropout: float = 0.1
    """dropout in the actor"""
    normalize_reward: bool = False
    """scale rewards so that the dataset's episode returns span 1000 (IQL's locomotion)"""
    reward_scale: float = 1.0
    """training sees reward_scale * reward + reward_bias; evaluation counts the plain rewards"""
    reward_bias: float | None = None
    """see --reward-scale. Default: -1 in AntMaze, else 0"""
    eval_every: int = 5_000
    """updates between two evaluations; the last update always has one"""
    eval_episodes: int | None = None
    """episodes of an evaluation (C.3). Default: 10 in locomotion, else 100"""
    eval_workers: int | None = None
    """processes that step the environments of an evaluation; 0: this one does. The results are the
    same. Default: on CUDA one per core, else 0"""
    load: Path | None = None
    """policy.pt to start from. Its agents keep their number and seeds, their optimizers start anew.
    With --train-steps 0 it is only evaluated"""
    resume: Path | None = None
    """folder of a run that was killed: continues it from its last evaluation, with its flags"""
    runs: Path = Path("runs")
    """folder for the run's folder"""
    seed: int = 0
    """seed of initial weights, batches, noise and evaluation episodes"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cuda, cuda:1, cpu"""
    compile: bool | None = None
    """compile the losses with torch.compile, and record the update as a CUDA graph. Default: on
    CUDA; on a CPU it gains nothing"""
    track: bool = False
    """log to Weights & Biases"""
    wandb_project: str = "gta"
    """project of --track"""
    wandb_entity: str | None = None
    """user or team of --track"""


BY_DOMAIN = {  # what differs by domain; a flag overrides it
    "default": {"eval_episodes": 100, "reward_bias": 0.0},  # GTA, C.3
    "locomotion": {"eval_episodes": 10},
    "antmaze": {"reward_bias": -1.0},  # OfflineRL-Kit
}

POLICY_FLAGS = ("actor_dropout",)  # what defines a policy beside its weights


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


DOMAINS = {"antmaze": "antmaze", "maze": "maze2d", "adroit": "adroit", "kitchen": "kitchen"}


def domain_of(env_id):
    """Returns the domain of a Gymnasium id: locomotion, maze2d, antmaze, adroit or kitchen."""
    return next((d for word, d in DOMAINS.items() if word in env_id.lower()), "locomotion")


def fill_in_by_domain(args, env_id):
    """Sets the arguments that were left at None to those of the environment's domain."""
    values = {**BY_DOMAIN["default"], **BY_DOMAIN.get(domain_of(env_id), {})}
    for key, value in values.items():
        if getattr(args, key) is None:
            setattr(args, key, value)


REFERENCE_RETURNS = {  # of a random and of an expert policy, from D4RL
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "antmaze": (0.0, 1.0),
    "pointmaze_umaze": (23.85, 161.86),
    "pointmaze_medium": (13.13, 277.39),
    "pointmaze_large": (6.7, 273.99),
    "adroithandpen": (96.262799, 3076.8331),
    "adroithanddoor": (-56.512833, 2880.5693),
    "adroithandhammer": (-274.856578, 12794.134825),
    "adroithandrelocate": (-6.425911, 4233.877797),
    "kitchen": (0.0, 4.0),
}


def reference_returns(dataset):
    """Returns what scores 0 and what scores 100: the dataset's own references, else D4RL's."""
    metadata = dataset.source.storage.metadata
    if "ref_min_score" in metadata and "ref_max_score" in metadata:
        low, high = references = metadata["ref_min_score"], metadata["ref_max_score"]
        known = all(isinstance(x, int | float) and abs(x) < 1e12 for x in references)
        require(known and low < high, f"the dataset's reference scores are {low} and {high}")
        return references
    for word, references in REFERENCE_RETURNS.items():
        if word in dataset.env_id.lower() and "dense" not in dataset.env_id.lower():
            return references
    print(f"no reference returns for {dataset.env_id}: the scores are plain returns")
    return 0.0, 100.0


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


class Scaling(NamedTuple):
    """Affine maps between the environment's units and the learner's."""

    obs_mean: np.ndarray  # [obs_dim] float32
    obs_std: np.ndarray  # [obs_dim] float32
    action_low: np.ndarray  # [act_dim] float32; the learner's actions span [-1, 1]
    action_high: np.ndarray  # [act_dim] float32

    def states(self, observations):
        return ((observations - self.obs_mean) / self.obs_std).astype(np.float32)

    def actions(self, actions):
        span = self.action_high - self.action_low
        return (2 * (actions - self.action_low) / span - 1).astype(np.float32)

    def env_actions(self, actions):
        return self.action_low + (actions + 1) / 2 * (self.action_high - self.action_low)


def load_episodes(args):
    """Loads what --env, --aug and --aug-only ask for.

    Fills in args.env. Returns the dataset, the episodes to train on (generated windows are
    episodes, too, and come last), the buffer's arrays or None, and the words that name the
    augmentation.
    """
    require(args.aug or not args.aug_only, "--aug-only needs --aug buffer.npz")
    s4rl = f"s4rl({args.s4rl_sigma})" if args.s4rl_sigma else ""
    if args.aug is None:
        args.env = args.env or "data/hopper-medium-sample"
        dataset = load_dataset(args.env)
        return dataset, dataset.episodes, None, s4rl or "none"
    buffer, metadata = read_buffer(args.aug)
    args.env = args.env or metadata["env"]
    dataset = load_dataset(args.env)
    require_fit(args.aug, buffer, metadata, dataset)
    keys = ("observations", "actions", "rewards", "terminals")
    generated = [Episode(*window) for window in zip(*(buffer[key] for key in keys))]
    aug = describe_buffer(metadata) + (" only" if args.aug_only else "")
    print(f"buffer: {args.aug}, {aug}, {buffer['rewards'].size} transitions")
    aug += f" + {s4rl}" if s4rl else ""
    episodes = generated if args.aug_only else dataset.episodes + generated
    return dataset, episodes, buffer, aug


def scale_rewards(episodes, dataset, args):
    """Returns the episodes with the rewards to train on: reward_scale * r + reward_bias."""
    scale = args.reward_scale
    if args.normalize_reward:
        returns = [e.rewards.sum() for e in dataset.episodes]
        span = max(returns) - min(returns)
        require(span > 0, "--normalize-reward: all episodes of the dataset have the same return")
        scale *= 1000 / span
    return [e._replace(rewards=scale * e.rewards + args.reward_bias) for e in episodes]


def fingerprint(dataset, buffer=None):
    """Returns a hash of all that the dataset and the buffer, if there is one, hold."""
    digest = hashlib.sha256()
    for array in [array for episode in dataset.episodes for array in episode]:
        digest.update(np.ascontiguousarray(array))
    for key in sorted(buffer or ()):
        digest.update(np.ascontiguousarray(buffer[key]))
    return digest.hexdigest()


def make_scaling(episodes, action_space):
    """Standardises states by the mean and deviation of all episodes, maps actions to [-1, 1]."""
    states = np.concatenate([e.observations[:-1] for e in episodes])
    bounded = np.isfinite(action_space.low).all() and np.isfinite(action_space.high).all()
    require(bounded, f"the action space must be bounded, not {action_space}")
    return Scaling(
        states.mean(0, dtype=np.float64).astype(np.float32),
        (states.std(0, dtype=np.float64) + 1e-3).astype(np.float32),
        action_space.low,
        action_space.high,
    )


def pack_transitions(episodes, scaling, device):
    """Returns all transitions as rows of one tensor, so that a batch is one gather.

    A row is s, a, r, s', terminal: [N, 2 obs_dim + act_dim + 2].
    """
    s = scaling.states(np.concatenate([e.observations[:-1] for e in episodes]))
    a = scaling.actions(np.concatenate([e.actions for e in episodes]))
    r = np.concatenate([e.rewards for e in episodes])
    s_next = scaling.states(np.concatenate([e.observations[1:] for e in episodes]))
    terminal = np.concatenate([e.terminals for e in episodes])
    packed = np.column_stack([s, a, r, s_next, terminal]).astype(np.float32)
    return torch.from_numpy(packed).to(device)


class Batch(NamedTuple):  # of one agent; a leading [num_seeds] outside of vmap
    s: torch.Tensor  # [B, obs_dim] standardised
    a: torch.Tensor  # [B, act_dim] in [-1, 1]
    r: torch.Tensor  # [B]
    s_next: torch.Tensor  # [B, obs_dim]
    terminal: torch.Tensor  # [B] 0 or 1


def draw_batch(data, num_seeds, batch_size, obs_dim, act_dim, s4rl_sigma):
    """Draws a batch for every agent from the packed transitions. All fields [num_seeds, B, ...]"""
    index = torch.randint(len(data), (num_seeds, batch_size), device=data.device)
    s, a, r, s_next, terminal = data[index].split([obs_dim, act_dim, 1, obs_dim, 1], dim=-1)
    if s4rl_sigma:
        s = s + s4rl_sigma * torch.randn_like(s)
        s_next = s_next + s4rl_sigma * torch.randn_like(s_next)
    return Batch(s, a, r.squeeze(-1), s_next, terminal.squeeze(-1))


# --- networks ---


def mlp(*sizes, dropout=0.0):
    """Linear layers with ReLU, and dropout if there is any, between them: mlp(11, 256, 256, 3)."""
    layers = [nn.Linear(*sizes[:2])]
    for size_in, size_out in zip(sizes[1:-1], sizes[2:]):
        layers += [nn.ReLU(), nn.Dropout(dropout)] if dropout else [nn.ReLU()]
        layers.append(nn.Linear(size_in, size_out))
    return nn.Sequential(*layers)


class MCQActor(nn.Module):
    """Mean and log standard deviation of a before its tanh. [B, obs_dim] -> two of [B, act_dim]"""

    def __init__(self, obs_dim, act_dim, dropout):
        super().__init__()
        self.net = mlp(obs_dim, 400, 400, 2 * act_dim, dropout=dropout)

    def forward(self, s):
        mean, log_std = self.net(s).chunk(2, dim=-1)
        return mean, log_std.clamp(-5.0, 2.0)


class TwinCritic(nn.Module):
    """Q_1 and Q_2. s [..., obs_dim], a [..., act_dim] -> two of [...]"""

    def __init__(self, obs_dim, act_dim, hidden=(256, 256)):
        super().__init__()
        self.q1 = mlp(obs_dim + act_dim, *hidden, 1)
        self.q2 = mlp(obs_dim + act_dim, *hidden, 1)

    def forward(self, s, a):
        sa = torch.cat([s, a], dim=-1)
        return self.q1(sa).squeeze(-1), self.q2(sa).squeeze(-1)


class Encoder(nn.Module):
    """Mean and log standard deviation of the latent of an action. s [B, obs_dim], a [B, act_dim] ->
    two of [B, 2 act_dim]"""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.net = mlp(obs_dim + act_dim, 750, 750, 4 * act_dim)

    def forward(self, s, a):
        mean, log_std = self.net(torch.cat([s, a], dim=-1)).chunk(2, dim=-1)
        return mean, log_std.clamp(-4.0, 15.0)


class Decoder(nn.Module):
    """The action of a latent. s [..., obs_dim], z [..., 2 act_dim] -> [..., act_dim] in [-1, 1]"""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.net = mlp(obs_dim + 2 * act_dim, 750, 750, act_dim)

    def forward(self, s, z):
        return torch.tanh(self.net(torch.cat([s, z], dim=-1)))


# --- all agents at once ---


class Stacked:
    """One network of all agents: its weights are stacked, every tensor is [num_seeds, ...].

    Networks and losses are written for one agent: bind(weights of one agent)(s) is its forward.
    lift runs them for all agents.
    """

    def __init__(self, networks, device):
        params, _ = stack_module_state(networks)
        self.params = {k: p.detach().to(device).requires_grad_() for k, p in params.items()}
        self.module = copy.deepcopy(networks[0]).to("meta")  # the function without weights

    def bind(self, params):
        """Returns the network of one agent, given its weights, as a function."""
        return lambda *inputs: functional_call(self.module, params, inputs)

    def copy_params(self):
        """Returns the weights of target networks that start where these are."""
        return {k: p.detach().clone() for k, p in self.params.items()}


def adam(networks, device):
    """Returns an Adam for networks, a list of (weights by name, learning rate)."""
    groups = [{"params": list(params.values()), "lr": lr} for params, lr in networks]
    return torch.optim.Adam(groups, fused=True, capturable=device.type == "cuda")


def descend(optimizer, losses):
    """Takes a step on losses [num_seeds]. Their sum gives each agent the gradient of its own."""
    optimizer.zero_grad()
    # not torch.autograd.grad: the fused optimizer misreads a gradient that is laid out in memory
    # otherwise than its weight, and only backward makes them alike
    losses.sum().backward(inputs=[p for g in optimizer.param_groups for p in g["params"]])
    optimizer.step()


@torch.no_grad()
def polyak(target, params, tau):
    """Moves the target's weights by the share tau towards the network's."""
    torch._foreach_lerp_(list(target.values()), [p.detach() for p in params.values()], tau)


def unbind(x):
    """Splits tensors, in dictionaries and named tuples too, into those of each agent."""
    if torch.is_tensor(x):
        return x.unbind() if len(x) > 1 else [x.squeeze(0)]  # unbind's gradient is a copy
    if isinstance(x, dict):
        return [dict(zip(x, own)) for own in zip(*map(unbind, x.values()))]
    return [type(x)(*own) for own in zip(*map(unbind, x))]


def lift(function, args, device):
    """Turns a function of one agent into one of all: all tensors get a leading [num_seeds].

    function returns a tensor or a dictionary of them. Several agents on a GPU run at once, by vmap.
    Else they run one by one: that spares one agent vmap's own cost, and a CPU's cache holds one at
    a time.
    """

    def lifted(*inputs):
        agents = list(zip(*map(unbind, inputs)))
        if device.type == "cuda" and len(agents) > 1:
            return vmap(function, randomness="different")(*inputs)
        outputs = [function(*own) for own in agents]
        if torch.is_tensor(outputs[0]):
            return torch.stack(outputs)
        return {key: torch.stack([own[key] for own in outputs]) for key in outputs[0]}

    return torch.compile(lifted) if compiles(args, device) else lifted


def compiles(args, device):
    """Whether losses are compiled and, on a GPU, updates recorded as CUDA graphs."""
    return device.type == "cuda" if args.compile is None else args.compile


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


# --- MCQ ---


class MCQNoise(NamedTuple):
    """Unit normal noise of an update, n = --num-actions; a leading [num_seeds] outside of vmap."""

    vae: torch.Tensor  # [B, 2 act_dim]: latents of the VAE's loss
    target: torch.Tensor  # [B, act_dim]: next actions of the target
    behaviour: torch.Tensor  # [2B, n, 2 act_dim]: latents of the behaviour policy's actions
    policy: torch.Tensor  # [2B, act_dim]: the policy's actions in s and s'
    actor: torch.Tensor  # [B, act_dim]: actions of the actor's loss

    @classmethod
    def draw(cls, a, args):
        """Draws for a batch whose actions are a [num_seeds, B, act_dim]."""
        num_seeds, B, A = a.shape
        shapes = [(B, 2 * A), (B, A), (2 * B, args.num_actions, 2 * A), (2 * B, A), (B, A)]
        return cls(*(torch.randn(num_seeds, *shape, device=a.device) for shape in shapes))


def gaussian_log_prob(mean, log_std, x):
    """log N(x; mean, exp(log_std)^2), summed over the last dimension."""
    z = (x - mean) * (-log_std).exp()
    return (-0.5 * z**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def tanh_gaussian(mean, log_std, noise):
    """Actions tanh(x), x = mean + exp(log_std) noise, and their log density.

    All [..., act_dim]; the density is [...]. It is computed from x, so that it stays finite where
    tanh(x) rounds to 1 or -1.
    """
    x = mean + log_std.exp() * noise
    log_derivative = 2 * (math.log(2) - x - F.softplus(-2 * x))  # log (1 - tanh(x)^2)
    return torch.tanh(x), gaussian_log_prob(mean, log_std, x) - log_derivative.sum(-1)


def repeat(x, n):
    """[B, ...] -> [B, n, ...]"""
    return x.unsqueeze(1).expand(-1, n, *x.shape[1:])


def sac_actor_loss(critic, s, a, log_pi, alpha):
    """alpha log pi(a | s) - min Q(s, a), a drawn from pi (SAC, eq. 7), for one agent."""
    return (alpha * log_pi - torch.min(*critic(s, a))).mean()


def sac_temperature_loss(log_alpha, log_pi, act_dim):
    """Moves the temperature until the entropy of pi is -act_dim (SAC, eq. 18)."""
    return -(log_alpha * (log_pi.detach() - act_dim).mean())


def vae_loss(encoder, decoder, batch, noise):
    """Reconstruction error and KL divergence from the unit normal, both means over dimensions."""
    mean, log_std = encoder(batch.s, batch.a)
    recon = decoder(batch.s, mean + log_std.exp() * noise.vae)
    kl = -0.5 * (1 + 2 * log_std - mean.square() - (2 * log_std).exp()).mean()
    return F.mse_loss(recon, batch.a) + kl


def clamped_alpha(log_alpha):
    """The temperature, at most 1."""
    return log_alpha.exp().detach().clamp(max=1.0)


def mcq_critic_loss(critic, critic_target, actor, decoder, log_alpha, batch, noise, args):
    """The loss at the data and at the policy's own actions, for one agent (MCQ, Algorithm 1).

    Targets at the data: r + gamma (min Q(s', a') - alpha log pi(a' | s')), a' drawn from pi. At the
    policy's actions in s and in s': the largest of each target Q over the behaviour policy's
    actions, then the smaller of the two.
    """
    with torch.no_grad():
        a_next, log_pi = tanh_gaussian(*actor(batch.s_next), noise.target)
        q_next = torch.min(*critic_target(batch.s_next, a_next)) - clamped_alpha(log_alpha) * log_pi
        target = batch.r + args.discount * (1 - batch.terminal) * q_next
        s = torch.cat([batch.s, batch.s_next])  # [2B, obs_dim]
        s_n = repeat(s, args.num_actions)
        a_behaviour = decoder(s_n, noise.behaviour.clamp(-0.5, 0.5))  # [2B, n, act_dim]
        target_ood = torch.min(*(q.amax(-1) for q in critic_target(s_n, a_behaviour)))
        a_ood, _ = tanh_gaussian(*actor(s), noise.policy)
    loss = sum(F.mse_loss(q, target) for q in critic(batch.s, batch.a))
    loss_ood = sum(F.mse_loss(q, target_ood) for q in critic(s, a_ood))
    return args.lmbda * loss + (1 - args.lmbda) * loss_ood


def mcq_actor_losses(actor, critic, log_alpha, batch, noise):
    """The losses of actor and temperature."""
    a, log_pi = tanh_gaussian(*actor(batch.s), noise.actor)
    return {
        "actor_loss": sac_actor_loss(critic, batch.s, a, log_pi, clamped_alpha(log_alpha)),
        "alpha_loss": sac_temperature_loss(log_alpha, log_pi, a.shape[-1]),
    }


class MCQ:
    """num_seeds agents of MCQ: networks, target networks, temperature, optimizers."""

    def __init__(self, args, obs_dim, act_dim, device):
        actors, critics, encoders, decoders = [], [], [], []
        for seed in range(args.seed, args.seed + args.num_seeds):
            torch.manual_seed(seed)
            actors.append(MCQActor(obs_dim, act_dim, args.actor_dropout))
            critics.append(TwinCritic(obs_dim, act_dim, (400, 400)))
            encoders.append(Encoder(obs_dim, act_dim))
            decoders.append(Decoder(obs_dim, act_dim))
        self.actor, self.critic = Stacked(actors, device), Stacked(critics, device)
        self.encoder, self.decoder = Stacked(encoders, device), Stacked(decoders, device)
        self.critic_target = self.critic.copy_params()
        log_alpha = torch.zeros(args.num_seeds, device=device, requires_grad=True)
        self.temperature = {"log_alpha": log_alpha}
        self.weights = {  # all that policy.pt holds
            "actor": self.actor.params,
            "critic": self.critic.params,
            "critic_target": self.critic_target,
            "encoder": self.encoder.params,
            "decoder": self.decoder.params,
            "temperature": self.temperature,
        }
        actor = [(self.actor.params, args.lr), (self.temperature, args.lr)]
        vae = [(self.encoder.params, args.vae_lr), (self.decoder.params, args.vae_lr)]
        self.optimizers = {
            "vae": adam(vae, device),
            "critic": adam([(self.critic.params, args.lr)], device),
            "actor": adam(actor, device),
        }
        self.device = device

    @torch.no_grad()
    def act(self, s):
        """The actions to take in standardised states. [num_seeds, K, obs_dim] -> [.., act_dim]"""
        self.actor.module.eval()  # no dropout
        mean, _ = vmap(lambda params, s: self.actor.bind(params)(s))(self.actor.params, s)
        self.actor.module.train()
        return torch.tanh(mean)


def update(agents, batch, noise, args):
    """One update of every agent, each on its own batch: VAE, critics, then actor and temperature.

    The fields of batch and noise are [num_seeds, B, ...]. Returns the losses by name, [num_seeds].
    """
    bind_actor, bind_critic = agents.actor.bind, agents.critic.bind
    bind_encoder, bind_decoder = agents.encoder.bind, agents.decoder.bind
    actor_params, critic_params = agents.actor.params, agents.critic.params
    encoder_params, decoder_params = agents.encoder.params, agents.decoder.params
    log_alpha = agents.temperature["log_alpha"]

    def vae_losses(encoder_params, decoder_params, batch, noise):
        return vae_loss(bind_encoder(encoder_params), bind_decoder(decoder_params), batch, noise)

    def critic_losses(critic_params, target_params, actor_params, decoder_params, *rest):
        critic, critic_target = bind_critic(critic_params), bind_critic(target_params)
        actor, decoder = bind_actor(actor_params), bind_decoder(decoder_params)
        return mcq_critic_loss(critic, critic_target, actor, decoder, *rest, args)

    def actor_losses(actor_params, critic_params, log_alpha, batch, noise):
        actor, critic = bind_actor(actor_params), bind_critic(critic_params)
        return mcq_actor_losses(actor, critic, log_alpha, batch, noise)

    losses = {
        "vae_loss": lift(vae_losses, args, agents.device)(
            encoder_params, decoder_params, batch, noise
        )
    }
    descend(agents.optimizers["vae"], losses["vae_loss"])
    params = (critic_params, agents.critic_target, actor_params, decoder_params)
    losses["critic_loss"] = lift(critic_losses, args, agents.device)(
        *params, log_alpha, batch, noise
    )
    descend(agents.optimizers["critic"], losses["critic_loss"])
    params = (actor_params, critic_params)
    losses |= lift(actor_losses, args, agents.device)(*params, log_alpha, batch, noise)
    descend(agents.optimizers["actor"], losses["actor_loss"] + losses["alpha_loss"])
    polyak(agents.critic_target, critic_params, args.tau)
    return {name: loss.detach() for name, loss in losses.items()}


# --- evaluation ---


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


def make_env(spec):
    """Makes an environment from arguments of gym.make, its observations flattened."""
    return gym.wrappers.FlattenObservation(gym.make(**spec))


def find_eval_env(dataset):
    """Returns the arguments of gym.make for the dataset's own evaluation environment. Ends the
    program with one line if it cannot be made here.

    Kitchen's datasets reward a completed task at every step. D4RL's references, 0 and 4, are of
    evaluations that count it once, and end when all are done.
    """
    try:
        spec = read_env_spec(dataset, "eval_env_spec")
        if "Kitchen" in dataset.env_id and "ref_max_score" not in dataset.source.storage.metadata:
            spec |= {"remove_task_when_completed": True, "terminate_on_tasks_completed": True}
        env = make_env(spec)
    except ModuleNotFoundError as error:
        missing = (error.__cause__ or error).name
        sys.exit(
            f"error: {dataset.env_id} needs the package {missing}; pip install gymnasium-robotics"
        )
    except Exception as error:
        version = importlib.metadata.version("mujoco")
        sys.exit(
            f"error: {dataset.env_id} cannot be made with mujoco {version} ({first_line(error)})"
        )
    own, other = env.observation_space.shape, dataset.episodes[0].observations.shape[1:]
    require(own == other, f"{dataset.env_id} observes {own} numbers, the dataset holds {other}")
    return spec


class Envs:
    """N environments that step side by side, each until its episode ends.

    reset and step return states [N, obs_dim], rewards [N], and which episodes go on, bool [N]. One
    that has ended keeps its last state and gets no more reward.
    """

    def __init__(self, spec, num_envs):
        self.num_envs = num_envs
        self.envs = [make_env(spec) for _ in range(num_envs)]
        self.states = np.zeros((num_envs, *self.envs[0].observation_space.shape))
        self.alive = np.zeros(num_envs, bool)

    def reset(self, seeds):
        """Starts an episode where the seed, of seeds [N], is not negative."""
        self.alive[:] = seeds >= 0
        for i in np.flatnonzero(self.alive):
            self.states[i], _ = self.envs[i].reset(seed=int(seeds[i]))
        return self.states, np.zeros(self.num_envs), self.alive

    def step(self, actions):
        """Takes actions [N, act_dim]."""
        rewards = np.zeros(self.num_envs)
        for i in np.flatnonzero(self.alive):
            self.states[i], rewards[i], terminated, truncated, _ = self.envs[i].step(actions[i])
            self.alive[i] = not (terminated or truncated)
        return self.states, rewards, self.alive


def serve_envs(pipe, spec, num_envs):
    """What a worker process does: its environments do what the pipe asks until the program ends."""
    warnings.simplefilter("ignore")  # the program has shown them
    envs = Envs(spec, num_envs)
    while True:
        try:
            method, values = pipe.recv()
        except (EOFError, OSError):
            return
        answer = getattr(envs, method)(values)
        with suppress(OSError):
            pipe.send(answer)


class WorkerEnvs:
    """Envs that W worker processes step: environment i is one of worker i % W.

    All of a worker's environments share a message: one takes as long as half a step of MuJoCo.
    """

    def __init__(self, pipes, num_envs):
        self.pipes, self.num_envs = pipes, num_envs

    def ask(self, method, values):
        W = len(self.pipes)
        try:
            for w, pipe in enumerate(self.pipes):
                pipe.send((method, values[w::W]))
            answers = [pipe.recv() for pipe in self.pipes]
        except (EOFError, OSError):
            sys.exit(
                "error: a process that steps environments has died; if memory ran out, lower "
                "--eval-workers"
            )
        merged = [np.empty((self.num_envs, *x.shape[1:]), x.dtype) for x in answers[0]]
        for w, answer in enumerate(answers):
            for whole, part in zip(merged, answer):
                whole[w::W] = part
        return merged

    def reset(self, seeds):
        return self.ask("reset", seeds)

    def step(self, actions):
        return self.ask("step", actions)


@contextmanager
def open_envs(spec, args, device):
    """Gives the environments of evaluations, min(--eval-episodes, 10) for every agent, in this
    process or in --eval-workers others. Those start while training goes on, and end with it."""
    num_envs = args.num_seeds * min(args.eval_episodes, 10)
    num_workers = args.eval_workers
    if num_workers is None:
        has_affinity = hasattr(os, "sched_getaffinity")  # the cores that this program may use
        cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
        num_workers = cores if device.type == "cuda" else 0
    num_workers = min(num_workers, num_envs)
    if num_workers == 0:
        yield Envs(spec, num_envs)
        return
    context, pipes, processes = get_context("spawn"), [], []
    try:
        # Ctrl-C reaches workers, too. They inherit that it is ignored: main saves, then ends them
        signals = (signal.SIGINT, signal.SIGTERM)
        old = [signal.signal(own, signal.SIG_IGN) for own in signals]
        try:
            for w in range(num_workers):
                pipe, end = context.Pipe()
                pipes.append(pipe)
                inputs = (end, spec, len(range(w, num_envs, num_workers)))
                process = context.Process(target=serve_envs, args=inputs, daemon=True)
                process.start()
                processes.append(process)
                end.close()  # only the worker's is left: its death shows
        except OSError as error:
            sys.exit(f"error: --eval-workers {num_workers}: cannot be started ({error.strerror})")
        finally:
            for own, handler in zip(signals, old):
                signal.signal(own, handler)
        yield WorkerEnvs(pipes, num_envs)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def episode_seeds(first, num_parallel, args):
    """Returns the seeds [num_seeds * num_parallel] of the episodes from number first on of every
    agent, -1 for those after the last."""
    episodes = first + np.arange(num_parallel)
    seeds = 1000 * (args.seed + np.arange(args.num_seeds))[:, None] + episodes
    return np.where(episodes < args.eval_episodes, seeds, -1).ravel()


def evaluate(agents, envs, scaling, args, device):
    """Runs --eval-episodes whole episodes of every agent. Returns their mean returns [num_seeds].

    envs are num_seeds * K environments. Episode e of an agent starts from the same state in every
    evaluation.
    """
    shape = (args.num_seeds, envs.num_envs // args.num_seeds)
    returns = np.zeros(args.num_seeds)
    for first in range(0, args.eval_episodes, shape[1]):
        states, _, alive = envs.reset(episode_seeds(first, shape[1], args))
        while alive.any():
            s = torch.from_numpy(scaling.states(states)).to(device)
            actions = agents.act(s.view(*shape, -1)).cpu().numpy()
            actions = scaling.env_actions(actions).reshape(envs.num_envs, -1)
            states, rewards, alive = envs.step(actions)
            returns += rewards.reshape(shape).sum(axis=1)
    return returns / args.eval_episodes


# --- run ---


def load_policy(path, flag):
    """Reads policy.pt as plain tensors and values; nothing in it is executed."""
    script = Path(__file__).stem
    require(path.is_file(), f"{flag} {path}: no such file; the first evaluation of a run writes it")
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # compares checksums, which torch.load does not
        require(not damaged, f"{flag} {path}: not a whole policy.pt, {damaged} in it is damaged")
        policy = torch.load(path, map_location="cpu", weights_only=True)
        kind, version = str(policy["format"]), int(policy["format_version"])
    except Exception as error:
        sys.exit(f"error: {flag} {path}: not a whole policy.pt ({type(error).__name__})")
    require(kind == "gta-policy", f"{flag} {path}: a {kind} file, not a policy")
    require(version == 2, f"{flag} {path}: format version {version}; this program reads version 2")
    algorithm = policy.get("algorithm")
    require(algorithm == script, f"{flag} {path}: a policy of {algorithm}.py, not of {script}.py")
    types = {"args": dict, "env_id": str, "aug_label": str, "data_sha256": str, "scaling": dict}
    types |= {"weights": dict, "optimizers": dict, "rng": dict, "update": int, "evals": list}
    require_types(f"{flag} {path}", policy, types)
    return policy


def load_start(args):
    """Returns the policy.pt that --load or --resume names, or None, and takes over its flags.

    --load takes the number of agents, their seeds, what defines the policy (POLICY_FLAGS, unless
    typed) and, if no data is named, the dataset. --resume takes every flag that makes a difference,
    and exits if another value of one was typed.
    """
    require(not (args.load and args.resume), "--load and --resume exclude each other")
    default, types = plain_args(Args()), {f.name: f.type for f in fields(Args)}
    types["aug"] = str | None
    if args.load:
        path = args.load / "policy.pt" if args.load.is_dir() else args.load
        policy = load_policy(path, "--load")
        keys = ("num_seeds", "seed", "env", *POLICY_FLAGS)
        require_types(f"--load {path}", policy["args"], {key: types[key] for key in keys})
        args.num_seeds, args.seed = policy["args"]["num_seeds"], policy["args"]["seed"]
        print(f"loaded {args.num_seeds} agents, seeds from {args.seed} on")
        args.env = args.env or (policy["args"]["env"] if args.aug is None else None)
        for key in POLICY_FLAGS:
            if getattr(args, key) == default[key]:
                setattr(args, key, policy["args"][key])
        return policy
    if args.resume is None:
        return None
    args.resume = args.resume.parent if args.resume.name == "policy.pt" else args.resume
    policy = load_policy(args.resume / "policy.pt", "--resume")
    free = {"resume", "load", "runs", "device", "compile", "track", "eval_workers"}
    keys = [key for key in types if key not in free and not key.startswith("wandb")]
    where = f"--resume {args.resume}"
    require_types(where, policy["args"], {key: types[key] for key in keys})
    for key in keys:
        typed, old = plain_args(args)[key], policy["args"][key]
        if key in ("env", "aug"):  # may have moved; a hash tells whether they are the same
            old = typed or old
        flag = f"--{key.replace('_', '-')}"
        require(
            typed in (old, default[key]),
            f"{where}: was trained with {flag} {old}, not {typed}; give no other flags than those "
            "of the device, of wandb, and where data has moved",
        )
        setattr(args, key, Path(old) if key == "aug" and old else old)
    return policy


def put_weights(agents, policy):
    """Copies the weights of policy.pt into agents."""
    for name, params in agents.weights.items():
        require_types("policy.pt", policy["weights"], {name: dict})
        for key, p in params.items():
            own = policy["weights"][name].get(key)
            fits = has_form(own, p)
            require(fits, f"policy.pt: {name} {key} does not fit this network; use the same flags")
            p.data.copy_(own)


def put_training_state(agents, policy, device):
    """Puts the optimizers and the random generators back to where policy.pt was written."""
    try:
        for name, optimizer in agents.optimizers.items():
            put_moments(optimizer, policy["optimizers"][name])
        set_rng_state(policy["rng"], device)
        rows = [torch.tensor(row) for row in policy["evals"]]
        if not all(has_form(row, torch.zeros(4)) for row in rows):
            raise ValueError("an evaluation is four numbers")
    except Exception as error:
        sys.exit(f"error: policy.pt: does not fit together ({first_line(error)})")


def start_run(args, dataset, about_data, references):
    """Makes the run's folder with config.json, or takes that of --resume. Returns it."""
    script = Path(__file__).stem
    now = datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    label = f"{script}-{dataset.name}-{about_data['aug_label']}-{args.seed}-{now}"
    run = args.resume or args.runs / re.sub(r"[^\w.+-]+", "_", label)
    config = {
        "script": script,
        **plain_args(args),
        "aug_label": about_data["aug_label"],
        "dataset": dataset.name,
        "dataset_ids": dataset.ids,
        "data_sha256": about_data["data_sha256"],
        "env_id": dataset.env_id,
        "reference_returns": references,
        **provenance(),
    }
    if args.resume is None:
        try:
            run.mkdir(parents=True)
        except OSError as error:
            sys.exit(f"error: --runs {args.runs}: cannot be written ({error.strerror})")
        text = json.dumps(config, indent=2) + "\n"
        write_atomically(run / "config.json", lambda file: file.write(text.encode()))
    if args.track:
        import wandb

        names = {"project": args.wandb_project, "entity": args.wandb_entity, "name": run.name}
        wandb.init(**names, id=run.name, resume="allow", config=config)
    return run


def require_finite(agents, losses, step, run):
    """Ends the program with one line if a loss or a weight is NaN or infinite."""
    numbers = {**losses}
    for network, params in agents.weights.items():
        numbers |= {f"{network} {key}": p for key, p in params.items()}
    for name, x in numbers.items():
        require(
            x.isfinite().all(),
            f"update {step}: {name} is no longer finite; {run} keeps the last evaluation, if there "
            "is one; try a lower --lr",
        )


def save_policy(run, step, agents, evals, about_data, args):
    """Writes policy.pt: what is needed to act, and to go on training, and the evaluations."""
    policy = {
        "format": "gta-policy",
        "format_version": 2,
        "algorithm": Path(__file__).stem,
        "args": plain_args(args),
        **about_data,
        "weights": agents.weights,
        "optimizers": {k: o.state_dict()["state"] for k, o in agents.optimizers.items()},
        "rng": get_rng_state(torch.device(args.device)),
        "update": step,
        "evals": evals,
    }
    write_atomically(run / "policy.pt", lambda file: torch.save(policy, file))


def write_evals(run, evals):
    """Writes evals.csv: a row of update, seed, return, score for every agent and evaluation."""
    rows = [f"{step},{seed},{value:.4f},{score:.4f}\n" for step, seed, value, score in evals]
    text = "".join(["update,seed,return,score\n", *rows])
    write_atomically(run / "evals.csv", lambda file: file.write(text.encode()))


def log_to_wandb(step, losses, returns, scores):
    """Logs the means over the seeds."""
    import wandb

    log = {name: loss.mean().item() for name, loss in losses.items()}
    wandb.log({**log, "return": returns.mean(), "score": scores.mean()}, step=step)


@end_in_one_line("--batch-size or --num-seeds")
def main(args):
    policy = load_start(args)
    require_positive(args, "batch_size", "eval_every", "eval_episodes", "num_actions")
    require_positive(args, "lr", "vae_lr", "reward_scale")
    require_between(args, 0, 1000, "eval_workers")
    require_between(args, 1, 1000, "num_seeds")
    require_between(args, -1e6, 1e6, "reward_bias")
    require_between(args, 0, 1, "discount", "tau", "lmbda", "actor_dropout")
    require_between(args, 0, 1e6, "s4rl_sigma")
    require_between(args, 0, 1e12, "train_steps")
    require_between(args, 0, 2**32, "seed")
    require(args.load or args.train_steps, "--train-steps 0 needs --load policy.pt")
    device = pick_device(args.device)

    dataset, episodes, buffer, aug = load_episodes(args)
    fill_in_by_domain(args, dataset.env_id)
    scaling = make_scaling(episodes, dataset.source.action_space)
    if policy:
        own, other = policy["env_id"], dataset.env_id
        require(own == other, f"policy.pt is for {own}, the dataset is of {other}")
        form = {key: torch.from_numpy(x) for key, x in scaling._asdict().items()}
        require(has_form(policy["scaling"], form), "policy.pt: its scaling is of other data")
        scaling = Scaling(*(policy["scaling"][field].detach().numpy() for field in Scaling._fields))
        same_run = args.resume or args.train_steps == 0
        aug = policy["aug_label"] if same_run else f"{aug} after {policy['aug_label']}"
    about_data = {
        "env_id": dataset.env_id,
        "dataset_ids": dataset.ids,
        "data_sha256": fingerprint(dataset, buffer),
        "aug_label": aug,
        "scaling": {k: torch.from_numpy(v) for k, v in scaling._asdict().items()},
    }
    if args.resume:
        same_data = policy["data_sha256"] == about_data["data_sha256"]
        require(same_data, f"--resume {args.resume}: the dataset or the buffer has changed since")
    obs_dim, act_dim = len(scaling.obs_mean), len(scaling.action_low)
    data = pack_transitions(scale_rewards(episodes, dataset, args), scaling, device)
    agents = MCQ(args, obs_dim, act_dim, device)
    if policy:
        put_weights(agents, policy)
    env_spec = find_eval_env(dataset)
    score_0, score_100 = reference_returns(dataset)
    run = start_run(args, dataset, about_data, [score_0, score_100])
    torch.manual_seed(args.seed)
    first_step, evals, losses = 0, [], {}
    if args.resume:
        put_training_state(agents, policy, device)
        first_step, evals = policy["update"], policy["evals"]
        known = 0 <= first_step <= args.train_steps
        require(known, f"policy.pt: update {first_step} of {args.train_steps}")
        print(f"resumed {run} at update {first_step} of {args.train_steps}")

    def train_step():
        batch = draw_batch(data, args.num_seeds, args.batch_size, obs_dim, act_dim, args.s4rl_sigma)
        return update(agents, batch, MCQNoise.draw(batch.a, args), args)

    def evaluate_and_save(step):
        require_finite(agents, losses, step, run)
        returns = evaluate(agents, envs, scaling, args, device)
        require(np.isfinite(returns).all(), f"update {step}: the return is {returns}; {run} stays")
        scores = 100 * (returns - score_0) / (score_100 - score_0)
        for seed, row in enumerate(zip(returns.tolist(), scores.tolist()), start=args.seed):
            evals.append([step, seed, *row])
        save_policy(run, step, agents, evals, about_data, args)
        write_evals(run, evals)
        if args.track:
            log_to_wandb(step, losses, returns, scores)
        shown = "".join(f", {name} {loss.mean():.3g}" for name, loss in losses.items())
        progress.write(f"update {step}: score {scores.mean():.1f} +- {scores.std():.1f}{shown}")

    train = train_step
    # a CUDA graph is recorded when some updates have run and made the optimizer's state
    last_eager_step = first_step + 10
    steps = range(first_step + 1, args.train_steps + 1)
    progress = tqdm(steps, initial=first_step, total=args.train_steps, unit="update")
    records = device.type == "cuda" and compiles(args, device)
    with open_envs(env_spec, args, device) as envs, catch_signals() as caught:
        for step in progress:
            if records and step == last_eager_step + 1:
                train = record_graph(train_step)
            losses.update(train())
            if step % args.eval_every == 0 or step == args.train_steps:
                evaluate_and_save(step)
            if caught.is_set() and step < args.train_steps:
                progress.close()
                require_finite(agents, losses, step, run)
                save_policy(run, step, agents, evals, about_data, args)
                sys.exit(f"interrupted at update {step}; --resume {run} continues from there")
        if args.train_steps == 0:
            evaluate_and_save(0)
    write_evals(run, evals)  # a resumed run may have been killed just before it wrote them
    scores = np.array([score for _, _, _, score in evals[-args.num_seeds :]])
    algorithm = Path(__file__).stem + ("" if aug == "none" else f" + {aug}")
    seeds = f"{args.num_seeds} seed{'s' * (args.num_seeds > 1)}"
    print(f"wrote {run}")
    print(f"{dataset.name} | {algorithm} | {scores.mean():.1f} +- {scores.std():.1f} over {seeds}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
