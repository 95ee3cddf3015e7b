"""SynthER: transitions, denoiser, training, sampling, files."""

import copy
import math
import subprocess
import sys
import time

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from conftest import ROOT, run

import synther as S
from td3bc import read_buffer

SCRIPT = ROOT / "baselines" / "synther.py"
SIZES = {"width": 16, "batch_size": 8, "train_steps": 800, "save_every": 200, "num_steps": 4}
SIZES |= {"num_transitions": 50, "sample_batch_size": 20, "device": "cpu"}


def test_transitions_match_a_loop():
    dataset = minari.MinariDataset(ROOT / "data" / "hopper-medium-sample" / "data")
    episodes, expected = S.load_episodes([dataset])[:3], []
    for e in episodes:
        for t, (s, s_next) in enumerate(zip(e.observations, e.observations[1:])):
            expected.append([*s, *e.actions[t], e.rewards[t], *s_next, float(e.terminations[t])])
    rows, mean, std = (x.numpy() for x in S.make_transitions(episodes))
    np.testing.assert_array_equal(rows, np.float32(expected))
    assert rows.shape[1] == 2 * 11 + 3 + 2 and rows[:, -1].any()
    np.testing.assert_allclose(mean[:-1], np.mean(expected, 0)[:-1], rtol=1e-5)
    np.testing.assert_allclose(std[:-1], np.std(expected, 0, ddof=1)[:-1] + 1e-5, rtol=1e-5)
    assert mean[-1] == 0 and std[-1] == 1  # the terminal stays 0 or 1


def test_generated_rows_are_split_clipped_and_thresholded():
    space = gym.spaces.Box(np.float32([-1, -2]), np.float32([1, 2]))
    row = [1, 2, 3, -5, 5, 7, 4, 5, 6]  # s (3), a (2), r, s' (3); the terminal follows
    x = np.float32([[*row, flag] for flag in (-0.1, 0.4, 0.5, 0.6, 1.2)])
    buffer = S.split_transitions(space, 0.5, x)
    assert buffer["observations"][0].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert (buffer["actions"] == [[-1, 2]]).all() and (buffer["rewards"] == [[7]]).all()
    assert buffer["terminals"].tolist() == [[False], [False], [False], [True], [True]]


def plain_network(net, x, c_noise):
    """The residual MLP on one transition, by its weights."""
    w = {key: p.double().numpy() for key, p in net.state_dict().items()}

    def linear(name, x):
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    waves = [2 * math.pi * c_noise * f for f in w["frequencies"]]
    h = linear("emb_noise.0", np.array([c_noise, *map(math.sin, waves), *map(math.cos, waves)]))
    h = linear("widen", linear("emb_noise.2", h / (1 + np.exp(-h))) + linear("emb_x", x))
    for i in range(6):
        h = h + linear(f"blocks.{i}", np.maximum(h, 0))
    return linear("out", np.maximum(h, 0))


def test_denoiser_and_loss_are_edms():
    torch.manual_seed(0)
    denoiser = S.TransitionDenoiser(27, 32, sigma_data=0.5)
    assert {p.numel() for p in denoiser.buffers()} == {8}  # the random frequencies
    sizes = [
        sum(p.numel() for p in S.ResidualMLP(42, width).parameters()) for width in (1024, 2048)
    ]
    assert sizes == pytest.approx([6.5e6, 25.6e6], abs=0.05e6)  # SynthER's small one, and C.1
    x, noise, sigma = torch.randn(4, 27), torch.randn(4, 27), torch.tensor([0.002, 0.3, 2.0, 80.0])
    noised, expected_loss = x + sigma[:, None] * noise, 0.0
    D = denoiser(noised, sigma).detach()
    for i, s in enumerate(sigma.tolist()):
        norm, x_i = math.sqrt(s**2 + 0.25), noised[i].double().numpy()
        F = plain_network(denoiser.net, x_i / norm, math.log(s) / 4)
        expected = 0.25 / norm**2 * x_i + 0.5 * s / norm * F
        np.testing.assert_allclose(D[i].numpy(), expected, atol=1e-5, rtol=1e-5)
        weight = (s**2 + 0.25) / (s * 0.5) ** 2
        expected_loss += weight * ((D[i] - x[i]) ** 2).mean().item() / 4
    loss = S.transition_loss(denoiser, x, sigma, noise).item()
    assert loss == pytest.approx(expected_loss, rel=1e-5)


def test_an_update_is_a_clipped_step_of_adam(float64):
    args = S.Args(batch_size=5, max_grad_norm=0.1, p_mean=-0.7, p_std=0.9)
    rows, denoiser = torch.randn(30, 6), S.TransitionDenoiser(6, 8)
    optimizer = torch.optim.AdamW(denoiser.parameters(), 1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    before = copy.deepcopy(denoiser)
    torch.manual_seed(1)
    loss = S.update(denoiser, optimizer, rows, S.transition_loss, args)
    torch.manual_seed(1)
    x, sigma = rows[torch.randint(30, (5,))], (-0.7 + 0.9 * torch.randn(5)).exp()
    expected = S.transition_loss(before, x, sigma, torch.randn(5, 6))
    assert loss == expected.detach()
    gradients = torch.autograd.grad(expected, list(before.parameters()))
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    assert norm > 0.1
    for p, old, g in zip(denoiser.parameters(), before.parameters(), gradients):
        g = g * 0.1 / (norm + 1e-6)
        torch.testing.assert_close(p, old - 1e-2 * g / (g.abs() + 1e-8))


def test_average_keeps_nothing_of_the_initial_weights():
    ema, model = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    share = 1 - 0.995 * 0.75  # at step 108 the decay is 1 - 8^(-2/3) = 3/4
    for step, weight, expected in ((10, 0, 0.0), (100, 0, 0.0), (108, 1, 0.25), (10**6, 1, share)):
        torch.nn.init.constant_(model.weight, weight)
        S.average_weights(ema, model, step, 0.995)
        assert ema.weight.item() == pytest.approx(expected)


def test_exact_denoiser_draws_from_the_gaussian():
    """The sampler with D of data N(m, C), which is known: m + C (C + sigma^2)^-1 (x - m). The rows:
    s, a, r, s' of a linear Gaussian system, each on a scale of its own; 0.3 of it terminal."""
    torch.manual_seed(0)
    s, a, noise = torch.randn(3, 20_000) * torch.tensor([[3.0], [0.5], [1.0]])
    rows = torch.stack([s + 10, a - 1, 40 * torch.randn(20_000) + 200, s + 4 * a + noise])
    rows = torch.cat([rows, (torch.rand(1, 20_000) < 0.3).float()]).T
    mean, std, m = rows.mean(0), rows.std(0), torch.tensor([0, 0, 0, 0, 0.3])
    mean[-1], std[-1] = 0, 1
    C = ((rows - mean) / std).T.cov()

    def denoiser(x, sigma):
        return m + (x - m) @ torch.linalg.inv(C + sigma[0] ** 2 * torch.eye(5)) @ C

    args = S.Args(num_transitions=30_000, sample_batch_size=16_384, device="cpu")
    x, same = S.sample(denoiser, mean, std, args), {"atol": 0.03, "rtol": 0}
    torch.testing.assert_close((x.mean(0) - mean) / std, m, **same)
    torch.testing.assert_close(x.std(0) / rows.std(0), torch.ones(5), **same)
    torch.testing.assert_close(torch.corrcoef(x.T), torch.corrcoef(rows.T), **same)


# --- files ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the files of a tiny run."""
    folder = tmp_path_factory.mktemp("synther")
    files = {"checkpoint": str(folder / "synther.pt"), "out": str(folder / "buffer.npz")}
    S.main(S.Args(**SIZES, **files))
    return folder


def test_killed_and_started_again_is_bit_for_bit_the_same(folder, tmp_path):
    flags = [text for k, x in SIZES.items() for text in (f"--{k.replace('_', '-')}", str(x))]
    command, errors = [sys.executable, str(SCRIPT), *flags], subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=tmp_path, stderr=errors)
    while not (tmp_path / "synther.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()  # -9
    process.wait()
    assert not (tmp_path / "buffer.npz").exists()
    output = run(SCRIPT, *flags, cwd=tmp_path).stdout
    assert "synther.pt is at step" in output and "at step 800" not in output
    one, other = (torch.load(f / "synther.pt", weights_only=True) for f in (folder, tmp_path))
    for part in ("model", "ema"):
        assert all(torch.equal(x, other[part][key]) for key, x in one[part].items())
    rate = one["optimizer"]["param_groups"][0]["lr"]  # one cosine over the run
    assert rate == pytest.approx(3e-4 * (1 + math.cos(math.pi * 799 / 800)) / 2)
    (buffer, metadata), (again, _) = (read_buffer(f / "buffer.npz") for f in (folder, tmp_path))
    assert all(np.array_equal(x, again[key]) for key, x in buffer.items())
    assert [x.shape for x in buffer.values()] == [(50, 2, 11), (50, 1, 3), (50, 1), (50, 1)]
    assert "".join(x.dtype.char for x in buffer.values()) == "fff?"
    expected = {"format": "gta-buffer", "format_version": 1, "method": "synther", "horizon": 1}
    expected |= {"env": "data/hopper-medium-sample", "env_id": "Hopper-v5", "width": 16}
    expected |= {"dataset_ids": ["hopper-medium-sample-v0"]}
    expected["label"] = "synther(width 16, train-steps 800, num-transitions 50, num-steps 4)"
    assert {key: metadata[key] for key in expected} == expected


def test_nothing_is_replaced(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    before = {path.name: path.read_bytes() for path in folder.glob("*.*")}
    S.main(S.Args(**SIZES))
    assert "buffer.npz is finished, made with these flags" in capsys.readouterr().out
    for changes, message in (
        ({"num_steps": 5}, "buffer.npz was made with num_steps 4; choose another --out"),
        ({"out": "b.npz", "lr": 0.1}, "synther.pt was made with lr 0.0003; choose another --check"),
        ({"out": "b.npz", "checkpoint": "buffer.npz"}, "buffer.npz: no whole model of synther"),
        ({"out": "synther.pt"}, "synther.pt is no buffer of synther.py; choose another --out"),
    ):
        with pytest.raises(SystemExit, match=message):
            S.main(S.Args(**{**SIZES, **changes}))
    with pytest.raises(SystemExit, match="buffer.npz is now of another run; choose another --out"):
        S.save_buffer(folder / "buffer.npz", {}, {}, None)
    S.main(S.Args(**{**SIZES, "num_steps": 5, "out": "b.npz"}))  # the trained model is sampled
    assert before == {name: (folder / name).read_bytes() for name in before}
    (b, metadata), (buffer, _) = read_buffer("b.npz"), read_buffer("buffer.npz")
    assert metadata["num_steps"] == 5 and (b["rewards"] != buffer["rewards"]).any()
