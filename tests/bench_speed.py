"""Times every stage at the paper's sizes on this machine and prints what a full run would take.

    python tests/bench_speed.py                      all, a few minutes on a GPU, about ten on a CPU
    python tests/bench_speed.py stage_a td3bc        some of it
    python tests/bench_speed.py --compile --out x.json

Variants of a stage are timed in turns, so that a drift of the machine's speed cancels in their
ratios; a time is the median. TFLOP/s count matrix products and convolutions. The ceiling is that of
a large matrix product in the same precision (fp32 is TF32 on CUDA). Not collected by pytest.
"""

import argparse
import copy
import json
import math
import os
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
from learners import ACT_DIM, LEARNERS, OBS_DIM, make_agents, make_args, take_update  # noqa: E402
from plain_unet import plain_unet  # noqa: E402

import gta_augment as B  # noqa: E402
import gta_diffusion as A  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
HALFCHEETAH = {"obs_dim": 17, "act_dim": 6}
HORIZON, DIM = 31, 16
PAPER_STEPS = {"stage A": 1_000_000, **dict.fromkeys(LEARNERS, 1_000_000), "dt": 100_000}
PAPER_HOURS = {"stage A": 53.0, "stage B": 3.5, "td3bc": 2.0}  # one RTX 3090 (Table 27)
NUM_WINDOWS = math.ceil(5_000_000 / HORIZON)


def wait():
    if CUDA:
        torch.cuda.synchronize()


def time_in_turns(functions, seconds, warmup=3, repeats=1):
    """Returns the median seconds of each function, called in turns for some seconds.

    On a GPU a call is repeated before the clock is read: it only enqueues work.
    """
    times = [[] for _ in functions]
    started = None
    for turn in range(10**9):
        for own, function in zip(times, functions):
            wait()
            before = time.perf_counter()
            for _ in range(repeats):
                function()
            wait()
            own.append((time.perf_counter() - before) / repeats)
        if turn + 1 == warmup:
            times, started = [[] for _ in functions], time.perf_counter()
        elif started and time.perf_counter() - started > seconds:
            return [float(np.median(own)) for own in times]


def count_flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def ceiling(dtype):
    """TFLOP/s of a large matrix product."""
    n = 8192 if CUDA else 2048
    a, b = torch.randn(2, n, n, device=DEVICE, dtype=dtype)
    (seconds,) = time_in_turns([lambda: a @ b], seconds=1.0, repeats=10 if CUDA else 1)
    return 2 * n**3 / seconds / 1e12


class Report:
    """Collects the rows, prints each as it comes."""

    def __init__(self):
        self.rows = []
        self.ceilings = {"fp32": ceiling(torch.float32), "bf16": ceiling(torch.bfloat16)}
        name = (
            f"CPU with {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
        )
        name = torch.cuda.get_device_name() if CUDA else name
        self.machine = f"{name}, torch {torch.__version__}"
        print(self.machine)
        for key, value in self.ceilings.items():
            print(f"largest matrix product, {key}: {value:.3g} TFLOP/s")
        print("| what | how | ms | per second | TFLOP/s | of ceiling | hours of the full run |")
        print("| --- | --- | --- | --- | --- | --- | --- |")

    def add(self, what, how, seconds, flops, num, precision="fp32"):
        """num is how many of these a full run of the paper takes."""
        row = {"what": what, "how": how, "seconds": seconds, "flops": flops, "num": num}
        row |= {"tflops": flops / seconds / 1e12, "hours": num * seconds / 3600}
        row["share"] = row["tflops"] / self.ceilings[precision]
        self.rows.append(row)
        work = f"{row['tflops']:.3g} | {row['share']:.0%}" if flops else "- | -"
        cells = f"{1e3 * seconds:.3g} | {1 / seconds:.4g} | {work} | {row['hours']:.3g}"
        print(f"| {what} | {how} | {cells} |", flush=True)


# --- stages A and B ---


def make_step_a(batch_size, bf16=False, compiles=False, plain=False):
    """A training step as in gta_diffusion.main, batch drawing included."""
    torch.manual_seed(0)
    denoiser = A.Denoiser(HORIZON, **HALFCHEETAH, dim=DIM, bf16=bf16).to(DEVICE)
    ema = copy.deepcopy(denoiser).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        denoiser.parameters(), torch.tensor(3e-4, device=DEVICE), fused=True, capturable=CUDA
    )
    if plain:
        net = denoiser.net
        net.forward = lambda x, c_noise, y, keep: plain_unet(net, x, c_noise, y, keep)
    loss_fn = torch.compile(A.edm_loss) if compiles else A.edm_loss
    rows = torch.randn(100_000, sum(HALFCHEETAH.values()) + 1, device=DEVICE)
    y = torch.randn(len(rows) - HORIZON, device=DEVICE)

    def step():
        index = torch.randint(len(y), (batch_size,), device=DEVICE)
        x = A.gather_windows(rows, index, HORIZON, HALFCHEETAH["obs_dim"])
        keep = (torch.rand(len(x), device=DEVICE) >= 0.25).float()
        sigma = torch.exp(-1.2 + 1.2 * torch.randn(len(x), device=DEVICE))
        loss_fn(denoiser, x, y[index], keep, sigma, torch.randn_like(x)).backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    if CUDA and compiles:
        for _ in range(3):
            step()
        step = A.record_graph(step)
    calls = iter(range(1, 10**9))

    def step_and_average():
        step()
        if (call := next(calls)) % 10 == 0:
            A.update_ema(ema, denoiser, call, 0.995)

    return step_and_average


def stage_a(report, options):
    batch_size = options.batch_size or 256
    variants = {"eager, written down directly": {"plain": True}, "eager": {}}
    variants["eager, bf16"] = {"bf16": True}
    if options.compile:
        variants |= {"compiled": {"compiles": True}}
        variants |= {"compiled, bf16": {"compiles": True, "bf16": True}}
    steps = [make_step_a(batch_size, **variant) for variant in variants.values()]
    flops = [count_flops(step) for step in steps[:3]]  # what is compiled counts as eager
    flops += flops[1:]
    times = time_in_turns(steps, options.seconds, warmup=2, repeats=10 if CUDA else 1)
    for (how, variant), seconds, own_flops in zip(variants.items(), times, flops):
        how += f", batch {batch_size}"
        num, precision = PAPER_STEPS["stage A"], "bf16" if variant.get("bf16") else "fp32"
        report.add("stage A", how, seconds, own_flops, num, precision)


def stage_b(report, options):
    """One batch of subtrajectories at mu 0.25, K = 128, w = 2: 32 levels, 63 pairs of D."""
    batch_size = 2048 if CUDA else 64
    variants = {"eager": {}, "eager, bf16": {"bf16": True}}
    if options.compile:
        variants["compiled, bf16"] = {"bf16": True, "compiles": True}
    runs = []
    sigmas = B.noise_schedule(128, 0.002, 80.0, 7.0)
    source = torch.randn(batch_size, HORIZON + 1, sum(HALFCHEETAH.values()) + 1, device=DEVICE)
    y = torch.randn(batch_size, device=DEVICE)
    for variant in variants.values():
        torch.manual_seed(0)
        bf16 = variant.get("bf16", False)
        denoiser = B.Denoiser(HORIZON, **HALFCHEETAH, dim=DIM, bf16=bf16).to(DEVICE).eval()
        if variant.get("compiles"):
            denoiser = torch.compile(denoiser)

        @torch.no_grad()
        def generate(denoiser=denoiser):
            x, levels = B.partial_noise(source, sigmas, 0.25)
            denoise = partial(B.guided_denoiser, denoiser, y=y, w=2.0)
            return B.edm_sampler(denoise, x, levels, 0.41, 0.05, 50.0, 1.003).cpu()

        runs.append(generate)
    flops = count_flops(runs[0])
    for (how, variant), seconds in zip(variants.items(), time_in_turns(runs, options.seconds, 1)):
        how += f", batch of {batch_size} windows"
        precision = "bf16" if variant.get("bf16") else "fp32"
        report.add("stage B", how, seconds, flops, NUM_WINDOWS / batch_size, precision)


# --- stage C ---


def make_updates(name, num_seeds, batch_size, records):
    """Two consecutive updates as in main, batch drawing included: TD3+BC's actor has every
    second."""
    module = LEARNERS[name]
    args = make_args(
        module, num_seeds=num_seeds, batch_size=batch_size, device=str(DEVICE), compile=records
    )
    agents = make_agents(module, args)
    rows = torch.randn(100_000, 2 * OBS_DIM + ACT_DIM + 2, device=DEVICE)
    if name == "dt":
        rows = rows[:, : OBS_DIM + ACT_DIM + 3].contiguous()
        rows[:, -2] = torch.arange(len(rows), device=DEVICE) % 900  # timestep
        rows[:, -1] = 900 - rows[:, -2]  # steps left

    def draw():
        if name == "dt":
            return (module.draw_sequences(rows, num_seeds, OBS_DIM, ACT_DIM, args),)
        batch = module.draw_batch(rows, num_seeds, batch_size, OBS_DIM, ACT_DIM, 0.0)
        if name == "td3bc":
            return batch, torch.randn_like(batch.a)
        if name == "iql":
            return (batch,)
        noise = module.CQLNoise if name == "cql" else module.MCQNoise
        return batch, noise.draw(batch.a, args)

    def update(step):
        return take_update(module, agents, draw(), step, args)

    updates = [partial(update, step) for step in (1, 2)]
    if records:
        for _ in range(6):
            for own in updates:
                own()
        updates = [module.record_graph(own) for own in updates]

    def both():
        for own in updates:
            own()

    return both


def learner(name, report, options):
    batch_size = options.batch_size or LEARNERS[name].Args().batch_size
    variants = [("eager", False)] + [("compiled, CUDA graph", True)] * CUDA
    for num_seeds in (1, 8):
        runs = [make_updates(name, num_seeds, batch_size, records) for _, records in variants]
        flops = count_flops(runs[0]) / 2
        repeats = 20 if CUDA and name != "dt" else 1
        times = time_in_turns(runs, options.seconds, warmup=1, repeats=repeats)
        for (how, _), seconds in zip(variants, times):
            how += f", batch {batch_size}, {num_seeds} seed{'s' * (num_seeds > 1)}"
            report.add(name, how, seconds / 2, flops, PAPER_STEPS[name])


def evaluation(report, options):
    """Ten episodes of HalfCheetah, which never ends early, for every seed; every 5000 updates."""
    module, spec = LEARNERS["td3bc"], {"id": "HalfCheetah-v5"}
    obs_dim, act_dim = HALFCHEETAH.values()
    one_s, one_a = np.ones(obs_dim, np.float32), np.ones(act_dim, np.float32)
    scaling = module.Scaling(0 * one_s, one_s, -one_a, one_a)
    for num_seeds in (1, 8):
        for workers in (0, os.cpu_count()):
            args = make_args(
                module,
                device=str(DEVICE),
                num_seeds=num_seeds,
                eval_workers=workers,
                eval_episodes=10,
            )
            agents = module.TD3BC(args, obs_dim, act_dim, DEVICE)
            with module.open_envs(spec, args, DEVICE) as envs:
                run = partial(module.evaluate, agents, envs, scaling, args, DEVICE)
                (seconds,) = time_in_turns([run], seconds=0.0, warmup=1)
            how = f"{num_seeds} seed{'s' * (num_seeds > 1)}, --eval-workers {workers}"
            report.add("evaluation", how, seconds, 0, PAPER_STEPS["td3bc"] / 5000)


def main():
    parts = {"stage_a": stage_a, "stage_b": stage_b}
    parts |= {name: partial(learner, name) for name in LEARNERS} | {"evaluation": evaluation}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *parts], help="what to time; all")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each group of variants")
    parser.add_argument("--batch-size", type=int, help="another than the paper's, in A and C")
    parser.add_argument("--compile", action="store_true", default=CUDA, help="A and B on a CPU")
    parser.add_argument("--out", type=Path, default=Path("speed.json"), help="the rows as JSON")
    options = parser.parse_args()
    A.pick_device(DEVICE.type)  # TF32, as in the scripts
    report = Report()
    for name in options.parts or parts:
        parts[name](report, options)
    content = {"machine": report.machine, "ceilings": report.ceilings, "rows": report.rows}
    options.out.write_text(json.dumps(content, indent=2) + "\n")
    print(f"wrote {options.out}; the paper: {PAPER_HOURS} hours on one RTX 3090")


if __name__ == "__main__":
    main()
