"""data/make_dataset.py: fraction, mix, duplicate hold what they say; D4RL's files, read plainly."""

import re
import subprocess
import sys

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
from conftest import HOPPER, ROOT, run, write_minari

import make_dataset
from make_dataset import TASKS, Fraction, FromD4rl, Mix, find_task, main


def open_minari(folder):
    return minari.MinariDataset(f"{folder}/data")


def read(folder):
    return list(open_minari(folder).iterate_episodes())


def find(episodes, sources):
    """The index of each episode among the sources, all of which differ."""
    where = {e.observations.tobytes() + e.actions.tobytes(): i for i, e in enumerate(sources)}
    return [where[e.observations.tobytes() + e.actions.tobytes()] for e in episodes]


@pytest.fixture(scope="module")
def source():
    return read(HOPPER)


def test_fraction_holds_whole_random_episodes(source, tmp_path, capsys):
    folders = [tmp_path / name for name in ("a", "again", "b")]
    for folder, seed in zip(folders, (3, 3, 4)):
        main(Fraction(env=HOPPER, fraction=0.2, seed=seed, out=str(folder)))
    a, again, b = [find(read(folder), source) for folder in folders]
    assert a == again != b and a == sorted(set(a))  # none twice, in the dataset's order
    lengths = np.array([len(e.rewards) for e in source])
    assert abs(lengths[a].sum() - 0.2 * lengths.sum()) <= lengths.max() / 2 + 1
    old = open_minari(HOPPER).storage.metadata
    new = open_minari(folders[0]).storage.metadata
    for key in ("env_spec", "eval_env_spec", "observation_space", "action_space", "ref_max_score"):
        assert new[key] == old[key]
    main(Fraction(env=HOPPER, fraction=0.2, seed=3, out=str(folders[0])))
    assert "a is finished, made with these flags" in capsys.readouterr().out
    for out, message in (("a", "made with seed 3; choose"), ("a/data", "nothing of make_dataset")):
        with pytest.raises(SystemExit, match=message):
            main(Fraction(env=HOPPER, fraction=0.2, seed=1, out=str(tmp_path / out)))


def test_mix_is_all_of_one_and_some_of_another(source, tmp_path):
    own = str(tmp_path / "own")
    mix = str(tmp_path / "mix")
    main(Fraction(env=HOPPER, num_transitions=12_000, seed=1, out=own))
    main(Mix(env=own, other=HOPPER, ratio=0.5, seed=5, out=mix))
    kept = find(read(own), source)
    mixed = find(read(mix), source)
    assert mixed[: len(kept)] == kept
    lengths = np.array([len(e.rewards) for e in source])
    added = mixed[len(kept) :]
    np.testing.assert_allclose([lengths[kept].sum(), lengths[added].sum()], [12e3, 6e3], atol=501)


@pytest.mark.parametrize("top, min_return", [(0.1, None), (1.0, 2500.0)])
def test_duplicate_adds_copies_of_the_best(source, tmp_path, top, min_return):
    flags = {"num_transitions": 30_000, "top": top, "min_return": min_return}
    main(make_dataset.Duplicate(env=HOPPER, out=str(tmp_path / "d"), **flags))
    copies = find(read(tmp_path / "d"), source)
    assert copies[: len(source)] == list(range(len(source)))
    times = np.bincount(copies)[: len(source)] - 1
    assert abs(sum(n * len(e.rewards) for n, e in zip(times, source)) - 30_000) <= 500
    returns = np.array([sum(e.rewards.tolist()) for e in source])
    best = returns >= np.sort(returns)[-int(np.ceil(top * len(source)))]
    best &= returns >= (min_return or -np.inf)
    assert (times[best] > 0).all() and (times[~best] == 0).all() and np.ptp(times[best]) <= 1


def test_dictionaries_stay_and_episodes_end_at_their_terminals(tmp_path, capsys):
    """Nor is an environment needed, and returns do not overflow though the rewards are float16."""
    old = tmp_path / "old"
    out = str(tmp_path / "new")
    box = gym.spaces.Box(-1, 1, (2,))
    space = gym.spaces.Dict({"b": box, "a": gym.spaces.Dict({"c": box})})
    x = np.random.default_rng(0).uniform(-1, 1, (3, 6, 2)).astype(np.float32)
    episodes = []
    for s, reward in zip(x, (30_000, 50_000, 40_000)):
        rewards = np.full(5, reward, np.float16)
        episodes.append(({"b": s, "a": {"c": 2 * s}}, s[1:], rewards, np.arange(5) == 2))
    write_minari(old, episodes, space, box)
    main(make_dataset.Duplicate(env=str(old), num_transitions=3, out=out))
    assert "return mean 127476.0, min 90000.0, max 149952.0" in capsys.readouterr().out
    assert open_minari(out).observation_space == space
    x = x[[0, 1, 2, 1], :4]
    np.testing.assert_array_equal([e.observations["a"]["c"] for e in read(out)], 2 * x)
    np.testing.assert_array_equal([e.actions for e in read(out)], x[:, 1:])
    with pytest.raises(SystemExit, match="sample-v0 and old-v0 differ in environment or spaces"):
        main(Mix(env=HOPPER, other=str(old), ratio=1e-4, out=str(tmp_path / "x")))


def write_d4rl(path, arrays):
    with h5py.File(path, "w") as file:
        file.update(arrays)
    return str(path)


def convert(folder, data, stem, **flags):
    """Converts the arrays, a file of that name, to folder/new."""
    path = write_d4rl(folder / f"{stem}.hdf5", data)
    main(FromD4rl(file=path, out=str(folder / "new"), **flags))


def random_rows(N, obs_dim, act_dim):
    """Rows of numbers that are all different, so that none can take another's place unnoticed."""
    x = np.random.default_rng(0).uniform(-1, 1, (N, obs_dim + act_dim + 1)).astype(np.float32)
    data = {"observations": x[:, :obs_dim], "actions": x[:, obs_dim:-1], "rewards": x[:, -1]}
    return {**data, "terminals": np.zeros(N, bool), "timeouts": np.zeros(N, bool)}


def hopper_rows(source):
    """The bundled episodes as the rows of a D4RL v2 file, and the rows where they end."""
    keys = {"actions": "actions", "rewards": "rewards"}
    keys |= {"terminals": "terminations", "timeouts": "truncations"}
    data = {key: np.concatenate([getattr(e, own) for e in source]) for key, own in keys.items()}
    data["observations"] = np.concatenate([e.observations[:-1] for e in source])
    data["next_observations"] = np.concatenate([e.observations[1:] for e in source])
    return data, np.cumsum([len(e.rewards) for e in source]) - 1


def compare(folder, data, ends, at_goal=False):
    """Compares a converted dataset with the rows of a file whose episodes end at ends, row by row.
    at_goal: they go on after a terminal."""
    s = data["observations"]
    terminals = data["terminals"].astype(bool)
    N = len(s)
    last = [i in ends or i == N - 1 for i in range(N)]
    s_next = data.get("next_observations", [s[i if last[i] else i + 1] for i in range(N)])
    plain = []
    rows = []
    over = False
    for i in range(N):
        has_next = terminals[i] or not last[i] or "next_observations" in data
        if has_next and not over:
            rows.append(i)
        over = at_goal and (over or terminals[i]) and not last[i]
        if last[i]:
            plain.append(rows)
            rows = []
    plain = [rows for rows in plain if rows]
    for e, rows in zip(read(folder), plain, strict=True):
        np.testing.assert_array_equal(e.observations, [*s[rows], s_next[rows[-1]]])
        np.testing.assert_array_equal(e.actions, data["actions"][rows])
        np.testing.assert_array_equal(e.rewards, data["rewards"][rows])
        np.testing.assert_array_equal(e.terminations, terminals[rows])
        assert (e.terminations ^ e.truncations).tolist() == [False] * (len(rows) - 1) + [True]


def test_medium_replay_by_command_line(source, tmp_path):
    """A timeout in an episode, an unmarked end, a cut-off tail; rewards and flags as columns."""
    data, ends = hopper_rows(source)
    data = {key: x[: ends[-1] - 40] for key, x in data.items()}
    data["timeouts"][200] = True
    data["terminals"][ends[2]] = False
    data["timeouts"][ends[2]] = False
    columns = {key: 1.0 * data[key][:, None] for key in ("rewards", "terminals")}
    path = write_d4rl(tmp_path / "hopper_medium_replay-v2.hdf5", {**data, **columns})
    flags = ["from-d4rl", "--file", path, "--out", "new"]
    output = run(ROOT / "data/make_dataset.py", *flags, cwd=tmp_path).stdout
    assert output.startswith("1 ends of episodes are not marked")
    compare(tmp_path / "new", data, {200, *ends})
    assert open_minari(tmp_path / "new").env_spec.id == "Hopper-v4"


@pytest.mark.parametrize("step", [1, 3])
def test_unmarked_ends_are_found(source, tmp_path, capsys, step):
    """Without next_observations and timeouts: cut where the states jump, and nowhere else."""
    data, ends = hopper_rows(source)
    del data["timeouts"], data["next_observations"]
    data["terminals"][ends[:-1:step]] = False
    hidden = [end for end in ends[:-1] if not data["terminals"][end]]
    convert(tmp_path, data, "my_own", env_id="Hopper-v5")
    assert f"{len(hidden)} ends of episodes are not marked" in capsys.readouterr().out
    compare(tmp_path / "new", data, set(ends))


@pytest.mark.parametrize("name, cuts", [("maze2d-umaze-v1", False), ("antmaze-umaze-v0", True)])
def test_marked_timeouts_are_trusted(tmp_path, capsys, name, cuts):
    """An angle wraps around, which is no end; but antmaze v0 marks its ends at wrong places."""
    data = random_rows(1000, *find_task(name)[1:3])
    data["observations"] = 0.1 * data["observations"].cumsum(0)
    data["observations"][:, :4] = np.arange(1000)[:, None] % 100 - 50.0
    data["timeouts"][[149, 649]] = True
    convert(tmp_path, data, name)
    jumps = set(range(99, 999, 100))
    compare(tmp_path / "new", data, {149, 649} | jumps if cuts else {149, 649})
    assert ("cut where" if cuts else "not cut, ") in capsys.readouterr().out


def test_the_environment_gives_the_spaces(tmp_path, capsys, monkeypatch):
    """Bounded observations; a class of the user's own package. The file's data tell two runs."""
    lines = "from gymnasium.envs import classic_control, register\n"
    lines += "register('Swing-v0', classic_control.PendulumEnv, max_episode_steps=90)"
    (tmp_path / "swings.py").write_text(lines)
    monkeypatch.chdir(tmp_path)
    data = random_rows(300, 3, 1)
    data["actions"][7] = 2.5
    data["timeouts"][149] = True
    convert(tmp_path, data, "p", env_id="Swing-v0", env_package="swings")
    output = capsys.readouterr().out
    assert "p: 1 of 300 actions lie outside of their space, by 0.5 at most" in output
    new = open_minari(tmp_path / "new")
    env = gym.make("Swing-v0")
    assert (new.observation_space, new.action_space) == (env.observation_space, env.action_space)
    assert (new.env_spec.id, new.env_spec.max_episode_steps) == ("Swing-v0", 90)
    with pytest.raises(SystemExit, match="error: .*new was made with file_crc"):
        convert(tmp_path, {**data, "rewards": 2 * data["rewards"]}, "p", env_id="Swing-v0")
    for env_id in ("CartPole-v1", "FrozenLake-v1", "PointMaze_UMaze-v3"):
        with pytest.raises(SystemExit, match=f"error: {env_id}: .* must be vectors, not "):
            convert(tmp_path, data, "p", env_id=env_id)


def test_jumps_are_no_normal_motion():
    """HalfCheetah moves by the size of its states in a step: that is no jump. One across a maze is,
    though only the position jumps; that jumps are frequent hides none."""
    env = gym.make("HalfCheetah-v5")
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    states = []
    a = np.zeros(6)
    for _ in range(3000):
        a = 0.9 * a + 0.4 * rng.normal(size=6)
        states.append(env.unwrapped.step(np.clip(a, -1, 1))[0])
    assert not make_dataset.find_jumps(np.float32(states)).any()
    walk = np.cumsum(rng.normal(size=(2000, 29)), axis=0) * 0.1
    walk[:, :2] += 20 * (np.arange(2000) // 50 % 2)[:, None]
    walk[:, 5] = 1.0  # does not move
    assert (np.flatnonzero(make_dataset.find_jumps(walk)) == np.arange(49, 1999, 50)).all()


@pytest.mark.parametrize("name", ["pen-human-v1", "antmaze-umaze-v2", "kitchen-partial-v0"])
def test_other_domains(tmp_path, name):
    """Adroit: timeouts alone, as maze2d. antmaze: every step at the goal is terminal, the episode
    goes on. Kitchen: no timeouts, a demonstration longer than the limit."""
    task = find_task(name)
    data = random_rows(1500, task.obs_dim, task.act_dim)
    ends = {91, 144, 145, 230, 700}
    data["timeouts"][[*ends]] = True
    if "antmaze" in name:
        data["terminals"][[*range(300, 320), *range(400, 701), 1499]] = True
    if "kitchen" in name:
        del data["timeouts"]
        data["terminals"][[186, 500, 1300]] = 1.0
        ends = {186, 466, 500, 780, 1060, 1300}
    convert(tmp_path, data, "file", name=name)
    compare(tmp_path / "new", data, ends, "antmaze" in name)
    metadata = open_minari(tmp_path / "new").storage.metadata
    assert (task.env_id or name) in metadata["env_spec"]
    assert metadata["ref_min_score"] == task.ref_min_score


def test_tasks_fit_their_environments():
    for env_id, *sizes in {task[:3] for task in TASKS.values() if task[0]}:
        env = gym.make(f"gymnasium_robotics:{env_id}")
        assert [*env.observation_space.shape, *env.action_space.shape] == sizes
        assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()


def test_bad_d4rl_files_are_one_line(tmp_path):
    for name, changes, message in (
        ("hopper_medium-v2", {"actions": np.zeros((49, 3))}, r"actions have the shape \(49, 3\)"),
        ("hopper_medium-v2", {"rewards": np.full(50, 1e300)}, "rewards hold .* too large"),
        ("halfcheetah_medium-v2", {}, r"\(11, 3\), halfcheetah-medium-v2 has \(17, 6\)"),
        ("ant_medium-v2", {}, "ant-medium-v2: .* 111 .* --env ant-medium"),
    ):
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            convert(tmp_path, {**random_rows(50, 11, 3), **changes}, name)
    assert not (tmp_path / "new").exists()


def test_a_full_disk_leaves_nothing(tmp_path):
    script = [sys.executable, str(ROOT / "data/make_dataset.py"), "duplicate", "--env", HOPPER]
    line = f"ulimit -f 50; exec {' '.join(script)} --out new"
    result = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1 and not any(tmp_path.iterdir())
    assert re.fullmatch("error: .*/new cannot be written .*\n", result.stderr)


def test_check_names_what_is_wrong(tmp_path, capsys):
    box = gym.spaces.Box(-1, 1, (2,))
    x = np.random.default_rng(0).uniform(-1, 1, (9, 6, 2))
    episodes = [[s.copy(), s[1:].copy(), s[1:, 0].copy(), np.arange(5) == 4] for s in x]
    write_minari(tmp_path / "fine", episodes, box, box)
    main(make_dataset.Check(env=str(tmp_path / "fine")))
    assert capsys.readouterr().out == "fine-v0: nothing found in 45 transitions\n"
    episodes[1][0][2] = np.nan
    episodes[2][2][0] = 1e300
    episodes[3][1] = episodes[3][1][1:]
    episodes[4][3][1] = True
    episodes[5][1][0] = (0.0, -3.5)
    episodes[6][0][1] = 7
    episodes[7][3][4] = False
    episodes[8] = [episodes[8][0][:1], *(x[:0] for x in episodes[8][1:])]
    bad = write_minari(tmp_path / "bad", episodes, box, box)
    with pytest.raises(SystemExit, match="error: scripts refuse bad-v0"):
        main(make_dataset.Check(env=str(bad)))
    found = """episode 1: observations hold NaN, inf or numbers too large for float32
        episode 2: rewards hold NaN, inf or numbers too large for float32
        episode 3: actions have the shape (4, 2), not (5, 2)
        episode 4: a terminal inside; scripts leave out what follows it
        episode 6: observations lie outside of their space
        episode 7: the end is not marked, as a termination or truncation
        episode 8: it has no transitions
        3 transitions follow a terminal within their episode
        1 of 25 actions lie outside of their space, by 2.5 at most"""
    assert re.sub("bad-v0: ", " " * 8, capsys.readouterr().out).strip() == found
    hdf5 = bad / "data" / "main_data.hdf5"
    hdf5.write_bytes(hdf5.read_bytes()[:5000])
    with pytest.raises(SystemExit, match="error: scripts refuse bad-v0"):
        main(make_dataset.Check(env=str(bad)))
    assert capsys.readouterr().out.count("cannot be read") == 1
