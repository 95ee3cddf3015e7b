"""Stage A: windows, network, EDM training, checkpoints."""

import math
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import SAMPLE
from plain_unet import plain_unet

import gta_diffusion as A


def cut(dataset, lengths, env_id="Hopper-v5"):
    """The last lengths[i] transitions of episode i, so that its terminal is kept."""
    episodes = [
        A.Episode(e.observations[-n - 1 :], e.actions[-n:], e.rewards[-n:], e.terminals[-n:])
        for e, n in zip(dataset.episodes, lengths)
    ]
    return dataset._replace(episodes=episodes, env_id=env_id)


@pytest.mark.parametrize("env_id", ["Hopper-v5", "PointMaze_UMaze-v3"])
@pytest.mark.parametrize("horizon", [1, 7, 31])
def test_windows_match_a_brute_force_slice(dataset, env_id, horizon, capsys):
    few = cut(dataset, [31, 12, 45, 30, 7], env_id)
    terminated = [e.terminals.any() for e in few.episodes]
    assert any(terminated)
    windows = A.make_windows(few, horizon, gamma=0.9, terminal_penalty=100.0)
    rows = (torch.tensor(windows.rows) - torch.tensor(windows.mean)) / torch.tensor(windows.std)
    x = A.gather_windows(rows, torch.tensor(windows.start), horizon, 11).numpy()

    s, a, r = (
        np.concatenate([getattr(e, k) if k != "observations" else e.observations[:-1] for e in
                        few.episodes])
        for k in ("observations", "actions", "rewards")
    )  # fmt: skip
    moments = np.column_stack([s, a, r])
    mean, std = moments.mean(0), moments.std(0, ddof=1) + 1e-5
    w, short = 0, 0
    for i, e in enumerate(few.episodes):
        T = len(e.rewards)
        short += T < horizon
        penalty = 0 if "Maze" in env_id else 100
        for t in range(T - horizon + 1):
            expected = np.zeros((horizon + 1, 15))
            for h in range(horizon + 1):
                expected[h, :11] = (e.observations[t + h] - mean[:11]) / std[:11]
                if h < horizon:
                    reward = e.rewards[t + h] - penalty * e.terminals[t + h]
                    cells = np.append(e.actions[t + h], reward)
                    expected[h, 11:] = (cells - mean[11:]) / std[11:]
            np.testing.assert_allclose(x[w], expected, atol=1e-4)
            y = sum(0.9 ** (k - t) * (e.rewards[k] - penalty * e.terminals[k]) for k in range(t, T))
            assert windows.y[w] == pytest.approx(y, rel=1e-5)
            assert windows.return_to_go[w] == pytest.approx(e.rewards[t:].sum(), rel=1e-5)
            assert (windows.episode[w], windows.timestep[w]) == (i, t)
            steps = windows.start[w] + np.arange(horizon)
            assert (windows.terminals[steps] == e.terminals[t : t + horizon]).all()
            w += 1
    assert w == len(windows.start)
    assert f"{short} episodes left out" in capsys.readouterr().out


def test_horizon_longer_than_every_episode_is_an_error(dataset):
    with pytest.raises(SystemExit, match="--horizon 63: no episode"):
        A.make_windows(cut(dataset, [31, 12]), 63, 0.99, 100.0)


@pytest.mark.parametrize("dims, millions", [(24, 29.6), (15, 18.7)])
def test_network_has_the_papers_size(dims, millions):
    net = A.MixerUNet(32, dims, 16)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("num_rows", [2, 16, 32, 128])
def test_network_is_the_plain_one(num_rows):
    torch.manual_seed(0)
    net = A.MixerUNet(num_rows, 15, 8)
    for p in net.parameters():  # norms start as identities: make every weight count
        p.data += 0.1 * torch.randn_like(p)
    x, c_noise, y = torch.randn(3, num_rows, 15), torch.randn(3), torch.randn(3)
    out = net(x, c_noise, y, torch.ones(3))
    assert out.shape == x.shape
    torch.testing.assert_close(out, plain_unet(net, x, c_noise, y), atol=2e-4, rtol=2e-4)


def test_dropped_condition_is_no_condition():
    torch.manual_seed(0)
    net = A.MixerUNet(8, 15, 8)
    x, c_noise, y = torch.randn(4, 8, 15), torch.randn(4), torch.randn(4)
    keep = torch.tensor([1.0, 0.0, 1.0, 0.0])
    out, close = net(x, c_noise, y, keep), {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(out[1::2], plain_unet(net, x, c_noise, None)[1::2], **close)
    torch.testing.assert_close(out[::2], plain_unet(net, x, c_noise, y)[::2], **close)
    assert (out[::2] - net(x, c_noise, y, torch.zeros(4))[::2]).abs().max() > 1e-3


def test_preconditioning_is_edms():
    torch.manual_seed(0)
    denoiser = A.Denoiser(7, 11, 3, 8, sigma_data=0.5)
    x, y, keep = torch.randn(3, 8, 15), torch.randn(3), torch.ones(3)
    x[:, -1, 11:] = 0
    sigma = torch.tensor([0.01, 1.0, 60.0])
    D = denoiser(x, sigma, y, keep)
    for i, s in enumerate(sigma.tolist()):
        d = 0.5
        c_skip, c_out = d**2 / (s**2 + d**2), s * d / math.sqrt(d**2 + s**2)
        c_in, c_noise = 1 / math.sqrt(s**2 + d**2), math.log(s) / 4
        F = denoiser.net(c_in * x[i : i + 1], torch.tensor([c_noise]), y[i : i + 1], keep[:1])
        expected = c_skip * x[i] + c_out * F[0]
        expected[-1, 11:] = 0
        torch.testing.assert_close(D[i], expected, atol=1e-5, rtol=1e-5)


def test_empty_cells_neither_matter_nor_come_out():
    torch.manual_seed(0)
    denoiser = A.Denoiser(7, 11, 3, 8)
    x, sigma, y, keep = torch.randn(2, 8, 15), torch.ones(2), torch.ones(2), torch.ones(2)
    D = denoiser(x, sigma, y, keep)
    x[:, -1, 11:] = 1e3
    assert (denoiser(x, sigma, y, keep) == D).all()
    assert (D[:, -1, 11:] == 0).all()
    assert (D[:, :-1] != 0).all() and (D[:, -1, :11] != 0).all()


def test_loss_is_edms():
    torch.manual_seed(0)
    denoiser = A.Denoiser(7, 11, 3, 8, sigma_data=0.7)
    x, y, noise = torch.randn(4, 8, 15), torch.randn(4), torch.randn(4, 8, 15)
    x[:, -1, 11:] = 0
    keep, sigma = torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([0.02, 0.5, 2.0, 40.0])
    D = denoiser(x + sigma[:, None, None] * noise, sigma, y, keep)
    expected = 0.0
    for i, s in enumerate(sigma.tolist()):
        weight = (s**2 + 0.7**2) / (s * 0.7) ** 2
        expected += weight * ((D[i] - x[i]) ** 2).mean().item() / 4
    loss = A.edm_loss(denoiser, x, y, keep, sigma, noise).item()
    assert loss == pytest.approx(expected, rel=1e-5)


def test_ema_against_a_loop():
    model, ema = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    averaged = ema.weight.detach().clone()
    for step in (10, 20, 5000):
        A.update_ema(ema, model, step, decay=0.995)
        decay = min(0.995, 1 - step ** (-2 / 3))
        averaged = decay * averaged + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(ema.weight.detach(), averaged)


def test_training_halves_the_loss_on_the_batches_of_the_paper(tmp_path, monkeypatch, dataset):
    """main itself: what it hands to the loss, and what becomes of the loss."""
    seen = []

    def recorded_loss(denoiser, *batch):
        loss = edm_loss(denoiser, *batch)
        seen.append((*batch, loss.detach()))
        return loss

    edm_loss = A.edm_loss
    monkeypatch.setattr(A, "edm_loss", recorded_loss)
    args = make_args(tmp_path)
    args.batch_size, args.train_steps, args.horizon, args.lr = 32, 320, 15, 2e-3
    A.main(args)
    x, y, keep, sigma, noise, loss = (torch.stack(field) for field in zip(*seen))
    # single batches jump where a window holds a penalised reward: medians
    assert loss[-30:].median() < 0.5 * loss[:10].median()
    assert keep.mean().item() == pytest.approx(0.75, abs=0.03)
    assert set(keep.flatten().tolist()) == {0.0, 1.0}
    ln_sigma = sigma.log()
    assert ln_sigma.mean().item() == pytest.approx(-1.2, abs=0.06)
    assert ln_sigma.std().item() == pytest.approx(1.2, rel=0.05)
    assert noise.std().item() == pytest.approx(1, rel=0.01)
    windows = A.make_windows(dataset, 15, 0.99, 100.0)
    assert y.mean().item() == pytest.approx(0.01 * windows.y.mean(), rel=0.02)
    assert y.max() <= 0.01 * windows.y.max() * 1.0001
    states = x[:, :, :, :11]  # standardised
    assert states.mean().abs() < 0.05 and states.std().item() == pytest.approx(1, abs=0.05)
    assert (x[:, :, -1, 11:] == 0).all()


def make_args(folder, **changes):
    return A.Args(
        env=str(SAMPLE),
        out=folder / "diffusion.pt",
        horizon=7,
        dim=8,
        batch_size=8,
        train_steps=20,
        save_every=5,
        device="cpu",
        compile=False,
        **changes,
    )


def test_bf16_is_of_the_network_alone():
    """Its products lose digits; what D returns, the weights and their gradients are fp32."""
    torch.manual_seed(0)
    denoisers = [A.Denoiser(7, 11, 3, 8, bf16=bf16) for bf16 in (False, True)]
    denoisers[1].load_state_dict(denoisers[0].state_dict())
    x, noise = torch.randn(2, 32, 8, 15)
    sigma, y, keep = torch.rand(32) + 0.5, torch.randn(32), torch.ones(32)
    full, half = (
        denoiser(x + sigma[:, None, None] * noise, sigma, y, keep) for denoiser in denoisers
    )
    error = (half - full).square().mean().sqrt() / full.std()
    assert 1e-4 < error < 0.05 and half.dtype == torch.float32
    A.edm_loss(denoisers[1], x, y, keep, sigma, noise).backward()
    assert all(p.grad.dtype == p.dtype == torch.float32 for p in denoisers[1].parameters())


def test_a_run_keeps_its_precision(tmp_path):
    """It is recorded; a checkpoint from before the flag is fp32."""
    A.main(make_args(tmp_path, precision="bf16"))
    assert A.load_checkpoint(tmp_path / "diffusion.pt")["args"]["precision"] == "bf16"
    with pytest.raises(SystemExit, match="trained with --precision bf16, not fp32"):
        A.main(make_args(tmp_path, resume=True))
    A.main(make_args(tmp_path, overwrite=True))
    checkpoint = A.load_checkpoint(tmp_path / "diffusion.pt")
    assert checkpoint["args"].pop("precision") == "fp32"
    torch.save(checkpoint, tmp_path / "diffusion.pt")
    A.main(make_args(tmp_path))
    with pytest.raises(SystemExit, match="trained with --precision fp32, not bf16"):
        A.main(make_args(tmp_path, precision="bf16"))


def test_the_learning_rate_is_that_of_cosine_annealing_with_warm_restarts():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=7)
    for step in range(1, 30):
        assert A.warm_restarts(step, 7) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


def test_a_run_that_was_stopped_and_resumed_ends_bit_for_bit_the_same(tmp_path, monkeypatch):
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    A.main(make_args(tmp_path / "whole"))

    class SignalAtStep7(A.tqdm):
        def __iter__(self):
            for step in super().__iter__():
                if step == 7:
                    signal.raise_signal(signal.SIGTERM)
                yield step

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="interrupted at step 7"):
        patch.setattr(A, "tqdm", SignalAtStep7)
        A.main(make_args(tmp_path / "stopped"))
    at_7 = A.load_checkpoint(tmp_path / "stopped" / "diffusion.pt")
    assert at_7["step"] == 7
    # a cosine that restarts every tenth of the run, every 2 steps, has just done so
    assert at_7["optimizer"]["param_groups"][0]["lr"] == pytest.approx(3e-4)
    A.main(make_args(tmp_path / "stopped", resume=True))

    whole, stopped = (
        A.load_checkpoint(tmp_path / name / "diffusion.pt") for name in ("whole", "stopped")
    )
    assert whole["step"] == stopped["step"] == 20
    for part in ("model", "ema"):
        for key, tensor in whole[part].items():
            assert torch.equal(tensor, stopped[part][key]), (part, key)
    assert whole["optimizer"]["param_groups"] == stopped["optimizer"]["param_groups"]
    assert not list(tmp_path.rglob("*.tmp"))

    finished = (tmp_path / "stopped" / "diffusion.pt").read_bytes()
    A.main(make_args(tmp_path / "stopped", resume=True))
    assert (tmp_path / "stopped" / "diffusion.pt").read_bytes() == finished


def test_a_dataset_that_has_moved_is_the_same(tmp_path, capsys):
    A.main(make_args(tmp_path))
    shutil.copytree(SAMPLE, tmp_path / "moved")
    args = make_args(tmp_path)
    args.env = str(tmp_path / "moved")
    A.main(args)
    assert capsys.readouterr().out.endswith("is there already, made with these flags; "
                                            "--overwrite makes it anew\n")  # fmt: skip


def test_moments_of_single_precision_data_are_summed_in_double(dataset):
    """As in a D4RL file: a running sum of a million float32 numbers is off in the fourth digit."""
    rng = np.random.default_rng(0)
    T = 1_000_000
    observations = (1.2 + 0.05 * rng.standard_normal((T + 1, 1))).astype(np.float32)
    actions, rewards = np.zeros((T, 1), np.float32), np.zeros(T, np.float32)
    long = A.Episode(observations, actions, rewards, np.zeros(T, bool))
    windows = A.make_windows(dataset._replace(episodes=[long]), 1, 0.0, 100.0)
    assert windows.mean[0] == pytest.approx(observations[:-1].mean(dtype=np.float64), rel=1e-6)
    assert windows.std[0] == pytest.approx(0.05, rel=2e-3)


def test_resume_with_other_settings_is_an_error(tmp_path):
    A.main(make_args(tmp_path))
    before = (tmp_path / "diffusion.pt").read_bytes()
    with pytest.raises(SystemExit, match="trained with --lr 0.0003, not 0.1"):
        A.main(make_args(tmp_path, resume=True, lr=0.1))
    assert (tmp_path / "diffusion.pt").read_bytes() == before
