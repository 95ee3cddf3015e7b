"""Times stage A's training step against a direct implementation, and the learners' updates by
seeds.

    python tests/bench_speed.py

Pairs are timed in turns, so that a drift of the machine's speed cancels in the ratios. Not
collected by pytest.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from learners import (  # noqa: E402
    ACT_DIM,
    LEARNERS,
    OBS_DIM,
    make_agents,
    make_args,
    take_update,
)
from plain_unet import plain_unet  # noqa: E402

import gta_diffusion as A  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def time_in_turns(functions, turns, warmup=3):
    """Returns the seconds of every call, [functions, turns]."""
    seconds = np.zeros((len(functions), turns))
    for turn in range(-warmup, turns):
        for i, function in enumerate(functions):
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            function()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            seconds[i, turn] = time.perf_counter() - started  # warm-up turns are overwritten
    return seconds


def stage_a(dim=8, batch_size=64, horizon=31, obs_dim=11, act_dim=3):
    """A training step of the denoiser and of the same function written down directly."""
    steps = []
    for direct in (False, True):
        torch.manual_seed(0)
        denoiser = A.Denoiser(horizon, obs_dim, act_dim, dim).to(DEVICE)
        optimizer = torch.optim.AdamW(denoiser.parameters(), 3e-4, fused=not direct)
        if direct:
            net = denoiser.net
            net.forward = lambda x, c_noise, y, keep, net=net: plain_unet(net, x, c_noise, y)
        x = torch.randn(batch_size, horizon + 1, obs_dim + act_dim + 1, device=DEVICE)
        y, keep = torch.randn(2, batch_size, device=DEVICE)
        sigma, noise = torch.rand(batch_size, device=DEVICE) + 0.1, torch.randn_like(x)

        def step(denoiser=denoiser, optimizer=optimizer, batch=(x, y, keep, sigma, noise)):
            A.edm_loss(denoiser, *batch).backward()
            torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        steps.append(step)
    ours, direct = time_in_turns(steps, turns=15)
    print(
        f"stage A, dim {dim}, batch {batch_size}, {horizon} transitions: {np.median(ours):.3f} s "
        f"a step (fastest {ours.min():.3f}), direct implementation {np.median(direct):.3f} "
        f"({direct.min():.3f}), ratio {np.median(ours / direct):.2f}"
    )


def learner(name, batch_size, seconds=4.0):
    """Updates per second with one and with eight seeds, batch drawing included."""
    module = LEARNERS[name]
    updates, seeds = [], (1, 8)
    for num_seeds in seeds:
        args = make_args(module, num_seeds=num_seeds, batch_size=batch_size, device=str(DEVICE))
        agents = make_agents(module, args)
        updates.append(make_step(module, agents, args))
    one = time_in_turns(updates[:1], turns=3)[0].mean()
    # a pair of updates, since TD3+BC updates its actor in every second one
    times = time_in_turns(updates, turns=max(3, int(seconds / (9 * one)))) / 2
    rates = [1 / np.median(own) for own in times]
    ratio = np.median(times[1] / times[0])
    print(
        f"{name}, batch {batch_size}: {rates[0]:.1f} updates/s with 1 seed, {rates[1]:.1f} with 8, "
        f"{ratio:.2f} times the time of one seed"
    )


def make_step(module, agents, args):
    """A function that takes two updates on data that is there already."""
    rows = torch.randn(40_000, 2 * OBS_DIM + ACT_DIM + 2, device=DEVICE)
    if module is LEARNERS["dt"]:
        rows = rows[:, : OBS_DIM + ACT_DIM + 3]
        rows[:, -2] = torch.arange(len(rows), device=DEVICE) % 900  # timestep
        rows[:, -1] = 900 - rows[:, -2]  # steps left
    shape = (args.num_seeds, args.batch_size, OBS_DIM, ACT_DIM, 0.0)

    def draw():
        if module is LEARNERS["dt"]:
            return (module.draw_sequences(rows, args.num_seeds, OBS_DIM, ACT_DIM, args),)
        batch = module.draw_batch(rows, *shape)
        if module is LEARNERS["td3bc"]:
            return batch, torch.randn_like(batch.a)
        if module is LEARNERS["iql"]:
            return (batch,)
        noise = module.CQLNoise if module is LEARNERS["cql"] else module.MCQNoise
        return batch, noise.draw(batch.a, args)

    def step():
        for n in (1, 2):
            take_update(module, agents, draw(), n, args)

    return step


if __name__ == "__main__":
    print(f"{DEVICE}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    stage_a()
    for name, batch_size in {"td3bc": 256, "iql": 256, "cql": 256, "mcq": 256, "dt": 64}.items():
        learner(name, batch_size)
