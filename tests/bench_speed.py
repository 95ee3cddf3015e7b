"""Times stage A's training step against a direct implementation, and TD3+BC's update by seeds.

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
from plain_unet import plain_unet  # noqa: E402

import gta_diffusion as A  # noqa: E402
import td3bc as C  # noqa: E402

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


def stage_c(batch_size=256, obs_dim=11, act_dim=3):
    """An update of TD3+BC with one, four and eight seeds."""
    data = torch.randn(40_000, 2 * obs_dim + act_dim + 2, device=DEVICE)
    updates, seeds = [], (1, 4, 8)
    for num_seeds in seeds:
        args = C.Args(num_seeds=num_seeds, device=str(DEVICE))
        agents = C.TD3BC(args, obs_dim, act_dim, DEVICE)

        def update(agents=agents, args=args):
            for with_actor in (False, True):
                batch = C.draw_batch(data, args.num_seeds, batch_size, obs_dim, act_dim, 0.0)
                C.update(agents, batch, torch.randn_like(batch.a), with_actor, args)

        updates.append(update)
    seconds = time_in_turns(updates, turns=50) / 2
    for num_seeds, own in zip(seeds, seconds):
        print(
            f"TD3+BC, batch {batch_size}, {num_seeds} seeds: {1 / np.median(own):.0f} updates/s, "
            f"{np.median(own / seconds[0]):.2f} times the time of one seed"
        )


if __name__ == "__main__":
    print(f"{DEVICE}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    stage_a()
    stage_c()
