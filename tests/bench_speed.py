"""Times every stage at the paper's sizes on this machine, and prints what a full run would take.

    python tests/bench_speed.py                 all that there is time for in six minutes
    python tests/bench_speed.py td3bc stage_a   some of it

A time is the median of several. TFLOP/s count matrix products and convolutions. The ceiling is that
of a large matrix product in the same precision (fp32 is TF32 on CUDA). Not collected by pytest.
"""

import contextlib
import importlib
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode
from tyro.conf import Positional

sys.path.insert(0, str(Path(__file__).parent.parent))
import gta_augment  # noqa: E402
import gta_diffusion  # noqa: E402

LEARNERS = ("td3bc", "iql", "cql", "mcq", "dt")
STAGES = (*LEARNERS, "stage_b", "stage_a")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SIZES = {"horizon": 31, "obs_dim": 17, "act_dim": 6}  # HalfCheetah's
FULL_RUN = {"stage_b": 5e6 / 31, "dt": 10**5}  # windows, updates; of the others: 10^6


def time_calls(function, warm_up, repeats, seconds=3):
    """Returns the median seconds of a call; repeats: calls between two looks at the clock."""
    for _ in range(warm_up):
        function()
    times = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        wait_for_gpu()
        before = time.perf_counter()
        for _ in range(repeats):
            function()
        wait_for_gpu()
        times.append((time.perf_counter() - before) / repeats)
    return np.median(times).item()


def wait_for_gpu():
    if CUDA:
        torch.cuda.synchronize()


def ceiling(dtype):
    """Returns the TFLOP/s of a large matrix product."""
    n = 8192 if CUDA else 2048
    a, b = torch.randn(2, n, n, device=DEVICE, dtype=dtype)
    return 2 * n**3 / time_calls(lambda: a @ b, warm_up=1, repeats=1, seconds=1) / 1e12


# --- what to time: a call as Python runs it, the same as the script runs it, the units in it ---


def stage_a(precision):
    """A step of gta_diffusion.py on random rows."""
    args = gta_diffusion.Args(precision=precision, device=DEVICE)
    model = gta_diffusion.make_model(args, SIZES)
    rows = torch.randn(100_000, 24, device=DEVICE)
    data = (rows, torch.arange(len(rows) - 31, device=DEVICE), rows[:-31, 0])
    fast = gta_diffusion.make_one_step(args, gta_diffusion.Ranks(0, 1), model, data)
    own = (model.denoiser, gta_diffusion.edm_loss, model.optimizer)
    return partial(gta_diffusion.update, args, *own, *data, slice(None)), fast, 1


def stage_b(precision):
    """A batch of gta_augment.py on random windows, at mu 0.25 and w 2."""
    args = gta_augment.Args(device=DEVICE)
    denoiser = gta_augment.Denoiser(**SIZES, dim=16, bf16=precision == "bf16").to(DEVICE).eval()
    size = 2048 if CUDA else 16
    windows = torch.randn(size, 32, 24, device=DEVICE)
    y = torch.ones(size, device=DEVICE)
    eager = partial(gta_augment.augment, args, denoiser, windows, y)
    return eager, partial(gta_augment.augment, args, torch.compile(denoiser), windows, y), size


def learner(name, num_seeds):
    """A call of a learner's update on the bundled dataset, with all that its main makes."""
    script = importlib.import_module(name)
    made = {}

    def catch(args, inputs, agents, optimizers, train, benchmark, updates=1, **options):
        made.update(train=train, updates=updates)

    script.run = catch
    with contextlib.redirect_stdout(sys.stderr):
        script.main(script.Args(num_seeds=num_seeds, eval_episodes=0, device=DEVICE))
    fast = script.record(made["train"]) if CUDA else None
    return made["train"], fast, made["updates"]


def variants(stage):
    """Returns what to time of a stage: its name, its precision, what makes it."""
    if stage in LEARNERS:
        return [(f"{n} agents", "fp32", partial(learner, stage, n)) for n in (1, 8)]
    make = {"stage_a": stage_a, "stage_b": stage_b}[stage]
    precisions = ("bf16", "fp32") if CUDA else ("fp32",)
    return [(precision, precision, partial(make, precision)) for precision in precisions]


def measure(stage, name, make, top):
    """Times a variant and prints its lines. top: the TFLOP/s to compare with."""
    eager, fast, num = make()
    with FlopCounterMode(display=False) as counter:
        eager()
    once = stage == "stage_b" or not CUDA
    for way, call in {"graph": fast, "eager": eager}.items() if CUDA else [("eager", eager)]:
        seconds = time_calls(call, warm_up=1 if once else 5, repeats=1 if once else 10)
        rate = num / seconds
        tflops = counter.get_total_flops() / seconds / 1e12
        hours = FULL_RUN.get(stage, 10**6) / rate / 3600
        cells = f"{1e3 * seconds:.3g} | {rate:.4g} | {tflops:.3g} | {tflops / top:.0%}"
        print(f"| {stage} | {name}, {way} | {cells} | {hours:.3g} |", flush=True)


def main(stages: Positional[tuple[Literal[STAGES], ...]] = (), minutes: float = 6.0):
    """Times the stages, all if none is given.

    Args:
        stages: what to time. Default: all
        minutes: what is not timed by then is left out
    """
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    left = [(stage, *variant) for stage in stages or STAGES for variant in variants(stage)]
    try:
        threads = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
        machine = torch.cuda.get_device_name() if CUDA else f"CPU, {threads}"
        print(f"{machine}, torch {torch.__version__}", flush=True)
        tops = {"fp32": ceiling(torch.float32), "bf16": ceiling(torch.bfloat16)}
        print("large matrix product, TFLOP/s: fp32 {fp32:.3g}, bf16 {bf16:.3g}\n".format(**tops))
        print("| what | how | ms | per second | TFLOP/s | of ceiling | hours of the full run |")
        print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
        while left:
            stage, name, precision, make = left[0]
            measure(stage, name, make, tops[precision])
            del left[0]
    except KeyboardInterrupt:  # the alarm's, too
        names = "; ".join(f"{stage}, {name}" for stage, name, *_ in left)
        print(f"\nleft out after {minutes:g} minutes: {names}. Give --minutes, or names")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
