"""data/make_dataset.py: fraction, mix, duplicate hold what they say; D4RL's files, read plainly."""

import re

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
from conftest import HOPPER, ROOT, run, write_minari

from make_dataset import TASKS, Duplicate, Fraction, FromD4rl, Mix, find_jumps, main


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
    a, again, b = (find(read(folder), source) for folder in folders)
    assert a == again != b and a == sorted(set(a))  # none twice, in the dataset's order
    lengths = np.array([len(e.rewards) for e in source])
    assert abs(lengths[a].sum() - 0.2 * lengths.sum()) <= lengths.max() / 2 + 1
    old, new = (open_minari(folder).storage.metadata for folder in (HOPPER, folders[0]))
    for key in ("env_spec", "eval_env_spec", "observation_space", "action_space", "ref_max_score"):
        assert new[key] == old[key]
    main(Fraction(env=HOPPER, fraction=0.2, seed=3, out=str(folders[0])))
    assert "a is finished, made with these flags" in capsys.readouterr().out
    for out, message in (("a", "made with seed 3; choose"), ("a/data", "nothing of make_dataset")):
        with pytest.raises(SystemExit, match=message):
            main(Fraction(env=HOPPER, fraction=0.2, seed=1, out=str(tmp_path / out)))


def test_mix_is_all_of_one_and_some_of_another(source, tmp_path):
    own, mix = (str(tmp_path / name) for name in ("own", "mix"))
    main(Fraction(env=HOPPER, num_transitions=12_000, seed=1, out=own))
    main(Mix(env=own, other=HOPPER, ratio=0.5, seed=5, out=mix))
    kept, mixed = find(read(own), source), find(read(mix), source)
    assert mixed[: len(kept)] == kept
    steps = [sum(len(source[i].rewards) for i in part) for part in (kept, mixed[len(kept) :])]
    np.testing.assert_allclose(steps, (12_000, 6_000), atol=501)


@pytest.mark.parametrize("top, min_return", [(0.1, None), (1.0, 2500.0)])
def test_duplicate_adds_copies_of_the_best(source, tmp_path, top, min_return):
    flags = {"num_transitions": 30_000, "top": top, "min_return": min_return}
    main(Duplicate(env=HOPPER, out=str(tmp_path / "d"), **flags))
    copies = find(read(tmp_path / "d"), source)
    assert copies[: len(source)] == list(range(len(source)))
    times = np.bincount(copies)[: len(source)] - 1
    assert abs(sum(n * len(e.rewards) for n, e in zip(times, source)) - 30_000) <= 500
    returns = np.array([sum(e.rewards.tolist()) for e in source])
    best = returns >= np.sort(returns)[-int(np.ceil(top * len(source)))]
    best &= returns >= (min_return or -np.inf)
    assert (times[best] > 0).all() and (times[~best] == 0).all() and np.ptp(times[best]) <= 1


def test_dictionaries_stay_and_no_environment_is_needed(tmp_path):
    old, new, box = tmp_path / "old", tmp_path / "new", gym.spaces.Box(-1, 1, (2,))
    space = gym.spaces.Dict({"b": box, "a": gym.spaces.Dict({"c": box})})
    x = np.random.default_rng(0).uniform(-1, 1, (3, 6, 2)).astype(np.float32)
    episodes = [({"b": s, "a": {"c": 2 * s}}, s[1:], s[1:, 0], np.zeros(5, bool)) for s in x]
    write_minari(old, episodes, space, box)
    main(Fraction(env=str(old), fraction=1.0, out=str(new)))
    assert open_minari(new).observation_space == space
    np.testing.assert_array_equal([e.observations["a"]["c"] for e in read(new)], 2 * x)
    with pytest.raises(SystemExit, match="sample-v0 and old-v0 differ in environment or spaces"):
        main(Mix(env=HOPPER, other=str(old), ratio=1e-4, out=str(tmp_path / "x")))


def write_d4rl(path, arrays):
    with h5py.File(path, "w") as file:
        file.update(arrays)
    return str(path)


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


def check(folder, data, ends, at_goal=False):
    """Compares a converted dataset with the rows of a file whose episodes end at ends, row by row.
    at_goal: they go on after a terminal."""
    s, terminals, N = data["observations"], data["terminals"].astype(bool), len(data["rewards"])
    last = [i in ends or i == N - 1 for i in range(N)]
    s_next = data.get("next_observations", [s[i if last[i] else i + 1] for i in range(N)])
    plain, rows, over = [], [], False
    for i in range(N):
        has_next = terminals[i] or not last[i] or "next_observations" in data
        rows += [i] * (has_next and not over)
        over = at_goal and (over or terminals[i]) and not last[i]
        if last[i]:
            plain, rows = plain + [rows] * bool(rows), []
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
    data["terminals"][ends[2]] = data["timeouts"][ends[2]] = False
    columns = {key: 1.0 * data[key][:, None] for key in ("rewards", "terminals")}
    path = write_d4rl(tmp_path / "hopper_medium_replay-v2.hdf5", {**data, **columns})
    flags = ["from-d4rl", "--file", path, "--out", "new"]
    output = run(ROOT / "data/make_dataset.py", *flags, cwd=tmp_path).stdout
    assert output.startswith("1 ends of episodes are not marked")
    check(tmp_path / "new", data, {200, *ends})
    assert open_minari(tmp_path / "new").env_spec.id == "Hopper-v4"


@pytest.mark.parametrize("step", [1, 3])
def test_unmarked_ends_are_found(source, tmp_path, capsys, step):
    """Without next_observations: all ends where the states jump are cut, and nowhere else."""
    data, ends = hopper_rows(source)
    del data["next_observations"]
    hidden = ends[:-1:step]
    data["terminals"][hidden] = data["timeouts"][hidden] = False
    path = write_d4rl(tmp_path / "my_own.hdf5", data)
    main(FromD4rl(file=path, env_id="Hopper-v5", out=str(tmp_path / "new")))
    assert f"{len(hidden)} ends of episodes are not marked" in capsys.readouterr().out
    check(tmp_path / "new", data, set(ends))


def test_jumps_are_no_normal_motion():
    """HalfCheetah moves by the size of its states in a step: that is no jump. One across a maze is,
    though only the position jumps; that jumps are frequent hides none."""
    env, rng, states, a = gym.make("HalfCheetah-v5"), np.random.default_rng(0), [], np.zeros(6)
    env.reset(seed=0)
    for _ in range(3000):
        a = 0.9 * a + 0.4 * rng.normal(size=6)
        states.append(env.unwrapped.step(np.clip(a, -1, 1))[0])
    assert not find_jumps(np.float32(states)).any()
    walk = np.cumsum(rng.normal(size=(2000, 29)), axis=0) * 0.1
    walk[:, :2] += 20 * (np.arange(2000) // 50 % 2)[:, None]
    walk[:, 5] = 1.0  # does not move
    assert (np.flatnonzero(find_jumps(walk)) == np.arange(49, 1999, 50)).all()


@pytest.mark.parametrize("name", ["pen-human-v1", "antmaze-umaze-v2", "kitchen-partial-v0"])
def test_other_domains(tmp_path, name):
    """Adroit: timeouts alone, as maze2d. antmaze: every step at the goal is terminal, the episode
    goes on. Kitchen: no timeouts, a demonstration longer than the limit."""
    env_id, *sizes, _, low, _ = next(x for key, x in TASKS.items() if re.fullmatch(key, name))
    data, ends = random_rows(1500, *sizes), {91, 144, 145, 230, 700}
    data["timeouts"][[*ends]] = True
    if "antmaze" in name:
        data["terminals"][[*range(300, 320), *range(400, 701), 1499]] = True
    if "kitchen" in name:
        del data["timeouts"]
        data["terminals"][[186, 500, 1300]] = 1.0
        ends = {186, 466, 500, 780, 1060, 1300}
    path = write_d4rl(tmp_path / "file.hdf5", data)
    main(FromD4rl(file=path, name=name, out=str(tmp_path / "new")))
    check(tmp_path / "new", data, ends, "antmaze" in name)
    metadata = open_minari(tmp_path / "new").storage.metadata
    assert (env_id or name) in metadata["env_spec"] and metadata["ref_min_score"] == low


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
        path = write_d4rl(tmp_path / f"{name}.hdf5", {**random_rows(50, 11, 3), **changes})
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            main(FromD4rl(file=path, out=str(tmp_path / "new")))
    assert not (tmp_path / "new").exists()
