"""data/make_dataset.py: fraction, mix, duplicate hold what they say; D4RL's files, read plainly."""

import json
import re
import sys

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
from conftest import ROOT, SAMPLE, TINY_C, run
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage

import gta_diffusion
import td3bc

sys.path.insert(0, str(ROOT / "data"))
import make_dataset
from make_dataset import Duplicate, Fraction, FromD4RL, Mix, main

SCRIPT = ROOT / "data" / "make_dataset.py"


def minari_episodes(folder):
    return list(minari.MinariDataset(folder / "data").iterate_episodes())


def same(e, other):
    """Whether two Minari episodes hold the same numbers."""
    names = ("observations", "actions", "rewards", "terminations", "truncations")
    return all(np.array_equal(getattr(e, name), getattr(other, name)) for name in names)


def find_sources(episodes, sources):
    """The index of each episode among the sources, all of which differ."""
    found = [[i for i, source in enumerate(sources) if same(e, source)] for e in episodes]
    assert all(len(indices) == 1 for indices in found)
    return [i for (i,) in found]


def count(episodes):
    return sum(len(e.rewards) for e in episodes)


@pytest.fixture(scope="module")
def source():
    return minari_episodes(SAMPLE)


def test_repeated_functions_are_identical():
    from test_scripts import OWN, top_level

    own, other = top_level(SCRIPT), top_level(ROOT / "gta_diffusion.py")
    shared = (own.keys() & other.keys()) - OWN
    assert {"load_dataset", "find_minari", "require", "Episode"} <= shared
    assert {name: own[name] for name in shared} == {name: other[name] for name in shared}


# --- fraction, mix, duplicate ---


def test_count_near_is_the_nearest():
    rng = np.random.default_rng(0)
    for _ in range(200):
        lengths = rng.integers(1, 50, rng.integers(1, 20))
        number = int(rng.integers(1, 1000))
        k = make_dataset.count_near(lengths, number)
        errors = [abs(sum(lengths[:n]) - number) for n in range(1, len(lengths) + 1)]
        assert errors[k - 1] == min(errors)


@pytest.mark.parametrize("fraction", [0.05, 0.2, 1.0])
def test_fraction_holds_whole_random_episodes(source, tmp_path, fraction):
    folders = [tmp_path / name for name in ("a", "again", "b")]
    for folder, seed in zip(folders, (3, 3, 4)):
        main(Fraction(env=str(SAMPLE), fraction=fraction, seed=seed, out=folder))
    episodes = minari_episodes(folders[0])
    indices = find_sources(episodes, source)
    assert indices == sorted(set(indices))  # none twice, in the dataset's order
    longest = max(len(e.rewards) for e in source)
    assert abs(count(episodes) - fraction * count(source)) <= longest / 2 + 1
    if fraction == 1:
        assert indices == list(range(len(source)))
        return
    datasets = [gta_diffusion.load_dataset(str(folder)) for folder in folders]
    hashes = [gta_diffusion.fingerprint(dataset) for dataset in datasets]
    assert hashes[0] == hashes[1] != hashes[2]
    ids = [dataset.ids[0] for dataset in datasets]
    assert ids[0] == f"hopper-medium-sample-fraction{round(100 * fraction)}-seed3-v0"
    assert ids[0] == ids[1] != ids[2]


def test_a_draw_is_random(source, tmp_path):
    """Every episode is drawn equally often, not only the first ones."""
    buffers = make_dataset.read_episodes(str(SAMPLE))
    drawn = np.zeros(len(buffers))
    position = {id(e): i for i, e in enumerate(buffers)}
    for seed in range(1000):
        for e in make_dataset.draw_episodes(buffers, count(source) // 5, seed):
            drawn[position[id(e)]] += 1
    assert abs(drawn / 1000 - 0.2).max() < 0.07  # 5 standard deviations


def test_what_surrounds_the_episodes_is_kept(tmp_path):
    main(Fraction(env=str(SAMPLE), fraction=0.1, out=tmp_path / "new"))
    old, new = (
        json.loads((folder / "data" / "metadata.json").read_text())
        for folder in (SAMPLE, tmp_path / "new")
    )
    for key in ("env_spec", "eval_env_spec", "observation_space", "action_space", "ref_max_score"):
        assert new[key] == old[key]
    dataset = gta_diffusion.load_dataset(str(tmp_path / "new"))
    assert dataset.source.recover_environment(eval_env=True).spec.id == "Hopper-v5"
    assert new["total_steps"] == sum(len(e.rewards) for e in dataset.episodes)
    assert dataset.episodes[0].observations.dtype == np.float64
    assert not [path.name for path in tmp_path.iterdir() if path.name != "new"]


def test_mix_is_all_of_one_and_some_of_another(source, tmp_path):
    main(Fraction(env=str(SAMPLE), fraction=0.3, seed=1, out=tmp_path / "own"))
    own = minari_episodes(tmp_path / "own")
    flags = {"env": str(tmp_path / "own"), "other": str(SAMPLE), "seed": 5}
    main(Mix(**flags, num_transitions=6000, out=tmp_path / "mix"))
    mixed = minari_episodes(tmp_path / "mix")
    assert all(same(e, other) for e, other in zip(mixed, own))
    added = mixed[len(own) :]
    indices = find_sources(added, source)
    assert indices == sorted(set(indices))
    assert abs(count(added) - 6000) <= 500
    # expert-only: the same draw alone
    main(Fraction(env=str(SAMPLE), num_transitions=6000, seed=5, out=tmp_path / "alone"))
    assert find_sources(minari_episodes(tmp_path / "alone"), source) == indices
    # 1:20
    main(Mix(**flags, ratio=0.05, out=tmp_path / "ratio"))
    assert abs(count(minari_episodes(tmp_path / "ratio")) - 1.05 * count(own)) <= 500
    names = {gta_diffusion.load_dataset(str(tmp_path / n)).ids[0] for n in ("own", "mix", "ratio")}
    assert len(names) == 3


@pytest.mark.parametrize("top, min_return", [(0.1, None), (1.0, 2500.0), (0.05, 3000.0)])
def test_duplicate_adds_copies_of_the_best(source, tmp_path, top, min_return):
    new = Duplicate(
        env=str(SAMPLE), num_transitions=30_000, top=top, min_return=min_return, out=tmp_path / "d"
    )
    main(new)
    episodes = minari_episodes(tmp_path / "d")
    assert all(same(e, other) for e, other in zip(episodes, source))
    copies = find_sources(episodes[len(source) :], source)
    assert abs(count(episodes) - count(source) - 30_000) <= 500
    returns = [sum(e.rewards.tolist()) for e in source]
    best = sorted(range(len(source)), key=lambda i: -returns[i])[: int(np.ceil(top * len(source)))]
    best = [i for i in best if min_return is None or returns[i] >= min_return]
    assert set(copies) == set(best)
    times = [copies.count(i) for i in best]
    assert max(times) - min(times) <= 1


def test_dict_observations_stay_dictionaries(tmp_path):
    box = gym.spaces.Box(-np.inf, np.inf, (2,))
    space = gym.spaces.Dict({"b": box, "a": gym.spaces.Dict({"c": box})})
    rng = np.random.default_rng(0)
    buffers = [
        EpisodeBuffer(
            observations={
                "b": rng.normal(size=(T + 1, 2)),
                "a": {"c": rng.normal(size=(T + 1, 2))},
            },
            actions=rng.uniform(-1, 1, (T, 2)).astype(np.float32),
            rewards=rng.normal(size=T),
            terminations=np.zeros(T, bool),
            truncations=np.arange(T) == T - 1,
        )
        for T in (5, 3, 4)
    ]
    (tmp_path / "old").mkdir()
    storage = MinariStorage.new(
        tmp_path / "old" / "data", space, gym.spaces.Box(-1, 1, (2,)), gym.spec("Hopper-v5")
    )
    storage.update_metadata({"dataset_id": "old-v7", "minari_version": minari.__version__})
    storage.update_episodes(buffers)
    main(Fraction(env=str(tmp_path / "old"), fraction=1.0, out=tmp_path / "new"))
    dataset = minari.MinariDataset(tmp_path / "new" / "data")
    assert dataset.observation_space == space and dataset.id == "old-fraction100-seed0-v7"
    for e, buffer in zip(dataset.iterate_episodes(), buffers, strict=True):
        np.testing.assert_array_equal(e.observations["b"], buffer.observations["b"])
        np.testing.assert_array_equal(e.observations["a"]["c"], buffer.observations["a"]["c"])
        np.testing.assert_array_equal(e.truncations, buffer.truncations)


# --- D4RL ---


def write_d4rl(path, arrays):
    """Writes arrays as D4RL does, compressed, beside what its files hold and no one needs."""
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file.create_dataset(key, data=array, compression="gzip")
        N = len(arrays["rewards"])
        if "kitchen" in path.name:
            file["infos"] = np.zeros(N, np.int64)  # no group there
        else:
            file["infos/qpos"] = np.zeros((N, 3), np.float32)
            file["infos/goal"] = np.zeros((N, 2), np.float32)
            file["metadata/algorithm"] = np.bytes_("SAC")
            file["metadata/iteration"] = np.int32(7)
    return path


def random_rows(N, obs_dim, act_dim, seed=0):
    """Rows of numbers that are all different, so that none can take another's place unnoticed."""
    rng = np.random.default_rng(seed)
    return {
        "observations": rng.normal(size=(N, obs_dim)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (N, act_dim)).astype(np.float32),
        "rewards": rng.normal(size=N).astype(np.float32),
        "terminals": np.zeros(N, bool),
        "timeouts": np.zeros(N, bool),
    }


def convert(path, out, **flags):
    """Converts the file. Returns the Dataset that the scripts make of it, and its metadata."""
    main(FromD4RL(file=path, out=out, **flags))
    metadata = json.loads((out / "data" / "metadata.json").read_text())
    return gta_diffusion.load_dataset(str(out)), metadata


def check(dataset, plain):
    """plain: a list of episodes, each a list of (s, a, r, s', terminal), made one by one."""
    assert len(dataset.episodes) == len(plain)
    for e, steps in zip(dataset.episodes, plain):
        assert len(e.rewards) == len(steps) and len(e.observations) == len(steps) + 1
        for t, (s, a, r, s_next, terminal) in enumerate(steps):
            assert (e.observations[t] == s).all() and (e.actions[t] == a).all()
            assert (e.observations[t + 1] == s_next).all()
            assert e.rewards[t] == r and e.terminals[t] == terminal
    for e in minari_episodes_of(dataset):  # an episode ends in one way
        assert (e.terminations ^ e.truncations).tolist() == [False] * (len(e.rewards) - 1) + [True]


def minari_episodes_of(dataset):
    return dataset.source.iterate_episodes()


def qlearning_transitions(data):
    """What d4rl.qlearning_dataset makes of a file with timeouts: pairs of rows, one by one."""
    transitions = []
    for i in range(len(data["rewards"]) - 1):
        if not data["timeouts"][i]:
            s, s_next = data["observations"][i], data["observations"][i + 1]
            terminal = data["terminals"][i]
            transitions.append((s, data["actions"][i], data["rewards"][i], s_next, terminal))
    return transitions


def check_transitions(dataset, transitions):
    own = [
        (e.observations[t], e.actions[t], e.rewards[t], e.observations[t + 1], e.terminals[t])
        for e in dataset.episodes
        for t in range(len(e.rewards))
    ]
    assert len(own) == len(transitions)
    for x, y in zip(own, transitions):
        assert all(np.array_equal(a, b) for a, b in zip(x, y))


def hopper_rows(source, num_episodes=None):
    """The bundled episodes as the rows of a D4RL v2 file."""
    e = source[:num_episodes]
    data = {
        "observations": np.concatenate([x.observations[:-1] for x in e]),
        "next_observations": np.concatenate([x.observations[1:] for x in e]),
        "actions": np.concatenate([x.actions for x in e]),
        "rewards": np.concatenate([x.rewards for x in e]),
    }
    data = {key: array.astype(np.float32) for key, array in data.items()}
    data["terminals"] = np.concatenate([x.terminations for x in e])
    data["timeouts"] = np.concatenate([x.truncations for x in e])
    return data


def test_real_hopper_end_to_end(source, tmp_path):
    """The bundled dataset as D4RL would hold it, through the command line, to a learner."""
    path = write_d4rl(tmp_path / "hopper_medium_replay-v2.hdf5", hopper_rows(source))
    result = run(SCRIPT, "from-d4rl", "--file", path, "--out", tmp_path / "new", cwd=tmp_path)
    dataset = gta_diffusion.load_dataset(str(tmp_path / "new"))
    returns = np.array([e.rewards.sum() for e in dataset.episodes])
    assert result.stdout.splitlines()[-1] == (
        f"wrote {tmp_path / 'new'}: d4rl-hopper-medium-replay-v2, {len(source)} episodes, "
        f"{count(source)} transitions, return mean {returns.mean():.1f}, min {returns.min():.1f}, "
        f"max {returns.max():.1f}"
    )
    assert dataset.ids == ["d4rl-hopper-medium-replay-v2"] and dataset.env_id == "Hopper-v4"
    assert td3bc.reference_returns(dataset) == (-20.272305, 3234.3)
    for e, other in zip(dataset.episodes, source, strict=True):
        np.testing.assert_array_equal(e.observations, other.observations.astype(np.float32))
        np.testing.assert_array_equal(e.actions, other.actions)
        np.testing.assert_array_equal(e.rewards, other.rewards.astype(np.float32))
        np.testing.assert_array_equal(e.terminals, other.terminations)
    result = run(
        ROOT / "td3bc.py", *TINY_C, "--eval-every", 6, "--env", tmp_path / "new", cwd=tmp_path
    )
    assert result.stdout.splitlines()[-1].startswith("d4rl-hopper-medium-replay-v2 | td3bc | ")


def test_medium_replay_with_an_unfinished_last_episode(source, tmp_path):
    """Timeouts come in the middle of an episode (a training round's 1000 steps are over); one end
    is not marked at all; the last episode stops with the file."""
    data = hopper_rows(source, 8)
    lengths = np.cumsum([len(e.rewards) for e in source[:8]])
    N = int(lengths[7]) - 40
    data = {key: array[:N] for key, array in data.items()}
    data["timeouts"][200] = True
    data["terminals"][lengths[2] - 1] = data["timeouts"][lengths[2] - 1] = False
    data["terminals"] = data["terminals"].astype(np.float32)[:, None]
    data["rewards"] = data["rewards"][:, None]
    dataset, _ = convert(
        write_d4rl(tmp_path / "hopper_medium_replay-v2.hdf5", data), tmp_path / "new"
    )
    plain, steps = [], []
    for i in range(N):
        s_next = data["next_observations"][i]
        terminal = bool(data["terminals"][i, 0])
        row = data["observations"][i], data["actions"][i], data["rewards"][i, 0], s_next, terminal
        steps.append(row)
        unmarked = i + 1 < N and (s_next != data["observations"][i + 1]).any()
        if terminal or data["timeouts"][i] or unmarked or i == N - 1:
            plain.append(steps)
            steps = []
    assert len(plain) == 9
    check(dataset, plain)
    assert not dataset.episodes[-1].terminals.any() and not dataset.episodes[3].terminals.any()


def test_locomotion_without_next_observations(source, tmp_path):
    """A timeout's transition has no s' and is left out; a terminal's keeps its flag and reward."""
    data = hopper_rows(source)
    ends = np.flatnonzero(data["timeouts"])
    data = {key: array[: ends[1] + 300] for key, array in data.items()}
    del data["next_observations"]
    dataset, _ = convert(write_d4rl(tmp_path / "hopper_medium-v2.hdf5", data), tmp_path / "new")
    plain, steps = [], []
    N = len(data["rewards"])
    for i in range(N):
        s, a, r = (data[key][i] for key in ("observations", "actions", "rewards"))
        if data["terminals"][i]:
            plain.append([*steps, (s, a, r, s, True)])
        elif data["timeouts"][i] or i == N - 1:
            plain.append(steps)
        else:
            steps.append((s, a, r, data["observations"][i + 1], False))
            continue
        steps = []
    assert data["terminals"].any() and data["timeouts"].any()
    check(dataset, [episode for episode in plain if episode])
    # all but the s' of terminals is as in d4rl.qlearning_dataset
    others = [x for x in qlearning_transitions(data) if not x[4]]
    alive = [[x for x in episode if not x[4]] for episode in plain]
    assert len(others) == sum(map(len, alive))
    assert all(np.array_equal(x[3], y[3]) for x, y in zip(others, sum(alive, [])))


def test_without_timeouts_the_time_limit_ends_an_episode(tmp_path):
    data = random_rows(2600, 17, 6)
    del data["timeouts"]
    data["terminals"][[299, 1499]] = True  # 300 steps, 1000 and 200, 1000 and 100
    dataset, _ = convert(
        write_d4rl(tmp_path / "halfcheetah_medium-v0.hdf5", data), tmp_path / "new"
    )
    assert [len(e.rewards) for e in dataset.episodes] == [300, 999, 200, 999, 99]
    assert [e.terminals[-1] for e in dataset.episodes] == [True, False, True, False, False]
    starts = [data["observations"][i] for i in (0, 300, 1300, 1500, 2500)]
    assert all((e.observations[0] == s).all() for e, s in zip(dataset.episodes, starts))


def test_maze2d(tmp_path):
    """One long trajectory, timeouts where a goal is reached, also in a row; no terminals."""
    data = random_rows(1000, 4, 2)
    data["timeouts"][[91, 144, 145, 230, 700]] = True
    path = write_d4rl(tmp_path / "maze2d-umaze-sparse-v1.hdf5", data)
    dataset, metadata = convert(path, tmp_path / "new")
    assert [len(e.rewards) for e in dataset.episodes] == [91, 52, 84, 469, 298]
    check_transitions(dataset, qlearning_transitions(data))
    assert not any(e.terminals.any() for e in dataset.episodes)
    assert dataset.env_id == "maze2d-umaze-v1" and td3bc.domain_of(dataset.env_id) == "maze2d"
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == (23.85, 161.86)


def test_antmaze(tmp_path):
    """Every step at the goal is terminal, and the episode goes on to its timeout of 1001 steps."""
    data = random_rows(3503, 29, 8)
    data["timeouts"][[1000, 2001, 3002]] = True
    data["rewards"][:] = 0.0
    at_goal = [*range(500, 520), *range(640, 1001), 3002]
    data["rewards"][at_goal] = 1.0
    data["terminals"] = data["rewards"].copy()  # float32, as relabelled
    path = write_d4rl(
        tmp_path / "Ant_maze_big-maze_noisy_multistart_True_multigoal_False_sparse_fixed.hdf5", data
    )
    dataset, metadata = convert(path, tmp_path / "new", name="antmaze-medium-play-v2")
    plain, steps, success = [], [], False
    for i in range(3503):
        s, a, r = (data[key][i] for key in ("observations", "actions", "rewards"))
        terminal, last = bool(data["terminals"][i]), bool(data["timeouts"][i]) or i == 3502
        if not success and (terminal or not last):
            steps.append((s, a, r, s if last else data["observations"][i + 1], terminal))
            success = terminal
        if last:
            plain.append(steps)
            steps, success = [], False
    assert [len(steps) for steps in plain] == [501, 1000, 1001, 499]
    check(dataset, plain)
    assert [e.rewards.sum() for e in dataset.episodes] == [1, 0, 1, 0]
    assert td3bc.domain_of(dataset.env_id) == "antmaze" and metadata["ref_max_score"] == 1.0


def test_adroit(tmp_path):
    """Human demonstrations: timeouts at their ends, of different lengths, no terminals."""
    data = random_rows(1037, 45, 24)
    data["timeouts"][[199, 350, 629, 1036]] = True
    dataset, metadata = convert(write_d4rl(tmp_path / "pen-human-v1.hdf5", data), tmp_path / "new")
    assert [len(e.rewards) for e in dataset.episodes] == [199, 150, 278, 406]
    check_transitions(dataset, qlearning_transitions(data))
    assert td3bc.domain_of(dataset.env_id) == "adroit" and metadata["ref_min_score"] == 96.262799
    assert td3bc.read_env_spec(dataset, "eval_env_spec")["max_episode_steps"] == 100


def test_kitchen(tmp_path):
    """No timeouts; each demonstration ends with a terminal, float32; one is longer than 280."""
    data = random_rows(800, 60, 9)
    del data["timeouts"]
    data["terminals"] = data["terminals"].astype(np.float32)
    data["terminals"][[186, 500, 799]] = 1.0
    path = write_d4rl(tmp_path / "kitchen_microwave_kettle_light_slider-v0.hdf5", data)
    dataset, metadata = convert(path, tmp_path / "new", name="kitchen-partial-v0")
    plain = []
    demos = (0, 187, True), (187, 467, False), (467, 501, True), (501, 781, False), (781, 800, True)
    for start, stop, terminal in demos:
        rows = range(start, stop if terminal else stop - 1)
        plain.append([])
        for i in rows:
            end = terminal and i == stop - 1
            s_next = data["observations"][i if end else i + 1]
            s, a, r = (data[key][i] for key in ("observations", "actions", "rewards"))
            plain[-1].append((s, a, r, s_next, end))
    check(dataset, plain)
    assert td3bc.domain_of(dataset.env_id) == "kitchen" and metadata["ref_max_score"] == 4.0


@pytest.mark.parametrize("task", [t for t in make_dataset.TASKS.values() if t.env_id])
def test_tasks_fit_their_environments(task):
    """Observations and actions of the environment are as many as D4RL's."""
    known = task.env_id in gym.registry
    if not known:
        pytest.importorskip("gymnasium_robotics")
    env = gym.make(task.env_id if known else f"gymnasium_robotics:{task.env_id}")
    dims = (*env.observation_space.shape, *env.action_space.shape)
    assert dims == (task.obs_dim, task.act_dim)
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()


def test_hopper_v4_pays_at_a_fall_what_d4rl_pays():
    """The reason for -v4: at a fall, -v5 lacks the healthy reward of 1; until then they agree."""
    envs = [gym.make(name) for name in ("Hopper-v4", "Hopper-v5")]
    for env in envs:
        env.reset(seed=0)
    envs[0].action_space.seed(0)
    terminated = False
    while not terminated:
        action = envs[0].action_space.sample()
        (s, r, terminated, _, _), (s5, r5, terminated5, _, _) = (env.step(action) for env in envs)
        assert (s == s5).all() and terminated == terminated5
        assert r - r5 == pytest.approx(1.0 if terminated else 0.0)


@pytest.mark.parametrize("robot", ["halfcheetah", "hopper", "walker2d"])
@pytest.mark.parametrize("data", ["medium", "medium-replay", "medium-expert"])
def test_the_papers_nine_have_a_task(robot, data):
    file = make_dataset.Path(f"{robot}_{data.replace('-', '_')}-v2.hdf5")
    name, task = make_dataset.find_task(FromD4RL(file=file))
    assert name == f"{robot}-{data}-v2"
    assert (task.ref_min_score, task.ref_max_score) == td3bc.REFERENCE_RETURNS[robot]
    assert make_dataset.find_task(FromD4RL(file=file, name="antmaze-umaze-diverse-v2"))[1]


# --- one line, nothing written ---


def write_bad_d4rl(tmp_path, source, damage):
    data = hopper_rows(source, 2)
    path = tmp_path / "hopper_medium-v2.hdf5"
    if damage == "keys":
        del data["terminals"], data["actions"]
    if damage == "lengths":
        data["actions"] = data["actions"][:-1]
    if damage == "nan":
        data["observations"][5, 3] = np.nan
    if damage == "robot":
        path = tmp_path / "halfcheetah_medium-v2.hdf5"
    if damage == "name":
        path = tmp_path / "my_own.hdf5"
    if damage != "missing":
        write_d4rl(path, data)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if damage == "no HDF5":
        path.write_bytes(b"<html>404</html>")
    return path


@pytest.mark.parametrize(
    "damage, flags, message",
    [
        ("missing", {}, "no such file"),
        ("truncated", {}, "not a whole HDF5 file"),
        ("no HDF5", {}, "not a whole HDF5 file"),
        ("keys", {}, "no file of D4RL, it lacks actions, terminals"),
        ("lengths", {}, "do not fit together"),
        ("nan", {}, "are not finite"),
        ("robot", {}, r"states and actions \(11, 3\), halfcheetah-medium-v2 has \(17, 6\)"),
        ("name", {}, "my-own: no dataset of D4RL that is known here; give --name"),
        ("none", {"env_id": "Walker2d-v5"}, r"--env-id Walker2d-v5: states and actions \(17, 6\)"),
        ("none", {"env_id": "NoSuchThing-v0"}, "--env-id NoSuchThing-v0: "),
        ("none", {"name": "../escape", "env_id": "Hopper-v5"}, "letters, digits"),
        ("none", {"dataset_id": "no version"}, "--dataset-id no version: must be like"),
    ],
)
def test_bad_d4rl_files_are_one_line(source, tmp_path, damage, flags, message):
    path = write_bad_d4rl(tmp_path, source, damage)
    with pytest.raises(SystemExit, match=message) as error:
        main(FromD4RL(file=path, out=tmp_path / "new", **flags))
    assert re.fullmatch("error: .*", error.value.code)  # a dot is no line break
    assert {p.name for p in tmp_path.iterdir()} <= {path.name}


def test_own_file_with_an_environment(source, tmp_path):
    path = write_bad_d4rl(tmp_path, source, "name")
    dataset, metadata = convert(path, tmp_path / "new", env_id="Hopper-v5")
    assert dataset.env_id == "Hopper-v5" and dataset.ids == ["d4rl-my-own-v0"]
    assert len(dataset.episodes) == 2 and "ref_min_score" not in metadata


@pytest.mark.parametrize(
    "args, message",
    [
        (Fraction(env=str(SAMPLE)), "give either --fraction or --num-transitions"),
        (Fraction(env=str(SAMPLE), fraction=0.1, num_transitions=5), "give either --fraction or"),
        (Fraction(env=str(SAMPLE), fraction=0.0), "--fraction 0.0: must be above 0"),
        (Fraction(env=str(SAMPLE), fraction=1.5), "--fraction 1.5: must be above 0"),
        (Fraction(env=str(SAMPLE), fraction=float("nan")), "--fraction nan: must be above 0"),
        (Fraction(env=str(SAMPLE), num_transitions=10**9), "--num-transitions 1000000000: must"),
        (Fraction(env=str(SAMPLE), num_transitions=0), "--num-transitions 0: must be 1 to 40249"),
        (Fraction(env=str(SAMPLE), fraction=0.1, seed=-1), "--seed -1: must not be negative"),
        (Fraction(env="no-such-thing", fraction=0.1), "--env no-such-thing: not a folder here"),
        (Mix(env=str(SAMPLE), other=str(SAMPLE)), "give either --num-transitions or --ratio"),
        (Mix(env=str(SAMPLE), other=str(SAMPLE), ratio=-1.0), "--ratio -1.0: must be positive"),
        (Mix(env=str(SAMPLE), other=str(SAMPLE), ratio=20.0), "804980 transitions of --other"),
        (Duplicate(env=str(SAMPLE), top=0.0), "--top 0.0: must be above 0"),
        (Duplicate(env=str(SAMPLE), num_transitions=0), "--num-transitions 0: must be positive"),
        (Duplicate(env=str(SAMPLE), min_return=9999.0), "--min-return 9999.0: no episode"),
    ],
)
def test_bad_flags_are_one_line(tmp_path, args, message):
    args = type(args)(**{**vars(args), "out": tmp_path / "new"})
    with pytest.raises(SystemExit, match=message) as error:
        main(args)
    assert re.fullmatch("error: .*", error.value.code)
    assert not list(tmp_path.iterdir())


def test_different_environments_do_not_mix(source, tmp_path):
    path = write_d4rl(tmp_path / "hopper_medium-v2.hdf5", hopper_rows(source, 2))
    main(FromD4RL(file=path, out=tmp_path / "d4rl"))
    with pytest.raises(SystemExit, match="different environments, Hopper-v5 and Hopper-v4, do not"):
        main(Mix(env=str(SAMPLE), other=str(tmp_path / "d4rl"), ratio=0.1, out=tmp_path / "new"))


def test_an_existing_folder_is_left_alone(tmp_path):
    out = tmp_path / "new"
    out.mkdir()
    (out / "precious").write_text("mine")
    flags = ["--env", SAMPLE, "--fraction", 0.1, "--out", out]
    result = run(SCRIPT, "fraction", *flags, cwd=tmp_path, code=1)
    assert result.stderr == f"error: {out} exists; remove it or choose another --out\n"
    assert [p.name for p in out.iterdir()] == ["precious"] and len(list(tmp_path.iterdir())) == 1


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(make_dataset.os, "rename", fail)
    with pytest.raises(SystemExit, match="cannot be written .disk full"):
        main(Fraction(env=str(SAMPLE), fraction=0.05, out=tmp_path / "new"))
    assert not list(tmp_path.iterdir())


def test_default_folder_is_named_after_the_dataset(tmp_path, monkeypatch):
    """Beside the script, wherever it is called from; copied alone it works, too."""
    copy = tmp_path / "make_dataset.py"
    copy.write_text(SCRIPT.read_text())
    (tmp_path / "elsewhere").mkdir()
    flags = ["--env", SAMPLE, "--fraction", 0.075, "--seed", 2]
    run(copy, "fraction", *flags, cwd=tmp_path / "elsewhere")
    run(copy, "fraction", *flags, "--out", "here", cwd=tmp_path / "elsewhere")  # a relative path
    name = "hopper-medium-sample-fraction7p5-seed2"
    for folder in (tmp_path / name, tmp_path / "elsewhere" / "here"):
        assert gta_diffusion.load_dataset(str(folder)).ids == [f"{name}-v0"]
