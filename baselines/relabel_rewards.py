# /// script
# requires-python = ">=3.11"
# dependencies = ["torch", "numpy", "gymnasium", "minari[hdf5,hf]", "tyro", "tqdm"]
# ///
"""GTA's reward proxy (E.7, Table 18): the rewards of a buffer become those of a network r(s, a).

    python baselines/relabel_rewards.py --aug buffer.npz

Reads buffer.npz and the dataset, on which it trains the network. Writes relabeled.npz.
"""

import json
import os
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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


DEFAULT_ENV = "data/halfcheetah-medium-sample"
SHORT_NAMES = {  # of --env, and the Minari ids that they stand for
    r"maze2d-((umaze|medium|large)(-dense)?)": r"D4RL/pointmaze/\1-v2",
    r"antmaze-([a-z-]+)": r"D4RL/antmaze/\1-v1",
    r"(pen|door|hammer|relocate|kitchen)-([a-z]+)": r"D4RL/\1/\2-v2",
    r"([a-z0-9]+)-(simple|medium|expert)": r"mujoco/\1/\2-v0",
    r"([a-z0-9]+)-medium-expert": r"mujoco/\1/medium-v0+mujoco/\1/expert-v0",
}


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


def read_transitions(dataset):
    """Yields s, a, r of every episode. [T, obs_dim + act_dim + 1]"""
    for e in dataset.iterate_episodes():
        states = iterate(batch_space(dataset.observation_space, len(e.rewards) + 1), e.observations)
        s = [gym.spaces.flatten(dataset.observation_space, x) for x in states][:-1]
        yield np.column_stack([s, e.actions, e.rewards])


def fit_reward_proxy(rows, train_steps=10_000):
    """Trains r(s, a) on standardised s, a, r [M, obs_dim + act_dim + 1]. Returns it and its R^2."""
    unseen, rows = rows[torch.randperm(len(rows))].tensor_split([max(2, len(rows) // 20)])
    layers = nn.Linear(rows.shape[1] - 1, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()
    proxy = nn.Sequential(*layers, nn.Linear(256, 1), nn.Flatten(-2))
    optimizer = torch.optim.Adam(proxy.parameters(), 3e-4, fused=True)
    for _ in tqdm(range(train_steps), unit="update"):
        batch = rows[torch.randint(len(rows), (256,))]
        loss = (proxy(batch[:, :-1]) - batch[:, -1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return proxy, 1 - (proxy(unseen[:, :-1]) - unseen[:, -1]).square().mean().item()


def main(args):
    torch.manual_seed(args.seed)
    (buffer, metadata), out = read_buffer(args.aug), Path(args.out)
    label = metadata.get("label", metadata["method"]) + " + reward proxy"
    metadata |= {"label": label, "reward_proxy_seed": args.seed}
    if out.exists():
        with blame(f"--out {out} is no buffer; choose another --out"), np.load(out) as file:
            old = json.loads(str(file["metadata"]))
        other = [f"{key} {old.get(key)}" for key, x in metadata.items() if x != old.get(key)]
        require(not other, f"{out} was made with {', '.join(other)}; choose another --out")
        return print(f"{out} is finished, made with these flags")
    datasets = open_datasets(args.env or metadata.get("env", DEFAULT_ENV))
    ids, made_from = [dataset.id for dataset in datasets], metadata["dataset_ids"]
    require(made_from == ids, f"--aug {args.aug} was made from {made_from}, --env is {ids}")
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = np.concatenate([x for dataset in datasets for x in read_transitions(dataset)])
    mean, std = rows.mean(0), rows.std(0, ddof=1) + 1e-5
    proxy, r_squared = fit_reward_proxy(torch.from_numpy((rows - mean) / std).float())
    sa = np.concatenate([buffer["observations"][:, :-1], buffer["actions"]], axis=-1)
    sa = torch.from_numpy((sa - mean[:-1]) / std[:-1]).float()
    r = torch.cat([proxy(x).detach() for x in sa.split(10_000)]).numpy()  # [N, H]
    penalty = metadata.get("diffusion", {}).get("terminal_penalty", 0.0)  # as the buffer has it
    penalty = 0.0 if metadata.get("restore_terminal_reward") else penalty
    buffer["rewards"] = (r * std[-1] + mean[-1] - penalty * buffer["terminals"]).astype(np.float32)
    require(not out.exists(), f"{out} is now of another run; choose another --out")
    temporary = f"{out}.{os.getpid()}.tmp.npz"
    np.savez(temporary, **buffer, metadata=json.dumps(metadata))
    os.replace(temporary, out)
    print(f"wrote {out}: {label}, R^2 {r_squared:.4f} on transitions that it has not seen")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
