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
        agents = C.Agents(args, 11, 3, device)
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
        weights.append(agents.weights())
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
