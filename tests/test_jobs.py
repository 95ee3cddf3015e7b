"""baselines/jobs.py: its settings are the paper's, and its commands can be run in their order."""

import importlib
import io
import re
import shlex
from contextlib import redirect_stdout
from pathlib import Path
from statistics import fmean

import pytest
import tyro
from conftest import ROOT

import jobs

TABLES = list(jobs.TABLES)


def printed(*flags):
    """Returns the lines that jobs.py prints."""
    stdout = io.StringIO()
    with redirect_stdout(stdout):
        jobs.main(tyro.cli(jobs.Args, args=flags))
    return stdout.getvalue().splitlines()


def flags_of(command):
    """Returns the flags of a command and their values."""
    return dict(re.findall(r" --([a-z0-9-]+) ([^- ]\S*)", command))


def test_a_folder_with_a_space_is_one_word():
    *_, flag, out = shlex.split(printed("table14", "--folder", "my runs")[-1])
    assert flag == "--out" and out.startswith("my runs/dt-")


# --- settings ---

BINS = {  # Table 9
    "halfcheetah-medium": "-",
    "halfcheetah-medium-replay": "50",
    "halfcheetah-medium-expert": "20",
    "hopper-medium": "50",
    "hopper-medium-replay": "50",
    "hopper-medium-expert": "50",
    "walker2d-medium": "100",
    "walker2d-medium-replay": "50",
    "walker2d-medium-expert": "50",
}
RANGES = {  # alpha, mu, weight (Table 8); of pixels alpha and mu by dataset (C.4)
    "halfcheetah|hopper|walker2d": ("1.1 1.3 1.4", "0.5 0.25", "-"),
    "maze2d": ("1.25 1.3", "0.5", "10"),
    "antmaze": ("1.1 1.3 1.5", "0.05 0.1 0.25", "- 10 30"),
    "pen|door": ("1.1 1.3", "0.1 0.25", "-"),
    "kitchen": ("1.1 1.3 1.5", "0.1 0.25 0.5", "- 10"),
    ".+_.+/(medium|medium_expert|expert)$": ("2", "0.1", "-"),
    ".+_.+/medium_replay": ("1.3", "0.1", "-"),
}


def test_settings_are_the_papers():
    assert {name: jobs.SETTINGS[name].reweight_bins for name in jobs.LOCOMOTION} == BINS
    seen = []
    for pattern, (alphas, mus, weights) in RANGES.items():
        for name in jobs.find_datasets(pattern):
            setting = jobs.SETTINGS[name]
            seen.append(name)
            assert setting.alpha in alphas.split() and setting.mu in mus.split()
            assert setting.success_weight in weights.split() and setting.horizon == "31"
            if name not in BINS:
                assert setting.reweight_bins == ("50" if "_" in name else "-")  # C.4, Table 8
    assert sorted(seen) == sorted(jobs.SETTINGS)
    assert len(seen) == 9 + 9 + 2 + 3 + 8


AVERAGES = {  # of each family (Tables 1, 2, 3), and what the paper prints where that is another
    "**Locomotion, TD3+BC**": "76.92 77.24 78.64 84.63",
    "**Maze2d, IQL**": "43.07 45.15 45.00 52.01",  # not printed
    "**AntMaze, IQL**": "56.52 58.42 32.99 62.75",  # the last as the average of all mazes
    "**Maze2d and AntMaze**": "52.04 54.00 37.00 59.17",  # 53.99, 36.99 and 62.75
    "**Adroit, IQL**": "36.43 37.87 37.95 42.73",
    "**Kitchen, IQL**": "50.23 48.70 50.85 53.30",
    "**Pixels, DrQ+BC**": "42.91 - 27.54 45.44",  # 42.7
}


def test_averages_are_those_of_the_papers_cells():
    columns = {}
    for line in jobs.settings_table().splitlines()[2:]:
        name, *cells = line.strip("|").split("|")
        if name == "**Maze2d and AntMaze**":
            columns[name] = columns["**Maze2d, IQL**"] + columns["**AntMaze, IQL**"]
        elif name.startswith("**"):
            columns[name] = rows = []
        else:
            rows.append([cell.partition("±")[0] for cell in cells[5:]])
        if name.startswith("**"):
            assert " ".join(cells[5:]) == AVERAGES[name]
    for name, rows in columns.items():
        for scores, average in zip(zip(*rows), AVERAGES[name].split()):
            if average != "-":
                assert fmean(map(float, scores)) == pytest.approx(float(average), abs=0.006)
    assert columns.keys() == AVERAGES.keys()


def test_readme_has_the_settings():
    table = jobs.settings_table()
    assert "\n".join(printed("settings")) == table
    assert table in (ROOT / "README.md").read_text()


# --- commands ---


def parse(command):
    """Parses a command as its script does, without running it."""
    python, script, *flags = shlex.split(command)
    assert python == "python" and (ROOT / script).is_file()
    module = importlib.import_module(Path(script).stem)
    if script == "data/make_dataset.py":
        tyro.cli(module.Fraction | module.FromD4rl, args=flags)
    else:
        module.check_flags(tyro.cli(module.Args, args=flags))


def test_every_command_parses():
    """Of those that differ in names of files alone, one."""
    commands = {}
    for table in TABLES:
        for command in printed(table):
            commands[re.sub(r" (--\w+) \S*/\S+", r" \1", command)] = command
    for command in commands.values():
        parse(command)
    scripts = {command.split()[1] for command in commands.values()}
    assert len(scripts) == 9 and len(commands) > 50


def test_a_command_needs_only_what_earlier_ones_made():
    """And nothing is made twice, by tables that share a folder neither."""
    makers = {}
    for flags in ([], ["--d4rl"]):
        for table in TABLES:
            made = set()
            for command in printed(table, *flags):
                given = flags_of(command)
                needed = {given.get(flag) for flag in ("aug", "checkpoint", "env")} - {None}
                if "synther.py" in command:  # its checkpoint is its own
                    needed.remove(given["checkpoint"])
                assert {name for name in needed if "/" in name} <= made, command
                assert given["out"] not in made, command
                assert makers.setdefault(given["out"], command) == command
                made.add(given["out"])


def test_stages_are_the_table_in_order():
    by_stage = [printed("table1", "--stage", stage) for stage in jobs.STAGES]
    assert [len(lines) for lines in by_stage] == [3, 0, 36, 18, 180]
    assert sum(by_stage, []) == printed("table1")


def test_a_chain_of_table_1():
    lines = printed("table1", "--folder", "x", "--d4rl")
    chain = [line for line in lines if re.search(r"walker2d.medium-(v2|synther)", line)]
    assert lines[0].startswith(
        "python data/make_dataset.py from-d4rl --file data/halfcheetah_medium"
    )
    env = "data/walker2d-medium-v2"
    path = "x/walker2d-medium-v2"
    flags = "--mu 0.5 --alpha 1.3 --reweight-bins 100"
    model = f"{path}-horizon31.pt"
    for command in (
        f"data/make_dataset.py from-d4rl --file data/walker2d_medium-v2.hdf5 --out {env}",
        f"gta_diffusion.py --env {env} --horizon 31 --out {model}",
        f"gta_augment.py {flags} --checkpoint {model} --label gta --out {path}-gta.npz",
        f"td3bc.py --env {env} --s4rl-sigma 3e-4 --num-seeds 8",
        f"cql.py --aug {path}-synther.npz --aug-only --num-seeds 8",
        f"mcq.py --aug {path}-gta.npz --num-seeds 8",
    ):
        assert sum(line.startswith(f"python {command}") for line in chain) == 1, command
