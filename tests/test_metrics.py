"""metrics.py: the oracle on recorded data, every metric against brute force, tables and tests."""

import itertools
import json
import os
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import HOPPER, ROOT, run, write_minari
from scipy import stats

import metrics as M
import td3bc


def load(env):
    """A dataset, its episodes, transitions, reference and oracle, and what is said of it."""
    datasets = M.open_datasets(env)
    episodes = M.load_episodes(datasets)
    sample = M.sample_dataset(episodes, 10**9, None)
    reference = M.make_reference(episodes)
    std = reference.std[: sample.s.shape[-1]]
    oracle, said = M.find_oracle(datasets[0], episodes, std)
    return SimpleNamespace(**locals())


@pytest.fixture(scope="module")
def own():
    return load(HOPPER)


def to_buffer(sample, first, N=20, H=5):
    """Recorded transitions as N subtrajectories of H whose terminals hold a penalty."""
    part = np.s_[first : first + N * H]
    shaped = [x[part, 0].reshape(N, H, *x.shape[2:]) for x in sample[:5]]
    return M.Sample(*shaped, shaped[4].copy(), np.arange(N, dtype=np.float64))


def record(folder, name, dtype=np.float64, **changes):
    """Writes a dataset of random actions: eight episodes of 40 steps, shorter where they end."""
    env = gym.wrappers.FlattenObservation(gym.make(f"gymnasium_robotics:{name}"))
    env.action_space.seed(0)
    episodes = []
    for seed in range(8):
        states = [env.reset(seed=seed)[0]]
        rows = []
        while len(rows) < 40 and not (rows and rows[-1][2]):
            a = env.action_space.sample()
            s, r, terminated, _, _ = env.step(a)
            states.append(s)
            rows.append((a, r, terminated))
        actions, rewards, terminations = map(np.array, zip(*rows))
        episodes.append((states, actions, rewards.astype(dtype), terminations))
    arguments = {"env_spec": env.unwrapped.spec, "action_space": env.action_space, **changes}
    return str(write_minari(folder / "own", episodes, env.observation_space, **arguments))


@pytest.mark.parametrize("name", ["bundled", "Walker2d-v5", "HalfCheetah-v4", "PointMaze_UMaze-v3"])
def test_oracle_reproduces_the_recorded_transitions(name, own, tmp_path):
    """Where no velocity is beyond its clip: next state, reward and termination."""
    data = own if name == "bundled" else load(record(tmp_path, name))
    part = np.random.default_rng(0).permutation(len(data.sample.r))[:4000]
    sample = M.Sample(*(x[part] for x in data.sample[:6]))
    s, _, r, s_next, terminal = (x[:, 0] for x in sample[:5])
    answers = M.ask_oracle(data.oracle, sample, "test")
    inside = (np.abs(s) < 10).all(1) & (np.abs(s_next) < 10).all(1)
    assert inside.mean() > (0.8 if name == "bundled" else 0.05)
    assert M.dynamic_error(s_next, answers.s_next, data.std)[inside].max() < 1e-6
    assert (answers.terminal == terminal)[inside].all()
    np.testing.assert_allclose(answers.r[inside], r[inside], atol=1e-3)
    # a state that MuJoCo cannot simulate is not judged: it would answer for a robot at its start
    s[2, 5] = 1e11
    answers.s_next[2] = np.nan
    answers.r[2] = np.nan
    few = M.Sample(*(x[:5] for x in sample[:6]))
    for x, y in zip(M.ask_oracle(data.oracle, few, "test")[:2], answers):
        np.testing.assert_allclose(x, y[:5], rtol=0, atol=1e-12)


SPEC = json.loads(gym.spec("Hopper-v5").to_json())
WRAPPED = SPEC | {"additional_wrappers": [{"name": "Log", "entry_point": "a:b", "kwargs": None}]}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"env_spec": WRAPPED}, "MuJoCo reproduces "),
        ({"env_spec": None}, "none (own-v0 names no environment)"),
        ({"env_spec": SPEC | {"id": "os:Mine-v0"}}, "none (os:Mine-v0 is not registered; see --"),
        ({"env_spec": SPEC | {"kwargs": {"frame_skip": 5}}}, "none, MuJoCo reproduces 0.0% of the"),
        ({"action_space": gym.spaces.Box(-9, 9, (3,))}, "none (the actions of own-v0 are Box(-9.0"),
    ],
)
def test_what_has_no_oracle_says_so(changes, message, tmp_path):
    """Wrapped; unnamed, unregistered, code of a file's own, other dynamics, other actions."""
    own = load(record(tmp_path, "Hopper-v5", **changes))
    assert (own.oracle is None) == message.startswith("none") and own.said.startswith(message)


def test_a_package_of_ones_own_has_an_oracle(tmp_path):
    """Only what the user names is imported; a float32 reward is a number in metrics.json, too."""
    spec = SPEC | {"id": "OwnHopper-v0"}
    folder = record(tmp_path, "Hopper-v5", env_spec=spec, dtype=np.float32)
    (tmp_path / "mine.py").write_text(
        "import gymnasium as gym\ngym.register('OwnHopper-v0', "
        "'gymnasium.envs.mujoco.hopper_v5:HopperEnv', max_episode_steps=1000)\n"
    )
    metadata = {"format": "gta-buffer", "format_version": 1, "method": "own", "env": folder}
    episodes = M.load_episodes(M.open_datasets(folder))
    arrays = {"observations": np.stack([e.observations[:6] for e in episodes])}
    arrays["actions"] = np.stack([e.actions[:5] for e in episodes])
    arrays["rewards"] = np.stack([e.rewards[:5] for e in episodes]).astype(np.float16)
    arrays["terminals"] = np.stack([e.terminals[:5] for e in episodes])
    np.savez(tmp_path / "own.npz", **arrays, metadata=json.dumps(metadata))
    command = [ROOT / "metrics.py", "--aug", "own.npz", "--plot", "a.svg"]
    assert "oracle: none (OwnHopper-v0 is not registered; " in run(*command, cwd=tmp_path).stdout
    output = run(*command, "--env-package", "mine", cwd=tmp_path).stdout
    rows = {key: cells for key, *cells in (re.split("  +", x) for x in output.splitlines())}
    assert "oracle: MuJoCo reproduces" in output
    assert rows["reward of the sources, per step"] == ["-", "-"]
    numbers = json.loads((tmp_path / "metrics.json").read_text())["numbers"]
    assert numbers["own"]["reward"] == pytest.approx(numbers["own"]["oracle reward"], abs=1e-3)
    assert (tmp_path / "a.svg").read_text().count("axes_") == 1  # no condition, no empty panel
    error = run(*command, "--env-package", "nothing", cwd=tmp_path, ok=False).stderr
    assert "--env-package nothing cannot be imported" in error


@pytest.mark.parametrize("dims, rank", [(1, 1), (5, 2)])
def test_nearest_distance_is_brute_force(dims, rank):
    """Actions of one dimension lie dense: a product in float32 would find the wrong one."""
    rng = np.random.default_rng(0)
    data = rng.normal(size=(500, dims))
    queries = rng.normal(size=(10_050, dims))  # in two chunks
    expected = np.linalg.norm(queries[:, None] - data[None], axis=-1)
    expected = np.sort(expected, axis=1)[:, rank - 1]
    by_product = M.nearest_on_gpu(*map(torch.from_numpy, (data, queries)), rank)  # of a GPU
    np.testing.assert_allclose(by_product, expected, atol=1e-7)  # near 0 it is a rounded square's
    np.testing.assert_allclose(by_product[expected > 0.1], expected[expected > 0.1], rtol=1e-12)
    np.testing.assert_allclose(M.nearest_distance(data, queries, rank, "cpu"), expected, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 2])  # 2: of the dataset itself
def test_novelty_against_loops(own, rank):
    sa, std = own.reference
    rng = np.random.default_rng(0)
    data = sa[4990:5060]
    reference = M.Reference(data, std)
    sample = to_buffer(own.sample, 5000, 6, 4)
    assert not any(M.novelty(reference, sample, 1, "cpu").values())  # copies are not novel
    sample = sample._replace(s=sample.s + 0.1 * rng.normal(size=sample.s.shape))
    numbers = M.novelty(reference, sample, rank, "cpu")
    rows = [np.concatenate(x) for x in zip(sample.s.reshape(-1, 11), sample.a.reshape(-1, 3))]
    parts = {"state": range(11), "action": range(11, 14), "state-action": range(14)}
    for part, units in itertools.product(parts, ("raw", "standardised")):
        scale = np.ones(14) if units == "raw" else std
        distances = []
        for x in rows:
            squares = [sum(((x - y)[d] / scale[d]) ** 2 for d in parts[part]) for y in data]
            distances.append(sorted(squares)[rank - 1] ** 0.5)
        name = f"{part} novelty, {units}"
        assert numbers[name] == pytest.approx(np.mean(distances), rel=1e-9)
        assert numbers[f"{name}, squared"] == pytest.approx(np.mean(np.square(distances)))


def test_the_reference_and_s4rl_are_the_datasets(own):
    rows = np.concatenate([np.hstack([e.observations[:-1], e.actions]) for e in own.episodes])
    np.testing.assert_allclose(own.reference.sa, rows)
    np.testing.assert_allclose(own.reference.std, rows.std(0))
    noised = M.add_state_noise(own.sample, own.std, 0.01, np.random.default_rng(0))
    for x, y in zip((noised.s, noised.s_next), (own.sample.s, own.sample.s_next)):
        np.testing.assert_allclose(((x - y) / own.std).std((0, 1)), 0.01, rtol=0.02)


def test_shares_rewards_and_controllability(own):
    buffer = to_buffer(own.sample, 0, N=30, H=4)
    number = np.arange(120.0)
    buffer.terminal[:] = False
    buffer.terminal[3, -1] = buffer.penalised[3, -1] = True
    buffer.condition[3] = np.nan
    buffer.r[3, -1] = -100.0
    s_true = (buffer.s_next + 0.3 * own.std).reshape(-1, 11)
    answers = M.Answers(s_true, number, number == 5)
    numbers = M.measure(buffer, answers, own.std)
    assert numbers["terminal"] == numbers["oracle terminal"] == 1 / 120
    assert numbers["dynamic MSE"] == pytest.approx(0.09, rel=1e-5)
    assert numbers["reward"] == pytest.approx(np.delete(buffer.r, 15).mean())
    sourced = M.measure(buffer._replace(source_r=buffer.r + 1), answers, own.std)
    assert sourced["reward of the sources"] == pytest.approx(numbers["reward"] + 1)
    assert numbers["oracle reward"] == pytest.approx(number.mean())
    assert numbers["oracle reward, not penalised"] == pytest.approx((number.sum() - 15) / 119)
    kept = (np.delete(x, 3) for x in (buffer.condition, buffer.r.sum(1)))
    assert numbers["controllability"] == pytest.approx(stats.pearsonr(*kept).statistic)


def test_samples_are_whole_subtrajectories(own, pipeline):
    buffer = M.read_buffer(pipeline / "buffer.npz")
    buffer.terminals[1, 2] = True
    metadata = buffer.metadata
    no_penalty = {"diffusion": metadata["diffusion"] | {"terminal_penalty": 0.0}}
    for change in ({"restore_terminal_reward": True}, no_penalty, {}):
        changed = buffer._replace(metadata=metadata | change)
        sample = M.sample_buffer(changed, own.episodes, 10**6, None)
        assert (sample.penalised == (sample.terminal & (not change))).all()
        costly = sample.terminal.any(1) & (change is not no_penalty)  # the condition is penalised
        assert (np.isnan(sample.condition) == costly).all()
    s, a, r, terminal = buffer[1:5]
    for x, y in zip(sample, (s[:, :7], a, r, s[:, 1:], terminal)):
        np.testing.assert_array_equal(x, y)
    for i, (episode, t) in enumerate(zip(buffer.episode, buffer.timestep)):
        rewards = own.episodes[episode].rewards
        assert sample.source_r[i].tolist() == [rewards[t + k] for k in range(7)]
    without = buffer._replace(episode=None)  # README: a user's own
    assert M.sample_buffer(without, own.episodes, 10**6, None).source_r is None
    fewer = M.sample_buffer(buffer, own.episodes, 50, np.random.default_rng(0)).r
    assert len(np.unique(fewer, axis=0)) == 8 and np.isin(fewer, r).all()
    returns = [e.rewards[t : t + 5].sum() for e in own.episodes for t in range(len(e.rewards) - 4)]
    np.testing.assert_allclose(M.dataset_returns(own.episodes, 5), returns, rtol=1e-6)


def test_condition_and_return_are_of_the_same_steps(own, pipeline):
    """A condition that is the source's own return asks for what the source's H steps return."""
    buffer = M.read_buffer(pipeline / "buffer.npz")
    gamma = buffer.metadata["diffusion"]["gamma"]
    penalty = buffer.metadata["diffusion"]["terminal_penalty"]
    condition = []
    for episode, t in zip(buffer.episode, buffer.timestep):
        e = own.episodes[episode]
        rewards = e.rewards - penalty * e.terminals
        condition.append(sum(gamma**k * r for k, r in enumerate(rewards[t:])))
    same = buffer._replace(condition=np.array(condition))
    sample = M.sample_buffer(same, own.episodes, 10**6, None)
    source_returns = [sum(gamma**k * x for k, x in enumerate(row)) for row in sample.source_r]
    known = ~sample.terminal.any(axis=1)
    np.testing.assert_allclose(sample.asked[known], np.array(source_returns)[known], rtol=1e-9)
    draw = partial(M.draw_condition, sample)
    (axes,) = M.draw_figure({"a": [draw]}).axes
    source, generated = (x.get_offsets() for x in axes.collections)
    np.testing.assert_allclose(source[:, 0], source[:, 1])  # on the diagonal
    np.testing.assert_allclose(generated[:, 0], source[:, 0])
    expected = (sample.r @ gamma ** np.arange(7))[known]
    np.testing.assert_allclose(np.sort(generated[:, 1]), np.sort(expected))


def test_trajectories_of_recorded_windows_are_their_sources(own):
    """From the first state alone MuJoCo goes where it went. The window is the one in the middle."""
    N, H = 9, 6
    sample = to_buffer(own.sample, 0, N, H)
    source = np.array([(0, t) for t in range(0, N * H, H)])
    gain = np.random.default_rng(0).permutation(N)
    sample = sample._replace(source=source, source_r=sample.r - gain[:, None])
    trajectories = M.make_trajectories(own.episodes, sample, own.oracle)
    i = list(gain).index(N // 2)
    rows = slice(i * H, i * H + H)
    source, generated, true = trajectories.values()
    np.testing.assert_array_equal(source[:, :-1], own.episodes[0].observations[rows])
    np.testing.assert_array_equal(generated[:, :-1], source[:, :-1])
    np.testing.assert_allclose(true, generated, atol=1e-6)
    np.testing.assert_allclose(true[:, -1], source[:, -1] + N // 2)
    # the dimensions that were changed most are drawn, in the widest first
    changed = sample.s.copy()
    changed[:, 1, [7, 2, 5]] += np.array([3, 2, 1]) * 50 * own.std[[7, 2, 5]]
    changed = sample._replace(s=changed)
    pictures = M.list_pictures(own.episodes, changed, None, None, own.std)
    names = [axes.get_ylabel() for axes in M.draw_figure({"a": pictures}).axes]
    assert names == ["density", "reward", *(f"state, dimension {i}" for i in (7, 2, 5))]


def test_a_path_is_drawn_over_the_walls_of_its_maze(tmp_path):
    own = load(record(tmp_path, "PointMaze_Medium-v3"))
    maze = own.oracle.maze
    sample = to_buffer(own.sample, 0, 3, 5)
    sample = sample._replace(source=np.zeros((3, 2), int), source_r=sample.r)
    pictures = M.list_pictures(own.episodes, sample, None, own.oracle, own.std)
    axes = M.draw_figure({"a": pictures}).axes[-1]
    (image,) = axes.images
    left, right, bottom, top = image.get_extent()
    walls = image.get_array()
    for row, cells in enumerate(maze.maze_map):
        for column, cell in enumerate(cells):
            x, y = maze.cell_rowcol_to_xy(np.array([row, column]))
            i = int((top - y) / (top - bottom) * len(walls))
            j = int((x - left) / (right - left) * len(cells))
            assert walls[i, j] == (cell == 1)
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), own.episodes[0].observations[:5, :2])


def test_the_command_prints_and_writes_all_numbers(pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = pipeline / "buffer.npz"
    command = [ROOT / "metrics.py", "--num-transitions", 140, "--aug", path]
    Path("b.npz").write_bytes(path.read_bytes())
    flags = ["b.npz", "--s4rl-sigma", 3e-4, "--all", "--plot", "a.png"]
    output = run(*command, *flags, cwd=tmp_path).stdout
    report = json.loads(Path("metrics.json").read_text())
    buffer = M.read_buffer(path)
    label = buffer.metadata["label"]
    assert list(report["numbers"]) == ["dataset", label, label + " b.npz", "s4rl(0.0003)"]
    dataset, own, copy, s4rl = report["numbers"].values()
    assert own == copy and own["transitions"] == dataset["transitions"] == 140
    assert dataset["dynamic MSE, median"] < 1e-20 < s4rl["dynamic MSE, median"] < 1e-4
    rows = {key: cells for key, *cells in (re.split("  +", x) for x in output.splitlines())}
    assert list(rows)[3:8] == list(M.HEADLINES.values()) and len(own) == 23
    assert rows["error of s', mean square, standardised"][4] == "0.0008"  # the paper's
    assert rows["controllability, Pearson's r"][0] == "-"
    for key, number in own.items():
        cell, *gain = rows[M.HEADLINES.get(key, key)][1].split()
        assert float(cell) == pytest.approx(number, rel=1e-3)
        if gain:
            source = own["reward of the sources"]
            assert float(gain[0][1:-2]) == pytest.approx(100 * (number / source - 1), abs=0.06)

    # the same command makes it all anew; nothing is replaced by something else
    again = run(*command, *flags, cwd=tmp_path, env=os.environ | {"MUJOCO_GL": "nonsense"}).stdout
    assert "oracle: none (" in again and "wrote a.png" in again
    short = buffer._replace(observations=buffer.observations[:, 1:])._asdict()
    np.savez("short.npz", **{**short, "metadata": json.dumps(buffer.metadata)})
    changed = buffer._replace(rewards=buffer.rewards + 1)._asdict()
    changed["metadata"] = json.dumps(buffer.metadata | {"dataset_crc": 1})
    np.savez("other.npz", **changed)
    Path("folder").mkdir()
    before = {x.name: x.read_bytes() for x in tmp_path.iterdir() if x.is_file()}
    for changes, message in (
        ({"seed": 1}, "metrics.json was made with "),
        ({"out": "b.npz"}, "--out b.npz: no file of metrics.py; choose another --out"),
        ({"out": "b.json", "plot": "a.png"}, "a.png is not of this command; choose another --plot"),
        ({"out": "b.json", "plot": "a.jpg"}, "--plot a.jpg: must end in .png, .pdf or .svg"),
        ({"out": "a.png/b.json"}, "a.png/b.json cannot be written"),
        ({"aug": ("short.npz",)}, "--aug short.npz: its arrays are [(40, 7, 11), (40, 7, 3), (40"),
        ({"aug": ("other.npz",)}, "--aug other.npz was made from dataset_crc 1, not from "),
    ):
        with pytest.raises(SystemExit, match=re.escape(message)):
            M.main(M.Args(**{"aug": (str(path),), "device": "cpu", **changes}))
    assert {x.name: x.read_bytes() for x in tmp_path.iterdir() if x.is_file()} == before


def write_run(root, algorithm, label, env, *scores, first=None, last=10, **changes):
    """Writes what a learner writes: an evaluation of scores first [agents], by default those of the
    last one, and the last one at update last."""
    folder = root / f"{len(list(root.iterdir()))}"
    folder.mkdir()
    config = {"script": algorithm, "aug_label": label, "env": env, "train_steps": 10, "seed": 0}
    config |= {"num_seeds": len(scores), "batch_size": 256, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    evaluations = ((5, first or scores), (last, scores))
    rows = [f"{step},{i},0,{x}\n" for step, row in evaluations for i, x in enumerate(row)]
    (folder / "evals.csv").write_text("update,agent,return,score\n" + "".join(rows))
    return str(folder)


def test_welch_is_table_20(tmp_path, capsys):
    """Its p, of scores with its means and deviations; it heads CQL's column IQL and IQL's CQL."""
    z = stats.zscore([-1.5, -1, -0.5, 0, 0, 0.5, 1, 1.5], ddof=1)
    moments = {"cql": (81.20, 1.46, 85.27, 1.02), "iql": (81.97, 2.21, 86.11, 0.94)}
    moments |= {"mcq": (82.81, 3.21, 85.91, 1.05), "td3bc": (78.64, 2.38, 84.63, 2.20)}
    for learner, (mean, std, mean_gta, std_gta) in moments.items():
        write_run(tmp_path, learner, "a: synther", "all", *(mean + std * z))
        write_run(tmp_path, learner, "b: gta", "all", *(mean_gta + std_gta * z))
    M.main(M.Args(runs=tuple(map(str, tmp_path.iterdir()))))
    tests = [line.split()[-4:] for line in capsys.readouterr().out.splitlines()[-4:]]
    assert [p for *_, p in tests] == ["0.0000", "0.0008", "0.0303", "0.0001"]
    a, b = 2.20**2 / 8, 2.38**2 / 8
    df = 7 * (a + b) ** 2 / (a**2 + b**2)
    assert tests[-1][:3] == ["6.0", f"{(84.63 - 78.64) / (a + b) ** 0.5:.2f}", f"{df:.1f}"]


def test_runs_are_tabulated_as_the_paper_does(tmp_path, capsys):
    write = partial(write_run, tmp_path)
    folders = [write("iql", "none", "hopper", 60, 62, 70), write("iql", "none", "walker", 8, 4, 9)]
    folders += [write("iql", "gta", "hopper", 75, 71, 73), write("iql", "gta", "walker", 9, 5, 8)]
    folders += [write("cql", "none", "hopper", 50), write("cql", "none", "hopper", 55, 57)]
    folders += [write("cql", "none", "hopper", 59, seed=2, batch_size=7)]
    folders += [write("cql", "none", "hopper", 0, last=7), write("cql", "none", "hopper", 3)]
    Path(folders[8], "config.json").write_text('{"script": "cql"')
    M.main(M.Args(runs=tuple(folders)))
    output, notes = (text.splitlines() for text in capsys.readouterr())
    reason = "no run that came to its end ("
    assert notes[0] == f"left out: {folders[7]}, {reason}not evaluated at update 10)"
    assert notes[1].startswith(f"left out: {folders[8]}, {reason}")
    assert notes[2:-1] == [
        "cql, hopper: batch_size is 256 (none [batch_size 256]), 7 (none [batch_size 7])",
        f"left out: 1 agents of an earlier folder, repeated in {folders[5]}",
    ]
    rows = {key: cells for key, *cells in (re.split("  +", line) for line in output)}
    assert list(rows)[1:5] == [
        *("cql + none [batch_size 256]", "cql + none [batch_size 7]", "iql", "iql + gta"),
    ]
    assert rows["cql + none [batch_size 256]"] == ["56.0 +- 1.0 (2)", "-", "-"]
    assert rows["cql + none [batch_size 7]"] == ["59.0 +- 0.0 (1)", "-", "-"]
    average = np.mean([(75, 71, 73), (9, 5, 8)], axis=0)
    assert rows["iql + gta"][2] == f"{average.mean():.1f} +- {average.std():.1f} (3)"


def test_agents_of_two_seeds_are_all_counted(tmp_path, capsys):
    """Agent 1 of seed 0 is not agent 0 of seed 1: all agents of a run share its random numbers."""
    folders = [write_run(tmp_path, "iql", "none", "hopper", 1, 2, seed=0)]
    folders += [write_run(tmp_path, "iql", "none", "hopper", 3, 6, seed=1)]
    M.main(M.Args(runs=tuple(folders)))
    assert f"3.0 +- {np.std([1, 2, 3, 6]):.1f} (4)" in capsys.readouterr().out


def test_last_evaluations_are_averaged(tmp_path, capsys):
    folders = [write_run(tmp_path, "iql", "none", "hopper", 60, 62, 70, first=(50, 51, 52))]
    folders += [write_run(tmp_path, "iql", "gta", "hopper", 71, 73, first=(50, 51))]
    one = ((60, 62, 70), (71, 73))
    two = ((55, 56.5, 61), (60.5, 62))
    for last, (none, gta) in ((1, one), (2, two), (9, two)):  # there are two
        M.main(M.Args(runs=tuple(folders), last=last))
        output = capsys.readouterr().out
        assert f"{np.mean(none):.1f} +- {np.std(none):.1f} (3)" in output
        assert f"{np.mean(gta):.1f} +- {np.std(gta):.1f} (2)" in output
        assert f"{stats.ttest_ind(gta, none, equal_var=False).pvalue:.4f}" in output


def test_what_is_not_alike_is_told_apart(tmp_path, capsys):
    """Two buffers of one label, two datasets of one name, one of two names, other lengths."""
    write = partial(write_run, tmp_path)
    first = {"dataset_crc": 1, "buffer_crc": 11, "aug": "a.npz"}
    folders = [write("iql", "gta", "hopper", 1, 2, **first)]
    folders += [write("iql", "gta", "hopper", 3, 4, **first | {"buffer_crc": 12, "aug": "b.npz"})]
    folders += [write("iql", "none", "./hopper", 5, 6, dataset_crc=1, last=20, train_steps=20)]
    folders += [write("iql", "none", "walker", 7, dataset_crc=2)]
    folders += [write("iql", "none", "walker", 9, dataset_crc=3)]
    M.main(M.Args(runs=tuple(folders)))
    output, notes = (text.splitlines() for text in capsys.readouterr())
    assert re.split("  +", output[0]) == ["", "hopper", "walker [2]", "walker [3]", "average"]
    rows = {key: cells for key, *cells in (re.split("  +", line) for line in output)}
    assert rows["iql + gta [a.npz, 11]"][0] == "1.5 +- 0.5 (2)"
    assert rows["iql + gta [b.npz, 12]"][0] == "3.5 +- 0.5 (2)"
    assert rows["iql"][:3] == ["5.5 +- 0.5 (2)", "7.0 +- 0.0 (1)", "9.0 +- 0.0 (1)"]
    lengths = "20 (none), 10 (gta [a.npz, 11], gta [b.npz, 12])"
    assert notes[0] == f"iql, hopper: train_steps is {lengths}"


def test_learning_curves_are_means_and_deviations_over_seeds(tmp_path):
    write = partial(write_run, tmp_path)
    folders = [write("iql", "none", "hopper", 60, 62, 70, first=(500, 501, 502))]
    folders += [write("iql", "gta", "hopper", 71, 73, first=(580, 581))]
    folders += [write("cql", "none", "walker", 1, 2), write("iql", "none", "walker", 5, 9, seed=3)]
    runs = M.tell_apart(M.read_runs(folders))
    panels = M.draw_figure(M.list_curves(runs, M.collect_curves(runs))).axes
    titles = ["cql, walker", "iql, hopper", "iql, walker"]
    assert [panel.get_title() for panel in panels] == titles
    assert [len(panel.lines) for panel in panels] == [1, 2, 1]
    scored = [run._replace(config=run.config | {"dataset_score": 33.2}) for run in runs]
    panel, *_ = M.draw_figure(M.list_curves(scored, M.collect_curves(scored))).axes
    assert panel.lines[0].get_ydata() == [33.2, 33.2]
    assert len({line.get_linestyle() for line in panels[1].lines}) == 2
    assert len({panel.lines[0].get_color() for panel in panels}) == 1  # of none, in all scripts
    for line, band, first, last in zip(
        *(panels[1].lines, panels[1].collections),
        *(([500, 501, 502], [580, 581]), ([60, 62, 70], [71, 73])),  # none, gta
    ):
        np.testing.assert_array_equal(line.get_xdata(), [5, 10])
        np.testing.assert_allclose(line.get_ydata(), [np.mean(first), np.mean(last)])
        corners = band.get_paths()[0].vertices
        for x, scores in ((5, first), (10, last)):
            y = corners[corners[:, 0] == x, 1]
            np.testing.assert_allclose(y.max(), np.mean(scores) + np.std(scores))
            np.testing.assert_allclose(y.min(), np.mean(scores) - np.std(scores))

    path = tmp_path / "b" / "curves.svg"
    for _ in range(2):  # the second is onto the picture of the same command
        M.main(M.Args(runs=tuple(folders), plot=str(path)))
        assert "iql, hopper" in path.read_text()  # a comment of the text
    with pytest.raises(SystemExit, match="curves.svg is not of this command; choose another"):
        M.main(M.Args(runs=tuple(folders[1:]), plot=str(path)))


def test_runs_of_a_learner_are_read(tmp_path):
    tiny = {"train_steps": 6, "batch_size": 32, "eval_every": 6, "eval_episodes": 2}
    td3bc.main(td3bc.Args(**tiny, num_seeds=2, device="cpu", out=str(tmp_path / "a")))
    output = run(ROOT / "metrics.py", "--runs", "a", "--table", "latex", cwd=tmp_path).stdout
    output = re.sub(" +", " ", output)
    scores = np.loadtxt(tmp_path / "a" / "evals.csv", delimiter=",", skiprows=1)[:, 3]
    assert rf"td3bc & {scores.mean():.1f} $\pm$ {scores.std():.1f} (2) \\" in output
