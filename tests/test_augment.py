"""Stage B: schedule, sampler, guidance, partial noising, choice of sources, buffer."""

import json
import math
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import HOPPER, ROOT

import gta_augment as B

GAMMA = min(80 / 128, math.sqrt(2) - 1)
SIGMAS = B.noise_schedule(128)


@pytest.fixture(scope="module")
def episodes():
    return B.load_episodes(B.open_datasets(HOPPER))


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
    a, b = 80 ** (1 / 7), 0.002 ** (1 / 7)
    expected = [(a + i / 127 * (b - a)) ** 7 for i in range(128)]
    assert SIGMAS == pytest.approx([*expected, 0.0])


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

    x = SIGMAS[0] * torch.randn(10_000, 1, 3)  # small enough for one thread
    denoise = partial(B.guided_denoiser, denoiser, y=torch.full((len(x),), y), w=w)
    x = B.edm_sampler(denoise, x, SIGMAS, gamma, s_noise=1.0)[:, 0]
    # without churn the start N(0, sigma_max^2) leaves a trace: the exact flow keeps quantiles
    m = torch.full((3,), (w + 1) * (m_0 + slope * y) - w * m_0)
    m -= m * s / torch.sqrt(s**2 + SIGMAS[0] ** 2) * (gamma == 0)
    torch.testing.assert_close(x.mean(0), m, atol=0.04, rtol=0)
    torch.testing.assert_close(x.std(0), s, atol=0, rtol=0.02)


@pytest.mark.parametrize("mu", [0.1, 0.25, 1.0])
def test_partial_noise_has_the_schedules_sigma(mu):
    torch.manual_seed(0)
    source = torch.full((2000, 4, 3), 7.0)
    x, left = B.partial_noise(source, SIGMAS, mu)
    k = int(128 * (1 - mu))
    assert left == SIGMAS[k:]
    added = x if mu == 1 else x - source
    assert added.std().item() == pytest.approx(SIGMAS[k], rel=0.02)
    assert added.mean().item() == pytest.approx(0, abs=0.03 * SIGMAS[k])


def test_inpainted_rewards_keep_the_right_noise_level():
    """E.6: at every evaluation of D the rewards are r + sigma n, and in the end they are r."""
    torch.manual_seed(0)
    r = torch.randn(500, 7)
    source = torch.randn(500, 8, 3)
    seen = []
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


@pytest.mark.parametrize("q", [0.05, 1.0, 100.0])
@pytest.mark.parametrize("kind", ["outliers", "low tail"])
def test_reweighting_is_eq_13_clipped_at_five_times_uniform_then_renormalised(kind, q):
    rng = np.random.default_rng(0)
    y = 3.5 - rng.exponential(0.5, 2000)
    if kind == "outliers":
        y = np.concatenate([rng.normal(0, 0.2, 2000), [6.0, 6.1, 6.2]])
    clipped = np.minimum(eq_13(y, 50, 0.001, q), 5)
    assert (clipped.max() == 5) == ((kind, q) != ("low tail", 1.0))  # else the clip is not tested
    p = B.reweighted_probabilities(y, 50, 0.001, q)
    np.testing.assert_allclose(p, clipped / clipped.sum(), rtol=1e-6, atol=1e-12)


def test_reweighting_of_far_returns_does_not_underflow():
    p = B.reweighted_probabilities(np.linspace(0, 1000, 2000), 50, 0.001, 0.001)
    assert p.sum() == pytest.approx(1) and (p[-40:] > 0).all() and np.isfinite(p).all()


def test_sources_are_drawn_as_asked():
    y = np.random.default_rng(1).random(10)
    episode = np.repeat([0, 1, 3], [5, 3, 2])
    returns = np.array([0.0, 3.0, -2.0, -1.0])  # episode 2 is short

    def share(**changes):
        drawn = B.choose_sources(B.Args(**changes), y, episode, returns, 20_000)
        return np.bincount(drawn, minlength=10) / 20_000

    assert set(share()) == {0.1}  # equally often
    for changes in ({"source_top": 0.2}, {"source_min_return": 3.0}):  # a whole episode, rounded up
        np.testing.assert_allclose(share(**changes), (episode == 1) / 3, atol=1e-4)
    p = np.array([1 / 11 / 5] * 5 + [9 / 11 / 3] * 3 + [1 / 11 / 2] * 2)  # B.2
    np.testing.assert_allclose(B.success_probabilities(episode, returns, 9.0), p)
    np.testing.assert_allclose(share(success_weight=9.0), p, atol=0.01)
    p = B.reweighted_probabilities(y, 4, 0.001, 0.5)
    np.testing.assert_allclose(share(reweight_bins=4, reweight_q=0.5), p, atol=0.01)


def test_buffer_has_the_documented_arrays(pipeline):
    """README: N subtrajectories of H = 7 transitions of Hopper."""
    with np.load(pipeline / "buffer.npz", allow_pickle=False) as file:
        buffer = dict(file)
    metadata = json.loads(str(buffer.pop("metadata")))
    shapes = {"observations": (40, 8, 11), "actions": (40, 7, 3), "rewards": (40, 7)}
    shapes |= {"terminals": (40, 7), "episode": (40,), "timestep": (40,)}
    shapes |= {"return_to_go": (40,), "condition": (40,)}
    assert {key: x.shape for key, x in buffer.items()} == shapes
    assert "".join(x.dtype.char for x in buffer.values()) == "fff?iiff"
    expected = {"format": "gta-buffer", "format_version": 1, "method": "gta", "env_id": "Hopper-v5"}
    expected |= {"label": "gta(mu 0.5, alpha 1.3, num-steps 8, num-transitions 280, H 7)"}
    expected |= {"env": HOPPER, "dataset_ids": ["hopper-medium-sample-v0"], "horizon": 7}
    assert metadata.items() >= expected.items() and metadata["diffusion"]["step"] == 6


def test_windows_match_their_sources(augment, episodes):
    """With a tiny mu the generated window is its source, row by row. The condition is eq. 8. Of
    inpainting the rewards match, times alpha (E.6)."""
    sizes = {"num_transitions": 7 * 200, "seed": 1, "alpha": 1.3}
    exact = {"num_steps": 128, "mu": 0.01, "guidance": 0.0}
    buffer = augment(**sizes, **exact, batch_size=99)  # three of 67, the last one filled up
    assert buffer["terminals"].any() and buffer["condition"].min() < 0  # else draw more
    inpainted = augment("b.npz", **sizes, condition="inpaint", restore_terminal_reward=True)
    for n in range(len(buffer["rewards"])):
        e = episodes[buffer["episode"][n]]
        t = buffer["timestep"][n]
        r = e.rewards[t : t + 7]
        rewards = e.rewards - 100 * e.terminals
        assert (buffer["terminals"][n] == e.terminals[t : t + 7]).all()
        assert buffer["return_to_go"][n] == pytest.approx(e.rewards[t:].sum(), rel=1e-5)
        y = sum(0.99 ** (k - t) * rewards[k] for k in range(t, len(rewards)))
        assert buffer["condition"][n] == pytest.approx(y + 0.3 * abs(y), rel=1e-4)
        np.testing.assert_allclose(buffer["observations"][n], e.observations[t : t + 8], atol=0.1)
        np.testing.assert_allclose(buffer["rewards"][n], rewards[t : t + 7], atol=0.1)
        np.testing.assert_allclose(buffer["actions"][n], e.actions[t : t + 7], atol=0.05)
        np.testing.assert_allclose(inpainted["rewards"][n], 1.3 * r, atol=1e-3)
        assert np.abs(inpainted["observations"][n] - e.observations[t : t + 8]).max() > 0.05
    assert np.abs(inpainted["actions"]).max() <= 1.0


def test_windows_that_hold_a_penalty_are_not_correlated(capsys, augment):
    """As in metrics.py. With a tiny mu the generated rewards are the sources'."""
    exact = {"num_steps": 128, "mu": 0.01, "guidance": 0.0, "num_transitions": 7 * 200, "seed": 1}
    for restore in (False, True):
        buffer = augment(f"{restore}.npz", restore_terminal_reward=restore, **exact)
        line = capsys.readouterr().out.splitlines()[-1]
        source, generated = (float(x) for x in re.findall(r"-?[0-9.]+", line))
        whole = ~buffer["terminals"].any(1)
        returns = buffer["rewards"].sum(1)
        assert not whole.all()
        expected = np.corrcoef(buffer["condition"][whole], returns[whole])[0, 1]
        assert generated == pytest.approx(expected, abs=6e-4)
        assert source == pytest.approx(generated, abs=0.01)


def test_a_label_of_ones_own(augment):
    buffer = augment(num_transitions=70, label="mine")
    assert json.loads(str(buffer["metadata"]))["label"] == "mine"


@pytest.mark.parametrize("condition", ["amplified", "fixed", "none"])
def test_conditions_see_the_return_or_not(condition, augment, episodes, pipeline, monkeypatch):
    """What the averaged network is given at every evaluation: each source's amplified return, one
    return for all, with a second half of the batch without it, or none at all."""
    seen, forward = [], B.Denoiser.forward
    weights = torch.load(pipeline / "diffusion.pt", weights_only=True)["ema"]

    def spy(self, x, sigma, y, keep):
        seen.append((sigma[0].item(), 100 * y[:60].numpy(), keep.tolist()))
        assert all(torch.equal(p, weights[key]) for key, p in self.state_dict().items())
        return forward(self, x, sigma, y, keep)

    monkeypatch.setattr(B.Denoiser, "forward", spy)
    buffer = augment(alpha=1.3, condition=condition, batch_size=60)
    best = 1.3 * B.make_windows(episodes, 7, 0.99, 100.0).y.max()
    expected = {"amplified": buffer.get("condition"), "fixed": best, "none": 0.0}[condition]
    halves = [0.0] * 60 if condition == "none" else [1.0] * 60 + [0.0] * 60
    assert len(seen) == 2 * 4 - 1  # Heun: twice a step but once
    assert seen[0][0] == pytest.approx(B.noise_schedule(8)[4] * math.sqrt(2))
    for _, y, keep in seen:
        np.testing.assert_allclose(y, expected, rtol=1e-5)
        assert keep == halves


def test_a_buffer_is_never_replaced_by_another(augment, tmp_path, capsys, pipeline, monkeypatch):
    one, other = (augment(name, num_transitions=70) for name in ("one.npz", "other.npz"))
    assert (one["observations"] == other["observations"]).all()  # the same seed
    path = tmp_path / "a.pt"
    checkpoint = torch.load(pipeline / "diffusion.pt", weights_only=True)
    torch.save(checkpoint, path)  # the same model, elsewhere
    augment("one.npz", num_transitions=70, checkpoint=str(path))
    assert "one.npz is finished" in capsys.readouterr().out
    checkpoint["ema"]["net.last.3.bias"] += 1e-3
    torch.save(checkpoint, path)
    torch.save({**checkpoint, "dataset_crc": 1}, tmp_path / "b.pt")
    before = {x.name: x.read_bytes() for x in tmp_path.iterdir()}
    for name, changes, message in (
        (
            "one.npz",
            {"checkpoint": pipeline / "diffusion.pt", "alpha": 1.2},
            "with alpha 1.1; choo",
        ),
        ("one.npz", {}, "made with diffusion_crc .*; choose another --out"),
        ("two.npz", {"checkpoint": tmp_path / "b.pt"}, "trained on dataset_crc 1, --env has"),
        ("two.npz", {"mu": 1.5}, "--mu 1.5: must lie in"),
        ("two.npz", {"source_min_return": 1e9}, "no episode with H transitions is left"),
        ("two.npz", {"guidance": 1e38}, "NaN was generated"),
        ("two.npz", {"guidance": -1.0}, "--guidance -1.0: must be at least 0"),
        ("two.npz", {"label": ""}, "--label is empty"),
        ("two.npz", {"success_weight": 0.0}, "--success-weight: must be > 0"),
        ("two.npz", {"checkpoint": __file__}, "no diffusion.pt of gta_diffusion.py"),
    ):
        with pytest.raises(SystemExit, match=message):
            flags = {"num_transitions": 70, "checkpoint": path, **changes}
            augment(name, **{**flags, "checkpoint": str(flags["checkpoint"])})
    assert {x.name: x.read_bytes() for x in tmp_path.iterdir()} == before

    sampler = B.edm_sampler
    path = tmp_path / "two.npz"

    def replace_and_sample(*inputs):
        path.write_text("other")
        return sampler(*inputs)

    monkeypatch.setattr(B, "edm_sampler", replace_and_sample)
    with pytest.raises(SystemExit, match="is no buffer; choose another --out"):
        augment("two.npz", num_transitions=70)
    assert path.read_text() == "other"


def test_the_place_is_tried_before_the_work(pipeline, monkeypatch):
    monkeypatch.setattr(B, "make_windows", lambda *_: pytest.fail("too late"))
    flags = {"checkpoint": str(pipeline / "diffusion.pt"), "out": "/proc/b.npz", "device": "cpu"}
    with pytest.raises(SystemExit, match="/proc/b.npz cannot be written"):
        B.main(B.Args(**flags))


def test_kill_9_leaves_no_half_file(pipeline, tmp_path):
    script = ROOT / "gta_augment.py"
    command = [sys.executable, "-u", script, "--checkpoint", pipeline / "diffusion.pt"]
    command += ["--num-transitions=700000", "--batch-size=8", "--num-steps=8", "--device=cpu"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE)
    while not process.stdout.readline().startswith(b"windows: "):
        assert process.poll() is None
    process.kill()  # -9
    assert process.wait() == -9 and not list(tmp_path.iterdir())
