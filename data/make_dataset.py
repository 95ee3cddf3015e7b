# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=2", "gymnasium[mujoco]>=1", "mujoco<3.12", "h5py>=3",
#     "minari[hdf5,hf]>=0.5.4", "tyro>=0.9"]
# ///
"""The datasets of the paper's ablations, and D4RL's own files, as folders that --env takes.

    python data/make_dataset.py fraction --env halfcheetah-medium --fraction 0.05        E.3
    python data/make_dataset.py mix --env A --other B --num-transitions 10000            E.2
    python data/make_dataset.py duplicate --env data/mixed --top 1 --min-return 4000     E.2
    python data/make_dataset.py from-d4rl --file hopper_medium_replay-v2.hdf5
    python data/make_dataset.py check --env my-dataset          what is wrong with it, and where

Reads Minari datasets, or an HDF5 file of D4RL. Writes a folder with a Minari dataset (--out).

Episodes are drawn whole: a number of transitions is met as nearly as they can. The same --seed
draws the same ones, in `mix` as in `fraction --num-transitions` (the expert-only data of E.2).
"""

import importlib
import json
import math
import os
import re
import sys
import tempfile
import zlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import h5py
import minari
import numpy as np
import tyro
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector.utils import batch_space, iterate
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage


@dataclass
class Fraction:
    """Draws whole episodes at random, up to a share of the transitions (E.3: 0.05 to 0.2)."""

    # short name (hopper-medium), Minari id, folder of a Minari dataset, or several joined by +
    env: str
    fraction: float | None = None  # share of the transitions
    num_transitions: int | None = None  # number of transitions, in place of --fraction
    seed: int = 0  # seed of the draw
    out: str | None = None  # folder to write. Default: named after the dataset, beside this script


@dataclass
class Mix:
    """Adds whole random episodes of another dataset to a whole one (E.2)."""

    env: str  # dataset that is kept whole (E.2: halfcheetah-medium-replay). See fraction
    other: str  # dataset to draw from (E.2: halfcheetah-expert)
    num_transitions: int | None = None  # transitions to draw (E.2: 10000 and 20000)
    # in place of --num-transitions: drawn transitions for each one of --env. 1:20 is 0.05
    ratio: float | None = None
    seed: int = 0  # seed of the draw
    out: str | None = None  # folder to write. See fraction


@dataclass
class Duplicate:
    """Adds unchanged copies of the best episodes to a whole dataset (E.2, naive duplication)."""

    env: str  # dataset. See fraction
    num_transitions: int = 5_000_000  # transitions to add (E.2), as many as GTA generates
    top: float = 0.1  # share of the episodes, those of the largest returns, that are copied
    # of these, copy only episodes with at least this return. With --top 1: all of them
    min_return: float | None = None
    out: str | None = None  # folder to write. See fraction


@dataclass
class FromD4rl:
    """Converts an HDF5 file of D4RL: locomotion, maze2d, antmaze, Adroit or Kitchen."""

    file: str  # the file, as D4RL's server has it
    # what D4RL calls it: hopper-medium-replay-v2. Default: read off the file's name
    name: str | None = None
    # Gymnasium environment that observes what the file holds. Default: that of TASKS below
    env_id: str | None = None
    env_package: str | None = None  # module to import that registers your own environment
    out: str | None = None  # folder to write. See fraction


@dataclass
class Check:
    """Says which episodes of a dataset hold what a script refuses, or takes though it is odd."""

    env: str  # dataset. See fraction


# --- the ablations ---


def count_near(episodes, num_transitions):
    """Returns how many episodes, in this order, come nearest to a number of transitions; >= 1."""
    lengths = [len(e) for e in episodes]
    return int(np.abs(np.cumsum(lengths) - num_transitions).argmin()) + 1


def draw_episodes(episodes, num_transitions, seed):
    """Draws episodes at random, without repetition, with about num_transitions in total. They stay
    in the order of the dataset."""
    total = count_transitions(episodes)
    has_them = 0 < num_transitions <= total
    require(has_them, f"cannot draw {num_transitions} transitions from a dataset of {total}")
    order = np.random.default_rng(seed).permutation(len(episodes))
    number = count_near([episodes[i] for i in order], num_transitions)
    return [episodes[i] for i in sorted(order[:number])]


def make_fraction(args):
    """Draws a share, or a number, of the transitions."""
    one = (args.fraction is None) != (args.num_transitions is None)
    require(one, "give either --fraction or --num-transitions")
    source = read_source(args.env)
    if args.fraction is None:
        number = args.num_transitions
        label = f"fraction-of-{number}"
    else:
        number = round(args.fraction * count_transitions(source.episodes))
        label = f"fraction{100 * args.fraction:g}"
    episodes = draw_episodes(source.episodes, number, args.seed)
    write_derived(args, [source], f"{label}-seed{args.seed}", episodes)


def make_mix(args):
    """Adds a number of another dataset's transitions, or so many for each of its own."""
    one = (args.num_transitions is None) != (args.ratio is None)
    require(one, "give either --num-transitions or --ratio")
    source = read_source(args.env)
    other = read_source(args.other)
    number = args.num_transitions
    if number is None:
        number = round(args.ratio * count_transitions(source.episodes))
    episodes = source.episodes + draw_episodes(other.episodes, number, args.seed)
    write_derived(args, [source, other], f"mix{number}-seed{args.seed}", episodes)


def make_duplicate(args):
    """Adds copies of the episodes with the largest returns, one after the other."""
    source = read_source(args.env)
    best = sorted(source.episodes, key=find_return, reverse=True)
    best = best[: math.ceil(args.top * len(best))]
    label = f"top{100 * args.top:g}"
    if args.min_return is not None:
        best = [episode for episode in best if find_return(episode) >= args.min_return]
        label += f"-min{args.min_return:g}"
    require(best, f"no episode has --top {args.top} and --min-return {args.min_return}")
    number = args.num_transitions
    copies = best * math.ceil(number / count_transitions(best))  # the same arrays again and again
    copies = copies[: count_near(copies, number)]
    write_derived(args, [source], f"{label}-copied{number}", source.episodes + copies)


def write_derived(args, sources, label, episodes):
    """Writes episodes with the environment, spaces and references of the first dataset. The id is
    that of the datasets, with label: hopper-medium-v0 -> hopper-medium-fraction10-seed0-v0."""
    datasets = [dataset for source in sources for dataset in source.datasets]
    first = datasets[0]
    environment = Environment(first.env_spec, first.observation_space, first.action_space)
    for other in datasets[1:]:
        same = env_id(other) == env_id(first)
        same &= other.observation_space == first.observation_space
        same &= other.action_space == first.action_space
        require(same, f"{first.id} and {other.id} differ in environment or spaces: no mixing")
    ids = [dataset.id for dataset in datasets]
    name, version = re.fullmatch(r"(.+?)(?:-v(\d+))?", "-".join(ids)).groups()
    name = re.sub(r"[^\w-]", "-", name)  # mujoco/hopper/medium -> mujoco-hopper-medium
    label = re.sub(r"[^\w-]", "p", label)  # 0.5 -> 0p5
    kept = "eval_env_spec|ref_.*|num_episodes_average_score|requirements|algorithm_name|author.*"
    metadata = {k: x for k, x in first.storage.metadata.items() if re.fullmatch(kept, k)}
    metadata["dataset_id"] = f"{name}-{label}-v{version or 0}"
    inputs = {"dataset_ids": ids, "dataset_crc": [source.crc for source in sources]}
    write_dataset(args, inputs, metadata, episodes, environment)


# --- D4RL ---
#
# A D4RL file holds all episodes in a row: observations, actions, rewards, terminals [N]. Most have
# timeouts [N], locomotion v1 and v2 also next_observations.
#
# - An episode ends at a terminal or a timeout; in a file that marks none, as Kitchen's, also after
#   the task's number of steps. What follows the last end is one more, truncated, episode.
# - Not all ends are marked. One is also where next_observations is not the next row's observation.
#   It counts as a timeout.
# - A file without next_observations shows an unmarked end as a jump of the states (find_jumps). An
#   angle that wraps around looks the same. So such a file's timeouts are trusted where it has any;
#   those of antmaze v0 are not (D4RL's issue 77).
# - The state after an episode's last transition is in next_observations. In a file without, the
#   last transition of a truncated episode is left out, as d4rl's qlearning_dataset does. A terminal
#   one is kept, with s again as s': targets do not use it, models see a standstill.
# - maze2d is one long trajectory. Its timeouts are the goals reached on the way; no terminals.
# - antmaze marks every step at the goal as terminal, and goes on to the timeout. What follows an
#   episode's first terminal is left out, as in the release of GTA's authors.
#
# D4RL's environments are gym's -v2, in mujoco-py. Gymnasium's -v4 have the same observations,
# rewards and contacts; -v5 pays no healthy reward at a fall. The simulator is another one in both:
# scores are near D4RL's, not equal. gymnasium-robotics' mazes and Kitchen observe other things.


class Task(NamedTuple):
    env_id: str | None  # of an environment that observes the same, if there is one
    obs_dim: int
    act_dim: int
    max_episode_steps: int
    ref_min_score: float  # return of a random policy
    ref_max_score: float  # return of an expert


LEVELS = "(random|medium|expert|medium-replay|full-replay|medium-expert)-v[012]"
TASKS = {  # by D4RL's name
    f"halfcheetah-{LEVELS}": Task("HalfCheetah-v4", 17, 6, 1000, -280.178953, 12135.0),
    f"hopper-{LEVELS}": Task("Hopper-v4", 11, 3, 1000, -20.272305, 3234.3),
    f"walker2d-{LEVELS}": Task("Walker2d-v4", 17, 6, 1000, 1.629008, 4592.3),
    "maze2d-umaze-v1": Task(None, 4, 2, 300, 23.85, 161.86),
    "maze2d-medium-v1": Task(None, 4, 2, 600, 13.13, 277.39),
    "maze2d-large-v1": Task(None, 4, 2, 800, 6.7, 273.99),
    "maze2d-umaze-dense-v1": Task(None, 4, 2, 300, 68.537689, 193.662856),
    "maze2d-medium-dense-v1": Task(None, 4, 2, 600, 44.264742, 297.455255),
    "maze2d-large-dense-v1": Task(None, 4, 2, 800, 30.569041, 303.485738),
    "antmaze-umaze(-diverse)?-v[012]": Task(None, 29, 8, 700, 0.0, 1.0),
    "antmaze-(medium|large)-(play|diverse)-v[012]": Task(None, 29, 8, 1000, 0.0, 1.0),
    "pen-.+-v[01]": Task("AdroitHandPen-v1", 45, 24, 100, 96.262799, 3076.8331),
    "door-.+-v[01]": Task("AdroitHandDoor-v1", 39, 28, 200, -56.512833, 2880.5693),
    "hammer-.+-v[01]": Task("AdroitHandHammer-v1", 46, 26, 200, -274.856578, 12794.134825),
    "relocate-.+-v[01]": Task("AdroitHandRelocate-v1", 39, 30, 200, -6.425911, 4233.877797),
    "kitchen-(complete|partial|mixed)-v0": Task(None, 60, 9, 280, 0.0, 4.0),
}


def read_d4rl(path):
    """Returns the arrays of a D4RL file that make transitions, all with N rows, checked."""
    needed = ("observations", "actions", "rewards", "terminals")
    data = {}
    with or_exit(f"--file {path}: no whole file of D4RL"), h5py.File(path) as file:
        for key in (*needed, "timeouts", "next_observations"):
            if key in file or key in needed:
                data[key] = np.atleast_1d(file[key][()])
    N = len(data["observations"])
    require(N > 2, f"--file {path}: has {N} rows")
    shapes = dict.fromkeys(data, (N,))
    shapes["observations"] = (N, data["observations"].size // N)
    shapes["next_observations"] = shapes["observations"]
    shapes["actions"] = (N, data["actions"].size // N)
    for key, x in data.items():
        fits = len(x) == N and x.size == math.prod(shapes[key])
        require(fits, f"--file {path}: {key} have the shape {x.shape}, not {shapes[key]}")
        is_sound = x.dtype.kind in "biuf" and is_finite(x)
        require(is_sound, f"--file {path}: {key} hold NaN, or numbers too large for float32")
        data[key] = x.reshape(shapes[key])
        if key in ("terminals", "timeouts"):
            data[key] = data[key].astype(bool)
    return data


def find_jumps(s):
    """Returns where the next state is far beyond the reach of a step. s [N, obs_dim] -> [N - 1]

    The size of a step is its change over the mean change, averaged over the dimensions. The largest
    usual size is the 99.9 % quantile of the smaller one of two steps in a row: no lone jump is.
    """
    change = np.abs(np.diff(s, axis=0))
    mean = change.mean(0, dtype=np.float64)
    size = (change[:, mean > 0] / mean[mean > 0]).mean(1)
    return size > 2.5 * np.quantile(np.minimum(size[1:], size[:-1]), 0.999)


def find_ends(data, name, max_episode_steps):
    """Returns the rows [N] after which an episode ends, and says how many ends nothing marks."""
    s = data["observations"]
    ends = data["terminals"].copy()
    if "antmaze" in name:
        ends[:] = False  # the file goes on after a terminal, up to the timeout
    ends |= data.get("timeouts", False)
    is_marked = "timeouts" in data and ends.any()
    if "next_observations" in data:
        jumps = np.abs(s[1:] - data["next_observations"][:-1]).max(1) > 1e-4
        cuts = True
    else:
        jumps = find_jumps(s)
        cuts = not is_marked or re.fullmatch("antmaze-.+-v0", name)
    jumps &= ~ends[:-1]
    if jumps.any() and cuts:
        print(f"{jumps.sum()} ends of episodes are not marked: cut where consecutive states jump")
        ends[:-1] |= jumps
    elif jumps.any():
        print(f"{jumps.sum()} states jump within an episode: not cut, the file marks its timeouts")
    if not is_marked:
        start = 0
        for i in range(len(s)):
            ends[i] |= i + 1 - start == max_episode_steps
            if ends[i]:
                start = i + 1
    ends[-1] = True
    return ends


def cut_episode(data, start, end):
    """Returns the rows from start to end as an episode, up to its first terminal."""
    s = data["observations"]
    terminals = data["terminals"][start:end]
    stop = start + terminals.argmax() + 1 if terminals.any() else end
    if "next_observations" in data:
        last = data["next_observations"][stop - 1]
    elif terminals.any() and stop == end:
        last = s[stop - 1]
    else:
        stop = min(stop, end - 1)
        last = s[stop]
    terminations = data["terminals"][start:stop]
    truncations = np.zeros(stop - start, bool)
    truncations[-1:] = ~terminations[-1:]
    return EpisodeBuffer(
        observations=np.concatenate([s[start:stop], last[None]]),
        actions=data["actions"][start:stop],
        rewards=data["rewards"][start:stop],
        terminations=terminations,
        truncations=truncations,
    )


def split_episodes(data, ends):
    """Cuts the rows after those that ends [N] marks. Returns the episodes that have transitions."""
    episodes = []
    start = 0
    for end in np.flatnonzero(ends) + 1:
        episodes.append(cut_episode(data, start, end))
        start = end
    return [episode for episode in episodes if len(episode)]


def open_environment(args):
    """Returns the environment of --env-id, its states and actions vectors as in a file of D4RL."""
    name = args.env_id
    with or_exit(f"--env-id {name} cannot be made; one of your own needs --env-package"):
        if args.env_package:
            sys.path.append(os.getcwd())
            importlib.import_module(args.env_package)
        elif name not in gym.registry:
            importlib.import_module("gymnasium_robotics")
        env = gym.make(name)
    for space in (env.observation_space, env.action_space):
        is_vector = isinstance(space, gym.spaces.Box) and len(space.shape) == 1
        advice = "register it with a wrapper as gymnasium.wrappers.FlattenObservation"
        require(is_vector, f"{name}: states and actions must be vectors, not {space}; {advice}")
    spec = env.unwrapped.spec
    spec.max_episode_steps = env.spec.max_episode_steps  # which a wrapper of env counts
    if callable(spec.entry_point):
        spec.entry_point = None  # a class is no JSON; scripts make it by its id
    return Environment(spec, env.observation_space, env.action_space)


def describe_environment(name, task, dtype):
    """Returns the environment of a task of D4RL; a script makes it by its id, if there is one."""
    if not task.env_id:
        print(f"no environment here observes what {name} holds: learners need --eval-episodes 0")
    spec = EnvSpec(task.env_id or name, max_episode_steps=task.max_episode_steps)
    observation_space = gym.spaces.Box(-np.inf, np.inf, (task.obs_dim,), dtype)
    action_space = gym.spaces.Box(-1.0, 1.0, (task.act_dim,), np.float32)  # all of D4RL's robots
    return Environment(spec, observation_space, action_space)


def find_task(name):
    """Returns what D4RL's name stands for, or None."""
    for pattern, task in TASKS.items():
        if re.fullmatch(pattern, name):
            return task
    return None


def convert_d4rl(args):
    """Converts a file of D4RL."""
    name = args.name or Path(args.file).stem.replace("_", "-").replace("-sparse", "")
    args.name = name
    task = find_task(name)
    advice = "give --name, as antmaze-umaze-v2 or kitchen-mixed-v0, or the environment as --env-id"
    if name.startswith("ant-"):
        advice = "Gymnasium's Ant does not observe its 111 numbers; take Minari's --env ant-medium"
    require(task or args.env_id, f"{name}: no dataset of D4RL that is known here; {advice}")
    data = read_d4rl(args.file)
    s = data["observations"]
    a = data["actions"]
    if args.env_id:
        environment = open_environment(args)
    else:
        environment = describe_environment(name, task, s.dtype)
    sizes = (s.shape[1], a.shape[1])
    needed = (*environment.observation_space.shape, *environment.action_space.shape)
    owner = args.env_id or name
    found = f"--file {args.file}: states and actions {sizes}"
    require(sizes == needed, f"{found}, {owner} has {needed}")
    print_excess(name, measure_excess(a, environment.action_space))
    steps = task.max_episode_steps if task else environment.spec.max_episode_steps
    ends = find_ends(data, name, steps)
    episodes = split_episodes(data, ends)
    print(f"{len(s)} rows of {name}, {count_transitions(episodes)} transitions kept")
    metadata = {"dataset_id": "d4rl-" + name, "author": {"D4RL"}}
    if not re.search(r"-v\d+$", name):
        metadata["dataset_id"] += "-v0"
    if task:
        metadata["ref_min_score"] = task.ref_min_score
        metadata["ref_max_score"] = task.ref_max_score
    inputs = {"file_crc": checksum(data.values())}
    write_dataset(args, inputs, metadata, episodes, environment)


# --- check ---


class Fault(NamedTuple):
    """What is wrong with an episode."""

    text: str
    is_refused: bool = True  # by the scripts; otherwise they take it as it is


def is_finite(x):
    """Returns whether x holds no NaN, no infinity, and nothing too large for float32."""
    return (np.abs(x) <= np.finfo(np.float32).max).all()


def measure_excess(x, box):
    """Returns how far the rows of x lie outside of the box, 0 inside. [N, dim] -> [N]"""
    x = x.reshape(len(x), box.low.size).astype(np.float64)
    return np.maximum(box.low - x, x - box.high).max(1).clip(0)


def print_excess(name, excess):
    """Says how many actions lie outside of their space. excess [N]: how far."""
    num_outside = np.count_nonzero(excess)
    if num_outside:
        count = f"{num_outside} of {len(excess)} actions"
        print(f"{name}: {count} lie outside of their space, by {excess.max():.3g} at most")


def read_episode(dataset, i):
    """Returns an episode as Minari stores it, and its observations flattened [T + 1, obs_dim]."""
    record = next(dataset.iterate_episodes([i]))
    space = dataset.observation_space
    states = iterate(batch_space(space), record.observations)
    return record, np.stack([gym.spaces.flatten(space, state) for state in states])


def find_faults(dataset, record, states):
    """Returns what is wrong with an episode, states its flattened observations."""
    T = len(record.rewards)
    if T == 0:
        return [Fault("it has no transitions")]
    fields = {
        "observations": (states, (T + 1, gym.spaces.flatdim(dataset.observation_space))),
        "actions": (record.actions, (T, gym.spaces.flatdim(dataset.action_space))),
        "rewards": (record.rewards, (T, 1)),
        "terminations": (record.terminations, (T, 1)),
        "truncations": (record.truncations, (T, 1)),
    }
    faults = []
    for key, (x, needed) in fields.items():
        sizes = (len(x), math.prod(x.shape[1:]))
        if sizes != needed:
            faults.append(Fault(f"{key} have the shape {sizes}, not {needed}"))
        elif not is_finite(x):
            faults.append(Fault(f"{key} hold NaN, inf or numbers too large for float32"))
    space = gym.spaces.flatten_space(dataset.observation_space)
    if not faults and measure_excess(states, space).any():
        faults.append(Fault("observations lie outside of their space", False))
    if record.terminations[:-1].any():
        faults.append(Fault("a terminal inside; scripts leave out what follows it", False))
    if not record.terminations[-1:].any() and not record.truncations[-1:].any():
        faults.append(Fault("the end is not marked, as a termination or truncation", False))
    return faults


def check_dataset(dataset):
    """Prints what is wrong with a dataset. Returns whether scripts refuse it."""
    episodes_of = {}  # fault -> the episodes that have it
    excess = [np.zeros(0)]  # of actions
    num_following = 0
    unreadable = None
    for i in dataset.episode_indices:
        try:
            record, states = read_episode(dataset, i)
            faults = find_faults(dataset, record, states)
        except Exception as error:
            reason = " ".join(str(error).split())
            unreadable = unreadable or Fault(f"cannot be read ({reason})")  # the first one's
            faults = [unreadable]
        for fault in faults:
            episodes_of.setdefault(fault, []).append(str(i))
        if not any(fault.is_refused for fault in faults):
            excess.append(measure_excess(record.actions, dataset.action_space))
            num_following += np.logical_or.accumulate(record.terminations)[:-1].sum()
    for fault, episodes in episodes_of.items():
        if len(episodes) > 10:
            episodes[10:] = [f"... ({len(episodes)} episodes)"]
        print(f"{dataset.id}: episode {', '.join(episodes)}: {fault.text}")
    if num_following:
        print(f"{dataset.id}: {num_following} transitions follow a terminal within their episode")
    excess = np.concatenate(excess)
    print_excess(dataset.id, excess)
    if not episodes_of and not excess.any():
        print(f"{dataset.id}: nothing found in {len(excess)} transitions")
    return any(fault.is_refused for fault in episodes_of)


def check(args):
    """Says what is wrong with the datasets of --env. Exit code 1: scripts refuse one."""
    with or_exit(f"--env {args.env} cannot be opened"):
        datasets = open_datasets(args.env)
    np.seterr(over="ignore")  # it is said in words
    refused = [dataset.id for dataset in datasets if check_dataset(dataset)]
    sys.stdout.flush()  # before the error, where both go into one file
    require(not refused, f"scripts refuse {', '.join(refused)} for what is said above")


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


def check_values(args):
    """Ends the program if a flag is an empty text, or a number that is NaN or makes no sense."""
    for name, value in asdict(args).items():
        flag = f"--{name.replace('_', '-')}"
        require(value != "", f"{flag} is empty")
        if type(value) in (int, float) and name not in ("seed", "min_return"):
            require(0 < value < math.inf, f"{flag} {value}: must be a positive number")
    require(getattr(args, "seed", 0) >= 0, "--seed must be at least 0")


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


class Source(NamedTuple):
    """What --env or --other names."""

    datasets: list[minari.MinariDataset]
    episodes: list[EpisodeBuffer]  # as Minari stores them, but without infos
    crc: int  # of the episodes as every script reads them


class Environment(NamedTuple):
    """What a dataset is of. A learner makes its environment by the spec's id."""

    spec: EnvSpec | None
    observation_space: gym.Space
    action_space: gym.Space


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


def first_rows(x, n):
    """Returns the first n rows of an array, or of all arrays in a dictionary or tuple."""
    if isinstance(x, dict):
        return {key: first_rows(value, n) for key, value in x.items()}
    if isinstance(x, tuple):
        return tuple(first_rows(value, n) for value in x)
    return x[:n]


def read_source(env):
    """Returns the datasets that --env names, and their episodes up to the first terminal."""
    datasets = open_datasets(env)
    loaded = load_episodes(datasets)
    episodes = []
    for dataset in datasets:
        for record in dataset.iterate_episodes():
            T = len(loaded[len(episodes)].rewards)
            episode = EpisodeBuffer(
                observations=first_rows(record.observations, T + 1),
                actions=record.actions[:T],
                rewards=record.rewards[:T],
                terminations=record.terminations[:T],
                truncations=record.truncations[:T],
            )
            episodes.append(episode)
    return Source(datasets, episodes, checksum(x for episode in loaded for x in episode))


def count_transitions(episodes):
    """Returns how many transitions the episodes have together."""
    return sum(len(episode) for episode in episodes)


def find_return(episode):
    """Returns the sum of the rewards; one of float16 would overflow."""
    return episode.rewards.sum(dtype=np.float64)


# --- files ---

# flags that may differ when --out exists: paths (of inputs the checksums count) and the machine
FREE = "env aug checkpoint diffusion data run env_package device track out versions".split()


def require_same(path, old, new, flag="--out"):
    """Ends the program unless what is at path was made with the same flags from the same inputs."""
    new = json.loads(json.dumps(new))  # as old, which comes from a file
    for key, value in new.items():
        same = key in FREE or old.get(key) == value
        require(same, f"{path} was made with {key} {old.get(key)}; choose another {flag}")


def try_to_write(path):
    """Ends the program now if no file could be written at path when the work is done."""
    folder = Path(path).resolve().parent
    with or_exit(f"{path} cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def read_made_with(out):
    """Returns what the dataset in a folder was made with."""
    with or_exit(f"{out} is nothing of make_dataset.py; choose another --out"):
        return json.loads((out / "data" / "metadata.json").read_text())["made_with"]


def try_out(out):
    """Ends the program now if --out is not of this script, or cannot be written."""
    if out and Path(out).exists():
        read_made_with(Path(out))
    else:
        try_to_write(out or __file__)  # beside this script, the default


def try_size(path, episodes, environment):
    """Writes zeros, for a moment, as many as the episodes will take at most. HDF5 itself answers a
    full disk with a crash."""
    _, observation_space, action_space = environment
    width = gym.spaces.flatdim(observation_space) + gym.spaces.flatdim(action_space) + 2
    size = 9 * width * count_transitions(episodes) + 2**15 * len(episodes)  # measured: less
    with open(path, "wb") as file:
        for _ in range(0, size, 2**20):
            file.write(bytes(2**20))
    path.unlink()


def write_dataset(args, inputs, metadata, episodes, environment):
    """Writes a folder with a Minari dataset, all or nothing. One that is there is left alone."""
    name = re.sub(r"-v0$", "", metadata["dataset_id"])
    out = Path(args.out or Path(__file__).parent / name).resolve()
    made_with = {"command": type(args).__name__.lower(), **asdict(args), **inputs}
    for key in ("file", "other"):  # an input is what it holds
        made_with.pop(key, None)
    if out.exists():
        require_same(out, read_made_with(out), made_with)
        print(f"{out} is finished, made with these flags")
        return
    metadata |= {"made_with": made_with, "minari_version": minari.__version__}
    with (
        or_exit(f"{out} cannot be written"),
        tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder,
    ):
        data = Path(folder) / "new" / "data"
        data.parent.mkdir()
        try_size(Path(folder) / "zeros", episodes, environment)
        spec, observation_space, action_space = environment
        storage = MinariStorage.new(data, observation_space, action_space, spec)
        storage.update_metadata(metadata)
        storage.update_episodes(episodes)
        os.rename(data.parent, out)
    returns = np.array([find_return(episode) for episode in episodes])
    size = f"{len(episodes)} episodes, {count_transitions(episodes)} transitions"
    text = f"return mean {returns.mean():.1f}, min {returns.min():.1f}, max {returns.max():.1f}"
    print(f"wrote {args.out or out}: {metadata['dataset_id']}, {size}, {text}")


MAKERS = {
    Fraction: make_fraction,
    Mix: make_mix,
    Duplicate: make_duplicate,
    FromD4rl: convert_d4rl,
    Check: check,
}


def main(args):
    check_values(args)
    if not isinstance(args, Check):
        try_out(args.out)
    MAKERS[type(args)](args)


if __name__ == "__main__":
    main(tyro.cli(Fraction | Mix | Duplicate | FromD4rl | Check, description=__doc__))
