"""SynthER: transitions, denoiser, training, sampling, files."""

import json
import math
import signal

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, SAMPLE, TINY_SYNTHER, run

import dt
import metrics
import synther as S
import td3bc

CPU = torch.device("cpu")


def make_args(folder, **changes):
    sizes = {"width": 16, "batch_size": 8, "train_steps": 12, "save_every": 5, "num_steps": 4}
    files = {"out": folder / "buffer.npz", "checkpoint": folder / "synther.pt", "env": str(SAMPLE)}
    flags = {"num_transitions": 50, "sample_batch_size": 20, "device": "cpu", "compile": False}
    return S.Args(**{**files, **sizes, **flags, **changes})


# --- transitions ---


def test_transitions_match_a_loop(dataset):
    few = dataset._replace(episodes=dataset.episodes[:3])
    expected = []
    for e in few.episodes:
        for t in range(len(e.rewards)):
            s, s_next = e.observations[t], e.observations[t + 1]
            expected.append([*s, *e.actions[t], e.rewards[t], *s_next, float(e.terminals[t])])
    transitions = S.make_transitions(few)
    np.testing.assert_array_equal(transitions.rows, np.float32(expected))
    assert transitions.rows.shape[1] == 2 * 11 + 3 + 2 and transitions.rows[:, -1].any()
    mean, std = np.mean(expected, 0), np.std(expected, 0, ddof=1) + 1e-5
    np.testing.assert_allclose(transitions.mean[:-1], mean[:-1], rtol=1e-5)
    np.testing.assert_allclose(transitions.std[:-1], std[:-1], rtol=1e-5)
    assert transitions.mean[-1] == 0 and transitions.std[-1] == 1  # the terminal stays 0 or 1


def test_generated_rows_are_split_clipped_and_thresholded():
    space = gym.spaces.Box(np.float32([-1, -2]), np.float32([1, 2]))
    row = [1, 2, 3, -5, 5, 7, 4, 5, 6]  # s (3), a (2), r, s' (3); the terminal follows
    x = np.float32([[*row, flag] for flag in (-0.1, 0.4, 0.5, 0.6, 1.2)])
    buffer = S.split_transitions(x, space, 0.5)
    assert buffer["observations"].shape == (5, 2, 3) and buffer["actions"].shape == (5, 1, 2)
    assert buffer["observations"][0].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert (buffer["actions"] == [[-1, 2]]).all() and (buffer["rewards"] == [[7]]).all()
    assert buffer["terminals"].tolist() == [[False], [False], [False], [True], [True]]
    assert S.split_transitions(x, space, 0.3)["terminals"].sum() == 4


# --- denoiser ---


@pytest.mark.parametrize("width, millions", [(2048, 25.6), (1024, 6.5)])
def test_network_has_the_papers_size(width, millions):
    """Halfcheetah: 17 + 6 + 1 + 17 + 1 dimensions. 6.5 M follows from the layers, as 25.6 M does:
    it is SynthER's small network."""
    parameters = sum(p.numel() for p in S.ResidualMLP(42, width).parameters())
    embedding = (17 + 1 + 128 + 1) * 128 + (42 + 1) * 128
    layers = (128 + 1) * width + 6 * (width + 1) * width + (width + 1) * 42
    assert parameters == embedding + layers
    assert parameters / 1e6 == pytest.approx(millions, abs=0.05)


def plain_network(net, x, c_noise):
    """The residual MLP on one transition, by its weights."""
    w = {key: p.double().numpy() for key, p in net.state_dict().items()}

    def linear(name, x):
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    waves = [2 * math.pi * c_noise * f for f in w["frequencies"]]
    features = np.array([c_noise, *map(math.sin, waves), *map(math.cos, waves)])
    h = linear("emb_noise.0", features)
    h = linear("emb_noise.2", h / (1 + np.exp(-h))) + linear("emb_x", x)
    h = linear("widen", h)
    for i in range(6):
        h = h + linear(f"blocks.{i}.linear", np.maximum(h, 0))
    return linear("out", np.maximum(h, 0))


def test_denoiser_is_the_plain_one():
    torch.manual_seed(0)
    denoiser = S.TransitionDenoiser(27, 32, sigma_data=0.5)
    assert {p.numel() for p in denoiser.buffers()} == {8}  # the random frequencies
    x, sigma = torch.randn(4, 27), torch.tensor([0.002, 0.3, 2.0, 80.0])
    D = denoiser(x, sigma)
    for i, s in enumerate(sigma.tolist()):
        norm = math.sqrt(s**2 + 0.25)
        inside = plain_network(denoiser.net, x[i].double().numpy() / norm, math.log(s) / 4)
        expected = 0.25 / norm**2 * x[i].double().numpy() + 0.5 * s / norm * inside
        np.testing.assert_allclose(D[i].detach().numpy(), expected, atol=1e-5, rtol=1e-5)


def test_loss_is_edms():
    torch.manual_seed(0)
    denoiser = S.TransitionDenoiser(27, 32, sigma_data=0.7)
    x, noise, sigma = torch.randn(3, 27), torch.randn(3, 27), torch.tensor([0.02, 0.5, 40.0])
    D = denoiser(x + sigma[:, None] * noise, sigma)
    expected = 0.0
    for i, s in enumerate(sigma.tolist()):
        weight = (s**2 + 0.7**2) / (s * 0.7) ** 2
        expected += weight * ((D[i] - x[i]) ** 2).mean().item() / 3
    loss = S.transition_loss(denoiser, x, sigma, noise).item()
    assert loss == pytest.approx(expected, rel=1e-5)


# --- sampling ---


def gaussian_transitions(N=20_000):
    """s, a, r, s' of a linear Gaussian system, each on a scale of its own; 0.3 of it terminal."""
    rng = np.random.default_rng(0)
    s, a = rng.normal(10, 3, N), rng.normal(-1, 0.5, N)
    r, s_next = rng.normal(200, 40, N), s + 4 * a + rng.normal(0, 1, N)
    rows = np.column_stack([s, a, r, s_next, rng.random(N) < 0.3])
    mean, std = rows.mean(0), rows.std(0)
    mean[-1], std[-1] = 0, 1
    return S.Transitions(*(x.astype(np.float32) for x in (rows, mean, std)))


ANY_ACTION = gym.spaces.Box(-np.inf, np.inf, (1,))


def columns(buffer):
    """s, a, r, s' of a buffer with one dimension each. [N, 4]"""
    s, s_next = buffer["observations"][:, 0], buffer["observations"][:, 1]
    return np.column_stack([s, buffer["actions"][:, 0], buffer["rewards"], s_next])


def test_exact_denoiser_draws_from_the_gaussian(tmp_path):
    """main's sampler with D of data N(m, C), which is known: m + C (C + sigma^2)^-1 (x - m)."""
    rows, mean, std = gaussian_transitions()
    C = torch.tensor(np.cov(((rows - mean) / std).T), dtype=torch.float32)
    C[-1, :-1] = C[:-1, -1] = 0.0  # as if Gaussian, and independent of the rest
    m = torch.tensor([0, 0, 0, 0, 0.3])

    def denoiser(x, sigma):
        return m + (x - m) @ torch.linalg.inv(C + sigma[0] ** 2 * torch.eye(5)) @ C

    torch.manual_seed(0)
    sizes = {"num_steps": 128, "num_transitions": 30_000, "sample_batch_size": 16_384}
    args = make_args(tmp_path, s_noise=1.0, **sizes)
    buffer = S.generate(args, denoiser, S.Transitions(rows, mean, std), ANY_ACTION, CPU)
    x = columns(buffer)
    np.testing.assert_allclose(x.mean(0), rows[:, :4].mean(0), atol=0.02 * std[:4].max())
    np.testing.assert_allclose(x.std(0), std[:4], rtol=0.02)
    np.testing.assert_allclose(np.corrcoef(x.T), np.corrcoef(rows[:, :4].T), atol=0.02)
    beyond = 0.5 * math.erfc(0.2 / math.sqrt(2 * C[-1, -1].item()))  # P(N(0.3, C) > 0.5)
    assert buffer["terminals"].mean() == pytest.approx(beyond, abs=0.01)


@pytest.mark.parametrize("s_churn, gamma", [(80.0, math.sqrt(2) - 1), (4.0, 4 / 20)])
def test_flags_reach_the_sampler(tmp_path, monkeypatch, s_churn, gamma):
    def sampler(denoise, x, *settings):
        assert x.shape == (2000, 5) and x.std().item() == pytest.approx(70, rel=0.05)  # pure noise
        assert settings == (S.noise_schedule(20, 0.01, 70.0, 5.0), gamma, 0.1, 40.0, 1.01)
        torch.testing.assert_close(denoise(x, 3.0), torch.full_like(x, 3.0))
        return torch.zeros_like(x)

    monkeypatch.setattr(S, "edm_sampler", sampler)
    levels = {"num_steps": 20, "sigma_min": 0.01, "sigma_max": 70.0, "rho": 5.0}
    churn = {"s_churn": s_churn, "s_min": 0.1, "s_max": 40.0, "s_noise": 1.01}
    args = make_args(tmp_path, num_transitions=2000, sample_batch_size=4000, **levels, **churn)
    transitions = gaussian_transitions()
    buffer = S.generate(
        args, lambda x, sigma: sigma[:, None].expand_as(x), transitions, ANY_ACTION, CPU
    )
    np.testing.assert_array_equal(columns(buffer), np.tile(transitions.mean[:4], (2000, 1)))


def test_trained_network_draws_from_the_data(tmp_path):
    """The whole way: standardise, train, sample, undo it, threshold."""
    transitions = gaussian_transitions()
    args = make_args(tmp_path, width=64, batch_size=256, train_steps=800, lr=3e-3, num_steps=32)
    args.num_transitions = args.sample_batch_size = 4000
    denoiser = S.train(args, transitions, None, {"data_sha256": ""}, CPU)
    buffer = S.generate(args, denoiser, transitions, ANY_ACTION, CPU)
    x, (rows, mean, std) = columns(buffer), transitions
    assert (np.abs(x.mean(0) - mean[:4]) < 0.15 * std[:4]).all()
    np.testing.assert_allclose(x.std(0), std[:4], rtol=0.15)
    np.testing.assert_allclose(np.corrcoef(x.T), np.corrcoef(rows[:, :4].T), atol=0.15)
    assert buffer["terminals"].mean() == pytest.approx(0.3, abs=0.06)


# --- files ---


@pytest.fixture(scope="module")
def synther_folder(tmp_path_factory):
    """A folder with the files of a tiny run by command line, from outside of the repository."""
    folder = tmp_path_factory.mktemp("synther")
    output = run(ROOT / "baselines" / "synther.py", *TINY_SYNTHER, cwd=folder).stdout
    return folder, output


def test_buffer_has_the_documented_arrays(synther_folder, dataset):
    folder, output = synther_folder
    with np.load(folder / "buffer.npz", allow_pickle=False) as file:
        buffer = dict(file)
    metadata = json.loads(str(buffer.pop("metadata")))
    assert {key: (str(x.dtype), x.shape) for key, x in buffer.items()} == {
        "observations": ("float32", (280, 2, 11)),
        "actions": ("float32", (280, 1, 3)),
        "rewards": ("float32", (280, 1)),
        "terminals": ("bool", (280, 1)),
    }
    assert np.abs(buffer["actions"]).max() <= 1
    expected = {
        "format": "gta-buffer",
        "format_version": 1,
        "method": "synther",
        "env": "data/hopper-medium-sample",
        "env_id": "Hopper-v5",
        "dataset_ids": ["hopper-medium-sample-v0"],
        "data_sha256": S.fingerprint(dataset),
        "horizon": 1,
        "batch_size": 256,  # SynthER's for small datasets
        "width": 16,
        "seed": 0,
    }
    assert {key: metadata[key] for key in expected} == expected
    assert "wrote synther.pt: 6 steps" in output and ": 280 transitions" in output
    rewards, flags = buffer["rewards"].mean(dtype=np.float64), buffer["terminals"].mean()
    assert f"generated {rewards:.3f}\n" in output and f"generated {flags:.3%}\n" in output
    own = np.concatenate([e.rewards for e in dataset.episodes]).astype(np.float32).mean(dtype=float)
    assert f"mean reward: dataset {own:.3f}" in output


def test_learners_and_metrics_read_it_unchanged(synther_folder, tmp_path, capsys):
    buffer = synther_folder[0] / "buffer.npz"
    shared = {"env": str(SAMPLE), "device": "cpu"}
    flags = {"train_steps": 6, "batch_size": 32, "eval_every": 6, "eval_episodes": 1}
    td3bc.main(td3bc.Args(aug=buffer, aug_only=True, runs=tmp_path / "runs", **shared, **flags))
    output = capsys.readouterr().out
    label = "synther(num-transitions 280, width 16, train-steps 6, num-steps 8)"
    assert f"buffer: {buffer}, {label} only, 280 transitions" in output
    assert f"td3bc + {label} only" in output.splitlines()[-1]
    metrics.main(metrics.Args(aug=(buffer,), out=tmp_path / "metrics.json", num_transitions=50))
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["numbers"][label]["transitions"] == 50


def test_decision_transformer_says_that_it_needs_episodes(synther_folder):
    args = dt.Args(aug=synther_folder[0] / "buffer.npz", aug_only=True, device="cpu")
    args.env, args.runs = str(SAMPLE), synther_folder[0] / "runs"
    with pytest.raises(SystemExit, match="needs return_to_go and timestep") as error:
        dt.main(args)
    assert "\n" not in str(error.value)


def test_same_seed_same_bytes(tmp_path):
    buffers = []
    for name, seed in (("one", 0), ("other", 0), ("third", 1)):
        (tmp_path / name).mkdir()
        args = make_args(tmp_path / name, seed=seed)
        S.main(args)
        with np.load(args.out) as file:
            buffers.append({key: file[key].tobytes() for key in file if key != "metadata"})
    assert buffers[0] == buffers[1] and buffers[0]["rewards"] != buffers[2]["rewards"]


class SignalAtStep7(S.tqdm):
    """The progress bar of the training: a SIGTERM comes in the seventh step."""

    def __iter__(self):
        for step in super().__iter__():
            if step + 1 == 7:
                signal.raise_signal(signal.SIGTERM)
            yield step


class SignalAtTransition40(S.tqdm):
    """The progress bar of the sampling: a SIGTERM comes with the second batch of 20."""

    def update(self, n):
        if self.unit == "transition" and self.n == 20:
            signal.raise_signal(signal.SIGTERM)
        return super().update(n)


def test_interrupted_and_resumed_is_bit_for_bit_the_same(tmp_path, monkeypatch, capsys):
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole, stopped = make_args(tmp_path / "whole"), make_args(tmp_path / "stopped")
    S.main(whole)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="interrupted at step 7"):
        patch.setattr(S, "tqdm", SignalAtStep7)
        S.main(stopped)
    checkpoint = S.load_model(stopped.checkpoint)
    assert checkpoint["step"] == 7 and not stopped.out.exists()
    rate = checkpoint["optimizer"]["param_groups"][0]["lr"]  # one cosine over the run
    assert rate == pytest.approx(3e-4 * (1 + math.cos(math.pi * 7 / 12)) / 2)
    with pytest.raises(SystemExit, match="at step 7 of 12 of the same run; --resume"):
        S.main(make_args(tmp_path / "stopped"))
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="was not written"):
        patch.setattr(S, "tqdm", SignalAtTransition40)
        S.main(make_args(tmp_path / "stopped", resume=True))
    assert S.load_model(stopped.checkpoint)["step"] == 12 and not stopped.out.exists()
    S.main(make_args(tmp_path / "stopped"))  # it is trained: no flag is needed

    one, other = S.load_model(whole.checkpoint), S.load_model(stopped.checkpoint)
    for part in ("model", "ema"):
        for key, tensor in one[part].items():
            assert torch.equal(tensor, other[part][key]), (part, key)
    assert not all(torch.equal(p, one["ema"][key]) for key, p in one["model"].items())
    with np.load(whole.out) as first, np.load(stopped.out) as second:
        for key in first.files:
            if key != "metadata":
                assert first[key].tobytes() == second[key].tobytes(), key
    assert not list(tmp_path.rglob("*.tmp"))

    before = stopped.out.read_bytes()
    capsys.readouterr()
    S.main(make_args(tmp_path / "stopped", resume=True))
    assert "is there already" in capsys.readouterr().out and stopped.out.read_bytes() == before


def test_nothing_is_replaced_unless_asked_for(tmp_path):
    args = make_args(tmp_path)
    S.main(args)
    files = (args.out, args.checkpoint)
    before = [path.read_bytes() for path in files]
    for changes, message in (
        ({"num_steps": 5}, "buffer.npz was made with --num-steps 4, not 5; give another --out"),
        ({"out": tmp_path / "b.npz", "lr": 0.1}, "synther.pt was trained with --lr 0.0003, not"),
        ({"out": tmp_path / "b.npz", "resume": True, "retrain": True}, "exclude each other"),
        ({"overwrite": True, "env": f"{SAMPLE}+{SAMPLE}"}, "trained on other data"),
    ):
        with pytest.raises(SystemExit, match=message) as error:
            S.main(make_args(tmp_path, **changes))
        assert "\n" not in str(error.value)
    assert [path.read_bytes() for path in files] == before
    S.main(make_args(tmp_path, num_steps=5, overwrite=True))  # the trained model stays
    assert args.checkpoint.read_bytes() == before[1] and args.out.read_bytes() != before[0]
    args.checkpoint.write_bytes(before[1][:2000])
    with pytest.raises(SystemExit, match="synther.pt: not a whole checkpoint of synther.py"):
        S.main(make_args(tmp_path, num_steps=6, overwrite=True))
    S.main(make_args(tmp_path, num_steps=6, overwrite=True, retrain=True))
    assert S.load_model(args.checkpoint)["step"] == 12


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"width": 0}, "--width 0: must be positive"),
        ({"batch_size": 0}, "--batch-size 0: must be positive"),
        ({"num_transitions": 0}, "--num-transitions 0: must be between"),
        ({"terminal_threshold": 1.5}, "--terminal-threshold 1.5: must be between"),
        ({"sigma_min": 90.0}, "--sigma-min must be less"),
        ({"s_min": 60.0}, "--s-max must not be less"),
        ({"env": "hopper-medium-replay"}, "--env hopper-medium-replay: not a folder here"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, changes, message):
    with pytest.raises(SystemExit, match=message) as error:
        S.main(make_args(tmp_path, **changes))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_model_and_buffer_are_two_files(tmp_path):
    with pytest.raises(SystemExit, match="--out and --checkpoint must be two files"):
        S.main(make_args(tmp_path, out=tmp_path / "synther.pt"))


def test_learning_rate_that_is_too_high_is_one_line(tmp_path):
    args = make_args(tmp_path, lr=1e11, train_steps=200)
    with pytest.raises(SystemExit, match="try a lower --lr"):
        S.main(args)
    assert not args.out.exists()
