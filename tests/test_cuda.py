"""The fast path on a GPU against the plain one. Skipped where there is no GPU."""

import copy
from functools import partial

import pytest
import torch
from learners import LEARNERS, NO_DROPOUT, draw_inputs, make_agents, make_args, set_schedule

import gta_diffusion as A
from td3bc import record_graph

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


FAST = {"lr": 1e-3, "tau": 0.1, "actor_lr": 1e-3, "warmup_steps": 1, "compile": True}


def make_fast_args(module, **changes):
    """Arguments under which all weights move far in few updates, targets too."""
    known = {key: value for key, value in FAST.items() if hasattr(module.Args(), key)}
    return make_args(module, num_seeds=2, device="cuda", **known, **changes)


def assert_moved_alike(start, a, b):
    """Within a twentieth of how far the weights have moved, which is far more than rounding."""
    for name, params in start.items():
        for key, p in params.items():
            moved = (a[name][key] - p).abs().max().item()
            if moved:  # cql's multiplier does not without --target-gap
                torch.testing.assert_close(a[name][key], b[name][key], atol=moved / 20, rtol=0)
        assert any((a[name][key] != p).any() for key, p in params.items()), name


def copies(weights):
    return {n: {k: p.detach().clone() for k, p in params.items()} for n, params in weights.items()}


@pytest.mark.parametrize("name", LEARNERS)
def test_recorded_updates_equal_eager_ones(name):
    """Inputs are copied into the graph's, rates are set outside of it; no dropout, whose masks
    would differ."""
    module = LEARNERS[name]
    args = make_fast_args(module, train_steps=60, **NO_DROPOUT.get(module, {}))
    torch.manual_seed(0)
    inputs = [draw_inputs(module, args, B=64) for _ in range(60)]
    weights = []
    for recorded in (False, True):
        agents = make_agents(module, args)
        start = copies(agents.weights)
        static = copy.deepcopy(inputs[0])
        # of TD3+BC's two kinds of update the graph holds the one with the actor
        kind = (True,) if name == "td3bc" else ()
        take = partial(module.update, agents, *static, *kind, args)
        for step, own in enumerate(inputs, start=1):
            for old, new in zip(flat(static), flat(own)):
                old.copy_(new)
            if recorded and step == 11:
                take = record_graph(take)
            set_schedule(module, agents, step, args)
            take()
        weights.append(copies(agents.weights))
    assert_moved_alike(start, *weights)


def flat(inputs):
    return [t for x in inputs for t in ([x] if torch.is_tensor(x) else x)]


def test_compiled_loss_equals_eager():
    torch.manual_seed(0)
    denoiser = A.Denoiser(31, 11, 3, 8).cuda()
    x, y, keep = torch.randn(16, 32, 15), torch.randn(16), torch.ones(16)
    sigma, noise = torch.rand(16) + 0.1, torch.randn(16, 32, 15)
    x[:, -1, 11:] = 0
    batch = [t.cuda() for t in (x, y, keep, sigma, noise)]
    eager = A.edm_loss(denoiser, *batch)
    compiled = torch.compile(A.edm_loss)(denoiser, *batch)
    torch.testing.assert_close(eager, compiled, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", LEARNERS)
def test_recorded_eager_and_resumed_runs_agree(name, tmp_path, monkeypatch):
    """main, dropout included: a replayed graph draws the numbers that eager updates draw."""
    module = LEARNERS[name]
    fixed = {"train_steps": 60, "batch_size": 64, "eval_every": 30, "eval_episodes": 2}
    fixed["eval_workers"] = 0
    weights = {}
    for kind in ("eager", "recorded", "resumed"):
        args = make_fast_args(module, runs=tmp_path / kind, **fixed)
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
    start = make_agents(module, make_fast_args(module, **fixed)).weights
    start = {n: {k: p.detach().cpu() for k, p in params.items()} for n, params in start.items()}
    assert_moved_alike(start, weights["eager"], weights["recorded"])
    assert_moved_alike(start, weights["recorded"], weights["resumed"])


def test_a_recorded_draw_draws_anew():
    data = torch.arange(1000.0, device="cuda")[:, None].expand(-1, 27).contiguous()
    draw = record_graph(lambda: LEARNERS["td3bc"].draw_batch(data, 1, 64, 11, 3, 0.0).r)
    assert not torch.equal(draw().clone(), draw())
