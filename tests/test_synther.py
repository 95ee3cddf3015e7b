"""SynthER: transitions, denoiser, training, sampling, files."""

import copy
import math
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import HOPPER, ROOT

import synther as S
from td3bc import read_buffer

SIZES = {
    "env": HOPPER,
    "width": 16,
    "batch_size": 8,
    "train_steps": 800,
    "save_every": 200,
    "num_steps": 4,
}
SIZES |= {"num_transitions": 50, "sample_batch_size": 20, "device": "cpu"}


def test_transitions_match_a_loop():
    episodes, expected = S.load_episodes(S.open_datasets(HOPPER))[:3], []
    for e in episodes:
        for t, (s, s_next) in enumerate(zip(e.observations, e.observations[1:])):
            expected.append([*s, *e.actions[t], e.rewards[t], *s_next, float(e.terminations[t])])
    rows, mean, std = (x.numpy() for x in S.make_transitions(episodes))
    np.testing.assert_array_equal(rows, np.float32(expected))
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
    for width, millions in ((1024, 6.5), (2048, 25.6)):  # SynthER's small one, and C.1
        size = sum(p.numel() for p in S.ResidualMLP(42, width).parameters())
        assert size == pytest.approx(1e6 * millions, abs=0.05e6)
    x, noise, sigma = torch.randn(4, 27), torch.randn(4, 27), torch.tensor([0.002, 0.3, 2.0, 80.0])
    noised, loss = x + sigma[:, None] * noise, 0.0
    D = denoiser(noised, sigma).detach()
    for i, s in enumerate(sigma.tolist()):
        norm, x_i = math.sqrt(s**2 + 0.25), noised[i].double().numpy()
        F = plain_network(denoiser.net, x_i / norm, math.log(s) / 4)
        expected = 0.25 / norm**2 * x_i + 0.5 * s / norm * F
        np.testing.assert_allclose(D[i].numpy(), expected, atol=1e-5, rtol=1e-5)
        weight = (s**2 + 0.25) / (s * 0.5) ** 2
        loss += weight * ((D[i] - x[i]) ** 2).mean().item() / 4
    assert S.transition_loss(denoiser, x, sigma, noise).item() == pytest.approx(loss, rel=1e-5)


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
    # at step 108 the decay is 1 - 8^(-2/3) = 3/4
    for step, weight, expected in ((10, 0, 0), (108, 1, 0.25), (10**6, 1, 1 - 0.995 * 0.75)):
        torch.nn.init.constant_(model.weight, weight)
        S.average_weights(ema, model, step, 0.995)
        assert ema.weight.item() == pytest.approx(expected)


def test_exact_denoiser_draws_from_the_gaussian():
    """The sampler with D of data N(m, C), which is known: m + C (C + sigma^2)^-1 (x - m)."""
    torch.manual_seed(0)
    root, m, mean, std = 0.5 * torch.randn(5, 5), torch.randn(5), torch.randn(5), 9 * torch.rand(5)
    C = root @ root.T

    def denoiser(x, sigma):
        return m + (x - m) @ torch.linalg.inv(C + sigma[0] ** 2 * torch.eye(5)) @ C

    args = S.Args(num_transitions=30_000, sample_batch_size=16_384, device="cpu")
    x = (S.sample(denoiser, mean, std, args) - mean) / std
    torch.testing.assert_close(x.mean(0), m, atol=0.03, rtol=0)
    torch.testing.assert_close(x.T.cov(), C, atol=0.05, rtol=0)


def generate(folder, out="buffer.npz", **changes):
    """Runs the script in this process. Returns its checkpoint, and its buffer with metadata."""
    files = {"checkpoint": str(folder / "synther.pt"), "out": str(folder / out)}
    S.main(S.Args(**{**SIZES, **files, **changes}))
    return torch.load(folder / "synther.pt", weights_only=True), *read_buffer(folder / out)


def test_killed_and_started_again_is_bit_for_bit_the_same(tmp_path, capsys):
    command = [sys.executable, ROOT / "baselines/synther.py"]
    command += [f"--{key.replace('_', '-')}={x}" for key, x in SIZES.items()]
    process = subprocess.Popen(command, cwd=tmp_path)
    while not (tmp_path / "synther.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()  # -9
    process.wait()
    other, again, _ = generate(tmp_path)
    output = capsys.readouterr().out
    assert "synther.pt is at step" in output and "at step 800" not in output
    one, buffer, metadata = generate(tmp_path / "whole")
    for part in ("model", "ema"):
        assert all(torch.equal(x, other[part][key]) for key, x in one[part].items())
    rate = one["optimizer"]["param_groups"][0]["lr"]  # one cosine over the run
    assert rate == pytest.approx(3e-4 * (1 + math.cos(math.pi * 799 / 800)) / 2)
    assert all(np.array_equal(x, again[key]) for key, x in buffer.items())
    assert [x.shape for x in buffer.values()] == [(50, 2, 11), (50, 1, 3), (50, 1), (50, 1)]
    assert "".join(x.dtype.char for x in buffer.values()) == "fff?"
    assert metadata["label"].startswith("synther(width 16, train-steps 800, num-transitions 50, ")


def test_nothing_is_replaced(tmp_path, capsys):
    for _ in range(2):
        generate(tmp_path, train_steps=8)
    assert "buffer.npz is finished, made with these flags" in capsys.readouterr().out
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for changes, message in (
        ({"num_steps": 5}, "buffer.npz was made with num_steps 4; choose another --out"),
        ({"out": "b.npz", "lr": 0.1}, "synther.pt was made with lr 0.0003; choose another --check"),
    ):
        with pytest.raises(SystemExit, match=message):
            generate(tmp_path, train_steps=8, **changes)
    with pytest.raises(SystemExit, match="buffer.npz is now of another run; choose another --out"):
        S.save_buffer(tmp_path / "buffer.npz", {}, {}, None)
    generate(tmp_path, "b.npz", train_steps=8, num_steps=5)  # of the same model
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
