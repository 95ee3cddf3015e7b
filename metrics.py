# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.5", "numpy>=2", "scipy>=1.11", "matplotlib>=3.8",
#     "gymnasium[mujoco]>=1", "mujoco<3.12", "minari[hdf5,hf]>=0.5.4", "tyro>=0.9", "tqdm", "wandb"]
# ///
"""Is generated data plausible, novel and better? And: the results of a set of runs.

    python metrics.py --aug buffer.npz
    python metrics.py --aug a.npz b.npz --plot metrics.png
    python metrics.py --runs runs/* --table latex --plot curves.png

GTA (Lee et al., NeurIPS 2024), sections 5.1 and 5.4, appendices D, F.2, F.4, F.6 and F.7.
Reads buffers of gta_augment.py and the dataset that they were made from, or folders of runs.
Writes metrics.json (--out) and a figure (--plot); with --runs the figure alone.
"""

import importlib
import json
import math
import os
import re
import sys
import tempfile
import textwrap
import warnings
import zlib
from collections import defaultdict
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import minari
import numpy as np
import torch
import tyro
from gymnasium.vector.utils import batch_space, iterate
from matplotlib.figure import Figure
from scipy.spatial import cKDTree
from scipy.stats import pearsonr, ttest_ind
from tqdm import tqdm


@dataclass
class Args:
    # --- buffers ---
    aug: tuple[str, ...] = ()  # buffers to measure, side by side: --aug a.npz b.npz
    # short name (hopper-medium), Minari id, folder of a Minari dataset, or several joined by +.
    # Default: what the first --aug was made from
    env: str | None = None
    # > 0 adds a column for S4RL: the dataset with the noise of the learners' flag (C.1: 3e-4)
    s4rl_sigma: float = 0.0
    # at most so many of each buffer, in whole subtrajectories, and of the dataset are drawn (D)
    num_transitions: int = 1_000_000
    all: bool = False  # print every number, not the five that say most; --out has them all anyway
    env_package: str | None = None  # module to import that registers your own environment
    out: str = "metrics.json"  # file for all numbers of --aug
    seed: int = 0  # seed of what is drawn
    # --- runs ---
    runs: tuple[str, ...] = ()  # folders of runs to tabulate: --runs runs/*
    last: int = 1  # a seed's score is the mean of so many evaluations, the last ones
    # --- both ---
    table: Literal["text", "markdown", "latex"] = "text"  # form of the tables
    # figure (.png, .pdf, .svg): of --aug, returns (Figures 4c, 8), condition against return
    # (Figure 7) and one window; of --runs, the learning curves of each augmentation (Figure 10)
    plot: str | None = None
    # where nearest neighbours are searched; CUDA_VISIBLE_DEVICES picks the card
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    track: bool = False  # log to Weights & Biases; WANDB_PROJECT and WANDB_ENTITY say where


class Sample(NamedTuple):
    """N windows of H transitions: of a buffer; or a dataset's transitions, H = 1."""

    s: np.ndarray  # [N, H, obs_dim]
    a: np.ndarray  # [N, H, act_dim]
    r: np.ndarray  # [N, H] float64
    s_next: np.ndarray  # [N, H, obs_dim]
    terminal: np.ndarray  # [N, H] bool
    penalised: np.ndarray  # [N, H] bool: the reward holds stage A's penalty and says nothing
    # [N] the return that was asked for; NaN if a penalty in these steps is part of it
    condition: np.ndarray | None = None
    source: np.ndarray | None = None  # [N, 2] the windows they were made from: episode, first step
    source_r: np.ndarray | None = None  # [N, H] rewards of those
    asked: np.ndarray | None = None  # [N] part of the condition that falls to these H steps
    returns: np.ndarray | None = None  # [N, 2] of them, discounted: the source's, the generated


class Answers(NamedTuple):
    """What MuJoCo says, its state set to s and stepped with a. M transitions."""

    s_next: np.ndarray  # [M, obs_dim]; NaN, as r, where the simulation breaks down
    r: np.ndarray  # [M]
    terminal: np.ndarray  # [M] bool: the environment would have terminated


class Reference(NamedTuple):
    """The dataset's N states and actions, to which distances are measured."""

    sa: np.ndarray  # [N, obs_dim + act_dim]
    std: np.ndarray  # [obs_dim + act_dim]; 1 where nothing varies


# --- metrics ---


def dynamic_error(s_next, s_true, std):
    """Squared error of s' in standardised dimensions, their mean (eq. 11, 14). [M, d] -> [M]"""
    return (((s_next - s_true) / std) ** 2).mean(axis=-1)


def nearest_on_gpu(data, queries, rank):
    """What nearest_distance does, on a GPU, in float64. A copy's distance is 0 but for rounding."""
    return torch.cdist(queries, data).topk(rank, largest=False).values[:, -1]


def nearest_distance(data, queries, rank, device, label=""):
    """Distance from every query to its rank-th nearest row of data. [N, d], [M, d] -> [M]"""
    size = max(1, min(10_000, 100_000_000 // len(data)))
    on_cpu = device == "cpu"
    index = cKDTree(data) if on_cpu else torch.from_numpy(data).to(device)
    distances = []
    chunks = np.split(queries, range(size, len(queries), size))
    for chunk in show_progress(chunks, f"nearest, {label}"):
        if on_cpu:
            distance, _ = index.query(chunk, k=[rank], workers=-1)
            distances.append(distance[:, 0])
        else:
            chunk = torch.from_numpy(chunk).to(device)
            distances.append(nearest_on_gpu(index, chunk, rank).cpu())
    return np.concatenate(distances)


def novelty(reference, sample, rank, device, label=""):
    """Mean distance to the nearest transition of the dataset (eq. 12, 15), plain and squared, of
    states, actions and both, in the environment's units and standardised. Returns them by name.

    rank 2 is for the dataset itself: the distance to its nearest other transition.
    """
    obs_dim = sample.s.shape[-1]
    rows = np.concatenate([sample.s, sample.a], axis=-1, dtype=np.float64)
    rows = rows.reshape(-1, len(reference.std))
    parts = {"state": slice(obs_dim), "action": slice(obs_dim, None), "state-action": slice(None)}
    numbers = {}
    for units, scale in {"raw": 1.0, "standardised": reference.std}.items():
        for part, columns in parts.items():
            data = (reference.sa / scale)[:, columns]
            queries = (rows / scale)[:, columns]
            distance = nearest_distance(data, queries, rank, device, label)
            numbers[f"{part} novelty, {units}"] = distance.mean()
            numbers[f"{part} novelty, {units}, squared"] = (distance**2).mean()
    return numbers


def correlation(x, y):
    """Pearson's correlation where x is known; NaN if x or y does not vary. [N], [N] -> float"""
    known = np.isfinite(x)
    if known.sum() < 2:
        return math.nan
    warnings.filterwarnings("ignore", "An input array is constant")
    return pearsonr(x[known], y[known]).statistic


def measure(sample, answers, std):
    """All numbers of a sample by name, but for the novelty. std [obs_dim].

    Rewards that hold a penalty, and windows in whose steps one falls, are left out; in a condition
    a later one stays.
    """
    counted = ~sample.penalised
    numbers = {
        "transitions": sample.r.size,
        "terminal": sample.terminal.mean(),
        "reward": sample.r[counted].mean(),
    }
    if sample.source_r is not None:
        numbers["reward of the sources"] = sample.source_r[counted].mean()
    if answers:  # D.3, eq. 14
        error = dynamic_error(sample.s_next.reshape(answers.s_next.shape), answers.s_next, std)
        numbers |= {
            "oracle reward, not penalised": np.nanmean(answers.r[counted.ravel()]),
            "oracle reward": np.nanmean(answers.r),
            "oracle terminal": answers.terminal.mean(),
            "broken down": np.isnan(answers.r).mean(),
            "dynamic MSE": np.nanmean(error),
            "dynamic MSE, median": np.nanmedian(error),
        }
    if sample.condition is not None:  # F.6
        numbers["controllability"] = correlation(sample.condition, sample.r.sum(axis=1))
    return numbers


# --- oracle ---


def set_state(env, observation):
    """Puts MuJoCo into the state of a flattened observation. What it does not hold, the position
    in the world, is set to 0. Raises an error for an environment that it knows no way for."""
    if hasattr(env, "point_env"):  # PointMaze: achieved goal, desired goal, position, velocity
        env.goal = observation[2:4]
        env.point_env.set_state(observation[4:6], observation[6:8])
        return
    nq = env.model.nq
    nv = env.model.nv
    if hasattr(env, "observation_structure"):
        hidden = env.observation_structure.get("skipped_qpos", 0)
    else:  # version 4
        hidden = nq + nv - len(observation)
    assert 0 <= hidden <= 2, "how its observations make a state is not known"
    state = np.concatenate([np.zeros(hidden), observation])
    env.set_state(state[:nq], state[nq : nq + nv])


def ask_oracle(env, sample, label, roll_out=False):
    """Returns the answers for the M transitions of a sample, None without an oracle.

    For roll_out, MuJoCo's state is set to the first of a window only, and goes its own way then.
    """
    if env is None:
        return None
    env.reset(seed=0)
    troubles = getattr(env, "point_env", env).data.warning.number
    answers = []
    windows = list(zip(sample.s, sample.a))
    for states, actions in show_progress(windows, f"oracle, {label}"):
        for t, (s, a) in enumerate(zip(states, actions)):
            if t == 0 or not roll_out:
                set_state(env, s.astype(np.float64))
                troubles[:] = 0
            observation, reward, terminated, _, _ = env.step(a)
            s_next = gym.spaces.flatten(env.observation_space, observation)
            if troubles.any():  # numbers out of all bounds: MuJoCo has gone back to its start
                s_next = np.full_like(s_next, np.nan)
                reward = np.nan
            answers.append((s_next, reward, terminated))
    return Answers(*map(np.array, zip(*answers)))


def make_oracle(dataset):
    """Makes the environment that was recorded, as it is registered here: no wrappers, no code that
    the dataset names."""
    name = env_id(dataset)
    assert name, f"{dataset.id} names no environment"
    if name not in gym.registry:
        importlib.import_module("gymnasium_robotics")
    assert name in gym.registry, f"{name} is not registered; see --env-package"
    kwargs = dict(dataset.env_spec.kwargs)
    kwargs.pop("render_mode", None)  # no window opens
    env = gym.make(gym.registry[name], **kwargs).unwrapped
    recorded = dataset.action_space
    made = env.action_space
    assert recorded == made, f"the actions of {dataset.id} are {recorded}, those of {name} {made}"
    return env


def find_oracle(dataset, episodes, std):
    """Returns the environment that was recorded if MuJoCo reproduces the records, else None, and a
    sentence that says so.

    It has to reproduce a twentieth of 500 transitions, and fails where velocities were clipped when
    they were observed (for random actions in Walker2d, three quarters of them).
    """
    records = sample_dataset(episodes, 500, np.random.default_rng(0))
    try:
        env = make_oracle(dataset)
        answers = ask_oracle(env, records, "a trial")
        states = dynamic_error(records.s_next[:, 0], answers.s_next, std) < 1e-6
    except Exception as error:  # whatever an unknown environment does
        return None, f"none ({' '.join(str(error).split())})"
    rewards = np.abs(records.r[:, 0] - answers.r) < 1e-3
    said = "MuJoCo reproduces {:.1%} of the recorded next states, {:.1%} of the rewards"
    said = said.format(states.mean(), rewards.mean())
    if states.mean() < 0.05:
        return None, f"none, {said}"
    return env, said


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


def show_progress(items, label):
    """Returns the items behind a progress bar."""
    every = 0.1 if sys.stderr.isatty() else 60  # seconds: a log file takes a line a minute
    return tqdm(items, label, leave=False, mininterval=every, maxinterval=every)


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


def read_buffer(path):
    """Returns the buffer at path, of gta_augment.py or a program of your own."""
    with or_exit(f"--aug {path}: no buffer of gta_augment.py"):
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in Buffer._fields if key in file}
        metadata = json.loads(str(arrays.pop("metadata")))
        buffer = Buffer(metadata, **arrays)
        metadata["label"] = metadata.get("label") or metadata.get("method") or Path(path).stem
        found = (metadata["format"], metadata["format_version"])
    require(found == ("gta-buffer", 1), f"--aug {path}: {found}, not version 1 of gta-buffer")
    finite = all(np.isfinite(x).all() for x in arrays.values())
    require(finite, f"--aug {path} holds NaN or infinite numbers")
    return buffer


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


def require_made_from(flag, metadata, inputs):
    """Ends the program if the buffer that a flag names was made from other data than inputs."""
    for key, value in inputs.items():
        found = metadata.get(key, value)  # a buffer of your own may lack it
        require(found == value, f"{flag} was made from {key} {found}, not from {value}")


def draw_windows(sample, num_transitions, rng):
    """Draws whole windows, at most so many transitions, without replacement. Keeps their order."""
    N, H = sample.r.shape
    most = math.ceil(num_transitions / H)
    if N <= most:
        return sample
    index = np.sort(rng.choice(N, most, replace=False))
    return Sample(*(None if x is None else x[index] for x in sample))


def sample_dataset(episodes, num_transitions, rng):
    """Draws single transitions of the dataset."""
    transitions = []
    for s, a, r, terminal in episodes:
        transitions.append((s[:-1], a, r, s[1:], terminal))
    fields = [np.concatenate(x)[:, None] for x in zip(*transitions)]
    sample = Sample(*fields, penalised=np.zeros_like(fields[-1]))
    return draw_windows(sample, num_transitions, rng)


def add_state_noise(sample, std, sigma, rng):
    """S4RL: Gaussian noise of sigma deviations std [obs_dim] on s and s'."""
    s = rng.normal(sample.s, sigma * std)
    s_next = rng.normal(sample.s_next, sigma * std)
    return sample._replace(s=s, s_next=s_next)


def sample_buffer(buffer, episodes, num_transitions, rng):
    """Draws whole windows of a buffer, made from these episodes."""
    stage_a = buffer.metadata.get("diffusion", {})
    s, a, r, terminal = buffer[1:5]
    terminal = terminal.astype(bool)
    costly = terminal & (stage_a.get("terminal_penalty", 0.0) != 0)  # A.1
    penalised = costly & (not buffer.metadata.get("restore_terminal_reward"))
    sample = Sample(s[:, :-1], a, r.astype(np.float64), s[:, 1:], terminal, penalised)
    if buffer.condition is not None:
        condition = np.where(costly.any(axis=1), np.nan, buffer.condition)
        sample = sample._replace(condition=condition)
    if buffer.episode is not None and buffer.timestep is not None:  # not SynthER's, a user's own
        source = np.column_stack([buffer.episode, buffer.timestep])
        sample = add_sources(sample._replace(source=source), stage_a, episodes)
    return draw_windows(sample, num_transitions, rng)


def add_sources(sample, stage_a, episodes):
    """Adds the rewards of the source windows, and what their H steps were asked for: the condition
    is a discounted return to the episode's end, so what the source earned after them is no part."""
    H = sample.r.shape[1]
    penalty = stage_a.get("terminal_penalty", 0.0)
    most = max(len(e.rewards) for e in episodes)
    discount = stage_a.get("gamma", math.nan) ** np.arange(most + 1)
    rewards = []
    later = []
    for i, t in sample.source:
        r = episodes[i].rewards[t:]
        rest = (r - penalty * episodes[i].terminals[t:])[H:]
        rewards.append(r[:H])
        later.append(rest @ discount[H : H + len(rest)])
    source_r = np.stack(rewards)
    sample = sample._replace(source_r=source_r)
    if sample.condition is None or "gamma" not in stage_a:
        return sample
    returns = np.stack([source_r, sample.r], axis=1) @ discount[:H]
    return sample._replace(asked=sample.condition - later, returns=returns)


def dataset_returns(episodes, horizon):
    """The reward sums of all windows of horizon transitions in the dataset. [W]"""
    totals = [np.append(0.0, np.cumsum(e.rewards)) for e in episodes]
    return np.concatenate([total[horizon:] - total[:-horizon] for total in totals])


def make_reference(episodes):
    """Returns the dataset's states and actions, and their deviation."""
    rows = [np.column_stack([e.observations[:-1], e.actions]) for e in episodes]
    sa = np.concatenate(rows, dtype=np.float64)
    std = sa.std(axis=0)
    return Reference(sa, np.where(std > 1e-6, std, 1.0))


def load_sample(path, args, inputs, episodes):
    """Returns what is drawn of the buffer at path, and its metadata. Ends the program if it was
    made from other data."""
    buffer = read_buffer(path)
    require_made_from(f"--aug {path}", buffer.metadata, inputs)
    N, H = buffer.actions.shape[:2]
    s, a = episodes[0][:2]
    shapes = [(N, H + 1, s.shape[1]), (N, H, a.shape[1]), (N, H), (N, H)]
    found = [x.shape for x in buffer[1:5]]
    require(found == shapes, f"--aug {path}: its arrays are {found}, not {shapes}")
    with or_exit(f"--aug {path}: its sources are not in the dataset"):
        rng = np.random.default_rng(args.seed)
        sample = sample_buffer(buffer, episodes, args.num_transitions, rng)
    crc = checksum(x for x in buffer[1:] if x is not None)
    return sample, {**buffer.metadata, "file": path, "crc": crc}


# --- tables ---

HEADLINES = {  # the first lines of the table: names in metrics.json, and what is printed
    "reward of the sources": "reward of the sources, per step",
    "reward": "reward as generated, per step",
    "oracle reward, not penalised": "true reward (MuJoCo), per step",
    "dynamic MSE": "error of s', mean square, standardised",
    "controllability": "controllability, Pearson's r",
}
PAPER = {  # GTA's true reward (Table 21), error of s' (Table 23), and controllability (F.6)
    "halfcheetah-medium": (6.08, 0.0085, 0.55),
    "halfcheetah-medium-replay": (3.99, 0.0125, 0.91),
    "halfcheetah-medium-expert": (10.07, 0.0079, 0.99),
    "hopper-medium": (3.28, 0.0008),
    "hopper-medium-replay": (2.70, 0.0012),
    "hopper-medium-expert": (3.87, 0.0008),
    "walker2d-medium": (3.51, 0.0298),
    "walker2d-medium-replay": (3.35, 0.0277),
    "walker2d-medium-expert": (4.81, 0.0349),
}


def find_paper_values(dataset_ids):
    """Returns the paper's values of the headlines for a dataset like this one, {} if it has none.
    mujoco/hopper/medium-v0 and mujoco/hopper/expert-v0 are hopper-medium-expert."""
    words = re.findall(r"halfcheetah|hopper|walker2d|medium|replay|expert", " ".join(dataset_ids))
    values = PAPER.get("-".join(dict.fromkeys(words)), ())
    return dict(zip(list(HEADLINES)[2:], values))


def tabulate_numbers(args, numbers, paper):
    """Returns the table of numbers {sample: {name: number}}: the headlines, and the rest with
    --all. paper is {name: number}."""
    names = dict.fromkeys(HEADLINES)
    columns = {**numbers, "GTA in the paper": paper} if paper else numbers
    if args.all:
        for column in numbers.values():
            names |= dict.fromkeys(column)
    rows = [[args.env, *columns]]
    for name in names:
        cells = [HEADLINES.get(name, name)]
        for column in columns.values():
            value = column.get(name)
            cell = "-" if value is None else f"{value:.4g}"
            source = column.get("reward of the sources")
            if name == "oracle reward, not penalised" and source and value is not None:
                cell += f" ({(value - source) / abs(source):+.1%})"
            cells.append(cell)
        rows.append(cells)
    return rows


LAYOUTS = {  # of a line of a table: how it begins, what parts its cells, how it ends
    "text": ("", "  ", ""),
    "markdown": ("| ", " | ", " |"),
    "latex": ("", " & ", r" \\"),
}


def render(rows, form):
    """Lays out a table, a list of rows of strings whose first is the head."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    first, between, last = LAYOUTS[form]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths)]
        cells[0] = row[0].ljust(widths[0])
        lines.append(first + between.join(cells) + last)
    if form == "markdown":
        lines.insert(1, "|---" + "|---:" * (len(widths) - 1) + "|")
    if form == "latex":
        lines = [re.sub("([%_#])", r"\\\1", line).replace("+-", r"$\pm$") for line in lines]
        lines = [r"\begin{tabular}{l" + "r" * (len(widths) - 1) + "}", *lines, r"\end{tabular}"]
    return "\n".join(lines)


# --- figures ---


STYLES = {
    "dataset": {"color": "0.5", "linestyle": ":"},
    "source": {"color": "0.5", "linestyle": ":"},
    "generated": {"color": "C0", "linestyle": "-"},
    "true (MuJoCo)": {"color": "C1", "linestyle": "--"},
}


def draw_returns(episodes, sample, answers, axes):
    """Draws how the returns of windows are distributed (Figures 4c, 8)."""
    H = sample.r.shape[1]
    whole = ~sample.penalised.any(axis=1)
    returns = {"dataset": dataset_returns(episodes, H), "generated": sample.r.sum(axis=1)[whole]}
    if answers:
        true = answers.r.reshape(sample.r.shape).sum(axis=1)[whole]
        returns["true (MuJoCo)"] = true[np.isfinite(true)]
    for label, values in returns.items():
        if len(values) > 0:
            bounds = np.quantile(values, [0.002, 0.998])  # without outliers
            style = STYLES[label]
            axes.hist(values, 30, range=bounds, density=True, histtype="step", label=label, **style)
    axes.set(xlabel=f"return of {H} transitions", ylabel="density")


def draw_condition(sample, axes):
    """Draws the condition against the return of windows (Figure 7), both discounted and of their H
    steps: of the condition is left what is not due to what the source earned after them. So all of
    the amplification is asked of these steps, and most windows lie below the line."""
    shown = np.flatnonzero(np.isfinite(sample.asked))
    shown = np.random.default_rng(0).permutation(shown)[:5000]
    asked = sample.asked[shown]
    for label, returns in zip(("source", "generated"), sample.returns[shown].T):
        colour = STYLES[label]["color"]
        axes.scatter(asked, returns, s=4, color=colour, alpha=0.4, label=label)
    middle = asked.mean()
    axes.axline((middle, middle), slope=1, color="k", linestyle="--", label="as asked")
    axes.set(xlabel="condition less what came later", ylabel="discounted return")


def make_trajectories(episodes, sample, env):
    """Returns states and rewards {name: [H, obs_dim + 1]} of the window whose gain is the median:
    its source, what was generated, and where MuJoCo goes from its state under its actions."""
    gain = (sample.r - sample.source_r).sum(axis=1)
    i = np.argsort(gain)[len(gain) // 2]
    episode, t = sample.source[i]
    s = sample.s[i]
    source_s = episodes[episode].observations[t : t + len(s)]
    trajectories = {
        "source": np.column_stack([source_s, sample.source_r[i]]),
        "generated": np.column_stack([s, sample.r[i]]),
    }
    window = Sample(*(x[i : i + 1] for x in sample[:6]))
    answers = ask_oracle(env, window, "a window", roll_out=True)
    if answers:
        true_s = np.concatenate([s[:1], answers.s_next[:-1]])
        trajectories["true (MuJoCo)"] = np.column_stack([true_s, answers.r])
    return trajectories


def draw_column(trajectories, column, name, axes):
    """Draws a state's dimension, or the reward, of trajectories by step."""
    for label, trajectory in trajectories.items():
        axes.plot(trajectory[:, column], label=label, **STYLES[label])
    axes.set(xlabel="step of a window", ylabel=name)


def draw_path(trajectories, maze, axes):
    """Draws trajectories over the walls of a maze."""
    walls = [[cell == 1 for cell in row] for row in maze.maze_map]
    x = maze.x_map_center
    y = maze.y_map_center
    axes.imshow(walls, cmap="Greys", alpha=0.3, extent=(-x, x, -y, y))
    for label, trajectory in trajectories.items():
        axes.plot(trajectory[:, 0], trajectory[:, 1], label=label, **STYLES[label])


def list_pictures(episodes, sample, answers, env, std):
    """Returns the functions that draw the pictures that a buffer has, each onto axes."""
    pictures = [partial(draw_returns, episodes, sample, answers)]
    if sample.asked is not None and np.isfinite(sample.asked).any():
        pictures.append(partial(draw_condition, sample))
    if sample.source is None or sample.r.shape[1] == 1:
        return pictures
    trajectories = make_trajectories(episodes, sample, env)
    pictures.append(partial(draw_column, trajectories, -1, "reward"))
    if hasattr(env, "maze"):
        return [*pictures, partial(draw_path, trajectories, env.maze)]
    change = np.abs(trajectories["generated"] - trajectories["source"]).max(axis=0)
    for i in np.argsort(-change[:-1] / std)[:3]:
        pictures.append(partial(draw_column, trajectories, i, f"state, dimension {i}"))
    return pictures


def draw_figure(pictures):
    """Draws pictures {title: functions that draw onto axes}, at most three side by side."""
    most = max(map(len, pictures.values()))
    width = min(most, 3)
    height = math.ceil(most / 3)
    figure = Figure((1 + 3 * width, 2.8 * height * len(pictures)), layout="constrained")
    parts = figure.subfigures(len(pictures), squeeze=False)[:, 0]
    for part, (title, functions) in zip(parts, pictures.items()):
        part.suptitle(textwrap.fill(title, 90), fontsize=9)
        for number, draw in enumerate(functions, 1):
            axes = part.add_subplot(height, width, number)
            draw(axes)
            axes.legend(frameon=False, fontsize=7)
    return figure


# --- files ---

# flags that may differ when --out exists: paths (of inputs the checksums count) and the machine
FREE = "env aug checkpoint diffusion data run env_package device track out versions".split()


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


def name_figure(settings):
    """Returns what stands in a figure as its title, which tells the command that made it."""
    return f"metrics.py {zlib.crc32(json.dumps(settings).encode()):08x}"


def claim_figure(path, settings):
    """Ends the program if the figure cannot be written, or would replace another command's."""
    if path is None:
        return
    fits = Path(path).suffix in (".png", ".pdf", ".svg")
    require(fits, f"--plot {path}: must end in .png, .pdf or .svg")
    if Path(path).exists():
        is_ours = name_figure(settings).encode() in Path(path).read_bytes()
        require(is_ours, f"{path} is not of this command; choose another --plot")
    try_to_write(path)


def save_figure(figure, path, settings):
    """Writes a figure, its title in it."""
    title = name_figure(settings)
    with new_file(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:], dpi=130, metadata={"Title": title})
    print(f"wrote {path}")


def claim_report(path, settings):
    """Ends the program if metrics.json cannot be written, or was made by another command."""
    if Path(path).exists():
        with or_exit(f"--out {path}: no file of metrics.py; choose another --out"):
            old = json.loads(Path(path).read_text())
            old = {**old["args"], **old}
        require_same(path, old, settings)
    try_to_write(path)


# --- buffers ---


def draw_samples(args, inputs, episodes, std):
    """Returns what is drawn of the dataset and of all buffers {name: Sample}, and the buffers'
    metadata {name: dictionary}."""
    rng = np.random.default_rng(args.seed)
    samples = {"dataset": sample_dataset(episodes, args.num_transitions, rng)}
    buffers = {}
    for path in args.aug:
        sample, metadata = load_sample(path, args, inputs, episodes)
        label = metadata["label"]
        name = f"{label} {path}" if label in samples else label
        samples[name] = sample
        buffers[name] = metadata
    if args.s4rl_sigma:
        noised = add_state_noise(samples["dataset"], std, args.s4rl_sigma, rng)
        samples[f"s4rl({args.s4rl_sigma})"] = noised
    return samples, buffers


def load_inputs(args):
    """Returns the datasets of --env, their episodes, and what tells them from others."""
    args.env = args.env or read_buffer(args.aug[0]).metadata.get("env", DEFAULT_ENV)
    datasets = open_datasets(args.env)
    episodes = load_episodes(datasets)
    return datasets, episodes, identify_dataset(datasets, episodes)


def write_report(args, report):
    """Writes metrics.json."""
    with new_file(args.out) as file:
        file.write_text(json.dumps({**report, "args": asdict(args)}, indent=2) + "\n")
    print(f"wrote {args.out}")


def measure_buffers(args):
    """Prints the table of --aug, writes --out and --plot."""
    if args.env_package:
        sys.path.append(os.getcwd())
        with or_exit(f"--env-package {args.env_package} cannot be imported"):
            importlib.import_module(args.env_package)
    datasets, episodes, inputs = load_inputs(args)
    reference = make_reference(episodes)
    std = reference.std[: episodes[0].observations.shape[1]]
    samples, buffers = draw_samples(args, inputs, episodes, std)
    settings = {key: getattr(args, key) for key in ("s4rl_sigma", "num_transitions", "seed")}
    settings |= {**inputs, "buffer_crcs": [metadata["crc"] for metadata in buffers.values()]}
    claim_report(args.out, settings)
    claim_figure(args.plot, settings)
    if args.track:
        with or_exit("--track"):
            import wandb

            wandb.init(config={**asdict(args), **settings})

    env, oracle = find_oracle(datasets[0], episodes, std)
    print("oracle:", oracle)
    numbers = {}
    pictures = {}
    for name, sample in samples.items():
        answers = ask_oracle(env, sample, name)
        rank = 2 if name == "dataset" else 1
        found = measure(sample, answers, std)
        found |= novelty(reference, sample, rank, args.device, name)
        numbers[name] = {key: None if math.isnan(x) else float(x) for key, x in found.items()}
        if name in buffers:
            pictures[name] = list_pictures(episodes, sample, answers, env, std)
    rows = tabulate_numbers(args, numbers, find_paper_values(inputs["dataset_ids"]))
    print(render(rows, args.table))
    write_report(args, {"numbers": numbers, "buffers": buffers, "oracle": oracle, **settings})
    if args.plot:
        save_figure(draw_figure(pictures), args.plot, settings)
    if args.track:
        wandb.log(numbers)


# --- runs ---

# keys of config.json that may differ between what is compared: what is compared, seeds and places
MAY_DIFFER = {
    *(*FREE, "script", "seed", "num_seeds", "aug_label", "aug_only", "s4rl_sigma"),
    *("env_id", "dataset_ids", "dataset_crc", "buffer_crc", "model_crc", "task", "n_step"),
    "dataset_score",
}


class Run(NamedTuple):
    folder: Path
    config: dict
    curves: dict  # {(seed, agent): {update: score}}
    script: str
    augmentation: str
    environment: str
    dataset: int | str  # checksum, or the environment's name in an older run
    buffer: int | None  # checksum, if it was trained on one


def note(line):
    """Says something beside the tables."""
    print(line, file=sys.stderr)


def parse_run(folder):
    """Returns the run in a folder. Raises an error if it has not come to its end."""
    config = json.loads((folder / "config.json").read_text())
    if config["script"] == "drqbc":  # each seed has its own latents, and buffers of them
        config |= {"dataset_crc": None, "buffer_crc": None}
    curves = defaultdict(dict)
    rows = np.loadtxt(folder / "evals.csv", delimiter=",", skiprows=1, ndmin=2)
    for update, agent, _, score in rows:
        curves[config["seed"], int(agent)][int(update)] = score
    steps = config["train_steps"]
    num_ended = sum(max(curve) >= steps for curve in curves.values())
    assert num_ended == config["num_seeds"], f"not evaluated at update {steps}"
    environment = config["env"]
    names = (config["script"], config["aug_label"], environment)
    dataset = config.get("dataset_crc") or environment
    return Run(folder, config, curves, *names, dataset, config.get("buffer_crc"))


def read_runs(folders):
    """Returns the runs in folders. Says which are left out."""
    runs = []
    for folder in map(Path, folders):
        try:
            runs.append(parse_run(folder))
        except Exception as error:  # whatever a broken file holds
            note(f"left out: {folder}, no run that came to its end ({error})")
    require(runs, "--runs: no run among them has come to its end with an evaluation")
    return runs


def tell_apart(runs):
    """Returns the runs, with one name for a dataset; what has the same name, but was trained on
    other data or with other flags, is told apart by its checksum or by them. Of a script those
    without augmentation come first."""
    environments = {}  # {dataset: name}: a folder and an id may hold the same dataset
    alike = defaultdict(list)  # runs of the same name
    for run in runs:
        environments.setdefault(run.dataset, run.environment)
        alike[run.script, run.augmentation, run.dataset].append(run)
    names = list(environments.values())
    named = []
    for run in runs:
        environment = environments[run.dataset]
        augmentation = run.augmentation
        others = alike[run.script, augmentation, run.dataset]
        if len({other.buffer for other in others}) > 1:
            augmentation += f" [{run.config['aug']}, {run.buffer}]"
        for flag in sorted(run.config.keys() - MAY_DIFFER):
            value = run.config[flag]
            if any(other.config.get(flag, value) != value for other in others):
                augmentation += f" [{flag} {value}]"
        if names.count(environment) > 1:
            environment += f" [{run.dataset}]"
        named.append(run._replace(augmentation=augmentation, environment=environment))

    def order(run):
        return run.script, run.config["aug_label"] != "none", run.augmentation

    return sorted(named, key=order)


def note_differences(runs):
    """Names every flag in which runs of a script on an environment differ, and who has what."""
    compared = defaultdict(lambda: defaultdict(dict))  # {flag: {value: augmentations}}
    for run in runs:
        for flag in sorted(run.config.keys() - MAY_DIFFER):
            values = compared[f"{run.script}, {run.environment}: {flag}"]
            values[str(run.config[flag])][run.augmentation] = True
    for flag, values in compared.items():
        if len(values) > 1:
            cases = [f"{value} ({', '.join(names)})" for value, names in values.items()]
            note(f"{flag} is {', '.join(cases)}")


def collect_curves(runs):
    """Returns {(script, augmentation): {environment: {(seed, agent): {update: score}}}}. Of two
    runs of a seed the later one among the folders counts, and a line says so."""
    curves = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        cell = curves[run.script, run.augmentation][run.environment]
        num_repeated = len(cell.keys() & run.curves)
        if num_repeated:
            note(f"left out: {num_repeated} agents of an earlier folder, repeated in {run.folder}")
        cell |= run.curves
    return curves


def average_scores(cells):
    """Each seed's mean over environments, whose deviation is the average's (F.2). Takes and returns
    scores by seed; returns none unless every environment has the same seeds."""
    if any(cell.keys() != cells[0].keys() for cell in cells):
        return {}
    return {seed: np.mean([cell[seed] for cell in cells]) for seed in cells[0]}


def last_mean(curve, last):
    """Returns the mean of the last scores of a curve {update: score}, of all if it has fewer."""
    return np.mean([curve[update] for update in sorted(curve)[-last:]])


def tabulate_scores(curves, environments, last):
    """Returns the scores {row: {column: [seeds]}}: of each environment, and on average if there are
    several. curves is {row: {environment: {seed: {update: score}}}}."""
    scores = {}
    for row, cells in curves.items():
        columns = {}
        for name in environments:
            columns[name] = {seed: last_mean(curve, last) for seed, curve in cells[name].items()}
        if len(environments) > 1:
            columns["average"] = average_scores(list(columns.values()))
        scores[row] = {name: np.array(list(cell.values())) for name, cell in columns.items()}
    return scores


def format_scores(scores):
    """Returns the table of scores: their mean and deviation over seeds."""
    first, *_ = scores.values()
    table = [["", *first]]
    for row, columns in scores.items():
        cells = [" + ".join(row).removesuffix(" + none")]
        for x in columns.values():
            cells.append(f"{x.mean():.1f} +- {x.std():.1f} ({len(x)})" if len(x) else "-")
        table.append(cells)
    return table


def compare_scores(scores):
    """Returns the table of Welch's tests between the augmentations of a script (Table 20)."""
    warnings.filterwarnings("ignore", "Precision loss")  # SciPy's, where a run's scores are equal
    table = [["Welch's t-test", "", "difference", "t", "df", "p"]]
    for (row_a, a), (row_b, b) in combinations(scores.items(), 2):
        if row_a[0] != row_b[0]:
            continue
        pair = f"{row_a[0]}: {row_b[1]} against {row_a[1]}"
        for name in a:
            x = a[name]
            y = b[name]
            if min(len(x), len(y)) < 2 or np.ptp(x) + np.ptp(y) == 0:
                continue
            welch = ttest_ind(y, x, equal_var=False)
            difference = f"{y.mean() - x.mean():.1f}"
            statistics = [f"{welch.statistic:.2f}", f"{welch.df:.1f}", f"{welch.pvalue:.4f}"]
            table.append([pair, name, difference, *statistics])
    return table


def draw_curves(curves, script, environment, dataset_score, axes):
    """Draws mean and deviation over seeds, by update, of a script's runs on an environment, and a
    line at the score of the dataset's episodes."""
    if dataset_score is not None:
        axes.axhline(dataset_score, color="black", linewidth=1, label="the dataset's episodes")
    cells_of = {augmentation: cells for (of, augmentation), cells in curves.items() if of == script}
    for number, (augmentation, cells) in enumerate(cells_of.items()):
        seeds = list(cells[environment].values())
        if not seeds:
            continue
        updates = sorted(set.intersection(*map(set, seeds)))
        scores = np.array([[curve[update] for update in updates] for curve in seeds])
        mean = scores.mean(axis=0)
        std = scores.std(axis=0)
        style = f"C{number % 10}" + ("-", "--", ":", "-.")[number % 4]
        (line,) = axes.plot(updates, mean, style, label=textwrap.fill(augmentation, 40))
        axes.fill_between(updates, mean - std, mean + std, color=line.get_color(), alpha=0.2)
    axes.set(xlabel="update", ylabel="score", title=f"{script}, {environment}")


def list_curves(runs, curves):
    """Returns the functions that draw curves {script: [a function for each environment]}."""
    pictures = defaultdict(list)
    dataset_scores = {run.environment: run.config.get("dataset_score") for run in runs}
    for script, environment in sorted({(run.script, run.environment) for run in runs}):
        score = dataset_scores[environment]
        pictures[script].append(partial(draw_curves, curves, script, environment, score))
    return pictures


def tabulate_runs(args):
    """Prints the results of --runs, and Welch's tests between the augmentations of a script.
    Writes --plot."""
    settings = {"runs": args.runs}
    claim_figure(args.plot, settings)
    runs = tell_apart(read_runs(args.runs))
    note_differences(runs)
    curves = collect_curves(runs)
    scores = tabulate_scores(curves, sorted({run.environment for run in runs}), args.last)
    print(render(format_scores(scores), args.table))
    note("score +- deviation (seeds); an average needs the same seeds everywhere")
    tests = compare_scores(scores)
    if len(tests) > 1:
        print("\n" + render(tests, args.table))
    if args.plot:
        save_figure(draw_figure(list_curves(runs, curves)), args.plot, settings)


def main(args):
    check_flags(args)
    require(bool(args.aug) != bool(args.runs), "give either --aug buffer.npz or --runs runs/*")
    if args.aug:
        measure_buffers(args)
    else:
        tabulate_runs(args)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
