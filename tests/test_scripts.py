"""What holds for every script: alone, identical where it repeats, clear when it fails."""

import ast
import re
import shlex
import shutil
import sys

import pytest
from conftest import ROOT, TINY_A, TINY_B, TINY_C, run

PATHS = {p.stem: p for folder in ("", "baselines/", "data/") for p in ROOT.glob(f"{folder}*.py")}
OWN = {"Args", "BY_DOMAIN", "main", "update"}  # meant to differ from script to script


def top_level(path):
    """The text of every function, class and constant at the top level of a script, by name."""
    source = path.read_text()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            decorators = [ast.get_source_segment(source, d) for d in node.decorator_list]
            found[node.name] = "\n".join([*decorators, ast.get_source_segment(source, node)])
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = ast.get_source_segment(source, node)
    return found


def test_what_scripts_repeat_is_identical():
    texts = {}
    for stem, path in PATHS.items():
        for name, text in top_level(path).items():
            # DT acts on a history, DrQ+BC on what it renders
            if name not in OWN and (name != "evaluate" or stem not in {"dt", "drqbc"}):
                texts.setdefault(name, {})[stem] = text
    assert not {name: list(own) for name, own in texts.items() if len(set(own.values())) > 1}
    shared = {name for name, own in texts.items() if len(own) > 1}
    assert {"load_episodes", "save", "run", "Linear", "edm_sampler", "Denoiser"} - shared == set()


@pytest.mark.parametrize("name", PATHS)
def test_a_script_stands_alone(name):
    """It imports no other script, only packages of its own header, and defines names only."""
    source = PATHS[name].read_text()
    header = re.search(r"# dependencies = \[(.*?)\]\n# ///", source, re.S)[1]
    packages = {re.match(r"[\w-]+", own)[0] for own in re.findall(r'"(.+?)"', header)}
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert not imported & PATHS.keys()
    modules = {package.replace("-", "_") for package in packages}
    assert imported - set(sys.stdlib_module_names) <= modules
    body = ast.parse(source).body
    assert isinstance(body[0], ast.Expr) and isinstance(body[-1], ast.If)  # docstring, main
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    assert all(isinstance(node, kinds) for node in body[1:-1])


def test_requirements_are_what_the_scripts_import():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = [line for line in lines if line and line[0] != "#"]
    headers = set()
    for path in PATHS.values():
        header = re.search(r"# dependencies = \[(.*?)\]\n# ///", path.read_text(), re.S)[1]
        headers |= {re.match(r"[\w-]+", own)[0] for own in re.findall(r'"(.+?)"', header)}
    headers -= {"stable-baselines3"}  # of collect_sample.py alone
    more = {"mujoco", "pytest", "gymnasium-robotics", "ruff", "h5py"}
    assert headers <= {re.match(r"[\w-]+", line)[0] for line in required} <= headers | more
    assert all("==" in line for line in required)


FLAGS = {  # of a short run; the others are learners
    "gta_diffusion": TINY_A,
    "gta_augment": TINY_B,
    "metrics": ["--aug", "buffer.npz", "--num-transitions", 50],
    "relabel_rewards": ["--aug", "buffer.npz"],
    "synther": ["--width", 16, "--train-steps", 6, "--num-transitions", 280, "--num-steps", 8],
}


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    """A folder with diffusion.pt and buffer.npz made without --env: of the bundled HalfCheetah."""
    folder = tmp_path_factory.mktemp("bundled")
    for name in ("gta_diffusion", "gta_augment"):
        run(PATHS[name], *FLAGS[name], cwd=folder)
    return folder


def test_a_first_run_needs_no_env(bundled, tmp_path):
    """README: what the first command ends with, and a learner on the same buffer."""
    aug, env = ["--aug", bundled / "buffer.npz"], "data/halfcheetah-medium-sample"
    flags = ["--num-transitions", 280, "--plot", "a/metrics.png"]
    output = run(PATHS["metrics"], *aug, *flags, cwd=tmp_path).stdout
    rows = {key: cells for key, *cells in (re.split("  +", x) for x in output.splitlines())}
    dataset, generated = (float(x) for x in rows["oracle reward"])
    assert dataset == pytest.approx(3.8, abs=0.3) and -3 < generated < 10
    assert rows[env][0] == "dataset" and (tmp_path / "a/metrics.png").stat().st_size > 20_000
    last = run(PATHS["td3bc"], *TINY_C, *aug, cwd=tmp_path).stdout.splitlines()[-1]
    assert last.startswith(f"{env} | td3bc + gta(mu 0.5, alpha 1.3, ")


NO_ENV = {"collect_sample", "make_dataset", "drqbc"}  # what takes no --env


@pytest.mark.parametrize("name", sorted(PATHS.keys() - NO_ENV))
def test_copied_alone_it_helps_and_says_what_is_missing(name, bundled, tmp_path):
    script = shutil.copy(PATHS[name], tmp_path)
    needs = {
        "gta_augment": "diffusion.pt",
        "metrics": "buffer.npz",
        "relabel_rewards": "buffer.npz",
    }
    if name in needs:
        shutil.copy(bundled / needs[name], tmp_path)
    assert "--env" in run(script, "--help", cwd=tmp_path).stdout
    flags = FLAGS.get(name, TINY_C)
    assert "--env is missing" in run(script, *flags, cwd=tmp_path, ok=False).stderr
    run(script, *flags, "--env", ROOT / "data/halfcheetah-medium-sample", cwd=tmp_path)


def test_readme_commands_have_flags_that_exist():
    text, helps, found = (ROOT / "README.md").read_text(), {}, set()
    commands = re.findall(r"((?:baselines/|data/)?\w+\.py)((?: [^`\n|&#]+)?)", text)
    for script, flags in commands:
        words = [word for word in shlex.split(flags, comments=True) if word.startswith("--")]
        if not (ROOT / script).is_file() or not words:
            continue
        subcommand = [
            w for w in flags.split()[:1] if re.fullmatch("fraction|mix|duplicate|from-d4rl", w)
        ]
        key = (script, *subcommand)
        if key not in helps:
            helps[key] = run(ROOT / script, *subcommand, "--help").stdout
        for word in words:
            assert word in helps[key], (script, word)
        found.add(script)
    learners = {"td3bc.py", "iql.py", "cql.py", "mcq.py", "dt.py"}
    assert {"gta_diffusion.py", "gta_augment.py", "metrics.py", *learners} <= found
