"""Reading datasets and buffers, the same text in all scripts: what is understood, and what ends
in one line that says why."""

import itertools
import json
import re
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import HOPPER, ROOT, SPEC, call, message, random_episodes, write_buffer, write_hopper
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Tuple

import cql
import iql
import mcq
import td3bc


def load(folder):
    return td3bc.load_episodes(td3bc.open_datasets(str(folder)))


# --- what --env takes ---

SHORT_NAMES = """
hopper-medium           mujoco/hopper/medium-v0
walker2d-medium-expert  mujoco/walker2d/medium-v0 mujoco/walker2d/expert-v0
maze2d-umaze-dense      D4RL/pointmaze/umaze-dense-v2
maze2d-medium           D4RL/pointmaze/medium-v2
antmaze-medium-play     D4RL/antmaze/medium-play-v1
pen-expert              D4RL/pen/expert-v2
kitchen-partial+a/b-v3  D4RL/kitchen/partial-v2 a/b-v3
"""


@pytest.mark.parametrize("line", SHORT_NAMES.strip().splitlines())
def test_short_names(monkeypatch, line):
    hopper = td3bc.open_dataset(HOPPER)
    asked = []

    def load_dataset(name, download):
        asked.append(name)
        return hopper

    monkeypatch.setattr(td3bc.minari, "load_dataset", load_dataset)
    name, *expected = line.split()
    td3bc.open_datasets(name)
    assert asked == expected


def test_several_datasets_and_folders_with_a_plus(tmp_path):
    one = write_hopper(tmp_path / "a", random_episodes(3))
    two = write_hopper(tmp_path / "b+c", random_episodes(4, 5))
    three = write_hopper(tmp_path / "d", random_episodes(6))
    assert [len(e.rewards) for e in load(f"{three}+{one}")] == [6, 3]
    assert [len(e.rewards) for e in load(two)] == [4, 5]
    other = write_hopper(tmp_path / "e", random_episodes(4), env_spec=gym.spec("Walker2d-v5"))
    assert "another environment" in message(load, f"{one}+{other}")


def test_what_is_not_there_ends_in_one_line(tmp_path, monkeypatch):
    def offline(name, download):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(td3bc.minari, "load_dataset", offline)
    text = message(td3bc.open_datasets, "mujoco/x/y-v0")
    assert "--env mujoco/x/y-v0" in text and "no network" in text
    assert "data/typo: no folder" in message(td3bc.open_datasets, "data/typo")
    monkeypatch.setattr(td3bc, "__file__", str(tmp_path / "td3bc.py"))
    monkeypatch.chdir(tmp_path)
    assert "--env is missing" in message(td3bc.open_datasets, td3bc.DEFAULT_ENV)
    folder = write_hopper(tmp_path / "x", random_episodes(3))
    path = folder / "data" / "main_data.hdf5"
    path.write_bytes(path.read_bytes()[:700])
    assert "x-v0 cannot be read" in message(load, folder)


# --- domains: D4RL's names, Gymnasium's ids, short names ---

DOMAINS = """
locomotion {halfcheetah,hopper,walker2d,ant}-{random,medium,expert}-v{0,1,2}
locomotion {halfcheetah,hopper,walker2d,ant}-{medium,full}-replay-v{0,1,2}
locomotion {halfcheetah,hopper,walker2d,ant}-medium-expert-v{0,1,2}
locomotion {halfcheetah,hopper,walker2d,ant,swimmer}-{simple,medium,expert,medium-expert}
locomotion {HalfCheetah,Hopper,Walker2d,Ant,Humanoid}-v{4,5}
locomotion {Pendulum-v1,Reacher-v5}
maze maze2d-{open,umaze,medium,large}{,-dense}-v{0,1}
maze maze2d-{umaze,medium,large}{,-dense}
maze PointMaze_{Open,UMaze,Medium,Large}{,Dense}-v3
antmaze antmaze-{umaze,umaze-diverse}-v{0,1,2}
antmaze antmaze-{medium,large}-{play,diverse}-v{0,1,2}
antmaze antmaze-{umaze,umaze-diverse,medium-play,medium-diverse,large-play,large-diverse}
antmaze AntMaze_{UMaze,Medium,Large}{,_Diverse_GR}-v{4,5}
adroit {pen,door,hammer,relocate}-{human,cloned,expert}{,-v0,-v1}
adroit AdroitHand{Pen,Door,Hammer,Relocate}{,Sparse}-v1
kitchen kitchen-{complete,partial,mixed}{,-v0}
kitchen FrankaKitchen-v1
"""


@pytest.mark.parametrize("line", DOMAINS.strip().splitlines())
def test_domains(line):
    """{a,b} stands for a and for b, as in a shell."""
    domain, pattern = line.split()
    choices = [part.split(",") for part in re.split("[{}]", pattern)]
    for name in map("".join, itertools.product(*choices)):
        recorded = SimpleNamespace(env_spec=SimpleNamespace(id=name), id="x-v0")
        converted = SimpleNamespace(env_spec=None, id=f"d4rl-{name}")
        assert td3bc.find_domain(recorded) == domain, name
        assert td3bc.find_domain(converted) == domain, name


SETTINGS = [  # of CORL; MCQ's of OfflineRL-Kit
    (iql, "antmaze", "expectile 0.9 beta 10 actor_dropout 0 reward_bias -1 eval_episodes 100"),
    (iql, "adroit", "expectile 0.8 beta 3 actor_dropout 0.1 reward_bias 0 eval_episodes 100"),
    (iql, "kitchen", "expectile 0.7 beta 0.5 actor_dropout 0.1 reward_bias 0"),
    (iql, "locomotion", "expectile 0.7 beta 3 actor_dropout 0 reward_bias 0 eval_episodes 10"),
    (cql, "antmaze", "target_gap 0.8 min_gap -200 critic_layers 5 reward_scale 10 reward_bias -5"),
    (cql, "antmaze", "max_target_backup 1 cql_alpha 5 actor_lr 1e-4"),
    (cql, "maze", "target_gap 5 cql_alpha 10 critic_layers 3 reward_bias 0 actor_lr 3e-5"),
    (cql, "adroit", "target_gap -1 cql_alpha 1 actor_lr 1e-4"),
    (td3bc, "antmaze", "reward_bias -1"),
    (mcq, "antmaze", "reward_bias -1"),
    (mcq, "maze", "reward_bias 0 eval_episodes 100"),
]


@pytest.mark.parametrize("learner, domain, expected", SETTINGS)
def test_settings_of_a_domain(learner, domain, expected):
    args = learner.Args()
    learner.fill_in_by_domain(args, domain)
    words = expected.split()
    for name, value in zip(words[::2], words[1::2]):
        assert getattr(args, name) == float(value), name
    args = learner.Args(reward_bias=7.0)  # what is given counts more
    learner.fill_in_by_domain(args, domain)
    assert args.reward_bias == 7.0


# --- arrays and spaces ---


def test_nested_observations_are_flattened_as_gymnasium_does(tmp_path):
    parts = Tuple([Box(-1, 1, (2, 2), np.float32), Discrete(3)])
    z = Box(-9, 9, (2,), np.float64)
    space = Dict({"z": z, "goal": Discrete(4), "more": parts, "n": MultiDiscrete([2, 3])})
    space.seed(0)
    steps = [space.sample() for _ in range(5)]

    def stack(space, values):
        if isinstance(space, Dict):
            return {key: stack(part, [v[key] for v in values]) for key, part in space.items()}
        if isinstance(space, Tuple):
            return tuple(stack(part, [v[i] for v in values]) for i, part in enumerate(space))
        return np.stack(values)

    _, *arrays = random_episodes(4)[0]
    folder = write_hopper(tmp_path / "x", [(stack(space, steps), *arrays)], space)
    expected = [gym.spaces.flatten(space, step) for step in steps]
    np.testing.assert_array_equal(load(folder)[0].observations, expected)


def test_actions_that_are_no_bounded_vector_are_refused(tmp_path):
    assert "no bounds" in message(td3bc.fit_scale, np.zeros((2, 3)), Box(-np.inf, np.inf, (3,)))
    s, _, *arrays = random_episodes(3)[0]
    episode = (s, np.array([0, 1, 1]), *arrays)
    folder = write_hopper(tmp_path / "x", [episode], actions=Discrete(2))
    assert "Discrete(2)" in message(load, folder)


def test_shapes(tmp_path):
    """[T] for actions of one dimension and [T, 1] for rewards say the same; else a line."""
    s, a, r, terminal = random_episodes(4, act=1)[0]
    box = Box(-1, 1, (1,))
    made = [(s, a[:, 0], r[:, None], terminal)]
    (e,) = load(write_hopper(tmp_path / "x", made, actions=box))
    assert e.actions.shape == (4, 1) and e.rewards.shape == (4,)
    wide = np.hstack([a, a])
    wrong = [(s[:-1], a, r, terminal), (s, a[:3], r, terminal), (s, wide, r, terminal)]
    for i, episode in enumerate(wrong):
        folder = write_hopper(tmp_path / str(i), [episode], actions=box)
        assert "episode 0 has wrong sizes" in message(load, folder)
    assert "holds no episodes" in message(load, write_hopper(tmp_path / "none", []))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
@pytest.mark.parametrize("field", [0, 1, 2])
def test_numbers_that_float32_cannot_hold_are_refused(tmp_path, value, field):
    episodes = random_episodes(4, 4)
    episodes[1][field][2] = value
    folder = write_hopper(tmp_path / "x", episodes)
    assert "episode 1 has wrong sizes or NaN" in message(load, folder)


def test_datasets_of_other_states_cannot_be_joined(tmp_path):
    write_hopper(tmp_path / "x", random_episodes(4))
    more = Box(-np.inf, np.inf, (12,), np.float64)
    write_hopper(tmp_path / "y", random_episodes(4, obs=12), more)
    text = message(td3bc.open_datasets, f"{tmp_path / 'x'}+{tmp_path / 'y'}")
    assert "y-v0 has another environment, states or actions than x-v0" in text


@pytest.mark.filterwarnings("error")
def test_float16_and_columns_are_read(tmp_path):
    s, a, r, terminal = random_episodes(6)[0]
    episode = (s.astype(np.float16), a.astype(np.float16), r[:, None], terminal[:, None])
    (e,) = load(write_hopper(tmp_path / "x", [episode]))
    assert e.rewards.shape == e.terminals.shape == (6,)
    np.testing.assert_array_equal(e.observations, s.astype(np.float16))


def test_an_episode_ends_at_its_terminal(tmp_path, capsys):
    s, a, _, terminal = random_episodes(6)[0]
    terminal[2] = True
    r = np.full(6, 60_000, np.float16)  # its sums are infinite
    (e,) = load(write_hopper(tmp_path / "x", [(s, a, r, terminal)]))
    assert [len(x) for x in e] == [4, 3, 3, 3] and e.rewards.sum() == 3 * np.float64(r[0])
    assert "left out: 3 transitions that follow a terminal" in capsys.readouterr().out


# --- from arrays to batches ---


@pytest.mark.parametrize("aug_only", [False, True])
@pytest.mark.parametrize("H", [1, 4])
def test_transitions_equal_a_plain_loop(tmp_path, H, aug_only):
    episodes = load(write_hopper(tmp_path / "x", random_episodes(3, 4)))
    buffer = td3bc.read_buffer(write_buffer(tmp_path / "buffer.npz", H=H))
    sources = [] if aug_only else [*episodes]
    sources += zip(*buffer[1:5])
    expected = []
    for s, a, r, terminal in sources:
        for t in range(len(r)):
            expected.append((s[t], a[t], r[t], s[t + 1], terminal[t]))
    transitions = td3bc.make_transitions(episodes, buffer, aug_only)
    for field, values in zip(transitions, zip(*expected), strict=True):
        np.testing.assert_array_equal(field, np.float32(values))


@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_a_batch_holds_scaled_transitions(sigma):
    """Of every agent others, all equally often; S4RL adds noise to the states alone."""
    rng = np.random.default_rng(0)
    s, s_next = rng.normal(3, 5, (2, 50, 4)).astype(np.float32)
    a = rng.uniform([-1, 2, -3], [1, 2, 5], (50, 3)).astype(np.float32)
    r = np.arange(50, dtype=np.float32)
    transitions = td3bc.Transitions(s, a, r, s_next, r % 2)
    scale = td3bc.fit_scale(s, Box(np.float32([-1, 2, -3]), np.float32([1, 2, 5])))
    args = td3bc.Args(device="cpu", num_seeds=2, batch_size=5000, s4rl_sigma=sigma)
    batch = td3bc.make_sampler(transitions, scale, args)()
    rows = batch[2].long().numpy()
    assert (rows[0] != rows[1]).mean() > 0.9 and np.bincount(rows.ravel()).min() > 140
    mean, std = s.mean(0), s.std(0) + 1e-3
    for drawn, states in ((batch[0], s), (batch[3], s_next)):
        noise = drawn.numpy() - ((states - mean) / std)[rows]
        assert abs(noise.std() - sigma) < 0.002 and abs(noise.mean()) < 0.002
    assert (batch[1][..., 1] == 0).all()  # an action without width
    assert batch[1][..., [0, 2]].min() < -0.9 and batch[1].max() <= 1
    torch.testing.assert_close(scale.env_actions(batch[1]), torch.from_numpy(a[rows]))
    np.testing.assert_array_equal(batch[4], rows % 2)


def test_actions_never_leave_their_box():
    """Those of an actor lie in [-1, 1]; rounding must not lead out of the environment's box."""
    low = torch.empty(100_000).uniform_(-3, 0, generator=torch.Generator().manual_seed(0))
    high = low + low.flip(0).abs()
    scale = td3bc.Scale(torch.zeros(1), torch.ones(1), low, high)
    for a in (-1.0, 1.0):
        action = scale.env_actions(torch.full_like(low, a))
        assert ((low <= action) & (action <= high)).all()
        torch.testing.assert_close(action, high if a > 0 else low)


# --- environments ---


def benchmark_of(folder, **flags):
    args = td3bc.Args(device="cpu", eval_episodes=2, **flags)
    (dataset,) = td3bc.open_datasets(str(folder))
    return td3bc.make_benchmark(dataset, args)


def spec_of(name, **changes):
    return {**json.loads(SPEC.to_json()), "id": name, **changes}


def test_a_dataset_of_other_actions_or_states_is_refused(tmp_path):
    wide = write_hopper(tmp_path / "wide", random_episodes(4), actions=Box(-10, 10, (3,)))
    assert "(-10.0, 10.0" in message(benchmark_of, wide)
    two = random_episodes(4, act=2)
    two = write_hopper(tmp_path / "two", two, actions=Box(-1, 1, (2,)))
    assert "(2,)" in message(benchmark_of, two)
    states = Box(-np.inf, np.inf, (12,), np.float64)
    more = write_hopper(tmp_path / "more", random_episodes(4, obs=12), states)
    assert "(12,)" in message(benchmark_of, more)
    states = Box(-np.inf, np.inf, (3,), np.float32)  # without their bounds
    made = random_episodes(4, obs=3, act=1)
    spec = gym.spec("Pendulum-v1")
    folder = write_hopper(tmp_path / "x", made, states, Box(-2, 2, (1,)), spec)
    assert benchmark_of(folder).high == 100


def test_an_evaluation_opens_no_window(tmp_path):
    """The environment was recorded with a window."""
    spec = spec_of("Hopper-v5", kwargs={"render_mode": "human"})
    folder = write_hopper(tmp_path / "x", random_episodes(4), env_spec=spec)
    assert benchmark_of(folder).envs.envs[0].render_mode is None


def test_what_differs_from_the_recorded_environment_is_named(tmp_path, capsys):
    wrapper = {"name": "Monitor", "entry_point": "nowhere:Monitor", "kwargs": None}
    spec = spec_of("Hopper-v5", entry_point="nowhere:Env", additional_wrappers=[wrapper])
    other = gym.spec("Hopper-v4").to_json()
    folder = write_hopper(tmp_path / "x", random_episodes(4), env_spec=spec, eval_env_spec=other)
    envs, *references = benchmark_of(folder)
    output = capsys.readouterr().out
    assert "evaluation: id Hopper-v4, recorded Hopper-v5" in output
    assert "additional_wrappers [], recorded [{'name': 'Monitor'" in output
    assert type(envs.envs[0].unwrapped).__name__ == "HopperEnv"  # not the file's nowhere:Env
    assert "a return of -20.272305 scores 0, 3234.3 scores 100" in output
    assert references == [-20.272305, 3234.3]


def test_a_dataset_without_an_environment_trains(tmp_path):
    folder = write_hopper(tmp_path / "x", random_episodes(40), env_spec=None)
    assert "--eval-episodes 0 trains without" in message(benchmark_of, folder)
    flags = ["--train-steps", 4, "--batch-size", 16, "--eval-episodes", 0, "--out", "out"]
    result = call(ROOT / "td3bc.py", "--env", folder, *flags, cwd=tmp_path)
    assert result.stdout.splitlines()[-1].endswith(" | none | not evaluated")
    assert (tmp_path / "out" / "checkpoint.pt").is_file()


def test_an_environment_of_ones_own(tmp_path):
    folder = write_hopper(tmp_path / "x", random_episodes(40), env_spec=spec_of("Mine-v0"))
    assert "an environment of your own --env-package" in message(benchmark_of, folder)
    registers = "import gymnasium\ngymnasium.register('Mine-v0', 'mypackage:Mine')\n"
    mine = "from gymnasium.envs.mujoco.hopper_v5 import HopperEnv as Mine\n"
    (tmp_path / "mypackage.py").write_text(registers + mine)
    flags = ["--env-package", "mypackage", "--train-steps", 2, "--batch-size", 8]
    result = call(ROOT / "td3bc.py", "--env", folder, *flags, "--eval-episodes", 1, cwd=tmp_path)
    assert "evaluation: Mine-v0" in result.stdout and "over 1 seed" in result.stdout


REFERENCES = [
    ("Hopper-v4", 1000, -20.272305, 3234.3),
    ("hopper-medium-v2", 1000, -20.272305, 3234.3),
    ("PointMaze_UMaze-v3", 300, 23.85, 161.86),
    ("PointMaze_Medium_Diverse_GDense-v3", 600, 0.0, 100.0),
    ("PointMaze_UMazeDense-v3", 300, 68.537689, 193.662856),
    ("PointMaze_MediumDense-v3", 600, 44.264742, 297.455255),
    ("PointMaze_LargeDense-v3", 800, 30.569041, 303.485738),
    ("AntMaze_UMaze-v4", 700, 0.0, 1.0),
    ("AntMaze_UMazeDense-v4", 700, 0.0, 100.0),
    ("AdroitHandPen-v1", 100, 96.262799, 3076.8331),
    ("AdroitHandPen-v1", 200, 137.93, 8820.51),
    ("AdroitHandDoor-v1", 200, -56.512833, 2880.5693),
    ("FrankaKitchen-v1", 280, 0.0, 4.0),
    ("Reacher-v5", 50, 0.0, 100.0),
    ("dm_control/hopper-hop-v0", 1000, 0.0, 100.0),
]


@pytest.mark.parametrize("name, steps, low, high", REFERENCES)
def test_reference_returns(name, steps, low, high):
    assert td3bc.reference_returns(name, steps, {}) == (low, high)
    own = {"ref_min_score": 1.0, "ref_max_score": 3.0}
    if (name, steps) != ("AdroitHandPen-v1", 200):  # the datasets' are of 100 steps
        low, high = 1.0, 3.0
    assert td3bc.reference_returns(name, steps, own) == (low, high)


@pytest.mark.parametrize("name", ["FrankaKitchen-v1", "Hopper-v5"])
def test_kitchen_counts_a_task_once_unless_the_dataset_says_how(tmp_path, monkeypatch, name):
    made = []
    monkeypatch.setattr(td3bc.gym, "make_vec", lambda *_, **options: made.append(options))
    spec = spec_of(name, max_episode_steps=1e6)
    own = {"ref_min_score": 0.0, "ref_max_score": 4.0}
    for folder, metadata in (("x", {}), ("y", own)):
        folder = write_hopper(tmp_path / folder, random_episodes(4), env_spec=spec, **metadata)
        message(benchmark_of, folder)  # None is no environment
    assert made[0]["max_episode_steps"] == 1_000_000
    assert ("remove_task_when_completed" in made[0]) == (name == "FrankaKitchen-v1")
    assert "remove_task_when_completed" not in made[1]


# --- buffer.npz ---

WRONG_BUFFERS = [
    ("was made from dataset_ids ['y-v0']", {"ids": ["y-v0"]}),
    ("NaN", {"rewards": np.full((3, 4), np.nan, np.float32)}),
    ("gta-policy", {"metadata": '{"format": "gta-policy", "format_version": 1}'}),
    ("no buffer", {"metadata": "{"}),
    ("no buffer", {"rewards": np.array([{}], dtype=object)}),  # pickle is not read
    ("differ in size", {"observations": np.zeros((3, 5, 9), np.float32)}),
    ("lengths", {"rewards": np.zeros(3, np.float32)}),
]


@pytest.mark.parametrize("text, changes", WRONG_BUFFERS)
def test_a_wrong_buffer_ends_in_one_line(tmp_path, text, changes):
    write_hopper(tmp_path / "x", random_episodes(3))
    path = write_buffer(tmp_path / "buffer.npz", **changes)
    flags = ["--env", tmp_path / "x", "--aug", path, "--eval-episodes", 0]
    assert text in call(ROOT / "td3bc.py", *flags, ok=False, cwd=tmp_path).stderr
    assert not (tmp_path / "runs").exists()


def test_a_buffer_is_called_by_its_label_its_method_or_its_file(tmp_path):
    metadata = {"format": "gta-buffer", "format_version": 1}
    for more, label in (({"label": "a", "method": "b"}, "a"), ({"method": "b"}, "b"), ({}, "c")):
        path = write_buffer(tmp_path / "c.npz", metadata=json.dumps(metadata | more))
        assert td3bc.read_buffer(path).metadata["label"] == label


def test_a_buffer_that_is_missing():
    assert "no buffer" in message(td3bc.read_buffer, "nowhere.npz")
    assert "--aug-only needs" in message(td3bc.main, td3bc.Args(aug_only=True, device="cpu"))
