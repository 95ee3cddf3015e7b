"""What holds for every script: alone, identical where it repeats, plainly written."""

import ast
import io
import json
import re
import shlex
import shutil
import sys
import tokenize

import pytest
from conftest import ROOT, TINY_A, TINY_B, TINY_C, call, run

PATHS = {p.stem: p for folder in ("", "baselines/", "data/") for p in ROOT.glob(f"{folder}*.py")}
TESTS = {f"tests/{p.stem}": p for p in ROOT.glob("tests/*.py")}


# --- the text ---

OWN = {"Args", "BY_DOMAIN", "main", "update", "load_agents"}  # meant to differ
OWN_EVALUATION = {"dt", "drqbc"}  # DT acts on a history, DrQ+BC on what it renders


def top_level(path):
    """Returns the text of every function, class and constant of a script, by name."""
    source = path.read_text()
    texts = {}
    for node in ast.parse(source).body:
        text = ast.get_source_segment(source, node)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            decorators = [ast.get_source_segment(source, d) for d in node.decorator_list]
            texts[node.name] = "\n".join([*decorators, text])
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            texts[node.targets[0].id] = text
    return texts


def test_what_scripts_repeat_is_identical():
    texts = {}
    for stem, path in PATHS.items():
        for name, text in top_level(path).items():
            if name not in OWN and (name != "evaluate" or stem not in OWN_EVALUATION):
                texts.setdefault(name, {})[stem] = text
    assert not {name: list(by) for name, by in texts.items() if len(set(by.values())) > 1}
    shared = {name for name, by in texts.items() if len(by) > 1}
    assert {"load_episodes", "new_file", "run", "Linear", "edm_sampler", "Denoiser"} <= shared


CODE = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
SEQUENCES = ast.List | ast.Tuple | ast.JoinedStr


def is_condition(node):
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) == "bool"
    is_not = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    return is_not or isinstance(node, ast.Compare | ast.BoolOp)


def is_sequence(node):
    is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return is_text or isinstance(node, SEQUENCES)


def fault(node):
    """Returns what a node of a syntax tree does that takes a second reading, or None."""
    match node:
        case ast.Assign(targets=[ast.Tuple()], value=ast.Tuple(elts=values)):
            calls = [value for value in values if isinstance(value, ast.Call)]
            if sum(ast.unparse(call.func) != "len" for call in calls) > 1:  # but for two sizes
                return "assigns two calls at once"
        case ast.BinOp(op=ast.Mult(), left=left, right=right):
            for x, y in ((left, right), (right, left)):
                if is_sequence(x) and is_condition(y):
                    return "multiplies by a condition"
        case ast.Return(value=ast.Call(func=ast.Name(id="print"))):
            return "returns a print"


def faults(source, most=10):
    """Returns what the style forbids and a source does; most: tokens a line on average."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if text := fault(node):
            found.append(f"line {node.lineno} {text}")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    num_tokens = sum(token.type in CODE for token in tokens)
    lines = [line.strip() for line in source.splitlines()]
    num_lines = sum(line != "" and line[0] != "#" for line in lines)
    if num_tokens > most * num_lines:
        found.append(f"{num_tokens / num_lines:.2f} tokens a line")
    return found


@pytest.mark.parametrize("name", PATHS | TESTS)
def test_one_statement_a_line(name):
    most = 10 if name in PATHS else 16  # what plain rewrites of equations need
    assert faults((PATHS | TESTS)[name].read_text(), most) == []


PLANTED = {
    "a, b = f(), g()  #\nx = 1": "line 1 assigns two calls at once",
    "x = ['a'] * (not b)": "line 1 multiplies by a condition",
    "name = (not short) * 'of data'": "line 1 multiplies by a condition",
    "name = f'{n}s' * bool(n)": "line 1 multiplies by a condition",
    "def f():\n    return print(1)": "line 2 returns a print",
    "# why\n\nx = (a + b + c + d + e)": "13.00 tokens a line",
    "a, b = len(x), len(y)\nx = 1": None,
    "x = [0] * len(y)": None,
}


@pytest.mark.parametrize("source, expected", PLANTED.items())
def test_each_rule_can_fail(source, expected):
    assert faults(source) == ([expected] if expected else [])


# --- alone ---


def packages_of(path):
    """Returns the packages in a script's own header."""
    header = re.search(r"# dependencies = \[(.*?)\]\n# ///", path.read_text(), re.DOTALL)[1]
    return {re.match(r"[\w-]+", text)[0] for text in re.findall(r'"(.+?)"', header)}


@pytest.mark.parametrize("name", PATHS)
def test_a_script_stands_alone(name):
    """It imports no other script, only packages of its own header, and defines names only."""
    tree = ast.parse(PATHS[name].read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert not imported & PATHS.keys()
    modules = {package.replace("-", "_") for package in packages_of(PATHS[name])}
    assert imported - set(sys.stdlib_module_names) <= modules
    assert isinstance(tree.body[0], ast.Expr) and isinstance(tree.body[-1], ast.If)  # doc, main
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    assert all(isinstance(node, kinds) for node in tree.body[1:-1])


def test_requirements_are_what_the_scripts_import():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = [line for line in lines if line and line[0] != "#"]
    headers = set().union(*map(packages_of, PATHS.values()))
    headers -= {"stable-baselines3"}  # of collect_sample.py alone
    more = {"mujoco", "pytest", "gymnasium-robotics", "ruff", "h5py"}
    assert headers <= {re.match(r"[\w-]+", line)[0] for line in required} <= headers | more
    assert all("==" in line for line in required)


# --- commands ---

FLAGS = {  # of a short run; the others are learners
    "gta_diffusion": TINY_A,
    "gta_augment": TINY_B,
    "metrics": ["--aug", "buffer.npz", "--num-transitions", 50],
    "relabel_rewards": ["--aug", "buffer.npz"],
    "synther": ["--width", 16, "--train-steps", 6, "--num-transitions", 280, "--num-steps", 8],
}
NEEDS = {
    "gta_augment": "diffusion.pt",
    "metrics": "buffer.npz",
    "relabel_rewards": "buffer.npz",
}
NO_ENV = {
    "draw_map",
    "draw_strip",
    "collect_sample",
    "make_dataset",
    "drqbc",
    "jobs",
}  # what takes no --env


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    """A folder with diffusion.pt and buffer.npz made without --env: of the bundled HalfCheetah."""
    folder = tmp_path_factory.mktemp("bundled")
    for name in ("gta_diffusion", "gta_augment"):
        call(PATHS[name], *FLAGS[name], cwd=folder)
    return folder


def test_a_first_run_needs_no_env(bundled, tmp_path):
    """README: what the first command ends with, and a learner on the same buffer."""
    aug = ["--aug", bundled / "buffer.npz"]
    flags = ["--num-transitions", 280, "--plot", "a/metrics.png"]
    call(PATHS["metrics"], *aug, *flags, cwd=tmp_path)
    numbers = json.loads((tmp_path / "metrics.json").read_text())["numbers"]
    dataset, generated = (column["oracle reward"] for column in numbers.values())
    assert dataset == pytest.approx(3.8, abs=0.3) and -3 < generated < 10
    assert (tmp_path / "a/metrics.png").stat().st_size > 20_000
    last = call(PATHS["td3bc"], *TINY_C, *aug, cwd=tmp_path).stdout.splitlines()[-1]
    assert last.startswith("data/halfcheetah-medium-sample | td3bc | gta(mu 0.5, alpha 1.3")


@pytest.mark.parametrize("name", sorted(PATHS.keys() - NO_ENV))
def test_copied_alone_it_helps_and_says_what_is_missing(name, bundled, tmp_path):
    script = shutil.copy(PATHS[name], tmp_path)
    if name in NEEDS:
        shutil.copy(bundled / NEEDS[name], tmp_path)
    assert "--env" in call(script, "--help", cwd=tmp_path).stdout
    flags = FLAGS.get(name, TINY_C)
    assert "--env is missing" in call(script, *flags, cwd=tmp_path, ok=False).stderr
    if name != "relabel_rewards":  # whose tests run it: it has no flag that makes it short
        run(script, *flags, "--env", ROOT / "data/halfcheetah-medium-sample", cwd=tmp_path)


SUBCOMMANDS = "fraction mix duplicate from-d4rl check train encode finetune".split()


def test_readme_commands_have_flags_that_exist():
    helps = {}
    text = "".join(p.read_text() for p in [*ROOT.glob("README.md"), *ROOT.glob("*/README.md")])
    for script, flags in re.findall(r"((?:baselines/|data/)?\w+\.py)((?: [^`\n|&#]+)?)", text):
        words = shlex.split(flags, comments=True)
        given = [word for word in words if word.startswith("--")]
        if given and (ROOT / script).is_file():
            command = (script, *[word for word in words[:1] if word in SUBCOMMANDS])
            if command not in helps:
                helps[command] = call(ROOT / script, *command[1:], "--help").stdout
            for flag in given:
                assert flag in helps[command], (command, flag)
    scripts = {"gta_diffusion.py", "gta_augment.py", "iql.py", "metrics.py", "data/make_dataset.py"}
    assert scripts <= {script for script, *_ in helps}
