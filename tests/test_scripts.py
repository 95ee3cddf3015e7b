"""What holds for every script: alone, identical where it repeats, clear when it fails."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
from conftest import ROOT, SAMPLE, TINY_A, TINY_B, TINY_C, TINY_SYNTHER, run
from minari.data_collector import EpisodeBuffer

import gta_diffusion

SCRIPTS = sorted(ROOT.glob("*.py")) + sorted(ROOT.glob("baselines/*.py"))
PATHS = {path.stem: path for path in SCRIPTS}
NAMES = set(PATHS)
# meant to differ from script to script
OWN = {"Args", "BY_DOMAIN", "POLICY_FLAGS", "main", "update"}


def top_level(path):
    """The text of every function, class and constant at the top level of a script, by name."""
    source = path.read_text()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            decorators = [ast.get_source_segment(source, d) for d in node.decorator_list]
            found[node.name] = "\n".join([*decorators, ast.get_source_segment(source, node)])
        elif isinstance(node, ast.Assign):
            found[node.targets[0].id] = ast.get_source_segment(source, node)
    return found


def test_there_are_scripts():
    assert {"gta_diffusion", "gta_augment", "td3bc", "cql", "iql", "mcq", "dt", "metrics"} <= NAMES
    assert PATHS["synther"].parent == ROOT / "baselines"


def test_what_scripts_repeat_is_identical():
    texts = {}
    for path in SCRIPTS:
        for name, text in top_level(path).items():
            if name not in OWN:
                texts.setdefault(name, {})[path.name] = text
    different = {n: list(t) for n, t in texts.items() if len(set(t.values())) > 1}
    assert not different
    shared = {n for n, t in texts.items() if len(t) > 1}
    assert {"load_dataset", "MixerUNet", "make_windows", "write_atomically"} <= shared


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_stands_alone(path):
    """It imports no other script, only packages of its own header, and defines names only."""
    source = path.read_text()
    header = re.search(r"# dependencies = \[\n(.*?)# \]", source, re.S)[1]
    packages = {re.match(r"[\w-]+", name)[0] for name in re.findall(r'"(.+?)"', header)}
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.partition(".")[0])
    assert not imported & NAMES
    assert imported - set(sys.stdlib_module_names) <= packages
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.If)
    body = ast.parse(source).body
    assert isinstance(body[0], ast.Expr) and isinstance(body[-1], ast.If)  # docstring, main
    assert all(isinstance(node, allowed) for node in body[1:])
    assert sum(isinstance(node, ast.If) for node in body) == 1


def test_requirements_are_what_the_scripts_import():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {re.match(r"[\w-]+", line)[0] for line in lines if line and line[0] != "#"}
    headers = set()
    for path in SCRIPTS:
        header = re.search(r"# dependencies = \[\n(.*?)# \]", path.read_text(), re.S)[1]
        headers |= {re.match(r"[\w-]+", name)[0] for name in re.findall(r'"(.+?)"', header)}
    assert required == headers | {
        "h5py",
        "mujoco",
        "pytest",
        "gymnasium-robotics",
        "hypothesis",
        "ruff",
    }
    assert all("==" in line for line in lines if line and line[0] != "#")


FLAGS = {  # the others are learners
    "gta_diffusion": TINY_A,
    "gta_augment": TINY_B,
    "metrics": ["--aug", "buffer.npz", "--num-transitions", 50],
    "synther": TINY_SYNTHER,
}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_copied_alone_it_helps_and_runs(path, pipeline, tmp_path):
    shutil.copy(path, tmp_path)
    copy = tmp_path / path.name
    help_text = run(copy, "--help", cwd=tmp_path).stdout
    assert "--env" in help_text and "--seed" in help_text
    if path.stem == "gta_augment":
        shutil.copy(pipeline[0] / "diffusion.pt", tmp_path)
    if path.stem == "metrics":
        shutil.copy(pipeline[0] / "buffer.npz", tmp_path)
    run(copy, *FLAGS.get(path.stem, TINY_C), "--env", SAMPLE.resolve(), cwd=tmp_path)
    without_data = run(copy, *FLAGS.get(path.stem, TINY_C), cwd=tmp_path, code=1).stderr
    assert "error: --env data/hopper-medium-sample: not a folder here" in without_data


def test_every_argument_has_a_docstring():
    for path in SCRIPTS:
        args = next(n for n in ast.parse(path.read_text()).body if getattr(n, "name", "") == "Args")
        for field, doc in zip(args.body[::2], args.body[1::2]):
            assert isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr), path.name


# --- --env ---


@pytest.mark.parametrize(
    "env, ids",
    [
        ("hopper-medium", ["mujoco/hopper/medium-v0"]),
        ("hopper-medium-expert", ["mujoco/hopper/medium-v0", "mujoco/hopper/expert-v0"]),
        ("maze2d-umaze", ["D4RL/pointmaze/umaze-v2"]),
        ("maze2d-large-dense", ["D4RL/pointmaze/large-dense-v2"]),
        ("antmaze-medium-play", ["D4RL/antmaze/medium-play-v1"]),
        ("antmaze-umaze", ["D4RL/antmaze/umaze-v1"]),
        ("antmaze-umaze-diverse", ["D4RL/antmaze/umaze-diverse-v1"]),
        ("pen-human", ["D4RL/pen/human-v2"]),
        ("door-human", ["D4RL/door/human-v2"]),
        ("kitchen-partial", ["D4RL/kitchen/partial-v2"]),
        ("mujoco/walker2d/expert-v0", ["mujoco/walker2d/expert-v0"]),
        ("some/folder+other/folder", ["some/folder", "other/folder"]),
        ("hopper-medium+pen-human", ["mujoco/hopper/medium-v0", "D4RL/pen/human-v2"]),
    ],
)
def test_short_names(env, ids):
    assert gta_diffusion.resolve_env(env) == ids


@pytest.mark.parametrize("env", ["hopper-medium-replay", "hopper-medium/", "", "a+", "nonsense"])
def test_unknown_env_is_one_line(env):
    with pytest.raises(SystemExit, match="not a folder here, a short name") as error:
        gta_diffusion.load_dataset(env)
    assert "\n" not in str(error.value)


def test_folder_without_a_dataset_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="no Minari dataset there"):
        gta_diffusion.load_dataset(str(tmp_path))


def test_unreachable_hub_fails_within_seconds(tmp_path):
    started = time.time()
    environment = {
        **os.environ,
        "MINARI_DATASETS_PATH": str(tmp_path),
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }
    result = subprocess.run(
        [sys.executable, ROOT / "gta_diffusion.py", "--env", "hopper-medium"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.startswith("error: --env mujoco/hopper/medium-v0: not in the local cache")
    assert len(result.stderr.splitlines()) == 1
    assert time.time() - started < 20  # most of it is importing torch
    assert not list(tmp_path.iterdir())


def test_start_up_line_tells_what_was_loaded(dataset, capsys):
    gta_diffusion.load_dataset(str(SAMPLE))
    metadata = json.loads((SAMPLE / "data" / "metadata.json").read_text())
    episodes = list(minari.MinariDataset(SAMPLE / "data").iterate_episodes())
    returns = [e.rewards.sum() for e in episodes]
    line = capsys.readouterr().out
    assert line == (
        f"dataset: hopper-medium-sample-v0, {metadata['total_episodes']} episodes, "
        f"{metadata['total_steps']} transitions, {sum(e.terminations[-1] for e in episodes)} "
        f"terminals, return mean {np.mean(returns):.1f}, min {min(returns):.1f}, max "
        f"{max(returns):.1f}\n"
    )


def test_several_ids_are_concatenated(dataset):
    double = gta_diffusion.load_dataset(f"{SAMPLE}+{SAMPLE}")
    assert double.name == "hopper-medium-sample-v0+hopper-medium-sample-v0"
    assert len(double.episodes) == 2 * len(dataset.episodes)
    again = double.episodes[len(dataset.episodes)]
    assert all((a == b).all() for a, b in zip(again, dataset.episodes[0]))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: (data / "main_data.hdf5").unlink(),
        lambda data: (data / "main_data.hdf5").write_bytes(b"\x89HDF then nothing"),
        lambda data: cut_file(data / "main_data.hdf5"),
        lambda data: (data / "metadata.json").write_text("{"),
        lambda data: edit_json(data / "metadata.json", minari_version="99.0"),
    ],
    ids=["no data", "no HDF5", "truncated", "broken metadata", "newer Minari"],
)
def test_damaged_dataset_is_one_line(tmp_path, damage):
    shutil.copytree(SAMPLE, tmp_path / "copy")
    damage(tmp_path / "copy" / "data")
    with pytest.raises(SystemExit, match="copy: cannot be read") as error:
        gta_diffusion.load_dataset(str(tmp_path / "copy"))
    assert "\n" not in str(error.value)


def cut_file(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_datasets_of_different_environments_do_not_mix(tmp_path):
    shutil.copytree(SAMPLE, tmp_path / "other")
    metadata = tmp_path / "other" / "data" / "metadata.json"
    metadata.write_text(metadata.read_text().replace("Hopper-v5", "Walker2d-v5"))
    with pytest.raises(SystemExit, match="different environments, Hopper-v5 and Walker2d-v5"):
        gta_diffusion.load_dataset(f"{SAMPLE}+{tmp_path / 'other'}")


def make_minari(root, monkeypatch, dataset_id, observation_space, action_space, lengths=(5, 3)):
    """Writes a Minari dataset of random numbers into a local cache of its own."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    rng = np.random.default_rng(0)

    def draw(space, n):
        if isinstance(space, gym.spaces.Dict):
            return {key: draw(sub, n) for key, sub in space.items()}
        space.seed(int(rng.integers(2**31)))
        return np.stack([space.sample() for _ in range(n)])

    buffers = [
        EpisodeBuffer(
            observations=draw(observation_space, T + 1),
            actions=draw(action_space, T),
            rewards=rng.normal(size=T),
            terminations=np.arange(T) == T - 1,
            truncations=np.zeros(T, bool),
        )
        for T in lengths
    ]
    with pytest.warns(UserWarning):
        minari.create_dataset_from_buffers(
            dataset_id,
            buffers,
            env="Hopper-v5",
            observation_space=observation_space,
            action_space=action_space,
        )
    return buffers


BOX = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)


def test_dict_observations_are_flattened_as_gymnasium_does(tmp_path, monkeypatch):
    inner = gym.spaces.Dict({"z": gym.spaces.Box(-1, 1, (1,)), "y": gym.spaces.Box(-1, 1, (2, 2))})
    space = gym.spaces.Dict({"b": gym.spaces.Box(-1, 1, (3,)), "a": inner})
    buffers = make_minari(tmp_path, monkeypatch, "test/dict-v0", space, BOX)
    dataset = gta_diffusion.load_dataset("test/dict-v0")  # an id, from the local cache
    assert dataset.ids == ["test/dict-v0"] and len(dataset.episodes) == 2
    for buffer, episode in zip(buffers, dataset.episodes):
        for t in range(len(buffer.rewards) + 1):
            step = {
                "b": buffer.observations["b"][t],
                "a": {key: buffer.observations["a"][key][t] for key in "zy"},
            }
            flat = gym.spaces.utils.flatten(space, step)
            np.testing.assert_array_equal(episode.observations[t], flat)


@pytest.mark.parametrize(
    "observation_space, action_space, message",
    [
        (BOX, gym.spaces.Discrete(4), "actions must be vectors"),
        (gym.spaces.Discrete(4), BOX, "observations must be vectors"),
        (gym.spaces.Box(0, 255, (32, 32, 3), np.uint8), BOX, "observations must be vectors"),
    ],
    ids=["discrete actions", "discrete observations", "images"],
)
def test_spaces_that_are_no_vectors_are_one_line(
    tmp_path, monkeypatch, observation_space, action_space, message
):
    make_minari(tmp_path, monkeypatch, "test/odd-v0", observation_space, action_space)
    with pytest.raises(SystemExit, match=message) as error:
        gta_diffusion.load_dataset("test/odd-v0")
    assert "\n" not in str(error.value)


def test_bundled_dataset_is_as_promised(dataset):
    transitions = sum(len(e.rewards) for e in dataset.episodes)
    assert 30_000 <= transitions <= 50_000
    assert sum(f.stat().st_size for f in SAMPLE.rglob("*") if f.is_file()) <= 5_000_000
    returns = np.array([e.rewards.sum() for e in dataset.episodes])
    assert returns.std() > 500
    for e in dataset.episodes:  # whole episodes: terminated, or as long as Hopper lets them be
        assert e.terminals[-1] or len(e.rewards) == 1000
        assert not e.terminals[:-1].any()
    env = dataset.source.recover_environment(eval_env=True)
    assert env.spec.id == "Hopper-v5"


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.npz"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half of the ne")
        raise OSError("disk full")

    with pytest.raises(SystemExit, match="cannot be written .disk full"):
        gta_diffusion.write_atomically(path, fail)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    gta_diffusion.write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 1


def test_absent_cuda_is_one_line(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    for path in SCRIPTS:
        flags = ["--aug", "buffer.npz"] if path.stem == "metrics" else []
        result = run(path, *flags, "--device", "cuda", cwd=tmp_path, code=1)
        assert result.stderr.splitlines() == [
            "error: --device cuda: PyTorch finds no CUDA device; use --device cpu"
        ]
        result = run(path, *flags, "--device", "gpu", cwd=tmp_path, code=1)
        assert result.stderr.startswith("error: --device gpu: no device of PyTorch")


# --- end to end ---


def test_pipeline_prints_what_a_user_wants_to_know(pipeline):
    folder, outputs = pipeline
    assert "denoiser: " in outputs["A"] and "wrote diffusion.pt: 6 steps" in outputs["A"]
    with np.load(folder / "buffer.npz", allow_pickle=False) as file:
        alive = ~file["terminals"]
        generated = file["rewards"][alive].mean()
        correlation = np.corrcoef(file["condition"], file["rewards"].sum(1))[0, 1]
    lines = outputs["B"].splitlines()
    assert re.fullmatch(
        r"wrote buffer.npz \(\d\.\d MB, \d\.\d min\): 40 subtrajectories, 280 transitions",
        lines[-3],
    )
    assert f"generated {generated:.3f} " in lines[-2]
    assert lines[-1].endswith(f"{correlation:.3f}")


def test_readme_commands_exist():
    """Every flag that the README gives a script is one of that script."""
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"python (?:\S*/)?(\w+)\.py([^\n&|`#]*)", readme.replace("\\\n", " "))
    assert NAMES <= {name for name, _ in commands}
    for name, flags in commands:
        if name not in NAMES:
            known = (ROOT / folder / f"{name}.py" for folder in ("data", "tests"))
            assert any(path.is_file() for path in known), name
            continue
        args = next(
            n for n in ast.parse(PATHS[name].read_text()).body
            if getattr(n, "name", "") == "Args"
        )  # fmt: skip
        fields = {n.target.id for n in args.body if isinstance(n, ast.AnnAssign)} | {"help"}
        for flag in re.findall(r"--([\w-]+)", flags):
            assert flag.replace("-", "_").removeprefix("no_") in fields, (name, flag)


def test_no_path_of_this_machine_in_the_repository():
    home = str(Path.home())
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    for name in files.splitlines():
        content = (ROOT / name).read_bytes()
        assert str(ROOT).encode() + b"/" not in content and home.encode() + b"/" not in content
