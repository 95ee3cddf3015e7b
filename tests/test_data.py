"""Reading datasets and buffers, the same text in all scripts: what is understood, and what ends
in one line that says why."""

import json
import os

import gymnasium as gym
import numpy as np
import pytest
from conftest import HOPPER, ROOT, run, write_minari
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Tuple

import td3bc

ACTIONS = Box(-1, 1, (3,))
STATES = Box(-np.inf, np.inf, (11,), np.float64)
SPEC = gym.spec("Hopper-v5")


def episodes(*lengths, obs=11, act=3):
    """Random episodes of these lengths, each ended by the environment."""
    rng = np.random.default_rng(0)
    made = []
    for T in lengths:
        arrays = rng.normal(size=(T + 1, obs)), rng.uniform(-1, 1, (T, act)), rng.normal(size=T)
        made.append((*arrays, np.arange(T) == T - 1))
    return made


def load(folder):
    return td3bc.load_episodes(td3bc.open_datasets(str(folder)))


def message(function, *inputs):
    """What a call ends the program with."""
    with pytest.raises(SystemExit) as caught:
        function(*inputs)
    assert "\n" not in caught.value.code and caught.value.code.startswith("error: ")
    return caught.value.code


# --- what --env takes ---


def test_short_names(monkeypatch):
    asked = []
    monkeypatch.setattr(td3bc.minari, "load_dataset", lambda name, download: asked.append(name))
    for name in ("hopper-medium", "walker2d-medium-expert", "maze2d-umaze-dense", "maze2d-medium"):
        td3bc.open_datasets(name)
    for name in ("antmaze-medium-play", "pen-expert", "kitchen-partial+door-cloned", "a/b-v3"):
        td3bc.open_datasets(name)
    assert asked == [
        *("mujoco/hopper/medium-v0", "mujoco/walker2d/medium-v0", "mujoco/walker2d/expert-v0"),
        *("D4RL/pointmaze/umaze-dense-v2", "D4RL/pointmaze/medium-v2"),
        *("D4RL/antmaze/medium-play-v1", "D4RL/pen/expert-v2"),
        *("D4RL/kitchen/partial-v2", "D4RL/door/cloned-v2", "a/b-v3"),
    ]


def test_several_datasets_and_folders_with_a_plus(tmp_path):
    one = write_minari(tmp_path / "a+b", episodes(3), STATES, ACTIONS, SPEC)
    two = write_minari(tmp_path / "c", episodes(4, 5), STATES, ACTIONS, SPEC)
    assert [len(e.rewards) for e in load(f"{one}+{two}")] == [3, 4, 5]
    assert [len(e.rewards) for e in load(f"{two}+{one}")] == [4, 5, 3]
    other = write_minari(tmp_path / "d", episodes(4), STATES, ACTIONS, gym.spec("Walker2d-v5"))
    assert "another environment" in message(load, f"{two}+{other}")
    states = Box(-np.inf, np.inf, (10,), np.float64)
    small = write_minari(tmp_path / "e", episodes(4, obs=10), states, ACTIONS, SPEC)
    assert "states of different sizes" in message(load, f"{two}+{small}")
    assert "no episodes" in message(load, write_minari(tmp_path / "f", [], STATES, ACTIONS, SPEC))


def test_what_is_not_there_ends_in_one_line(tmp_path, monkeypatch):
    def offline(name, download):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(td3bc.minari, "load_dataset", offline)
    text = message(td3bc.open_datasets, "mujoco/x/y-v0")
    assert "--env mujoco/x/y-v0" in text and "no network" in text
    monkeypatch.setattr(td3bc, "__file__", str(tmp_path / "td3bc.py"))
    monkeypatch.chdir(tmp_path)
    assert "--env is missing" in message(td3bc.open_datasets, td3bc.DEFAULT_ENV)


def test_a_damaged_file_ends_in_one_line(tmp_path):
    folder = write_minari(tmp_path / "x", episodes(3), STATES, ACTIONS, SPEC)
    path = folder / "data" / "main_data.hdf5"
    path.write_bytes(path.read_bytes()[:700])
    assert "x-v0 cannot be read" in message(load, folder)


# --- arrays and spaces ---


def test_nested_observations_are_flattened_as_gymnasium_does(tmp_path):
    sub = Tuple([Box(-1, 1, (2, 2), np.float32), Discrete(3)])
    z = Box(-9, 9, (2,), np.float64)
    space = Dict({"z": z, "goal": Discrete(4), "more": sub, "n": MultiDiscrete([2, 3])})
    space.seed(0)
    steps = [space.sample() for _ in range(5)]

    def stack(space, values):
        if isinstance(space, Dict):
            return {key: stack(own, [v[key] for v in values]) for key, own in space.items()}
        if isinstance(space, Tuple):
            return tuple(stack(own, [v[i] for v in values]) for i, own in enumerate(space))
        return np.stack(values)

    _, *arrays = episodes(4)[0]
    folder = write_minari(tmp_path / "x", [(stack(space, steps), *arrays)], space, ACTIONS)
    expected = [gym.spaces.flatten(space, step) for step in steps]
    np.testing.assert_array_equal(load(folder)[0].observations, expected)


@pytest.mark.parametrize("image", [Box(0, 255, (8, 8, 3), np.uint8), Box(0, 1, (3, 8, 8))])
def test_images_are_refused_wherever_they_are(tmp_path, image):
    frames = np.zeros((4, *image.shape), image.dtype)
    _, *arrays = episodes(3)[0]
    options = {"jpeg_encoding": False}
    plain = write_minari(tmp_path / "x", [(frames, *arrays)], image, ACTIONS, **options)
    space = Dict(a=Dict(camera=image), b=STATES)
    observations = {"a": {"camera": frames}, "b": np.zeros((4, 11))}
    nested = write_minari(tmp_path / "y", [(observations, *arrays)], space, ACTIONS, **options)
    assert str(image.shape) in message(load, plain)
    assert "camera" in message(load, nested)


def test_discrete_actions_are_refused(tmp_path):
    s, _, *arrays = episodes(3)[0]
    folder = write_minari(tmp_path / "x", [(s, np.array([0, 1, 1]), *arrays)], STATES, Discrete(2))
    assert "Discrete(2)" in message(load, folder)


def test_shapes(tmp_path):
    """[T] for actions of one dimension and [T, 1] for rewards say the same; else a line."""
    s, a, r, terminal = episodes(4, act=1)[0]
    box = Box(-1, 1, (1,))
    folder = write_minari(tmp_path / "x", [(s, a[:, 0], r[:, None], terminal)], STATES, box, SPEC)
    (e,) = load(folder)
    assert e.actions.shape == (4, 1) and e.rewards.shape == (4,)
    folder = write_minari(tmp_path / "y", [(s[:-1], a, r, terminal)], STATES, box, SPEC)
    text = message(load, folder)
    assert "observations of episode 0" in text and "(4, 11), not (5, 11)" in text
    folder = write_minari(tmp_path / "z", [(s, a[:3], r, terminal)], STATES, box, SPEC)
    assert "actions of episode 0 have the shape (3, 1), not (4, 1)" in message(load, folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
@pytest.mark.parametrize("index, name", [(0, "observations"), (1, "actions"), (2, "rewards")])
def test_numbers_that_float32_cannot_hold_are_named(tmp_path, value, index, name):
    (episode,) = episodes(4)
    episode[index][2] = value
    folder = write_minari(tmp_path / "x", [episode], STATES, ACTIONS, SPEC)
    assert f"{name} of episode 0 hold NaN" in message(load, folder)


def test_an_action_without_width_is_zero_and_comes_back(tmp_path):
    box = Box(np.float32([-1, 2, -3]), np.float32([1, 2, 5]))
    folder = write_minari(tmp_path / "x", episodes(40), STATES, box, SPEC)
    args = td3bc.Args(device="cpu", batch_size=64)
    (e,) = load(folder)
    e.actions[:, 1] = 2
    draw_batch, scale = td3bc.pack_transitions([e], box, args)
    _, a, *_ = draw_batch()
    assert (a[..., 1] == 0).all() and a.isfinite().all()
    back = scale["center"] + scale["radius"] * a
    distance = np.abs(back[0].numpy()[:, None] - e.actions[None]).max(-1).min(1)
    assert distance.max() < 1e-6


def test_transitions_are_the_datasets(tmp_path):
    """Truncated ends keep their next state, terminal is terminated, states are standardised."""
    made = [(*e[:3], np.zeros(len(e[2]), bool)) if i else e for i, e in enumerate(episodes(3, 4))]
    folder = write_minari(tmp_path / "x", made, STATES, ACTIONS, SPEC)
    args = td3bc.Args(device="cpu", batch_size=500, num_seeds=2)
    draw_batch, scale = td3bc.pack_transitions(load(folder), ACTIONS, args)
    s, a, r, s_next, terminal = (x.reshape(1000, *x.shape[2:]).numpy() for x in draw_batch())
    rows = np.concatenate([s, a, r[:, None], s_next, terminal[:, None]], axis=1)
    states = np.concatenate([e[0][:-1] for e in made])
    expected = [
        np.concatenate(
            [(e[0][t] - states.mean(0)) / (states.std(0) + 1e-3), e[1][t], e[2][t : t + 1]]
            + [(e[0][t + 1] - states.mean(0)) / (states.std(0) + 1e-3), e[3][t : t + 1]]
        )
        for e in made
        for t in range(len(e[2]))
    ]
    drawn = np.unique(rows.round(4), axis=0)
    np.testing.assert_allclose(drawn, np.unique(np.round(expected, 4), axis=0), atol=2e-4)


# --- environments ---


def envs_of(folder, **flags):
    about, args = {}, td3bc.Args(device="cpu", **flags)
    return td3bc.make_envs(td3bc.open_datasets(str(folder))[0], args, about), args, about


def test_a_dataset_of_other_actions_or_states_is_refused(tmp_path):
    wide = write_minari(tmp_path / "wide", episodes(4), STATES, Box(-10, 10, (3,)), SPEC)
    assert "(-10.0, 10.0" in message(envs_of, wide)
    two = write_minari(tmp_path / "two", episodes(4, act=2), STATES, Box(-1, 1, (2,)), SPEC)
    assert "(2,)" in message(envs_of, two)
    states = Box(-np.inf, np.inf, (12,), np.float64)
    more = write_minari(tmp_path / "more", episodes(4, obs=12), states, ACTIONS, SPEC)
    assert "observation_space" in message(envs_of, more)
    bounded = write_minari(tmp_path / "b", episodes(4), Box(-1, 1, (11,)), ACTIONS, SPEC)
    assert "observation_space" in message(envs_of, bounded)


def test_wrappers_are_left_out_and_named(tmp_path, capsys):
    spec = json.loads(SPEC.to_json())
    wrapper = {"name": "Monitor", "entry_point": "nowhere:Monitor", "kwargs": None}
    spec |= {"entry_point": "nowhere:Env", "additional_wrappers": [wrapper]}
    folder = write_minari(tmp_path / "x", episodes(4), STATES, ACTIONS, spec)
    envs, *_ = envs_of(folder)
    assert "without the wrappers Monitor" in capsys.readouterr().out
    assert type(envs.envs[0].unwrapped).__name__ == "HopperEnv"  # not the file's nowhere:Env


def test_another_maze_is_named(tmp_path, capsys):
    import gymnasium_robotics  # noqa: F401

    spec = json.loads(gym.spec("PointMaze_UMaze-v3").to_json())
    walls = [[1, 1, 1, 1], [1, 0, 0, 1], [1, 1, 1, 1]]
    other = {**spec, "kwargs": {**spec["kwargs"], "maze_map": walls}}
    space = gym.make("PointMaze_UMaze-v3").observation_space
    s = {key: np.zeros((5, *own.shape)) for key, own in space.items()}
    made = [(s, *episodes(4, act=2)[0][1:])]
    metadata = {"eval_env_spec": json.dumps(other)}
    folder = write_minari(tmp_path / "x", made, space, Box(-1, 1, (2,)), spec, **metadata)
    _, args, about = envs_of(folder)
    assert "recorded PointMaze_UMaze-v3, with another maze_map" in capsys.readouterr().out
    assert args.eval_episodes == 100 and about["reference_returns"] == (23.85, 161.86)


def test_another_version_of_the_environment_is_named(tmp_path, capsys):
    metadata = {"eval_env_spec": gym.spec("Hopper-v4").to_json()}
    folder = write_minari(tmp_path / "x", episodes(4), STATES, ACTIONS, SPEC, **metadata)
    envs_of(folder)
    assert "Hopper-v4, recorded Hopper-v5, with another id" in capsys.readouterr().out


def test_no_environment(tmp_path):
    folder = write_minari(tmp_path / "x", episodes(40), STATES, ACTIONS)
    assert "--eval-every 0 trains without" in message(envs_of, folder)
    spec = {**json.loads(SPEC.to_json()), "id": "Mine-v0", "entry_point": "mine:Mine"}
    other = write_minari(tmp_path / "y", episodes(40), STATES, ACTIONS, spec)
    assert "cannot make" in message(envs_of, other)
    flags = ["--train-steps", 4, "--batch-size", 16, "--eval-every", 0, "--out", tmp_path / "out"]
    result = run(ROOT / "td3bc.py", "--env", folder, *flags, cwd=tmp_path)
    assert "not evaluated" in result.stdout.splitlines()[-1]
    assert (tmp_path / "out" / "checkpoint.pt").is_file()


@pytest.mark.parametrize(
    "name, references",
    [
        ("Hopper-v4", (-20.272305, 3234.3)),
        ("PointMaze_UMaze-v3", (23.85, 161.86)),
        ("PointMaze_Medium_Diverse_GDense-v3", (0.0, 100.0)),
        ("PointMaze_UMazeDense-v3", (68.537689, 193.662856)),
        ("PointMaze_MediumDense-v3", (44.264742, 297.455255)),
        ("PointMaze_LargeDense-v3", (30.569041, 303.485738)),
        ("AntMaze_UMaze-v4", (0.0, 1.0)),
        ("AntMaze_UMazeDense-v4", (0.0, 100.0)),
        ("AdroitHandPen-v1", (96.262799, 3076.8331)),
        ("FrankaKitchen-v1", (0.0, 4.0)),
        ("Reacher-v5", (0.0, 100.0)),
    ],
)
def test_reference_returns(tmp_path, monkeypatch, name, references):
    class Made(Exception):
        pass

    def make_vec(*inputs, **options):
        made.append(options)
        raise Made

    made, about = [], {}
    monkeypatch.setattr(td3bc.gym, "make_vec", make_vec)
    spec = {**json.loads(SPEC.to_json()), "id": name, "max_episode_steps": 1e6}
    folder = write_minari(tmp_path / "x", episodes(4), STATES, ACTIONS, spec)
    (dataset,) = td3bc.open_datasets(str(folder))
    message(td3bc.make_envs, dataset, td3bc.Args(), about)
    assert about["reference_returns"] == references and made[0]["max_episode_steps"] == 1_000_000
    dataset.storage.update_metadata({"ref_min_score": 1.0, "ref_max_score": 3.0})
    (dataset,) = td3bc.open_datasets(str(folder))
    message(td3bc.make_envs, dataset, td3bc.Args(), about)
    assert about["reference_returns"] == (1.0, 3.0)
    assert ("remove_task_when_completed" in made[0]) == ("Kitchen" in name)
    assert "remove_task_when_completed" not in made[1]


def test_a_renderer_that_is_missing_is_named(tmp_path):
    folder = write_minari(tmp_path / "x", episodes(40), STATES, ACTIONS, SPEC)
    env = {**os.environ, "MUJOCO_GL": "nonsense"}
    flags = ["--env", folder, "--train-steps", 2]
    result = run(ROOT / "td3bc.py", *flags, cwd=tmp_path, ok=False, env=env)
    assert "MUJOCO_GL=nonsense" in result.stderr and not (tmp_path / "runs").exists()


def test_track_without_a_login_leaves_nothing(tmp_path):
    env = {key: x for key, x in os.environ.items() if not key.startswith("WANDB")}
    env |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    flags = ["--env", HOPPER, "--train-steps", 2, "--track"]
    result = run(ROOT / "td3bc.py", *flags, cwd=tmp_path, ok=False, env=env)
    assert "wandb login" in result.stderr and not (tmp_path / "runs").exists()


# --- buffer.npz ---


def write_buffer(path, N=3, H=4, ids=("x-v0",), **changes):
    rng = np.random.default_rng(0)
    metadata = {"format": "gta-buffer", "format_version": 1, "method": "mine", "env": "x"}
    arrays = {
        "observations": rng.normal(size=(N, H + 1, 11)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (N, H, 3)).astype(np.float32),
        "rewards": rng.normal(size=(N, H)).astype(np.float32),
        "terminals": rng.random((N, H)) < 0.2,
        "metadata": json.dumps({**metadata, "dataset_ids": list(ids)}),
    }
    np.savez(path, **{**arrays, **changes})
    return arrays


def test_windows_of_a_buffer_are_episodes(tmp_path, monkeypatch):
    write_minari(tmp_path / "x", episodes(3), STATES, ACTIONS, SPEC)
    buffer = write_buffer(tmp_path / "buffer.npz")
    monkeypatch.chdir(tmp_path)
    args = td3bc.Args(aug="buffer.npz", s4rl_sigma=1e-3)
    _, real, both, about = td3bc.load_data(args)
    assert args.env == "x" and about["aug_label"] == "mine + s4rl(0.001)"
    assert [len(e.rewards) for e in real] == [3] and [len(e.rewards) for e in both] == [3, 4, 4, 4]
    np.testing.assert_array_equal(both[2].observations, buffer["observations"][1])
    np.testing.assert_array_equal(both[3].terminations, buffer["terminals"][2])
    _, _, only, about = td3bc.load_data(td3bc.Args(aug="buffer.npz", aug_only=True))
    assert len(only) == 3 and about["aug_label"] == "mine only"


def test_a_wrong_buffer_ends_in_one_line(tmp_path, monkeypatch):
    write_minari(tmp_path / "x", episodes(3), STATES, ACTIONS, SPEC)
    monkeypatch.chdir(tmp_path)

    def why(**changes):
        write_buffer("buffer.npz", **changes)
        return message(td3bc.load_data, td3bc.Args(aug="buffer.npz"))

    assert "made from ['y-v0'], not from --env x" in why(ids=["y-v0"])
    assert "NaN" in why(rewards=np.full((3, 4), np.nan, np.float32))
    assert "gta-policy" in why(metadata='{"format": "gta-policy", "format_version": 1}')
    assert "no buffer" in why(metadata="{")
    assert "(3, 5, 9)" in why(observations=np.zeros((3, 5, 9), np.float32))
    assert "lacks a part" in why(rewards=np.zeros(3, np.float32))
    assert "no buffer" in why(rewards=np.array([{}], dtype=object))  # pickle is not read
    assert "no buffer" in message(td3bc.load_data, td3bc.Args(aug="nowhere.npz"))
    assert "--aug-only needs" in message(td3bc.load_data, td3bc.Args(aug_only=True))
