"""On a GPU: what test_pretend_cuda.py holds without one, bf16 against fp32, all stages."""

from contextlib import nullcontext

import pytest
import test_pretend_cuda as pretended
import torch
from conftest import HOPPER, ROOT, TINY_C, run
from graph_on_cpu import tensors_in
from test_pretend_cuda import (  # noqa: F401
    test_a_learner,
    test_images_latents_and_fine_tuning,
    test_metrics,
)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def assert_close(first, second):
    for key in ("agents", "model", "ema"):
        for x, y in zip(tensors_in(first.get(key)), tensors_in(second.get(key)), strict=True):
            torch.testing.assert_close(x, y, atol=2e-5, rtol=1e-4)


@pytest.fixture(autouse=True)
def real_gpu(monkeypatch):
    """Takes the GPU for what stands in for it, and rounding for what is the same."""
    monkeypatch.setattr(pretended, "pretend_cuda", nullcontext)
    monkeypatch.setattr(pretended, "assert_same", assert_close)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_recorded_step_of_stage_a(tmp_path, precision):
    pretended.test_stage_a(tmp_path, precision)


@pytest.mark.parametrize("name", ["td3bc", "iql", "cql", "mcq", "dt"])
def test_all_stages_end_to_end(pipeline, tmp_path, name):
    """Stages A and B are made once, on the GPU as well."""
    flags = [*TINY_C, "--env", HOPPER, "--num-seeds", 2, "--aug", pipeline / "buffer.npz"]
    result = run(ROOT / f"{name}.py", *flags, cwd=tmp_path)
    assert "over 2 seeds" in result.stdout.splitlines()[-1]


def test_bf16_learns_what_fp32_does(tmp_path):
    losses = []
    for precision in ("fp32", "bf16"):
        flags = ["--horizon", 7, "--dim", 8, "--train-steps", 1000, "--precision", precision]
        result = run(ROOT / "gta_diffusion.py", *flags, "--out", f"{precision}.pt", cwd=tmp_path)
        losses.append(float(result.stdout.split("loss ")[-1].split()[0]))
    assert abs(losses[1] / losses[0] - 1) < 0.1
