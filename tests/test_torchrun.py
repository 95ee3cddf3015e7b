"""Stages A and B under torchrun: two processes on the CPU give what one process gives."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, SAMPLE

import gta_augment as B
import gta_diffusion as A

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SIZES = {"horizon": 7, "dim": 8, "batch_size": 8, "device": "cpu", "compile": False}
LIMIT = 120  # seconds: a hang is an error


@pytest.fixture(autouse=True)
def one_thread():
    """torchrun gives each process one thread; sums of several threads may round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def start(script, folder, **changes):
    """Starts a script in two processes; its output goes to folder/log."""
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in changes.items() if not isinstance(v, bool)]
    flags += [f"--{k}" for k, v in changes.items() if v is True]
    with open(folder / "log", "w") as log:
        return subprocess.Popen(
            [*TORCHRUN, ROOT / script, *flags],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def finish(process, folder, code=0):
    """Waits for what start started. Returns its output; fails if its exit code is another."""
    try:
        returncode = process.wait(LIMIT)
    finally:
        process.kill()
    output = (folder / "log").read_text()
    assert returncode == code, output
    return output


def run_two(script, folder, code=0, **changes):
    return finish(start(script, folder, **changes), folder, code)


def train_two(folder, code=0, **changes):
    flags = {"env": SAMPLE, **SIZES, **changes}
    del flags["compile"]  # is off on the CPU
    return run_two("gta_diffusion.py", folder, code, **flags)


def train_one(folder, **changes):
    A.main(A.Args(env=str(SAMPLE), out=folder / "diffusion.pt", **{**SIZES, **changes}))


def load(folder):
    return A.load_checkpoint(folder / "diffusion.pt")


def distance(a, b):
    """Euclidean distance of two lists of tensors."""
    return sum((x - y).double().pow(2).sum() for x, y in zip(a, b, strict=True)).sqrt().item()


def weights(checkpoint, part="model"):
    return list(checkpoint[part].values())


def moments(checkpoint, key="exp_avg"):
    return [own[key] for own in checkpoint["optimizer"]["state"].values()]


def assert_same(a, b):
    assert a.keys() == b.keys() and a["step"] == b["step"]
    for part in ("model", "ema", "rng"):
        assert a[part].keys() == b[part].keys()  # no prefix of a wrapper
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part]), part
    assert all(map(torch.equal, moments(a), moments(b)))
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]


@pytest.fixture
def by_halves(monkeypatch):
    """Makes one process do what two do: the loss of either half of the batch, and their mean."""
    loss = A.edm_loss

    def mean_of_halves(denoiser, *batch):
        halves = zip(*(field.chunk(2) for field in batch))
        return sum(loss(denoiser, *half) for half in halves) / 2

    monkeypatch.setattr(A, "edm_loss", mean_of_halves)


def loss_in(output):
    return float(re.search(r"loss ([\d.]+) over the last 100", output)[1])


def near_the_end(folder, scale=1.0):
    """A checkpoint of step 95 of 100, where the loss is printed, with weights times scale."""
    train_one(folder, train_steps=2)
    checkpoint = load(folder)
    checkpoint["args"]["train_steps"], checkpoint["step"] = 100, 95
    for p in checkpoint["model"].values():
        p *= scale
    torch.save(checkpoint, folder / "diffusion.pt")


def test_training_is_that_of_one_process(tmp_path, capsys, by_halves):
    """To the bit, where the one process adds up the same halves; and the loss is of all ranks."""
    near_the_end(tmp_path)
    shutil.copytree(tmp_path, tmp_path / "one")
    last = {"train_steps": 100, "resume": True}
    train_one(tmp_path / "one", **last)
    one = capsys.readouterr().out
    two = train_two(tmp_path, **last)
    assert_same(load(tmp_path / "one"), load(tmp_path))
    assert loss_in(two) == pytest.approx(loss_in(one), abs=1e-3)
    assert two.count("dataset: ") == two.count("denoiser: ") == two.count("wrote ") == 1
    assert not list(tmp_path.rglob("*.tmp"))


def test_training_is_that_of_one_process_but_for_rounding(tmp_path):
    """One process that knows nothing of halves. Adam divides a gradient by its size, so that
    rounding grows from step to step: few steps, a low rate, and a tolerance of 1 %."""
    (tmp_path / "one").mkdir()
    few = {"train_steps": 10, "lr": 1e-6}
    train_one(tmp_path / "one", **few)
    train_two(tmp_path, **few)
    one, two = load(tmp_path / "one"), load(tmp_path)
    torch.manual_seed(0)
    initial = list(A.Denoiser(7, 11, 3, 8).state_dict().values())
    for part in ("model", "ema"):
        moved = distance(weights(one, part), initial)
        assert 0 < distance(weights(one, part), weights(two, part)) < 0.01 * moved
    for key in ("exp_avg", "exp_avg_sq"):
        size = distance(moments(one, key), [torch.zeros(())] * len(moments(one, key)))
        assert distance(moments(one, key), moments(two, key)) < 0.01 * size


def stop_two(folder, after, **changes):
    """SIGTERM to torchrun once step after is done. Returns the step at which both ranks leave."""
    process = start("gta_diffusion.py", folder, env=SAMPLE, **SIZES, train_steps=1000, **changes)
    step = 0
    while process.poll() is None and step <= after:
        time.sleep(0.05)
        step = max(map(int, re.findall(r"\| (\d+)/1000", (folder / "log").read_text())), default=0)
    process.send_signal(signal.SIGTERM)
    try:
        assert process.wait(LIMIT) != 0
    finally:
        process.kill()
    output = (folder / "log").read_text()
    (step,) = re.findall(r"interrupted at step (\d+); --resume continues", output)
    assert load(folder)["step"] == int(step)
    return int(step)


def stop_one(folder, monkeypatch, at, **changes):
    class SignalAtStep(A.tqdm):
        def __iter__(self):
            for step in super().__iter__():
                if step == at:
                    signal.raise_signal(signal.SIGTERM)
                yield step

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="interrupted at step"):
        patch.setattr(A, "tqdm", SignalAtStep)
        train_one(folder, train_steps=1000, **changes)


def test_a_stopped_run_goes_on_in_one_process_and_in_two(tmp_path, by_halves, monkeypatch):
    """Two processes, one process, two processes, each stopped: the bits of one unbroken run."""
    (tmp_path / "whole").mkdir()
    step = stop_two(tmp_path, after=0)
    stop_one(tmp_path, monkeypatch, at=step + 3, resume=True)
    step = stop_two(tmp_path, after=step + 3, resume=True)
    stop_one(tmp_path / "whole", monkeypatch, at=step)
    assert_same(load(tmp_path / "whole"), load(tmp_path))


def test_the_buffer_is_that_of_one_process(tmp_path):
    """To the byte, whatever the number of processes: five batches, the last one smaller."""
    train_one(tmp_path, train_steps=2)
    flags = {"checkpoint": tmp_path / "diffusion.pt", "num_transitions": 7 * 36, "num_steps": 8}
    flags |= {"mu": 0.5, "batch_size": 8, "device": "cpu"}
    buffers = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    B.main(B.Args(out=tmp_path / "one" / "b.npz", **flags))
    output = run_two("gta_augment.py", tmp_path / "two", out=tmp_path / "two" / "b.npz", **flags)
    assert output.count("wrote ") == output.count("mean reward: ") == 1
    for name in ("one", "two"):
        with np.load(tmp_path / name / "b.npz", allow_pickle=False) as file:
            buffers.append({key: file[key] for key in file.files if key != "metadata"})
    assert buffers[0].keys() == buffers[1].keys()
    assert all((buffers[0][key] == buffers[1][key]).all() for key in buffers[0])
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == ["b.npz", "log"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 7}, "--batch-size 7: 2 processes must divide it"),
        ({"train_steps": 9}, "was trained with --train-steps 100, not 9"),
        ({"train_steps": 100, "resume": True}, "step 100: the loss is"),
    ],
    ids=["batch size", "another run's file", "not finite"],
)
def test_an_error_is_one_line_and_ends_all(tmp_path, changes, message):
    near_the_end(tmp_path, scale=1e15)
    before = (tmp_path / "diffusion.pt").read_bytes()
    output = train_two(tmp_path, code=1, **changes)
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert message in line
    assert (tmp_path / "diffusion.pt").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["diffusion.pt", "log"]


def test_every_rank_has_its_own_gpu(monkeypatch):
    assert [B.own_device(name) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    for key, value in torchrun.items():
        monkeypatch.setenv(key, value)
    assert [B.own_device(name) for name in ("cpu", "cuda")] == ["cpu", "cuda:1"]
    with pytest.raises(SystemExit, match="--device cuda:1: torchrun gives every process its GPU"):
        B.own_device("cuda:1")
