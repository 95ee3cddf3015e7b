"""SynthER: transitions, denoiser, training, sampling, files."""

import copy
import math
import shutil
import subprocess
import sys
import time

import gymnasium as gym
import h5py
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
    "num_transitions": 50,
    "sample_batch_size": 20,
    "device": "cpu",
}


def test_transitions_match_a_loop():
    episodes = S.load_episodes(S.open_datasets(HOPPER))[:3]
    expected = []
    for s, a, r, terminals in episodes:
        for t in range(len(r)):
            expected.append([*s[t], *a[t], r[t], *s[t + 1], terminals[t]])
    rows = S.make_rows(episodes)
    np.testing.assert_array_equal(rows, np.float64(expected))
    mean, std = S.fit_rows(rows)
    np.testing.assert_allclose(mean[:-1], np.mean(expected, 0)[:-1], rtol=1e-5)
    np.testing.assert_allclose(std[:-1], np.std(expected, 0, ddof=1)[:-1] + 1e-5, rtol=1e-5)
    assert mean[-1] == 0 and std[-1] == 1  # the terminal stays 0 or 1


def test_generated_rows_are_split_clipped_and_thresholded():
    space = gym.spaces.Box(np.float32([-1, -2]), np.float32([1, 2]))
    row = [1, 2, 3, -5, 5, 7, 4, 5, 6]  # s (3), a (2), r, s' (3); the terminal follows
    x = np.float32([[*row, flag] for flag in (-0.1, 0.4, 0.5, 0.6, 1.2)])
    buffer = S.split_rows(x, space, 0.5, {})
    assert buffer.observations[0].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert (buffer.actions == [[-1, 2]]).all() and (buffer.rewards == [[7]]).all()
    assert buffer.terminals.tolist() == [[False], [False], [False], [True], [True]]


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
    x = torch.randn(4, 27)
    noise = torch.randn(4, 27)
    sigma = torch.tensor([0.002, 0.3, 2.0, 80.0])
    noised = x + sigma[:, None] * noise
    D = denoiser(noised, sigma).detach()
    loss = 0.0
    for i, s in enumerate(sigma.tolist()):
        norm = math.sqrt(s**2 + 0.25)
        x_i = noised[i].double().numpy()
        F = plain_network(denoiser.net, x_i / norm, math.log(s) / 4)
        expected = 0.25 / norm**2 * x_i + 0.5 * s / norm * F
        np.testing.assert_allclose(D[i].numpy(), expected, atol=1e-5, rtol=1e-5)
        weight = (s**2 + 0.25) / (s * 0.5) ** 2
        loss += weight * ((D[i] - x[i]) ** 2).mean().item() / 4
    assert S.transition_loss(denoiser, x, sigma, noise).item() == pytest.approx(loss, rel=1e-5)


def test_an_update_is_a_clipped_step_of_adam(float64):
    args = S.Args(batch_size=5, max_grad_norm=0.1, p_mean=-0.7, p_std=0.9)
    rows = torch.randn(30, 6)
    denoiser = S.TransitionDenoiser(6, 8)
    optimizer = torch.optim.AdamW(denoiser.parameters(), 1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    before = copy.deepcopy(denoiser)
    torch.manual_seed(1)
    loss = S.update(denoiser, optimizer, rows, S.transition_loss, args)
    torch.manual_seed(1)
    x = rows[torch.randint(30, (5,))]
    sigma = (-0.7 + 0.9 * torch.randn(5)).exp()
    expected = S.transition_loss(before, x, sigma, torch.randn(5, 6))
    assert loss == expected.detach()
    gradients = torch.autograd.grad(expected, list(before.parameters()))
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    assert norm > 0.1
    for p, old, g in zip(denoiser.parameters(), before.parameters(), gradients):
        g = g * 0.1 / (norm + 1e-6)
        torch.testing.assert_close(p, old - 1e-2 * g / (g.abs() + 1e-8))


class PlainAverage:
    """ema_pytorch 0.1.2 as SynthER calls it: update() after every step, with this beta."""

    def __init__(self, weight, every, beta=0.995):
        self.weight = weight
        self.every = every
        self.beta = beta
        self.calls = 0
        self.has_begun = False

    def update(self, weight):
        calls_before = self.calls
        self.calls += 1
        if calls_before % self.every != 0:
            return
        if calls_before <= 100 or not self.has_begun:
            self.weight = weight
            self.has_begun = calls_before > 100
            return
        epoch = self.calls - 100 - 1
        decay = min(1 - (1 + epoch) ** (-2 / 3), self.beta)
        self.weight = decay * self.weight + (1 - decay) * weight


@pytest.mark.parametrize("every", [1, 7, 10])
def test_the_average_is_ema_pytorchs(float64, every):
    ema = torch.nn.Linear(1, 1, bias=False)
    model = torch.nn.Linear(1, 1, bias=False)
    plain = PlainAverage(ema.weight.item(), every)
    for step in range(1, 4001):  # the decay is 0.995 from step 2929 on
        weight = float(torch.randn(()))
        torch.nn.init.constant_(model.weight, weight)
        S.average_weights(ema, model, step, every, 0.995)
        plain.update(weight)
        assert ema.weight.item() == pytest.approx(plain.weight, abs=1e-12), step


def test_exact_denoiser_draws_from_the_gaussian():
    """The sampler with D of data N(m, C), which is known: m + C (C + sigma^2)^-1 (x - m)."""
    torch.manual_seed(0)
    root = 0.5 * torch.randn(5, 5)
    C = root @ root.T
    m = torch.randn(5)
    mean = torch.randn(5)
    std = 9 * torch.rand(5)

    def denoiser(x, sigma):
        return m + (x - m) @ torch.linalg.inv(C + sigma[0] ** 2 * torch.eye(5)) @ C

    args = S.Args(num_transitions=30_000, sample_batch_size=16_384, device="cpu")
    x = (S.sample(denoiser, mean, std, args) - mean) / std
    torch.testing.assert_close(x.mean(0), m, atol=0.03, rtol=0)
    torch.testing.assert_close(x.T.cov(), C, atol=0.05, rtol=0)


def generate(folder, **changes):
    """Runs the script in this process. Returns its checkpoint and its buffer."""
    files = {"checkpoint": str(folder / "synther.pt"), "out": str(folder / "buffer.npz")}
    args = S.Args(**{**SIZES, **files, **changes})
    S.main(args)
    return torch.load(args.checkpoint, weights_only=True), read_buffer(args.out)


def test_killed_and_started_again_is_bit_for_bit_the_same(tmp_path, capsys):
    command = [sys.executable, ROOT / "baselines/synther.py"]
    command += [f"--{key.replace('_', '-')}={x}" for key, x in SIZES.items()]
    process = subprocess.Popen(command, cwd=tmp_path)
    while not (tmp_path / "synther.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()  # -9
    process.wait()
    other, again = generate(tmp_path)
    output = capsys.readouterr().out
    assert "synther.pt is at step" in output and "at step 800" not in output
    one, buffer = generate(tmp_path / "whole")
    for part in ("model", "ema"):
        assert all(torch.equal(x, other[part][key]) for key, x in one[part].items())
    rate = one["optimizer"]["param_groups"][0]["lr"]  # one cosine over the run
    assert rate == pytest.approx(3e-4 * (1 + math.cos(math.pi * 799 / 800)) / 2)
    arrays = buffer[1:5]
    assert all(np.array_equal(x, y) for x, y in zip(arrays, again[1:5]))
    assert [x.shape for x in arrays] == [(50, 2, 11), (50, 1, 3), (50, 1), (50, 1)]
    assert "".join(x.dtype.char for x in arrays) == "fff?"
    assert buffer[5:] == (None, None, None, None)
    label = buffer.metadata["label"]
    assert label.startswith("synther(width 16, train-steps 800, num-transitions 50, ")


def test_nothing_is_replaced(tmp_path, capsys):
    for _ in range(2):
        generate(tmp_path, train_steps=8)
    assert "buffer.npz is finished, made with these flags" in capsys.readouterr().out
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == {"synther.pt", "buffer.npz"}
    b = str(tmp_path / "b.npz")
    for changes, message in (
        ({"num_steps": 5}, "buffer.npz was made with num_steps 4; choose another --out"),
        ({"out": b, "lr": 0.1}, "synther.pt was made with lr 0.0003; choose another --checkpoint"),
        ({"out": b, "train_steps": 9}, "synther.pt was made with train_steps 8; choose another"),
        ({"out": b, "checkpoint": __file__}, "no synther.pt that can be read; choose another"),
        ({"out": __file__}, "test_synther.py is no buffer; choose another --out"),
    ):
        with pytest.raises(SystemExit, match=message):
            generate(tmp_path, **{"train_steps": 8, **changes})
    generate(tmp_path, out=b, train_steps=8, num_steps=5)  # of the same model
    assert before == {name: (tmp_path / name).read_bytes() for name in before}


@pytest.mark.parametrize("name, step", [("synther.pt", "train_learner"), ("buffer.npz", "sample")])
def test_what_another_run_wrote_meanwhile_is_kept(tmp_path, monkeypatch, name, step):
    generate(tmp_path / "other", train_steps=8, p_mean=-1.0)
    theirs = tmp_path / "other" / name
    original = getattr(S, step)

    def work_while_they_write(*args):
        shutil.copy(theirs, tmp_path)
        return original(*args)

    monkeypatch.setattr(S, step, work_while_they_write)
    with pytest.raises(SystemExit, match=f"{name} was made with p_mean -1.0; choose"):
        generate(tmp_path, train_steps=8)
    assert (tmp_path / name).read_bytes() == theirs.read_bytes()
    assert not list(tmp_path.glob("*.tmp"))


def test_another_dataset_under_the_same_name_is_another_run(tmp_path):
    flags = {"env": str(shutil.copytree(HOPPER, tmp_path / "hopper")), "train_steps": 8}
    generate(tmp_path, **flags)
    with h5py.File(tmp_path / "hopper/data/main_data.hdf5", "r+") as file:
        file["episode_0/rewards"][0] += 1
    for changes, name in (({}, "buffer.npz"), ({"out": str(tmp_path / "b.npz")}, "synther.pt")):
        with pytest.raises(SystemExit, match=f"{name} was made with dataset_crc"):
            generate(tmp_path, **flags, **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"out": "/proc/b.npz"}, "/proc/b.npz cannot be written"),
        ({"checkpoint": "/proc/s.pt"}, "/proc/s.pt cannot be written"),
        ({"env": ""}, "--env is empty"),
        ({"out": ""}, "--out is empty"),
        ({"p_mean": math.nan}, "--p-mean is not a number"),
    ],
)
def test_what_cannot_work_ends_before_any_work(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(S, "make_learner", None)  # would be a TypeError
    with pytest.raises(SystemExit, match=message):
        generate(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_a_finished_model_is_sampled_where_nothing_can_be_written(tmp_path, monkeypatch):
    generate(tmp_path, train_steps=8)
    places = []
    monkeypatch.setattr(S, "try_to_write", places.append)
    generate(tmp_path, train_steps=8, out=str(tmp_path / "b.npz"))
    assert places == [str(tmp_path / "b.npz")]
