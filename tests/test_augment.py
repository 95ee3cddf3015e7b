"""Stage B: schedule, sampler, guidance, partial noising, choice of sources, buffer."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT

import gta_augment as B

GAMMA = min(80 / 128, math.sqrt(2) - 1)
SIGMAS = B.noise_schedule(128)


@pytest.fixture(scope="module")
def episodes():
    return B.load_episodes(B.open_datasets(B.DEFAULT_ENV))


@pytest.fixture
def augment(pipeline, tmp_path):
    """A function that runs stage B in this process and returns the arrays of its buffer."""

    def augment(name="buffer.npz", **changes):
        sizes = {"num_transitions": 7 * 60, "num_steps": 8, "mu": 0.5, "device": "cpu"}
        sizes |= {"checkpoint": str(pipeline / "diffusion.pt"), "out": str(tmp_path / name)}
        B.main(B.Args(**{**sizes, **changes}))
        with np.load(tmp_path / name, allow_pickle=False) as file:
            return dict(file)

    return augment


def test_schedule_is_edms():
    assert len(SIGMAS) == 129 and SIGMAS[-1] == 0.0 and SIGMAS[127] == pytest.approx(0.002)
    for i in (0, 37, 100):
        expected = (80 ** (1 / 7) + i / 127 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        assert SIGMAS[i] == pytest.approx(expected)


def algorithm_2(D, x, t, s_churn, s_min, s_max, s_noise):
    """EDM's sampler, as the paper writes it."""
    N = len(t) - 1
    for i in range(N):
        g = min(s_churn / N, math.sqrt(2) - 1) if s_min <= t[i] <= s_max else 0
        eps = s_noise * torch.randn_like(x)
        t_hat = t[i] + g * t[i]
        x_hat = x + math.sqrt(t_hat**2 - t[i] ** 2) * eps
        d = (x_hat - D(x_hat, t_hat)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_prime = (x - D(x, t[i + 1])) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d / 2 + d_prime / 2)
    return x


def test_sampler_is_the_papers_algorithm():
    results, sigmas = [], B.noise_schedule(20)
    for sampler, flags in ((B.edm_sampler, (4 / 20,)), (algorithm_2, (4, 0.05, 50.0, 1.003))):
        torch.manual_seed(1)
        x = 80 * torch.randn(5, 4, 3)
        results.append(sampler(lambda x, sigma: torch.tanh(x / (1 + sigma)), x, sigmas, *flags))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("w, gamma", [(0.0, 0.0), (0.0, GAMMA), (2.0, GAMMA)])
def test_samples_are_gaussian_and_guidance_moves_the_mean_as_eq_4_says(w, gamma):
    """Of data N(m, s^2), m = m_0 + slope y given y and m_0 without, whose exact D is known."""
    torch.manual_seed(0)
    m_0, slope, y, s = -0.5, 0.8, 1.5, torch.tensor([0.3, 1.0, 2.0])

    def denoiser(x, sigma, y, keep):
        m, sigma = ((m_0 + slope * y * keep)[:, None, None], sigma[:, None, None])
        return (s**2 * x + sigma**2 * m) / (s**2 + sigma**2)

    x = SIGMAS[0] * torch.randn(20_000, 1, 3)
    denoise = partial(B.guided_denoiser, denoiser, y=torch.full((len(x),), y), w=w)
    x = B.edm_sampler(denoise, x, SIGMAS, gamma, s_noise=1.0)[:, 0]
    # without churn the start N(0, sigma_max^2) leaves a trace: the exact flow keeps quantiles
    m = torch.full((3,), (w + 1) * (m_0 + slope * y) - w * m_0)
    m -= m * s / torch.sqrt(s**2 + SIGMAS[0] ** 2) * (gamma == 0)
    torch.testing.assert_close(x.mean(0), m, atol=0.04, rtol=0)
    torch.testing.assert_close(x.std(0), s, atol=0, rtol=0.02)


@pytest.mark.parametrize("mu", [0.1, 0.25, 0.5, 0.75, 1.0])
def test_partial_noise_has_the_schedules_sigma(mu):
    torch.manual_seed(0)
    source = torch.full((4000, 4, 3), 7.0)
    x, left = B.partial_noise(source, SIGMAS, mu)
    k = int(128 * (1 - mu))
    assert left == SIGMAS[k:]
    added = x if mu == 1 else x - source
    assert added.std().item() == pytest.approx(SIGMAS[k], rel=0.02)
    assert added.mean().item() == pytest.approx(0, abs=0.03 * SIGMAS[k])


def test_inpainted_rewards_keep_the_right_noise_level():
    """E.6: at every evaluation of D the rewards are r + sigma n, and in the end they are r."""
    torch.manual_seed(0)
    r, seen, source = torch.randn(500, 7), [], torch.randn(500, 8, 3)
    source[:, :-1, -1] = r

    def denoise(x, sigma):
        seen.append((sigma, (x[:, :-1, -1] - r).std().item()))
        return 0.5 * x

    x, left = B.partial_noise(source, SIGMAS, 0.5)
    x = B.edm_sampler(partial(B.inpainting_denoiser, denoise, r), x, left, GAMMA, s_noise=1.0)
    torch.testing.assert_close(x[:, :-1, -1], r, atol=1e-5, rtol=0)
    assert len(seen) == 2 * 64 - 1
    assert all(noise == pytest.approx(sigma, rel=0.05) for sigma, noise in seen)


def eq_13(y, num_bins, u, q):
    """Every window's ratio to uniform sampling, without a cap."""
    width = (y.max() - y.min()) / num_bins
    ratio = np.zeros(len(y))
    for j in range(num_bins):
        low, high = y.min() + j * width, y.min() + (j + 1) * width
        is_in = (low <= y) & ((y < high) if j < num_bins - 1 else (y <= y.max()))
        if is_in.any():
            share = is_in.mean()
            v = share / (share + u) * math.exp(-abs(y.max() - (low + high) / 2) / q)
            ratio[is_in] = v / is_in.sum()
    return ratio * len(y) / ratio.sum()


@pytest.mark.parametrize("q", [0.001, 0.005, 0.05, 0.2, 1.0, 5.0, 100.0])
@pytest.mark.parametrize("kind", ["outliers", "two groups", "low tail"])
def test_reweighting_is_eq_13_and_draws_no_window_more_than_five_times_as_often(kind, q):
    rng = np.random.default_rng(0)
    y = {
        "outliers": np.concatenate([rng.normal(0, 0.2, 2000), [6.0, 6.1, 6.2]]),
        "two groups": np.concatenate([rng.normal(2, 0.3, 900), rng.normal(4, 0.1, 100)]),
        "low tail": 3.5 - rng.exponential(0.5, 2000),
    }[kind]
    ratio = B.reweighted_probabilities(y, 50, 0.001, q) * len(y)
    assert ratio.sum() == pytest.approx(len(y)) and ratio.min() >= 0
    assert ratio.max() <= 5 + 1e-9
    if q < 0.01:
        assert ratio.max() == pytest.approx(5)
    if q >= 0.05:  # by brute force: the scale at which the capped ratios have mean 1
        free = eq_13(y, 50, 0.001, q)
        low, high = 1e-9, 1e99
        for _ in range(400):
            middle = math.sqrt(low * high)
            is_less = np.minimum(middle * free, 5).mean() < 1
            low, high = (middle, high) if is_less else (low, middle)
        np.testing.assert_allclose(ratio, np.minimum(high * free, 5), rtol=1e-4)
    uncapped = B.reweighted_probabilities(y, 7, 0.001, q, max_ratio=1e99) * len(y)
    np.testing.assert_allclose(uncapped, eq_13(y, 7, 0.001, q), rtol=1e-6, atol=1e-12)


def test_success_weighting_draws_episodes_then_windows():
    episode = np.array([0] * 10 + [1] * 2 + [3] * 5)  # episode 2 is short
    p = B.success_probabilities(episode, np.array([0.0, 1.0, 5.0, -2.0]), c=10)
    by_episode = np.array([1 / 12 / 10] * 10 + [10 / 12 / 2] * 2 + [1 / 12 / 5] * 5)
    np.testing.assert_allclose(p, by_episode)


def test_sources_are_drawn_as_asked():
    y, episode = np.random.default_rng(1).random(10), np.repeat([0, 1, 2], [5, 3, 2])
    returns = np.array([0.0, 3.0, -1.0])

    def share(**changes):
        drawn = B.choose_sources(B.Args(**changes), y, episode, returns, 20_000)
        return np.bincount(drawn, minlength=10) / 20_000

    assert set(share()) == {0.1}  # equally often
    for changes in ({"source_top": 0.3}, {"source_min_return": 3.0}):  # a whole episode, rounded up
        np.testing.assert_allclose(share(**changes), (episode == 1) / 3, atol=1e-4)
    p = B.success_probabilities(episode, returns, 9.0)
    np.testing.assert_allclose(share(success_weight=9.0), p, atol=0.01)
    p = B.reweighted_probabilities(y, 4, 0.001, 0.5)
    np.testing.assert_allclose(share(reweight_bins=4, reweight_q=0.5), p, atol=0.01)
    with pytest.raises(SystemExit, match="no episode with H transitions is left"):
        share(source_min_return=4.0)


# --- buffer ---

BUFFER = {  # README: N subtrajectories of H = 7 transitions of Hopper
    "observations": ("float32", (40, 8, 11)),
    "actions": ("float32", (40, 7, 3)),
    "rewards": ("float32", (40, 7)),
    "terminals": ("bool", (40, 7)),
    "episode": ("int32", (40,)),
    "timestep": ("int32", (40,)),
    "return_to_go": ("float32", (40,)),
    "condition": ("float32", (40,)),
}


def test_buffer_has_the_documented_arrays(pipeline):
    with np.load(pipeline / "buffer.npz", allow_pickle=False) as file:
        metadata = json.loads(str(file["metadata"]))
        assert {key: (str(file[key].dtype), file[key].shape) for key in BUFFER} == BUFFER
        assert set(file.files) == {*BUFFER, "metadata"}
    expected = {"format": "gta-buffer", "format_version": 1, "method": "gta", "env_id": "Hopper-v5"}
    expected |= {"label": "gta(mu 0.5, alpha 1.3, num-transitions 280, num-steps 8, H 7)"}
    expected |= {"env": B.DEFAULT_ENV, "dataset_ids": ["hopper-medium-sample-v0"], "horizon": 7}
    expected |= {"mu": 0.5, "alpha": 1.3, "guidance": 2.0, "num_steps": 8, "seed": 0}
    assert metadata.items() >= expected.items()
    assert metadata["diffusion"].items() >= {"train_steps": 6, "step": 6, "dim": 8}.items()


def test_names_of_augmentations():
    args = B.Args(seed=3, device="cpu", batch_size=7, env="x")
    assert B.name_augmentation(args, 31) == "gta(mu 0.25, alpha 1.1)"
    args = B.Args(condition="none", mu=1.0, restore_terminal_reward=True, source_top=0.1)
    name = "gta(mu 1.0, condition none, source-top 0.1, restore-terminal-reward, H 1)"
    assert B.name_augmentation(args, 1) == name


def test_windows_match_their_sources(augment, episodes):
    """With a tiny mu the generated window is its source, row by row. The condition is eq. 8."""
    sizes = {"num_transitions": 7 * 200, "seed": 1, "num_steps": 128, "mu": 0.01, "alpha": 1.3}
    sizes |= {"guidance": 0.0, "batch_size": 99}  # three batches of 67, the last one filled up
    buffer = augment(**sizes)
    assert buffer["terminals"].any() and buffer["condition"].min() < 0  # else draw more
    for n in range(len(buffer["rewards"])):
        e, t = episodes[buffer["episode"][n]], buffer["timestep"][n]
        T, rewards = len(e.rewards), e.rewards - 100 * e.terminations
        assert (buffer["terminals"][n] == e.terminations[t : t + 7]).all()
        assert buffer["return_to_go"][n] == pytest.approx(e.rewards[t:].sum(), rel=1e-5)
        y = sum(0.99 ** (k - t) * rewards[k] for k in range(t, T))
        assert buffer["condition"][n] == pytest.approx(y + 0.3 * abs(y), rel=1e-4)
        np.testing.assert_allclose(buffer["observations"][n], e.observations[t : t + 8], atol=0.1)
        np.testing.assert_allclose(buffer["rewards"][n], rewards[t : t + 7], atol=0.1)
        np.testing.assert_allclose(buffer["actions"][n], e.actions[t : t + 7], atol=0.05)
    assert np.abs(buffer["actions"]).max() <= 1.0
    restored = augment("restored.npz", **sizes, restore_terminal_reward=True)["rewards"]
    np.testing.assert_allclose(restored - buffer["rewards"], 100.0 * buffer["terminals"], atol=1e-4)


@pytest.mark.parametrize("condition", ["amplified", "fixed", "none"])
def test_conditions_see_the_return_or_not(condition, augment, episodes, pipeline, monkeypatch):
    """What the averaged network is given at every evaluation: each source's amplified return, one
    return for all, with a second half of the batch without it, or none at all."""
    seen, forward = [], B.Denoiser.forward

    def spy(self, x, sigma, y, keep):
        seen.append((y, keep.tolist(), sigma[0].item(), self))
        return forward(self, x, sigma, y, keep)

    monkeypatch.setattr(B.Denoiser, "forward", spy)
    buffer = augment(alpha=1.3, condition=condition, batch_size=60)
    y, _, sigma, denoiser = seen[0]
    assert sigma == pytest.approx(B.noise_schedule(8)[4] * math.sqrt(2))
    weights = torch.load(pipeline / "diffusion.pt", weights_only=True)["ema"]
    assert all(torch.equal(p, weights[key]) for key, p in denoiser.state_dict().items())
    halves = [0.0] * 60 if condition == "none" else [1.0] * 60 + [0.0] * 60
    assert [keep for _, keep, *_ in seen] == [halves] * (2 * 4 - 1)  # Heun: twice a step but once
    if condition == "none":
        return
    np.testing.assert_allclose(buffer["condition"], 100 * y[:60].numpy(), rtol=1e-5)
    if condition == "fixed":
        expected = 1.3 * B.make_windows(episodes, 7, 0.99, 100.0)["y"].max()
        np.testing.assert_allclose(buffer["condition"], expected, rtol=1e-5)


def test_inpainting_ends_in_the_sources_amplified_rewards(augment, episodes):
    """A negative reward moves upward, too; what a terminal costs stays as it is."""
    buffer = augment(alpha=1.3, condition="inpaint", seed=1, num_transitions=7 * 200)
    assert "condition" not in buffer and buffer["terminals"].any()
    for n in range(len(buffer["rewards"])):
        e, t = episodes[buffer["episode"][n]], buffer["timestep"][n]
        r, terminal = e.rewards[t : t + 7], e.terminations[t : t + 7]
        expected = r + 0.3 * np.abs(r) - 100.0 * terminal
        np.testing.assert_allclose(buffer["rewards"][n], expected, atol=1e-3)
        assert np.abs(buffer["observations"][n] - e.observations[t : t + 8]).max() > 0.05


def test_a_buffer_is_never_replaced_by_another(augment, tmp_path, capsys, pipeline, monkeypatch):
    one, other = (augment(name, num_transitions=70) for name in ("one.npz", "other.npz"))
    assert all((one[key] == other[key]).all() for key in BUFFER)  # the same seed
    before, path = (tmp_path / "one.npz").read_bytes(), tmp_path / "diffusion.pt"
    shutil.copy(pipeline / "diffusion.pt", path)  # the same training, elsewhere
    augment("one.npz", num_transitions=70, checkpoint=str(path))
    assert "one.npz is finished" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"was made with alpha 1.1, seed 0; choose another --out"):
        augment("one.npz", num_transitions=70, alpha=1.2, seed=1)
    checkpoint = torch.load(path, weights_only=True)
    torch.save({**checkpoint, "step": 3}, path)
    with pytest.raises(SystemExit, match="made with stage A's step 6; choose another --out"):
        augment("one.npz", num_transitions=70, checkpoint=str(path))
    assert "is at step 3 of 6: its training is not finished" in capsys.readouterr().out
    assert (tmp_path / "one.npz").read_bytes() == before

    sampler, path = B.edm_sampler, tmp_path / "two.npz"
    monkeypatch.setattr(B, "edm_sampler", lambda *x: (path.write_text("other"), sampler(*x))[1])
    for message in ("is now of another run; choose another", "no buffer of gta_augment.py; choose"):
        with pytest.raises(SystemExit, match=message):
            augment("two.npz")
        assert path.read_text() == "other"


def test_kill_9_leaves_no_half_file(pipeline, tmp_path):
    flags = ["--num-transitions", "700000", "--batch-size", "8", "--num-steps", "8"]
    flags += ["--checkpoint", pipeline / "diffusion.pt", "--device", "cpu"]
    command, log = [sys.executable, ROOT / "gta_augment.py", *flags], tmp_path / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=tmp_path, stderr=file, stdout=file)
        while "8/100000" not in log.read_text() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert os.listdir(tmp_path) == ["log"]


@pytest.mark.parametrize("changes, message", [
    ({"mu": 0.0}, "--mu 0.0: must lie in"), ({"mu": 1.5}, "--mu 1.5: must lie in"),
    ({"reweight_bins": 5, "success_weight": 10.0}, "for dense rewards"),
    ({"env": "pen-human-replay"}, "--env pen-human-replay: no folder of a Minari dataset"),
    ({"checkpoint": "none.pt"}, "--checkpoint none.pt: no diffusion.pt of gta_diffusion.py"),
    ({"checkpoint": __file__}, "test_augment.py: no diffusion.pt of gta_diffusion.py"),
    ({"guidance": 1e38}, "NaN was generated"),
])  # fmt: skip
def test_bad_arguments_are_one_line(augment, tmp_path, monkeypatch, changes, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit, match=message) as error:
        augment(**changes)
    assert "\n" not in str(error.value) and not (tmp_path / "buffer.npz").exists()
