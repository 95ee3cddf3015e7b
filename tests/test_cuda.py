"""The fast path on a GPU against the plain one. Skipped where there is no GPU."""

import pytest
import torch

import gta_diffusion as A
import td3bc as C

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_recorded_td3bc_updates_equal_eager_ones():
    device = torch.device("cuda")
    args = C.Args(num_seeds=2, batch_size=64, device="cuda")
    torch.manual_seed(0)
    data = torch.randn(1000, 27, device=device)
    weights = []
    for recorded in (False, True):
        agents = C.TD3BC(args, 11, 3, device)
        torch.manual_seed(0)
        batches = iter([C.draw_batch(data, 2, 64, 11, 3, 0.0) for _ in range(60)])
        static = C.Batch(*(field.clone() for field in next(batches)))
        noise = torch.zeros_like(static.a)
        steps = {
            flag: lambda flag=flag: C.update(agents, static, noise, flag, args)  # noqa: B023
            for flag in (False, True)
        }
        for step, batch in enumerate(batches, start=1):
            for old, new in zip(static, batch):
                old.copy_(new)
            if recorded and step == 11:
                steps = {flag: C.record_graph(train) for flag, train in steps.items()}
            steps[step % 2 == 0]()
        weights.append(agents.weights)
    for name, params in weights[0].items():
        for key, p in params.items():
            torch.testing.assert_close(p, weights[1][name][key], atol=1e-3, rtol=0)


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


def test_recorded_run_draws_new_batches(tmp_path):
    """main on a GPU: the replayed graph draws its own batches and learns."""
    for policy_freq in (2, 12):
        args = C.Args(
            train_steps=400, batch_size=256, eval_every=400, eval_episodes=2, runs=tmp_path
        )
        args.policy_freq = policy_freq
        C.main(args)
    for policy in tmp_path.rglob("policy.pt"):
        weights = torch.load(policy, weights_only=True)["weights"]
        assert all(p.isfinite().all() for params in weights.values() for p in params.values())
    data = torch.arange(1000.0, device="cuda")[:, None].expand(-1, 27).contiguous()
    draw = C.record_graph(lambda: C.draw_batch(data, 1, 64, 11, 3, 0.0).r)
    assert not torch.equal(draw().clone(), draw())
