"""--device cuda without a GPU: a graph replays what the updates do, with and without a kill, and no
operand lies on the CPU. Planted mistakes show that each check can fail."""

import copy
import importlib
import json

import numpy as np
import pytest
import torch
from conftest import HOPPER
from graph_on_cpu import Graph, tensors_in
from pretend_cuda import Wrong, pretend_cuda

import drqbc
import gta_augment
import gta_diffusion
import metrics
import synther
import td3bc

pytestmark = pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")

NINE = {"train_steps": 9, "eval_every": 5, "lr": 1e-5}  # three calls as they are, six replays
NINE_PAIRS = {**NINE, "train_steps": 18, "eval_every": 10}  # TD3+BC has two updates in a call
AGENTS = {"env": HOPPER, "batch_size": 8, "num_seeds": 2}
SIZES = {"env": HOPPER, "horizon": 7, "dim": 8, "batch_size": 8}


class Killed(Exception):
    pass


def train(script, args, out):
    """Runs a script on the pretended device. Returns its checkpoint."""
    args = copy.copy(args)
    args.device = "cuda"
    args.out = str(out)
    with pretend_cuda():
        script.main(args)
    return torch.load(out / "checkpoint.pt" if out.is_dir() else out, map_location="cpu")


def train_with_a_kill(script, args, out):
    """Kills a run when it writes its second checkpoint, and goes on from its first."""
    save = torch.save
    paths = []

    def dying_save(values, path):
        paths.append(path)
        if len(paths) == 2:
            raise Killed
        save(values, path)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(torch, "save", dying_save)
        train(script, args, out)
    return train(script, args, out)


def count_updates(checkpoint):
    """Returns how many steps Adam has counted, in the device's memory."""
    optimizers = checkpoint.get("optimizers") or {"adam": checkpoint["optimizer"]}
    states = [state for adam in optimizers.values() for state in adam["state"].values()]
    return max(state["step"].item() for state in states)


def assert_same(first, second):
    """Asserts that the tensors of two checkpoints are the same, to the bit, and the returns."""
    for x, y in zip(tensors_in(first), tensors_in(second), strict=True):
        assert torch.equal(x, y)
    assert first.get("evals") == second.get("evals")


def check(script, args, folder):
    """Asserts that a graph does what its updates do, as often as asked, and that a kill between
    two replays changes nothing."""
    recorded = train(script, args, folder / "recorded")
    assert count_updates(recorded) == args.train_steps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "record", lambda function: function)
        eager = train(script, args, folder / "eager")
    assert_same(recorded, eager)
    assert_same(recorded, train_with_a_kill(script, args, folder / "killed"))


# --- all scripts ---


@pytest.mark.parametrize("name", ["td3bc", "iql", "cql", "mcq", "dt"])
def test_a_learner(tmp_path, name):
    script = importlib.import_module(name)
    steps = NINE_PAIRS if name == "td3bc" else NINE
    check(script, script.Args(**AGENTS, **steps, eval_episodes=1), tmp_path)


def test_stage_a(tmp_path, precision=None):
    flags = {**SIZES, "train_steps": 9, "save_every": 5, "lr": 1e-5, "precision": precision}
    check(gta_diffusion, gta_diffusion.Args(**flags), tmp_path)


def assert_as_on_a_cpu(script, folder, **flags):
    """Asserts that the pretended device makes the CPU's buffer.npz, to rounding."""
    buffers = []
    for device in ("cpu", "cuda"):
        (folder / device).mkdir()
        with pytest.MonkeyPatch.context() as patch, pretend_cuda():
            patch.chdir(folder / device)
            script.main(script.Args(**flags, device=device))
        buffers.append(td3bc.read_buffer(folder / device / "buffer.npz"))
    for x, y in zip(buffers[0][1:5], buffers[1][1:5]):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=5e-3)


def test_stage_b(tmp_path):
    path = tmp_path / "diffusion.pt"
    train(gta_diffusion, gta_diffusion.Args(**SIZES, train_steps=1), path)
    flags = {"num_transitions": 140, "num_steps": 4, "mu": 0.5, "precision": "fp32"}
    assert_as_on_a_cpu(gta_augment, tmp_path, checkpoint=str(path), batch_size=8, **flags)


def test_synther(tmp_path):
    flags = {"width": 16, "batch_size": 8, "train_steps": 6, "num_transitions": 50}
    assert_as_on_a_cpu(synther, tmp_path, env=HOPPER, **flags, num_steps=4)


def test_metrics(tmp_path, pipeline):
    reports = []
    for device in ("cpu", "cuda"):
        files = {"aug": (str(pipeline / "buffer.npz"),), "out": str(tmp_path / device)}
        with pretend_cuda():
            metrics.main(metrics.Args(**files, num_transitions=100, device=device))
        reports.append(json.loads((tmp_path / device).read_text())["numbers"])
    for name, numbers in reports[0].items():
        assert numbers == pytest.approx(reports[1][name], abs=1e-6)


def test_images_latents_and_fine_tuning(tmp_path):
    folder = tmp_path / "walker_walk"
    folder.mkdir()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (14, 3, 84, 84), dtype=np.uint8)
    numbers = {"action": rng.uniform(-1, 1, (14, 2)), "reward": rng.random(14)}
    numbers |= {"discount": np.ones(14), "step_type": np.array(2 * [0, 1, 1, 1, 1, 1, 2])}
    np.savez(folder / "a.npz", observation=images, **numbers)
    flags = {**NINE, "batch_size": 2, "eval_episodes": 0}
    check(drqbc, drqbc.Train(data=str(folder), **flags), tmp_path)
    trained = str(tmp_path / "recorded")
    latents = []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        with pretend_cuda():
            drqbc.main(drqbc.Encode(run=trained, out=str(out), device=device))
        latents.append(drqbc.read_latents(out)[1])
    for e, same in zip(*latents, strict=True):
        np.testing.assert_allclose(e.observations, same.observations, atol=1e-2)
    check(drqbc, drqbc.Finetune(run=trained, data=str(out), **flags), tmp_path / "heads")


def test_a_compiled_denoiser_keeps_its_names():
    """Of several GPUs, each compiles its denoiser before DDP wraps it."""
    denoiser = gta_diffusion.Denoiser(horizon=7, obs_dim=2, act_dim=1, dim=8)
    names = list(denoiser.state_dict())
    denoiser.compile(backend="eager")
    x = torch.randn(3, 8, 4)
    denoiser(x, torch.ones(3), torch.ones(3), torch.ones(3))
    assert list(denoiser.state_dict()) == names


# --- planted mistakes ---


ON_TWO_DEVICES = {
    "an operand on the CPU": lambda x, calls: x + torch.ones(1),
    "an index on the CPU": lambda x, calls: x[torch.zeros(1, dtype=torch.long)],
}
NO_PART_OF_A_GRAPH = {
    "item": lambda x, calls: x * x.item(),
    "a branch on data": lambda x, calls: x if x > 0 else -x,
    "a tensor of Python's data": lambda x, calls: x + torch.tensor([1.0], device="cuda"),
    "a boolean mask": lambda x, calls: x[x > 0],
    "a size that depends on data": lambda x, calls: x.nonzero().float(),
    "a copy to the CPU": lambda x, calls: x + x.cpu().sum(),
    "a copy from the CPU": lambda x, calls: x.copy_(torch.ones(1)),
    "work on the CPU": lambda x, calls: x * len(torch.ones(1)),
}
FROZEN = {
    "a count of Python's": lambda x, calls: x * len(calls),
    "a branch on it": lambda x, calls: x if len(calls) % 2 else -x,
    "a tensor of the last call": lambda x, calls: calls[-2:][0],
}


def check_td3bc(folder):
    args = td3bc.Args(env=HOPPER, batch_size=8, **NINE_PAIRS, eval_episodes=0)
    check(td3bc, args, folder)


def plant(patch, mistake):
    """Adds a mistake to TD3+BC's update. Returns the losses of Python's calls."""
    update = td3bc.update
    calls = []

    def wrong_update(agents, optimizers, draw_batch):
        losses = update(agents, optimizers, draw_batch)
        calls.append(losses["critic_loss"].reshape(1).clone())
        agents.scale.mean += mistake(calls[-1], calls).sum()
        return losses

    patch.setattr(td3bc, "update", wrong_update)
    return calls


@pytest.mark.parametrize("name", ON_TWO_DEVICES | NO_PART_OF_A_GRAPH)
def test_what_a_gpu_or_a_graph_cannot_do_is_found(tmp_path, monkeypatch, name):
    calls = plant(monkeypatch, (ON_TWO_DEVICES | NO_PART_OF_A_GRAPH)[name])
    with pytest.raises(Wrong, match="two devices" if name in ON_TWO_DEVICES else "no part"):
        check_td3bc(tmp_path)
    assert len(calls) == (1 if name in ON_TWO_DEVICES else 4)  # the fourth is captured


@pytest.mark.parametrize("name", FROZEN)
def test_what_a_replay_would_freeze_is_found(tmp_path, monkeypatch, name):
    plant(monkeypatch, FROZEN[name])
    with pytest.raises(AssertionError):
        check_td3bc(tmp_path)


def make_adam(parameters, adam=torch.optim.Adam, **options):
    """Makes one that counts its steps on the CPU."""
    return adam(parameters, options["lr"])


def record_after_more_updates(function):
    """Calls the function three times that nobody counts."""
    for _ in range(3):
        function()
    return function


def replay_from_the_second_on(graph, replay=Graph.replay):
    """Takes the capture for an update, which computes nothing."""
    if hasattr(graph, "was_called"):
        replay(graph)
    graph.was_called = True


def seed_once(seed, set_seed=torch.manual_seed):
    """Sets the seed when a run begins, and not after its checkpoints."""
    if seed == 0:
        set_seed(seed)


MISUSES = [
    (torch.optim, "Adam", make_adam, RuntimeError),
    (td3bc, "record", record_after_more_updates, AssertionError),
    (Graph, "replay", replay_from_the_second_on, AssertionError),
    (torch, "manual_seed", seed_once, AssertionError),
]


@pytest.mark.parametrize("module, name, wrong, error", MISUSES)
def test_a_wrong_use_of_the_graph_is_found(tmp_path, monkeypatch, module, name, wrong, error):
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(error):
        check_td3bc(tmp_path)


def add_noise_of_the_cpu(x, sigmas, mu):
    return x + torch.randn(x.shape), sigmas


def test_an_operand_on_the_cpu_is_found_without_a_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(gta_augment, "partial_noise", add_noise_of_the_cpu)
    with pytest.raises(Wrong, match="operands on two devices"):
        test_stage_b(tmp_path)
