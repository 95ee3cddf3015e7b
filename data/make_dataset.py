# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy", "gymnasium[mujoco]", "h5py", "minari[hdf5,hf]", "tyro"]
# ///
"""The datasets of the paper's ablations, and D4RL's own files, as folders that --env takes.

    python data/make_dataset.py fraction --env halfcheetah-medium --fraction 0.05        E.3
    python data/make_dataset.py mix --env A --other B --num-transitions 10000            E.2
    python data/make_dataset.py duplicate --env data/mixed --top 1 --min-return 4000     E.2
    python data/make_dataset.py from-d4rl --file hopper_medium_replay-v2.hdf5

Reads Minari datasets, or an HDF5 file of D4RL. Writes a folder with a Minari dataset (--out).

Episodes are drawn whole: a number of transitions is met as nearly as they can. The same --seed
draws the same ones, in `mix` as in `fraction --num-transitions` (the expert-only data of E.2).
"""

import json
import math
import os
import re
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
import tyro
from gymnasium.envs.registration import EnvSpec
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
    out: str | None = None  # folder to write. See fraction


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
FIELDS = ("observations", "actions", "rewards", "terminations", "truncations")  # of an episode


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


def read_episodes(datasets):
    """Returns all episodes as Minari stores them, without their infos, which no script reads."""
    with blame(f"{' + '.join(dataset.id for dataset in datasets)} cannot be read"):
        raw = [e for dataset in datasets for e in dataset.iterate_episodes()]
    return [EpisodeBuffer(**{key: getattr(e, key) for key in FIELDS}) for e in raw]


def count_near(episodes, num_transitions):
    """Returns how many episodes, in this order, come nearest to a number of transitions; >= 1."""
    lengths = [len(e) for e in episodes]
    return int(np.abs(np.cumsum(lengths) - num_transitions).argmin()) + 1


def draw_episodes(episodes, num_transitions, seed):
    """Draws episodes at random, without repetition, with about num_transitions in total. They stay
    in the order of the dataset."""
    total = sum(map(len, episodes))
    has_them = 0 < num_transitions <= total
    require(has_them, f"cannot draw {num_transitions} transitions from a dataset of {total}")
    order = np.random.default_rng(seed).permutation(len(episodes))
    order = order[: count_near([episodes[i] for i in order], num_transitions)]
    return [episodes[i] for i in sorted(order)]


# --- the ablations ---


def make_fraction(args):
    one = (args.fraction is None) != (args.num_transitions is None)
    require(one, "give either --fraction or --num-transitions")
    datasets = open_datasets(args.env)
    episodes = read_episodes(datasets)
    number, label = args.num_transitions, f"fraction-of-{args.num_transitions}"
    if number is None:
        number = round(args.fraction * sum(map(len, episodes)))
        label = f"fraction{100 * args.fraction:g}"
    episodes = draw_episodes(episodes, number, args.seed)
    derive(args, datasets, f"{label}-seed{args.seed}", episodes)


def make_mix(args):
    one = (args.num_transitions is None) != (args.ratio is None)
    require(one, "give either --num-transitions or --ratio")
    datasets, others = open_datasets(args.env), open_datasets(args.other)
    episodes, number = read_episodes(datasets), args.num_transitions
    if number is None:
        number = round(args.ratio * sum(map(len, episodes)))
    episodes += draw_episodes(read_episodes(others), number, args.seed)
    derive(args, datasets + others, f"mix{number}-seed{args.seed}", episodes)


def make_duplicate(args):
    datasets, number = open_datasets(args.env), args.num_transitions
    episodes = read_episodes(datasets)
    best_first = sorted(episodes, key=lambda e: -e.rewards.sum())
    best = best_first[: math.ceil(args.top * len(episodes))]
    best = [e for e in best if args.min_return is None or e.rewards.sum() >= args.min_return]
    require(best, f"no episode has --top {args.top} and --min-return {args.min_return}")
    copies = best * math.ceil(number / sum(map(len, best)))  # the same arrays, again and again
    copies = copies[: count_near(copies, number)]
    floor = "" if args.min_return is None else f"-min{args.min_return:g}"
    derive(args, datasets, f"top{100 * args.top:g}{floor}-copied{number}", episodes + copies)


def derive(args, datasets, label, episodes):
    """Writes episodes with the environment, spaces and references of the first dataset. The id is
    that of the datasets, with label: hopper-medium-v0 -> hopper-medium-fraction10-seed0-v0."""
    first, ids = datasets[0], "-".join(dataset.id for dataset in datasets)
    spaces = first.observation_space, first.action_space
    for other in datasets:
        same = (other.observation_space, other.action_space) == spaces
        same &= getattr(other.env_spec, "id", None) == getattr(first.env_spec, "id", None)
        require(same, f"{first.id} and {other.id} differ in environment or spaces: no mixing")
    name, version = re.fullmatch(r"(.+?)(?:-v(\d+))?", ids).groups()
    name = re.sub(r"[^\w-]", "-", name)  # mujoco/hopper/medium -> mujoco-hopper-medium
    label = re.sub(r"[^\w-]", "p", label)  # 0.5 -> 0p5
    kept = "eval_env_spec|ref_.*|num_episodes_average_score|requirements|algorithm_name|author.*"
    metadata = {k: x for k, x in first.storage.metadata.items() if re.fullmatch(kept, k)}
    metadata["dataset_id"] = f"{name}-{label}-v{version or 0}"
    write(args, metadata, episodes, first.env_spec, *spaces)


# --- D4RL ---
#
# A D4RL file holds all episodes in a row: observations, actions, rewards, terminals [N]. Most have
# timeouts [N], locomotion v1 and v2 also next_observations.
#
# - An episode ends at a terminal or a timeout; without timeouts, as in Kitchen, also after the
#   task's number of steps. What follows the last end is one more, truncated, episode.
# - Not all ends are marked. One is also where next_observations is not the next row's observation,
#   or, in a file without, where the states jump (find_jumps). It counts as a timeout.
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

LEVELS = "(random|medium|expert|medium-replay|full-replay|medium-expert)-v[012]"
TASKS = {  # D4RL's name -> environment, if one observes the same; sizes of state and action, steps
    # of an episode; returns of a random policy and of an expert
    f"halfcheetah-{LEVELS}": ("HalfCheetah-v4", 17, 6, 1000, -280.178953, 12135.0),
    f"hopper-{LEVELS}": ("Hopper-v4", 11, 3, 1000, -20.272305, 3234.3),
    f"walker2d-{LEVELS}": ("Walker2d-v4", 17, 6, 1000, 1.629008, 4592.3),
    "maze2d-umaze-v1": (None, 4, 2, 300, 23.85, 161.86),
    "maze2d-medium-v1": (None, 4, 2, 600, 13.13, 277.39),
    "maze2d-large-v1": (None, 4, 2, 800, 6.7, 273.99),
    "maze2d-umaze-dense-v1": (None, 4, 2, 300, 68.537689, 193.662856),
    "maze2d-medium-dense-v1": (None, 4, 2, 600, 44.264742, 297.455255),
    "maze2d-large-dense-v1": (None, 4, 2, 800, 30.569041, 303.485738),
    "antmaze-umaze(-diverse)?-v[012]": (None, 29, 8, 700, 0.0, 1.0),
    "antmaze-(medium|large)-(play|diverse)-v[012]": (None, 29, 8, 1000, 0.0, 1.0),
    "pen-.+-v[01]": ("AdroitHandPen-v1", 45, 24, 100, 96.262799, 3076.8331),
    "door-.+-v[01]": ("AdroitHandDoor-v1", 39, 28, 200, -56.512833, 2880.5693),
    "hammer-.+-v[01]": ("AdroitHandHammer-v1", 46, 26, 200, -274.856578, 12794.134825),
    "relocate-.+-v[01]": ("AdroitHandRelocate-v1", 39, 30, 200, -6.425911, 4233.877797),
    "kitchen-(complete|partial|mixed)-v0": (None, 60, 9, 280, 0.0, 4.0),
}


def read_d4rl(path):
    """Returns the arrays of a D4RL file that make transitions, all with N rows, checked."""
    keys = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
    with blame(f"--file {path}: no whole file of D4RL"), h5py.File(path) as file:
        own = [key for key in keys if key in file or key in keys[:4]]
        data = {key: np.atleast_1d(file[key][()]) for key in own}
    N = len(data["observations"])
    require(N > 2, f"--file {path}: has {N} rows")
    widths = {key: (data[key].size // N,) for key in keys[:2]}
    widths["next_observations"] = widths["observations"]
    for key, x in data.items():
        shape = (N, *widths.get(key, ()))
        fits = len(x) == N and x.size == math.prod(shape)
        require(fits, f"--file {path}: {key} have the shape {x.shape}, not {shape}")
        fits = (np.abs(x) < np.finfo(np.float32).max).all()
        require(fits, f"--file {path}: {key} hold NaN, or numbers too large for float32")
        is_flag = key in ("terminals", "timeouts")
        data[key] = x.reshape(shape).astype(bool if is_flag else x.dtype)
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


def find_ends(data, max_episode_steps, ends_at_terminal):
    """Returns the rows [N] after which an episode ends, and says how many ends nothing marks.
    ends_at_terminal: False where the file goes on after a terminal, up to the timeout (antmaze)."""
    s, terminals = data["observations"], data["terminals"]
    ends = data.get("timeouts", False) | (terminals & ends_at_terminal)
    if "next_observations" in data:
        jumps = np.abs(s[1:] - data["next_observations"][:-1]).max(1) > 1e-4
    else:
        jumps = find_jumps(s)
    if num_cuts := (jumps & ~ends[:-1]).sum():
        print(f"{num_cuts} ends of episodes are not marked: cut where consecutive states jump")
    ends[:-1] |= jumps
    start = 0
    for i in range(len(s) if "timeouts" not in data else 0):  # the time limit
        ends[i] |= i + 1 - start == max_episode_steps
        start = i + 1 if ends[i] else start
    ends[-1] = True
    return ends


def split_episodes(data, ends):
    """Cuts the arrays of read_d4rl after the rows that ends [N] marks. Returns EpisodeBuffers."""
    s, a, r, terminals = (data[k] for k in ("observations", "actions", "rewards", "terminals"))
    episodes, start = [], 0
    for end in np.flatnonzero(ends) + 1:
        at_goal = np.flatnonzero(terminals[start:end])
        stop = start + at_goal[0] + 1 if len(at_goal) else end  # of what is kept
        if "next_observations" in data:
            last = data["next_observations"][stop - 1]
        elif stop < end:  # antmaze goes on
            last = s[stop]
        else:
            last = s[stop - 1]
            stop -= not terminals[stop - 1]
        kept, truncated = slice(start, stop), np.zeros(stop - start, bool)
        start = end
        if len(truncated):
            truncated[-1] = not terminals[stop - 1]
            states = np.concatenate([s[kept], last[None]])
            columns = states, a[kept], r[kept], terminals[kept], truncated
            episodes.append(EpisodeBuffer(**dict(zip(FIELDS, columns))))
    return episodes


def convert_d4rl(args):
    name = args.name or Path(args.file).stem.replace("_", "-").replace("-sparse", "")
    task = next((task for pattern, task in TASKS.items() if re.fullmatch(pattern, name)), None)
    advice = "give --name, as antmaze-umaze-v2 or kitchen-mixed-v0, or the environment as --env-id"
    if name.startswith("ant-"):
        advice = "Gymnasium's Ant does not observe its 111 numbers; take Minari's --env ant-medium"
    require(task or args.env_id, f"{name}: no dataset of D4RL that is known here; {advice}")
    data = read_d4rl(args.file)
    dims = (data["observations"].shape[1], data["actions"].shape[1])
    if args.env_id:
        robotics = "" if args.env_id in gym.registry else "gymnasium_robotics:"
        with blame(f"--env-id {args.env_id}: cannot be made"):
            env = gym.make(f"{robotics}{args.env_id}")
        action_space, env_spec = env.action_space, env.unwrapped.spec
        own = (gym.spaces.flatdim(env.observation_space), *action_space.shape)
    else:  # a script makes it by its id, be it Gymnasium's or gymnasium-robotics'
        action_space = gym.spaces.Box(-1.0, 1.0, dims[1:], np.float32)  # all of D4RL's robots
        env_spec, own = EnvSpec(task[0] or name, max_episode_steps=task[3]), task[1:3]
    require(dims == own, f"--file {args.file}: states and actions {dims}, {name} has {own}")
    steps = task[3] if task else env_spec.max_episode_steps
    ends = find_ends(data, steps, ends_at_terminal="antmaze" not in name)
    episodes = split_episodes(data, ends)
    print(f"{len(data['rewards'])} rows of {name}, {sum(map(len, episodes))} transitions kept")
    if not (args.env_id or task[0]):
        print(f"no environment here observes what {name} holds: learners need --eval-every 0")
    new_id = "d4rl-" + name + ("" if re.search(r"-v\d+$", name) else "-v0")
    references = {"ref_min_score": task[4], "ref_max_score": task[5]} if task else {}
    metadata = {"dataset_id": new_id, "author": {"D4RL"}, **references}
    space = gym.spaces.Box(-np.inf, np.inf, dims[:1], data["observations"].dtype)
    write(args, metadata, episodes, env_spec, space, action_space)


# --- output ---


def write(args, metadata, episodes, env_spec, observation_space, action_space):
    """Writes a folder with a Minari dataset, all or nothing. One that is there is left alone."""
    name = re.sub(r"-v0$", "", metadata["dataset_id"])
    out = Path(args.out or Path(__file__).parent / name).resolve()
    made_with = {"command": type(args).__name__.lower(), **asdict(args), "out": None}
    if out.exists():
        with blame(f"{out} is nothing of make_dataset.py; choose another --out"):
            old = json.loads((out / "data" / "metadata.json").read_text())["made_with"]
        other = [f"{key} {old.get(key)}" for key, x in made_with.items() if x != old.get(key)]
        require(not other, f"{out} was made with {', '.join(other)}; choose another --out")
        print(f"{out} is finished, made with these flags")
        return
    metadata |= {"made_with": made_with, "minari_version": minari.__version__}
    out.parent.mkdir(parents=True, exist_ok=True)
    with blame(f"--out {out}: cannot be written"):
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
            data = Path(folder) / "new" / "data"
            data.parent.mkdir()
            storage = MinariStorage.new(data, observation_space, action_space, env_spec)
            storage.update_metadata(metadata)
            storage.update_episodes(episodes)
            os.rename(data.parent, out)
    returns = np.array([e.rewards.sum() for e in episodes])
    size = f"{len(episodes)} episodes, {sum(map(len, episodes))} transitions"
    text = f"return mean {returns.mean():.1f}, min {returns.min():.1f}, max {returns.max():.1f}"
    print(f"wrote {args.out or out}: {metadata['dataset_id']}, {size}, {text}")


def main(args):
    makers = {Mix: make_mix, Duplicate: make_duplicate, FromD4rl: convert_d4rl}
    makers.get(type(args), make_fraction)(args)


if __name__ == "__main__":
    main(tyro.cli(Fraction | Mix | Duplicate | FromD4rl, description=__doc__))
