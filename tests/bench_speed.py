"""Times every stage at the paper's sizes on this machine, and prints what a full run would take.

    python tests/bench_speed.py                 all: minutes on a GPU, ten on a CPU
    python tests/bench_speed.py td3bc stage_a   some of it

The variants of a stage are timed in turns, so that a drift of the machine's speed cancels in their
ratios; a time is the median. TFLOP/s count matrix products and convolutions. The ceiling is that of
a large matrix product in the same precision (fp32 is TF32 on CUDA). Not collected by pytest.
"""

import contextlib
import importlib
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import gta_augment  # noqa: E402
import gta_diffusion  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SIZES = {"horizon": 31, "obs_dim": 17, "act_dim": 6, "dim": 16}  # HalfCheetah's
PAPER = {"stage_a": 10**6, "stage_b": 5e6 / 31, "dt": 10**5}  # steps, windows; others: 10^6 updates


def time_in_turns(functions, seconds=10, warmup=4 if CUDA else 1, repeats=10 if CUDA else 1):
    """Returns the median seconds of each function."""
    times, started = [[] for _ in functions], time.perf_counter()
    while len(times[0]) < warmup + 3 or time.perf_counter() - started < seconds * len(functions):
        for own, function in zip(times, functions):
            before = time.perf_counter()
            for _ in range(repeats):
                function()
            if CUDA:
                torch.cuda.synchronize()
            own.append((time.perf_counter() - before) / repeats)
    return [float(np.median(own[warmup:])) for own in times]


def ceiling(dtype):
    """TFLOP/s of a large matrix product."""
    n = 8192 if CUDA else 2048
    a, b = torch.randn(2, n, n, device=DEVICE, dtype=dtype)
    return 2 * n**3 / time_in_turns([lambda: a @ b], seconds=1)[0] / 1e12


def stage_a(bf16, graph, batch_size=256):
    """A step of gta_diffusion.py, on random rows."""
    args = gta_diffusion.Args(batch_size=batch_size, device=DEVICE)
    denoiser = gta_diffusion.Denoiser(**SIZES, bf16=bf16).to(DEVICE)
    lr = torch.tensor(3e-4, device=DEVICE)
    options = {"fused": True, "capturable": CUDA}
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr, **options)
    rows = torch.randn(100_000, 24, device=DEVICE)
    start = torch.arange(len(rows) - 31, device=DEVICE)
    loss_fn = torch.compile(gta_diffusion.edm_loss) if graph else gta_diffusion.edm_loss
    data = (rows, start, rows[:-31, 0], slice(None))
    step = partial(gta_diffusion.update, args, denoiser, loss_fn, optimizer, *data)
    return step, gta_diffusion.record(step) if graph else step


def stage_b(bf16, graph, batch_size=2048 if CUDA else 16):
    """A batch of gta_augment.py at mu 0.25 and w = 2, on random windows."""
    args = gta_augment.Args(device=DEVICE)
    denoiser = gta_augment.Denoiser(**SIZES, bf16=bf16).to(DEVICE).eval()
    source = torch.randn(batch_size, 32, 24, device=DEVICE)
    y = torch.ones(batch_size, device=DEVICE)
    batch = partial(gta_augment.augment, args, denoiser, source, y)
    compiled = torch.compile(denoiser) if graph else denoiser
    return batch, partial(gta_augment.augment, args, compiled, source, y)


def learner(name, num_seeds, graph):
    """A call of a learner's update, on the bundled dataset, with all that its main makes."""
    module, made = importlib.import_module(name), []
    module.run = lambda *inputs, **options: made.extend((inputs, options))
    with contextlib.redirect_stdout(sys.stderr):
        module.main(module.Args(num_seeds=num_seeds, eval_every=0, device=DEVICE))
    (_, _, agents, optimizers, draw_batch, _), options = made
    update = partial(module.update, agents, optimizers, draw_batch)
    return update, module.record(update) if graph else update, options.get("updates", 1)


def variants(name):
    """What to time of a stage: how it runs, eagerly, as timed, units in a call, bf16 or not."""
    for graph in (False, True) if CUDA else (False,):
        way = "graph" if graph else "eager"
        for bf16 in (False, True) if name.startswith("stage") else ():
            make, num = (stage_a, 1) if name == "stage_a" else (stage_b, 2048 if CUDA else 16)
            yield f"{'bf16' if bf16 else 'fp32'} {way}", *make(bf16, graph), num, bf16
        for num_seeds in () if name.startswith("stage") else (1, 8):
            yield f"{num_seeds} agents, {way}", *learner(name, num_seeds, graph), False


def main(names):
    torch.set_float32_matmul_precision("high")
    ceilings = {False: ceiling(torch.float32), True: ceiling(torch.bfloat16)}
    threads = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    name = torch.cuda.get_device_name() if CUDA else f"CPU, {threads}"
    print(f"{name}, torch {torch.__version__}")
    print(f"large matrix product, TFLOP/s: fp32 {ceilings[0]:.3g}, bf16 {ceilings[1]:.3g}\n")
    print("| what | how | ms | per second | TFLOP/s | of ceiling | hours of the full run |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in names or ("stage_a", "stage_b", "td3bc", "iql", "cql", "mcq", "dt"):
        torch.manual_seed(0)
        rows = list(variants(name))
        for row, seconds in zip(rows, time_in_turns([row[2] for row in rows])):
            how, eager, _, num, bf16 = row
            with FlopCounterMode(display=False) as counter:
                eager()
            rate, tflops = num / seconds, counter.get_total_flops() / seconds / 1e12
            hours = PAPER.get(name, 10**6) / rate / 3600
            cells = (
                f"{1e3 * seconds:.3g} | {rate:.4g} | {tflops:.3g} | {tflops / ceilings[bf16]:.0%}"
            )
            print(f"| {name} | {how} | {cells} | {hours:.3g} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
