# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "numpy",
#     "gymnasium[mujoco]",
#     "h5py",
#     "minari[hdf5,hf]",
#     "huggingface_hub",
#     "tyro",
# ]
# ///
"""The datasets of the paper's ablations, and D4RL's own files, as folders that --env takes.

    python data/make_dataset.py fraction --env halfcheetah-medium --fraction 0.05        E.3
    python data/make_dataset.py mix --env A --other B --num-transitions 10000            E.2
    python data/make_dataset.py duplicate --env data/mixed --top 1 --min-return 4000     E.2
    python data/make_dataset.py from-d4rl --file hopper_medium_replay-v2.hdf5

Episodes are never cut: a number of transitions is met as nearly as whole episodes can, and the last
line printed says what it came to. On halfcheetah, where every episode has 1000 transitions, the
paper's 10k and 20k are exact. The same --seed draws the same episodes, in `mix` as in `fraction
--num-transitions`, which makes the expert-only datasets of E.2.

Reads:  Minari datasets, or an HDF5 file of D4RL
Writes: a folder with a Minari dataset (--out; an existing one is left alone). It needs nothing
        beyond requirements.txt

What a D4RL file does and does not say is under "D4RL" below.
"""

import importlib.metadata
import math
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import gymnasium as gym
import h5py
import minari
import numpy as np
import tyro
from gymnasium.envs.registration import EnvSpec
from huggingface_hub import HfApi
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage
from minari.storage.datasets_root_dir import get_dataset_path


@dataclass
class Output:
    out: Path | None = None
    """folder to write; must not exist yet. Default: named after the dataset, beside this script"""
    dataset_id: str | None = None
    """Minari id to write into the metadata. Default: says what the dataset is"""


@dataclass
class Fraction(Output):
    """Draws whole episodes at random, up to a share of the transitions (E.3: 0.05 to 0.2)."""

    env: str = tyro.MISSING
    """dataset: a short name (hopper-medium), a Minari id (mujoco/hopper/medium-v0), a folder that
    holds a Minari dataset, or several of them joined by +"""
    fraction: float | None = None
    """share of the transitions, above 0 and at most 1"""
    num_transitions: int | None = None
    """number of transitions, in place of --fraction"""
    seed: int = 0
    """seed of the draw"""


@dataclass
class Mix(Output):
    """Adds whole random episodes of another dataset to a whole one (E.2)."""

    env: str = tyro.MISSING
    """dataset that is kept whole (E.2: halfcheetah-medium-replay). See fraction"""
    other: str = tyro.MISSING
    """dataset to draw from (E.2: halfcheetah-expert)"""
    num_transitions: int | None = None
    """transitions to draw (E.2: 10000 and 20000)"""
    ratio: float | None = None
    """in place of --num-transitions: drawn transitions for each one of --env. 1:20 is 0.05"""
    seed: int = 0
    """seed of the draw"""


@dataclass
class Duplicate(Output):
    """Adds unchanged copies of the best episodes to a whole dataset (E.2, naive duplication).

    The copies stand where GTA's buffer would: beside the dataset, five million transitions of them.
    """

    env: str = tyro.MISSING
    """dataset. See fraction"""
    num_transitions: int = 5_000_000
    """transitions to add (E.2)"""
    top: float = 0.1
    """share of the episodes, those of the largest returns, that are copied; what --source-top of
    gta_augment.py takes"""
    min_return: float | None = None
    """of these, copy only episodes with at least this return. With --top 1: all of them"""


@dataclass
class FromD4RL(Output):
    """Converts an HDF5 file of D4RL: locomotion, maze2d, antmaze, Adroit or Kitchen."""

    file: Path = tyro.MISSING
    """the file, as D4RL's server has it"""
    name: str | None = None
    """what D4RL calls it: hopper-medium-replay-v2. Default: read off the file's name"""
    env_id: str | None = None
    """Gymnasium environment to evaluate in. Its observations must be those of the file. Default:
    the one of TASKS below"""


Args = (
    Annotated[Fraction, tyro.conf.subcommand("fraction")]
    | Annotated[Mix, tyro.conf.subcommand("mix")]
    | Annotated[Duplicate, tyro.conf.subcommand("duplicate")]
    | Annotated[FromD4RL, tyro.conf.subcommand("from-d4rl")]
)


def require(condition, message):
    """Ends the program with one line and exit code 1 unless the condition holds."""
    if not condition:
        sys.exit(" ".join(f"error: {message}".split()))


def require_types(where, values, types):
    """Ends the program with one line unless values, a dictionary from a file, holds what types
    names, of these types. Strings must be printable."""
    for key, type_ in types.items():
        value = values.get(key)
        fits = key in values and isinstance(value, type_)
        fits &= not isinstance(value, str) or value.isprintable()
        require(fits, f"{where}: lacks {key}, or it is of another type")


def first_line(error):
    """Returns what an exception says, cut to one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


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
    terminals: np.ndarray


class Dataset(NamedTuple):
    name: str  # for people: hopper-medium
    ids: list  # Minari ids of what was loaded
    env_id: str  # Gymnasium id: Hopper-v5
    episodes: list  # of Episode
    source: minari.MinariDataset


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


# --- episodes of Minari datasets ---


def read_episodes(env):
    """Returns the episodes that load_dataset checked, in its order, as Minari stores them.

    Dict observations stay dictionaries. Infos, which no script reads, are left out.
    """
    folders = [find_minari(name) for name in resolve_env(env)]
    datasets = [minari.MinariDataset(folder / "data") for folder in folders]
    return [
        EpisodeBuffer(
            observations=e.observations,
            actions=e.actions,
            rewards=e.rewards,
            terminations=e.terminations,
            truncations=e.truncations,
        )
        for dataset in datasets
        for e in dataset.iterate_episodes()
    ]


def count_near(lengths, num_transitions):
    """Returns how many episodes, in this order, come nearest to a number of transitions; >= 1."""
    return int(np.abs(np.cumsum(lengths) - num_transitions).argmin()) + 1


def draw_episodes(episodes, num_transitions, seed):
    """Draws episodes at random, without repetition, with about num_transitions in total.

    They stay in the order of the dataset.
    """
    require(seed >= 0, f"--seed {seed}: must not be negative")
    order = np.random.default_rng(seed).permutation(len(episodes))
    count = count_near([len(episodes[i]) for i in order], num_transitions)
    return [episodes[i] for i in sorted(order[:count])]


def best_episodes(episodes, top, min_return):
    """Returns the share top of the episodes that have the largest returns, best first (E.2).

    min_return leaves out episodes with less; None leaves out none.
    """
    returns = np.array([e.rewards.sum() for e in episodes])
    best_first = np.argsort(-returns, kind="stable")[: math.ceil(top * len(episodes))]
    return [episodes[i] for i in best_first if min_return is None or returns[i] >= min_return]


def count_transitions(episodes):
    return sum(len(e) for e in episodes)


# --- the ablations ---


class NewDataset(NamedTuple):
    dataset_id: str  # the default one
    description: str
    episodes: list  # of EpisodeBuffer
    env_spec: EnvSpec
    observation_space: gym.Space
    action_space: gym.Space
    metadata: dict  # more of Minari's keys: reference scores, authors, eval_env_spec


def derive(dataset, ids, label, description, episodes):
    """Returns the new dataset with the environment, spaces and references of the one it is from.

    Its id is that of the source, with label: hopper-medium-v0 -> hopper-medium-fraction10-seed0-v0.
    """
    name, version = re.fullmatch(r"(.+?)(?:-v(\d+))?", "-".join(ids)).groups()
    name = re.sub(r"[^\w-]", "-", name)  # mujoco/hopper/medium -> mujoco-hopper-medium
    label = re.sub(r"[^\w-]", "p", label)  # 0.5 -> 0p5
    storage = dataset.source.storage
    kept = "eval_env_spec ref_min_score ref_max_score num_episodes_average_score requirements"
    kept += " algorithm_name author author_email"
    return NewDataset(
        f"{name}-{label}-v{version or 0}",
        description,
        episodes,
        dataset.source.env_spec,
        storage.observation_space,
        storage.action_space,
        {key: storage.metadata[key] for key in kept.split() if key in storage.metadata},
    )


def require_one(args, *names):
    """Ends the program with one line unless exactly one of the named arguments is given."""
    given = [name for name in names if getattr(args, name) is not None]
    flags = " or ".join(f"--{name.replace('_', '-')}" for name in names)
    require(len(given) == 1, f"give either {flags}")


def make_fraction(args):
    require_one(args, "fraction", "num_transitions")
    if args.fraction is not None:
        in_bounds = 0 < args.fraction <= 1
        require(in_bounds, f"--fraction {args.fraction}: must be above 0 and at most 1")
    dataset = load_dataset(args.env)
    episodes = read_episodes(args.env)
    total = count_transitions(episodes)
    if args.fraction is None:
        number, label = args.num_transitions, f"fraction-of-{args.num_transitions}"
    else:
        number, label = max(1, round(args.fraction * total)), f"fraction{100 * args.fraction:g}"
    require(0 < number <= total, f"--num-transitions {number}: must be 1 to {total}, all there are")
    picked = draw_episodes(episodes, number, args.seed)
    return derive(
        dataset,
        dataset.ids,
        f"{label}-seed{args.seed}",
        f"Random episodes of {dataset.name}, about {number} of its {total} transitions.",
        picked,
    )


def make_mix(args):
    require_one(args, "num_transitions", "ratio")
    require(args.ratio is None or 0 < args.ratio < 1e6, f"--ratio {args.ratio}: must be positive")
    dataset, other = load_dataset(args.env), load_dataset(args.other)
    own, others = read_episodes(args.env), read_episodes(args.other)
    same = dataset.env_id == other.env_id
    require(same, f"different environments, {dataset.env_id} and {other.env_id}, do not mix")
    spaces, other_spaces = (
        (d.source.observation_space, d.source.action_space) for d in (dataset, other)
    )
    require(spaces == other_spaces, f"--env and --other differ in spaces: {spaces}, {other_spaces}")
    total = count_transitions(others)
    number = args.num_transitions
    if number is None:
        number = round(args.ratio * count_transitions(own))
    require(
        0 < number <= total, f"{number} transitions of --other: must be 1 to {total}, all it has"
    )
    return derive(
        dataset,
        [*dataset.ids, *other.ids],
        f"mix{number}-seed{args.seed}",
        f"All of {dataset.name} and random episodes of {other.name}, about {number} transitions.",
        own + draw_episodes(others, number, args.seed),
    )


def make_duplicate(args):
    require(0 < args.top <= 1, f"--top {args.top}: must be above 0 and at most 1")
    number = args.num_transitions
    require(0 < number < 1e9, f"--num-transitions {number}: must be positive and below 1e9")
    dataset = load_dataset(args.env)
    episodes = read_episodes(args.env)
    best = best_episodes(episodes, args.top, args.min_return)
    require(best, f"--min-return {args.min_return}: no episode of the --top {args.top} has that")
    rounds = math.ceil(number / count_transitions(best))
    copies = best * rounds  # the same arrays, written again and again
    copies = copies[: count_near([len(e) for e in copies], number)]
    floor = "" if args.min_return is None else f"-min{args.min_return:g}"
    return derive(
        dataset,
        dataset.ids,
        f"top{100 * args.top:g}{floor}-copied{number}",
        f"All of {dataset.name} and copies of its {len(best)} best episodes.",
        episodes + copies,
    )


# --- D4RL ---
#
# A D4RL file holds all episodes in a row: observations, actions, rewards, terminals [N]. Most have
# timeouts [N], locomotion v1 and v2 also next_observations. Infos and metadata are not used.
#
# - An episode ends at a terminal or a timeout; without timeouts, as in Kitchen, also after the
#   task's number of steps. What follows the last end is one more, truncated, episode.
# - Minari wants the state after an episode's last transition. next_observations has it. Where the
#   file does not, the last transition of a truncated episode is left out, as qlearning_dataset of
#   d4rl does. A terminal one is kept, with s again as s': targets do not use it, but models and
#   penalties on s' see a standstill there (d4rl takes the first state of the next episode).
# - Where next_observations differs from the next row's observation, an end is not marked. It counts
#   as a timeout.
# - maze2d is one long trajectory. Its timeouts are the goals reached on the way; no terminals.
# - antmaze marks every step at the goal as terminal, and goes on to the timeout. An episode runs to
#   the timeout. What follows its first terminal is left out, as in the release of GTA's authors.
#
# D4RL's environments are gym's -v2, in mujoco-py. Gymnasium's -v4 have the same observations,
# rewards and contacts. -v5 pays Hopper and Walker2d no healthy reward at a fall, and its Walker2d
# has feet of other friction. The simulator differs in both: scores are near D4RL's, not equal.
# Adroit's rewards are those of gymnasium-robotics. maze2d, antmaze and Kitchen observe other things
# there (goals, velocities, another origin): such data trains stages A and B, but a learner has
# nowhere to evaluate.


class Task(NamedTuple):
    env_id: str | None  # None: no environment of Gymnasium has these observations
    obs_dim: int
    act_dim: int
    max_episode_steps: int
    ref_min_score: float  # D4RL's returns of a random policy and an expert
    ref_max_score: float


LEVELS = "(random|medium|expert|medium-replay|full-replay|medium-expert)-v[012]"
TASKS = {  # pattern of D4RL's name -> task
    f"halfcheetah-{LEVELS}": Task("HalfCheetah-v4", 17, 6, 1000, -280.178953, 12135.0),
    f"hopper-{LEVELS}": Task("Hopper-v4", 11, 3, 1000, -20.272305, 3234.3),
    f"walker2d-{LEVELS}": Task("Walker2d-v4", 17, 6, 1000, 1.629008, 4592.3),
    "maze2d-umaze-v1": Task(None, 4, 2, 300, 23.85, 161.86),
    "maze2d-medium-v1": Task(None, 4, 2, 600, 13.13, 277.39),
    "maze2d-large-v1": Task(None, 4, 2, 800, 6.7, 273.99),
    "maze2d-umaze-dense-v1": Task(None, 4, 2, 300, 68.537689, 193.66285642381482),
    "maze2d-medium-dense-v1": Task(None, 4, 2, 600, 44.264742, 297.4552547777125),
    "maze2d-large-dense-v1": Task(None, 4, 2, 800, 30.569041, 303.4857382709002),
    "antmaze-umaze(-diverse)?-v[012]": Task(None, 29, 8, 700, 0.0, 1.0),
    "antmaze-(medium|large)-(play|diverse)-v[012]": Task(None, 29, 8, 1000, 0.0, 1.0),
    "pen-(human|cloned|expert)-v[01]": Task(
        "AdroitHandPen-v1", 45, 24, 100, 96.262799, 3076.8331017826877
    ),
    "door-(human|cloned|expert)-v[01]": Task(
        "AdroitHandDoor-v1", 39, 28, 200, -56.512833, 2880.5693087298737
    ),
    "hammer-(human|cloned|expert)-v[01]": Task(
        "AdroitHandHammer-v1", 46, 26, 200, -274.856578, 12794.134825156867
    ),
    "relocate-(human|cloned|expert)-v[01]": Task(
        "AdroitHandRelocate-v1", 39, 30, 200, -6.425911, 4233.877797728884
    ),
    "kitchen-(complete|partial|mixed)-v0": Task(None, 60, 9, 280, 0.0, 4.0),
}


def read_d4rl(path):
    """Reads the arrays of a D4RL file that make transitions, checked.

    Exits with one line if the file is missing, damaged, lacks an array or holds one that does not
    fit the others.
    """
    require(path.is_file(), f"--file {path}: no such file")
    keys = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
    try:
        with h5py.File(path) as file:
            data = {key: file[key][()] for key in keys if key in file}
    except Exception as error:  # h5py has many ways to say so
        sys.exit(f"error: --file {path}: not a whole HDF5 file ({first_line(error)})")
    missing = [key for key in keys[:4] if key not in data]
    require(not missing, f"--file {path}: no file of D4RL, it lacks {', '.join(missing)}")
    for key in {"rewards", "terminals", "timeouts"} & data.keys():  # some are [N, 1]
        data[key] = np.squeeze(data[key], axis=1) if data[key].shape[1:] == (1,) else data[key]
    s, a, N = data["observations"], data["actions"], len(data["rewards"])
    fits = s.ndim == a.ndim == 2 and N > 0
    for key, array in data.items():
        shape = s.shape[1:] if key == "next_observations" else ()
        fits &= len(array) == N and (array is s or array is a or array.shape[1:] == shape)
        fits &= array.dtype.kind in "fbiu" and bool(np.isfinite(array).all())
    shapes = ", ".join(f"{key} {array.shape}" for key, array in data.items())
    require(fits, f"--file {path}: its arrays do not fit together or are not finite: {shapes}")
    for key in {"terminals", "timeouts"} & data.keys():
        data[key] = data[key].astype(bool)
    return data


def mark_timeouts(terminals, max_episode_steps):
    """Returns the timeouts of a file that has none: max_episode_steps after the last end. [N]"""
    timeouts, steps = np.zeros_like(terminals), 0
    for i, terminal in enumerate(terminals):
        steps += 1
        timeouts[i] = steps == max_episode_steps
        steps = 0 if terminal or timeouts[i] else steps
    return timeouts


def split_episodes(data, max_episode_steps, ends_at_terminal):
    """Cuts the arrays of read_d4rl into episodes. Returns them as EpisodeBuffers.

    ends_at_terminal: False where the file goes on after a terminal, up to the timeout (antmaze).
    """
    s, a, r, terminals = (data[k] for k in ("observations", "actions", "rewards", "terminals"))
    s_next = data.get("next_observations")
    timeouts = data.get("timeouts")
    if timeouts is None:
        timeouts = mark_timeouts(terminals, max_episode_steps)
    ends = timeouts | (terminals & ends_at_terminal)
    if s_next is not None:
        ends[:-1] |= np.abs(s[1:] - s_next[:-1]).max(1) > 1e-4
    ends[-1] = True
    episodes, start = [], 0
    for end in np.flatnonzero(ends) + 1:
        stop = end  # of the transitions that are kept
        if terminals[start:end].any():
            stop = start + int(terminals[start:end].argmax()) + 1
        if s_next is not None:
            last = s_next[stop - 1]
        elif stop < end:  # antmaze goes on
            last = s[stop]
        else:
            last = s[stop - 1]
            stop -= not terminals[stop - 1]
        T = stop - start
        if T > 0:
            episodes.append(
                EpisodeBuffer(
                    observations=np.concatenate([s[start:stop], last[None]]),
                    actions=a[start:stop],
                    rewards=r[start:stop],
                    terminations=terminals[start:stop],
                    truncations=(np.arange(T) == T - 1) & ~terminals[start:stop],
                )
            )
        start = end
    return episodes


def find_task(args):
    """Returns D4RL's name of the file, and its Task, or None if only --env-id says what it is."""
    name = args.name or args.file.stem.replace("_", "-").replace("-sparse", "")
    task = next((task for pattern, task in TASKS.items() if re.fullmatch(pattern, name)), None)
    require(
        task or args.env_id,
        f"{name}: no dataset of D4RL that is known here; give --name, as hopper-medium-replay-v2, "
        "antmaze-umaze-v2, pen-human-v1 or kitchen-mixed-v0, or the environment as --env-id",
    )
    require(re.fullmatch(r"[\w-]+", name), f"--name {name}: letters, digits, - and _ only")
    return name, task


def make_d4rl_env(env_id):
    """Makes the environment of --env-id, which may be one of gymnasium-robotics."""
    try:
        return gym.make(env_id if env_id in gym.registry else f"gymnasium_robotics:{env_id}")
    except ModuleNotFoundError:
        sys.exit(f"error: --env-id {env_id}: not one of Gymnasium; pip install gymnasium-robotics")
    except Exception as error:
        sys.exit(f"error: --env-id {env_id}: cannot be made ({first_line(error)})")


def convert_d4rl(args):
    name, task = find_task(args)
    data = read_d4rl(args.file)
    dims = (data["observations"].shape[1], data["actions"].shape[1])
    if task:
        own = (task.obs_dim, task.act_dim)
        require(dims == own, f"--file {args.file}: states and actions {dims}, {name} has {own}")
    action_space = gym.spaces.Box(-1.0, 1.0, dims[1:], np.float32)  # all of D4RL's robots
    if args.env_id:
        env = make_d4rl_env(args.env_id)
        action_space, env_spec = env.action_space, env.unwrapped.spec
        own = (*gym.spaces.utils.flatten_space(env.observation_space).shape, *action_space.shape)
        require(dims == own, f"--env-id {args.env_id}: states and actions {own}, the file {dims}")
    else:  # a script makes it by its id, be it Gymnasium's or gymnasium-robotics'
        env_spec = EnvSpec(task.env_id or name, max_episode_steps=task.max_episode_steps)
    steps = task.max_episode_steps if task else env_spec.max_episode_steps
    is_antmaze = "antmaze" in f"{name} {env_spec.id}".lower()
    episodes = split_episodes(data, steps, ends_at_terminal=not is_antmaze)
    require(episodes, f"--file {args.file}: holds no episode of two states")
    print(f"{len(data['rewards'])} rows of {name}, {count_transitions(episodes)} transitions kept")
    if not (args.env_id or task.env_id):
        print(
            f"no environment here observes what {name} holds: gta_diffusion.py, gta_augment.py and "
            "metrics.py read this dataset, the learners cannot evaluate on it"
        )
    references = task and {"ref_min_score": task.ref_min_score, "ref_max_score": task.ref_max_score}
    return NewDataset(
        f"d4rl-{name}" if re.search(r"-v\d+$", name) else f"d4rl-{name}-v0",
        f"D4RL's {name}.",
        episodes,
        env_spec,
        gym.spaces.Box(-np.inf, np.inf, dims[:1], data["observations"].dtype),
        action_space,
        {"author": {"D4RL"}, **(references or {})},
    )


# --- output ---


def require_new(out):
    """Ends the program with one line if there is something under the name out."""
    exists = out is not None and out.exists()
    require(not exists, f"{out} exists; remove it or choose another --out")


def write_dataset(new, dataset_id, out):
    """Writes the new dataset under the name out, all of it or nothing."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as root:
            folder = Path(root).resolve() / "new"  # Minari 0.5.4 fails with a relative path
            folder.mkdir()
            storage = MinariStorage.new(
                folder / "data", new.observation_space, new.action_space, new.env_spec
            )
            storage.update_metadata(
                {
                    **new.metadata,
                    "dataset_id": dataset_id,
                    "description": new.description,
                    "code_permalink": "data/make_dataset.py",
                    "minari_version": importlib.metadata.version("minari"),
                }
            )
            storage.update_episodes(new.episodes)
            os.rename(folder, out)
    except (OSError, RuntimeError) as error:  # h5py raises both
        sys.exit(f"error: --out {out}: cannot be written ({first_line(error)})")


def main(args):
    is_id = args.dataset_id is None or re.fullmatch(r"([\w-]+/)*[\w-]+-v\d+", args.dataset_id)
    require(is_id, f"--dataset-id {args.dataset_id}: must be like hopper-medium-v0")
    require_new(args.out)
    makers = {Fraction: make_fraction, Mix: make_mix, Duplicate: make_duplicate}
    new = {**makers, FromD4RL: convert_d4rl}[type(args)](args)
    dataset_id = args.dataset_id or new.dataset_id
    out = args.out or Path(__file__).parent / re.sub(r"-v0$", "", dataset_id.replace("/", "-"))
    require_new(out)
    write_dataset(new, dataset_id, out)
    returns = np.array([e.rewards.sum() for e in new.episodes])
    print(
        f"wrote {out}: {dataset_id}, {len(returns)} episodes, {count_transitions(new.episodes)} "
        f"transitions, return mean {returns.mean():.1f}, min {returns.min():.1f}, max "
        f"{returns.max():.1f}"
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
