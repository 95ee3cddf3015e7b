# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.5", "numpy>=2", "gymnasium>=1", "minari[hdf5,hf]>=0.5.4", "tyro>=0.9",
#     "tqdm"]
# ///
"""GTA's reward proxy (E.7, Table 18): the rewards of a buffer become those of a network r(s, a).

    python baselines/relabel_rewards.py --aug buffer.npz

Reads buffer.npz and the dataset, on which it trains the network. Writes relabeled.npz.
"""

import json
import os
import re
import sys
import tempfile
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import minari
import numpy as np
import torch
import tyro
from gymnasium.vector.utils import batch_space, iterate
from torch import nn
from tqdm import tqdm


@dataclass
class Args:
    aug: str = "buffer.npz"  # buffer of gta_augment.py
    env: str | None = None  # where its dataset is now, if that has moved
    out: str = "relabeled.npz"  # buffer to write
    seed: int = 0  # seed of weights and batches
    # CUDA_VISIBLE_DEVICES picks the card
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"


# --- reward proxy ---


def fit_reward_proxy(rows, train_steps=10_000):
    """Returns r(s, a), trained on standardised rows s, a, r. [N, obs_dim + act_dim + 1]"""
    layers = [nn.Linear(rows.shape[1] - 1, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
    proxy = nn.Sequential(*layers, nn.Linear(256, 1), nn.Flatten(-2)).to(rows.device)
    optimizer = torch.optim.Adam(proxy.parameters(), 3e-4, fused=True)
    every = 0.1 if sys.stderr.isatty() else 60  # seconds: a log file takes a line a minute
    for _ in tqdm(range(train_steps), unit="update", mininterval=every, maxinterval=every):
        batch = rows[torch.randint(len(rows), (256,), device=rows.device)]
        loss = (proxy(batch[:, :-1]) - batch[:, -1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return proxy.requires_grad_(False)


def r_squared(proxy, rows):
    """Returns what share of the variance of r, which is 1, the proxy explains on rows s, a, r."""
    return 1 - (proxy(rows[:, :-1]) - rows[:, -1]).square().mean().item()


def proxy_rewards(proxy, buffer, mean, std, device):
    """Returns the proxy's rewards of the buffer's transitions [N, H]. A terminal's holds the same
    penalty as in the buffer. mean and std [obs_dim + act_dim + 1] are those of s, a, r."""
    sa = np.concatenate([buffer.observations[:, :-1], buffer.actions], axis=-1)
    sa = torch.from_numpy((sa - mean[:-1]) / std[:-1]).float()
    r = torch.cat([proxy(x.to(device)).cpu() for x in sa.split(10_000)]).numpy()
    penalty = buffer.metadata.get("diffusion", {}).get("terminal_penalty", 0.0)
    if buffer.metadata.get("restore_terminal_reward"):
        penalty = 0.0
    return (r * std[-1] + mean[-1] - penalty * buffer.terminals).astype(np.float32)


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


def stack_transitions(episodes):
    """Returns s, a, r of all transitions. [N, obs_dim + act_dim + 1]"""
    return np.concatenate([np.column_stack([s[:-1], a, r]) for s, a, r, _ in episodes])


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


def write_buffer(path, buffer):
    """Writes buffer.npz, readable without pickle, unless what is there is another's by now."""
    if Path(path).exists():
        require_same(path, read_metadata(path), buffer.metadata)
    arrays = {key: x for key, x in buffer._asdict().items() if x is not None}
    arrays["metadata"] = json.dumps(buffer.metadata)
    with new_file(path) as name:
        with open(name, "wb") as file:  # np.savez would add .npz to a name
            np.savez(file, **arrays)


def read_metadata(path):
    """Returns the metadata of the buffer at path."""
    with or_exit(f"{path} is no buffer; choose another --out"):
        with np.load(path, allow_pickle=False) as file:
            return json.loads(str(file["metadata"]))


def describe_relabeled(args, buffer, datasets, episodes):
    """Returns the metadata of the new buffer: all that tells it from others. Ends the program if
    the old one was made from other data."""
    inputs = identify_dataset(datasets, episodes)
    require_made_from(f"--aug {args.aug}", buffer.metadata, inputs)
    label = buffer.metadata["label"]
    return {
        **buffer.metadata,
        **inputs,
        "buffer_crc": checksum(x for x in buffer[1:] if x is not None),
        "label": f"{label} + reward proxy",
        "reward_proxy_seed": args.seed,
    }


def main(args):
    check_flags(args)
    torch.manual_seed(args.seed)
    buffer = read_buffer(args.aug)
    datasets = open_datasets(args.env or buffer.metadata.get("env", DEFAULT_ENV))
    episodes = load_episodes(datasets)
    metadata = describe_relabeled(args, buffer, datasets, episodes)
    if Path(args.out).exists():
        require_same(args.out, read_metadata(args.out), metadata)
        print(f"{args.out} is finished, made with these flags")
        return
    try_to_write(args.out)
    rows = stack_transitions(episodes)
    mean = rows.mean(0)
    std = rows.std(0, ddof=1) + 1e-5
    rows = torch.from_numpy((rows - mean) / std).float().to(args.device)
    rows = rows[torch.randperm(len(rows), device=args.device)]
    unseen, seen = rows.tensor_split([max(2, len(rows) // 20)])
    proxy = fit_reward_proxy(seen)
    rewards = proxy_rewards(proxy, buffer, mean, std, args.device)
    write_buffer(args.out, buffer._replace(metadata=metadata, rewards=rewards))
    quality = f"R^2 {r_squared(proxy, unseen):.4f} on transitions that it has not seen"
    print(f"wrote {args.out}: {metadata['label']}, {quality}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
