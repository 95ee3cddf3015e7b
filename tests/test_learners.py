"""What all learners do around their algorithm: commands, evaluation, files, continuation."""

import importlib
import json
import resource
import shutil
import signal
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import plain
import pytest
import torch
from conftest import (
    HOPPER,
    ROOT,
    TINY_C,
    call,
    message,
    random_episodes,
    read_checkpoint,
    write_buffer,
    write_hopper,
)

import td3bc

LEARNERS = ("td3bc", "iql", "cql", "mcq", "dt")
QUICK = ["--batch-size", 8, "--eval-episodes", 0, "--out", "out"]


def train(name, folder, *flags, ok=True):
    """Runs a learner in a folder."""
    return call(ROOT / f"{name}.py", *flags, cwd=folder, ok=ok)


def assert_same_run(first, second):
    """Asserts that two runs came to the same weights, bit by bit, and to the same returns."""
    weights = read_checkpoint(second)["agents"]
    for key, x in read_checkpoint(first)["agents"].items():
        assert torch.equal(x, weights[key]), key
    assert (first / "evals.csv").read_text() == (second / "evals.csv").read_text()


@pytest.fixture
def data(tmp_path):
    """A small dataset of Hopper, and a buffer as if made from it."""
    write_buffer(tmp_path / "buffer.npz", N=20)
    return write_hopper(tmp_path / "x", random_episodes(40, 30))


# --- a run ---


@pytest.mark.parametrize("name", LEARNERS)
def test_a_run_on_dataset_and_buffer(pipeline, tmp_path, name):
    flags = [*TINY_C, "--aug", pipeline / "buffer.npz", "--num-seeds", 2]
    if name in ("cql", "mcq"):
        flags += ["--num-actions", 2]
    lines = train(name, tmp_path, *flags).stdout.splitlines()
    (folder,) = (tmp_path / "runs").iterdir()
    assert lines[-2] == f"wrote runs/{folder.name}" and folder.name.startswith(f"{name}-")
    config = json.loads((folder / "config.json").read_text())
    label = config["aug_label"]
    assert label.startswith("gta(mu 0.5, alpha 1.3")
    (dataset,) = td3bc.open_datasets(HOPPER)
    returns = [episode.rewards.sum() for episode in dataset.iterate_episodes()]
    np.testing.assert_allclose(
        config["dataset_score"], (np.mean(returns) + 20.272305) / 32.54572305
    )
    assert (folder / "evals.csv").read_text().startswith("update,agent,return,score\n")
    steps, agents, returns, scores = np.loadtxt(folder / "evals.csv", delimiter=",", skiprows=1).T
    assert steps.tolist() == [4, 4, 6, 6] and agents.tolist() == [0, 1, 0, 1]
    np.testing.assert_allclose(scores, (returns + 20.272305) / 3254.572305 * 100)
    result = f"{scores[2:].mean():.1f} +- {scores[2:].std():.1f} over 2 seeds"
    assert lines[-1] == f"{HOPPER} | {name} | {label} | {result}"
    if name != "dt":  # which acts on a history
        learner = importlib.import_module(name)
        agents = learner.load_agents(folder / "checkpoint.pt")
        (dataset,) = learner.open_datasets(HOPPER)
        benchmark = learner.make_benchmark(dataset, agents.args)
        again, _ = learner.evaluate(agents, benchmark, agents.args)
        np.testing.assert_allclose(again, returns[2:])


@pytest.mark.parametrize("name", LEARNERS)
def test_s4rl_and_buffer_alone(data, name):
    flags = ["--env", "x", "--aug", "buffer.npz", "--aug-only", "--s4rl-sigma", 0.01, *QUICK]
    result = train(name, data.parent, *flags, "--train-steps", 2)
    assert result.stdout.endswith(f"x | {name} | mine only + s4rl(0.01) | not evaluated\n")


def test_one_seed_has_no_deviation():
    evals = [[4, 0, 7.0, 30.0], [4, 1, 9.0, 50.0]]
    assert td3bc.describe_result(evals, 1) == "50.0 over 1 seed"
    assert td3bc.describe_result(evals, 2) == "40.0 +- 10.0 over 2 seeds"


@pytest.mark.parametrize(
    "name, domain", [("iql", "antmaze"), ("cql", "antmaze"), ("mcq", "maze2d")]
)
def test_a_converted_maze_gets_the_settings_of_mazes(tmp_path, name, domain):
    spec = {**json.loads(gym.spec("Hopper-v5").to_json()), "id": f"{domain}-umaze-v1"}
    write_hopper(tmp_path / "x", random_episodes(40), env_spec=spec)
    train(name, tmp_path, "--env", "x", "--train-steps", 1, *QUICK)
    args = read_checkpoint(tmp_path / "out")["args"]
    expected = {"iql": (0.9, 10.0, -1.0), "cql": (0.8, -200.0, -5.0), "mcq": (0.0,)}[name]
    keys = {"iql": ("expectile", "beta"), "cql": ("target_gap", "min_gap"), "mcq": ()}[name]
    assert tuple(args[key] for key in (*keys, "reward_bias")) == expected


def test_evaluation_equals_a_plain_loop(tmp_path):
    """13 episodes of two agents, ten side by side, each whole, from their own seeds."""
    args = td3bc.Args(num_seeds=2, eval_episodes=13, seed=3, device="cpu")
    spec = {**json.loads(gym.spec("Hopper-v5").to_json()), "max_episode_steps": 60}
    folder = write_hopper(tmp_path / "x", random_episodes(4), env_spec=spec)
    (dataset,) = td3bc.open_datasets(str(folder))
    benchmark = td3bc.make_benchmark(dataset, args)
    assert benchmark.envs.num_envs == 20
    torch.manual_seed(0)
    half = torch.full((3,), 0.5)
    scale = td3bc.Scale(torch.full((11,), 0.5), torch.full((11,), 2.0), -half, half)
    agents = td3bc.TD3BC(args, scale)
    env = gym.make("Hopper-v5", max_episode_steps=60)
    expected = np.zeros((2, 13))
    ends = set()
    for i in range(2):
        actor = plain.network(agents.actor[0], i)
        for episode in range(13):
            s, _ = env.reset(seed=1000 * (3 + i) + episode)
            done = False
            while not done:
                x = torch.from_numpy((s - 0.5) / 2).float()
                s, r, terminated, truncated, _ = env.step(0.5 * actor(x).tanh().detach().numpy())
                expected[i, episode] += r
                done = terminated or truncated
            ends.add((terminated, truncated))
    assert len(ends) > 1  # falls and the limit
    returns, scores = td3bc.evaluate(agents, benchmark, args)
    np.testing.assert_allclose(returns, expected.mean(1), rtol=1e-4)
    np.testing.assert_allclose(scores, (returns + 20.272305) / 3254.572305 * 100)


# --- going on ---


@pytest.mark.parametrize("eval_episodes", [1, 0])
def test_kill_9_and_the_same_command_give_the_same_bits(data, eval_episodes):
    folder = data.parent
    flags = ["--env", "x", "--batch-size", 32, "--train-steps", 1000, "--eval-every", 200]
    flags += ["--eval-episodes", eval_episodes]
    command = [sys.executable, ROOT / "td3bc.py", *flags, "--out", "killed"]
    process = subprocess.Popen([str(x) for x in command], cwd=folder)
    while not (folder / "killed" / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert read_checkpoint(folder / "killed")["step"] < 1000
    result = train("td3bc", folder, *flags, "--out", "killed")
    assert "of 1000" in result.stdout
    whole = train("td3bc", folder, *flags, "--out", "whole")
    assert_same_run(folder / "whole", folder / "killed")
    assert whole.stderr.count("\r") < 20  # progress in a log file: seconds would be frames
    if not eval_episodes:
        assert whole.stdout.endswith("not evaluated\n")


def test_a_run_that_is_finished_says_so_and_stays(data):
    flags = ["--env", "x", *QUICK, "--train-steps", 2]
    first = train("td3bc", data.parent, *flags)
    path = data.parent / "out" / "checkpoint.pt"
    before = path.stat().st_mtime_ns
    again = train("td3bc", data.parent, *flags, "--device", "cpu")
    assert "at update 2 of 2" in again.stdout and path.stat().st_mtime_ns == before
    assert again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
    evals = data.parent / "out" / "evals.csv"
    whole = evals.read_text()
    evals.unlink()  # as a kill between the two files leaves it
    train("td3bc", data.parent, *flags)
    assert evals.read_text() == whole
    other = train("td3bc", data.parent, *flags, "--lr", 1e-4, ok=False)
    assert "lr 0.0003; choose another --out" in other.stderr
    path.write_bytes(path.read_bytes()[:5000])
    assert "cannot be read" in train("td3bc", data.parent, *flags, ok=False).stderr


@pytest.mark.parametrize("name", ["td3bc", "cql", "mcq"])
def test_a_larger_train_steps_goes_on_a_smaller_one_does_not(data, name):
    flags = ["--env", "x", *QUICK, "--eval-every", 4, "--eval-episodes", 1]
    for out, steps in (("once", 8), ("twice", 4), ("twice", 8)):
        train(name, data.parent, *flags, "--train-steps", steps, "--out", out)
    assert_same_run(data.parent / "once", data.parent / "twice")
    shorter = train(name, data.parent, *flags, "--train-steps", 6, "--out", "once", ok=False)
    assert "made with train_steps 8" in shorter.stderr


@pytest.mark.parametrize("steps", [2, 6])
def test_a_cosine_has_one_length(data, steps):
    train("iql", data.parent, "--env", "x", *QUICK, "--train-steps", 4)
    other = train("iql", data.parent, "--env", "x", *QUICK, "--train-steps", steps, ok=False)
    assert "made with train_steps 4" in other.stderr


@pytest.mark.parametrize("name", LEARNERS)
def test_an_input_is_what_it_holds_not_what_it_is_called(data, name):
    folder = data.parent
    flags = [*QUICK, "--train-steps", 2]
    train(name, folder, "--env", "x", "--aug", "buffer.npz", *flags)
    shutil.copytree(folder / "x", folder / "y")
    shutil.copy(folder / "buffer.npz", folder / "copy.npz")
    same = train(name, folder, "--env", "y", "--aug", "copy.npz", *flags)
    assert "at update 2 of 2" in same.stdout
    write_buffer(folder / "buffer.npz", N=20, seed=1)
    text = train(name, folder, "--env", "x", "--aug", "buffer.npz", *flags, ok=False).stderr
    assert "out was made with buffer_crc" in text and "another --out" in text
    shutil.rmtree(folder / "x")
    write_hopper(folder / "x", random_episodes(40, 30, seed=1))
    text = train(name, folder, "--env", "x", "--aug", "copy.npz", *flags, ok=False).stderr
    assert "out was made with dataset_crc" in text


# --- files ---


def test_what_is_no_run_of_the_script_stays(data):
    out = data.parent / "out"
    flags = ["--env", "x", *QUICK, "--train-steps", 2]
    out.mkdir()
    (out / "config.json").write_text('{"mine": 1}')
    text = train("td3bc", data.parent, *flags, ok=False).stderr
    assert "out holds files, but no run of td3bc.py" in text
    assert [path.read_text() for path in out.iterdir()] == ['{"mine": 1}']
    shutil.rmtree(out)
    train("iql", data.parent, *flags)
    assert "another program's" in train("td3bc", data.parent, *flags, ok=False).stderr


def test_what_is_another_run_by_now_stays(data):
    """Curves without their checkpoint; a run that another process began in the folder since."""
    out = data.parent / "out"
    flags = ["--env", "x", *QUICK, "--eval-episodes", 1, "--train-steps", 2]
    train("td3bc", data.parent, *flags)
    config = json.loads((out / "config.json").read_text())
    inputs = ({**config, "lr": 1.0}, None, {}, 2, [])
    assert "was made with lr 0.0003" in message(td3bc.save_checkpoint, out, *inputs)
    evals = (out / "evals.csv").read_text()
    (out / "checkpoint.pt").unlink()
    text = train("td3bc", data.parent, *flags, ok=False).stderr
    assert "evals.csv, but no checkpoint.pt" in text
    assert (out / "evals.csv").read_text() == evals


@pytest.mark.parametrize("out", ["/proc/run", "/dev/null/run", "/dev/null"])
def test_a_place_that_cannot_be_written_is_found_before_the_work(data, out):
    result = train("td3bc", data.parent, "--env", "x", *QUICK, "--out", out, ok=False)
    assert out in result.stderr and "update" not in result.stdout


def test_a_link_at_checkpoint_stays_one(data):
    flags = ["--env", "x", *QUICK]
    train("td3bc", data.parent, *flags, "--train-steps", 2)
    path = data.parent / "out" / "checkpoint.pt"
    target = path.rename(data.parent / "elsewhere.pt")
    path.symlink_to(target)
    train("td3bc", data.parent, *flags, "--train-steps", 4)
    assert path.is_symlink() and torch.load(target, weights_only=True)["step"] == 4


def test_a_full_disk_ends_in_one_line_and_leaves_no_half_of_a_file(data):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # bytes: config.json fits
    try:
        result = train("td3bc", data.parent, "--env", "x", *QUICK, "--train-steps", 2, ok=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "checkpoint.pt cannot be written" in result.stderr
    assert [path.name for path in (data.parent / "out").iterdir()] == ["config.json"]


# --- flags ---

WRONG_FLAGS = [
    (["--env", ""], "--env is empty"),
    (["--aug", ""], "--aug is empty"),
    (["--out", ""], "--out is empty"),
    (["--lr=nan"], "--lr is not a number"),
    (["--lr=-1"], "--lr -1.0: must be at least 0"),
    (["--s4rl-sigma=-0.1"], "--s4rl-sigma -0.1: must be at least 0"),
    (["--batch-size=0"], "--batch-size 0: must be at least 1"),
    (["--eval-episodes=-1"], "--eval-episodes -1: must be at least 0"),
    (["--seed", 2**32], f"--seed {2**32}: must be less than 2**32"),
]
if not torch.cuda.is_available():
    WRONG_FLAGS.append((["--device", "cuda"], "there is no GPU"))


@pytest.mark.parametrize("flags, text", WRONG_FLAGS)
@pytest.mark.parametrize("name", LEARNERS)
def test_a_wrong_flag_ends_in_one_line(tmp_path, name, flags, text):
    assert text in train(name, tmp_path, *flags, ok=False).stderr


def test_a_flag_that_may_be_negative_is_a_number():
    args = td3bc.Args(reward_bias=float("nan"), device="cpu")
    assert "--reward-bias is not a number" in message(td3bc.check_flags, args)


def test_what_diverges_ends_in_one_line(data):
    flags = ["--env", "x", *QUICK, "--train-steps", 40, "--lr", 1e30]
    result = train("td3bc", data.parent, *flags, ok=False)
    assert "try a lower --lr" in result.stderr
    assert not (data.parent / "out" / "checkpoint.pt").exists()


def test_track_without_a_login(data, monkeypatch):
    for key in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(data))
    monkeypatch.setenv("NETRC", str(data / "netrc"))
    flags = ["--env", "x", *QUICK, "--train-steps", 2, "--track"]
    before = sorted(data.parent.glob("runs/*"))
    assert "wandb login" in train("td3bc", data.parent, *flags, ok=False).stderr
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    assert "--track" in train("td3bc", data.parent, *flags, ok=False).stderr
    assert sorted(data.parent.glob("runs/*")) == before  # nothing is left of it
