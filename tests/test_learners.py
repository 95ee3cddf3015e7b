"""What all learners do around their algorithm: commands, evaluation, files, continuation."""

import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import plain
import pytest
import torch
from conftest import HOPPER, ROOT, TINY_C, run

import td3bc

LEARNERS = ("td3bc", "iql", "cql", "mcq", "dt")


@pytest.mark.parametrize("name", LEARNERS)
def test_a_run_on_dataset_and_buffer(pipeline, tmp_path, name):
    flags = [*TINY_C, "--aug", pipeline / "buffer.npz", "--num-seeds", 2]
    flags += ["--num-actions", 2] * (name in ("cql", "mcq"))
    result = run(ROOT / f"{name}.py", *flags, cwd=tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    lines = result.stdout.splitlines()
    assert lines[-2] == f"wrote runs/{folder.name}" and folder.name.startswith(f"{name}-")
    label = json.loads((folder / "config.json").read_text())["aug_label"]
    assert lines[-1].startswith(f"{HOPPER} | {name} + {label} | ")
    header, *rows = (folder / "evals.csv").read_text().splitlines()
    evals = np.array([[float(x) for x in row.split(",")] for row in rows])
    assert header == "update,agent,return,score" and evals[:, 1].tolist() == [0, 1, 0, 1]
    assert evals[:, 0].tolist() == [4, 4, 6, 6]
    np.testing.assert_allclose(evals[:, 3], (evals[:, 2] + 20.272305) / 3254.572305 * 100)
    assert f"{evals[2:, 3].mean():.1f} +- {evals[2:, 3].std():.1f} over 2 seeds" in lines[-1]
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 6 and checkpoint["args"]["num_seeds"] == 2


@pytest.mark.parametrize("name", LEARNERS)
def test_s4rl_and_buffer_alone(pipeline, tmp_path, name):
    flags = ["--train-steps", 2, "--batch-size", 8, "--eval-every", 0, "--s4rl-sigma", 0.01]
    flags += ["--aug", pipeline / "buffer.npz", "--aug-only"]
    result = run(ROOT / f"{name}.py", *flags, cwd=tmp_path)
    assert " only + s4rl(0.01) | not evaluated" in result.stdout


def test_evaluation_equals_a_plain_loop():
    """13 episodes of two agents, ten side by side, each whole, from their own seeds."""
    args = td3bc.Args(num_seeds=2, eval_episodes=13, seed=3, device="cpu")
    (dataset,) = td3bc.open_datasets(HOPPER)
    envs = td3bc.make_envs(dataset, args, {})
    assert envs.num_envs == 20
    torch.manual_seed(0)
    scale = plain.unit_scale(11, 3)
    scale["mean"], scale["std"] = scale["mean"] + 0.5, scale["std"] + 1
    scale["radius"] = scale["radius"] / 2
    agents = td3bc.TD3BC(args, scale)
    env, returns = gym.make("Hopper-v5"), np.zeros((2, 13))
    for i in range(2):
        actor = plain.layers(agents.actor[0], i)
        for episode in range(13):
            s, _ = env.reset(seed=1000 * (3 + i) + episode)
            done = False
            while not done:
                x = torch.from_numpy((s - 0.5) / 2).float()[None]
                a = 0.5 * plain.mlp(actor, x).tanh()[0].detach().numpy()
                s, r, terminated, truncated, _ = env.step(a)
                returns[i, episode] += r
                done = terminated or truncated
    np.testing.assert_allclose(td3bc.evaluate(agents, envs, args), returns.mean(1), rtol=1e-4)


def test_a_batch_is_each_agents_own_with_the_noise_of_s4rl():
    episode = td3bc.Episode(*(np.zeros(shape) for shape in ((1001, 4), (1000, 2), 1000, 1000)))
    episode.rewards[:] = np.arange(1000)
    args = td3bc.Args(num_seeds=3, batch_size=2000, s4rl_sigma=0.1, device="cpu")
    box = SimpleNamespace(low=-np.ones(2), high=np.ones(2))
    draw_batch, _ = td3bc.pack_transitions([episode], box, args)
    s, _, r, s_next, _ = draw_batch()
    assert not torch.equal(r[0], r[1]) and abs(r.mean() - 499.5) < 15
    for x in (s, s_next):
        assert abs(x.std() - 0.1) < 0.002 and abs(x.mean()) < 0.002
    assert not torch.equal(s, s_next)


# --- files ---

FLAGS = ["--env", HOPPER, "--batch-size", 32, "--eval-episodes", 1, "--train-steps", 4000]
FLAGS += ["--eval-every", 200, "--out", "out"]


def start(*flags, cwd):
    command = [sys.executable, ROOT / "td3bc.py", *flags]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(x) for x in command], cwd=cwd, **pipes)


def wait_for(path, since=None):
    while td3bc.stamp(path) == since:
        time.sleep(0.01)


def test_kill_9_and_the_same_command_give_the_same_bits(tmp_path):
    flags = [*FLAGS, "--train-steps", 800]
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    run(ROOT / "td3bc.py", *flags, cwd=tmp_path / "whole")
    path = tmp_path / "killed" / "out" / "checkpoint.pt"
    process = start(*flags, cwd=tmp_path / "killed")
    wait_for(path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert torch.load(path, weights_only=True)["step"] < 800
    result = run(ROOT / "td3bc.py", *flags, cwd=tmp_path / "killed")
    assert "of 800" in result.stdout
    files = [tmp_path / folder / "out" for folder in ("whole", "killed")]
    first, second = (torch.load(f / "checkpoint.pt", weights_only=True) for f in files)
    assert all(torch.equal(x, second["agents"][key]) for key, x in first["agents"].items())
    assert len({(f / "evals.csv").read_text() for f in files}) == 1

    # finished: the same command says so and leaves all as it is
    before = td3bc.stamp(path)
    again = run(ROOT / "td3bc.py", *flags, "--device", "cpu", cwd=tmp_path / "killed")
    assert "at update 800 of 800" in again.stdout and td3bc.stamp(path) == before
    assert again.stdout.splitlines()[-1] == result.stdout.splitlines()[-1]
    other = run(ROOT / "td3bc.py", *flags, "--lr", 1e-4, cwd=tmp_path / "killed", ok=False)
    assert "lr 0.0003; choose another --out" in other.stderr and td3bc.stamp(path) == before
    path.write_bytes(path.read_bytes()[:5000])
    damaged = run(ROOT / "td3bc.py", *flags, cwd=tmp_path / "killed", ok=False)
    assert "cannot be read" in damaged.stderr


def test_a_run_does_not_replace_the_file_of_another_one(tmp_path):
    process, path = start(*FLAGS, cwd=tmp_path), tmp_path / "out" / "checkpoint.pt"
    wait_for(path)
    own = tmp_path / "own"
    own.write_text("of another run")
    own.rename(path)
    error = process.communicate()[1].splitlines()[-1]
    assert process.returncode == 1 and error.endswith("is now of another run; choose another --out")
    assert path.read_text() == "of another run"
    assert not list(path.parent.glob("*.tmp"))


def test_what_diverges_ends_in_one_line(tmp_path):
    result = run(ROOT / "td3bc.py", *FLAGS, "--lr", 1e30, cwd=tmp_path, ok=False)
    assert "try a lower --lr" in result.stderr and not list(tmp_path.glob("out/*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", LEARNERS)
def test_no_gpu(tmp_path, name):
    result = run(ROOT / f"{name}.py", "--device", "cuda", cwd=tmp_path, ok=False)
    assert "there is no GPU" in result.stderr
