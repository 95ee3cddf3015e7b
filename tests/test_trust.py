"""Interrupted, damaged, hostile, repeated: files stay whole and nothing is lost or executed."""

import importlib.metadata
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SAMPLE, TINY_A, TINY_B, TINY_C, run
from learners import LEARNERS
from test_learners import assert_same
from test_scripts import edit_json

import gta_augment
import gta_diffusion
import metrics
import td3bc

TINY = {"gta_diffusion": TINY_A, "gta_augment": TINY_B, **dict.fromkeys(LEARNERS, TINY_C)}


# --- killed ---


def main_quietly(module, args):
    """What a killed process runs."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    torch.set_num_threads(1)
    sys.modules[module].main(args)


@pytest.fixture(scope="module")
def processes():
    """Processes that have imported the scripts already: to start one takes no four seconds."""
    old = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_trust"])
    first = context.Process(target=len, args=("",))  # the next ones find the scripts imported
    first.start()
    first.join()
    yield context
    os.environ.pop("PYTHONPATH")
    if old is not None:
        os.environ["PYTHONPATH"] = old


def start_process(processes, module, args):
    process = processes.Process(target=main_quietly, args=(module, args))
    process.start()
    return process


def kill_at_random_times(processes, module, make_args, check, finish, num_kills, seconds):
    """Starts main again and again and kills it within seconds, num_kills times.

    After every kill check() looks at what is there and returns how far it is; at every end of a
    run, the last one included, finish() compares what it made and removes it.
    """
    rng, kills, progress = random.Random(0), 0, set()
    while kills < num_kills:
        process = start_process(processes, module, make_args())
        process.join(rng.uniform(0, seconds))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            progress.add(check())
        else:
            assert process.exitcode == 0
            finish()
    process = start_process(processes, module, make_args())
    process.join()
    assert process.exitcode == 0
    finish()
    assert len(progress) > 2, "no kill came between two checkpoints"


def test_stage_a_survives_kills_at_any_moment(processes, tmp_path):
    def make_args(out=tmp_path / "killed.pt"):
        flags = {"horizon": 1, "dim": 8, "batch_size": 8, "train_steps": 30, "save_every": 5}
        resume = out.name == "killed.pt"
        return gta_diffusion.Args(env=str(SAMPLE), out=out, resume=resume, device="cpu", **flags)

    def check():
        out = make_args().out
        return gta_diffusion.load_checkpoint(out)["step"] if out.exists() else 0

    started = time.time()
    start_process(processes, "gta_diffusion", make_args(tmp_path / "whole.pt")).join()
    whole, seconds = gta_diffusion.load_checkpoint(tmp_path / "whole.pt"), time.time() - started

    def finish():
        killed = gta_diffusion.load_checkpoint(tmp_path / "killed.pt")
        for key in ("model", "ema", "optimizer", "step", "rng"):
            assert_same(whole[key], killed[key])
        (tmp_path / "killed.pt").unlink()

    kill_at_random_times(processes, "gta_diffusion", make_args, check, finish, 20, seconds)


def test_leftovers_of_killed_runs_go_and_those_of_running_ones_stay(tmp_path):
    for name in ("out.npz.1.tmp", "out.npz.2.tmp", "other.npz.1.tmp"):
        (tmp_path / name).touch()
        if name != "out.npz.2.tmp":
            os.utime(tmp_path / name, (0, time.time() - 4000))
    gta_diffusion.write_atomically(tmp_path / "out.npz", lambda file: file.write(b"new"))
    assert {p.name for p in tmp_path.iterdir()} == {"out.npz", "out.npz.2.tmp", "other.npz.1.tmp"}


def test_a_learner_survives_kills_at_any_moment(processes, tmp_path):
    flags = {"train_steps": 60, "batch_size": 64, "eval_every": 5, "eval_episodes": 1}
    flags |= {"env": str(SAMPLE), "device": "cpu", "num_seeds": 2}

    def make_args():
        """A run until the first evaluation, from then on its continuation."""
        for policy in (tmp_path / "killed").glob("*/policy.pt"):
            return td3bc.Args(resume=policy.parent)
        return td3bc.Args(runs=tmp_path / "killed", **flags)

    def check():
        """All that is there is whole."""
        for path in (tmp_path / "killed").glob("*/config.json"):
            assert json.loads(path.read_text())["train_steps"] == 60
        for path in (tmp_path / "killed").glob("*/evals.csv"):
            assert all(line.count(",") == 3 for line in path.read_text().splitlines())
        for path in (tmp_path / "killed").glob("*/policy.pt"):
            return td3bc.load_policy(path, "--resume")["update"]
        return 0

    started = time.time()
    start_process(processes, "td3bc", td3bc.Args(runs=tmp_path / "whole", **flags)).join()
    (whole,) = (tmp_path / "whole").glob("*/policy.pt")
    seconds = time.time() - started

    def finish():
        (killed,) = (tmp_path / "killed").glob("*/policy.pt")
        one, other = (td3bc.load_policy(path, "--resume") for path in (whole, killed))
        for key in ("weights", "optimizers", "rng", "evals", "update"):
            assert_same(one[key], other[key])
        evals = [(path.parent / "evals.csv").read_bytes() for path in (whole, killed)]
        assert evals[0] == evals[1]
        shutil.rmtree(tmp_path / "killed")

    kill_at_random_times(processes, "td3bc", make_args, check, finish, 15, seconds)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_to_stage_a_saves(number, tmp_path):
    flags = [*TINY_A, "--train-steps", 100_000]
    process = start(ROOT / "gta_diffusion.py", *flags, cwd=tmp_path)
    wait_for_progress(process)
    process.send_signal(number)
    stderr = process.communicate(timeout=60)[1]
    step = gta_diffusion.load_checkpoint(tmp_path / "diffusion.pt")["step"]
    assert process.returncode == 1 and step > 0
    assert stderr.splitlines()[-1] == f"interrupted at step {step}; --resume continues from there"
    assert "Traceback" not in stderr


def test_a_signal_to_stage_b_leaves_what_was_there(pipeline, tmp_path):
    shutil.copy(pipeline[0] / "diffusion.pt", tmp_path)
    (tmp_path / "buffer.npz").write_bytes(b"old")
    flags = [*TINY_B, "--num-transitions", 10**6, "--batch-size", 8, "--overwrite"]
    process = start(ROOT / "gta_augment.py", *flags, cwd=tmp_path)
    wait_for_progress(process)
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert stderr.splitlines()[-1] == "interrupted; buffer.npz was not written"
    assert (tmp_path / "buffer.npz").read_bytes() == b"old"
    assert {p.name for p in tmp_path.iterdir()} == {"buffer.npz", "diffusion.pt"}


def start(script, *flags, cwd):
    command = [sys.executable, str(script), *map(str, flags)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, stdout=pipe, stderr=pipe, text=True)


def wait_for_progress(process):
    """Returns when the progress bar is at work."""
    shown = ""
    while "it/s" not in shown and "traj/s" not in shown or "?" in shown[-40:]:
        shown += process.stderr.read(1)
        assert process.poll() is None, shown


# --- overwriting ---


def test_the_same_commands_again_change_nothing(pipeline, tmp_path):
    for name in ("diffusion.pt", "buffer.npz"):
        shutil.copy(pipeline[0] / name, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for script, flags, name in (
        ("gta_diffusion", TINY_A, "diffusion.pt"),
        ("gta_augment", TINY_B, "buffer.npz"),
    ):
        output = run(ROOT / f"{script}.py", *flags, cwd=tmp_path).stdout
        assert output.splitlines()[-1] == (
            f"{name} is there already, made with these flags; --overwrite makes it anew"
        )
        assert before[name] == (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        run(ROOT / f"{script}.py", *flags, cwd=tmp_path)
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}  # the same bytes


@pytest.mark.parametrize(
    "script, flags, message",
    [
        ("gta_diffusion", [*TINY_A, "--lr", 1e-3], "was trained with --lr 0.0003, not 0.001"),
        ("gta_diffusion", [*TINY_A, "--resume", "--seed", 1], "with --seed 0, not 1"),
        ("gta_diffusion", [*TINY_A, "--resume", "--overwrite"], "exclude each other"),
        ("gta_diffusion", [*TINY_A, "--out", "buffer.npz"], "not a whole checkpoint"),
        ("gta_augment", [*TINY_B, "--alpha", 1.1], "was made with --alpha 1.3, not 1.1"),
        ("gta_augment", [*TINY_B, "--out", "diffusion.pt"], "there is something else, no buffer"),
        (
            "gta_augment",
            [*TINY_B, "--checkpoint", "other.pt"],
            "was made with another model_sha256",
        ),
    ],
)
def test_other_settings_do_not_replace(pipeline, tmp_path, script, flags, message):
    for name in ("diffusion.pt", "buffer.npz"):
        shutil.copy(pipeline[0] / name, tmp_path)
    other = torch.load(tmp_path / "diffusion.pt", weights_only=True)
    next(iter(other["ema"].values())).add_(1e-3)
    torch.save(other, tmp_path / "other.pt")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    stderr = run(ROOT / f"{script}.py", *flags, cwd=tmp_path, code=1).stderr
    assert message in stderr and len(stderr.splitlines()) == 1
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}


def test_an_unfinished_run_is_not_started_anew(pipeline, tmp_path):
    checkpoint = torch.load(pipeline[0] / "diffusion.pt", weights_only=True)
    torch.save({**checkpoint, "step": 4}, tmp_path / "diffusion.pt")
    stderr = run(ROOT / "gta_diffusion.py", *TINY_A, cwd=tmp_path, code=1).stderr
    assert "is at step 4 of 6 of the same run; --resume continues it" in stderr
    torch.save({**checkpoint, "step": 4, "data_sha256": "0"}, tmp_path / "diffusion.pt")
    stderr = run(ROOT / "gta_diffusion.py", *TINY_A, "--resume", cwd=tmp_path, code=1).stderr
    assert "diffusion.pt was trained on other data" in stderr
    stderr = run(ROOT / "gta_augment.py", *TINY_B, cwd=tmp_path, code=1).stderr
    assert "the dataset has changed since its training" in stderr


# --- repeated ---


@pytest.mark.parametrize("name", LEARNERS)
def test_the_same_seed_writes_the_same_bytes(name, tmp_path):
    flags = [*TINY_C, "--env", SAMPLE, "--num-seeds", 2, "--s4rl-sigma", 1e-3]
    files = []
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        run(ROOT / f"{name}.py", *flags, cwd=tmp_path / folder)
        (path,) = (tmp_path / folder / "runs").iterdir()
        files.append({p.name: p.read_bytes() for p in path.iterdir()})
    assert files[0].keys() == {"config.json", "evals.csv", "policy.pt"} and files[0] == files[1]


def test_files_say_how_to_repeat_them(pipeline, dataset):
    """Versions, commit and a hash of the data, beside all flags."""
    folder, _ = pipeline
    checkpoint = torch.load(folder / "diffusion.pt", weights_only=True)
    with np.load(folder / "buffer.npz", allow_pickle=False) as file:
        buffer = json.loads(str(file["metadata"]))
    config = json.loads(next((folder / "runs").glob("*none*/config.json")).read_text())
    for record in (checkpoint, buffer, config):
        assert record["versions"]["torch"] == importlib.metadata.version("torch")
        assert record["versions"]["numpy"] == np.__version__
        assert record["commit"] is None or len(record["commit"].partition("-")[0]) == 40
        assert record["data_sha256"] == gta_diffusion.fingerprint(dataset)
    changed = dataset.episodes[0]._replace(rewards=dataset.episodes[0].rewards + 1e-9)
    other = dataset._replace(episodes=[changed, *dataset.episodes[1:]])
    assert gta_diffusion.fingerprint(other) != checkpoint["data_sha256"]


def test_a_script_outside_of_git_has_no_commit(tmp_path):
    shutil.copy(ROOT / "metrics.py", tmp_path)
    shutil.copy(ROOT / "gta_diffusion.py", tmp_path)
    code = "import gta_diffusion; print(gta_diffusion.provenance()['commit'])"
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert output.stdout.strip() == "None"


# --- hostile ---


class Touch:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def readers(tmp_path):
    """What reads a file that came from elsewhere."""
    for module in LEARNERS.values():
        yield lambda path, module=module: module.read_buffer(path)
        yield lambda path, module=module: module.load_policy(path, "--load")
    yield metrics.read_buffer
    yield gta_diffusion.load_checkpoint
    yield gta_augment.load_checkpoint
    args = gta_augment.Args
    yield lambda path: gta_augment.is_there(args(out=path), {})


def test_no_reader_runs_a_pickle(tmp_path):
    trap = tmp_path / "trap"
    torch.save({"format": Touch(trap)}, tmp_path / "tensors")
    (tmp_path / "pickle").write_bytes(pickle.dumps(Touch(trap)))
    with open(tmp_path / "arrays", "wb") as file:
        np.savez(file, metadata=np.array([Touch(trap)], object), actions=[Touch(trap)])
    names = ("tensors", "pickle", "arrays")
    for name in names:
        for read in readers(tmp_path):
            with pytest.raises(SystemExit, match="error: ") as error:
                read(tmp_path / name)
            assert "\n" not in str(error.value)
    assert not trap.exists()
    # the trap works
    torch.load(tmp_path / "tensors", weights_only=False)
    assert trap.exists()


@pytest.mark.parametrize("key", ["env_spec", "eval_env_spec"])
@pytest.mark.parametrize("where", ["entry_point", "additional_wrappers", "id", "kwargs"])
def test_a_dataset_cannot_name_code_to_run(where, key, tmp_path):
    """Its metadata holds import paths, which gymnasium.make would call."""
    shutil.copytree(SAMPLE, tmp_path / "data")
    metadata = tmp_path / "data" / "data" / "metadata.json"
    spec = json.loads(json.loads(metadata.read_text())[key])
    trap = tmp_path / "trap"
    if where == "entry_point":
        spec |= {"entry_point": "pathlib:Path.touch", "kwargs": {}}
    elif where == "additional_wrappers":
        wrapper = {"name": "Trap", "entry_point": "os:mkdir", "kwargs": {"path": str(trap)}}
        spec["additional_wrappers"] = [wrapper]
    else:
        (tmp_path / "trap_module.py").write_text(f"open({str(trap)!r}, 'w')")
        (spec if where == "id" else spec["kwargs"])["id"] = "trap_module:Hopper-v5"
    edit_json(metadata, **{key: json.dumps(spec)})
    flags = [*TINY_C, "--env", tmp_path / "data", "--runs", tmp_path / "runs"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, ROOT / "td3bc.py", *flags]
    result = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True
    )
    # not looked at: the entry point, an id among the arguments, and by a learner env_spec
    harmless = where in ("entry_point", "kwargs") or key == "env_spec"
    assert result.returncode == (0 if harmless else 1), result.stderr
    assert harmless or len(result.stderr.splitlines()) == 1
    assert not trap.exists()


# --- full disk, no memory, no number ---


def run_with_little_disk(script, *flags, cwd, size):
    """Runs a script that cannot write files larger than size bytes."""
    command = [sys.executable, str(script), *map(str, flags)]
    return subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )


@pytest.mark.parametrize("script", TINY)
def test_a_full_disk_leaves_what_was_there(script, pipeline, tmp_path):
    shutil.copy(pipeline[0] / "diffusion.pt", tmp_path)
    out, flags = {
        "gta_diffusion": ("other.pt", ["--out", "other.pt"]),
        "gta_augment": ("other.npz", ["--out", "other.npz"]),
    }.get(script, ("policy.pt", []))
    (tmp_path / out).write_bytes(b"old")
    flags = [*TINY[script], *flags, *["--overwrite"] * (script not in LEARNERS)]
    result = run_with_little_disk(ROOT / f"{script}.py", *flags, cwd=tmp_path, size=8000)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")
    reason = r"\[Errno 27\] File too large|is the disk full\?"
    assert re.search(rf"{out}: cannot be written \(({reason})\)$", result.stderr.rstrip())
    assert (tmp_path / out).read_bytes() == b"old"
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("runs/*/policy.pt"))


def test_a_full_disk_leaves_the_old_metrics(pipeline, tmp_path):
    (tmp_path / "metrics.json").write_bytes(b"old")
    flags = ["--aug", pipeline[0] / "buffer.npz", "--env", SAMPLE, "--num-transitions", 50]
    result = run_with_little_disk(ROOT / "metrics.py", *flags, cwd=tmp_path, size=100)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "error: metrics.json: cannot be written ([Errno 27]" in result.stderr.splitlines()[-1]
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"metrics.json": b"old"}


def test_a_full_tmpfs(pipeline, tmp_path):
    """The real thing, where a user may mount one: the second checkpoint finds no room."""
    script = f"""
        mount -t tmpfs -o size=100m none {tmp_path} &&
        {sys.executable} {ROOT / "gta_diffusion.py"} {" ".join(map(str, TINY_A))} --save-every 3
            --out {tmp_path / "diffusion.pt"}; echo code $?; ls -l {tmp_path}"""
    command = ["unshare", "-rm", "sh", "-c", " ".join(script.split())]
    if (
        shutil.which("unshare") is None
        or "mount"
        in subprocess.run(
            ["unshare", "-rm", "mount", "-t", "tmpfs", "none", tmp_path],
            capture_output=True,
            text=True,
        ).stderr
    ):
        pytest.skip("no user namespaces here")
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert "code 1" in result.stdout and result.stdout.rstrip().endswith("diffusion.pt")
    assert "No space left on device" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_a_place_that_cannot_be_written_is_noticed_before_the_work(pipeline, tmp_path):
    shutil.copy(pipeline[0] / "diffusion.pt", tmp_path)
    (tmp_path / "file").write_text("no folder")
    for script, flag in {"gta_diffusion": "--out", "gta_augment": "--out"}.items():
        for path in ("none/x", "file/x", "/proc/x", "."):
            result = run(ROOT / f"{script}.py", *TINY[script], flag, path, cwd=tmp_path, code=1)
            assert result.stderr.startswith(f"error: --out {path}: ")
            assert len(result.stderr.splitlines()) == 1 and not result.stdout
    for path in ("file", "/proc/x"):
        result = run(ROOT / "td3bc.py", *TINY_C, "--runs", path, cwd=tmp_path, code=1)
        assert f"error: --runs {path}: cannot be written" in result.stderr


@pytest.mark.parametrize("script", TINY)
def test_too_large_a_batch_is_one_line(script, pipeline, tmp_path):
    shutil.copy(pipeline[0] / "diffusion.pt", tmp_path)
    flags = [*TINY[script], "--batch-size", 10**11, *["--out", "x"] * (script not in LEARNERS)]
    if script == "gta_augment":  # its batch is no larger than what it makes
        flags += ["--num-transitions", 10**8]
        limit = 6 * 2**30
    else:
        limit = resource.RLIM_INFINITY
    command = [sys.executable, ROOT / f"{script}.py", *flags]
    result = subprocess.run(
        list(map(str, command)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 1 and last.startswith("error: out of memory; lower --batch-size or")
    assert "Traceback" not in result.stderr


def test_a_loss_that_is_no_number_stops_stage_a(tmp_path):
    """lr 1e6 throws the weights out of what float32 holds; the last good checkpoint stays."""
    flags = [*TINY_A, "--train-steps", 400, "--save-every", 1, "--lr", 1e11]
    stderr = run(ROOT / "gta_diffusion.py", *flags, cwd=tmp_path, code=1).stderr
    assert "the weights are no longer finite; diffusion.pt keeps the last checkpoint" in stderr
    checkpoint = gta_diffusion.load_checkpoint(tmp_path / "diffusion.pt")
    assert all(p.isfinite().all() for p in checkpoint["model"].values())
    flags = [*TINY_A, "--train-steps", 400, "--lr", 1e11, "--out", "other.pt"]
    stderr = run(ROOT / "gta_diffusion.py", *flags, cwd=tmp_path, code=1).stderr
    assert "error: step 100: the loss is nan; other.pt keeps" in stderr
    assert not (tmp_path / "other.pt").exists()


@pytest.mark.parametrize("name", LEARNERS)
def test_a_loss_that_is_no_number_stops_a_learner(name, tmp_path):
    wild = ["--return-scale", 1e11, "--lr", 1e11] if name == "dt" else ["--lr", 1e11]
    flags = [*TINY_C, "--env", SAMPLE, "--train-steps", 40, "--eval-every", 20, *wild]
    result = run(ROOT / f"{name}.py", *flags, cwd=tmp_path, code=1)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: update ") and "is no longer finite; runs/" in last
    for policy in tmp_path.glob("runs/*/policy.pt"):
        for params in torch.load(policy, weights_only=True)["weights"].values():
            assert all(p.isfinite().all() for p in params.values())


# --- odd data ---


def with_data(tmp_path, change):
    """A copy of the bundled dataset whose episodes are changed in place by change(h5 group)."""
    import h5py

    shutil.copytree(SAMPLE, tmp_path / "changed")
    with h5py.File(tmp_path / "changed" / "data" / "main_data.hdf5", "r+") as file:
        change(file)
    return tmp_path / "changed"


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("key", ["observations", "actions", "rewards"])
def test_data_that_is_no_number_is_one_line(key, value, tmp_path):
    def change(file):
        file["episode_3"][key][2] = value

    folder = with_data(tmp_path, change)
    for module in (gta_diffusion, *LEARNERS.values()):
        with pytest.raises(SystemExit, match="episode 3 holds NaN or infinite numbers") as error:
            module.load_dataset(str(folder))
        assert "\n" not in str(error.value)


def test_an_episode_that_lacks_a_step_is_one_line(tmp_path):
    def change(file):
        rewards = file["episode_3"]["rewards"][:-1]
        del file["episode_3"]["rewards"]
        file["episode_3"]["rewards"] = rewards

    with pytest.raises(SystemExit, match="episode 3 is not whole") as error:
        gta_diffusion.load_dataset(str(with_data(tmp_path, change)))
    assert "\n" not in str(error.value)


def test_constant_dimensions_work(tmp_path):
    """A state, an action and the reward that never change: A, B, a learner and metrics run."""

    def change(file):
        for name in file:
            observations, actions = (file[name][key] for key in ("observations", "actions"))
            observations[:, 4] = 0.7
            actions[:, 1] = 0.0
            file[name]["rewards"][:] = 1.0

    env = ["--env", with_data(tmp_path, change)]
    run(ROOT / "gta_diffusion.py", *TINY_A, *env, cwd=tmp_path)
    run(ROOT / "gta_augment.py", *TINY_B, cwd=tmp_path)
    with np.load(tmp_path / "buffer.npz", allow_pickle=False) as file:
        assert all(np.isfinite(file[key]).all() for key in ("observations", "actions", "rewards"))
        np.testing.assert_allclose(file["observations"][:, :, 4], 0.7, atol=1e-3)
    run(ROOT / "td3bc.py", *TINY_C, "--aug", "buffer.npz", cwd=tmp_path)
    run(ROOT / "metrics.py", "--aug", "buffer.npz", cwd=tmp_path)


def test_a_flipped_bit_is_noticed(pipeline, tmp_path):
    """Anywhere in the weights: PyTorch's own reader would take it for a number."""
    policy = next((pipeline[0] / "runs").glob("*/policy.pt"))
    for source, read in (
        (pipeline[0] / "diffusion.pt", gta_augment.load_checkpoint),
        (policy, lambda path: td3bc.load_policy(path, "--load")),
        (pipeline[0] / "buffer.npz", td3bc.read_buffer),
    ):
        content = bytearray(source.read_bytes())
        with zipfile.ZipFile(source) as file:
            member = max(file.infolist(), key=lambda member: member.file_size)
        start = content.index(member.filename.encode()) + 100  # behind its header
        content[start + member.file_size // 2] ^= 1
        (tmp_path / source.name).write_bytes(content)
        with pytest.raises(SystemExit, match="not a whole") as error:
            read(tmp_path / source.name)
        assert "\n" not in str(error.value)
        read(source)
