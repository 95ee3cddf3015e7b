"""metrics.py: the oracle on recorded data, every metric against brute force, tables and tests."""

import csv
import json
import math
import re
import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import LABEL_B, ROOT, SAMPLE, run
from scipy import stats
from test_learners import record
from test_scripts import edit_json
from tqdm import tqdm

import metrics as M

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def own(dataset):
    """The bundled dataset's transitions, reference with mean and deviation, an oracle."""
    sample, reference = M.sample_dataset(dataset, 10**9, None), M.make_reference(dataset)
    return sample, reference, M.find_oracle(dataset, reference.std[:11])[0]


def to_buffer(sample, first, N=20, H=5):
    """Recorded transitions as N subtrajectories of H whose terminals hold a penalty."""
    part = np.s_[first : first + N * H]
    shaped = [x[part, 0].reshape(N, H, *x.shape[2:]) for x in sample[:5]]
    return M.Sample(*shaped, shaped[4].copy(), np.arange(N, dtype=np.float32))


# --- oracle ---


def test_oracle_reproduces_the_recorded_transitions(dataset, own):
    """The check of the oracle: velocities below their clip, reward and termination everywhere."""
    sample, reference, env_spec = own
    std = reference.std
    part = np.random.default_rng(0).choice(len(sample.r), 4000, replace=False)
    s, a = sample.s[part, 0], sample.a[part, 0]
    answers = M.ask_oracle(env_spec, s, a, 1, "test")
    clipped = (np.abs(s[:, 5:]) >= 10).any(1) | (np.abs(sample.s_next[part, 0, 5:]) >= 10).any(1)
    error = M.dynamic_error(sample.s_next[part, 0], answers.s_next, std[:11])
    assert (~clipped).mean() > 0.8
    assert error[~clipped].max() < 1e-6 and np.median(error) < 1e-20
    np.testing.assert_allclose(answers.r[~clipped], sample.r[part, 0][~clipped], atol=1e-6)
    assert (answers.terminal == sample.terminal[part, 0])[~clipped].all()
    assert not answers.unhealthy.any()
    shares = re.findall(r"([\d.]+)%", M.find_oracle(dataset, std[:11])[1])
    assert 80 < float(shares[0]) < 100 and 80 < float(shares[1]) <= 100


def test_several_processes_answer_as_one(own):
    sample, _, env_spec = own
    s, a = sample.s[:20_500, 0], sample.a[:20_500, 0]
    several = M.ask_oracle(env_spec, s, a, 2, "two processes")
    one = M.ask_chunk(env_spec, (s[-300:], a[-300:]))
    assert len(several.r) == 20_500
    np.testing.assert_allclose(several.s_next[-300:], one.s_next, atol=1e-9)
    np.testing.assert_allclose(several.r[-300:], one.r, atol=1e-9)


def test_a_known_change_gives_exactly_that_error(dataset, own):
    """s' moved by 0.3 deviations in every dimension, rewards by 2: error 0.09, oracle as before."""
    sample, reference, env_spec = own
    std = reference.std
    inside = (np.abs(sample.s) < 9).all((1, 2)) & (np.abs(sample.s_next) < 9).all((1, 2))
    plain = to_buffer(M.Sample(*(x[inside] for x in sample[:6]), None), 100)
    moved = plain._replace(s_next=plain.s_next + 0.3 * std[:11], r=plain.r + 2)
    s, a = plain.s.reshape(-1, 11), plain.a.reshape(-1, 3)
    answers = M.ask_oracle(env_spec, s, a, 1, "test")
    before, after = (M.measure(dataset, reference, x, answers, 1, CPU, "") for x in (plain, moved))
    assert before["dynamic MSE"] < 1e-12
    assert after["dynamic MSE"] == pytest.approx(0.09, rel=1e-5)
    assert after["dynamic MSE, median"] == pytest.approx(0.09, rel=1e-5)
    assert after["reward"] == pytest.approx(before["reward"] + 2)
    assert after["oracle reward, not penalised"] == pytest.approx(before["reward"], abs=1e-6)
    one = M.dynamic_error(np.array([[1.0, 5.0]]), np.array([[2.0, 8.0]]), np.array([2.0, 1.0]))
    assert one.tolist() == [(0.25 + 9) / 2]


@pytest.mark.parametrize(
    "env_id",
    [
        "Walker2d-v5",
        "HalfCheetah-v5",
        "Swimmer-v5",
        "InvertedPendulum-v5",
        "InvertedDoublePendulum-v5",
        "Ant-v5",
        "PointMaze_UMaze-v3",
    ],
)
def test_environments_with_an_oracle(env_id, tmp_path):
    if "Maze" in env_id:
        gym.register_envs(pytest.importorskip("gymnasium_robotics"))
    options = {"include_cfrc_ext_in_observation": False} if env_id == "Ant-v5" else {}
    folder = record(tmp_path, "test/own-v0", gym.make(env_id, **options), (40,) * 8)
    dataset = M.load_dataset(str(folder))
    sample = M.sample_dataset(dataset, 10**9, None)
    std = np.maximum(sample.s[:, 0].std(0), 1e-3)
    env_spec, _ = M.find_oracle(dataset, std)
    answers = M.ask_chunk(env_spec, (sample.s[:, 0], sample.a[:, 0]))
    error = M.dynamic_error(sample.s_next[:, 0], answers.s_next, std)
    inside = (np.abs(sample.s) < 10).all((1, 2)) & (np.abs(sample.s_next) < 10).all((1, 2))
    assert inside.sum() > 10 and error[inside].max() < 1e-6
    assert (answers.terminal == sample.terminal[:, 0])[inside].all()
    if env_id != "Ant-v5":  # its reward uses contact forces, which the observation does not hold
        np.testing.assert_allclose(answers.r[inside], sample.r[inside, 0], atol=1e-3)


@pytest.mark.parametrize("env_id", ["Pusher-v5", "Reacher-v5"])
def test_environments_without_an_oracle_say_so(env_id, tmp_path):
    folder = record(tmp_path, "test/own-v0", gym.make(env_id), (10, 10))
    dataset = M.load_dataset(str(folder))
    env_spec, said = M.find_oracle(dataset, 1.0)
    assert env_spec is None and said.startswith(f"none for {env_id}")


def test_an_oracle_that_does_not_fit_the_data_is_none(dataset, own):
    other = [e._replace(observations=e.observations + 0.1) for e in dataset.episodes[:5]]
    env_spec, said = M.find_oracle(dataset._replace(episodes=other), own[1].std[:11])
    line = "none for Hopper-v5: MuJoCo reproduces 0.0% of the recorded next states, "
    assert env_spec is None and said.startswith(line)
    other = [e._replace(rewards=e.rewards + 0.1) for e in dataset.episodes]
    env_spec, said = M.find_oracle(dataset._replace(episodes=other), own[1].std[:11])
    assert env_spec and said.endswith(" 0.0% of the rewards")


def test_a_state_that_mujoco_cannot_simulate_is_not_judged(own):
    """MuJoCo resets itself there: its answer would be that of a robot at its start."""
    sample, reference, env_spec = own
    s, a = sample.s[:5, 0].copy(), sample.a[:5, 0]
    plain = M.ask_oracle(env_spec, s, a, 1, "test")
    s[2, 7] = 1e9
    answers = M.ask_oracle(env_spec, s, a, 1, "test")
    assert np.isnan(answers.s_next[2]).all() and np.isnan(answers.r[2])
    kept = [0, 1, 3, 4]
    np.testing.assert_allclose(answers.s_next[kept], plain.s_next[kept], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "change",
    [
        {"kwargs": {"exclude_current_positions_from_observation": False}},
        {"kwargs": {"no_such_argument": 1}},
        {"id": "Hopper-v3"},
        {"id": "Unknown-v0"},
        {"additional_wrappers": [{"name": "Rescale", "entry_point": "a:b", "kwargs": {}}]},
    ],
)
def test_without_an_oracle_the_rest_is_reported(change, tmp_path, pipeline, capsys):
    shutil.copytree(SAMPLE, tmp_path / "data")
    metadata = tmp_path / "data" / "data" / "metadata.json"
    spec = json.loads(json.loads(metadata.read_text())["env_spec"]) | change
    edit_json(metadata, env_spec=json.dumps(spec))
    aug, out = (pipeline[0] / "buffer.npz",), tmp_path / "metrics.json"
    M.main(M.Args(aug=aug, env=str(tmp_path / "data"), out=out, table="markdown", device="cpu"))
    output = capsys.readouterr().out
    assert f"oracle: none for {spec['id']}" in output
    report = json.loads(out.read_text())
    own = report["numbers"][LABEL_B]
    assert "dynamic MSE" not in own and own["state novelty, raw"] > 0.01
    assert report["oracle"].startswith("none") and "| dynamic MSE (eq. 14) | - | - |" in " ".join(
        output.split()
    )


# --- metrics ---


def by_product(data, queries, rank):
    """The search of a GPU."""
    data, queries = map(torch.from_numpy, (data, queries))
    return M.nearest_by_product(data, (data**2).sum(1) / 2, queries, rank).numpy()


def test_nearest_distance_is_brute_force():
    rng = np.random.default_rng(0)
    data, queries = rng.normal(size=(300, 5)), rng.normal(size=(10_050, 5))  # in two chunks
    expected = np.sqrt(((queries[:, None] - data[None]) ** 2).sum(-1))
    expected.sort(axis=1)
    bar = tqdm(disable=True)
    for rank in (1, 2):
        tree = M.nearest_distance(data, queries, rank, CPU, bar)
        np.testing.assert_allclose(tree, expected[:, rank - 1], atol=1e-12)
        np.testing.assert_allclose(by_product(data, queries, rank), expected[:, rank - 1])
        assert by_product(data[:1], queries, rank).shape == (10_050,)
    assert (M.nearest_distance(data, data[::-1].copy(), 1, CPU, bar) == 0).all()
    assert (by_product(data, data, 1) == 0).all()
    # actions of one dimension lie dense: a product in float32 finds the wrong one here
    dense, between = rng.uniform(size=(100_000, 1)), rng.uniform(size=(300, 1))
    tree = M.nearest_distance(dense, between, 1, CPU, bar)
    np.testing.assert_allclose(by_product(dense, between, 1), tree, atol=1e-12)
    if torch.cuda.is_available():
        own = M.nearest_distance(data, queries, 2, torch.device("cuda"), bar)
        np.testing.assert_allclose(own, expected[:, 1], atol=1e-12)


def test_novelty_against_loops(dataset, own):
    sample, reference, _ = own
    std = reference.std
    few = dataset._replace(
        episodes=[M.Episode(*(x[: n + (i == 0)] for i, x in enumerate(e)))
                  for e, n in zip(dataset.episodes, (40, 25))]
    )  # fmt: skip
    rng = np.random.default_rng(0)
    plain = to_buffer(sample, 5000, N=6, H=4)
    queries = plain._replace(s=plain.s + 0.1 * rng.normal(size=plain.s.shape))
    numbers = M.novelty(reference._replace(sa=M.make_reference(few).sa), queries, 1, CPU, "")
    data = [np.concatenate([e.observations[t], e.actions[t]])
            for e in few.episodes for t in range(len(e.rewards))]  # fmt: skip
    assert len(data) == 65
    parts = {"state": range(11), "action": range(11, 14), "state-action": range(14)}
    for part, columns in parts.items():
        for units in ("raw", "standardised"):
            distances = []
            for s, a in zip(queries.s.reshape(-1, 11), queries.a.reshape(-1, 3)):
                x, best = np.concatenate([s, a]), math.inf
                for row in data:
                    scale = std if units == "standardised" else np.ones(14)
                    best = min(best, sum(((x - row)[d] / scale[d]) ** 2 for d in columns) ** 0.5)
                distances.append(best)
            name = f"{part} novelty, {units}"
            assert numbers[name] == pytest.approx(np.mean(distances), rel=1e-9)
            assert numbers[f"{name}, squared"] == pytest.approx(np.mean(np.square(distances)))


def test_a_copy_of_the_dataset_is_not_novel(dataset, own):
    sample, reference, _ = own
    numbers = M.novelty(reference, to_buffer(sample, 0), 1, CPU, "")
    assert len(numbers) == 12 and not any(numbers.values())
    spacing = M.novelty(reference, to_buffer(sample, 0), 2, CPU, "")
    data, few = reference.sa[:, :11], reference.sa[:100, :11]
    distance = np.linalg.norm(data[None] - few[:, None], axis=-1)
    distance[np.arange(100), np.arange(100)] = np.inf
    assert spacing["state novelty, raw"] == pytest.approx(distance.min(1).mean())


def test_s4rl_noise_is_what_the_learners_add(dataset, own):
    """Its dynamic MSE is that of noise in s', amplified by the dynamics for noise in s."""
    sample, reference, env_spec = own
    std, rng = reference.std[:11], np.random.default_rng(0)
    part = sample._replace(**{f: x[:4000] for f, x in sample._asdict().items() if x is not None})
    noised = M.add_state_noise(part, std, 0.01, rng)
    for field in ("s", "s_next"):
        noise = (getattr(noised, field) - getattr(part, field)) / std
        assert noise.std() == pytest.approx(0.01, rel=0.02) and abs(noise.mean()) < 1e-3
    for field in ("a", "r", "terminal"):
        assert getattr(noised, field) is getattr(part, field)
    s, a = noised.s[:, 0], noised.a[:, 0]
    answers = M.ask_oracle(env_spec, s, a, 1, "test")
    error = np.median(M.dynamic_error(noised.s_next[:, 0], answers.s_next, std))
    assert 1e-4 < error < 1e-2
    assert M.dynamic_error(noised.s_next[:, 0], part.s_next[:, 0], std).mean() == pytest.approx(
        1e-4, rel=0.05
    )


def test_the_reference_is_the_datasets(dataset):
    reference = M.make_reference(dataset)
    rows = [np.concatenate([e.observations[t], e.actions[t]])
            for e in dataset.episodes for t in range(len(e.rewards))]  # fmt: skip
    np.testing.assert_array_equal(reference.sa, rows)
    np.testing.assert_allclose(reference.mean, np.mean(rows, axis=0))
    np.testing.assert_allclose(reference.std, np.std(rows, axis=0))


def test_shares_rewards_and_controllability(dataset, own):
    sample, reference, _ = own
    buffer = to_buffer(sample, 0, N=30, H=4)
    buffer.terminal[:] = False
    buffer.terminal[3, -1] = buffer.penalised[3, -1] = True
    buffer.r[3, -1] = -100.0
    buffer.a[:] = 0.2
    buffer.a[0, 0] = [1.0, -1.0, 0.5]
    answers = M.Answers(
        buffer.s_next.reshape(-1, 11) + 1.0,
        np.arange(120.0),
        np.arange(120) == 5,
        (np.arange(120) < 12) * 1.0,
    )
    numbers = M.measure(dataset, reference, buffer, answers, 1, CPU, "")
    kept = [n for n in range(30) if n != 3]
    assert numbers["terminal"] == 1 / 120 and numbers["oracle terminal"] == 1 / 120
    assert numbers["unhealthy states"] == 0.1
    assert numbers["actions at a bound"] == pytest.approx(2 / 360)
    rewards = [buffer.r[n, h] for n in range(30) for h in range(4) if (n, h) != (3, 3)]
    assert numbers["reward"] == pytest.approx(np.mean(rewards))
    assert numbers["oracle reward"] == pytest.approx(sum(range(120)) / 120)
    expected = (sum(range(120)) - 15) / 119
    assert numbers["oracle reward, not penalised"] == pytest.approx(expected)
    assert numbers["dynamic MSE"] == pytest.approx(np.mean(1 / reference.std[:11] ** 2))
    plain = buffer._replace(penalised=np.zeros_like(buffer.penalised))
    unpenalised = M.measure(dataset, reference, plain, answers, 1, CPU, "")
    assert unpenalised["reward"] == pytest.approx(buffer.r.mean())
    returns = buffer.r.sum(1)[kept]
    expected = stats.pearsonr(buffer.condition[kept], returns).statistic
    assert numbers["controllability"] == pytest.approx(expected)


def test_samples_are_whole_subtrajectories_of_the_buffer(dataset, pipeline):
    path = pipeline[0] / "buffer.npz"
    with np.load(path, allow_pickle=False) as file:
        buffer = dict(file)
    read, metadata = M.read_buffer(path)
    sample = M.sample_buffer(read, metadata, dataset.env_id, 10**6, None)
    read["terminals"][1, 2] = True
    for change, penalised in (
        ({}, 1),
        ({"restore_terminal_reward": True}, 0),
        ({"method": "mine"}, 0),
    ):
        own = M.sample_buffer(read, metadata | change, dataset.env_id, 10**6, None)
        assert own.penalised.sum() == penalised and own.terminal.sum() == 1
    assert not M.sample_buffer(read, metadata, "PointMaze_UMaze-v3", 10**6, None).penalised.any()
    assert M.describe_buffer(metadata) == LABEL_B and metadata["horizon"] == 7
    for n in (0, 17, 39):
        for h in range(7):
            np.testing.assert_array_equal(sample.s[n, h], buffer["observations"][n, h])
            np.testing.assert_array_equal(sample.s_next[n, h], buffer["observations"][n, h + 1])
            np.testing.assert_array_equal(sample.a[n, h], buffer["actions"][n, h])
            assert sample.r[n, h] == buffer["rewards"][n, h]
    fewer = M.sample_buffer(read, metadata, dataset.env_id, 50, np.random.default_rng(0))
    assert fewer.r.shape == (8, 7)
    rows = {row.tobytes() for row in buffer["rewards"]}
    assert len({row.tobytes() for row in fewer.r} & rows) == 8
    few = M.sample_dataset(dataset, 300, np.random.default_rng(0))
    assert few.s.shape == (300, 1, 11) and len(np.unique(few.s[:, 0], axis=0)) == 300
    first = {e.observations[0].tobytes() for e in dataset.episodes[:2]}
    assert not first & {row.tobytes() for row in few.s[:, 0]}  # not simply the first ones
    assert not np.array_equal(fewer.r, read["rewards"][:8])


def test_the_figure_shows_the_numbers(dataset, own, tmp_path):
    """Histograms of dataset, generated and oracle returns; condition against generated return."""
    sample, reference, _ = own
    buffer = to_buffer(sample, 3000, N=200, H=5)
    answers = M.Answers(None, np.arange(1000.0) / 500, None, None)
    kept = ~buffer.penalised.any(axis=1)
    assert 190 < kept.sum() < 200
    figure = M.draw_figure(tmp_path / "a.png", dataset, {"x": buffer}, {"x": answers})
    left, right = figure.axes
    assert left.get_title() == "x" and [t.get_text() for t in left.get_legend().texts] == [
        "dataset", "generated", "oracle"
    ]  # fmt: skip
    returns = [
        M.dataset_returns(dataset, 5), buffer.r.sum(1)[kept], answers.r.reshape(200, 5).sum(1)[kept]
    ]  # fmt: skip
    grey, *outlines = np.split(np.array(left.patches, object), [len(left.patches) - 2])
    edges = [p.get_x() for p in grey] + [grey[-1].get_x() + grey[-1].get_width()]
    for i, values in enumerate(returns):
        expected = np.histogram(values, edges, density=True)[0]
        if i == 0:
            drawn = [p.get_height() for p in grey]
        else:
            drawn = outlines[0][i - 1].get_xy()[1:-1:2, 1]
        np.testing.assert_allclose(drawn, expected, rtol=1e-6)
    assert right.get_title() == (
        f"Pearson's r = {np.corrcoef(buffer.condition[kept], buffer.r.sum(1)[kept])[0, 1]:.2f}"
    )
    points = right.collections[0].get_offsets()
    expected = np.stack([buffer.condition, buffer.r.sum(1)], axis=1)[kept]
    np.testing.assert_allclose(sorted(points.tolist()), sorted(expected.tolist()), rtol=1e-6)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_figure_shows_what_lies_beyond_the_dataset(dataset, own, tmp_path):
    """The bins reach as far as a small buffer does; one without a plain return is drawn, too."""
    buffer = to_buffer(own[0], 3000, N=200, H=5)
    far = buffer._replace(r=buffer.r + 50.0, penalised=np.zeros_like(buffer.penalised))
    nothing = buffer._replace(penalised=np.ones_like(buffer.penalised))
    samples, answers = {"far": far, "nothing": nothing}, {"far": None, "nothing": None}
    axes = M.draw_figure(tmp_path / "a.png", dataset, samples, answers).axes
    (outline,) = (patch for patch in axes[0].patches if not hasattr(patch, "get_x"))
    edges = outline.get_xy()[:, 0]
    assert edges.max() > np.quantile(far.r.sum(1), 0.99)
    assert edges.min() < np.quantile(M.dataset_returns(dataset, 5), 0.01)


def test_returns_of_the_datasets_windows(dataset):
    few = dataset._replace(episodes=dataset.episodes[:2])
    expected = [e.rewards[t : t + 31].sum()
                for e in few.episodes for t in range(len(e.rewards) - 30)]  # fmt: skip
    np.testing.assert_allclose(M.dataset_returns(few, 31), expected)


# --- the command ---


def test_the_command_prints_and_writes_all_numbers(pipeline, tmp_path):
    path = pipeline[0] / "buffer.npz"
    (tmp_path / "copy.npz").write_bytes(path.read_bytes())
    flags = ["--aug", path, "copy.npz", "--plot", "figure.png", "--num-transitions", 140]
    flags += ["--s4rl-sigma", 3e-4]
    output = run(ROOT / "metrics.py", *flags, cwd=tmp_path).stdout
    report = json.loads((tmp_path / "metrics.json").read_text())
    name, copy = (f"{LABEL_B} {file}" for file in (path, "copy.npz"))
    assert list(report["numbers"]) == ["dataset", name, copy, "s4rl(0.0003)"]
    assert 0 < report["numbers"]["s4rl(0.0003)"]["dynamic MSE, median"] < 1e-4
    assert report["numbers"][name] == report["numbers"][copy]  # its place does not matter
    assert report["dataset_ids"] == ["hopper-medium-sample-v0"] and report["oracle"].startswith(
        "MuJoCo"
    )
    assert report["args"]["aug"] == [str(path), "copy.npz"]
    assert report["buffers"][name]["mu"] == 0.5 and report["buffers"][name]["file"] == str(path)
    own = report["numbers"][name]
    assert own["transitions"] == 140 and report["numbers"]["dataset"]["transitions"] == 140
    assert report["numbers"]["dataset"]["dynamic MSE, median"] < 1e-20
    assert report["numbers"]["dataset"]["state-action novelty, standardised"] > 0
    assert own["dynamic MSE"] > 0.01 and own["state novelty, raw"] > 0.01
    lines = [line.split("  ") for line in output.splitlines()]
    lines = {line[0]: [cell for cell in line[1:] if cell] for line in lines}
    for key, title in M.SCREEN.items():
        expected = [M.show(report["numbers"][column].get(key)) for column in report["numbers"]]
        assert [cell.strip() for cell in lines[title]] == expected
    assert set(own) >= set(M.SCREEN)
    assert len(lines["state novelty (eq. 15)"]) == 4
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda b: b | {"rewards": b["rewards"] * np.nan}, "rewards are not all finite"),
        (lambda b: b | {"actions": b["actions"][:, :, :2]}, "have [11, 2] dimensions, not [11, 3]"),
        (lambda b: {k: v if k == "metadata" else v[:0] for k, v in b.items()}, "is empty"),
        (lambda b: {"x": b["rewards"]}, "lacks metadata in JSON"),
        (lambda b: b | {"condition": b["condition"][:3]}, "do not fit together"),
        (lambda b: b | {"metadata": str(b["metadata"]).replace('"gta"', "3")}, "lacks method"),
        (lambda b: b | {"metadata": str(b["metadata"]).replace("-sample-v0", "-other-v0")},
         "made from hopper-medium-other-v0, which contradicts --env, hopper-medium-sample-v0"),
    ],
)  # fmt: skip
def test_bad_buffers_are_one_line(pipeline, tmp_path, dataset, damage, message):
    with np.load(pipeline[0] / "buffer.npz", allow_pickle=False) as file:
        np.savez(tmp_path / "bad.npz", **damage(dict(file)))
    with pytest.raises(SystemExit, match=re.escape(message)) as error:
        M.require_fit("bad.npz", *M.read_buffer(tmp_path / "bad.npz"), dataset)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "give either --aug buffer.npz or --runs runs/*"),
        (["--aug", "a.npz", "--runs", "b"], "give either --aug buffer.npz or --runs runs/*"),
        (["--aug", "missing.npz"], "--aug missing.npz: no such file"),
        (["--aug", ROOT / "README.md"], "not a whole buffer.npz"),
        (["--aug", "a.npz", "--num-transitions", "0"], "--num-transitions 0: must be positive"),
        (["--aug", "a.npz", "--out", "none/m.json"], "none/m.json: no folder none"),
        (["--runs", "."], "--runs .: not a folder of a run"),
        (["--runs", "a", "--plot", "b.png"], "--runs goes with neither --plot nor --env"),
        (["--aug", "a.npz", "--plot", "b.xyz"], "--plot b.xyz: must end in .png, .pdf or .svg"),
        (["--aug", "a.npz", "--out", "."], "--out .: must end in .json"),
        (["--aug", "a.npz", "--out", "a.npz"], "--out a.npz: must end in .json"),
        (["--aug", "a.npz", "--seed", "-1"], "--seed -1: must be between 0 and"),
    ],
)
def test_bad_flags_are_one_line(flags, message, tmp_path):
    result = run(ROOT / "metrics.py", *flags, cwd=tmp_path, code=1)
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


# --- runs ---

TABLE_20 = [  # means and deviations of SynthER and GTA over 8 seeds, and the paper's p
    ("TD3BC", (78.64, 2.38), (84.63, 2.20), "0.0001"),
    # the paper's Table 20 heads the next two IQL and CQL; in its Table 1 they are CQL's and IQL's
    ("IQL", (81.20, 1.46), (85.27, 1.02), "0.0000"),
    ("CQL", (81.97, 2.21), (86.11, 0.94), "0.0008"),
    ("MCQ", (82.81, 3.21), (85.91, 1.05), "0.0303"),
]


@pytest.mark.parametrize("column, synther, gta, p", TABLE_20, ids=[row[0] for row in TABLE_20])
def test_welch_is_table_20(column, synther, gta, p):
    assert f"{M.welch_test(*synther, 8, *gta, 8)[2]:.4f}" == p


def test_welch_is_scipys():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=5), rng.normal(0.7, 2, size=9)
    t, df, p = M.welch_test(a.mean(), a.std(ddof=1), 5, b.mean(), b.std(ddof=1), 9)
    expected = stats.ttest_ind(b, a, equal_var=False)
    assert (t, df, p) == pytest.approx((expected.statistic, expected.df, expected.pvalue))
    assert math.isnan(M.welch_test(1.0, 0.0, 3, 1.0, 0.0, 3)[2])


def write_run(root, algorithm, aug, env, scores, time="20260101-000000-000000", last=10):
    folder = root / f"{algorithm}-{env}-{re.sub('[^a-z0-9]+', '_', aug)}-0-{time}"
    folder.mkdir(parents=True)
    config = {"script": algorithm, "aug_label": aug, "dataset": env, "train_steps": 10}
    config |= {"num_seeds": len(scores)}
    (folder / "config.json").write_text(json.dumps(config))
    with open(folder / "evals.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["update", "seed", "return", "score"])
        for step in (5, last):
            for seed, score in scores.items():
                writer.writerow([step, seed, 0.0, score if step == last else -1])
    return folder


def test_runs_are_tabulated_as_the_paper_does(tmp_path, capsys):
    gta = "gta(mu 0.25, alpha 1.1)"
    scores = {
        ("none", "hopper"): {0: 60.0, 1: 62.0, 2: 70.0},
        ("none", "walker"): {0: 80.0, 1: 84.0, 2: 79.0},
        (gta, "hopper"): {0: 75.0, 1: 71.0, 2: 73.0},
        (gta, "walker"): {0: 90.0, 1: 85.0, 2: 88.0},
    }
    folders = [write_run(tmp_path, "iql", *key, own) for key, own in scores.items()]
    folders.append(write_run(tmp_path, "cql", "none", "hopper", {0: 50.0}))
    folders.append(write_run(tmp_path, "cql", gta, "hopper", {0: 1.0}, last=7))  # not at its end
    later = "20260102-000000-000000"  # of a folder whose name comes first
    folders.append(write_run(tmp_path, "cql", "none", "hopper", {0: 55.0, 1: 57.0}, later))
    M.tabulate_runs(M.Args(runs=tuple(reversed(folders))))
    output, notes = (text.splitlines() for text in capsys.readouterr())
    assert notes[0].startswith("left out: ") and notes[0].endswith("is at update 7 of 10")
    find = lambda start: next(line for line in output if line.startswith(start))  # noqa: E731
    where = "cql + none, hopper: seed 0 counts as in the later "
    assert notes[1].startswith(where) and notes[1].endswith("-20260102-000000-000000")
    assert "hopper" in output[0] and "walker" in output[0] and "average" in output[0]
    assert "56.0 +- 1.0 (2)" in find("cql  ") and find("cql  ").split()[-1] == "-"
    expected = [np.mean([scores[gta, env][seed] for env in ("hopper", "walker")])
                for seed in range(3)]  # fmt: skip
    average = f"{np.mean(expected):.1f} +- {np.std(expected):.1f} (3)"
    assert find(f"iql + {gta}").endswith(average)
    a, b = (list(scores[aug, "hopper"].values()) for aug in ("none", gta))
    p = stats.ttest_ind(b, a, equal_var=False).pvalue
    (line,) = [line for line in output if f"iql: {gta} against none" in line and "hopper" in line]
    assert line.endswith(f"{p:.4f}")
    assert sum(f"iql: {gta} against none" in line for line in output) == 3


def test_runs_that_do_not_belong_are_named(tmp_path, capsys):
    """Left out: no evaluation yet, a seed that lacks, evaluated only. Named: other settings."""
    folders = [write_run(tmp_path, "iql", "none", "hopper", {0: 60.0, 1: 62.0}, f"2026-{n}-0")
               for n in range(5)]  # fmt: skip
    (folders[0] / "evals.csv").unlink()
    edit_config(folders[1], num_seeds=3)
    edit_config(folders[2], train_steps=0)
    edit_config(folders[4], batch_size=7, eval_workers=2)  # the latter makes no difference
    table = M.collect_runs(folders)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"left out: {folders[0]} is at update 0 of 10"
    assert lines[1].startswith(f"left out: {folders[1]}")
    assert lines[2] == f"left out: {folders[2]} was only evaluated"
    assert "seed 0, 1 counts as in the later" in lines[3]
    assert lines[4] == f"iql + none, hopper: runs differ in batch_size; {folders[4]}"
    assert table == {("iql", "none"): {"hopper": {0: 60.0, 1: 62.0}}} and len(lines) == 5


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_an_average_needs_the_same_seeds():
    scores = {"a": {0: 10.0, 1: 30.0}, "b": {1: 50.0, 0: 20.0}, "c": {0: 1.0}}
    assert M.average_scores(scores, ["a", "b"]).tolist() == [15.0, 40.0]
    assert not len(M.average_scores(scores, ["a", "b", "c"]))
    assert not len(M.average_scores(scores, ["a", "d"]))


def test_runs_of_the_learners_are_read(pipeline, capsys):
    folders = tuple(sorted((pipeline[0] / "runs").iterdir()))
    M.tabulate_runs(M.Args(runs=folders))
    output = capsys.readouterr().out
    for path in folders:
        config = json.loads((path / "config.json").read_text())
        with open(path / "evals.csv") as file:
            scores = [float(row["score"]) for row in csv.DictReader(file) if row["update"] == "6"]
        row = "td3bc" + ("" if config["aug_label"] == "none" else f" + {config['aug_label']}")
        line = next(line for line in output.splitlines() if line.startswith(row + "  "))
        assert line.endswith(f"{np.mean(scores):.1f} +- {np.std(scores):.1f} ({len(scores)})")


def test_tables_in_three_forms():
    rows = [["a_b", "x", "y"], ["50 %", "1.0 +- 2.0", "-"]]
    assert M.render(rows, "text") == "a_b            x  y\n50 %  1.0 +- 2.0  -"
    markdown = M.render(rows, "markdown").splitlines()
    assert markdown[1] == "|---|---:|---:|" and markdown[2] == "| 50 % | 1.0 +- 2.0 | - |"
    latex = M.render(rows, "latex").splitlines()
    assert latex[0] == r"\begin{tabular}{lrr}" and latex[-1] == r"\end{tabular}"
    assert latex[1] == r"a\_b & x & y \\" and latex[3] == r"50 \% & 1.0 $\pm$ 2.0 & - \\"
