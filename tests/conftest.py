"""What the tests share: the repository's root, running a script as a user does, small datasets."""

import io
import json
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from minari.serialization import serialize_space

ROOT = Path(__file__).parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of two processes wait for each other
torch.set_num_threads(1)
sys.path[:0] = [str(ROOT), str(ROOT / "baselines"), str(ROOT / "data")]

HOPPER = str(ROOT / "data" / "hopper-medium-sample")  # its episodes end in falls
TINY_A = ["--horizon", 7, "--dim", 8, "--batch-size", 16, "--train-steps", 6]
TINY_B = ["--num-transitions", 280, "--num-steps", 8, "--mu", 0.5, "--alpha", 1.3]
TINY_C = ["--train-steps", 6, "--batch-size", 32, "--eval-every", 4, "--eval-episodes", 2]
STATES = Box(-np.inf, np.inf, (11,), np.float64)  # of Hopper
ACTIONS = Box(-1, 1, (3,))
SPEC = gym.spec("Hopper-v5")


# --- scripts ---


def read_checkpoint(out):
    """Returns what a learner's run has saved in the folder out."""
    return torch.load(Path(out, "checkpoint.pt"), weights_only=True)


def run(script, *flags, cwd=ROOT, ok=True, env=None):
    """Runs a script as a user does. One that must fail prints one line, and exits with code 1."""
    command = [sys.executable, str(script), *map(str, flags)]
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    check(result, ok)
    return result


def call(script, *flags, cwd=ROOT, ok=True):
    """Does what run does within this process: no seconds pass until the packages are loaded."""
    flags = [str(flag) for flag in flags]
    result = subprocess.CompletedProcess([script, *flags], 0)
    stdout = io.StringIO()
    stderr = io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr), pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [str(script), *flags])
        patch.setattr(sys, "path", [*sys.path])
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:  # as Python ends: a text is printed
            result.returncode = end.code
            if isinstance(end.code, str):
                result.returncode = 1
                print(end.code, file=sys.stderr)
    result.stdout = stdout.getvalue()
    result.stderr = stderr.getvalue()
    check(result, ok)
    return result


def check(result, ok):
    """Asserts how a script ended: well, or with one line that says why it did not."""
    assert result.returncode == (0 if ok else 1), result.stdout + result.stderr
    if not ok:
        last = [line for line in result.stderr.splitlines() if "/s]" not in line][-1]
        assert last.startswith("error: ") and "Traceback" not in result.stderr, result.stderr


def message(function, *inputs):
    """Returns the one line with which a call ends the program."""
    with pytest.raises(SystemExit) as caught:
        function(*inputs)
    assert "\n" not in caught.value.code and caught.value.code.startswith("error: ")
    return caught.value.code


# --- data ---


def random_episodes(*lengths, obs=11, act=3, seed=0):
    """Returns random episodes of these lengths, each ended by the environment."""
    rng = np.random.default_rng(seed)
    episodes = []
    for T in lengths:
        s = rng.normal(size=(T + 1, obs))
        a = rng.uniform(-1, 1, (T, act))
        episodes.append((s, a, rng.normal(size=T), np.arange(T) == T - 1))
    return episodes


def write_hopper(folder, episodes, states=STATES, actions=ACTIONS, env_spec=SPEC, **metadata):
    """Writes a Minari dataset of Hopper, but for what is given."""
    return write_minari(folder, episodes, states, actions, env_spec, **metadata)


def write_minari(folder, episodes, observation_space, action_space, env_spec=None, **metadata):
    """Writes a Minari dataset as Minari does. An episode is observations, actions, rewards and
    terminations; observations may be a dictionary of arrays. env_spec: of an environment, or a
    dictionary. metadata replaces or adds what metadata.json holds."""
    (folder / "data").mkdir(parents=True)
    with h5py.File(folder / "data" / "main_data.hdf5", "w") as file:
        for i, (observations, actions, rewards, terminations) in enumerate(episodes):
            group = file.create_group(f"episode_{i}")
            group.attrs["id"] = i
            group.attrs["total_steps"] = len(rewards)
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
            x = {f"_index_{i}": part for i, part in enumerate(x)}
        if isinstance(x, dict):
            write_group(group.create_group(key), x)
        else:
            group[key] = x


def write_buffer(path, N=3, H=4, seed=0, ids=("x-v0",), **changes):
    """Writes a buffer of random windows of Hopper, made of the datasets of these ids."""
    rng = np.random.default_rng(seed)
    metadata = {"format": "gta-buffer", "format_version": 1, "method": "mine", "env": "x"}
    arrays = {
        "observations": rng.normal(size=(N, H + 1, 11)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (N, H, 3)).astype(np.float32),
        "rewards": rng.normal(size=(N, H)).astype(np.float32),
        "terminals": rng.random((N, H)) < 0.2,
        "timestep": np.zeros(N, np.int64),
        "return_to_go": rng.normal(size=N),
        "metadata": json.dumps({**metadata, "dataset_ids": list(ids)}),
    }
    np.savez(path, **{**arrays, **changes})
    return path


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
    call(ROOT / "gta_diffusion.py", "--env", HOPPER, *TINY_A, cwd=folder)
    call(ROOT / "gta_augment.py", *TINY_B, cwd=folder)
    return folder
