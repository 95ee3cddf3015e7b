"""What the tests share: the repository's root, running a script as a user does, small datasets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from minari.serialization import serialize_space

ROOT = Path(__file__).parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of two processes wait for each other
torch.set_num_threads(1)
sys.path[:0] = [str(ROOT), str(ROOT / "baselines"), str(ROOT / "data")]

HOPPER = str(ROOT / "data" / "hopper-medium-sample")  # its episodes end in falls
TINY_A = ["--horizon", 7, "--dim", 8, "--batch-size", 16, "--train-steps", 6]
TINY_B = ["--num-transitions", 280, "--num-steps", 8, "--mu", 0.5, "--alpha", 1.3]
TINY_C = ["--train-steps", 6, "--batch-size", 32, "--eval-every", 4, "--eval-episodes", 2]


def run(script, *flags, cwd=ROOT, ok=True, env=None):
    """Runs a script as a user does. One that must fail prints one line, and exits with code 1."""
    command = [sys.executable, str(script), *map(str, flags)]
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == (0 if ok else 1), result.stdout + result.stderr
    if not ok:
        lines = [line for line in result.stderr.splitlines() if "it/s]" not in line]
        assert lines[-1].startswith("error: ") and "Traceback" not in result.stderr, result.stderr
    return result


def write_minari(folder, episodes, observation_space, action_space, env_spec=None, **metadata):
    """Writes a Minari dataset as Minari does. An episode is observations, actions, rewards and
    terminations; observations may be a dictionary of arrays. env_spec: of an environment, or a
    dictionary. metadata replaces or adds what metadata.json holds."""
    (folder / "data").mkdir(parents=True)
    with h5py.File(folder / "data" / "main_data.hdf5", "w") as file:
        for i, (observations, actions, rewards, terminations) in enumerate(episodes):
            group = file.create_group(f"episode_{i}")
            group.attrs["id"], group.attrs["total_steps"] = i, len(rewards)
            values = {"actions": actions, "rewards": rewards, "terminations": terminations}
            values["truncations"] = np.zeros(len(rewards), bool)
            write_group(group, {"observations": observations, **values})
    metadata = {
        "total_episodes": len(episodes),
        "total_steps": sum(len(e[2]) for e in episodes),
        "data_format": "hdf5",
        "observation_space": serialize_space(observation_space),
        "action_space": serialize_space(action_space),
        "dataset_id": f"{folder.name}-v0",
        "minari_version": "0.5.4",
        **metadata,
    }
    if env_spec is not None:
        is_json = isinstance(env_spec, dict)
        metadata["env_spec"] = json.dumps(env_spec) if is_json else env_spec.to_json()
    (folder / "data" / "metadata.json").write_text(json.dumps(metadata))
    return folder


def write_group(group, values):
    """Writes arrays, dictionaries and tuples of them into a group of an HDF5 file."""
    for key, x in values.items():
        if isinstance(x, tuple):
            x = {f"_index_{i}": own for i, own in enumerate(x)}
        if isinstance(x, dict):
            write_group(group.create_group(key), x)
        else:
            group[key] = x


@pytest.fixture
def float64():
    """Adam divides by the gradient's size: in float32 a gradient near zero is mostly rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """A folder with diffusion.pt and buffer.npz of tiny runs of stages A and B on Hopper."""
    folder = tmp_path_factory.mktemp("pipeline")
    run(ROOT / "gta_diffusion.py", "--env", HOPPER, *TINY_A, cwd=folder)
    run(ROOT / "gta_augment.py", *TINY_B, cwd=folder)
    return folder
