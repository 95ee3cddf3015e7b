"""Mazes, Adroit and Kitchen: small datasets of their real environments through every stage.

The datasets are recorded as those that Minari publishes under D4RL/: the same environments and
arguments, spaces, cuts into episodes. Evaluations are cut short.
"""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial

import gymnasium as gym
import minari
import mujoco
import numpy as np
import pytest
import torch
from conftest import ROOT
from learners import AGENTS, LEARNERS
from minari.data_collector import EpisodeBuffer

import gta_augment
import gta_diffusion
import metrics

robotics = pytest.importorskip("gymnasium_robotics", reason="needs gymnasium-robotics")
gym.register_envs(robotics)

H = 7
U_MAZE = [[1, 1, 1, 1, 1], [1, "g", "r", 0, 1], [1, 1, 1, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]]
TASKS = ["microwave", "kettle", "light switch", "slide cabinet"]
KITCHEN = {"remove_task_when_completed": False, "terminate_on_tasks_completed": False}
DOMAINS = ["pointmaze", "antmaze", "pen", "kitchen"]
every_domain = pytest.mark.parametrize("domain", DOMAINS)


# --- datasets ---


def stack(space, observations):
    if isinstance(space, gym.spaces.Dict):
        return {key: stack(sub, [o[key] for o in observations]) for key, sub in space.items()}
    return np.array(observations)


def roll(env, observation, act, num_steps, until_success=False):
    """Records at most num_steps actions of act(observation). Returns the episode, and the
    observation after it."""
    observations, actions, rewards, terminations = [observation], [], [], []
    for _ in range(num_steps):
        actions.append(act(observation))
        observation, reward, terminated, _, info = env.step(actions[-1])
        observations.append(observation)
        rewards.append(reward)
        terminations.append(terminated)
        if terminated or (until_success and info["success"]):
            break
    truncations = np.arange(len(rewards)) == len(rewards) - 1
    episode = EpisodeBuffer(
        observations=stack(env.observation_space, observations),
        actions=np.array(actions),
        rewards=np.array(rewards),
        terminations=np.array(terminations),
        truncations=truncations & ~np.array(terminations),
    )
    return episode, observation


def write(root, dataset_id, episodes, env, eval_env=None, **references):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        minari.create_dataset_from_buffers(
            dataset_id, episodes, env=env, eval_env=eval_env, **references
        )
    return root / dataset_id


def copy_with(folder, tmp_path, which, options):
    """Copies a dataset whose environment has other options. Returns the copy's folder."""
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "data" / "metadata.json"
    metadata = json.loads(path.read_text())
    spec = json.loads(metadata[which])
    spec["kwargs"] |= options
    path.write_text(json.dumps(metadata | {which: json.dumps(spec)}))
    return tmp_path / "copy"


def next_cell(maze, cell, goal):
    """The cell after cell on a shortest way to the goal's: breadth first, from the goal."""
    reached, queue = {goal: goal}, [goal]
    for i, j in queue:
        for other in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
            if maze.maze_map[other[0]][other[1]] != 1 and other not in reached:
                reached[other] = (i, j)
                queue.append(other)
    return reached[cell]


def waypoint_controller(env, rng):
    """Walks to the goal's cell from cell to cell by a PD rule, with noise, as in D4RL's Maze2D."""
    maze = env.unwrapped.maze

    def act(observation):
        position, velocity = np.split(observation["observation"], 2)
        goal = observation["desired_goal"]
        cell, goal_cell = (tuple(maze.cell_xy_to_rowcol(xy)) for xy in (position, goal))
        way = maze.cell_rowcol_to_xy(next_cell(maze, cell, goal_cell))
        target = goal if cell == goal_cell else way
        action = 10 * (target - position) - velocity + 0.5 * rng.normal(size=2)
        return action.clip(-1, 1).astype(np.float32)

    return act


def record_pointmaze(root):
    """As D4RL/pointmaze/umaze-v2: a success starts an episode, the goal moves, the ball does not.
    Five of twelve episodes are of random actions and mostly fail."""
    options = {"continuing_task": True, "reset_target": True, "max_episode_steps": 10**6}
    env = gym.make("PointMaze_UMaze-v3", **options)
    env.action_space.seed(0)
    walk = waypoint_controller(env, np.random.default_rng(0))
    observation, episodes = env.reset(seed=0)[0], []
    for i in range(12):
        act, T = (lambda _: env.action_space.sample(), 15) if i % 5 < 2 and i else (walk, 300)
        episode, observation = roll(env, observation, act, T, until_success=True)
        episodes.append(episode)
    options = {"continuing_task": True, "reset_target": False, "max_episode_steps": 12}
    eval_env = gym.make("PointMaze_UMaze-v3", maze_map=U_MAZE, **options)
    folder = write(root, "test/pointmaze-v0", episodes, env, eval_env)
    path = folder / "data" / "metadata.json"
    metadata = json.loads(path.read_text())
    spec = json.loads(metadata["env_spec"]) | {"max_episode_steps": 1000000.0}  # as is published
    path.write_text(json.dumps(metadata | {"env_spec": json.dumps(spec)}))
    return folder


def record_random(root, dataset_id, env, eval_env, lengths, **references):
    env.action_space.seed(0)
    episodes = [
        roll(env, env.reset(seed=seed)[0], lambda _: env.action_space.sample(), T)[0]
        for seed, T in enumerate(lengths)
    ]
    return write(root, dataset_id, episodes, env, eval_env, **references)


def record_antmaze(root):
    """As D4RL/antmaze/umaze-v1, with reference returns of its own."""
    options = {"continuing_task": True, "reset_target": False}
    env = gym.make("AntMaze_UMaze-v4", maze_map=U_MAZE, **options)
    eval_map = [row[::-1] for row in U_MAZE]
    eval_env = gym.make("AntMaze_UMaze-v4", maze_map=eval_map, max_episode_steps=12, **options)
    references = {"ref_min_score": 0.0, "ref_max_score": 40.0}
    return record_random(root, "test/antmaze-v0", env, eval_env, (20, 12, 9), **references)


def record_pen(root):
    eval_env = gym.make("AdroitHandPen-v1", max_episode_steps=12)
    return record_random(root, "test/pen-v0", gym.make("AdroitHandPen-v1"), eval_env, (20, 12, 9))


def open_microwave(env):
    env.unwrapped.data.qpos[22] = -0.75


def random_action(env, count, opens, _):
    """A random action; action number opens finds the microwave open."""
    if next(count) == opens:
        open_microwave(env)
    return env.action_space.sample()


def record_kitchen(root):
    """As D4RL/kitchen/partial-v2. Random actions; in the second episode the microwave opens."""
    env = gym.make("FrankaKitchen-v1", tasks_to_complete=TASKS, max_episode_steps=12, **KITCHEN)
    env.action_space.seed(0)
    episodes = []
    for seed, opens in enumerate((None, 5, None)):
        count = itertools.count()
        act = partial(random_action, env, count, opens)
        episodes.append(roll(env, env.reset(seed=seed)[0], act, 12)[0])
    return write(root, "test/kitchen-v0", episodes, env)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """domain -> its dataset's folder, recorded when it is asked for."""
    root, made = tmp_path_factory.mktemp("domains"), {}
    recorders = {
        "pointmaze": record_pointmaze,
        "antmaze": record_antmaze,
        "pen": record_pen,
        "kitchen": record_kitchen,
    }

    def folder(domain):
        if domain not in made:
            made[domain] = recorders[domain](root)
        return made[domain]

    return folder


@pytest.fixture(scope="module")
def buffers(folders, tmp_path_factory):
    """domain -> buffer.npz of tiny runs of A and B, made when it is asked for."""
    root, made = tmp_path_factory.mktemp("buffers"), {}

    def buffer(domain):
        if domain not in made:
            model, made[domain] = root / f"{domain}.pt", root / f"{domain}.npz"
            sizes = {"horizon": H, "dim": 8, "batch_size": 8, "train_steps": 1}
            gta_diffusion.main(
                gta_diffusion.Args(env=str(folders(domain)), out=model, device="cpu", **sizes)
            )
            sizes = {"num_transitions": 500 * H, "success_weight": 10.0}
            if domain != "pointmaze":
                sizes = {"num_transitions": 16 * H}
            gta_augment.main(
                gta_augment.Args(
                    checkpoint=model, out=made[domain], device="cpu", num_steps=2, mu=0.5, **sizes
                )
            )
        return made[domain]

    return buffer


# --- data ---


@pytest.mark.parametrize(
    ("domain", "space"),
    [  # as minari.farama.org shows those of D4RL/
        (
            "pointmaze",
            "Dict('achieved_goal': Box(-inf, inf, (2,), float64), 'desired_goal': Box(-inf, inf, "
            "(2,), float64), 'observation': Box(-inf, inf, (4,), float64))",
        ),
        (
            "antmaze",
            "Dict('achieved_goal': Box(-inf, inf, (2,), float64), 'desired_goal': Box(-inf, inf, "
            "(2,), float64), 'observation': Box(-inf, inf, (27,), float64))",
        ),
        ("pen", "Box(-inf, inf, (45,), float64)"),
        (
            "kitchen",
            "Dict('achieved_goal': Dict('kettle': Box(-inf, inf, (7,), float64), 'light switch': "
            "Box(-inf, inf, (2,), float64), 'microwave': Box(-inf, inf, (1,), float64), "
            "'slide cabinet': Box(-inf, inf, (1,), float64)), 'desired_goal': Dict('kettle': "
            "Box(-inf, inf, (7,), float64), 'light switch': Box(-inf, inf, (2,), float64), "
            "'microwave': Box(-inf, inf, (1,), float64), 'slide cabinet': Box(-inf, inf, (1,), "
            "float64)), 'observation': Box(-inf, inf, (59,), float64))",
        ),
    ],
)
def test_data_and_evaluation_are_flattened_alike(domain, space, folders):
    """In the alphabetical order of the keys, to the last bit."""
    dataset = gta_diffusion.load_dataset(str(folders(domain)))
    assert str(dataset.source.observation_space) == space
    recorded = gym.make(**metrics.read_env_spec(dataset, "env_spec"))
    raw = recorded.reset(seed=0)[0]
    parts = [raw]
    if domain == "kitchen":
        goals = [
            raw[key][task] for key in ("achieved_goal", "desired_goal") for task in sorted(TASKS)
        ]
        parts = [*goals, raw["observation"]]
    elif "maze" in domain:
        parts = [raw["achieved_goal"], raw["desired_goal"], raw["observation"]]
    first = dataset.episodes[0].observations[0]
    np.testing.assert_array_equal(first, np.concatenate(parts))
    np.testing.assert_array_equal(first, gym.wrappers.FlattenObservation(recorded).reset(seed=0)[0])
    iql = LEARNERS["iql"]
    evaluated = iql.make_env(iql.find_eval_env(dataset))
    flat = evaluated.reset(seed=0)[0]
    raw = evaluated.env.reset(seed=0)[0]
    np.testing.assert_array_equal(flat, gym.spaces.flatten(evaluated.env.observation_space, raw))
    assert flat.shape == first.shape and evaluated.spec.max_episode_steps == 12


def test_what_ends_a_maze_is_a_terminal_and_costs_nothing(folders, tmp_path):
    """A continuing task is cut, by a truncation, where the goal is reached; another terminates."""
    continuing = gta_diffusion.load_dataset(str(folders("pointmaze")))
    assert sum(e.terminals.sum() for e in continuing.episodes) == 0
    successes = [e.rewards.sum() for e in continuing.episodes]
    assert Counter(successes).keys() == {0.0, 1.0}
    raw = list(continuing.source.iterate_episodes())
    assert all(e.truncations[-1] and e.truncations.sum() == 1 for e in raw)

    env = gym.make("PointMaze_UMaze-v3", continuing_task=False)
    walk = waypoint_controller(env, np.random.default_rng(0))
    episodes = [roll(env, env.reset(seed=seed)[0], walk, 300)[0] for seed in range(2)]
    dataset = gta_diffusion.load_dataset(str(write(tmp_path, "test/once-v0", episodes, env)))
    assert [e.terminals.sum() for e in dataset.episodes] == [1, 1]
    for data in (continuing, dataset):
        windows = gta_diffusion.make_windows(data, H, 0.9, 100.0)
        for k in range(0, len(windows.start), 20):
            e = data.episodes[windows.episode[k]]
            steps = len(e.rewards) - 1 - windows.timestep[k]
            assert windows.y[k] == pytest.approx(0.9**steps * e.rewards[-1], abs=1e-7)


def test_kitchen_rewards_the_number_of_completed_tasks(folders):
    """Recorded: at every step. Evaluated: once, as D4RL's references of 0 and 4 take it."""
    dataset = gta_diffusion.load_dataset(str(folders("kitchen")))
    for e in dataset.episodes:
        achieved, desired = e.observations[1:, :11], e.observations[1:, 11:22]
        near = [
            np.linalg.norm((achieved - desired)[:, columns], axis=1) < 0.3
            for columns in (slice(0, 7), slice(7, 9), slice(9, 10), slice(10, 11))
        ]
        np.testing.assert_array_equal(e.rewards, np.sum(near, axis=0))
    assert [e.rewards.max() for e in dataset.episodes] == [0, 1, 0]
    assert dataset.episodes[1].rewards.sum() > 4
    for module in LEARNERS.values():
        assert module.reference_returns(dataset) == (0.0, 4.0)
    td3bc = LEARNERS["td3bc"]
    env = td3bc.make_env(td3bc.find_eval_env(dataset))
    env.reset(seed=0)
    rewards, still = [], np.zeros(9)
    for step in range(6):
        if step == 2:
            open_microwave(env)
        _, reward, terminated, _, _ = env.step(still)
        rewards.append(reward)
        assert not terminated
    assert rewards == [0, 0, 1, 0, 0, 0]
    goals = env.unwrapped.goal
    for task, indices in robotics.envs.franka_kitchen.kitchen_env.OBS_ELEMENT_INDICES.items():
        if task in goals:
            env.unwrapped.data.qpos[indices] = goals[task]
    _, reward, terminated, _, _ = env.step(still)
    assert reward == 3 and terminated


def test_success_weighting_draws_as_b2_says(buffers, folders):
    """An episode in proportion to its weight, 10 where it reached its goal, then any window."""
    dataset = gta_diffusion.load_dataset(str(folders("pointmaze")))
    with np.load(buffers("pointmaze"), allow_pickle=False) as buffer:
        episode, timestep = buffer["episode"], buffer["timestep"]
        assert json.loads(str(buffer["metadata"]))["success_weight"] == 10
        assert np.abs(buffer["terminals"]).sum() == 0
    lengths = np.array([len(e.rewards) for e in dataset.episodes])
    weight = np.array([10.0 if e.rewards.sum() > 0 else 1.0 for e in dataset.episodes])
    weight[lengths < H] = 0
    assert set(weight) >= {1.0, 10.0}
    p, N = weight / weight.sum(), len(episode)
    share = np.bincount(episode, minlength=len(p)) / N
    assert (np.abs(share - p) <= 4.5 * np.sqrt(p * (1 - p) / N)).all()
    longest = lengths.argmax()
    num_windows = lengths[longest] - H + 1
    own = timestep[episode == longest]
    assert own.max() < num_windows
    half = (own < num_windows / 2).mean()
    assert abs(half - math.ceil(num_windows / 2) / num_windows) < 4.5 * 0.5 / math.sqrt(len(own))


# --- learners ---

SMALL_DT = {"context": 5, "embedding_dim": 16, "num_layers": 1, "warmup_steps": 3}
# by reference-notes.md: CORL, IQL's paper, GTA's C.3
VALUES = {
    ("pointmaze", "td3bc"): {"alpha": 2.5, "reward_bias": 0.0},
    ("pointmaze", "iql"): {"expectile": 0.7, "beta": 3.0, "actor_dropout": 0.0},
    ("pointmaze", "cql"): {"target_gap": 5.0, "cql_alpha": 10.0, "critic_layers": 3},
    ("pointmaze", "mcq"): {"lmbda": 0.9, "reward_bias": 0.0},
    ("pointmaze", "dt"): {"target_return": 280.0, "return_scale": 1.0},
    ("antmaze", "td3bc"): {"reward_bias": -1.0},
    ("antmaze", "iql"): {"expectile": 0.9, "beta": 10.0, "reward_bias": -1.0},
    ("antmaze", "dt"): {"target_return": 1.0, "return_scale": 1.0},
    ("pen", "td3bc"): {"reward_bias": 0.0},
    ("pen", "iql"): {"expectile": 0.8, "beta": 3.0, "actor_dropout": 0.1},
    ("pen", "cql"): {"cql_alpha": 1.0, "actor_lr": 1e-4, "target_gap": -1.0},
    ("pen", "dt"): {"target_return": 3100.0},
    ("kitchen", "td3bc"): {"reward_bias": 0.0},
    ("kitchen", "iql"): {"expectile": 0.7, "beta": 0.5, "actor_dropout": 0.1},
    ("kitchen", "dt"): {"return_scale": 1.0},
}
REFERENCES = {
    "pointmaze": [23.85, 161.86],
    "antmaze": [0.0, 40.0],  # the dataset's own
    "pen": [96.262799, 3076.8331],
    "kitchen": [0.0, 4.0],
}


def train(name, env, tmp_path, **changes):
    """A tiny run by main. Returns its policy.pt and its config.json."""
    module = LEARNERS[name]
    sizes = {"train_steps": 2, "batch_size": 8, **(SMALL_DT if name == "dt" else {}), **changes}
    module.main(module.Args(env=str(env), runs=tmp_path / "runs", device="cpu", **sizes))
    (run,) = (tmp_path / "runs").iterdir()
    config = json.loads((run / "config.json").read_text())
    return torch.load(run / "policy.pt", weights_only=True), config


@pytest.mark.parametrize(("domain", "name"), VALUES)
def test_learners_run_on_a_dataset_and_its_buffer(domain, name, folders, buffers, tmp_path, capsys):
    changes = {"aug": buffers(domain), "eval_episodes": 1}
    policy, config = train(name, folders(domain), tmp_path, **changes)
    assert {key: policy["args"][key] for key in VALUES[domain, name]} == VALUES[domain, name]
    assert config["reference_returns"] == REFERENCES[domain]
    low, high = REFERENCES[domain]
    ((_, _, value, score),) = policy["evals"]
    assert score == pytest.approx(100 * (value - low) / (high - low))
    assert capsys.readouterr().out.splitlines()[-1].split(" | ")[1].startswith(f"{name} + gta(mu ")
    finite = [p.isfinite().all() for own in policy["weights"].values() for p in own.values()]
    assert all(finite)


def test_an_evaluation_is_a_hundred_episodes_of_the_evaluation_environment(folders, tmp_path):
    """Against a plain loop: one environment, its dictionary put together by hand. Dense rewards,
    as those of D4RL/pointmaze/umaze-dense-v2, tell every episode from the others."""
    options = {"continuing_task": True, "reset_target": False, "reward_type": "dense"}
    dense = copy_with(folders("pointmaze"), tmp_path, "eval_env_spec", options)
    module = LEARNERS["td3bc"]
    policy, _ = train("td3bc", dense, tmp_path, seed=3)
    args = module.Args(**{k: v for k, v in policy["args"].items() if k not in ("env", "runs")})
    assert args.eval_episodes == 100
    agents = AGENTS[module](args, 8, 2, torch.device("cpu"))
    module.put_weights(agents, policy)
    mean, std = (policy["scaling"][key].numpy() for key in ("obs_mean", "obs_std"))
    env = gym.make("PointMaze_UMaze-v3", maze_map=U_MAZE, max_episode_steps=12, **options)
    returns = []
    for episode in range(100):
        observation, _ = env.reset(seed=3000 + episode)
        total, truncated = 0.0, False
        while not truncated:
            parts = [observation[k] for k in ("achieved_goal", "desired_goal", "observation")]
            s = ((np.concatenate(parts) - mean) / std).astype(np.float32)
            action = agents.act(torch.from_numpy(s)[None, None])[0, 0].numpy()
            observation, reward, _, truncated, _ = env.step(action)
            total += reward
        returns.append(total)
    assert policy["evals"][0][2] == pytest.approx(np.mean(returns), rel=1e-6)
    assert abs(np.mean(returns[:99]) / np.mean(returns) - 1) > 1e-5


@pytest.mark.parametrize("env_id", ["AdroitHandHammer-v1", "AdroitHandRelocate-v1"])
def test_references_of_d4rl(env_id, folders):
    """D4RL's infos.py."""
    expected = {"Hammer": (-274.856578, 12794.134825), "Relocate": (-6.425911, 4233.877797)}
    dataset = gta_diffusion.load_dataset(str(folders("pen")))._replace(env_id=env_id)
    for module in LEARNERS.values():
        low, high = module.reference_returns(dataset)
        assert (low, high) == expected[env_id[len("AdroitHand") : -len("-v1")]]


# --- metrics ---


def test_mujoco_reproduces_pointmaze(folders):
    """Every recorded transition but an episode's first, before which the goal moved."""
    dataset = metrics.load_dataset(str(folders("pointmaze")))
    sample = metrics.sample_dataset(dataset, 10**9, None)
    s, a, s_next = sample.s[:, 0], sample.a[:, 0], sample.s_next[:, 0]
    env_spec, said = metrics.find_oracle(dataset, s.std(0))
    assert said.startswith("MuJoCo reproduces 9")
    answers = metrics.ask_chunk(env_spec, (s, a))
    error = np.abs(answers.s_next - s_next).max(1)
    moved = (s[:, 2:4] != s_next[:, 2:4]).any(1)
    assert 0 < moved.sum() <= len(dataset.episodes)
    assert error[~moved].max() < 1e-6 < error[moved].min()
    np.testing.assert_array_equal(answers.r[~moved], sample.r[~moved, 0])
    assert not answers.terminal.any()


@every_domain
def test_metrics_measure_what_they_can(domain, folders, buffers, tmp_path, capsys):
    out = tmp_path / "metrics.json"
    args = metrics.Args(aug=[buffers(domain)], out=out, num_transitions=100, device="cpu")
    metrics.main(args)
    output = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert f"oracle: {report['oracle']}\n" in output
    if domain == "pointmaze":
        assert report["oracle"].startswith("MuJoCo reproduces 9")
    else:
        reason = "(how its observations make a state is not known)"
        assert report["oracle"] == f"none for {report['env_id']} {reason}"
    own = next(numbers for name, numbers in report["numbers"].items() if name != "dataset")
    assert ("dynamic MSE" in own) == (domain == "pointmaze")
    assert own["state novelty, raw"] > 0 and own["terminal"] == 0


# --- what may be missing ---

HIDDEN = """
import sys

class Hider:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "gymnasium_robotics":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hider())
"""
WITHOUT = """
import sys
from pathlib import Path
import gta_augment, gta_diffusion, metrics, td3bc

env, cpu = sys.argv[1], {"device": "cpu"}
small = {"horizon": 7, "dim": 8, "batch_size": 8, "train_steps": 1}
gta_diffusion.main(gta_diffusion.Args(env=env, **small, **cpu))
gta_augment.main(gta_augment.Args(num_transitions=70, num_steps=2, mu=0.5, **cpu))
metrics.main(metrics.Args(aug=[Path("buffer.npz")], num_transitions=20, **cpu))
td3bc.main(td3bc.Args(aug=Path("buffer.npz"), train_steps=1, batch_size=8, **cpu))
"""


def test_without_the_package_all_but_evaluations_work(folders, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HIDDEN)
    path = os.pathsep.join(map(str, (tmp_path, ROOT)))
    command = [sys.executable, "-c", WITHOUT, folders("pointmaze")]
    result = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "error: PointMaze_UMaze-v3 needs the package gymnasium_robotics; "
        "pip install gymnasium-robotics"
    )
    line = "oracle: none for PointMaze_UMaze-v3 (it takes pip install gymnasium-robotics)\n"
    assert line in result.stdout and "wrote metrics.json" in result.stdout
    assert not (tmp_path / "runs").exists()


def test_an_environment_that_does_not_fit_is_one_line(folders, tmp_path, monkeypatch):
    module = LEARNERS["dt"]
    tasks = {"tasks_to_complete": TASKS + ["bottom burner", "top burner", "hinge cabinet"]}
    folder = copy_with(folders("kitchen"), tmp_path, "env_spec", tasks)
    dataset = module.load_dataset(str(folder))
    with pytest.raises(SystemExit, match=r"observes \(93,\) numbers, the dataset holds \(81,\)"):
        module.find_eval_env(dataset)
    monkeypatch.setattr(mujoco, "mjtJoint", ())
    with pytest.raises(SystemExit, match=rf"cannot be made with mujoco {mujoco.__version__} \("):
        module.find_eval_env(dataset)
