"""The fast path on a GPU against the plain one. Skipped where there is no GPU."""

import contextlib
import copy
import io
import re
from functools import partial

import numpy as np
import pytest
import torch
from conftest import SAMPLE
from learners import LEARNERS, NO_DROPOUT, draw_inputs, make_agents, make_args, set_schedule

import gta_augment as B
import gta_diffusion as A
from td3bc import record_graph

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(autouse=True)
def compile_anew():
    """As a run does: a function compiled at a second shape would be compiled for any shape."""
    torch.compiler.reset()


# at lr 1e-3 rounding would grow to a tenth of what the weights move, see assert_moved_alike
CHANGES = {"lr": 1e-5, "actor_lr": 1e-5, "tau": 0.1, "warmup_steps": 1}


def make_cuda_args(module, **changes):
    """Arguments under which targets move far in few updates, and a schedule is passed."""
    known = {key: value for key, value in CHANGES.items() if hasattr(module.Args(), key)}
    return make_args(module, num_seeds=2, device="cuda", **{**known, **changes})


def assert_moved_alike(start, a, b):
    """Every network within 2 % of how far it has moved. After 60 updates at lr 1e-5, weights that
    differ by 1e-7 at first differ by 0.2 % of that (CQL, the worst; measured on a CPU)."""
    for name, params in start.items():
        moved, apart = (
            torch.stack([(x[name][key] - y[name][key]).norm() for key in params]).norm()
            for x, y in ((a, start), (a, b))
        )
        assert moved > 0, name
        assert apart < 0.02 * moved, name


def copies(weights):
    return {n: {k: p.detach().clone() for k, p in params.items()} for n, params in weights.items()}


@pytest.mark.parametrize("name", LEARNERS)
def test_compiled_and_recorded_updates_equal_eager_ones(name, full_fp32):
    """Inputs are copied into the graph's, rates are set outside of it; no dropout, whose masks
    would differ."""
    module = LEARNERS[name]
    args = make_cuda_args(module, train_steps=60, **NO_DROPOUT.get(module, {}))
    torch.manual_seed(0)
    inputs = [draw_inputs(module, args, B=64) for _ in range(60)]
    weights = []
    for args.compile in (False, True):
        agents = make_agents(module, args)
        start = copies(agents.weights)
        static = copy.deepcopy(inputs[0])
        # of TD3+BC's two kinds of update the graph holds the one with the actor
        kind = (True,) if name == "td3bc" else ()
        take = partial(module.update, agents, *static, *kind, args)
        for step, own in enumerate(inputs, start=1):
            for old, new in zip(flat(static), flat(own)):
                old.copy_(new)
            if args.compile and step == 11:
                take = record_graph(take)
            set_schedule(module, agents, step, args)
            take()
        weights.append(copies(agents.weights))
    assert_moved_alike(start, *weights)


def flat(inputs):
    return [t for x in inputs for t in ([x] if torch.is_tensor(x) else x)]


@pytest.fixture
def full_fp32(monkeypatch):
    """Products in fp32 instead of TF32, so that what is left is the order of sums."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    set_precision = torch.set_float32_matmul_precision
    set_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)  # main's TF32
    yield
    set_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def draw_windows(num, batch_size=16):
    """Inputs of edm_loss: random windows, conditions, noise."""
    for _ in range(num):
        x, noise = torch.randn(2, batch_size, 8, 15, device="cuda")
        x[:, -1, 11:] = 0
        y, sigma = torch.randn(2, batch_size, device="cuda")
        keep = (torch.rand(batch_size, device="cuda") > 0.25).float()
        yield x, y, keep, torch.exp(1.2 * sigma - 1.2), noise


def test_compiled_and_recorded_training_equals_eager(full_fp32):
    """50 updates. Adam divides a gradient by its size, so that rounding grows from step to step: at
    lr 3e-4 weights that differ by 1e-7 at first differ after 50 updates by as much as they have
    moved. At lr 1e-6 they agree within 3 % of that distance (1e-7 at first: 0.9 %), and the losses
    to four digits."""
    torch.manual_seed(0)
    first = A.Denoiser(7, 11, 3, 8).cuda()
    batches = list(draw_windows(50))
    runs = []
    for fast in (False, True):
        denoiser = copy.deepcopy(first)
        lr = torch.tensor(1e-6, device="cuda")
        optimizer = torch.optim.AdamW(denoiser.parameters(), lr, fused=True, capturable=True)
        loss_fn = torch.compile(A.edm_loss) if fast else A.edm_loss
        static = copy.deepcopy(batches[0])

        def step(denoiser=denoiser, optimizer=optimizer, loss_fn=loss_fn, static=static):
            loss = loss_fn(denoiser, *static)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        losses = []
        for number, batch in enumerate(batches):
            for old, new in zip(static, batch):
                old.copy_(new)
            if fast and number == 10:
                step = record_graph(step)
            losses.append(step().item())
        runs.append((losses, torch.cat([p.flatten() for p in denoiser.parameters()])))
    start = torch.cat([p.flatten() for p in first.parameters()])
    (losses, weights), (fast_losses, fast_weights) = runs
    assert fast_losses == pytest.approx(losses, rel=1e-4)
    assert (weights - start).norm() > 0
    assert (fast_weights - weights).norm() < 0.03 * (weights - start).norm()


@pytest.mark.slow
def test_bf16_training_reaches_the_loss_of_fp32(tmp_path):
    """Within 1 %, after 2000 steps on equal batches: the mean of the last 1000, as printed."""
    losses = {}
    for precision in ("fp32", "bf16"):
        args = A.Args(env=str(SAMPLE), out=tmp_path / f"{precision}.pt", precision=precision)
        args.horizon, args.dim, args.batch_size, args.train_steps = 15, 16, 256, 2000
        with contextlib.redirect_stdout(io.StringIO()) as output:
            A.main(args)
        losses[precision] = float(re.search(r"loss ([\d.]+) over", output.getvalue())[1])
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.01)


def test_a_recorded_run_of_stage_a_equals_an_eager_one_and_resumes(tmp_path, full_fp32):
    """main, batch drawing and learning rate included: a replayed graph draws and does the same.
    Neither compile flag nor graph may change what --resume goes on with."""
    checkpoints = {}
    for kind in ("eager", "recorded", "resumed"):
        args = A.Args(env=str(SAMPLE), out=tmp_path / f"{kind}.pt", precision="fp32", save_every=30)
        args.horizon, args.dim, args.batch_size, args.train_steps = 7, 8, 32, 60
        args.lr, args.compile = 1e-6, kind != "eager"
        if kind == "resumed":
            write = A.write_atomically

            def write_and_die(path, content, write=write):
                write(path, content)
                raise SystemExit("killed")

            with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
                patch.setattr(A, "write_atomically", write_and_die)
                A.main(args)
            assert A.load_checkpoint(args.out)["step"] == 30
            args.resume = True
        A.main(args)
        checkpoints[kind] = A.load_checkpoint(args.out)
    torch.manual_seed(0)
    start = flat_weights(A.Denoiser(7, 11, 3, 8).state_dict())
    eager, recorded, resumed = (flat_weights(c["model"]) for c in checkpoints.values())
    moved = (eager - start).norm()
    assert moved > 0
    assert (recorded - eager).norm() < 0.03 * moved
    assert (resumed - recorded).norm() < 0.03 * moved
    assert torch.equal(checkpoints["eager"]["rng"]["cuda"], checkpoints["recorded"]["rng"]["cuda"])


def flat_weights(weights):
    return torch.cat([p.flatten() for p in weights.values()])


def test_a_streamed_compiled_buffer_equals_an_eager_one(tmp_path, full_fp32):
    """Stage B: eager and compiled, in several batches of which the last is filled up."""
    args = A.Args(env=str(SAMPLE), out=tmp_path / "d.pt", horizon=7, dim=8, batch_size=32)
    args.train_steps = 20
    A.main(args)
    buffers = []
    for compiled in (False, True):
        out = tmp_path / f"{compiled}.npz"
        args = B.Args(checkpoint=tmp_path / "d.pt", out=out, compile=compiled, precision="fp32")
        args.num_transitions, args.batch_size, args.num_steps, args.mu = 7 * 50, 16, 8, 0.5
        B.main(args)
        with np.load(out) as file:
            buffers.append({key: file[key] for key in ("observations", "actions", "rewards")})
    for key, eager in buffers[0].items():
        np.testing.assert_allclose(buffers[1][key], eager, atol=1e-2 * eager.std(), rtol=0)


@pytest.mark.parametrize("name", LEARNERS)
def test_recorded_eager_and_resumed_runs_agree(name, tmp_path, monkeypatch, full_fp32):
    """main, dropout included: a replayed graph draws the numbers that eager updates draw."""
    monkeypatch.setattr(torch._inductor.config, "fallback_random", True)  # eager's dropout masks
    module = LEARNERS[name]
    fixed = {"train_steps": 60, "batch_size": 64, "eval_every": 30, "eval_episodes": 2}
    weights = {}
    for kind in ("eager", "recorded", "resumed"):
        args = make_cuda_args(module, runs=tmp_path / kind, eval_workers=0, **fixed)
        args.compile = kind != "eager"
        if kind == "resumed":
            save = module.save_policy

            def save_and_die(run, step, *rest, save=save):
                save(run, step, *rest)
                raise SystemExit("killed")

            with monkeypatch.context() as patch, pytest.raises(SystemExit):
                patch.setattr(module, "save_policy", save_and_die)
                module.main(args)
            args = module.Args(resume=next((tmp_path / kind).iterdir()), eval_workers=0)
        module.main(args)
        (run,) = (tmp_path / kind).iterdir()
        weights[kind] = torch.load(run / "policy.pt", weights_only=True)["weights"]
    start = make_agents(module, make_cuda_args(module, **fixed)).weights
    start = {n: {k: p.detach().cpu() for k, p in params.items()} for n, params in start.items()}
    assert_moved_alike(start, weights["eager"], weights["recorded"])
    assert_moved_alike(start, weights["recorded"], weights["resumed"])


def test_a_recorded_draw_draws_anew():
    data = torch.arange(1000.0, device="cuda")[:, None].expand(-1, 27).contiguous()
    draw = record_graph(lambda: LEARNERS["td3bc"].draw_batch(data, 1, 64, 11, 3, 0.0).r)
    assert not torch.equal(draw().clone(), draw())
