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
    episodes, space = M.load_episodes(datasets), datasets[0].action_space
    sample, reference = M.sample_dataset(episodes, 10**9, None), M.make_reference(episodes)
    std = reference[2][: sample.s.shape[-1]]
    oracle, said = M.find_oracle(datasets[0], episodes, std)
    return SimpleNamespace(**locals())


@pytest.fixture(scope="module")
def own():
    return load(HOPPER)


def to_buffer(sample, first, N=20, H=5):
    """Recorded transitions as N subtrajectories of H whose terminals hold a penalty."""
    part = np.s_[first : first + N * H]
    shaped = [x[part, 0].reshape(N, H, *x.shape[2:]) for x in sample[:5]]
    return M.Sample(*shaped, shaped[4].copy(), np.arange(N, dtype=np.float32))


def record(folder, name, **changes):
    """Writes a dataset of random actions: eight episodes of 40 steps, shorter where they end."""
    env = gym.wrappers.FlattenObservation(gym.make(f"gymnasium_robotics:{name}"))
    env.action_space.seed(0)
    episodes = []
    for seed in range(8):
        states, rows = [env.reset(seed=seed)[0]], []
        while len(rows) < 40 and not (rows and rows[-1][2]):
            a = env.action_space.sample()
            s, r, terminated, _, _ = env.step(a)
            states.append(s)
            rows.append((a, r, terminated))
        episodes.append((states, *map(np.array, zip(*rows))))
    arguments = {"env_spec": env.unwrapped.spec, "action_space": env.action_space, **changes}
    return str(write_minari(folder / "own", episodes, env.observation_space, **arguments))


@pytest.mark.parametrize("name", ["bundled", "Walker2d-v5", "HalfCheetah-v4", "PointMaze_UMaze-v3"])
def test_oracle_reproduces_the_recorded_transitions(name, own, tmp_path):
    """Where no velocity is beyond its clip: next state, reward and termination."""
    data = own if name == "bundled" else load(record(tmp_path, name))
    part = np.random.default_rng(0).permutation(len(data.sample.r))[:4000]
    s, a, r, s_next, terminal = (x[part, 0] for x in data.sample[:5])
    answers = M.ask_oracle(data.oracle, s, a, "test")
    inside = (np.abs(s) < 10).all(1) & (np.abs(s_next) < 10).all(1)
    assert inside.mean() > (0.8 if name == "bundled" else 0.05)
    assert M.dynamic_error(s_next, answers.s_next, data.std)[inside].max() < 1e-6
    assert (answers.terminal == terminal)[inside].all()
    np.testing.assert_allclose(answers.r[inside], r[inside], atol=1e-3)
    # a state that MuJoCo cannot simulate is not judged: it would answer for a robot at its start
    s[2, 5], answers.s_next[2], answers.r[2] = 1e11, np.nan, np.nan
    for x, y in zip(M.ask_oracle(data.oracle, s[:5], a[:5], "test")[:2], answers):
        np.testing.assert_allclose(x, y[:5], rtol=0, atol=1e-12)


SPEC = json.loads(gym.spec("Hopper-v5").to_json())
WRAPPED = SPEC | {"additional_wrappers": [{"name": "Log", "entry_point": "a:b", "kwargs": None}]}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"env_spec": WRAPPED}, "MuJoCo reproduces "),
        ({"env_spec": None}, "none, own-v0 names no environment"),
        ({"env_spec": SPEC | {"id": "os:Mine-v0"}}, "none for os:Mine-v0 ("),
        ({"env_spec": SPEC | {"kwargs": {"frame_skip": 5}}}, "none, MuJoCo reproduces 0.0% of the"),
        ({"action_space": gym.spaces.Box(-9, 9, (3,))}, "none, the actions of own-v0 are Box(-9.0"),
    ],
)
def test_what_has_no_oracle_says_so(changes, message, tmp_path, capsys):
    """Wrapped; unnamed, unregistered, code of a file's own, other dynamics, other actions."""
    own = load(record(tmp_path, "Hopper-v5", **changes))
    assert (own.oracle is None) == message.startswith("none") and own.said.startswith(message)
    assert ("without the wrappers Log\n" in capsys.readouterr().out) == (own.oracle is not None)


@pytest.mark.parametrize("dims, rank", [(1, 1), (5, 2)])
def test_nearest_distance_is_brute_force(dims, rank):
    """Actions of one dimension lie dense: a product in float32 would find the wrong one."""
    rng = np.random.default_rng(0)
    data, queries = (rng.normal(size=(n, dims)) for n in (500, 10_050))  # in two chunks
    expected = np.linalg.norm(queries[:, None] - data[None], axis=-1)
    expected = np.sort(expected, axis=1)[:, rank - 1]
    by_product = M.nearest_by_product(*map(torch.from_numpy, (data, queries)), rank)  # of a GPU
    np.testing.assert_allclose(by_product, expected, atol=1e-12)
    np.testing.assert_allclose(M.nearest_distance(data, queries, rank, "cpu"), expected, atol=1e-12)
    assert (M.nearest_by_product(*[torch.from_numpy(data)] * 2, 1) == 0).all()


@pytest.mark.parametrize("rank", [1, 2])  # 2: of the dataset itself
def test_novelty_against_loops(own, rank):
    sa, mean, std = own.reference
    rng, data, sample = np.random.default_rng(0), sa[4990:5060], to_buffer(own.sample, 5000, 6, 4)
    assert not any(M.novelty((data, mean, std), sample, 1, "cpu").values())  # copies are not novel
    sample = sample._replace(s=sample.s + 0.1 * rng.normal(size=sample.s.shape))
    numbers = M.novelty((data, mean, std), sample, rank, "cpu")
    rows = [np.concatenate(x) for x in zip(sample.s.reshape(-1, 11), sample.a.reshape(-1, 3))]
    parts = {"state": range(11), "action": range(11, 14), "state-action": range(14)}
    for part, units in itertools.product(parts, ("raw", "standardised")):
        scale, distances = np.ones(14) if units == "raw" else std, []
        for x in rows:
            squares = [sum(((x - y)[d] / scale[d]) ** 2 for d in parts[part]) for y in data]
            distances.append(sorted(squares)[rank - 1] ** 0.5)
        name = f"{part} novelty, {units}"
        assert numbers[name] == pytest.approx(np.mean(distances), rel=1e-9)
        assert numbers[f"{name}, squared"] == pytest.approx(np.mean(np.square(distances)))


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
    s_true = (buffer.s_next + 0.3 * own.std).reshape(-1, 11)
    answers = M.Answers(s_true, number, number == 5, (number < 12) * 1.0)
    numbers = M.measure(buffer, answers, own.std, own.space)
    assert numbers["terminal"] == numbers["oracle terminal"] == 1 / 120
    assert numbers["unhealthy states"] == 0.1
    assert numbers["dynamic MSE"] == pytest.approx(0.09, rel=1e-5)
    assert numbers["actions at a bound"] == pytest.approx(2 / 360)
    assert numbers["reward"] == pytest.approx(np.delete(buffer.r, 15).mean())
    own_source = M.measure(buffer._replace(source=buffer.r + 1), answers, own.std, own.space)
    assert own_source["reward of the sources"] == pytest.approx(numbers["reward"] + 1)
    assert numbers["oracle reward"] == pytest.approx(number.mean())
    assert numbers["oracle reward, not penalised"] == pytest.approx((number.sum() - 15) / 119)
    kept = (np.delete(x, 3) for x in (buffer.condition, buffer.r.sum(1)))
    assert numbers["controllability"] == pytest.approx(stats.pearsonr(*kept).statistic)


def test_samples_are_whole_subtrajectories(own, pipeline):
    buffer, metadata = M.read_buffer(pipeline / "buffer.npz")
    buffer["terminals"][1, 2] = True
    no_penalty = {"diffusion": metadata["diffusion"] | {"terminal_penalty": 0.0}}
    for change in ({"restore_terminal_reward": True}, no_penalty, {}):
        sample = M.sample_buffer(buffer, metadata | change, own.episodes, 10**6, None)
        assert (sample.penalised == (sample.terminal & (not change))).all()
    s, r = buffer["observations"], buffer["rewards"]
    for x, y in zip(sample, (s[:, :7], buffer["actions"], r, s[:, 1:], buffer["terminals"])):
        np.testing.assert_array_equal(x, y)
    for i, (episode, t) in enumerate(zip(buffer["episode"], buffer["timestep"])):
        rewards = own.episodes[episode].rewards
        assert sample.source[i].tolist() == [rewards[t + k] for k in range(7)]
    own_data = {key: x for key, x in buffer.items() if key != "episode"}  # README: a user's own
    assert M.sample_buffer(own_data, metadata, own.episodes, 10**6, None).source is None
    fewer = M.sample_buffer(buffer, metadata, own.episodes, 50, np.random.default_rng(0)).r
    assert len({x.tobytes() for x in fewer} & {x.tobytes() for x in r}) == 8
    returns = [e.rewards[t : t + 5].sum() for e in own.episodes for t in range(len(e.rewards) - 4)]
    np.testing.assert_allclose(M.dataset_returns(own.episodes, 5), returns, rtol=1e-6)


def test_the_command_prints_and_writes_all_numbers(pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, script = pipeline / "buffer.npz", ROOT / "metrics.py"
    Path("b.npz").write_bytes(path.read_bytes())
    flags = ["--aug", path, "b.npz", "--num-transitions", 140, "--s4rl-sigma", 3e-4]
    output = run(script, *flags, "--plot", "a.png", cwd=tmp_path).stdout
    report, (buffer, metadata) = json.loads(Path("metrics.json").read_text()), M.read_buffer(path)
    names = ["dataset", metadata["label"], metadata["label"] + " b.npz", "s4rl(0.0003)"]
    assert list(report["numbers"]) == names
    dataset, own, copy, s4rl = report["numbers"].values()
    assert own == copy and own["transitions"] == dataset["transitions"] == 140
    assert dataset["dynamic MSE, median"] < 1e-20 < s4rl["dynamic MSE, median"] < 1e-4
    rows = {key: cells for key, *cells in (re.split("  +", x) for x in output.splitlines())}
    assert rows["controllability"][0] == "-" and len(own) == 25
    for key, number in own.items():
        assert float(rows[key][1]) == pytest.approx(number, rel=1e-3)

    # nothing is replaced by something else; the same flags make it anew, here without MuJoCo
    buffer["observations"] = buffer["observations"][:, 1:]
    np.savez("short.npz", **buffer, metadata=json.dumps(metadata))
    before = {x.name: x.read_bytes() for x in tmp_path.iterdir()}
    for changes, message in (
        ({"aug": ("b.npz",)}, "metrics.json was made with aug "),
        ({"out": "b.npz"}, "--out b.npz: no file of metrics.py; choose another --out"),
        ({"out": "b.json", "plot": "a.png"}, "--plot a.png is there, of other flags"),
        ({"out": "b.json", "aug": ("short.npz",)}, "s, a, r, s' are [(40, 6, 11), (40, 7, 3), (40"),
    ):
        with pytest.raises(SystemExit, match=re.escape(message)):
            M.main(M.Args(**{"aug": (str(path),), **changes}))
    assert {x.name: x.read_bytes() for x in tmp_path.iterdir()} == before
    output = run(script, *flags, cwd=tmp_path, env=os.environ | {"MUJOCO_GL": "nonsense"}).stdout
    assert "oracle: none for Hopper-v5, MUJOCO_GL is nonsense (" in output


def write_run(root, algorithm, aug, env, *scores, last=10, **changes):
    """Writes what a learner writes; scores [agents] are those of the last evaluation."""
    folder = root / f"{len(list(root.iterdir()))}"
    folder.mkdir()
    config = {"script": algorithm, "aug_label": aug, "env": env, "train_steps": 10, "seed": 0}
    config |= {"num_seeds": len(scores), "batch_size": 256, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [f"{step},{i},0,{x}\n" for step in (5, last) for i, x in enumerate(scores)]
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
    folders += [write("cql", "none", "hopper", 0, last=7)]
    M.main(M.Args(runs=tuple(folders)))
    output, notes = (text.splitlines() for text in capsys.readouterr())
    assert notes[:-1] == [
        f"cql + none, hopper: seed 0 counts as in the later {folders[5]}",
        f"cql + none, hopper: runs differ in batch_size; {folders[6]}",
        f"left out: {folders[7]} was not evaluated at update 10",
    ]
    rows = {key: cells for key, *cells in (re.split("  +", line) for line in output)}
    assert rows["cql"] == [f"57.0 +- {np.std([55, 57, 59]):.1f} (3)", "-", "-"]
    average = np.mean([(75, 71, 73), (9, 5, 8)], axis=0)
    assert rows["iql + gta"][2] == f"{average.mean():.1f} +- {average.std():.1f} (3)"


def test_learning_curves_are_means_and_deviations_over_seeds(tmp_path):
    write = partial(write_run, tmp_path)
    folders = [write("iql", "none", "hopper", 60, 62, 70), write("iql", "gta", "hopper", 71, 73)]
    folders += [write("cql", "none", "walker", 1, 2), write("iql", "none", "walker", 5, 9, seed=3)]
    for own, first in ((0, 50), (1, 58)):  # an evaluation before, other scores
        path = Path(folders[own], "evals.csv")
        path.write_text(re.sub(r"(?m)^5,(.),0,.*", rf"5,\1,0,{first}\1", path.read_text()))
    table = M.read_runs(folders)
    axes = np.reshape(M.draw_curves(table, ["hopper", "walker"]).axes, (2, 2))
    assert [[len(axis.lines) for axis in row] for row in axes] == [[0, 1], [2, 1]]  # cql, iql
    for line, band, first, last in zip(
        *(axes[1, 0].lines, axes[1, 0].collections),
        *(([500, 501, 502], [580, 581]), ([60, 62, 70], [71, 73])),  # none, gta
    ):
        np.testing.assert_array_equal(line.get_xdata(), [5, 10])
        np.testing.assert_allclose(line.get_ydata(), [np.mean(first), np.mean(last)])
        corners = band.get_paths()[0].vertices
        for x, scores in ((5, first), (10, last)):
            y = corners[corners[:, 0] == x, 1]
            np.testing.assert_allclose(y.max(), np.mean(scores) + np.std(scores))
            np.testing.assert_allclose(y.min(), np.mean(scores) - np.std(scores))

    M.main(M.Args(runs=tuple(folders), plot=str(tmp_path / "b" / "curves.svg")))
    assert "iql, hopper" in (tmp_path / "b" / "curves.svg").read_text()  # a comment of the text
    with pytest.raises(SystemExit, match="curves.svg is there; remove it or choose another name"):
        M.main(M.Args(runs=tuple(folders), plot=str(tmp_path / "b" / "curves.svg")))


def test_runs_of_a_learner_are_read(tmp_path):
    out, tiny = str(tmp_path / "a"), {"train_steps": 6, "batch_size": 32, "eval_every": 6}
    td3bc.main(td3bc.Args(**tiny, eval_episodes=2, num_seeds=2, device="cpu", out=out))
    output = run(ROOT / "metrics.py", "--runs", "a", "--table", "latex", cwd=tmp_path).stdout
    scores = np.loadtxt(tmp_path / "a" / "evals.csv", delimiter=",", skiprows=1)[:, 3]
    assert rf"td3bc & {scores.mean():.1f} $\pm$ {scores.std():.1f} (2) \\" in output
