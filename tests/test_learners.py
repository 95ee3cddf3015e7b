"""What holds for all five learners: seeds, resuming, rewards, other datasets, learning."""

import copy
import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from conftest import LABEL_B, ROOT, SAMPLE, run
from learners import (
    LEARNERS,
    NO_DROPOUT,
    draw_inputs,
    make_agents,
    make_args,
    of_agent,
    take_update,
)
from minari.data_collector import EpisodeBuffer
from torch.func import vmap

every_learner = pytest.mark.parametrize("module", LEARNERS.values(), ids=LEARNERS)
DT_SMALL = {"context": 5, "embedding_dim": 16, "num_layers": 1, "warmup_steps": 3}


def small(module):
    return DT_SMALL if module.__name__ == "dt" else {}


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "one by one"])
@every_learner
def test_three_seeds_equal_three_single_agents(float64, module, at_once, monkeypatch):
    """At once is how a GPU runs all of them."""
    if at_once:
        at_once = partial(vmap, randomness="different")
        monkeypatch.setattr(module, "lift", lambda function, *_: at_once(function))
    changes = {"train_steps": 10, **small(module), **NO_DROPOUT.get(module, {})}
    args = make_args(module, num_seeds=3, seed=7, **changes)
    singles = [make_args(module, num_seeds=1, seed=7 + i, **changes) for i in range(3)]
    together, alone = make_agents(module, args), [make_agents(module, own) for own in singles]
    first = max(next(iter(together.weights.values())).values(), key=torch.numel)
    assert (first[0] - first[1]).abs().max() > 0.01
    torch.manual_seed(0)
    for step in range(1, 5):
        inputs = draw_inputs(module, args, B=16)
        losses = take_update(module, together, inputs, step, args)
        for i, agent in enumerate(alone):
            own = take_update(module, agent, of_agent(inputs, i), step, singles[i])
            for name, loss in losses.items():
                assert loss[i].item() == pytest.approx(own[name].item(), rel=1e-9)
    for name, params in together.weights.items():
        for key, p in params.items():
            for i, agent in enumerate(alone):
                torch.testing.assert_close(p[i], agent.weights[name][key][0], atol=1e-9, rtol=0)


COMPILED = [
    pytest.param(module, marks=[pytest.mark.slow] * (name not in ("td3bc", "iql")), id=name)
    for name, module in LEARNERS.items()
]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
@pytest.mark.parametrize("module", COMPILED)
def test_compiled_updates_equal_eager_ones(float64, module):
    changes = {"train_steps": 10, **small(module), **NO_DROPOUT.get(module, {})}
    args = make_args(module, num_seeds=2, **changes)
    inputs = [draw_inputs(module, args, B=16) for _ in range(4)]
    weights = []
    for args.compile in (False, True):
        agents = make_agents(module, args)
        for step, own in enumerate(inputs, start=1):
            take_update(module, agents, own, step, args)
        weights.append(agents.weights)
    for name, params in weights[0].items():
        for key, p in params.items():
            torch.testing.assert_close(weights[1][name][key], p, atol=1e-9, rtol=0)


@every_learner
def test_targets_start_where_their_networks_are(module):
    agents = make_agents(module, make_args(module, num_seeds=2, **small(module)))
    for name, params in agents.weights.items():
        if name.endswith("_target"):
            for key, p in params.items():
                own = agents.weights[name.removesuffix("_target")][key]
                assert torch.equal(p, own) and p.data_ptr() != own.data_ptr()


# --- resuming ---


def train(module, tmp_path, **changes):
    """A tiny run by main. Returns its folder."""
    args = module.Args(
        env=str(SAMPLE),
        runs=tmp_path / "runs",
        device="cpu",
        num_seeds=2,
        train_steps=7,
        batch_size=16,
        eval_every=2,
        eval_episodes=1,
        **small(module),
    )
    for key, value in changes.items():
        setattr(args, key, value)
    before = set((tmp_path / "runs").glob("*"))
    module.main(args)
    return args.resume or (set((tmp_path / "runs").glob("*")) - before).pop()


def kill_after(monkeypatch, module, last_step):
    """Makes main's next run end right after it has written policy.pt at last_step."""
    save = module.save_policy

    def save_and_die(run, step, *rest):
        save(run, step, *rest)
        if step == last_step:
            raise SystemExit("killed")

    monkeypatch.setattr(module, "save_policy", save_and_die)


def signal_during(monkeypatch, module, number, step):
    """Makes main's next run get a signal while it takes update number step."""
    update, count = module.update, itertools.count(1)

    def update_and_signal(*inputs):
        if next(count) == step:
            signal.raise_signal(number)
        return update(*inputs)

    monkeypatch.setattr(module, "update", update_and_signal)


def assert_same(a, b):
    """Equality to the last bit, through dictionaries and lists."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    elif torch.is_tensor(a):
        assert a.dtype == b.dtype and torch.equal(a, b)
    else:
        assert a == b


@every_learner
def test_a_killed_run_continues_to_the_same_bits(module, tmp_path, monkeypatch, capsys):
    whole = train(module, tmp_path)
    with (
        monkeypatch.context() as patch,
        pytest.raises(SystemExit, match="killed"),
    ):
        kill_after(patch, module, 4)
        train(module, tmp_path)
    (killed,) = set((tmp_path / "runs").iterdir()) - {whole}
    assert torch.load(killed / "policy.pt", weights_only=True)["update"] == 4
    assert (killed / "evals.csv").read_text().splitlines()[-1].startswith("2,")  # not yet 4
    config = (killed / "config.json").read_text()
    capsys.readouterr()
    module.main(module.Args(resume=killed))  # no flag is repeated
    output = capsys.readouterr().out
    assert f"resumed {killed} at update 4 of 7" in output
    first, second = (torch.load(p / "policy.pt", weights_only=True) for p in (whole, killed))
    assert first["args"].pop("resume") is None and second["args"].pop("resume") == str(killed)
    del first["args"]["runs"], second["args"]["runs"]
    assert_same(first, second)
    assert (whole / "evals.csv").read_text() == (killed / "evals.csv").read_text()
    assert (killed / "config.json").read_text() == config
    assert len(list(killed.iterdir())) == 3

    train(module, tmp_path, resume=killed)  # finished: says the result again, trains no more
    again = capsys.readouterr().out.splitlines()
    assert again[-1] == output.splitlines()[-1]
    assert_same(second | {"args": 0}, torch.load(killed / "policy.pt") | {"args": 0})


@every_learner
def test_a_signal_saves_and_the_run_continues_to_the_same_bits(module, tmp_path, monkeypatch):
    """SIGTERM before the first evaluation, then Ctrl-C between two: nothing is lost."""
    whole = train(module, tmp_path)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        signal_during(patch, module, signal.SIGTERM, 1)
        with pytest.raises(SystemExit, match="interrupted at update 1; --resume .* continues"):
            train(module, tmp_path)
    (stopped,) = set((tmp_path / "runs").iterdir()) - {whole}
    with monkeypatch.context() as patch:
        signal_during(patch, module, signal.SIGINT, 4)
        with pytest.raises(SystemExit, match="interrupted at update 5"):
            module.main(module.Args(resume=stopped))
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    module.main(module.Args(resume=stopped))
    first, second = (torch.load(p / "policy.pt", weights_only=True) for p in (whole, stopped))
    for key in ("weights", "optimizers", "rng", "evals", "update"):
        assert_same(first[key], second[key])
    assert (whole / "evals.csv").read_text() == (stopped / "evals.csv").read_text()


def test_kill_minus_nine_and_resume(tmp_path):
    flags = ["--env", SAMPLE, "--train-steps", 120, "--batch-size", 64, "--eval-every", 10]
    flags = [*map(str, flags), "--eval-episodes", "1"]
    run(ROOT / "iql.py", *flags, cwd=tmp_path)
    (whole,) = (tmp_path / "runs").iterdir()
    process = subprocess.Popen(
        [sys.executable, ROOT / "iql.py", *flags], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 120
    killed = None
    while killed is None and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
        killed = next((p.parent for p in (tmp_path / "runs").glob("*/policy.pt")
                       if p.parent != whole), None)  # fmt: skip
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    killed_at = torch.load(killed / "policy.pt", weights_only=True)["update"]
    assert killed_at < 120
    output = run(ROOT / "iql.py", "--resume", killed, cwd=tmp_path).stdout
    assert f"at update {killed_at} of 120" in output
    first, second = (torch.load(p / "policy.pt", weights_only=True) for p in (whole, killed))
    for key in ("weights", "optimizers", "rng", "evals"):
        assert_same(first[key], second[key])
    assert (whole / "evals.csv").read_text() == (killed / "evals.csv").read_text()


def test_resume_takes_no_other_flags_and_needs_a_policy(tmp_path):
    module = LEARNERS["iql"]
    whole = train(module, tmp_path)
    cases = [
        ({"resume": whole, "batch_size": 17}, "--batch-size 16, not 17"),
        ({"resume": whole, "seed": 3}, "--seed 0, not 3"),
        ({"resume": whole, "load": whole / "policy.pt"}, "exclude each other"),
        ({"resume": tmp_path}, "policy.pt: no such file"),
    ]
    for changes, message in cases:
        with pytest.raises(SystemExit, match=re.escape(message)) as error:
            train(module, tmp_path, **changes)
        assert "\n" not in str(error.value)
    other = LEARNERS["cql"]
    with pytest.raises(SystemExit, match="a policy of iql.py, not of cql.py"):
        train(other, tmp_path, resume=whole)
    assert [p.name for p in (tmp_path / "runs").iterdir()] == [whole.name]


@pytest.mark.parametrize("name", ["observations", "rewards", "terminals", "return_to_go"])
def test_resume_notices_another_buffer(name, pipeline, tmp_path):
    module, path = LEARNERS["dt"], tmp_path / "buffer.npz"
    with np.load(pipeline[0] / "buffer.npz", allow_pickle=False) as file:
        buffer = dict(file)
    np.savez(path, **buffer)
    whole = train(module, tmp_path, aug=path)
    train(module, tmp_path, resume=whole)
    changed = buffer[name].copy()
    changed[3] = ~changed[3] if name == "terminals" else changed[3] + 0.01
    np.savez(path, **buffer | {name: changed})
    with pytest.raises(SystemExit, match="the dataset or the buffer has changed since"):
        train(module, tmp_path, resume=whole)
    moved = tmp_path / "moved.npz"
    np.savez(moved, **buffer)
    train(module, tmp_path, resume=whole, aug=moved)


@every_learner
def test_a_loaded_policy_scores_the_same(module, tmp_path, capsys, monkeypatch):
    """No flag that defines it is typed again."""
    defining = {
        "dt": {"num_heads": 2, "return_scale": 0.01},
        "cql": {"critic_layers": 2},
        "iql": {"actor_dropout": 0.3},
        "mcq": {"actor_dropout": 0.0},
    }
    path = train(module, tmp_path, **defining.get(module.__name__, {}))
    result = capsys.readouterr().out.splitlines()[-1]
    flags = {"load": path, "train_steps": 0, "num_seeds": 1, "seed": 5, "env": None}
    flags |= {key: getattr(module.Args(), key) for key in module.POLICY_FLAGS}
    train(module, tmp_path, **flags)
    assert capsys.readouterr().out.splitlines()[-1] == result
    policy = torch.load(path / "policy.pt", weights_only=True)
    name, params = next(iter(policy["weights"].items()))
    key = max(params, key=lambda key: params[key].numel())
    params[key] = params[key][:, :1]
    torch.save(policy, path / "policy.pt")
    with pytest.raises(SystemExit, match=re.escape(f"{name} {key} does not fit")):
        train(module, tmp_path, **flags)


def test_a_loaded_run_can_be_resumed_on_other_data(pipeline, tmp_path, monkeypatch):
    """It keeps the scaling of the policy that it started from."""
    module = LEARNERS["iql"]
    first = train(module, tmp_path)
    flags = {"load": first / "policy.pt", "aug": pipeline[0] / "buffer.npz"}
    before = set((tmp_path / "runs").iterdir())
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="killed"):
        kill_after(patch, module, 4)
        train(module, tmp_path, **flags)
    (killed,) = set((tmp_path / "runs").iterdir()) - before
    module.main(module.Args(resume=killed))
    whole = train(module, tmp_path, **flags)
    first, second = (torch.load(p / "policy.pt", weights_only=True) for p in (whole, killed))
    assert_same(first["weights"], second["weights"])
    assert first["aug_label"] == second["aug_label"] == f"{LABEL_B} after none"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path, policy: path.write_bytes(path.read_bytes()[:3000]), "not a whole policy.pt"),
        (lambda path, policy: path.write_bytes(b"nothing"), "not a whole policy.pt"),
        (lambda path, policy: path.unlink(), "no such file"),
        (lambda path, policy: torch.save({"format": "gta-diffusion", "format_version": 1}, path),
         "a gta-diffusion file, not a policy"),
        (lambda path, policy: torch.save({"format": "gta-policy", "format_version": 3}, path),
         "format version 3; this program reads version 2"),
        (lambda path, policy: torch.save(policy | {"algorithm": "cql"}, path),
         "a policy of cql.py, not of iql.py"),
        (lambda path, policy: torch.save(policy | {"env_id": "Walker2d-v5"}, path),
         "policy.pt is for Walker2d-v5, the dataset is of Hopper-v5"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("flag", ["load", "resume"])
def test_a_bad_policy_is_one_line(damage, message, flag, tmp_path):
    run = train(LEARNERS["iql"], tmp_path)
    path = run / "policy.pt"
    damage(path, torch.load(path, weights_only=True))
    args = {"load": {"load": path}, "resume": {"resume": run}}[flag]
    with pytest.raises(SystemExit, match=message) as error:
        train(LEARNERS["iql"], tmp_path, **args)
    assert "\n" not in str(error.value) and len(list((tmp_path / "runs").iterdir())) == 1


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("iql", {"actor_dropout": 1.5}, "--actor-dropout 1.5: must be between 0 and 1"),
        ("iql", {"expectile": -0.1}, "--expectile -0.1: must be between 0 and 1"),
        ("iql", {"beta": 0.0}, "--beta 0.0: must be positive"),
        ("td3bc", {"tau": 2.0}, "--tau 2.0: must be between 0 and 1"),
        ("td3bc", {"s4rl_sigma": -1.0}, "--s4rl-sigma -1.0: must be between 0 and"),
        ("cql", {"actor_lr": -1.0}, "--actor-lr -1.0: must be positive"),
        ("cql", {"critic_layers": 0}, "--critic-layers 0: must be between 1"),
        ("mcq", {"lmbda": 1.1}, "--lmbda 1.1: must be between 0 and 1"),
        ("mcq", {"num_actions": 0}, "--num-actions 0: must be positive"),
        ("dt", {"warmup_steps": 0}, "--warmup-steps 0: must be positive"),
        ("dt", {"num_heads": 3}, "--embedding-dim 16: must be divisible by --num-heads 3"),
        ("dt", {"context": 2000}, "--context 2000: must be between 1 and 1000"),
        ("iql", {"seed": -1}, "--seed -1: must be between 0 and"),
        ("iql", {"device": "mps"}, "--device mps: not supported"),
        ("dt", {"dropout": 2.0}, "--dropout 2.0: must be between 0 and 1"),
    ],
)
def test_a_bad_flag_is_one_line(name, changes, message, tmp_path):
    with pytest.raises(SystemExit, match=re.escape(message)):
        train(LEARNERS[name], tmp_path, **changes)
    assert not (tmp_path / "runs").exists()


def test_runs_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="--runs .*file: cannot be written"):
        train(LEARNERS["iql"], tmp_path, runs=tmp_path / "file")


def test_wandb_gets_the_evaluations(tmp_path):
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    flags = ["--env", SAMPLE, "--train-steps", 4, "--batch-size", 16, "--eval-every", 2]
    flags += ["--eval-episodes", 1, "--track"]
    command = [sys.executable, ROOT / "iql.py", *flags]
    result = subprocess.run(
        list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    (log,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = log.read_bytes()
    for name in (b"score", b"return", b"value_loss", b"critic_loss", b"actor_loss"):
        assert name in content


# --- rewards and other datasets ---


def test_domains_have_the_papers_constants():
    expected = {
        ("iql", "Hopper-v5"): {"expectile": 0.7, "beta": 3.0, "actor_dropout": 0.0},
        ("iql", "PointMaze_UMaze-v3"): {"expectile": 0.7, "beta": 3.0, "reward_bias": 0.0},
        ("iql", "AntMaze_UMaze-v5"): {"expectile": 0.9, "beta": 10.0, "reward_bias": -1.0},
        ("iql", "AdroitHandPen-v1"): {"expectile": 0.8, "beta": 3.0, "actor_dropout": 0.1},
        ("iql", "FrankaKitchen-v1"): {"expectile": 0.7, "beta": 0.5, "actor_dropout": 0.1},
        ("cql", "Hopper-v5"): {"cql_alpha": 10.0, "target_gap": -1.0, "actor_lr": 3e-5},
        ("cql", "PointMaze_UMaze-v3"): {"cql_alpha": 10.0, "target_gap": 5.0, "min_gap": None},
        ("cql", "AntMaze_UMaze-v5"): {
            "cql_alpha": 5.0,
            "target_gap": 0.8,
            "min_gap": -200.0,
            "max_target_backup": True,
            "actor_lr": 1e-4,
            "reward_scale": 10.0,
            "reward_bias": -5.0,
        },
        ("cql", "AdroitHandPen-v1"): {"cql_alpha": 1.0, "actor_lr": 1e-4},
        ("mcq", "AntMaze_UMaze-v5"): {"lmbda": 0.9, "reward_bias": -1.0},
        ("td3bc", "AntMaze_UMaze-v5"): {"alpha": 2.5, "reward_bias": -1.0},
        ("dt", "Hopper-v5"): {"return_scale": 0.001},
        ("dt", "PointMaze_UMaze-v3"): {"return_scale": 1.0},
    }
    for (name, env_id), values in expected.items():
        args = LEARNERS[name].Args()
        LEARNERS[name].fill_in_by_domain(args, env_id)
        assert {key: getattr(args, key) for key in values} == values, (name, env_id)
        assert args.eval_episodes == (10 if env_id == "Hopper-v5" and name != "dt" else 100)
    args = LEARNERS["iql"].Args(expectile=0.6)
    LEARNERS["iql"].fill_in_by_domain(args, "AntMaze_UMaze-v5")
    assert args.expectile == 0.6 and args.beta == 10.0


def test_rewards_are_scaled_for_training_alone(dataset):
    module = LEARNERS["iql"]
    args = make_args(module, "AntMaze_UMaze-v5", reward_scale=10.0)
    scaled = module.scale_rewards(dataset.episodes, dataset, args)
    for own, e in zip(scaled, dataset.episodes):
        np.testing.assert_allclose(own.rewards, 10 * e.rewards - 1)
        assert own.observations is e.observations
    args = make_args(module, normalize_reward=True)
    scaled = module.scale_rewards(dataset.episodes, dataset, args)
    returns = [own.rewards.sum() for own in scaled]
    assert max(returns) - min(returns) == pytest.approx(1000)
    one = dataset._replace(episodes=dataset.episodes[:1])
    with pytest.raises(SystemExit, match="--normalize-reward: all episodes"):
        module.scale_rewards(one.episodes, one, args)


def record(root, dataset_id, env, lengths):
    """Writes a Minari dataset of random actions, an episode for each length, shorter where it
    terminates. Returns its folder."""
    env.action_space.seed(0)
    buffers = []
    for seed, T in enumerate(lengths):
        observations, actions, rewards, terminations = [env.reset(seed=seed)[0]], [], [], []
        for _ in range(T):
            actions.append(env.action_space.sample())
            observation, reward, terminated, _, _ = env.step(actions[-1])
            observations.append(observation)
            rewards.append(reward)
            terminations.append(terminated)
            if terminated:
                break
        keys = observations[0].keys() if isinstance(observations[0], dict) else ()
        stacked = {key: np.array([o[key] for o in observations]) for key in keys}
        buffers.append(
            EpisodeBuffer(
                observations=stacked or np.array(observations),
                actions=np.array(actions),
                rewards=np.array(rewards),
                terminations=np.array(terminations),
                truncations=np.zeros(len(actions), bool),
            )
        )
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning):
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        minari.create_dataset_from_buffers(dataset_id, buffers, env=env)
    return root / dataset_id


@pytest.fixture(scope="module")
def pusher(tmp_path_factory):
    """Never terminal, actions in [-2, 2], episodes of any length."""
    env = gym.make("Pusher-v5")
    return record(tmp_path_factory.mktemp("minari"), "test/pusher-v0", env, (100, 37, 12, 3))


@pytest.fixture(scope="module")
def antmaze(tmp_path_factory):
    """Dict observations, sparse rewards, another domain."""
    robotics = pytest.importorskip("gymnasium_robotics", reason="needs gymnasium-robotics")
    gym.register_envs(robotics)
    env = gym.make("AntMaze_UMaze-v5", max_episode_steps=100)
    return record(tmp_path_factory.mktemp("minari"), "test/antmaze-v0", env, (50, 20))


@every_learner
def test_another_action_space_and_no_terminals(module, pusher, tmp_path, capsys):
    path = train(module, tmp_path, env=str(pusher), s4rl_sigma=3e-4)
    output = capsys.readouterr().out
    assert "4 episodes, 152 transitions, 0 terminals" in output
    assert "no reference returns for Pusher-v5: the scores are plain returns" in output
    assert " + s4rl(0.0003) | " in output.splitlines()[-1]
    policy = torch.load(path / "policy.pt", weights_only=True)
    finite = [p.isfinite().all() for own in policy["weights"].values() for p in own.values()]
    assert all(finite)
    scaling = module.Scaling(*(policy["scaling"][k].numpy() for k in module.Scaling._fields))
    assert (scaling.env_actions(np.ones(7)) == 2).all()
    assert (scaling.env_actions(-np.ones(7)) == -2).all()
    actions = module.load_dataset(str(pusher)).episodes[0].actions
    assert np.abs(scaling.actions(actions)).max() <= 1
    np.testing.assert_allclose(scaling.actions(actions), actions / 2, atol=1e-6)


@every_learner
def test_main_trains_on_what_the_flags_say(module, pipeline, tmp_path, capsys):
    """Each of these flags changes the first update, and the words that name the augmentation."""
    flags = [{}, {"s4rl_sigma": 0.1}, {"aug": pipeline[0] / "buffer.npz"}]
    flags.append({"aug": pipeline[0] / "buffer.npz", "aug_only": True})
    if module.__name__ == "dt":
        flags.append({"return_scale": 1.0})
    else:
        flags += [{"reward_bias": 5.0}, {"reward_scale": 3.0}, {"normalize_reward": True}]
    weights, labels = [], []
    for changes in flags:
        path = train(module, tmp_path, train_steps=1, num_seeds=1, **changes)
        policy = torch.load(path / "policy.pt", weights_only=True)
        network = policy["weights"].get("critic") or policy["weights"]["transformer"]
        weights.append(torch.cat([p.flatten() for p in network.values()]))
        labels.append(capsys.readouterr().out.splitlines()[-1].split(" | ")[1])
    for i, own in enumerate(weights):
        assert not any(torch.equal(own, other) for other in weights[:i]), flags[i]
    expected = ["", " + s4rl(0.1)", f" + {LABEL_B}", f" + {LABEL_B} only"]
    assert labels[:4] == [module.__name__ + label for label in expected]


@every_learner
def test_main_follows_the_schedules(module, tmp_path, monkeypatch):
    """The actor's rate of IQL, DT's warm-up, TD3+BC's delay; a resumed run goes on where it was."""
    seen = []
    if module.__name__ == "iql":
        monkeypatch.setattr(module.IQL, "set_actor_lr", lambda self, lr: seen.append(lr))
        expected = [3e-4 * 0.5 * (1 + math.cos(math.pi * k / 7)) for k in range(7)]
    elif module.__name__ == "dt":
        monkeypatch.setattr(module.DT, "set_lr", lambda self, lr: seen.append(lr))
        expected = [1e-4 * share for share in (1 / 3, 2 / 3, 1, 1, 1, 1, 1)]
    elif module.__name__ == "td3bc":
        update = module.update

        def note(agents, batch, noise, with_actor, args):
            seen.append(with_actor)
            return update(agents, batch, noise, with_actor, args)

        monkeypatch.setattr(module, "update", note)
        expected = [False, True] * 3 + [False]
    else:
        pytest.skip("has no schedule")
    train(module, tmp_path)
    assert seen == pytest.approx(expected)
    seen.clear()
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="killed"):
        kill_after(patch, module, 4)
        train(module, tmp_path, runs=tmp_path / "killed")
    (killed,) = (tmp_path / "killed").iterdir()
    module.main(module.Args(resume=killed))
    assert seen == pytest.approx(expected)


@every_learner
def test_a_maze(module, antmaze, tmp_path, capsys):
    path = train(module, tmp_path, env=str(antmaze), train_steps=2)
    assert "2 episodes, 70 transitions, 0 terminals" in capsys.readouterr().out
    policy = torch.load(path / "policy.pt", weights_only=True)
    defaults = make_args(module, "AntMaze_UMaze-v5")
    for key in {**module.BY_DOMAIN["default"], **module.BY_DOMAIN.get("antmaze", {})}:
        assert key == "eval_episodes" or policy["args"][key] == getattr(defaults, key)
    assert len(policy["scaling"]["obs_mean"]) == 105 + 2 + 2  # the ant, its goal, where it is
    assert [row[3] for row in policy["evals"]] == [0.0, 0.0]  # never at the goal, as a score


# --- learning ---

LEARN = {
    "td3bc": ["--train-steps", 1000, "--batch-size", 128],
    "iql": ["--train-steps", 1000, "--batch-size", 128],
    "cql": ["--train-steps", 3000, "--batch-size", 64, "--actor-lr", 3e-4],
    "mcq": ["--train-steps", 3000, "--batch-size", 64, "--lr", 1e-3],
    "dt": ["--train-steps", 300, "--batch-size", 16, "--lr", 1e-3, "--warmup-steps", 50],
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in ("cql", "mcq") else n for n in LEARN],
)
def test_learns_on_the_bundled_dataset(name, tmp_path):
    """Far above the random policy, whose score is 0."""
    flags = [*LEARN[name], "--eval-every", 10_000, "--eval-episodes", 5]
    output = run(ROOT / f"{name}.py", *flags, "--runs", tmp_path).stdout
    assert float(output.splitlines()[-1].split("|")[2].split()[0]) > 15


def test_untrained_agents_score_near_zero(dataset):
    """What the scores above are compared with."""
    for module in LEARNERS.values():
        args = make_args(module, **small(module))
        agents = make_agents(module, copy.copy(args))
        scaling = module.make_scaling(dataset.episodes, dataset.source.action_space)
        envs = module.Envs(module.find_eval_env(dataset), 2)
        args.target_return = 3600.0
        evaluate = getattr(module, "evaluate", None) or module.evaluate_target_return
        (value,) = evaluate(agents, envs, scaling, args, torch.device("cpu"))
        assert 100 * (value + 20.272305) / (3234.3 + 20.272305) < 8
