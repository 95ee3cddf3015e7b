"""Stage A: windows, network, EDM training, the average of the weights, checkpoints."""

import math
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import HOPPER, ROOT, run, write_minari
from plain_unet import plain_unet

import gta_diffusion as A

SMALL = {"env": HOPPER, "horizon": 7, "dim": 8, "batch_size": 8, "train_steps": 14, "save_every": 4}
COMMAND = [ROOT / "gta_diffusion.py", "--device=cpu"]
COMMAND += [f"--{key.replace('_', '-')}={x}" for key, x in SMALL.items()]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def episodes():
    return A.load_episodes(A.open_datasets(HOPPER))


def train(folder, **changes):
    """Runs stage A here, on one thread: more add up in another order. Returns its checkpoint."""
    out = folder / "diffusion.pt"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    A.main(A.Args(**{**SMALL, "device": "cpu", "out": str(out), **changes}))
    torch.set_num_threads(threads)
    return torch.load(out, weights_only=True)


def assert_same(*checkpoints):
    one, other = ([c[key] for key in ("model", "ema", "step")] for c in checkpoints)
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("horizon, penalty", [(1, 0.0), (7, 100.0), (31, 100.0)])
def test_windows_match_a_brute_force_slice(episodes, horizon, penalty):
    few = []
    for e, n in zip(episodes, [31, 12, 45, 30, 7]):  # the last n transitions, with their terminals
        few.append(A.Episode(e.observations[-n - 1 :], *(x[-n:] for x in e[1:])))
    windows = A.make_windows(few, horizon, gamma=0.9, penalty=penalty)
    places = [(i, t) for i, e in enumerate(few) for t in range(len(e.rewards) - horizon + 1)]
    assert len(places) == len(windows.start) == len(windows.y)
    for w, (i, t) in enumerate(places):
        e = few[i]
        T = len(e.rewards)
        steps = windows.start[w] + np.arange(horizon)
        rewards = e.rewards - penalty * e.terminals
        x = windows.rows[steps]
        np.testing.assert_allclose(x[:, :11], e.observations[t : t + horizon], rtol=1e-6)
        np.testing.assert_allclose(x[:, 11:-1], e.actions[t : t + horizon], rtol=1e-6)
        np.testing.assert_allclose(x[:, -1], rewards[t : t + horizon], rtol=1e-6)
        last = windows.rows[steps[-1] + 1]
        np.testing.assert_allclose(last[:11], e.observations[t + horizon], rtol=1e-6)
        y = sum(0.9 ** (k - t) * rewards[k] for k in range(t, T))
        assert windows.y[w] == pytest.approx(y, rel=1e-5)
        assert windows.return_to_go[w] == pytest.approx(e.rewards[t:].sum(), rel=1e-5)
        assert (windows.episode[w], windows.timestep[w]) == (i, t)
        assert (windows.terminals[steps] == e.terminals[t : t + horizon]).all()


def goal_episodes(num):
    """Episodes of 50 steps whose last one is a success in every second of them."""
    rng = np.random.default_rng(0)
    end = np.arange(50) == 49
    episodes = []
    for i in range(num):
        wins = end & (i % 2 == 0)
        episodes.append(A.Episode(rng.random((51, 1)), rng.random((50, 1)), 1.0 * wins, wins))
    return episodes


def test_what_terminals_are_paid_and_cost_is_said():
    episodes = goal_episodes(6)
    text = A.describe_terminals(episodes, 100.0)
    assert text.startswith(
        "terminal transitions: 3, mean reward 1 (of the others 0), each costs 100;"
    )
    assert text.endswith("give --terminal-penalty 0")
    assert A.describe_terminals(episodes[1:2], 100.0) == "terminal transitions: none"
    only = A.Episode(*(x[-1:] for x in episodes[0]))
    assert "2, mean reward 1, each costs 0" in A.describe_terminals([only, only], 0.0)


@pytest.mark.parametrize("name, penalty", [("Hopper-v5", 100), ("antmaze-umaze-v2", 0)])
def test_terminals_cost_nothing_in_mazes(name, penalty):
    args = A.Args()
    dataset = SimpleNamespace(id="x-v0", env_spec=SimpleNamespace(id=name))
    A.fill_in_by_domain(args, A.find_domain(dataset))
    assert args.terminal_penalty == penalty


def test_a_dataset_of_successes_without_an_environment(tmp_path, capsys):
    """Stages A and B need none. H = 1 (Table 10) is a transition model."""
    box = gym.spaces.Box(-1, 1, (1,))
    write_minari(tmp_path / "goals", goal_episodes(8), box, box)
    checkpoint = train(tmp_path, env=str(tmp_path / "goals"), horizon=1, train_steps=2)
    assert (checkpoint["env_id"], checkpoint["args"]["terminal_penalty"]) == ("", 100.0)
    assert "terminal transitions: 4, mean reward 1 " in capsys.readouterr().out
    run(ROOT / "gta_augment.py", "--num-transitions", 9, "--num-steps", 8, cwd=tmp_path)
    with np.load(tmp_path / "buffer.npz", allow_pickle=False) as file:
        assert file["observations"].shape == (9, 2, 1)


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
    x = torch.randn(4, num_rows, 15)
    c_noise, y = torch.randn(2, 4)
    keep = torch.tensor([1.0, 0.0, 1.0, 0.0])
    out = net(x, c_noise, y, keep)
    close = {"atol": 2e-4, "rtol": 2e-4}
    torch.testing.assert_close(out[::2], plain_unet(net, x, c_noise, y)[::2], **close)
    torch.testing.assert_close(out[1::2], plain_unet(net, x, c_noise, None)[1::2], **close)
    assert (out[::2] - net(x, c_noise, y, torch.zeros(4))[::2]).abs().max() > 1e-3


def test_preconditioning_and_loss_are_edms():
    torch.manual_seed(0)
    d = 0.5
    denoiser = A.Denoiser(7, 11, 3, 8, sigma_data=d)
    x, noise = torch.randn(2, 4, 8, 15)
    x[:, -1, 11:] = noise[:, -1, 11:] = 0
    y = torch.randn(4)
    keep = torch.tensor([1.0, 0.0, 1.0, 1.0])
    sigma = torch.tensor([0.01, 0.5, 2.0, 60.0])
    loss = 0.0
    for i, s in enumerate(sigma.tolist()):
        c_skip = d**2 / (s**2 + d**2)
        c_out = s * d / math.sqrt(d**2 + s**2)
        c_in = 1 / math.sqrt(s**2 + d**2)
        c_noise = math.log(s) / 4
        own = slice(i, i + 1)
        noised = x[i] + s * noise[i]
        F = denoiser.net(c_in * noised[None], torch.tensor([c_noise]), y[own], keep[own])
        expected = c_skip * noised + c_out * F[0]
        expected[-1, 11:] = 0
        D = denoiser(noised[None], sigma[own], y[own], keep[own])[0]
        torch.testing.assert_close(D, expected, atol=1e-5, rtol=1e-5)
        loss += (s**2 + d**2) / (s * d) ** 2 * ((D - x[i]) ** 2).mean().item() / 4
    x[:, -1, 11:] = noise[:, -1, 11:] = 1e3  # empty cells
    assert A.edm_loss(denoiser, x, y, keep, sigma, noise).item() == pytest.approx(loss, rel=1e-5)


def test_the_learning_rate_is_that_of_cosine_annealing_with_warm_restarts():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=7)
    for step in range(1, 30):
        assert A.warm_restarts(step, 7) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


def test_nothing_is_left_of_the_initial_weights_in_the_average():
    """It is the mean of the later ones, in proportion to k^18 - (k - 1)^18 at the k-th update."""
    model = torch.nn.Linear(1, 1, bias=False)
    ema = torch.nn.Linear(1, 1, bias=False)
    ema.weight.data.fill_(1e30)  # any share of it would show
    later = torch.randn(40, dtype=torch.float64)
    for k, weight in enumerate(later, start=1):
        model.weight.data.fill_(weight)
        A.update_ema(ema, model, 10 * k)
        share = torch.arange(k + 1, dtype=torch.float64).pow(18).diff() / float(k) ** 18
        assert ema.weight.item() == pytest.approx((share @ later[:k]).item(), abs=1e-5)
    model.weight.data.fill_(0.0)
    before = ema.weight.item()
    A.update_ema(ema, model, 1_000_000)
    assert ema.weight.item() == pytest.approx(0.995 * before)


def test_main_trains_on_the_batches_of_the_paper(tmp_path, monkeypatch, episodes):
    """What main hands to the loss, what becomes of the loss, what is written."""
    seen = []

    def recorded_loss(denoiser, *batch, edm_loss=A.edm_loss):
        loss = edm_loss(denoiser, *batch)
        seen.append((*batch, loss.detach()))
        return loss

    monkeypatch.setattr(A, "edm_loss", recorded_loss)
    checkpoint = train(tmp_path, batch_size=24, train_steps=49, save_every=49, lr=3e-3)
    x, y, keep, sigma, noise, loss = (torch.stack(field) for field in zip(*seen))
    # single batches jump where a window holds a penalised reward: medians
    assert loss[-10:].median() < 0.8 * loss[:5].median()
    assert keep.mean().item() == pytest.approx(0.75, abs=0.04) and keep.unique().numel() == 2
    assert sigma.log().mean().item() == pytest.approx(-1.2, abs=0.1)
    assert sigma.log().std().item() == pytest.approx(1.2, rel=0.05)
    y_mean = 0.01 * A.make_windows(episodes, 7, 0.99, 100.0).y.mean()
    assert y.mean().item() == pytest.approx(y_mean, rel=0.03)
    for field in (noise, x[..., :11]):
        assert field.mean().abs() < 0.05 and field.std().item() == pytest.approx(1, abs=0.05)

    keys = "format format_version args versions env dataset_ids dataset_crc env_id obs_dim act_dim"
    keys += " horizon normalizer model ema optimizer step"
    assert set(checkpoint) == set(keys.split())
    table = [np.column_stack([e.observations[:-1], e.actions, e.rewards]) for e in episodes]
    table = np.concatenate(table)  # without the penalty
    normalizer = checkpoint["normalizer"]
    np.testing.assert_allclose(normalizer["mean"], table.mean(0), atol=1e-5)
    np.testing.assert_allclose(normalizer["std"], table.std(0, ddof=1) + 1e-5, atol=1e-5)
    lr = checkpoint["optimizer"]["param_groups"][0]["lr"].item()
    assert lr == pytest.approx(3e-3 * A.warm_restarts(49, 4))


def test_what_is_constant_but_in_last_states_or_for_the_penalty_stays_in_range():
    """A flag of success in the last state, a reward of 1, and a state that never changes."""
    episodes = []
    for T in (5, 8):
        s = np.random.default_rng(T).normal(size=(T + 1, 3))
        s[:, 1] = np.arange(T + 1) == T
        s[:, 2] = 0.1
        episodes.append(A.Episode(s, s[:-1, :1], np.ones(T), np.arange(T) == T - 1))
    normalizer = A.fit_normalizer(episodes)
    rows = A.make_windows(episodes, 3, 0.99, 100.0).rows
    rows = (rows - normalizer.mean.numpy()) / normalizer.std.numpy()
    assert np.abs(rows[:, :3]).max() < 10 and rows[:, 4].min() == pytest.approx(-100, rel=1e-4)
    assert normalizer.std[2].item() == pytest.approx(1e-5)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    """kill -9 after a checkpoint, then the same flags once more."""
    path = tmp_path / "diffusion.pt"
    process = subprocess.Popen([sys.executable, *COMMAND], cwd=tmp_path, env=ONE_THREAD)
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()  # -9
    process.wait()
    assert torch.load(path, weights_only=True)["step"] in (4, 8, 12)
    assert_same(train(tmp_path), train(tmp_path / "whole"))


def test_a_file_is_never_replaced_by_something_else(tmp_path, capsys, monkeypatch):
    path = tmp_path / "diffusion.pt"
    train(tmp_path, train_steps=2)
    before = path.read_bytes()
    train(tmp_path, train_steps=2, track=True)  # finished: wandb is not even asked
    assert "finished, 2 steps" in capsys.readouterr().out
    new = str(tmp_path / "new.pt")
    for changes, message in (
        ({"lr": 0.1}, "made with lr 0.0003; choose another --out"),
        ({"precision": "bf16"}, "made with precision fp32; choose another --out"),
        ({"train_steps": 3}, "made with train_steps 2"),  # the cosine depends on it
        ({"env": str(ROOT / "data/halfcheetah-medium-sample")}, "made with env_id Hopper-v5"),
        ({"out": new, "lr": 1e30}, "step 2: loss (nan|inf); .* a lower --lr"),
        ({"out": new, "horizon": 12}, "--horizon 12: must be 1, 7, 15"),
        ({"out": new, "condition_dropout": 1.5}, "--condition-dropout: must be at most 1"),
        ({"out": new, "return_scale": 0.0}, "--return-scale: must be greater than 0"),
        ({"out": new, "lr": math.nan}, "--lr is not a number"),
        ({"out": new, "env": ""}, "--env is empty"),
        ({"out": str(tmp_path)}, "no diffusion.pt that can be read"),
    ):
        with pytest.raises(SystemExit, match=message):
            train(tmp_path, **{"train_steps": 2, **changes})
    assert path.read_bytes() == before and [x.name for x in tmp_path.iterdir()] == [path.name]

    path.unlink()
    update = A.update

    def replace_and_update(*inputs):
        path.write_text("other")
        return update(*inputs)

    monkeypatch.setattr(A, "update", replace_and_update)
    with pytest.raises(SystemExit, match="no diffusion.pt that can be read; choose another --out"):
        train(tmp_path, train_steps=2)
    assert path.read_text() == "other"


def test_the_place_is_tried_before_the_work(monkeypatch):
    monkeypatch.setattr(A, "make_windows", lambda *_: pytest.fail("too late"))
    with pytest.raises(SystemExit, match="/proc/a.pt cannot be written"):
        A.main(A.Args(**{**SMALL, "device": "cpu", "out": "/proc/a.pt"}))


def test_another_dataset_of_the_same_name_is_another_run(tmp_path, episodes):
    box = gym.spaces.Box(-1, 1, (3,))
    states = gym.spaces.Box(-np.inf, np.inf, (11,), np.float64)
    few = episodes[:3]
    folder = write_minari(tmp_path / "x", few, states, box, gym.spec("Hopper-v5"))
    train(tmp_path, env=str(folder), train_steps=2)
    folder = folder.rename(tmp_path / "moved")
    train(tmp_path, env=str(folder), train_steps=2)  # the same data elsewhere: finished
    few[0].rewards[0] += 1
    write_minari(tmp_path / "x", few, states, box, gym.spec("Hopper-v5"))
    with pytest.raises(SystemExit, match="made with dataset_crc"):
        train(tmp_path, env=str(tmp_path / "x"), train_steps=2)


def test_what_triton_needs_is_named(monkeypatch):
    A.require_compiler()
    monkeypatch.setattr(A.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(SystemExit, match="apt install gcc python3-dev.*TORCH_COMPILE_DISABLE=1"):
        A.require_compiler()
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    A.require_compiler()


def test_two_processes_of_torchrun_train_as_one(tmp_path, monkeypatch):
    """To the bit, where the one process adds up the same halves."""

    def mean_of_halves(denoiser, *batch, loss=A.edm_loss):
        return sum(loss(denoiser, *(field[i::2] for field in batch)) for i in range(2)) / 2

    monkeypatch.setattr(A, "edm_loss", mean_of_halves)
    one = train(tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, *COMMAND]
    result = subprocess.run(command, cwd=tmp_path, env=ONE_THREAD, capture_output=True, check=True)
    assert result.stdout.count(b"windows: ") == result.stdout.count(b"wrote ") == 1
    assert b"strides" not in result.stderr  # of the gradients, a warning of DDP's
    assert_same(one, torch.load(tmp_path / "diffusion.pt", weights_only=True))
    assert {path.name for path in tmp_path.iterdir()} == {"one", "diffusion.pt"}
