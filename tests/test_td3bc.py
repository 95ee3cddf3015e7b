"""Stage C, TD3+BC: the update, the rooms that the learners share, the files of a run."""

import csv
import json
import re

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import LABEL_B, ROOT, SAMPLE, TINY_C, run
from learners import PlainAgent, descend, draw_inputs, make_agents, make_args

import td3bc as C

CPU = torch.device("cpu")


class PlainTD3BC(PlainAgent):
    """One agent, one update after the other, as the two papers write it down."""

    def __init__(self, agents, i, lr):
        super().__init__(agents, i)
        self.actor_optimizer = self.adam(lr, "actor")
        self.critic_optimizer = self.adam(lr, "critic")

    def pi(self, name, s):
        return torch.tanh(self.mlp(name, "net", s))

    def update(self, s, a, r, s_next, terminal, noise, with_actor):
        with torch.no_grad():
            epsilon = (0.2 * noise).clamp(-0.5, 0.5)
            a_next = (self.pi("actor_target", s_next) + epsilon).clamp(-1, 1)
            q_next = [self.q("critic_target", k, s_next, a_next) for k in ("q1", "q2")]
            y = r + 0.99 * (1 - terminal) * torch.minimum(*q_next)
        critic_loss = sum(((self.q("critic", k, s, a) - y) ** 2).mean() for k in ("q1", "q2"))
        descend(self.critic_optimizer, critic_loss)
        if not with_actor:
            return critic_loss.item(), None
        pi = self.pi("actor", s)
        q = self.q("critic", "q1", s, pi)
        lmbda = 2.5 / q.abs().mean().item()
        actor_loss = -lmbda * q.mean() + F.mse_loss(pi, a)
        descend(self.actor_optimizer, actor_loss)
        for name in ("actor", "critic"):
            self.polyak(name, 0.005)
        return critic_loss.item(), actor_loss.item()


def test_update_is_the_papers_for_every_agent(float64):
    """Three agents at once against three plain single agents: losses and every weight."""
    args = make_args(C, num_seeds=3, seed=5)
    agents = make_agents(C, args)
    plain = [PlainTD3BC(agents, i, args.lr) for i in range(3)]
    torch.manual_seed(0)
    for step in range(1, 5):
        batch, noise = draw_inputs(C, args, B=64)
        losses = C.update(agents, batch, noise, step % 2 == 0, args)
        for i, agent in enumerate(plain):
            expected = agent.update(*(field[i] for field in batch), noise[i], step % 2 == 0)
            assert losses["critic_loss"][i].item() == pytest.approx(expected[0], rel=1e-9)
            if step % 2 == 0:
                assert losses["actor_loss"][i].item() == pytest.approx(expected[1], rel=1e-9)
            else:
                assert "actor_loss" not in losses
    for agent in plain:
        assert agent.largest_difference(agents) < 1e-9


def test_transitions_hold_what_the_episodes_hold(dataset):
    episodes = [C.Episode(*e) for e in dataset.episodes[:3]]
    scaling = C.make_scaling(episodes, gym.spaces.Box(-2.0, np.array([1.0, 2.0, 6.0], np.float32)))
    data = C.pack_transitions(episodes, scaling, CPU).numpy()
    states = np.concatenate([e.observations[:-1] for e in episodes])
    mean, std = states.mean(0), states.std(0) + 1e-3
    n = 0
    for e in episodes:
        for t in range(len(e.rewards)):
            a = (e.actions[t] + 2) / (np.array([1.0, 2.0, 6.0]) + 2) * 2 - 1
            expected = np.concatenate(
                [
                    (e.observations[t] - mean) / std,
                    a,
                    [e.rewards[t]],
                    (e.observations[t + 1] - mean) / std,
                    [e.terminals[t]],
                ]
            )
            np.testing.assert_allclose(data[n], expected, atol=2e-4)
            n += 1
    assert n == len(data)
    np.testing.assert_allclose(
        scaling.env_actions(scaling.actions(episodes[0].actions)), episodes[0].actions, atol=1e-6
    )


def test_batches_are_rows_of_the_data_and_s4rl_only_moves_states():
    torch.manual_seed(0)
    data = torch.arange(50.0)[:, None] + torch.arange(27.0) / 100  # a row tells where it came from
    batch = C.draw_batch(data, 2, 400, 11, 3, s4rl_sigma=0.0)
    index = batch.s[..., 0].round().long()
    packed = torch.cat([batch.s, batch.a, batch.r[..., None], batch.s_next], dim=-1)
    torch.testing.assert_close(packed, data[index][..., :26])
    torch.testing.assert_close(batch.terminal, data[index][..., 26])
    assert (index[0] != index[1]).any() and len(index.unique()) == 50

    torch.manual_seed(0)
    noisy = C.draw_batch(data, 2, 400, 11, 3, s4rl_sigma=0.1)
    for field in ("a", "r", "terminal"):
        assert torch.equal(getattr(noisy, field), getattr(batch, field))
    for field in ("s", "s_next"):
        noise = getattr(noisy, field) - getattr(batch, field)
        assert noise.std().item() == pytest.approx(0.1, rel=0.05)


def test_evaluation_is_the_environments_return(dataset):
    """Against a plain loop over one environment after the other."""
    args = make_args(C, num_seeds=2, seed=3)
    agents = C.TD3BC(args, 11, 3, CPU)
    scaling = C.make_scaling(dataset.episodes, dataset.source.action_space)
    spec = C.find_eval_env(dataset)
    returns = C.evaluate(agents, C.Envs(spec, 4), scaling, args, CPU)
    split = C.evaluate(agents, C.Envs(spec, 2), scaling, args, CPU)
    expected = np.zeros(2)
    for agent in range(2):
        for episode in range(2):
            env = gym.make("Hopper-v5")
            state, _ = env.reset(seed=1000 * (3 + agent) + episode)
            done = False
            while not done:
                s = torch.tensor((state - scaling.obs_mean) / scaling.obs_std).float()
                for layer in (0, 2, 4):
                    weight, bias = (
                        agents.actor.params[f"net.{layer}.{kind}"][agent].detach()
                        for kind in ("weight", "bias")
                    )
                    s = weight @ s + bias
                    s = torch.relu(s) if layer < 4 else torch.tanh(s)
                state, reward, terminated, truncated, _ = env.step(s.numpy())
                expected[agent] += reward / 2
                done = terminated or truncated
    np.testing.assert_allclose(returns, expected, rtol=1e-3)
    np.testing.assert_allclose(split, expected, rtol=1e-3)


def test_reference_returns(dataset):
    assert C.reference_returns(dataset) == (-20.272305, 3234.3)
    assert C.REFERENCE_RETURNS["hopper"] == (-20.272305, 3234.3)
    ids = ["Hopper-v5", "AntMaze_UMaze-v5", "PointMaze_Medium-v3", "AdroitHandPen-v1"]
    ids += ["FrankaKitchen-v1"]
    domains = ["locomotion", "antmaze", "maze2d", "adroit", "kitchen"]
    assert [C.domain_of(env_id) for env_id in ids] == domains


def read_run(folder, pattern):
    """The only run whose folder matches pattern: its config and the rows of its evals.csv."""
    (path,) = (p for p in (folder / "runs").iterdir() if re.fullmatch(pattern, p.name))
    with open(path / "evals.csv") as file:
        rows = list(csv.DictReader(file))
    return path, json.loads((path / "config.json").read_text()), rows


def test_files_of_a_run(pipeline):
    folder, outputs = pipeline
    name = r"td3bc-hopper-medium-sample-v0-{}-0-\d{{8}}-\d{{6}}-\d{{6}}"
    path, config, rows = read_run(folder, name.format(re.sub(r"[^\w.+-]+", "_", LABEL_B)))
    assert [(row["update"], row["seed"]) for row in rows] == [
        ("4", "0"), ("4", "1"), ("6", "0"), ("6", "1")
    ]  # fmt: skip
    assert list(rows[0]) == ["update", "seed", "return", "score"]
    for row in rows:
        score = 100 * (float(row["return"]) + 20.272305) / (3234.3 + 20.272305)
        assert float(row["score"]) == pytest.approx(score, abs=1e-3)
    scores = [float(row["score"]) for row in rows[-2:]]
    last_line = outputs["C aug"].splitlines()[-1]
    assert last_line == (
        f"hopper-medium-sample-v0 | td3bc + {LABEL_B} | "
        f"{np.mean(scores):.1f} +- {np.std(scores):.1f} over 2 seeds"
    )
    assert config["num_seeds"] == 2 and config["dataset_ids"] == ["hopper-medium-sample-v0"]
    _, config, _ = read_run(folder, name.format(re.sub(r"[^\w.+-]+", "_", f"{LABEL_B} only")))
    assert config["aug_only"] is True and config["eval_episodes"] == 2
    _, config, _ = read_run(folder, name.format("none"))
    assert config["aug"] is None and config["reference_returns"] == [-20.272305, 3234.3]
    assert " | td3bc | " in outputs["C"].splitlines()[-1]


def test_policy_loads_without_pickle_and_scores_the_same(pipeline):
    folder, _ = pipeline
    path, _, rows = read_run(folder, r"td3bc-hopper-medium-sample-v0-gta_mu_0.5_.*H_7_-.*")
    policy = torch.load(path / "policy.pt", weights_only=True)
    assert policy["algorithm"] == "td3bc" and policy["update"] == 6
    assert set(policy["weights"]) == {"actor", "critic", "actor_target", "critic_target"}
    flags = ["--load", path / "policy.pt", "--train-steps", 0, "--eval-episodes", 2, "--seed", 9]
    output = run(ROOT / "td3bc.py", *flags, cwd=folder).stdout
    scores = [float(row["score"]) for row in rows[-2:]]
    result = f"{np.mean(scores):.1f} +- {np.std(scores):.1f} over 2 seeds"
    assert output.splitlines()[-1].endswith(f"td3bc + {LABEL_B} | {result}")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "not a whole buffer"),
        (lambda path: path.write_bytes(b"no npz"), "not a whole buffer"),
        (lambda path: path.unlink(), "no such file"),
        (lambda path: np.savez(path, metadata="{}"), "lacks metadata in JSON"),
        (lambda path: np.savez(path, x=np.array([{}], object)), "not a whole buffer"),
        (lambda path: edit(path, format="other"), "a other file, not a buffer"),
        (lambda path: edit(path, arrays={"rewards": np.zeros((40, 6))}), "do not fit together"),
        (lambda path: edit(path, drop="actions"), "lacks one of"),
        (lambda path: edit(path, arrays={"rewards": np.full((40, 7), np.nan)}), "not all finite"),
        (lambda path: edit(path, format_version=2), "format version 2"),
        (lambda path: edit(path, dataset_ids=["pen"]), "made from pen, which contradicts"),
    ],
)
def test_a_bad_buffer_is_one_line(pipeline, tmp_path, damage, message):
    path = tmp_path / "buffer.npz"
    path.write_bytes((pipeline[0] / "buffer.npz").read_bytes())
    damage(path)
    with pytest.raises(SystemExit, match=message) as error:
        C.load_episodes(make_args(C, aug=path))
    assert "\n" not in str(error.value)


def edit(path, arrays=None, drop=None, **changes):
    """Rewrites a buffer with other metadata or arrays."""
    with np.load(path, allow_pickle=False) as file:
        old = dict(file)
    metadata = {**json.loads(str(old.pop("metadata"))), **changes}
    old.pop(drop, None)
    np.savez(path, metadata=json.dumps(metadata), **{**old, **(arrays or {})})


def test_training_uses_what_was_asked_for(dataset, pipeline, capsys):
    buffer = pipeline[0] / "buffer.npz"
    own = sum(len(e.rewards) for e in dataset.episodes)
    sizes = {}
    for name, flags in {"none": {}, "both": {"aug": buffer}, "only": {"aug": buffer}}.items():
        args = make_args(C, env=str(SAMPLE), aug_only=name == "only", **flags)
        _, episodes, _, aug = C.load_episodes(args)
        sizes[name] = sum(len(e.rewards) for e in episodes)
        assert aug == {
            "none": "none", "both": LABEL_B, "only": f"{LABEL_B} only"
        }[name]  # fmt: skip
    assert sizes == {"none": own, "both": own + 280, "only": 280}
    assert C.load_episodes(make_args(C, env=str(SAMPLE), s4rl_sigma=3e-4))[3] == "s4rl(0.0003)"


def test_env_that_contradicts_the_buffer_is_an_error(pipeline, tmp_path):
    flags = ["--env", "mujoco/pusher/none-v0", "--aug", pipeline[0] / "buffer.npz"]
    result = run(ROOT / "td3bc.py", *TINY_C, *flags, cwd=tmp_path, code=1)
    assert "Traceback" not in result.stderr and not (tmp_path / "runs").exists()
    same = ["--env", SAMPLE, "--aug", pipeline[0] / "buffer.npz"]
    run(ROOT / "td3bc.py", *TINY_C, *same, cwd=tmp_path)
