"""--eval-workers: the same results, whole processes only, none that stays."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SAMPLE
from learners import LEARNERS, make_agents, make_args
from test_learners import assert_same, small, train


def test_workers_return_the_same(dataset):
    """Nine environments, unequal for two workers; the second round leaves three of them out."""
    module, device = LEARNERS["td3bc"], torch.device("cpu")
    spec = module.find_eval_env(dataset)
    scaling = module.make_scaling(dataset.episodes, dataset.source.action_space)

    def evaluate_two(envs):
        returns = []
        for name in ("td3bc", "dt", "td3bc"):
            own = LEARNERS[name]
            args = make_args(own, num_seeds=3, eval_episodes=5, **small(own))
            args.target_return = 3600.0
            evaluate = getattr(own, "evaluate", None) or own.evaluate_target_return
            returns.append(evaluate(make_agents(own, args), envs, scaling, args, device))
        return np.array(returns)

    args = make_args(module, num_seeds=3, eval_episodes=3, eval_workers=2)
    alone = evaluate_two(module.Envs(spec, 9))
    with module.open_envs(spec, args, device) as envs:
        assert type(envs) is module.WorkerEnvs and len(envs.pipes) == 2 and envs.num_envs == 9
        np.testing.assert_array_equal(evaluate_two(envs), alone)
    assert not multiprocessing.active_children()
    assert len(np.unique(alone)) == 6 and (alone[0] == alone[2]).all()


def test_only_cuda_starts_workers_by_itself(dataset, monkeypatch):
    module = LEARNERS["iql"]
    monkeypatch.setattr(module, "get_context", lambda kind: pytest.fail("a process was started"))
    spec = module.find_eval_env(dataset)
    for workers, device in ((None, "cpu"), (0, "cuda")):
        args = make_args(module, eval_workers=workers)
        with module.open_envs(spec, args, torch.device(device)) as envs:
            assert type(envs) is module.Envs
    with pytest.raises(pytest.fail.Exception, match="was started"):
        with module.open_envs(spec, make_args(module), torch.device("cuda")):
            pass


def test_a_run_with_workers_and_one_that_loses_one(tmp_path, monkeypatch, capsys):
    module = LEARNERS["iql"]
    flags = {"train_steps": 4, "eval_episodes": 2}
    alone, helped = (
        train(module, tmp_path, eval_workers=workers, **flags) for workers in (None, 2)
    )
    assert (alone / "evals.csv").read_text() == (helped / "evals.csv").read_text()
    first, second = (torch.load(p / "policy.pt", weights_only=True) for p in (alone, helped))
    assert first["args"].pop("eval_workers") is None and second["args"].pop("eval_workers") == 2
    assert_same(first, second)
    assert not multiprocessing.active_children()
    torch.save(second, helped / "policy.pt")  # of a version without the flag
    module.main(module.Args(resume=helped, eval_workers=1))

    save = module.save_policy

    def save_and_kill_a_worker(*inputs):
        save(*inputs)
        multiprocessing.active_children()[0].kill()

    monkeypatch.setattr(module, "save_policy", save_and_kill_a_worker)
    with pytest.raises(SystemExit, match="error: a process .* has died; .* --eval-workers$"):
        train(module, tmp_path, eval_workers=2, **flags)
    assert not multiprocessing.active_children()
    (stopped,) = set((tmp_path / "runs").iterdir()) - {alone, helped}
    monkeypatch.undo()
    module.main(module.Args(resume=stopped))
    assert (alone / "evals.csv").read_text() == (stopped / "evals.csv").read_text()
    with pytest.raises(SystemExit, match="--eval-workers -1: must be between 0 and 1000"):
        train(module, tmp_path, eval_workers=-1)


def processes(group):
    """Numbers of the living processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has just ended
            continue
        if int(pgrp) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="looks at processes in /proc")
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGKILL"])
def test_no_worker_outlives_its_program(how, tmp_path):
    """Ctrl-C reaches the whole group, and the program still saves with the workers' help."""
    flags = ["--env", SAMPLE, "--batch-size", 16, "--eval-every", 1, "--eval-episodes", 2]
    flags += ["--eval-workers", 2, "--device", "cpu"]
    with open(tmp_path / "stderr", "wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, ROOT / "td3bc.py", *map(str, flags)],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
    deadline = time.time() + 120
    while not list(tmp_path.glob("runs/*/policy.pt")) and time.time() < deadline:
        assert process.poll() is None, (tmp_path / "stderr").read_text()
        time.sleep(0.02)
    assert len(processes(process.pid)) >= 3
    if how == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 1
    else:
        process.kill()
        process.wait()
    while processes(process.pid) and time.time() < deadline:
        time.sleep(0.02)
    assert not processes(process.pid)
    said = (tmp_path / "stderr").read_text()
    assert "Traceback" not in said
    if how == "Ctrl-C":
        (path,) = tmp_path.glob("runs/*/policy.pt")
        step = torch.load(path, weights_only=True)["update"]
        assert said.splitlines()[-1].startswith(f"interrupted at update {step}; --resume ")
        assert (path.parent / "evals.csv").read_text().splitlines()[-1].startswith(f"{step},")
