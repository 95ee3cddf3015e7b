"""The fast path on a GPU against the plain one. Skipped where there is no GPU."""

import copy
from functools import partial

import pytest
import torch
from learners import LEARNERS, NO_DROPOUT, draw_inputs, make_agents, make_args, take_update

import gta_diffusion as A
from td3bc import record_graph

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("name", LEARNERS)
def test_recorded_updates_equal_eager_ones(name):
    """Inputs are copied into the graph's; the dropout is off, its masks would differ."""
    module = LEARNERS[name]
    changes = NO_DROPOUT.get(module, {})
    args = make_args(module, num_seeds=2, device="cuda", compile=True, train_steps=100, **changes)
    torch.manual_seed(0)
    inputs = [draw_inputs(module, args, B=64) for _ in range(60)]
    weights = []
    for recorded in (False, True):
        agents = make_agents(module, args)
        static = copy.deepcopy(inputs[0])
        # of TD3+BC's two kinds of update the graph holds the one with the actor
        take = partial(take_update, module, agents, static, 2, args)
        for step, own in enumerate(inputs, start=1):
            for old, new in zip(flat(static), flat(own)):
                old.copy_(new)
            if recorded and step == 11:
                take = record_graph(take)
            take()
        weights.append(agents.weights)
    for own, params in weights[0].items():
        for key, p in params.items():
            torch.testing.assert_close(p, weights[1][own][key], atol=1e-3, rtol=0)


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
def test_recorded_run_draws_new_batches_and_resumes(name, tmp_path):
    """main on a GPU: the replayed graph draws its own batches, a new one goes on from there."""
    module = LEARNERS[name]
    args = module.Args(
        train_steps=100, batch_size=64, eval_every=50, eval_episodes=2, runs=tmp_path
    )
    module.main(args)
    (run,) = tmp_path.iterdir()
    policy = torch.load(run / "policy.pt", weights_only=True)
    weights = [p for params in policy["weights"].values() for p in params.values()]
    assert all(p.isfinite().all() for p in weights)
    policy["update"], policy["args"]["train_steps"] = 50, 150
    torch.save(policy, run / "policy.pt")
    module.main(module.Args(resume=run))
    policy = torch.load(run / "policy.pt", weights_only=True)
    assert policy["update"] == 150


def test_a_recorded_draw_draws_anew():
    data = torch.arange(1000.0, device="cuda")[:, None].expand(-1, 27).contiguous()
    draw = record_graph(lambda: LEARNERS["td3bc"].draw_batch(data, 1, 64, 11, 3, 0.0).r)
    assert not torch.equal(draw().clone(), draw())
