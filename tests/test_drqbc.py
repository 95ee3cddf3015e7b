"""baselines/drqbc.py: V-D4RL's frames, one update, latents, fine-tuning on a buffer of them."""

import json
import os
import re
from collections import deque

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_A, TINY_B, run
from torch import nn

import drqbc as D

TINY = {"batch_size": 4, "train_steps": 4, "eval_every": 2, "eval_episodes": 1, "device": "cpu"}


def make_rows(lengths, seed=0, act_dim=2):
    """Random episodes in V-D4RL's layout."""
    rng, R = np.random.default_rng(seed), sum(lengths)
    step_type = np.concatenate([[0] + [1] * (n - 2) + [2] for n in lengths])
    observation = rng.integers(0, 256, (R, 3, 84, 84), dtype=np.uint8)
    numbers = {"reward": rng.random(R), "discount": rng.random(R), "step_type": step_type}
    return {"observation": observation, "action": rng.uniform(-1, 1, (R, act_dim)), **numbers}


@pytest.fixture(scope="module")
def walker():
    """dm_control's walker with episodes of 20 actions; these tests need a renderer."""
    before = dict(os.environ)
    try:
        env = D.make_env("walker_walk", D.DrQBC(D.Args(), 6))
    except SystemExit as error:
        pytest.skip(str(error))
    finally:  # MUJOCO_GL is of this module alone
        os.environ.clear()
        os.environ.update(before)
    env._step_limit = 40
    env.task.random.seed(0)
    return env


@pytest.fixture(scope="module")
def vd4rl(walker, tmp_path_factory):
    """Three episodes of random actions, two in a shard of HDF5 and one in a file of NumPy's."""
    folder = tmp_path_factory.mktemp("walker_walk") / "walker_walk" / "medium"
    folder.mkdir(parents=True)
    rng, episodes = np.random.default_rng(0), []
    for _ in range(3):
        walker.reset()
        rows = [(D.take_frame(walker), np.zeros(6), 0.0, 1.0, 0)]
        for t in range(20):
            a, r = np.float32(rng.uniform(-1, 1, 6)), 0.0
            for _ in range(2):
                r += walker.step(a).reward
            rows.append((D.take_frame(walker), a, r, 1.0, 1 + (t == 19)))
        episodes.append({key: np.array(x) for key, x in zip(D.KEYS, zip(*rows))})
    with h5py.File(folder / "a.hdf5", "w") as file:
        for key in D.KEYS:
            file[key] = np.concatenate([episodes[0][key], episodes[1][key]])
    np.savez(folder / "b.npz", **episodes[2])
    return folder


@pytest.mark.parametrize("n_step", [1, 3])
def test_states_are_three_frames_and_rewards_are_of_n_steps(n_step):
    rows, expected = make_rows([7, 5, 4]), []
    for first, end in ((0, 7), (7, 12), (12, 16)):
        frames = deque([first] * 3, maxlen=3)
        states = [list(frames)]
        for k in range(first + 1, end):
            frames.append(k)
            states.append(list(frames))
        for t in range(end - first - n_step):  # s_t, a_t leads to row t + 1
            k = [first + t + 1 + j for j in range(n_step)]
            r = sum(0.9**j * rows["reward"][i] for j, i in enumerate(k))
            counts = 0.9**n_step * rows["discount"][k[-1]]
            expected.append((states[t], rows["action"][k[0]], r, counts, states[t + n_step]))
    data = {key: torch.tensor(x) for key, x in rows.items()}
    for x, y in zip(D.n_step_transitions(data, n_step, 0.9), zip(*expected)):
        np.testing.assert_allclose(x, np.array(y), rtol=1e-6)

    args = D.Args(n_step=n_step, discount=0.9, batch_size=200, device="cpu")
    draw_batch, act_dim = D.draw_images(data, args)
    s, a, r, _, s_next = draw_batch()
    assert act_dim == 2
    for images, place in ((s, 0), (s_next, 4)):
        for image, action in zip(images[:20], a):
            (own,) = (e for e in expected if (e[1] == action.numpy()).all())
            frame = torch.from_numpy(rows["observation"][own[place]].reshape(9, 84, 84))
            wide = nn.functional.pad(frame.float(), (4, 4, 4, 4), "replicate").to(torch.uint8)
            crops = wide.unfold(1, 84, 1).unfold(2, 84, 1)  # [9, 9, 9, 84, 84]
            assert (crops.permute(1, 2, 0, 3, 4) == image).all(-1).all(-1).all(-1).sum() == 1


def test_random_shift_is_a_crop_of_the_padded_image():
    frames = torch.randint(0, 256, (300, 2, 84, 84), dtype=torch.uint8)
    torch.manual_seed(1)
    shifted = D.random_shift(frames)
    torch.manual_seed(1)
    shifts = torch.randint(-4, 5, (2, 300, 1)).squeeze(-1).T.tolist()
    for image, own, (dy, dx) in zip(frames.numpy(), shifted.numpy(), shifts):
        wide = np.pad(image, [(0, 0), (4, 4), (4, 4)], "edge")
        assert (own == wide[:, 4 + dy : 88 + dy, 4 + dx : 88 + dx]).all()
    assert {x for pair in shifts for x in pair} == set(range(-4, 5))


def plain_update(weights, batch, noise, args, std):
    """One update as DrQ-v2's code does it: functions of plain tensors. Returns the new weights."""
    w = {key: x.clone().requires_grad_() for key, x in weights.items()}
    s, a, r, discount, s_next = batch

    def see(frames):
        x = frames.double() / 255 - 0.5
        for i in (0, 2, 4, 6):
            stride = 2 if i == 0 else 1
            x = nn.functional.conv2d(x, w[f"encoder.{i}.weight"], w[f"encoder.{i}.bias"], stride)
            x = x.relu()
        return x.reshape(len(x), -1)

    def trunk(name, x):
        h = x @ w[f"{name}.0.weight"].T + w[f"{name}.0.bias"]
        h = (h - h.mean(1, keepdim=True)) / (h.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        return (h * w[f"{name}.1.weight"] + w[f"{name}.1.bias"]).tanh()

    def head(name, x):
        for i in (0, 2, 4):
            x = x @ w[f"{name}.{i}.weight"].T + w[f"{name}.{i}.bias"]
            x = x.relu() if i < 4 else x
        return x

    def q(x, a, suffix=""):
        h = torch.cat([trunk(f"critic{suffix}.0", x), a], 1)
        return [head(f"critic{suffix}.{k}", h).squeeze(1) for k in (1, 2)]

    def act(x, eps):
        a = head("actor.1", trunk("actor.0", x)).tanh() + (std * eps).clamp(-0.3, 0.3)
        inside = a.clamp(-1 + 1e-6, 1 - 1e-6)
        return a - a.detach() + inside.detach()

    def adam_step(loss, prefixes):
        keys = [k for k in w if k.startswith(prefixes) and "target" not in k]
        for key, g in zip(keys, torch.autograd.grad(loss, [w[k] for k in keys])):
            new = w[key] - args.lr * g / (g.abs() + 1e-8)  # Adam's first step
            w[key] = new.detach().requires_grad_()

    x, x_next = see(s), see(s_next).detach()
    with torch.no_grad():
        target = r + discount * torch.minimum(*q(x_next, act(x_next, noise[0]), "_target"))
    q_1, q_2 = q(x, a)
    adam_step(((q_1 - target) ** 2).mean() + ((q_2 - target) ** 2).mean(), ("encoder", "critic"))
    x = x.detach()  # of the encoder before its step
    pi = act(x, noise[1])
    value = torch.minimum(*q(x, pi))
    loss = -args.alpha / value.detach().abs().mean() * value.mean() + ((pi - a) ** 2).mean()
    adam_step(loss, ("actor",))
    for key in [k for k in w if "target" in k]:
        own = w[key.replace("_target", "")]
        w[key] = ((1 - args.tau) * w[key] + args.tau * own).detach()
    return w


def test_one_update_is_a_plain_rewrites(float64):
    torch.manual_seed(0)
    args = D.Args(batch_size=3, std_steps=10, device="cpu")
    agent = D.DrQBC(args, 2)
    agent.step.fill_(5.0)  # std is 0.55
    with torch.no_grad():  # not the initial ones, whose biases are 0 and whose targets are equal
        for p in agent.parameters():
            p.add_(0.05 * torch.randn_like(p) / p.shape[-1] ** 0.5)
    s, s_next = torch.randint(0, 256, (2, 3, 9, 84, 84), dtype=torch.uint8)
    batch = s, torch.rand(3, 2) * 2 - 1, torch.rand(3), 0.97 * torch.ones(3), s_next
    before = {key: p.detach().clone() for key, p in agent.named_parameters()}
    torch.manual_seed(1)
    D.update(agent, D.make_optimizers(agent, args), lambda: batch)
    torch.manual_seed(1)
    noise = torch.randn(3, 2), torch.randn(3, 2)
    expected = plain_update(before, batch, noise, args, std=0.55)
    for key, p in agent.named_parameters():
        assert (p - expected[key]).abs().max() < 1e-10, key
        assert (p - before[key]).abs().max() > 1e-6, key
    assert agent.step == 6


def test_files_that_are_no_vd4rl_end_in_a_line(tmp_path):
    def message(**changes):
        (tmp_path / "a.npz").unlink(missing_ok=True)
        np.savez(tmp_path / "a.npz", **{**make_rows([4, 3]), **changes})
        with pytest.raises(SystemExit) as error:
            D.read_frames(tmp_path)
        return str(error.value)

    with pytest.raises(SystemExit, match="no folder with .hdf5 files of V-D4RL"):
        D.read_frames(tmp_path)
    assert "not uint8 images of 3 x 84 x 84" in message(observation=np.zeros((7, 3, 64, 64)))
    assert "holds NaN" in message(reward=np.full(7, np.nan))
    assert "begins within an episode" in message(step_type=np.ones(7))
    assert "not uint8 images" in message(reward=np.zeros(6))
    assert "not uint8 images" in message(reward=np.zeros((7, 1)))
    assert "a.npz: no file of V-D4RL" in message(
        **{key: x[:0] for key, x in make_rows([3]).items()}
    )
    (tmp_path / "a.hdf5").write_text("no file of HDF5")
    assert "a.hdf5: no file of V-D4RL" in message()


def test_no_renderer_ends_in_a_line(tmp_path):
    np.savez(tmp_path / "a.npz", **make_rows([6, 6], act_dim=6))
    flags = ["--data", tmp_path, "--task", "walker_walk", "--batch-size", 2, "--train-steps", 1]
    environment = os.environ | {"MUJOCO_GL": "nonsense"}
    script = ROOT / "baselines/drqbc.py"
    result = run(script, *flags, cwd=tmp_path, ok=False, env=environment)
    assert "cannot render walker_walk, MUJOCO_GL=nonsense; on Debian: apt install" in result.stderr
    result = run(script, *flags, "--eval-episodes", 0, cwd=tmp_path, env=environment)
    assert result.stdout.splitlines()[-1] == f"{tmp_path} | drqbc | not evaluated over 1 seed"


def test_flags_that_do_not_go_together_end_in_a_line():
    for flags in ({}, {"data": "a", "aug": "b"}, {"encode": "a"}, {"finetune": "a"}):
        with pytest.raises(SystemExit, match="give --data; --encode and --out; or --finetune"):
            D.main(D.Args(**flags, device="cpu"))
    with pytest.raises(SystemExit, match="names no task"):
        D.main(D.Args(data="a", device="cpu"))


def test_an_evaluation_sees_the_states_of_the_dataset_and_its_rewards(walker, vd4rl):
    """An agent that repeats the recorded actions from the same state meets the same frames."""
    data, seen = D.read_frames(vd4rl), []
    actions = iter(data["action"][1:21])

    class Recorded:
        def encode(self, s):
            seen.append(s)
            return s

        def policy(self, x):
            return next(actions)[None]

    args = D.Args(eval_episodes=1, seed=0, device="cpu")  # the seed of the recording
    (total,) = D.evaluate(Recorded(), walker, args)
    assert total == pytest.approx(data["reward"][:21].sum().item(), rel=1e-3)
    rows = D.stack(torch.arange(20), torch.zeros(20, dtype=torch.long))
    assert torch.equal(torch.cat(seen), data["observation"][rows].flatten(1, 2))


def test_an_agent_on_latents_is_the_one_on_their_images():
    agent = D.DrQBC(D.Args(), 2)
    s, a = torch.randint(0, 256, (5, 9, 84, 84), dtype=torch.uint8), torch.rand(5, 2)
    with torch.no_grad():
        x, z = agent.encode(s), agent.encode(agent.latents(s))
        torch.testing.assert_close(agent.policy(x), agent.policy(z))
        torch.testing.assert_close(agent.q(x, a, agent.critic), agent.q(z, a, agent.critic))


def test_images_latents_generated_latents_and_fine_tuning(vd4rl, walker, tmp_path, monkeypatch):
    """The README's five commands, tiny; a run that died goes on to the same bits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(D, "make_env", lambda *x: walker)
    D.main(D.Args(**TINY, data=str(vd4rl), out="runs/a"))
    evaluate, calls = D.evaluate, []
    monkeypatch.setattr(
        D, "evaluate", lambda *x: calls.append(1) or evaluate(*x) * (1 // (len(calls) < 2))
    )
    with pytest.raises(ZeroDivisionError):  # dies at update 4, after the checkpoint of update 2
        D.main(D.Args(**TINY, data=str(vd4rl), out="runs/b"))
    monkeypatch.setattr(D, "evaluate", evaluate)
    assert torch.load("runs/b/checkpoint.pt", weights_only=True)["step"] == 2
    D.main(D.Args(**TINY, data=str(vd4rl), out="runs/b"))
    a, b = (torch.load(f"runs/{x}/checkpoint.pt", weights_only=True) for x in "ab")
    torch.testing.assert_close(a["agents"], b["agents"], rtol=0, atol=0)
    assert a["evals"] == b["evals"] and [row[0] for row in a["evals"]] == [2, 4]

    D.main(D.Args(encode="runs/a", out="latents", device="cpu"))
    _, agent = D.load_agent("runs/a", D.Args(device="cpu"))
    frames = torch.from_numpy(np.load(vd4rl / "b.npz")["observation"])
    states = torch.stack(
        [frames[[max(0, t - 2), max(0, t - 1), t]].flatten(0, 1) for t in range(21)]
    )
    (*_, episode) = D.minari.MinariDataset("latents/data")
    with torch.no_grad():
        np.testing.assert_allclose(episode.observations, agent.latents(states), atol=1e-5)
    assert episode.truncations.tolist() == [False] * 19 + [True] and not episode.terminations.any()
    np.testing.assert_allclose(episode.rewards, np.load(vd4rl / "b.npz")["reward"][1:], rtol=1e-6)
    D.main(D.Args(encode="runs/a", out="latents", device="cpu"))  # is finished

    run(ROOT / "gta_diffusion.py", "--env", "latents", *TINY_A, cwd=tmp_path)
    run(ROOT / "gta_augment.py", *TINY_B, "--reweight-bins", 5, cwd=tmp_path)
    own = {**TINY, "finetune": "runs/a", "aug": "buffer.npz"}
    args, expected = D.Args(**{**own, "batch_size": 4000}), []
    for e in D.minari.MinariDataset("latents/data"):
        expected += zip(e.observations, e.actions, e.rewards, e.observations[1:])
    with np.load("buffer.npz") as file:
        for z, *rest in zip(*(file[key] for key in ("observations", "actions", "rewards"))):
            expected += zip(z, *rest, z[1:])
    own_batch = D.draw_latents(agent, "walker_walk", args)[0]()
    drawn = [np.concatenate([np.ravel(x) for x in row]) for row in zip(*own_batch)]
    rows = [np.concatenate([z, a, [r, 0.99], z_next]) for z, a, r, z_next in expected]
    assert len(rows) == 60 + 280 and {x.tobytes() for x in drawn} == {
        np.float32(x).tobytes() for x in rows
    }
    D.main(D.Args(**own, out="runs/c"))
    c = torch.load("runs/c/checkpoint.pt", weights_only=True)["agents"]
    for key, x in a["agents"].items():
        moves = not re.match(r"encoder|actor\.0|critic\.0", key)  # the targets' trunk does, unused
        assert torch.equal(x, c[key]) != moves, key
    config = json.loads((tmp_path / "runs/c/config.json").read_text())
    assert config["aug_label"].startswith("latents, gta(mu 0.5, alpha 1.3, ")
    D.main(D.Args(**{**own, "aug": None}, data="latents", out="runs/control"))
    config = json.loads((tmp_path / "runs/control/config.json").read_text())
    assert config["aug_label"] == "latents, none"
    with np.load("buffer.npz") as file:
        metadata = json.loads(str(file["metadata"])) | {"dataset_ids": ["other-latents"]}
        np.savez("other.npz", **{**file, "metadata": json.dumps(metadata)})
    D.main(D.Args(**{**TINY, "train_steps": 2, "seed": 1}, data=str(vd4rl), out="runs/d"))
    for changes, message in (
        ({"finetune": "runs/d"}, "not this run's walker-walk-latents-"),
        ({"finetune": "runs/c"}, "was fine-tuned; give the run on images"),
        ({"aug": None}, "give --data; --encode and --out; or --finetune"),
        (
            {"aug": "other.npz"},
            "other.npz: of .'other-latents.., not of latents, walker-walk-latents-",
        ),
    ):
        with pytest.raises(SystemExit, match=message):
            D.main(D.Args(**{**own, **changes, "out": "runs/e"}))
