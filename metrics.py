# /// script
# requires-python = ">=3.11"
# dependencies = ["torch", "numpy", "scipy", "matplotlib", "gymnasium[mujoco]", "minari[hdf5,hf]",
#     "tyro", "tqdm", "wandb"]
# ///
"""Is generated data plausible, novel and better? And: the results of a set of runs.

    python metrics.py --aug buffer.npz
    python metrics.py --aug a.npz b.npz --plot metrics.png
    python metrics.py --runs runs/* --table latex --plot curves.png

GTA (Lee et al., NeurIPS 2024), sections 5.1 and 5.4, appendices D, F.2, F.4, F.6 and F.7.
Reads buffers of gta_augment.py and the dataset that they were made from, or folders of runs.
Writes metrics.json (--out) and a figure (--plot); with --runs the figure alone.
"""

import json
import math
import os
import re
import sys
import textwrap
import warnings
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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
from scipy.stats import ttest_ind
from tqdm import tqdm


@dataclass
class Args:
    aug: tuple[str, ...] = ()  # buffers to measure, side by side: --aug a.npz b.npz
    runs: tuple[str, ...] = ()  # folders of runs to tabulate: --runs runs/*
    # short name (hopper-medium), Minari id, folder of a Minari dataset, or several joined by +.
    # Default: what the first --aug was made from
    env: str | None = None
    # > 0 adds a column for S4RL: the dataset with the noise of the learners' flag (C.1: 3e-4)
    s4rl_sigma: float = 0.0
    # at most so many of each buffer, in whole subtrajectories, and of the dataset are drawn (D)
    num_transitions: int = 1_000_000
    # file for all numbers of --aug; made anew if it was made with the same flags
    out: str = "metrics.json"
    # figure (.png, .pdf, .svg): of --aug, returns (Figures 4c, 8) and controllability (Figure 7);
    # of --runs, the learning curves of each augmentation (Figure 10)
    plot: str | None = None
    table: Literal["text", "markdown", "latex"] = "text"  # form of the tables
    seed: int = 0  # seed of what is drawn
    # where nearest neighbours are searched; CUDA_VISIBLE_DEVICES picks the card
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


def read_buffer(path):
    """Returns the arrays of buffer.npz, which the README lists, and its metadata."""
    with blame(f"--aug {path}: no buffer of gta_augment.py"):
        with np.load(path, allow_pickle=False) as file:
            buffer = dict(file)
        metadata = json.loads(str(buffer.pop("metadata")))
        kind = metadata["format"], metadata["format_version"]
        finite = all(np.isfinite(x).all() for x in buffer.values())
        buffer["terminals"] = buffer["terminals"].astype(bool)
    require(kind == ("gta-buffer", 1), f"--aug {path}: {kind}, not version 1 of gta-buffer")
    require(finite, f"--aug {path} holds NaN or infinite numbers")
    return buffer, metadata


class Sample(NamedTuple):
    """N subtrajectories of H transitions: of a buffer; or a dataset's transitions, H = 1."""

    s: np.ndarray  # [N, H, obs_dim]
    a: np.ndarray  # [N, H, act_dim]
    r: np.ndarray  # [N, H]
    s_next: np.ndarray  # [N, H, obs_dim]
    terminal: np.ndarray  # [N, H] bool
    penalised: np.ndarray  # [N, H] bool: the reward holds stage A's penalty and says nothing
    condition: np.ndarray | None = None  # [N] the return that was asked for
    source: np.ndarray | None = None  # [N, H] rewards of the window that it was made from


def sample_dataset(episodes, num_transitions, rng):
    """Draws single transitions of the dataset without replacement."""
    transitions = [(e.observations[:-1], *e[1:], e.observations[1:]) for e in episodes]
    s, a, r, terminal, s_next = (np.concatenate(x) for x in zip(*transitions))
    index = np.arange(len(r))
    if num_transitions < len(index):
        index = np.sort(rng.choice(index, num_transitions, replace=False))
    s, a, r, s_next, terminal = (x[index][:, None] for x in (s, a, r, s_next, terminal))
    return Sample(s, a, r, s_next, terminal, np.zeros_like(terminal))


def add_state_noise(sample, std, sigma, rng):
    """S4RL: Gaussian noise of sigma deviations std [obs_dim] on s and s'."""
    s, s_next = (x + sigma * std * rng.normal(size=x.shape) for x in (sample.s, sample.s_next))
    return sample._replace(s=s, s_next=s_next)


def sample_buffer(buffer, metadata, episodes, num_transitions, rng):
    """Draws whole subtrajectories of a buffer, made from these episodes, without replacement."""
    index = np.arange(len(buffer["actions"]))
    num_windows = math.ceil(num_transitions / buffer["actions"].shape[1])
    if num_windows < len(index):
        index = np.sort(rng.choice(index, num_windows, replace=False))
    buffer = {key: x[index] for key, x in buffer.items()}
    s, a, r = buffer["observations"], buffer["actions"], buffer["rewards"]
    terminal = buffer["terminals"].astype(bool)
    penalty = metadata.get("diffusion", {}).get("terminal_penalty", 0.0)  # A.1
    penalised = terminal & (penalty != 0 and not metadata.get("restore_terminal_reward"))
    sample = Sample(s[:, :-1], a, r, s[:, 1:], terminal, penalised, buffer.get("condition"))
    if not {"episode", "timestep"} <= buffer.keys():  # SynthER's, a user's own: no source is named
        return sample
    sources = zip(buffer["episode"], buffer["timestep"])
    return sample._replace(
        source=np.stack([episodes[i].rewards[t:][: r.shape[1]] for i, t in sources])
    )


def dataset_returns(episodes, horizon):
    """The reward sums of all windows of horizon transitions in the dataset. [W]"""
    totals = [np.append(0.0, np.cumsum(e.rewards, dtype=np.float64)) for e in episodes]
    return np.concatenate([total[horizon:] - total[:-horizon] for total in totals])


def make_reference(episodes):
    """Returns the dataset's states and actions, to which distances are measured [N, obs_dim +
    act_dim], their mean and their deviation."""
    sa = np.concatenate([np.column_stack([e.observations[:-1], e.actions]) for e in episodes])
    sa = sa.astype(np.float64)
    std = sa.std(axis=0)
    return sa, sa.mean(axis=0), np.where(std > 1e-6, std, 1.0)  # a constant keeps its units


# --- oracle ---


class Answers(NamedTuple):
    """What MuJoCo says, its state set to s and stepped with a. M transitions."""

    s_next: np.ndarray  # [M, obs_dim]; NaN, as r, where the simulation breaks down
    r: np.ndarray  # [M]
    terminal: np.ndarray  # [M] bool: the environment would have terminated
    unhealthy: np.ndarray  # [M] 1 where it calls s so, NaN if it does not judge


def set_state(env, observation):
    """Puts MuJoCo into the state of a flattened observation. What it does not hold, the position
    in the world, is set to 0. Raises ValueError for an environment that it knows no way for."""
    if hasattr(env, "point_env"):  # PointMaze: achieved goal, desired goal, position, velocity
        env.goal = observation[2:4]
        env.point_env.set_state(observation[4:6], observation[6:8])
        return
    nq, nv = env.model.nq, env.model.nv
    if hasattr(env, "observation_structure"):
        hidden = env.observation_structure.get("skipped_qpos", 0)
    else:  # version 4
        hidden = nq + nv - len(observation)
    if not 0 <= hidden <= 2:
        raise ValueError("how its observations make a state is not known")
    qpos = np.concatenate([np.zeros(hidden), observation[: nq - hidden]])
    env.set_state(qpos, observation[nq - hidden : nq - hidden + nv])


def ask_oracle(env, states, actions, label):
    """Answers for states [M, obs_dim] and actions [M, act_dim]."""
    answers = []
    env.reset(seed=0)
    troubles = getattr(env, "point_env", env).data.warning.number
    for s, a in zip(tqdm(states, f"oracle, {label}", leave=False), actions):
        set_state(env, s.astype(np.float64))
        unhealthy = not env.is_healthy if hasattr(env, "is_healthy") else np.nan
        troubles[:] = 0
        observation, reward, terminated, _, _ = env.step(a)
        s_next = gym.spaces.flatten(env.observation_space, observation)
        if troubles.any():  # numbers out of all bounds: MuJoCo has gone back to its start
            s_next, reward = np.full_like(s_next, np.nan), np.nan
        answers.append((s_next, reward, terminated, unhealthy))
    return Answers(*map(np.array, zip(*answers)))


def find_oracle(dataset, episodes, std):
    """Returns the environment that was recorded if MuJoCo reproduces the records, else None, and a
    sentence that says so. It is the registered one: no wrappers, no code that the dataset names.

    It has to reproduce a twentieth of 500 transitions, and fails where velocities were clipped when
    they were observed (for random actions in Walker2d, three quarters of them).
    """
    spec = json.loads(dataset.storage.metadata.get("env_spec") or "{}")
    if not spec:
        return None, f"none, {dataset.id} names no environment"
    name, kwargs, steps = spec["id"], spec.get("kwargs", {}), spec.get("max_episode_steps")
    if wrappers := [wrapper["name"] for wrapper in spec.get("additional_wrappers", [])]:
        print(f"oracle: {name} without the wrappers {', '.join(wrappers)}")
    s, a, r, s_next = (x[:, 0] for x in sample_dataset(episodes, 500, np.random.default_rng(0))[:4])
    kwargs |= {"max_episode_steps": steps and int(steps)}  # Minari has 1000000.0
    try:
        env = gym.make(name if name in gym.registry else f"gymnasium_robotics:{name}", **kwargs)
        own, other = dataset.action_space, env.action_space
        bounds = (own.low, own.high), (other.low, other.high)
        if own.shape != other.shape or not np.allclose(*bounds):
            return None, f"none, the actions of {dataset.id} are {own}, those of {name} {other}"
        answers = ask_oracle(env.unwrapped, s, a, "a trial")
        same_state = dynamic_error(s_next, answers.s_next, std) < 1e-6
    except Exception as error:  # whatever an unknown environment does
        renderer = f", MUJOCO_GL is {os.environ.get('MUJOCO_GL')}" * ("MUJOCO_GL" in os.environ)
        return None, f"none for {name}{renderer} ({error})"
    shares = same_state.mean(), (np.abs(r - answers.r) < 1e-3).mean()
    said = "MuJoCo reproduces {:.1%} of the recorded next states, {:.1%} of the rewards"
    said = said.format(*shares)
    return (env.unwrapped, said) if shares[0] >= 0.05 else (None, f"none, {said}")


# --- metrics ---


def dynamic_error(s_next, s_true, std):
    """Squared error of s' in standardised dimensions, their mean (eq. 11, 14). [M, d] -> [M]"""
    return (((s_next - s_true) / std) ** 2).mean(axis=-1)


def nearest_by_product(data, queries, rank):
    """What nearest_distance does, on a GPU; data and queries are centred. [N, d], [B, d] -> [B]

    |x|^2 / 2 - q . x, one matrix product in float64, ranks the rows x; the distance to the ones it
    finds is then taken from their difference, so that a copy's is 0.
    """
    score = torch.addmm(data.square().sum(1) / 2, queries, data.T, alpha=-1)
    nearest = data[score.topk(rank, largest=False).indices]  # [B, rank, d]
    return (nearest - queries[:, None]).norm(dim=-1).amax(1)


def nearest_distance(data, queries, rank, device, label=""):
    """Distance from every query to its rank-th nearest row of data. [N, d], [M, d] -> [M]"""
    size = max(1, min(10_000, 100_000_000 // len(data)))
    chunks = np.split(queries, range(size, len(queries), size))
    chunks = tqdm(chunks, f"nearest, {label}", leave=False)
    if device == "cpu":
        tree = cKDTree(data)
        return np.concatenate([tree.query(q, k=[rank], workers=-1)[0][:, 0] for q in chunks])
    centre = data.mean(0)
    data = torch.from_numpy(data - centre).to(device)
    chunks = (torch.from_numpy(q - centre).to(device) for q in chunks)
    return torch.cat([nearest_by_product(data, q, rank) for q in chunks]).cpu().numpy()


def novelty(reference, sample, rank, device, label=""):
    """Mean distance to the nearest transition of the dataset (eq. 12, 15), plain and squared, of
    states, actions and both, in the environment's units and standardised. Returns them by name.

    rank 2 is for the dataset itself: the distance to its nearest other transition.
    """
    obs_dim, numbers = sample.s.shape[-1], {}
    data, mean, std = reference
    queries = np.concatenate([sample.s, sample.a], axis=-1).reshape(-1, len(mean))
    parts = {"state": np.s_[:, :obs_dim], "action": np.s_[:, obs_dim:], "state-action": np.s_[:, :]}
    for units in ("raw", "standardised"):
        if units == "standardised":
            data, queries = (data - mean) / std, (queries - mean) / std
        for part, columns in parts.items():
            distance = nearest_distance(data[columns], queries[columns], rank, device, label)
            numbers[f"{part} novelty, {units}"] = distance.mean()
            numbers[f"{part} novelty, {units}, squared"] = (distance**2).mean()
    return numbers


def correlation(x, y):
    """Pearson's correlation; NaN if one of the two does not vary. [N], [N] -> float"""
    varies = len(x) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0
    return float(np.corrcoef(x, y)[0, 1]) if varies else float("nan")


def measure(sample, answers, std, space):
    """All numbers of a sample by name, but for the novelty. std [obs_dim], space of the actions.

    Rewards that hold a penalty are left out of the rewards, subtrajectories with one out of the
    controllability.
    """
    counted = ~sample.penalised
    whole = counted.all(axis=1)
    numbers = {
        "transitions": sample.r.size,
        "terminal": sample.terminal.mean(),
        "actions at a bound": ((sample.a <= space.low) | (sample.a >= space.high)).mean(),
        "reward of the sources": math.nan,
        "reward": sample.r[counted].mean(dtype=np.float64),
    }
    if sample.source is not None:
        numbers["reward of the sources"] = sample.source[counted].mean()
    if answers:  # D.3, eq. 14
        error = dynamic_error(sample.s_next.reshape(answers.s_next.shape), answers.s_next, std)
        numbers |= {
            "oracle reward, not penalised": np.nanmean(answers.r.reshape(counted.shape)[counted]),
            "oracle reward": np.nanmean(answers.r),
            "oracle terminal": answers.terminal.mean(),
            "unhealthy states": answers.unhealthy.mean(),
            "broken down": np.isnan(answers.r).mean(),
            "dynamic MSE": np.nanmean(error),
            "dynamic MSE, median": np.nanmedian(error),
        }
    if sample.condition is not None:  # F.6
        returns = sample.r.sum(axis=1, dtype=np.float64)
        numbers["controllability"] = correlation(sample.condition[whole], returns[whole])
    return numbers


# --- output ---


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


def draw_figure(episodes, samples, answers):
    """Two pictures for every buffer: how the returns of subtrajectories are distributed (Figures
    4c, 8), and condition against generated return (Figure 7). samples and answers are by name."""
    figure = Figure(figsize=(7.0, 2.6 * len(samples)), layout="constrained")
    axes = figure.subplots(len(samples), 2, squeeze=False)
    for (left, right), (name, sample) in zip(axes, samples.items()):
        horizon, whole = sample.r.shape[1], ~sample.penalised.any(axis=1)
        generated = sample.r.sum(axis=1)[whole]
        returns = {"dataset": dataset_returns(episodes, horizon), "generated": generated}
        if answers[name]:
            oracle = answers[name].r.reshape(sample.r.shape).sum(axis=1)[whole]
            returns["oracle"] = oracle[np.isfinite(oracle)]
        returns = {label: values for label, values in returns.items() if len(values)}
        # without outliers, but with all of a small buffer that lies beyond a large dataset
        low, high = zip(*(np.quantile(values, [0.002, 0.998]) for values in returns.values()))
        num_bins = int(np.clip(math.sqrt(whole.sum()), 5, 60))
        bins = np.histogram_bin_edges([], num_bins, (min(low), max(high)))
        for (label, values), colour in zip(returns.items(), ("0.6", "tab:blue", "tab:orange")):
            style = {"alpha": 0.5} if label == "dataset" else {"histtype": "step", "linewidth": 1.4}
            left.hist(values, bins, density=True, color=colour, label=label, **style)
        left.set(xlabel=f"return of {horizon} transitions", ylabel="density")
        left.set_title(textwrap.fill(name, 45), fontsize=9)
        left.legend(frameon=False)
        if sample.condition is None:
            right.set_axis_off()
            continue
        condition = sample.condition[whole]
        shown = np.random.default_rng(0).permutation(len(condition))[:5000]
        right.scatter(condition[shown], generated[shown], s=4, alpha=0.3, linewidths=0)
        right.set(xlabel="condition", ylabel="generated return")
        right.set_title(f"Pearson's r = {correlation(condition, generated):.2f}", fontsize=9)
    return figure


def save_figure(figure, path):
    """Writes under another name, then renames."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    figure.savefig(temporary, format=Path(path).suffix[1:], dpi=130)
    os.replace(temporary, path)


def check_out(args):
    """Ends the program with one line if --out or --plot would replace what was made with other
    flags. Returns the figure that belongs to --out."""
    out, old = Path(args.out), {}
    if out.exists():
        with blame(f"--out {out}: no file of metrics.py; choose another --out"):
            old = json.loads(out.read_text())["args"]
        free = {"out", "plot", "table", "device", "track"}
        new = {key: x for key, x in json.loads(json.dumps(asdict(args))).items() if key not in free}
        other = [f"{key} {old.get(key)}" for key, x in new.items() if x != old.get(key)]
        require(not other, f"{out} was made with {', '.join(other)}; choose another --out")
    is_free = not args.plot or args.plot == old.get("plot") or not Path(args.plot).exists()
    require(is_free, f"--plot {args.plot} is there, of other flags; choose another name")
    return args.plot or old.get("plot")


def measure_buffers(args):
    """Prints the table of --aug, writes --out and --plot."""
    require(args.device == "cpu" or torch.cuda.is_available(), "--device cuda: there is no GPU")
    args.env = args.env or read_buffer(args.aug[0])[1].get("env", DEFAULT_ENV)
    check_out(args)
    datasets = open_datasets(args.env)
    episodes, ids = load_episodes(datasets), [dataset.id for dataset in datasets]
    if args.track:
        import wandb

        with blame("--track"):
            wandb.init(config=asdict(args))
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)

    reference, rng = make_reference(episodes), np.random.default_rng(args.seed)
    samples, buffers = {"dataset": sample_dataset(episodes, args.num_transitions, rng)}, {}
    obs_dim, act_dim = (x.shape[-1] for x in samples["dataset"][:2])
    std = reference[2][:obs_dim]
    for path in args.aug:
        buffer, metadata = read_buffer(path)
        made_from = metadata.get("dataset_ids")
        require(made_from == ids, f"--aug {path} was made from {made_from}, --env is {ids}")
        with blame(f"--aug {path}: its arrays do not fit together"):
            own_rng = np.random.default_rng(args.seed)
            sample = sample_buffer(buffer, metadata, episodes, args.num_transitions, own_rng)
        own, N_H = [x.shape for x in sample[:4]], sample.r.shape
        expected = [(*N_H, obs_dim), (*N_H, act_dim), N_H, (*N_H, obs_dim)]
        require(own == expected, f"--aug {path}: s, a, r, s' are {own}, not {expected}")
        label = metadata.get("label", metadata.get("method", ""))
        name = f"{label} {path}" if label in samples else label
        samples[name], buffers[name] = sample, {**metadata, "file": path}
    if args.s4rl_sigma:
        noised = add_state_noise(samples["dataset"], std, args.s4rl_sigma, rng)
        samples[f"s4rl({args.s4rl_sigma})"] = noised

    env, oracle = find_oracle(datasets[0], episodes, std)
    print("oracle:", oracle := " ".join(oracle.split()))
    answers, numbers = {}, {}
    for name, sample in samples.items():
        s, a = (x.reshape(-1, x.shape[-1]) for x in (sample.s, sample.a))
        answers[name] = ask_oracle(env, s, a, name) if env else None
        own = measure(sample, answers[name], std, datasets[0].action_space)
        own |= novelty(reference, sample, 2 if name == "dataset" else 1, args.device, name)
        numbers[name] = {key: None if math.isnan(x) else x for key, x in own.items()}
    rows = [[args.env, *samples]]
    for key in dict.fromkeys(key for own in numbers.values() for key in own):
        cells = [own.get(key) for own in numbers.values()]
        cells = ["-" if x is None else f"{x:.4g}" if x < 1000 else f"{x:.0f}" for x in cells]
        rows.append([key, *cells])

    versions = {package.__name__: package.__version__ for package in (torch, np, gym, minari)}
    moments = {"mean": reference[1].tolist(), "std": reference[2].tolist()}
    report = {"numbers": numbers, "buffers": buffers, "oracle": oracle, "standardisation": moments}
    report |= {"dataset_ids": ids, "env_id": env_id(datasets[0]), "versions": versions}
    report["args"] = {**asdict(args), "plot": check_out(args)}
    text, temporary = json.dumps(report, indent=2), f"{args.out}.{os.getpid()}.tmp"
    Path(temporary).write_text(text + "\n")
    os.replace(temporary, args.out)
    if args.plot:
        buffers = {name: samples[name] for name in buffers}
        save_figure(draw_figure(episodes, buffers, answers), args.plot)
    print(render(rows, args.table))
    print(f"wrote {args.out}" + f" and {args.plot}" * bool(args.plot))
    if args.track:
        wandb.log({f"{name}/{key}": x for name, own in numbers.items() for key, x in own.items()})


# --- runs ---


def read_runs(folders):
    """Returns {(algorithm, augmentation): {environment: {seed: {update: score}}}}.

    Of two runs of the same seed the later one among the folders counts. Says so, and which runs are
    left out, and where runs that share a cell were not made alike.
    """
    table, settings = defaultdict(lambda: defaultdict(dict)), {}
    free = {"seed", "num_seeds", "env", "aug", "finetune", "out", "device", "track", "versions"}
    for folder in map(Path, folders):
        if not (folder / "evals.csv").exists():
            print(f"left out: {folder} holds no evals.csv", file=sys.stderr)
            continue
        with blame(f"--runs {folder}: not a folder of a run, as runs/*"):
            config = json.loads((folder / "config.json").read_text())
            lines = (folder / "evals.csv").read_text().splitlines()[1:]
            evals = [[float(x) for x in line.split(",")] for line in lines]
            seed, steps, env = (config[key] for key in ("seed", "train_steps", "env"))
            row, curves = (config["script"], config["aug_label"]), defaultdict(dict)
        if not evals or evals[-1][0] < steps:
            print(f"left out: {folder} was not evaluated at update {steps}", file=sys.stderr)
            continue
        for update, agent, _, score in evals:
            curves[seed + int(agent)][int(update)] = score
        cell, where = table[row][env], f"{' + '.join(row)}, {env}"
        if again := ", ".join(str(seed) for seed in sorted(cell.keys() & curves.keys())):
            print(f"{where}: seed {again} counts as in the later {folder}", file=sys.stderr)
        cell |= curves
        own = {key: x for key, x in config.items() if key not in free}
        first = settings.setdefault(where, own)
        if differ := [key for key in first | own if first.get(key) != own.get(key)]:
            print(f"{where}: runs differ in {', '.join(differ)}; {folder}", file=sys.stderr)
    return table


def in_order(row):
    """Sorts (algorithm, augmentation): of an algorithm, the run without one comes first."""
    return row[0], row[1] != "none", row[1]


def last_scores(curves):
    """{seed: {update: score}} -> {seed: score of the last update}"""
    return {seed: curve[max(curve)] for seed, curve in curves.items()}


def average_scores(cells):
    """Each seed's mean over environments, whose deviation is the average's (F.2). Takes and returns
    scores by seed; returns none unless every environment has the same seeds."""
    same = all(cell.keys() == cells[0].keys() for cell in cells)
    return {seed: np.mean([cell[seed] for cell in cells]) for seed in cells[0] if same}


def draw_curves(table, environments):
    """A picture for each algorithm and environment: mean and deviation over seeds, by update."""
    algorithms = sorted({algorithm for algorithm, _ in table})
    size = (0.8 + 4.2 * len(environments), 3.2 * len(algorithms))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(algorithms), len(environments), squeeze=False)
    for algorithm, augmentation in sorted(table, key=in_order):
        for axis, name in zip(axes[algorithms.index(algorithm)], environments):
            if not (curves := [*table[algorithm, augmentation][name].values()]):
                continue
            updates = sorted(set.intersection(*map(set, curves)))
            scores = np.array([[curve[update] for update in updates] for curve in curves])
            mean, std = scores.mean(0), scores.std(0)
            (line,) = axis.plot(updates, mean, label=textwrap.fill(augmentation, 40))
            axis.fill_between(updates, mean - std, mean + std, color=line.get_color(), alpha=0.2)
            axis.set(xlabel="update", ylabel="score")
            axis.set_title(f"{algorithm}, {name}", fontsize=9)
            axis.legend(frameon=False, fontsize=7)
    return figure


def tabulate_runs(args):
    """Prints the results of --runs, and Welch's tests between the augmentations of a learner.
    Writes --plot."""
    is_free = not args.plot or not Path(args.plot).exists()
    require(is_free, f"--plot {args.plot} is there; remove it or choose another name")
    table, columns = read_runs(args.runs), {}
    require(table, "--runs: no run among them has come to its end with an evaluation")
    environments = sorted({name for scores in table.values() for name in scores})
    heads = environments + ["average"] * (len(environments) > 1)
    rows = [["", *heads]]
    for row in sorted(table, key=in_order):
        cells = [last_scores(table[row][name]) for name in environments]
        scores = [np.array([*cell.values()]) for cell in (*cells, average_scores(cells))]
        columns[row] = scores[: len(heads)]
        cells = [f"{x.mean():.1f} +- {x.std():.1f} ({len(x)})" if len(x) else "-" for x in scores]
        rows.append([" + ".join(row).removesuffix(" + none"), *cells[: len(heads)]])
    print(render(rows, args.table))
    print("score +- deviation (seeds); an average needs the same seeds everywhere", file=sys.stderr)
    warnings.filterwarnings("ignore", "Precision loss")  # SciPy's, where a run's scores are equal
    tests = [["Welch's t-test", "", "difference", "t", "df", "p"]]
    for (row_a, a), (row_b, b) in combinations(columns.items(), 2):
        for head, x, y in zip(heads, a, b):
            if row_a[0] == row_b[0] and min(len(x), len(y)) > 1 and np.ptp(x) + np.ptp(y) > 0:
                welch = ttest_ind(y, x, equal_var=False)  # Table 20
                pair = f"{row_a[0]}: {row_b[1]} against {row_a[1]}"
                cells = f"{y.mean() - x.mean():.1f}", f"{welch.statistic:.2f}", f"{welch.df:.1f}"
                tests.append([pair, head, *cells, f"{welch.pvalue:.4f}"])
    if len(tests) > 1:
        print("\n" + render(tests, args.table))
    if args.plot:
        save_figure(draw_curves(table, environments), args.plot)
        print(f"\nwrote {args.plot}")


def main(args):
    require(bool(args.aug) != bool(args.runs), "give either --aug buffer.npz or --runs runs/*")
    fits = Path(args.plot or "a.png").suffix in (".png", ".pdf", ".svg")
    require(fits, f"--plot {args.plot}: must end in .png, .pdf or .svg")
    (measure_buffers if args.aug else tabulate_runs)(args)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
