"""Stage B: schedule, sampler, guidance, partial noising, choice of sources, buffer."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_A, TINY_B, TINY_C, run

import gta_augment as B
import gta_diffusion as A

GAMMA = min(80 / 128, math.sqrt(2) - 1)
SIGMAS = B.noise_schedule(128, 0.002, 80.0, 7.0)


def gaussian_denoiser(x, sigma, m, s):
    """The exact D of data N(m, s^2 I)."""
    return (s**2 * x + sigma**2 * m) / (s**2 + sigma**2)


def test_schedule_is_edms():
    assert len(SIGMAS) == 129 and SIGMAS[-1] == 0.0
    assert SIGMAS[0] == pytest.approx(80.0) and SIGMAS[127] == pytest.approx(0.002)
    for i in (1, 37, 100):
        expected = (80 ** (1 / 7) + i / 127 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        assert SIGMAS[i] == pytest.approx(expected)


@pytest.mark.parametrize("gamma", [0.0, GAMMA])
def test_sampler_draws_from_the_gaussian(gamma):
    torch.manual_seed(0)
    m, s = torch.tensor([-1.0, 0.0, 2.5]), torch.tensor([0.3, 1.0, 2.0])
    x = SIGMAS[0] * torch.randn(40_000, 1, 3)
    denoise = partial(gaussian_denoiser, m=m, s=s)
    x = B.edm_sampler(denoise, x, SIGMAS, gamma, s_min=0.05, s_max=50.0, s_noise=1.0)[:, 0]
    # without churn the start N(0, sigma_max^2) leaves a trace: the exact flow keeps quantiles
    shrink = s / torch.sqrt(s**2 + SIGMAS[0] ** 2) if gamma == 0 else torch.zeros(3)
    torch.testing.assert_close(x.mean(0), m - m * shrink, atol=0.03, rtol=0)
    torch.testing.assert_close(x.std(0), s, atol=0, rtol=0.02)


def test_sampler_against_the_papers_algorithm():
    def algorithm_2(D, x, t, s_churn, s_min, s_max, s_noise):
        N = len(t) - 1
        for i in range(N):
            g = min(s_churn / N, math.sqrt(2) - 1) if s_min <= t[i] <= s_max else 0
            eps = s_noise * torch.randn_like(x)
            t_hat = t[i] + g * t[i]
            x_hat = x + math.sqrt(t_hat**2 - t[i] ** 2) * eps
            d = (x_hat - D(x_hat, t_hat)) / t_hat
            x_new = x_hat + (t[i + 1] - t_hat) * d
            if t[i + 1] != 0:
                d_prime = (x_new - D(x_new, t[i + 1])) / t[i + 1]
                x_new = x_hat + (t[i + 1] - t_hat) * (d / 2 + d_prime / 2)
            x = x_new
        return x

    sigmas = B.noise_schedule(20, 0.002, 80.0, 7.0)
    denoise = lambda x, sigma: torch.tanh(x / (1 + sigma))  # noqa: E731, any smooth function
    x = 80 * torch.randn(5, 4, 3)
    torch.manual_seed(1)
    ours = B.edm_sampler(denoise, x, sigmas, min(4 / 20, math.sqrt(2) - 1), 0.05, 50.0, 1.003)
    torch.manual_seed(1)
    torch.testing.assert_close(ours, algorithm_2(denoise, x, sigmas, 4, 0.05, 50.0, 1.003))


@pytest.mark.parametrize("w", [0.0, 2.0])
def test_guidance_moves_the_mean_as_eq_4_says(w):
    torch.manual_seed(0)
    m_0, slope, y = -0.5, 0.8, 1.5

    def denoiser(
        x, sigma, y, keep
    ):  # data N(m_0 + slope y, 1) with its condition, N(m_0, 1) without
        m = (m_0 + slope * y * keep)[:, None, None]
        return gaussian_denoiser(x, sigma[:, None, None], m, 1.0)

    x = SIGMAS[0] * torch.randn(20_000, 1, 1)
    denoise = partial(B.guided_denoiser, denoiser, y=torch.full((len(x),), y), w=w)
    x = B.edm_sampler(denoise, x, SIGMAS, GAMMA, 0.05, 50.0, 1.0)
    assert x.mean().item() == pytest.approx((w + 1) * (m_0 + slope * y) - w * m_0, abs=0.03)


def test_guidance_in_both_halves_of_a_step():
    calls = []

    def denoiser(x, sigma, y, keep):
        calls.append((len(x), keep.tolist()))
        return x / 2

    denoise = partial(B.guided_denoiser, denoiser, y=torch.zeros(3), w=2.0)
    B.edm_sampler(denoise, torch.randn(3, 2, 2), [1.0, 0.5, 0.0], 0.0, 0.0, 1.0, 1.0)
    assert calls == [(6, [1, 1, 1, 0, 0, 0])] * 3  # Euler, Heun, and the last step's Euler


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


def test_small_mu_keeps_the_trajectory_and_mu_1_forgets_it():
    denoise = partial(gaussian_denoiser, m=0.0, s=1.0)

    def augment(source, mu):
        torch.manual_seed(0)
        x, left = B.partial_noise(source, SIGMAS, mu)
        return B.edm_sampler(denoise, x, left, GAMMA, 0.05, 50.0, 1.003)

    one, other = torch.randn(50, 8, 5), torch.randn(50, 8, 5)
    assert (augment(one, 0.02) - one).abs().max() < 0.02
    assert (augment(one, 0.5) - one).abs().mean() > 0.1
    assert torch.equal(augment(one, 1.0), augment(other, 1.0))
    assert not torch.equal(augment(one, 0.5), augment(other, 0.5))


def test_amplified_return():
    y = np.array([2.0, 0.0, -1.0])
    np.testing.assert_allclose(B.amplified_return(y, 1.3), [2.6, 0.0, -0.7])
    np.testing.assert_allclose(B.amplified_return(y, 1.0), y)


@pytest.mark.parametrize("num_bins", [1, 7, 50])
def test_reweighting_is_eq_13(num_bins):
    rng = np.random.default_rng(0)
    y = np.concatenate([rng.normal(2, 1, 900), rng.normal(8, 0.5, 100)])
    u, q = 0.001, 5.0
    p = B.reweighted_probabilities(y, num_bins, u, q, max_ratio=np.inf)
    width = (y.max() - y.min()) / num_bins
    expected = np.zeros(len(y))
    for j in range(num_bins):
        low, high = y.min() + j * width, y.min() + (j + 1) * width
        members = [i for i in range(len(y)) if low <= y[i] < high or (j == num_bins - 1 and
                   y[i] == y.max())]  # fmt: skip
        if members:
            share = len(members) / len(y)
            v = share / (share + u) * math.exp(-abs(y.max() - (low + high) / 2) / q)
            expected[members] = v / len(members)
    np.testing.assert_allclose(p, expected / expected.sum(), rtol=1e-6)


def test_reweighting_draws_no_window_more_than_five_times_as_often():
    rng = np.random.default_rng(0)
    y = np.concatenate([rng.normal(0, 1, 5000), [30.0, 31.0, 32.0]])
    p = B.reweighted_probabilities(y, 50, 0.001, 5.0)
    free = B.reweighted_probabilities(y, 50, 0.001, 5.0, max_ratio=np.inf)
    assert free.max() * len(y) > 50
    assert p.max() * len(y) == pytest.approx(5, rel=2e-3)
    assert p.sum() == pytest.approx(1)
    extreme = B.reweighted_probabilities(y.astype(np.float32), 50, 0.001, 0.01)  # exp underflows
    assert np.isfinite(extreme).all() and extreme.sum() == pytest.approx(1)


def test_success_weighting_draws_episodes_then_windows():
    episode = np.array([0] * 10 + [1] * 2 + [2] * 5)
    p = B.success_probabilities(episode, np.array([0.0, 1.0, -2.0]), c=10)
    by_episode = [p[episode == e].sum() for e in range(3)]
    np.testing.assert_allclose(by_episode, [1 / 12, 10 / 12, 1 / 12])
    for e in range(3):
        assert np.ptp(p[episode == e]) == 0


def test_short_episodes_do_not_disturb_success_weighting():
    p = B.success_probabilities(np.array([0, 0, 2]), np.array([0.0, 1.0, 1.0]), c=3)
    np.testing.assert_allclose(p, [1 / 8, 1 / 8, 6 / 8])


def test_sources_come_equally_often():
    drawn = B.draw_sources(np.random.default_rng(0), 10, 25)
    counts = np.bincount(drawn, minlength=10)
    assert set(counts) == {2, 3} and counts.sum() == 25
    assert (drawn[:10] != np.arange(10)).any()
    p = np.zeros(10)
    p[[3, 4]] = 0.5
    assert set(B.draw_sources(np.random.default_rng(0), 10, 25, p)) == {3, 4}


BUFFER = {  # DESIGN: N subtrajectories of H = 7 transitions of Hopper
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
    with np.load(pipeline[0] / "buffer.npz", allow_pickle=False) as file:
        assert set(file.files) == set(BUFFER) | {"metadata"}
        for key, (dtype, shape) in BUFFER.items():
            assert (str(file[key].dtype), file[key].shape) == (dtype, shape), key
            assert np.isfinite(file[key]).all()
        assert file["metadata"].shape == ()
        metadata = json.loads(str(file["metadata"]))
    expected = {
        "format": "gta-buffer",
        "format_version": 1,
        "method": "gta",
        "env": "data/hopper-medium-sample",
        "env_id": "Hopper-v5",
        "dataset_ids": ["hopper-medium-sample-v0"],
        "horizon": 7,
        "mu": 0.5,
        "alpha": 1.3,
        "guidance": 2.0,
        "seed": 0,
    }
    assert {key: metadata[key] for key in expected} == expected
    assert metadata["diffusion"]["train_steps"] == 6


def make_args(pipeline, out, **changes):
    return B.Args(
        checkpoint=pipeline[0] / "diffusion.pt", out=out, device="cpu", compile=False, **changes
    )


def augment(args):
    """Runs stage B and returns the arrays of its buffer."""
    B.main(args)
    with np.load(args.out, allow_pickle=False) as file:
        return dict(file)


def test_windows_match_their_sources(pipeline, dataset, tmp_path):
    """With a tiny mu the generated window is its source, row by row."""
    sizes = {"num_transitions": 7 * 1000, "mu": 0.01, "alpha": 1.3, "guidance": 0.0}
    args = make_args(pipeline, tmp_path / "buffer.npz", **sizes)
    buffer = augment(args)
    assert buffer["terminals"].any(), "draw more windows: the test needs a terminal"
    error = []
    for n in range(len(buffer["rewards"])):
        e, t = dataset.episodes[buffer["episode"][n]], buffer["timestep"][n]
        T = len(e.rewards)
        assert (buffer["terminals"][n] == e.terminals[t : t + 7]).all()
        assert buffer["return_to_go"][n] == pytest.approx(e.rewards[t:].sum(), rel=1e-5)
        y = sum(0.99 ** (k - t) * (e.rewards[k] - 100 * e.terminals[k]) for k in range(t, T))
        assert buffer["condition"][n] == pytest.approx(y + 0.3 * abs(y), rel=1e-4)
        error.append(np.abs(buffer["observations"][n] - e.observations[t : t + 8]).max())
        penalised = e.rewards[t : t + 7] - 100.0 * e.terminals[t : t + 7]
        np.testing.assert_allclose(buffer["rewards"][n], penalised, atol=0.1)
        np.testing.assert_allclose(buffer["actions"][n], e.actions[t : t + 7], atol=0.05)
    assert max(error) < 0.1
    assert np.abs(buffer["actions"]).max() <= 1.0

    args.restore_terminal_reward, args.out = True, tmp_path / "restored.npz"
    difference = augment(args)["rewards"] - buffer["rewards"]
    np.testing.assert_allclose(difference, 100.0 * buffer["terminals"], atol=1e-4)


def test_summary():
    buffer = {
        "rewards": np.array([[1.0, 2.0], [3.0, -97.0]]),
        "terminals": np.array([[False, False], [False, True]]),
        "condition": np.array([5.0, -80.0]),
    }
    summary = B.summarise(buffer, np.array([[0.0, 1.0], [2.0, -99.0]]))
    assert summary["generated_reward"] == pytest.approx(2.0)
    assert summary["source_reward"] == pytest.approx(1.0)
    assert summary["generated_correlation"] == pytest.approx(1.0)
    assert summary["source_correlation"] == pytest.approx(1.0)
    assert np.isnan(B.correlation(np.ones(3), np.arange(3)))


def test_same_seed_same_buffer(pipeline, tmp_path):
    sizes = {"num_transitions": 70, "num_steps": 8, "reweight_bins": 5}
    arrays = [
        augment(make_args(pipeline, tmp_path / name, **sizes)) for name in ("one.npz", "other.npz")
    ]
    for key in BUFFER:
        assert (arrays[0][key] == arrays[1][key]).all(), key


def test_checkpoint_has_the_documented_keys(pipeline):
    checkpoint = torch.load(pipeline[0] / "diffusion.pt", weights_only=True)
    assert set(checkpoint) == {
        "format", "format_version", "args", "env", "dataset_ids", "env_id", "obs_dim", "act_dim",
        "horizon", "normalizer", "model", "ema", "optimizer", "step", "rng",
        "data_sha256", "versions", "commit",
    }  # fmt: skip
    assert (checkpoint["obs_dim"], checkpoint["act_dim"], checkpoint["horizon"]) == (11, 3, 7)
    assert checkpoint["step"] == 6 and checkpoint["args"]["dim"] == 8
    for key in ("mean", "std"):
        moments = checkpoint["normalizer"][key]
        assert (moments.dtype, moments.shape) == (torch.float32, (15,))
    A.Denoiser(7, 11, 3, 8).load_state_dict(checkpoint["ema"])


def test_flags_reach_the_sampler(pipeline, tmp_path, monkeypatch, dataset):
    """main hands the EMA, the schedule, the guidance and the choice of sources on as asked."""
    seen = {}

    def sampler(denoise, x, sigmas, gamma, s_min, s_max, s_noise):
        seen.update(denoise.keywords, net=denoise.args[0], sigmas=sigmas, gamma=gamma)
        seen["s"] = (s_min, s_max, s_noise)
        return x

    def draw(rng, num_windows, num_sources, probabilities):
        seen["probabilities"] = probabilities
        return np.arange(num_sources)

    monkeypatch.setattr(B, "edm_sampler", sampler)
    monkeypatch.setattr(B, "draw_sources", draw)
    args = make_args(
        pipeline,
        tmp_path / "b.npz",
        num_transitions=70,
        mu=0.5,
        alpha=1.3,
        guidance=1.5,
        num_steps=20,
        s_churn=4.0,
        s_min=0.1,
        s_max=40.0,
        s_noise=1.01,
        success_weight=3.0,
    )
    B.main(args)
    assert seen["w"] == 1.5 and seen["s"] == (0.1, 40.0, 1.01) and seen["gamma"] == 4 / 20
    assert seen["sigmas"] == B.noise_schedule(20, 0.002, 80.0, 7.0)[10:]
    windows = B.make_windows(dataset, 7, 0.99, 100.0)
    expected = 0.01 * B.amplified_return(windows.y[:10], 1.3)
    np.testing.assert_allclose(seen["y"].numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(
        seen["probabilities"],
        B.success_probabilities(windows.episode, np.ones(len(dataset.episodes)), 3.0),
    )
    checkpoint = B.load_checkpoint(args.checkpoint)
    for key, p in seen["net"].state_dict().items():
        assert torch.equal(p, checkpoint["ema"][key])
    key = "net.ups.0.0.mix_row.0.weight"
    assert not torch.equal(checkpoint["ema"][key], checkpoint["model"][key])

    args.success_weight, args.reweight_bins, args.reweight_q = 1.0, 20, 4.0
    args.overwrite = True
    B.main(args)
    np.testing.assert_allclose(
        seen["probabilities"], B.reweighted_probabilities(0.01 * windows.y, 20, 0.001, 4.0)
    )


# --- the paper's ablations ---


def test_inpainted_rewards_keep_the_right_noise_level():
    """E.6: at every evaluation of D the rewards are r + sigma n, and in the end they are r."""
    torch.manual_seed(0)
    r, seen = torch.randn(500, 7), []

    def denoise(x, sigma):
        seen.append((sigma, x[:, :-1, -1] - r, x[:, -1, -1].clone()))
        return 0.5 * x

    source = torch.randn(500, 8, 3)
    source[:, :-1, -1] = r
    x, left = B.partial_noise(source, SIGMAS, 0.5)
    x = B.edm_sampler(partial(B.inpainting_denoiser, denoise, r), x, left, GAMMA, 0.05, 50.0, 1.0)
    torch.testing.assert_close(x[:, :-1, -1], r, atol=1e-5, rtol=0)
    assert len(seen) == 2 * 64 - 1
    for sigma, noise, _ in seen:
        assert noise.std().item() == pytest.approx(sigma, rel=0.05)
    assert (seen[-1][2] - seen[0][2]).abs().mean() > 0.1  # the other cells move


def test_rewards_are_amplified_without_their_penalty():
    rewards, terminals = np.array([2.0, -1.0, 3.0 - 100]), np.array([False, False, True])
    amplified = B.amplify_rewards(rewards, terminals, 100.0, 1.3)
    np.testing.assert_allclose(amplified, [2.6, -0.7, 3.9 - 100])


def test_pick_windows():
    episode, returns = np.array([0, 0, 1, 2, 2, 3]), np.array([5.0, 9.0, 7.0, -1.0])
    for top, min_return, expected in (
        (1.0, None, [0, 1, 2, 3, 4, 5]),
        (0.25, None, [2]),
        (0.26, None, [2, 3, 4]),  # the next whole episode
        (1.0, 5.0, [0, 1, 2, 3, 4]),
        (0.5, 8.0, [2]),
        (1.0, 10.0, []),
    ):
        assert B.pick_windows(episode, returns, top, min_return).tolist() == expected


TINY = {"num_transitions": 7 * 60, "num_steps": 8, "mu": 0.5}


def test_inpainting_ends_in_the_sources_amplified_rewards(pipeline, dataset, tmp_path):
    changes = {**TINY, "alpha": 1.3, "condition": "inpaint", "num_transitions": 7 * 800}
    buffer = augment(make_args(pipeline, tmp_path / "b.npz", **changes))
    assert "condition" not in buffer and buffer["terminals"].any()
    for n in range(len(buffer["rewards"])):
        e, t = dataset.episodes[buffer["episode"][n]], buffer["timestep"][n]
        r, terminal = e.rewards[t : t + 7], e.terminals[t : t + 7]
        expected = r + 0.3 * np.abs(r) - 100.0 * terminal
        np.testing.assert_allclose(buffer["rewards"][n], expected, atol=1e-3)
    states = [dataset.episodes[e].observations[t : t + 8]
              for e, t in zip(buffer["episode"], buffer["timestep"])]  # fmt: skip
    assert np.abs(buffer["observations"] - states).mean() > 0.05


@pytest.mark.parametrize("condition", ["amplified", "fixed", "none", "inpaint"])
def test_conditions_see_the_sources_return_or_not(condition, pipeline, tmp_path, monkeypatch):
    """What the denoiser is given: each source's amplified return, one return for all, or none."""
    seen, forward = [], B.Denoiser.forward

    def spy(self, x, sigma, y, keep):
        seen.append((y, keep))
        return forward(self, x, sigma, y, keep)

    monkeypatch.setattr(B.Denoiser, "forward", spy)
    changes = {**TINY, "alpha": 1.3, "condition": condition, "batch_size": 60}
    buffer = augment(make_args(pipeline, tmp_path / "b.npz", **changes))
    checkpoint = B.load_checkpoint(pipeline[0] / "diffusion.pt")
    windows = B.make_windows(B.load_dataset(checkpoint["env"]), 7, 0.99, 100.0)
    if condition in ("none", "inpaint"):
        assert not any(keep.any() for _, keep in seen) and len(seen) == 2 * 4 - 1
        assert all(len(y) == 60 for y, _ in seen)  # no second evaluation
        assert "condition" not in buffer
        return
    y, keep = seen[0]
    assert len(y) == 120 and keep.tolist() == [1.0] * 60 + [0.0] * 60
    np.testing.assert_allclose(buffer["condition"], 100 * y[:60].numpy(), rtol=1e-5)
    if condition == "fixed":
        np.testing.assert_allclose(buffer["condition"], 1.3 * windows.y.max(), rtol=1e-5)
    else:
        assert len(np.unique(buffer["condition"])) > 30


def test_no_condition_does_not_depend_on_alpha(pipeline, tmp_path):
    def rewards(**changes):
        name = "-".join(map(str, changes.values())) + ".npz"
        return augment(make_args(pipeline, tmp_path / name, **TINY, **changes))["rewards"]

    same = [rewards(alpha=alpha, condition="none") for alpha in (1.0, 2.0)]
    assert (same[0] == same[1]).all()
    other = [rewards(alpha=alpha, condition="amplified") for alpha in (1.0, 2.0)]
    assert (other[0] != other[1]).all() and (same[0] != other[0]).all()


def test_sources_come_from_the_best_episodes(pipeline, dataset, tmp_path):
    returns = np.array([e.rewards.sum() for e in dataset.episodes])
    best = set(np.argsort(-returns)[:8])  # a tenth of 72, rounded up
    few = make_args(pipeline, tmp_path / "few.npz", **TINY, source_top=0.1)
    assert set(augment(few)["episode"]) == best
    few = make_args(
        pipeline,
        tmp_path / "min.npz",
        **TINY,
        source_min_return=np.sort(returns)[-2],
        reweight_bins=5,
    )
    assert set(augment(few)["episode"]) == set(np.argsort(-returns)[:2])
    none = make_args(pipeline, tmp_path / "none.npz", **TINY, source_min_return=1e6)
    with pytest.raises(SystemExit, match="no episode is left"):
        B.main(none)


def test_reward_proxy_learns_a_function_of_state_and_action_but_no_noise():
    torch.manual_seed(0)
    sa = torch.randn(4000, 4)
    known = 3 * sa[:, 0] * sa[:, 3] + sa[:, 1].abs() + 5
    for r, low, high in ((known, 0.97, 1.0), (torch.randn(4000), -1.0, 0.1)):
        rows = torch.column_stack([sa, r])
        mean, std = rows.mean(0), rows.std(0)
        proxy, r_squared = B.fit_reward_proxy(rows, mean, std, num_steps=600)
        assert low < r_squared < high
    proxy, _ = B.fit_reward_proxy(torch.column_stack([sa, known]), mean, std, num_steps=600)
    fresh = torch.randn(1000, 4)
    true = 3 * fresh[:, 0] * fresh[:, 3] + fresh[:, 1].abs() + 5
    assert (proxy(fresh) - true).pow(2).mean() < 0.05 * true.var()


def test_reward_proxy_replaces_rewards_and_keeps_the_penalty(pipeline, tmp_path, monkeypatch):
    fit, kept = B.fit_reward_proxy, {}

    def quick_fit(transitions, mean, std):
        kept["proxy"], r_squared = fit(transitions, mean, std, num_steps=300)
        return kept["proxy"], r_squared

    monkeypatch.setattr(B, "fit_reward_proxy", quick_fit)
    tiny = {**TINY, "num_transitions": 7 * 800}
    own = augment(make_args(pipeline, tmp_path / "own.npz", **tiny))
    buffer = augment(make_args(pipeline, tmp_path / "b.npz", **tiny, reward_proxy=True))
    for key in ("terminals", "condition", "episode", "timestep"):
        np.testing.assert_array_equal(own[key], buffer[key])
    sa = np.concatenate([buffer["observations"][:, :-1], buffer["actions"]], axis=-1)
    with torch.no_grad():
        predicted = kept["proxy"](torch.from_numpy(sa)).numpy()
    assert buffer["terminals"].any()
    np.testing.assert_allclose(
        buffer["rewards"], predicted - 100.0 * buffer["terminals"], rtol=1e-4, atol=1e-3
    )
    assert not np.allclose(own["rewards"], buffer["rewards"], atol=0.1)


def test_names_of_augmentations():
    name = B.name_augmentation
    assert name(B.Args(), 31) == "gta(mu 0.25, alpha 1.1)"
    assert name(B.Args(seed=3, device="cpu", batch_size=7), 31) == "gta(mu 0.25, alpha 1.1)"
    assert name(B.Args(condition="none", mu=1.0), 1) == "gta(mu 1.0, condition none, H 1)"
    args = B.Args(reward_proxy=True, source_top=0.1, guidance=0.0)
    assert name(args, 31) == "gta(mu 0.25, alpha 1.1, guidance 0.0, source-top 0.1, reward-proxy)"
    args = B.Args(num_transitions=100_000, source_min_return=5.0)
    few = "gta(mu 0.25, alpha 1.1, num-transitions 100000, source-min-return 5.0)"
    assert name(args, 31) == few


@pytest.mark.parametrize("horizon", [1, 127])
def test_shortest_and_longest_horizon_run_through_all_stages(horizon, tmp_path):
    """Table 10. H = 1 is a transition model; 127 transitions are 128 rows."""
    flags = {"A": TINY_A.copy(), "B": [*TINY_B, "--batch-size", 2]}
    flags["A"][1:6:2] = [horizon, 8, 2]
    flags["B"][1] = 3 * horizon
    run(ROOT / "gta_diffusion.py", *flags["A"], cwd=tmp_path)
    run(ROOT / "gta_augment.py", *flags["B"], cwd=tmp_path)
    with np.load(tmp_path / "buffer.npz", allow_pickle=False) as file:
        assert file["observations"].shape == (3, horizon + 1, 11)
        assert file["rewards"].shape == (3, horizon)
    aug = ["--aug", "buffer.npz", "--aug-only"]
    for name in ("td3bc", "dt"):
        output = run(ROOT / f"{name}.py", *TINY_C, *aug, cwd=tmp_path).stdout
        assert f"num-steps 8, H {horizon}) only | " in output.splitlines()[-1]
    output = run(ROOT / "metrics.py", "--aug", "buffer.npz", cwd=tmp_path).stdout
    assert "dynamic MSE" in output


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mu": 0.0}, "--mu 0.0: must lie in"),
        ({"mu": 1.5}, "--mu 1.5: must lie in"),
        ({"source_top": 0.0}, "--source-top 0.0: must lie in"),
        ({"reweight_bins": 5, "success_weight": 10}, "choose one"),
        ({"env": "pen-human-replay"}, "--env pen-human-replay: not a folder here"),
    ],
)
def test_bad_arguments_are_one_line(pipeline, tmp_path, changes, message):
    args = make_args(pipeline, tmp_path / "b.npz", **changes)
    with pytest.raises(SystemExit, match=message) as error:
        B.main(args)
    assert "\n" not in str(error.value)
    assert not args.out.exists()


def test_a_file_that_is_no_checkpoint_is_one_line(pipeline, tmp_path):
    whole = (pipeline[0] / "diffusion.pt").read_bytes()
    for name, content in {"cut.pt": whole[: len(whole) // 2], "text.pt": b"hello"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SystemExit, match=f"{name}: not a whole checkpoint"):
            B.load_checkpoint(tmp_path / name)
    with pytest.raises(SystemExit, match="no such file"):
        B.load_checkpoint(tmp_path / "none.pt")
