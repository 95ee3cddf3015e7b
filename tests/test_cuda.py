"""On a GPU: a CUDA graph does what its function does, bf16 learns what fp32 does, all runs end."""

import importlib
from functools import partial

import pytest
import torch
from conftest import HOPPER, ROOT, TINY_B, run

import drqbc
import gta_diffusion

LEARNERS = ("td3bc", "iql", "cql", "mcq", "dt")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def eager(function):
    """Stands in for record: the three calls before the graph, then the function as it is."""
    for _ in range(3):
        function()
    return function


def train(module, monkeypatch, tmp_path, recorder, **flags):
    """Runs a script's main in this process, with another record. Returns its checkpoint."""
    out = tmp_path / recorder.__name__
    monkeypatch.setattr(module, "record", recorder)
    # Adam divides by the gradient's size: at a small rate rounding stays as small
    module.main(module.Args(device="cuda", lr=1e-5, out=str(out), **flags))
    return torch.load(out / "checkpoint.pt" if out.is_dir() else out, weights_only=True)


def assert_close(first, second):
    for key, x in first.items():
        if x.is_floating_point():
            torch.testing.assert_close(x, second[key], atol=2e-5, rtol=1e-4, msg=key)


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("num_seeds", [1, 3])
def test_a_recorded_update_is_the_eager_one(tmp_path, monkeypatch, name, num_seeds):
    module = importlib.import_module(name)
    flags = {"env": HOPPER, "train_steps": 40, "batch_size": 64}
    flags |= {"eval_every": 0, "num_seeds": num_seeds}
    ours = train(module, monkeypatch, tmp_path, module.record, **flags)
    theirs = train(module, monkeypatch, tmp_path, eager, **flags)
    assert_close(ours["agents"], theirs["agents"])


def test_a_recorded_update_on_images_and_on_latents_is_the_eager_one():
    args = drqbc.Args(batch_size=8, lr=1e-5, device="cuda")
    s = torch.randint(0, 256, (2, 8, 9, 84, 84), dtype=torch.uint8, device="cuda")
    a, r, discount = (torch.rand(*size, device="cuda") for size in ((8, 2), (8,), (8,)))
    for images in (True, False):
        weights = []
        for recorder in (drqbc.record, eager):
            torch.manual_seed(0)
            agent = drqbc.DrQBC(args, 2).cuda()
            with torch.no_grad():
                s_now, s_next = s if images else map(agent.latents, s)
            batch = s_now, a, r, discount, s_next
            optimizers = drqbc.make_optimizers(agent, args)
            draw_batch = partial(tuple, batch)
            step = recorder(partial(drqbc.update, agent, optimizers, draw_batch))
            for _ in range(20):
                step()
            weights.append(agent.state_dict())
        assert_close(*weights)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_recorded_step_of_stage_a_is_the_eager_one(tmp_path, monkeypatch, precision):
    module = gta_diffusion
    flags = {"env": HOPPER, "train_steps": 20, "batch_size": 32}
    flags |= {"horizon": 7, "dim": 8, "precision": precision}
    ours = train(module, monkeypatch, tmp_path, module.record, **flags)
    theirs = train(module, monkeypatch, tmp_path, eager, **flags)
    assert_close(ours["model"], theirs["model"])
    assert_close(ours["ema"], theirs["ema"])


def test_bf16_learns_what_fp32_does(tmp_path):
    losses = []
    for precision in ("fp32", "bf16"):
        flags = ["--horizon", 7, "--dim", 8, "--train-steps", 1000, "--precision", precision]
        result = run(ROOT / "gta_diffusion.py", *flags, "--out", f"{precision}.pt", cwd=tmp_path)
        losses.append(float(result.stdout.split("loss ")[-1].split()[0]))
    assert abs(losses[1] / losses[0] - 1) < 0.1


@pytest.mark.parametrize("name", LEARNERS)
def test_all_stages_end_to_end(tmp_path, name):
    flags = ["--horizon", 7, "--dim", 8, "--train-steps", 50]
    run(ROOT / "gta_diffusion.py", *flags, cwd=tmp_path)
    run(ROOT / "gta_augment.py", *TINY_B, cwd=tmp_path)
    flags = ["--train-steps", 40, "--eval-every", 20, "--eval-episodes", 2, "--num-seeds", 2]
    result = run(ROOT / f"{name}.py", *flags, "--aug", "buffer.npz", cwd=tmp_path)
    assert "over 2 seeds" in result.stdout.splitlines()[-1]
