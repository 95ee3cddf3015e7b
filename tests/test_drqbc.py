"""baselines/drqbc.py: V-D4RL's frames, one update, latents, fine-tuning on a buffer of them."""

import json
import os
import re
import resource

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_A, TINY_B, call, message, read_checkpoint, run
from torch import nn

import drqbc as D

TINY = {"batch_size": 4, "train_steps": 4, "eval_every": 2, "eval_episodes": 1, "device": "cpu"}


def make_rows(lengths, act_dim=2):
    """Returns random episodes in V-D4RL's layout."""
    rng = np.random.default_rng(0)
    R = sum(lengths)
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
    rng = np.random.default_rng(0)
    episodes = []
    for _ in range(3):
        walker.reset()
        rows = [(D.take_frame(walker), np.zeros(6), 0.0, 1.0, 0)]
        for t in range(20):
            a = np.float32(rng.uniform(-1, 1, 6))
            r = walker.step(a).reward + walker.step(a).reward
            rows.append((D.take_frame(walker), a, r, 1.0, 2 if t == 19 else 1))
        episodes.append({key: np.array(x) for key, x in zip(D.Frames._fields, zip(*rows))})
    with h5py.File(folder / "a.hdf5", "w") as file:
        for key in D.Frames._fields:
            file[key] = np.concatenate([episodes[0][key], episodes[1][key]])
    np.savez(folder / "b.npz", **episodes[2])
    return folder


@pytest.mark.parametrize("n_step", [1, 3])
def test_states_are_three_frames_and_rewards_are_of_n_steps(n_step):
    rows = make_rows([7, 5, 4])
    expected = []
    for first, end in ((0, 7), (7, 12), (12, 16)):
        shown = [first, first, *range(first, end)]
        states = [shown[t : t + 3] for t in range(end - first)]
        for t in range(end - first - n_step):  # s_t, a_t leads to row t + 1
            k = [first + t + 1 + j for j in range(n_step)]
            r = sum(0.9**j * rows["reward"][i] for j, i in enumerate(k))
            counts = 0.9**n_step * rows["discount"][k[-1]]
            expected.append((states[t], rows["action"][k[0]], r, counts, states[t + n_step]))
    frames = D.Frames(**{key: torch.tensor(x) for key, x in rows.items()})
    for x, y in zip(D.n_step_transitions(frames, n_step, 0.9), zip(*expected)):
        np.testing.assert_allclose(x, np.array(y), rtol=1e-6)

    args = D.Train(data="", n_step=n_step, discount=0.9, batch_size=200, device="cpu")
    s, a, _, _, s_next = D.make_image_sampler(frames, args)()
    for images, place in ((s, 0), (s_next, 4)):
        for image, action in zip(images[:20], a):
            (source,) = (e for e in expected if (e[1] == action.numpy()).all())
            frame = torch.from_numpy(rows["observation"][source[place]].reshape(9, 84, 84))
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

    x = see(s)
    with torch.no_grad():
        x_next = see(s_next)
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
    def error(**changes):
        (tmp_path / "a.npz").unlink(missing_ok=True)
        np.savez(tmp_path / "a.npz", **{**make_rows([4, 3]), **changes})
        return message(D.read_frames, tmp_path)

    assert "no folder with .hdf5 files of V-D4RL" in message(D.read_frames, tmp_path)
    assert "not uint8 images of 3 x 84 x 84" in error(observation=np.zeros((7, 3, 64, 64)))
    assert "holds NaN" in error(reward=np.full(7, np.nan))
    assert "begins within an episode" in error(step_type=np.ones(7))
    assert "not uint8 images" in error(reward=np.zeros(6))
    assert "not uint8 images" in error(reward=np.zeros((7, 1)))
    assert "not uint8 images" in error(**{key: x[:0] for key, x in make_rows([3]).items()})
    assert "a.npz: no file of V-D4RL" in error(reward=np.full(7, "many"))
    (tmp_path / "a.hdf5").write_text("no file of HDF5")
    assert "a.hdf5: no file of V-D4RL" in error()


def test_without_a_renderer_it_says_so_or_trains_without(tmp_path):
    np.savez(tmp_path / "a.npz", **make_rows([6, 6], act_dim=6))
    flags = ["--data", tmp_path, "--task", "walker_walk", "--batch-size", 2, "--train-steps", 1]
    environment = os.environ | {"MUJOCO_GL": "nonsense"}
    script = ROOT / "baselines/drqbc.py"
    result = run(script, "train", *flags, cwd=tmp_path, ok=False, env=environment)
    assert "cannot render walker_walk, MUJOCO_GL=nonsense; on Debian: apt install" in result.stderr
    flags += ["--eval-episodes", 0, "--out", tmp_path / "run"]
    result = run(script, "train", *flags, cwd=tmp_path, env=environment)
    assert result.stdout.splitlines()[-1] == f"{tmp_path} | drqbc | none | not evaluated"
    agent = D.load_agents(tmp_path / "run/checkpoint.pt")
    assert agent.step == 1 and agent.act(torch.zeros(5, 9, 84, 84)).shape == (5, 6)


def test_flags_that_do_not_go_together_end_in_a_line(tmp_path):
    assert "finetune needs --aug" in message(D.main, D.Finetune(run="a", device="cpu"))
    assert "names no task" in message(D.main, D.Train(data="a", device="cpu"))
    assert "--data is empty" in message(D.main, D.Train(data="", device="cpu"))
    assert "--aug is empty" in message(D.main, D.Finetune(run="a", aug="", device="cpu"))
    assert "no run of drqbc.py" in message(D.main, D.Finetune(run="a", aug="b", device="cpu"))
    (tmp_path / "file").touch()
    place = str(tmp_path / "file" / "latents")  # tried before --run, which is not there
    assert "cannot be written" in message(D.main, D.Encode(run="a", out=place, device="cpu"))


def test_an_evaluation_sees_the_states_of_the_dataset_and_its_rewards(walker, vd4rl):
    """An agent that repeats the recorded actions from the same state meets the same frames."""
    frames = D.read_frames(vd4rl)
    actions = iter(frames.action[1:21])
    seen = []

    class Recorded:
        def act(self, s):
            seen.append(s)
            return next(actions)[None]

    args = D.Args(eval_episodes=1, seed=0, device="cpu")  # the seed of the recording
    (total,), (score,) = D.evaluate(Recorded(), walker, args)
    assert total == pytest.approx(frames.reward[:21].sum().item(), rel=1e-3)
    assert score == total / 10
    rows = D.stack(torch.arange(20), torch.zeros(20, dtype=torch.long))
    assert torch.equal(torch.cat(seen), frames.observation[rows].flatten(1, 2))


def test_an_agent_on_latents_is_the_one_on_their_images():
    agent = D.DrQBC(D.Args(), 2)
    s = torch.randint(0, 256, (5, 9, 84, 84), dtype=torch.uint8)
    a = torch.rand(5, 2)
    with torch.no_grad():
        x = agent.encode(s)
        z = agent.encode(agent.latents(s))
        torch.testing.assert_close(agent.act(s), agent.policy(z))
        torch.testing.assert_close(agent.q(x, a, agent.critic), agent.q(z, a, agent.critic))


@pytest.fixture(scope="module")
def chain(vd4rl, walker, tmp_path_factory):
    """The README's five commands, tiny. The tests that follow run in their folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("chain"))
        patch.setattr(D, "make_env", lambda *x: walker)
        D.main(D.Train(**TINY, data=str(vd4rl), out="runs/a"))
        D.main(D.Encode(run="runs/a", out="latents", device="cpu"))
        call(ROOT / "gta_diffusion.py", "--env", "latents", *TINY_A, cwd=".")
        call(ROOT / "gta_augment.py", *TINY_B, "--reweight-bins", 5, cwd=".")
        D.main(D.Finetune(**TINY, run="runs/a", aug="buffer.npz", out="runs/c"))
        yield


def test_a_run_that_died_or_was_short_goes_on_to_the_same_bits(chain, vd4rl, monkeypatch):
    flags = {**TINY, "data": str(vd4rl), "out": "runs/b"}
    D.main(D.Train(**{**flags, "train_steps": 2}))
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(D, "evaluate", None)  # dies at update 4
        D.main(D.Train(**flags))
    assert read_checkpoint("runs/b")["step"] == 2
    D.main(D.Train(**flags))
    a = read_checkpoint("runs/a")
    b = read_checkpoint("runs/b")
    torch.testing.assert_close(a["agents"], b["agents"], rtol=0, atol=0)
    assert a["evals"] == b["evals"] and [row[0] for row in a["evals"]] == [2, 4]
    assert "was made with n_step 3" in message(D.main, D.Train(**flags, n_step=1))
    frames = D.read_frames(vd4rl)
    frames.observation[-1, 0, 0, 0] += 1
    monkeypatch.setattr(D, "read_frames", lambda folder: frames)
    assert "was made with dataset_crc" in message(D.main, D.Train(**flags))


def test_latents_are_what_the_trunks_see_of_the_frames(chain, vd4rl, tmp_path, capsys):
    agent = D.load_agents("runs/a/checkpoint.pt")
    frames = torch.from_numpy(np.load(vd4rl / "b.npz")["observation"])
    rows = [[max(0, t - 2), max(0, t - 1), t] for t in range(21)]
    states = torch.stack([frames[row].flatten(0, 1) for row in rows])
    (*_, episode) = D.minari.MinariDataset("latents/data")
    np.testing.assert_allclose(episode.observations, agent.latents(states), atol=1e-5)
    assert episode.truncations.tolist() == [False] * 19 + [True] and not episode.terminations.any()
    np.testing.assert_allclose(episode.rewards, np.load(vd4rl / "b.npz")["reward"][1:], rtol=1e-6)
    D.main(D.Encode(run="runs/a", out="latents", device="cpu"))
    assert "is finished, walker-walk-latents-" in capsys.readouterr().out
    flags = D.Encode(run="runs/c", out="latents", device="cpu")
    assert "no run of drqbc.py on images (it was fine-tuned)" in message(D.main, flags)
    flags = D.Encode(run="runs/a", out="runs", device="cpu")
    assert "holds no latents" in message(D.main, flags)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))  # as a disk that is full
    flags = D.Encode(run="runs/a", out=str(tmp_path / "new"), device="cpu")
    assert "new cannot be written ([Errno 27] File too large)" in message(D.main, flags)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_fine_tuning_moves_the_heads_on_real_and_generated_transitions(chain, vd4rl):
    expected = []
    for e in D.minari.MinariDataset("latents/data"):
        expected += zip(e.observations, e.actions, e.rewards, e.observations[1:])
    buffer = D.read_buffer("buffer.npz")
    for z, a, r in zip(buffer.observations, buffer.actions, buffer.rewards):
        expected += zip(z, a, r, z[1:])
    _, episodes = D.read_latents("latents")
    args = D.Finetune(run="", **{**TINY, "batch_size": 4000})
    batch = D.make_latent_sampler(episodes, buffer, args)()
    drawn = {np.concatenate([np.ravel(x) for x in row]).tobytes() for row in zip(*batch)}
    rows = [np.concatenate([z, a, [r, 0.99], z_next]) for z, a, r, z_next in expected]
    assert len(rows) == 60 + 280 and drawn == {np.float32(x).tobytes() for x in rows}

    before = read_checkpoint("runs/a")["agents"]
    after = read_checkpoint("runs/c")["agents"]
    for key, x in before.items():
        moves = not re.match(r"encoder|actor\.0|critic\.0", key)  # the targets' trunk does, unused
        assert torch.equal(x, after[key]) != moves, key
    D.main(D.Finetune(**TINY, run="runs/a", data="latents", out="runs/control"))
    gta, control = (json.load(open(f"runs/{name}/config.json")) for name in ("c", "control"))
    assert gta["aug_label"].startswith("latents, gta(mu 0.5, alpha 1.3, ")
    assert control["aug_label"] == "latents, none"
    assert gta["env"] == str(vd4rl) and gta["num_seeds"] == 1  # for metrics.py
    assert gta.keys() - control.keys() == {"buffer_crc"}
    for key in ("model_crc", "dataset_ids", "dataset_crc"):
        assert gta[key] == control[key]


def test_fine_tuning_on_what_is_not_its_own_ends_in_a_line(chain, vd4rl):
    arrays = dict(np.load("buffer.npz"))
    metadata = json.loads(str(arrays["metadata"]))
    for key in ("dataset_ids", "dataset_crc"):
        np.savez(key, **{**arrays, "metadata": json.dumps({**metadata, key: 1})})
    D.main(D.Train(**{**TINY, "train_steps": 1, "seed": 1}, data=str(vd4rl), out="runs/d"))
    flags = D.Encode(run="runs/d", out="latents", device="cpu")
    assert "latents was made with dataset_id walker-walk-" in message(D.main, flags)
    for changes, error in (
        ({"run": "runs/d"}, "not this run's walker-walk-latents-"),
        ({"data": str(vd4rl)}, "no folder that encode has written"),
        ({"aug": "dataset_ids.npz"}, "was made from dataset_ids 1, not from ['walker-walk-latents"),
        ({"aug": "dataset_crc.npz"}, "was made from dataset_crc 1, not from"),
    ):
        flags = {"run": "runs/a", "aug": "buffer.npz", "out": "runs/e", **changes}
        assert error in message(D.main, D.Finetune(**TINY, **flags))
