"""metrics.py: the oracle on recorded data, every metric against brute force, tables and tests."""

import itertools
import json
import os
import re
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, run, write_minari
from scipy import stats

import metrics as M


@pytest.fixture(scope="module")
def own():
    """The bundled dataset, its transitions, reference and oracle."""
    (dataset,) = M.open_datasets(M.DEFAULT_ENV)
    episodes = M.load_episodes([dataset])
    sample, reference = M.sample_dataset(episodes, 10**9, None), M.make_reference(episodes)
    std, space = reference[2][:11], dataset.action_space
    oracle, said = M.find_oracle(dataset, episodes, std)
    return SimpleNamespace(**locals())


def to_buffer(sample, first, N=20, H=5):
    """Recorded transitions as N subtrajectories of H whose terminals hold a penalty."""
    part = np.s_[first : first + N * H]
    shaped = [x[part, 0].reshape(N, H, *x.shape[2:]) for x in sample[:5]]
    return M.Sample(*shaped, shaped[4].copy(), np.arange(N, dtype=np.float32))


def record(folder, env, **changes):
    """Writes a dataset of random actions: eight episodes of 40 steps, shorter where they end."""
    env.action_space.seed(0)
    episodes = []
    for seed in range(8):
        states, rows = [env.reset(seed=seed)[0]], []
        while len(rows) < 40 and not (rows and rows[-1][2]):
            a = env.action_space.sample()
            s, r, terminated, _, _ = env.step(a)
            states.append(s)
            rows.append((a, r, terminated))
        is_dict = isinstance(s, dict)
        states = {key: np.array([x[key] for x in states]) for key in s} if is_dict else states
        episodes.append((states, *map(np.array, zip(*rows))))
    arguments = {"env_spec": env.spec, "action_space": env.action_space, **changes}
    return str(write_minari(folder / "own", episodes, env.observation_space, **arguments))


def find_oracle(folder):
    """Returns the transitions of a dataset, their deviation, the oracle, and what is said."""
    datasets = M.open_datasets(folder)
    episodes = M.load_episodes(datasets)
    sample = M.sample_dataset(episodes, 10**9, None)
    std = np.maximum(sample.s[:, 0].std(0), 1e-3)
    return sample, std, *M.find_oracle(datasets[0], episodes, std)


def test_oracle_reproduces_the_recorded_transitions(own):
    """The check of the oracle: velocities below their clip, reward and termination everywhere."""
    part = np.random.default_rng(0).choice(len(own.sample.r), 4000, replace=False)
    s, a, r, s_next, terminal = (x[part, 0] for x in own.sample[:5])
    answers = M.ask_oracle(own.oracle, s, a, "test")
    clipped = (np.abs(s[:, 5:]) >= 10).any(1) | (np.abs(s_next[:, 5:]) >= 10).any(1)
    error = M.dynamic_error(s_next, answers.s_next, own.std)
    assert (~clipped).mean() > 0.8
    assert error[~clipped].max() < 1e-6 and np.median(error) < 1e-20
    np.testing.assert_allclose(answers.r[~clipped], r[~clipped], atol=1e-6)
    assert (answers.terminal == terminal)[~clipped].all() and not answers.unhealthy.any()
    assert re.fullmatch(r"MuJoCo reproduces 8.\.\d% of the recorded .* 8.\.\d% of.*", own.said)
    # a state that MuJoCo cannot simulate is not judged: it would answer for a robot at its start
    s[2, 7], answers.s_next[2], answers.r[2] = 1e9, np.nan, np.nan
    for x, y in zip(M.ask_oracle(own.oracle, s[:5], a[:5], "test")[:2], answers):
        np.testing.assert_allclose(x, y[:5], rtol=0, atol=1e-12)


def test_a_known_change_gives_exactly_that_error(own):
    """s' moved by 0.3 deviations in every dimension, rewards by 2: error 0.09, oracle as before."""
    inside = (np.abs(own.sample.s) < 9).all((1, 2)) & (np.abs(own.sample.s_next) < 9).all((1, 2))
    plain = to_buffer(M.Sample(*(x[inside] for x in own.sample[:6]), None), 100)
    moved = plain._replace(s_next=plain.s_next + 0.3 * own.std, r=plain.r + 2)
    answers = M.ask_oracle(own.oracle, plain.s.reshape(-1, 11), plain.a.reshape(-1, 3), "test")
    before, after = (M.measure(x, answers, own.std, own.space) for x in (plain, moved))
    assert before["dynamic MSE"] < 1e-12 and after["dynamic MSE"] == pytest.approx(0.09, rel=1e-5)
    assert after["reward"] == pytest.approx(before["reward"] + 2)
    assert after["oracle reward, not penalised"] == pytest.approx(before["reward"], abs=1e-6)


@pytest.mark.parametrize("env_id", ["Walker2d-v5", "HalfCheetah-v4", "PointMaze_UMaze-v3"])
def test_environments_with_an_oracle(env_id, tmp_path):
    if "Maze" in env_id:
        gym.register_envs(pytest.importorskip("gymnasium_robotics"))
    sample, std, oracle, _ = find_oracle(record(tmp_path, gym.make(env_id)))
    answers = M.ask_oracle(oracle, sample.s[:, 0], sample.a[:, 0], "test")
    error = M.dynamic_error(sample.s_next[:, 0], answers.s_next, std)
    inside = (np.abs(sample.s) < 10).all((1, 2)) & (np.abs(sample.s_next) < 10).all((1, 2))
    assert inside.sum() > 10 and error[inside].max() < 1e-6
    assert (answers.terminal == sample.terminal[:, 0])[inside].all()
    np.testing.assert_allclose(answers.r[inside], sample.r[inside, 0], atol=1e-3)


SPEC = json.loads(gym.spec("Hopper-v5").to_json())
WRAPPED = SPEC | {"additional_wrappers": [{"name": "Log", "entry_point": "a:b", "kwargs": None}]}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"env_spec": WRAPPED}, "MuJoCo reproduces "),
        ({"env_spec": None}, "none, own-v0 names no environment"),
        ({"env_spec": SPEC | {"id": "Mine-v0"}}, "none for Mine-v0 (Environment `Mine` doesn't"),
        ({"env_spec": SPEC | {"id": "os:Mine-v0"}}, "none for os:Mine-v0 ("),
        ({"env_spec": SPEC | {"kwargs": {"frame_skip": 5}}}, "none, MuJoCo reproduces 0.0% of the"),
        ({"env_spec": SPEC | {"id": "Pusher-v5"}}, "none, the actions of own-v0 are Box(-1.0, 1.0"),
        ({"action_space": gym.spaces.Box(-9, 9, (3,))}, "none, the actions of own-v0 are Box(-9.0"),
    ],
)
def test_what_has_no_oracle_says_so(changes, message, tmp_path, capsys):
    """Wrapped; unnamed, unregistered, code of a file's own, other dynamics, other actions."""
    *_, oracle, said = find_oracle(record(tmp_path, gym.make("Hopper-v5"), **changes))
    assert (oracle is None) == message.startswith("none") and said.startswith(message), said
    assert ("without the wrappers Log\n" in capsys.readouterr().out) == (oracle is not None)


@pytest.mark.parametrize("dims, rank", [(1, 1), (5, 1), (5, 2)])
def test_nearest_distance_is_brute_force(dims, rank):
    """Actions of one dimension lie dense: a product in float32 would find the wrong one."""
    rng = np.random.default_rng(0)
    data, queries = (rng.normal(size=(n, dims)) for n in (500, 10_050))  # in two chunks
    expected = np.linalg.norm(queries[:, None] - data[None], axis=-1)
    expected = np.sort(expected, axis=1)[:, rank - 1]
    by_product = M.nearest_by_product(*map(torch.from_numpy, (data, queries)), rank)  # of a GPU
    np.testing.assert_allclose(by_product, expected, atol=1e-12)
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        found = M.nearest_distance(data, queries, rank, device)
        np.testing.assert_allclose(found, expected, atol=1e-12)
        assert (M.nearest_distance(data, data[::-1].copy(), 1, device) == 0).all()


def test_novelty_against_loops(own):
    sa, mean, std = own.reference
    rng, data, sample = np.random.default_rng(0), sa[4990:5060], to_buffer(own.sample, 5000, 6, 4)
    sample = sample._replace(s=sample.s + 0.1 * rng.normal(size=sample.s.shape))
    numbers = M.novelty((data, mean, std), sample, 1, "cpu")
    rows = [np.concatenate(x) for x in zip(sample.s.reshape(-1, 11), sample.a.reshape(-1, 3))]
    parts = {"state": range(11), "action": range(11, 14), "state-action": range(14)}
    for part, units in itertools.product(parts, ("raw", "standardised")):
        scale, distances = np.ones(14) if units == "raw" else std, []
        for x in rows:
            squares = [sum(((x - y)[d] / scale[d]) ** 2 for d in parts[part]) for y in data]
            distances.append(min(squares) ** 0.5)
        name = f"{part} novelty, {units}"
        assert numbers[name] == pytest.approx(np.mean(distances), rel=1e-9)
        assert numbers[f"{name}, squared"] == pytest.approx(np.mean(np.square(distances)))


def test_a_copy_of_the_dataset_is_not_novel(own):
    copy, data = to_buffer(own.sample, 0), own.reference[0][:, :11]
    numbers = M.novelty(own.reference, copy, 1, "cpu")
    assert len(numbers) == 12 and not any(numbers.values())
    distance = np.linalg.norm(data[None] - data[:100, None], axis=-1)
    distance[np.arange(100), np.arange(100)] = np.inf
    spacing = M.novelty(own.reference, copy, 2, "cpu")["state novelty, raw"]
    assert spacing == pytest.approx(distance.min(1).mean())


def test_the_reference_and_s4rl_are_the_datasets(own):
    rows = np.concatenate([np.hstack([e.observations[:-1], e.actions]) for e in own.episodes])
    for x, y in zip(own.reference, (rows, rows.mean(0), rows.std(0))):
        np.testing.assert_allclose(x, y)
    noised = M.add_state_noise(own.sample, own.std, 0.01, np.random.default_rng(0))
    for x, y in zip((noised.s, noised.s_next), (own.sample.s, own.sample.s_next)):
        np.testing.assert_allclose(((x - y) / own.std).std((0, 1)), 0.01, rtol=0.02)


def test_shares_rewards_and_controllability(own):
    buffer, number = to_buffer(own.sample, 0, N=30, H=4), np.arange(120.0)
    buffer.terminal[:] = False
    buffer.terminal[3, -1] = buffer.penalised[3, -1] = True
    buffer.r[3, -1] = -100.0
    buffer.a[:] = 0.2
    buffer.a[0, 0] = [1.0, -1.0, 0.5]
    answers = M.Answers(buffer.s_next.reshape(-1, 11), number, number == 5, (number < 12) * 1.0)
    numbers = M.measure(buffer, answers, own.std, own.space)
    assert numbers["terminal"] == numbers["oracle terminal"] == 1 / 120
    assert numbers["unhealthy states"] == 0.1
    assert numbers["actions at a bound"] == pytest.approx(2 / 360)
    rewards = [buffer.r[n, h] for n in range(30) for h in range(4) if (n, h) != (3, 3)]
    assert numbers["reward"] == pytest.approx(np.mean(rewards))
    assert numbers["oracle reward"] == pytest.approx(number.mean())
    assert numbers["oracle reward, not penalised"] == pytest.approx((number.sum() - 15) / 119)
    kept = np.arange(30) != 3
    expected = stats.pearsonr(buffer.condition[kept], buffer.r.sum(1)[kept]).statistic
    assert numbers["controllability"] == pytest.approx(expected)


def test_samples_are_whole_subtrajectories_of_the_buffer(own, pipeline):
    buffer, metadata = M.read_buffer(pipeline / "buffer.npz")
    buffer["terminals"][1, 2] = True
    no_penalty = {"diffusion": metadata["diffusion"] | {"terminal_penalty": 0.0}}
    for change in ({"restore_terminal_reward": True}, no_penalty, {}):
        sample = M.sample_buffer(buffer, metadata | change, 10**6, None)
        assert (sample.penalised == (sample.terminal & (not change))).all()
    s, r = buffer["observations"], buffer["rewards"]
    for x, y in zip(sample, (s[:, :7], buffer["actions"], r, s[:, 1:], buffer["terminals"])):
        np.testing.assert_array_equal(x, y)
    fewer = M.sample_buffer(buffer, metadata, 50, np.random.default_rng(0)).r
    assert fewer.shape == (8, 7) and not np.array_equal(fewer, r[:8])
    assert len({x.tobytes() for x in fewer} & {x.tobytes() for x in r}) == 8
    few = M.sample_dataset(own.episodes, 300, np.random.default_rng(0)).s
    assert few.shape == (300, 1, 11) and len(np.unique(few[:, 0], axis=0)) == 300


def test_the_figure_shows_the_numbers(own):
    """Histograms of dataset, generated and oracle returns; condition against generated return."""
    buffer, oracle = to_buffer(own.sample, 3000, N=200, H=5), np.arange(1000.0) / 500
    answers = {"x": M.Answers(None, oracle, None, None)}
    left, right = M.draw_figure(own.episodes, {"x": buffer}, answers).axes
    points = np.stack([buffer.condition, buffer.r.sum(1)])[:, ~buffer.penalised.any(axis=1)]
    assert right.get_title() == f"Pearson's r = {np.corrcoef(points)[0, 1]:.2f}"
    drawn = right.collections[0].get_offsets().tolist()
    np.testing.assert_allclose(sorted(drawn), sorted(points.T.tolist()), rtol=1e-6)
    returns = [e.rewards[t : t + 5].sum() for e in own.episodes for t in range(len(e.rewards) - 4)]
    *bars, line, _ = left.patches
    edges = line.get_xy()[::2, 0][: len(bars) + 1]
    drawn = [bar.get_height() for bar in bars], line.get_xy()[1:-1:2, 1]
    for x, y in zip((returns, points[1]), drawn):
        np.testing.assert_allclose(y, np.histogram(x, edges, density=True)[0], rtol=1e-6)


def test_the_command_prints_and_writes_all_numbers(pipeline, tmp_path):
    path, script = pipeline / "buffer.npz", ROOT / "metrics.py"
    (tmp_path / "b.npz").write_bytes(path.read_bytes())
    flags = ["--aug", path, "b.npz", "--num-transitions", 140, "--s4rl-sigma", 3e-4]
    output = run(script, *flags, "--plot", "a.png", cwd=tmp_path).stdout
    report, metadata = json.loads((tmp_path / "metrics.json").read_text()), M.read_buffer(path)[1]
    label = metadata["label"]
    assert list(report["numbers"]) == ["dataset", label, f"{label} b.npz", "s4rl(0.0003)"]
    assert report["buffers"][label] == {**metadata, "file": str(path)}
    dataset, own, copy, s4rl = report["numbers"].values()
    assert own == copy and own["transitions"] == dataset["transitions"] == 140
    assert dataset["dynamic MSE, median"] < 1e-20 < s4rl["dynamic MSE, median"] < 1e-4
    rows = {key: cells for key, *cells in (re.split("  +", x) for x in output.splitlines())}
    assert rows["controllability"][0] == "-" and len(own) == 24
    for key, number in own.items():
        assert float(rows[key][1]) == pytest.approx(number, rel=1e-3)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.png", "b.npz", "metrics.json"]
    stderr = run(script, *flags, "--seed", 1, cwd=tmp_path, ok=False).stderr
    assert "metrics.json was made with seed 0; choose another --out" in stderr
    env = os.environ | {"MUJOCO_GL": "nonsense"}
    output = run(script, *flags[:5], "--out", "c.json", cwd=tmp_path, env=env).stdout
    assert "oracle: none for Hopper-v5, MUJOCO_GL is nonsense (" in output


def test_what_is_there_is_never_replaced_by_something_else(pipeline, tmp_path, monkeypatch):
    """The same flags make metrics.json anew, also with a figure or in another form."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(M, "find_oracle", lambda *_: (None, "none"))
    buffer, metadata = M.read_buffer(pipeline / "buffer.npz")
    np.savez("a.npz", **buffer, metadata=json.dumps(metadata))
    flags = {"aug": ("a.npz",), "num_transitions": 20, "device": "cpu"}
    for changes in ({"plot": "a.png"}, {}, {"plot": "a.png"}, {"table": "latex"}):
        M.main(M.Args(**flags, **changes))
    np.savez("few.npz", metadata=json.dumps(metadata))
    buffer["observations"] = buffer["observations"][:, 1:]
    np.savez("short.npz", **buffer, metadata=json.dumps(metadata))
    before = {x.name: x.read_bytes() for x in tmp_path.iterdir()}
    for changes, message in (
        ({"out": "a.npz"}, "--out a.npz: no file of metrics.py; choose another --out"),
        ({"out": "b.json", "plot": "a.png"}, "--plot a.png is there, of other flags"),
        ({"out": "b.json", "aug": ("short.npz",)}, "s, a, r, s' are [(3, 6, 11), (3, 7, 3), (3, 7"),
        ({"out": "b.json", "aug": ("few.npz",)}, "few.npz: its arrays do not fit together ('act"),
    ):
        with pytest.raises(SystemExit, match=re.escape(message)):
            M.main(M.Args(**flags | changes))
    assert {x.name: x.read_bytes() for x in tmp_path.iterdir()} == before


def write_run(root, algorithm, aug, env, scores, last=10, **changes):
    """Writes what a learner writes; scores [agents] are those of the last evaluation."""
    folder = root / f"{len(list(root.iterdir()))}"
    folder.mkdir()
    config = {"script": algorithm, "aug_label": aug, "env": env, "train_steps": 10, "seed": 0}
    config |= {"num_seeds": len(scores), "batch_size": 256, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [f"{step},{i},0,{x}\n" for step in (5, last) for i, x in enumerate(scores)]
    (folder / "evals.csv").write_text("".join(["update,agent,return,score\n", *rows]))
    return str(folder)


TABLE_20 = {  # means and deviations of SynthER and GTA over 8 seeds, and the paper's p
    "TD3BC": ((78.64, 2.38), (84.63, 2.20), "0.0001"),
    # the paper's Table 20 heads the next two IQL and CQL; in its Table 1 they are CQL's and IQL's
    "IQL": ((81.20, 1.46), (85.27, 1.02), "0.0000"),
    "CQL": ((81.97, 2.21), (86.11, 0.94), "0.0008"),
    "MCQ": ((82.81, 3.21), (85.91, 1.05), "0.0303"),
}


@pytest.mark.parametrize("column", TABLE_20)
def test_welch_is_table_20(column, tmp_path, capsys):
    """Of eight scores with these moments. The test's deviations are over n - 1."""
    synther, gta, expected = TABLE_20[column]
    z = np.array([-1.5, -1, -0.5, 0, 0, 0.5, 1, 1.5])
    x, y = (mean + std * z / z.std(ddof=1) for mean, std in (gta, synther))
    runs = write_run(tmp_path, column, "a", "all", y), write_run(tmp_path, column, "b", "all", x)
    M.main(M.Args(runs=runs))
    difference, t, df, p = capsys.readouterr().out.split()[-4:]
    a, b, change = gta[1] ** 2 / 8, synther[1] ** 2 / 8, gta[0] - synther[0]
    assert (difference, t, p) == (f"{change:.1f}", f"{change / (a + b) ** 0.5:.2f}", expected)
    assert df == f"{7 * (a + b) ** 2 / (a**2 + b**2):.1f}"


def test_runs_are_tabulated_as_the_paper_does(tmp_path, capsys):
    def write(algorithm, aug, env, *scores, **changes):
        return write_run(tmp_path, algorithm, aug, env, scores, **changes)

    folders = [write("iql", "none", "hopper", 60, 62, 70), write("iql", "none", "walker", 8, 4, 9)]
    folders += [write("iql", "gta", "hopper", 75, 71, 73), write("iql", "gta", "walker", 9, 5, 8)]
    folders += [write("cql", "none", "hopper", 50), write("cql", "none", "hopper", 55, 57)]
    folders += [write("cql", "none", "hopper", 59, seed=2), write("mcq", "none", "walker", 0, 0)]
    folders += [write("mcq", "gta", "walker", 0, 0)]
    M.main(M.Args(runs=tuple(folders)))
    output, notes = (text.splitlines() for text in capsys.readouterr())
    assert notes[0] == f"cql + none, hopper: seed 0 counts as in the later {folders[5]}"
    rows = {key: cells for key, *cells in (re.split("  +", line) for line in output)}
    assert len(notes) == 2 and output[0].split() == ["hopper", "walker", "average"]
    assert rows["cql"] == [f"57.0 +- {np.std([55, 57, 59]):.1f} (3)", "-", "-"]
    average = np.mean([(75, 71, 73), (9, 5, 8)], axis=0)
    assert rows["iql + gta"][2] == f"{average.mean():.1f} +- {average.std():.1f} (3)"
    tests = [line.split("  ")[0] for line in output if " against " in line]
    assert tests == ["iql: gta against none"] * 3  # all scores of mcq are the same
    assert M.average_scores([{0: 10.0, 1: 30.0}, {0: 50.0}]) == {}  # not the same seeds


def test_runs_that_do_not_belong_are_named(tmp_path, capsys):
    changes = {}, {}, {}, {"last": 7}, {"batch_size": 7, "seed": 9}
    folders = [write_run(tmp_path, "iql", "none", "hopper", [60.0], **x) for x in changes]
    (tmp_path / "0" / "evals.csv").unlink()  # has just begun
    (tmp_path / "1" / "evals.csv").write_text("update,agent,return,score\n")  # --eval-every 0
    assert M.read_runs(folders) == {("iql", "none"): {"hopper": {0: 60.0, 9: 60.0}}}
    assert capsys.readouterr().err.splitlines() == [
        f"left out: {folders[0]} holds no evals.csv",
        f"left out: {folders[1]} was not evaluated at update 10",
        f"left out: {folders[3]} was not evaluated at update 10",
        f"iql + none, hopper: runs differ in batch_size; {folders[4]}",
    ]
    with pytest.raises(SystemExit, match="no run among them has come to its end"):
        M.main(M.Args(runs=tuple(folders[:2])))


def test_runs_of_the_learners_are_read(tmp_path):
    tiny = ["--train-steps", 6, "--batch-size", 32, "--eval-episodes", 2, "--num-seeds", 2]
    run(ROOT / "td3bc.py", *tiny, "--eval-every", 4, "--out", "a", cwd=tmp_path)
    output = run(ROOT / "metrics.py", "--runs", "a", "--table", "markdown", cwd=tmp_path).stdout
    scores = np.loadtxt(tmp_path / "a" / "evals.csv", delimiter=",", skiprows=1)[-2:, 3]
    row = f"| td3bc | {scores.mean():.1f} +- {scores.std():.1f} (2) |"
    assert row in re.sub(" +", " ", output)


def test_tables_in_three_forms():
    rows = [["a_b", "x", "y"], ["50 %", "1.0 +- 2.0", "-"]]
    assert M.render(rows, "text") == "a_b            x  y\n50 %  1.0 +- 2.0  -"
    assert M.render(rows, "markdown").endswith("\n|---|---:|---:|\n| 50 % | 1.0 +- 2.0 | - |")
    begin, head, _, row, end = M.render(rows, "latex").splitlines()
    assert (begin, end) == (r"\begin{tabular}{lrr}", r"\end{tabular}")
    assert (head, row) == (r"a\_b & x & y \\", r"50 \% & 1.0 $\pm$ 2.0 & - \\")
