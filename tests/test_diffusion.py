"""Stage A: windows, network, EDM training, the average of the weights, checkpoints."""

import math
import os
import signal
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_A, run, write_minari
from plain_unet import plain_unet

import gta_diffusion as A

SMALL = {"horizon": 7, "dim": 8, "batch_size": 8, "train_steps": 20, "device": "cpu"}


@pytest.fixture(scope="module")
def episodes():
    return A.load_episodes(A.open_datasets(A.DEFAULT_ENV))


def train(folder, **changes):
    """Runs stage A in this process. Returns its checkpoint."""
    out = folder / "diffusion.pt"
    A.main(A.Args(**{**SMALL, "out": str(out), **changes}))
    return torch.load(out, weights_only=True)


def command_of(**changes):
    flags = [f"--{key.replace('_', '-')}={x}" for key, x in {**SMALL, **changes}.items()]
    return [sys.executable, ROOT / "gta_diffusion.py", *flags]


def assert_same(one, other):
    assert one["step"] == other["step"]
    for part in ("model", "ema"):
        assert one[part].keys() == other[part].keys()
        assert all(torch.equal(one[part][key], other[part][key]) for key in one[part]), part


@pytest.mark.parametrize("penalty", [100.0, 0.0])
@pytest.mark.parametrize("horizon", [1, 7, 31])
def test_windows_match_a_brute_force_slice(episodes, penalty, horizon, capsys):
    few = [A.Episode(e.observations[-n - 1 :], *(x[-n:] for x in e[1:]))  # with their terminals
           for e, n in zip(episodes, [31, 12, 45, 30, 7])]  # fmt: skip
    windows = A.make_windows(few, horizon, gamma=0.9, penalty=penalty)
    w = short = 0
    for i, e in enumerate(few):
        T = len(e.rewards)
        short += T < horizon
        rewards = e.rewards - penalty * e.terminations
        for t in range(T - horizon + 1):
            x = windows["rows"][windows["start"][w] + np.arange(horizon + 1)]
            np.testing.assert_allclose(x[:, :11], e.observations[t : t + horizon + 1], rtol=1e-6)
            np.testing.assert_allclose(x[:-1, 11:-1], e.actions[t : t + horizon], rtol=1e-6)
            np.testing.assert_allclose(x[:-1, -1], rewards[t : t + horizon], rtol=1e-6)
            y = sum(0.9 ** (k - t) * rewards[k] for k in range(t, T))
            assert windows["y"][w] == pytest.approx(y, rel=1e-5)
            assert windows["return_to_go"][w] == pytest.approx(e.rewards[t:].sum(), rel=1e-5)
            assert (windows["episode"][w], windows["timestep"][w]) == (i, t)
            steps = windows["start"][w] + np.arange(horizon)
            assert (windows["terminals"][steps] == e.terminations[t : t + horizon]).all()
            w += 1
    assert w == len(windows["start"]) == len(windows["y"])
    assert f"{short} episodes are shorter" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no episode has 63 transitions"):
        A.make_windows(few, 63, 0.9, penalty)


def make_episode(kind, rng):
    """An episode of 50 steps, half of which succeed where there is a success."""
    end, wins = np.arange(50) == 49, rng.random() < 0.5
    walk = 3 + np.cumsum(0.1 * rng.standard_normal(50))
    distance = -np.linspace(5, 0, 50) + 0.3 * rng.standard_normal(50)
    rewards, terminates = {
        "sparse success": (1.0 * end * wins, wins),
        "success after costs": (-1.0 + end * wins, wins),
        "success with bonus": (distance + 10 * end * wins, wins),
        "long success": (1.0 * (np.arange(50) > 44) * wins, wins),
        "fall": (walk - 1.0 * end, True),
        "fast fall": (walk + np.maximum(np.arange(50) - 40, 0) / 3, True),
        "constant": (np.ones(50), True),
        "failure": (distance - 10 * end, True),
    }[kind]
    return A.Episode(np.zeros((51, 1)), np.zeros((50, 1)), rewards, end & terminates)


@pytest.mark.parametrize("kind", ["sparse success", "success after costs", "success with bonus",
                         "long success", "fall", "fast fall", "constant", "failure"])  # fmt: skip
def test_terminals_that_are_successes_are_told_from_falls(kind, capsys):
    rng = np.random.default_rng(0)
    data = [make_episode(kind, rng) for _ in range(40)]
    assert A.choose_penalty(A.Args(), data, "Any-v0") == 100.0
    out = capsys.readouterr().out
    assert f"transitions: {sum(e.terminations.sum() for e in data)}, each costs 100 " in out
    assert ("--terminal-penalty 0 is likely right" in out) == ("success" in kind)
    for args, env in ((A.Args(terminal_penalty=0.0), "Any-v0"), (A.Args(), "PointMaze_UMaze-v3")):
        assert A.choose_penalty(args, data, env) == 0.0
        assert "likely right" not in capsys.readouterr().out


def test_hoppers_falls_are_no_successes(episodes, capsys):
    for bonus in (0.0, 1.0):  # v5 pays a fall nothing for health; v4 pays 1, as for any other step
        data = [e._replace(rewards=e.rewards + bonus * e.terminations) for e in episodes]
        A.choose_penalty(A.Args(), data, "Hopper-v4")
        assert "likely right" not in capsys.readouterr().out


def test_a_dataset_of_successes_without_an_environment(tmp_path):
    """Stages A and B need none. H = 1 (Table 10) is a transition model."""
    rng, box, goals = np.random.default_rng(0), gym.spaces.Box(-1, 1, (2,), np.float32), []
    for wins in [True, False] * 4:
        end = (np.arange(20) == 19) & wins
        s, a = rng.standard_normal((21, 3)), rng.uniform(-1, 1, (20, 2)).astype(np.float32)
        goals.append((s, a, end.astype(float), end))
    write_minari(tmp_path / "goals", goals, gym.spaces.Box(-9, 9, (3,), np.float64), box)
    flags = [*TINY_A, "--env", "goals", "--horizon", 1]
    out = run(ROOT / "gta_diffusion.py", *flags, cwd=tmp_path).stdout
    assert "terminal transitions: 4, each costs 100 (--terminal-penalty)" in out
    assert "--terminal-penalty 0 is likely right" in out
    checkpoint = torch.load(tmp_path / "diffusion.pt", weights_only=True)
    assert (checkpoint["env_id"], checkpoint["args"]["terminal_penalty"]) == ("", 100.0)
    run(ROOT / "gta_augment.py", "--num-transitions", 9, "--num-steps", 8, cwd=tmp_path)
    with np.load(tmp_path / "buffer.npz", allow_pickle=False) as file:
        assert file["observations"].shape == (9, 2, 3)
    flags += ["--terminal-penalty", 0]
    error = run(ROOT / "gta_diffusion.py", *flags, cwd=tmp_path, ok=False).stderr
    assert "diffusion.pt was made with terminal_penalty 100.0; choose another --out" in error


def test_network_has_the_papers_size():
    for dims, millions in ((24, 29.6), (15, 18.7)):
        net = A.MixerUNet(32, dims, 16)
        assert sum(p.numel() for p in net.parameters()) == pytest.approx(millions * 1e6, rel=2e-3)


@pytest.mark.parametrize("num_rows", [2, 8, 32])
def test_network_is_the_plain_one(num_rows):
    torch.manual_seed(0)
    net = A.MixerUNet(num_rows, 15, 8)
    for p in net.parameters():  # norms start as identities: make every weight count
        p.data += 0.1 * torch.randn_like(p)
    x, c_noise, y = torch.randn(4, num_rows, 15), torch.randn(4), torch.randn(4)
    keep = torch.tensor([1.0, 0.0, 1.0, 0.0])
    out, close = net(x, c_noise, y, keep), {"atol": 2e-4, "rtol": 2e-4}
    assert out.shape == x.shape
    torch.testing.assert_close(out[::2], plain_unet(net, x, c_noise, y)[::2], **close)
    torch.testing.assert_close(out[1::2], plain_unet(net, x, c_noise, None)[1::2], **close)
    assert (out[::2] - net(x, c_noise, y, torch.zeros(4))[::2]).abs().max() > 1e-3


def test_preconditioning_and_loss_are_edms():
    torch.manual_seed(0)
    denoiser, d = A.Denoiser(7, 11, 3, 8, sigma_data=0.5), 0.5
    x, y, noise = torch.randn(4, 8, 15), torch.randn(4), torch.randn(4, 8, 15)
    x[:, -1, 11:] = noise[:, -1, 11:] = 0
    keep, sigma = torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([0.01, 0.5, 2.0, 60.0])
    loss = 0.0
    for i, s in enumerate(sigma.tolist()):
        c_skip, c_out = d**2 / (s**2 + d**2), s * d / math.sqrt(d**2 + s**2)
        c_in, c_noise = 1 / math.sqrt(s**2 + d**2), math.log(s) / 4
        own, noised = slice(i, i + 1), x[i] + s * noise[i]
        F = denoiser.net(c_in * noised[None], torch.tensor([c_noise]), y[own], keep[own])
        expected = c_skip * noised + c_out * F[0]
        expected[-1, 11:] = 0
        D = denoiser(noised[None], sigma[own], y[own], keep[own])[0]
        torch.testing.assert_close(D, expected, atol=1e-5, rtol=1e-5)
        loss += (s**2 + d**2) / (s * d) ** 2 * ((D - x[i]) ** 2).mean().item() / 4
    x[:, -1, 11:] = noise[:, -1, 11:] = 1e3  # empty cells
    assert A.edm_loss(denoiser, x, y, keep, sigma, noise).item() == pytest.approx(loss, rel=1e-5)


def test_bf16_is_of_the_network_alone():
    torch.manual_seed(0)
    D, half = (A.Denoiser(7, 11, 3, 8, bf16=bf16) for bf16 in (False, True))
    half.load_state_dict(D.state_dict())
    x, one = torch.randn(16, 8, 15), torch.ones(16)
    full, half = D(x, one, one, one), half(x, one, one, one)
    assert 1e-4 < (half - full).std() / full.std() < 0.05 and half.dtype == torch.float32


def test_the_learning_rate_is_that_of_cosine_annealing_with_warm_restarts():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=7)
    for step in range(1, 30):
        assert A.warm_restarts(step, 7) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


def test_nothing_is_left_of_the_initial_weights_in_the_average():
    """It is the mean of the later ones, in proportion to k^18 - (k - 1)^18 at the k-th update."""
    model, ema = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    ema.weight.data.fill_(1e30)  # any share of it would show
    later = torch.randn(40, dtype=torch.float64)
    for k, weight in enumerate(later, start=1):
        model.weight.data.fill_(weight)
        A.update_ema(ema, model, 10 * k)
        share = torch.arange(k + 1, dtype=torch.float64).pow(18).diff() / float(k) ** 18
        assert share.sum().item() == pytest.approx(1)
        assert ema.weight.item() == pytest.approx((share @ later[:k]).item(), abs=1e-5)
    model.weight.data.fill_(0.0)
    before = ema.weight.item()
    A.update_ema(ema, model, 1_000_000)
    assert ema.weight.item() == pytest.approx(0.995 * before)


def test_main_trains_on_the_batches_of_the_paper(tmp_path, monkeypatch, episodes):
    """What main hands to the loss, what becomes of the loss, what is written."""
    seen = []

    def recorded_loss(denoiser, *batch):
        loss = edm_loss(denoiser, *batch)
        seen.append((*batch, loss.detach()))
        return loss

    edm_loss = A.edm_loss
    monkeypatch.setattr(A, "edm_loss", recorded_loss)
    checkpoint = train(tmp_path, batch_size=24, train_steps=49, lr=3e-3)
    x, y, keep, sigma, noise, loss = (torch.stack(field) for field in zip(*seen))
    # single batches jump where a window holds a penalised reward: medians
    assert loss[-10:].median() < 0.8 * loss[:5].median()
    assert keep.mean().item() == pytest.approx(0.75, abs=0.04) and keep.unique().numel() == 2
    assert sigma.log().mean().item() == pytest.approx(-1.2, abs=0.1)
    assert sigma.log().std().item() == pytest.approx(1.2, rel=0.05)
    y_mean = 0.01 * A.make_windows(episodes, 7, 0.99, 100.0)["y"].mean()
    assert y.mean().item() == pytest.approx(y_mean, rel=0.03)
    for field in (noise, x[..., :11]):
        assert field.mean().abs() < 0.05 and field.std().item() == pytest.approx(1, abs=0.05)

    keys = "format format_version args versions env dataset_ids env_id obs_dim act_dim horizon"
    assert set(checkpoint) == {*keys.split(), "normalizer", "model", "ema", "optimizer", "step"}
    table = [np.column_stack([e.observations[:-1], e.actions, e.rewards]) for e in episodes]
    table, normalizer = np.concatenate(table), checkpoint["normalizer"]  # without the penalty
    np.testing.assert_allclose(normalizer["mean"], table.mean(0), atol=1e-5)
    np.testing.assert_allclose(normalizer["std"], table.std(0, ddof=1) + 1e-5, atol=1e-5)
    lr = checkpoint["optimizer"]["param_groups"][0]["lr"].item()
    assert lr == pytest.approx(3e-3 * A.warm_restarts(49, 4))


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    """kill -9 after a checkpoint, then the same command, then once more."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    command, path = command_of(save_every=6), tmp_path / "killed" / "diffusion.pt"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=path.parent, env=env, stderr=subprocess.DEVNULL)
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert torch.load(path, weights_only=True)["step"] in (6, 12, 18)
    for folder in (tmp_path / "killed", tmp_path / "whole"):
        subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True)
    names = ("whole", "killed")
    assert_same(*(torch.load(tmp_path / x / "diffusion.pt", weights_only=True) for x in names))


def test_a_file_is_never_replaced_by_something_else(tmp_path, capsys, monkeypatch):
    path = tmp_path / "diffusion.pt"
    checkpoint = train(tmp_path, train_steps=2)
    assert_same({**checkpoint, "ema": checkpoint["model"]}, checkpoint)  # up to step 10
    before = path.read_bytes()
    train(tmp_path, train_steps=2, track=True)  # finished: wandb is not even asked
    assert "finished, 2 steps" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="made with lr 0.0003, precision fp32; choose another"):
        train(tmp_path, train_steps=2, lr=0.1, precision="bf16")
    assert path.read_bytes() == before
    path.write_bytes(before[: len(before) // 2])
    with pytest.raises(SystemExit, match="cannot be read; remove it to start anew"):
        train(tmp_path, train_steps=2)

    path.unlink()
    update = A.update
    monkeypatch.setattr(A, "update", lambda *x: (path.write_text("other"), update(*x))[1])
    with pytest.raises(SystemExit, match="is now of another run; choose another --out"):
        train(tmp_path, train_steps=2)
    assert path.read_text() == "other"


@pytest.mark.parametrize("changes, message", [
    ({"lr": 1e30}, r"step 3: loss (nan|inf); .*try a lower --lr"),
    ({"horizon": 12}, "--horizon must be 1, 7, 15"), ({"dim": 12}, "--dim a multiple of 8"),
])  # fmt: skip
def test_what_cannot_be_trained_is_one_line(tmp_path, changes, message):
    with pytest.raises(SystemExit, match=message):
        train(tmp_path, **{"train_steps": 3, **changes})
    assert not (tmp_path / "diffusion.pt").exists()


def test_two_processes_of_torchrun_train_as_one(tmp_path, monkeypatch):
    """To the bit, where the one process adds up the same halves."""
    loss = A.edm_loss

    def mean_of_halves(denoiser, *batch):
        return sum(loss(denoiser, *(field[i::2] for field in batch)) for i in range(2)) / 2

    monkeypatch.setattr(A, "edm_loss", mean_of_halves)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun does
    one = train(tmp_path / "one", train_steps=6, save_every=4)
    torch.set_num_threads(threads)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node=2", *command_of(train_steps=6, save_every=4)[1:]]
    options = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "capture_output": True, "text": True}
    out = subprocess.run(command, cwd=tmp_path, check=True, **options).stdout
    assert out.count("windows: ") == out.count("wrote ") == 1
    assert_same(one, torch.load(tmp_path / "diffusion.pt", weights_only=True))
    assert {path.name for path in tmp_path.iterdir()} == {"one", "diffusion.pt"}
