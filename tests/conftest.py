"""What the tests share: the repository's root, the scripts as modules, the bundled dataset."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "data" / "hopper-medium-sample"
sys.path[:0] = [str(ROOT), str(ROOT / "baselines")]


def run(script, *flags, cwd=ROOT, code=0):
    """Runs a script as a user does. Returns what it printed; fails if its exit code is another."""
    command = [sys.executable, str(script), *map(str, flags)]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert result.returncode == code, result.stdout + result.stderr
    return result


@pytest.fixture(scope="session")
def dataset():
    """The bundled Hopper dataset."""
    import gta_diffusion

    return gta_diffusion.load_dataset(str(SAMPLE))


@pytest.fixture
def float64():
    """Adam divides by the gradient's size: in float32 a gradient near zero is mostly rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


TINY_A = ["--horizon", 7, "--dim", 8, "--batch-size", 16, "--train-steps", 6]
TINY_B = ["--num-transitions", 280, "--num-steps", 8, "--mu", 0.5, "--alpha", 1.3]
LABEL_B = "gta(mu 0.5, alpha 1.3, num-transitions 280, num-steps 8, H 7)"  # the name of B after A
TINY_SYNTHER = ["--width", 16, "--train-steps", 6, "--num-transitions", 280, "--num-steps", 8]
TINY_C = ["--train-steps", 6, "--batch-size", 32, "--eval-every", 4, "--eval-episodes", 2]


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """A folder with the files of tiny runs of A, B and C by command line, and what they printed."""
    folder = tmp_path_factory.mktemp("pipeline")
    outputs = {
        "A": run(ROOT / "gta_diffusion.py", *TINY_A, cwd=folder).stdout,
        "B": run(ROOT / "gta_augment.py", *TINY_B, cwd=folder).stdout,
        "C": run(ROOT / "td3bc.py", *TINY_C, cwd=folder).stdout,
        "C aug": run(
            ROOT / "td3bc.py", *TINY_C, "--aug", "buffer.npz", "--num-seeds", 2, cwd=folder
        ).stdout,
        "C aug only": run(
            ROOT / "td3bc.py", *TINY_C, "--aug", "buffer.npz", "--aug-only", cwd=folder
        ).stdout,
    }
    return folder, outputs
