# /// script
# requires-python = ">=3.11"
# dependencies = ["tyro>=0.9"]
# ///
"""Prints the commands of a table of the paper, one a line, with each dataset's settings.

    python baselines/jobs.py table1 > jobs.txt           all of Table 1, in order
    python baselines/jobs.py table1 --stage a > a.txt    a stage: its commands are independent
    python baselines/jobs.py settings                    the settings, as README.md has them

A stage needs those before it: d4rl converts D4RL's files, which you put in data/ (medium-replay,
which Minari has not; with --d4rl all of locomotion), parts draws shares of a dataset, a trains
diffusion models (SynthER generates, too), b generates, c trains learners. From the repository's
root, where a command that is run again goes on where it stopped:

    sh -e jobs.txt                                     all stages, one command after the other
    xargs -L 1 -P 2 env < a.txt                        a stage, two commands at a time
    parallel --joblog a.log < a.txt                    a stage, with GNU parallel
    sed -n "${SLURM_ARRAY_TASK_ID}p" a.txt | sh        a task of a SLURM array
    python metrics.py --runs runs/td3bc-*-8-agents     the table
"""

import re
import shlex
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

import tyro

WHAT = "table1 table2 table4 table5 table10 table12 table13 table14 settings".split()
STAGES = ("d4rl", "parts", "a", "b", "c")


@dataclass
class Args:
    what: tyro.conf.Positional[Literal[*WHAT]]  # a table of the paper; or the settings
    stage: Literal[STAGES] | None = None  # print this one. Default: all
    d4rl: bool = False  # take locomotion from D4RL, as the paper, not from Minari
    folder: str = "runs"  # where models, buffers and runs go


# --- settings ---

# In bold: the paper's ranges (Table 8) and mean scores (Tables 1 to 3). Bins are Table 9's, pixels
# C.4's but for H. Our choice in a range: H 31, the paper's 32; mu 0.5, alpha 1.3 (Table 5) for
# medium, medium-replay and Maze2d, the safe mu 0.25, alpha 1.1 (Table 4) elsewhere; weight 10
TABLE = """
|dataset|`--horizon`|`--mu`|`--alpha`|`--reweight-bins`|`--success-weight`|None|S4RL|SynthER|GTA|
|---|---|---|---|---|---|---|---|---|---|
|**Locomotion, TD3+BC**|31, 127|0.25, 0.5|1.1, 1.3, 1.4|Table 9|-|76.92|77.24|78.64|84.63|
|halfcheetah-medium|31|0.5|1.3|-|-|48.42±0.62|48.74±0.31|49.16±0.39|57.84±0.51|
|halfcheetah-medium-replay|31|0.5|1.3|50|-|44.64±0.71|44.53±0.30|45.57±0.34|50.04±0.84|
|halfcheetah-medium-expert|31|0.25|1.1|20|-|89.48±5.50|90.78±4.65|85.47±11.35|93.13±3.07|
|hopper-medium|31|0.5|1.3|50|-|61.04±3.18|59.34±3.50|63.70±3.69|69.57±4.05|
|hopper-medium-replay|31|0.5|1.3|50|-|65.69±24.41|67.39±23.81|78.81±15.80|89.31±16.84|
|hopper-medium-expert|31|0.25|1.1|50|-|104.08±5.81|106.10±7.24|98.99±11.27|110.40±4.04|
|walker2d-medium|31|0.5|1.3|100|-|84.58±1.92|84.63±2.44|85.43±1.14|86.69±0.89|
|walker2d-medium-replay|31|0.5|1.3|50|-|84.11±4.12|83.42±4.70|90.67±1.56|93.82±1.74|
|walker2d-medium-expert|31|0.25|1.1|50|-|110.23±0.37|110.21±0.35|109.95±0.32|110.86±0.34|
|**Maze2d, IQL**|31|0.5|1.25, 1.3|-|10|43.07|45.15|45.00|52.01|
|maze2d-umaze|31|0.5|1.3|-|10|37.41±2.83|37.69±3.36|39.00±2.26|41.68±1.41|
|maze2d-medium|31|0.5|1.3|-|10|32.80±1.49|34.82±3.16|34.27±2.51|37.78±1.66|
|maze2d-large|31|0.5|1.3|-|10|58.99±9.16|62.93±3.47|61.74±4.51|76.56±4.70|
|**AntMaze, IQL**|31|0.05, 0.1, 0.25|1.1, 1.3, 1.5|-|-, 10, 30|56.52|58.42|32.99|62.75|
|antmaze-umaze|31|0.25|1.1|-|10|58.75±8.90|55.00±10.47|17.13±6.45|66.50±6.91|
|antmaze-medium-play|31|0.25|1.1|-|10|78.13±3.44|80.88±5.17|41.00±20.58|81.88±4.19|
|antmaze-large-play|31|0.25|1.1|-|10|40.63±8.75|42.88±8.71|37.50±6.48|44.38±4.66|
|antmaze-umaze-diverse|31|0.25|1.1|-|10|50.38±17.39|51.63±11.67|23.94±11.83|57.88±9.51|
|antmaze-medium-diverse|31|0.25|1.1|-|10|65.50±9.46|74.00±9.72|40.88±14.15|78.13±7.85|
|antmaze-large-diverse|31|0.25|1.1|-|10|45.75±6.34|46.13±8.34|37.50±8.37|47.75±6.69|
|**Maze2d and AntMaze**||||||52.04|54.00|37.00|59.17|
|**Adroit, IQL**|31|0.1, 0.25|1.1, 1.3|-|-|36.43|37.87|37.95|42.73|
|pen-human|31|0.25|1.1|-|-|69.52±5.48|72.52±5.79|72.13±4.48|76.11±9.54|
|door-human|31|0.25|1.1|-|-|3.34±1.16|3.22±0.80|3.77±0.72|9.35±1.48|
|**Kitchen, IQL**|31|0.1, 0.25, 0.5|1.1, 1.3, 1.5|-|-, 10|50.23|48.70|50.85|53.30|
|kitchen-partial|31|0.25|1.1|-|10|38.06±3.15|36.78±2.30|37.38±1.55|45.91±6.41|
|kitchen-mixed|31|0.25|1.1|-|10|54.88±2.68|54.25±3.26|56.13±0.61|56.22±1.88|
|kitchen-complete|31|0.25|1.1|-|10|57.75±4.33|55.06±3.52|59.04±6.98|57.78±3.58|
|**Pixels, DrQ+BC**|not given|0.1|1.3, 2|50|-|42.91|-|27.54|45.44|
|cheetah_run/medium|31|0.1|2|50|-|53.3±3.0|-|50.4±3.1|53.3±1.9|
|cheetah_run/medium_replay|31|0.1|1.3|50|-|44.8±3.6|-|25.6±2.9|38.1±2.5|
|cheetah_run/medium_expert|31|0.1|2|50|-|50.6±8.2|-|36.8±6.0|61.0±8.2|
|cheetah_run/expert|31|0.1|2|50|-|34.5±8.3|-|11.9±2.4|46.8±8.2|
|walker_walk/medium|31|0.1|2|50|-|40.1±3.1|-|29.1±4.4|38.0±5.0|
|walker_walk/medium_replay|31|0.1|1.3|50|-|13.4±4.0|-|7.6±2.5|13.6±1.5|
|walker_walk/medium_expert|31|0.1|2|50|-|43.3±4.1|-|30.2±2.7|45.3±5.7|
|walker_walk/expert|31|0.1|2|50|-|63.3±5.1|-|28.7±3.8|67.4±10.5|
"""


class Setting(NamedTuple):
    """Flags of stages A and B, as typed; "-": not given."""

    horizon: str
    mu: str
    alpha: str
    reweight_bins: str
    success_weight: str


def settings_table():
    """Returns the settings in Markdown, as README.md has them."""
    return TABLE.strip()


def read_settings():
    """Returns the Setting of each dataset."""
    settings = {}
    for row in settings_table().splitlines()[2:]:
        dataset, *cells = row.strip("|").split("|")
        if not dataset.startswith("**"):
            settings[dataset] = Setting(*cells[:5])
    return settings


def find_datasets(pattern):
    return [dataset for dataset in SETTINGS if re.match(pattern, dataset)]


# --- jobs ---

SETTINGS = read_settings()
LOCOMOTION = find_datasets("halfcheetah|hopper|walker2d")
SUBOPTIMAL = [dataset for dataset in LOCOMOTION if "expert" not in dataset]
MAZES = find_datasets("maze2d|antmaze")
ALL = "none s4rl synther gta"
HORIZONS = "gta-horizon1 gta-horizon15 gta-horizon31 gta-horizon63 gta-horizon127"
SHARES = [f"halfcheetah-medium{share}" for share in ("-0.05", "-0.1", "-0.15", "-0.2", "")]
TABLES = {  # learners, datasets, augmentations (gta's name says what differs), agents of each
    "table1": [("td3bc cql iql mcq", LOCOMOTION, ALL, 8), ("iql", MAZES, ALL, 8)],
    "table2": [("iql", find_datasets("pen|door|kitchen"), ALL, 8)],
    "table4": [("td3bc", LOCOMOTION, "none synther gta-mu0.25-alpha1.1", 8)],
    "table5": [("td3bc", SUBOPTIMAL, "none synther gta-mu0.5-alpha1.3 gta-mu0.75-alpha1.3", 8)],
    "table10": [("td3bc", ["halfcheetah-medium"], HORIZONS, 4)],
    "table12": [("td3bc", SHARES, "none gta", 4)],
    "table13": [("dt", LOCOMOTION, "none s4rl gta", 4)],
    "table14": [("dt", find_datasets("maze2d"), "none s4rl gta", 4)],
}


def commands_of(learner, dataset, augmentation, num_seeds, args):
    """Yields the commands of a learner's run and of what it needs, each with its stage."""
    whole, _, share = dataset.partition("-0.")
    env = whole
    if "medium-replay" in whole or (args.d4rl and whole in LOCOMOTION):
        env = f"data/{whole}-v2"
        file = f"data/{whole.replace('-', '_')}-v2.hdf5"
        yield "d4rl", f"python data/make_dataset.py from-d4rl --file {file} --out {env}"
    if share:
        flags = f"--env {env} --fraction 0.{share}"
        env = f"data/{Path(env).name}-0.{share}"
        yield "parts", f"python data/make_dataset.py fraction {flags} --out {env}"
    path = f"{args.folder}/{Path(env).name}"
    buffer = f"{path}-{augmentation}.npz"
    flags = f"--env {env}"
    if augmentation == "s4rl":
        flags += " --s4rl-sigma 3e-4"
    elif augmentation == "synther":
        files = f"--checkpoint {path}-synther.pt --out {buffer}"
        yield "a", f"python baselines/synther.py --env {env} {files}"
        flags = f"--aug {buffer} --aug-only"
    elif augmentation != "none":
        changes = dict(re.findall(r"-([a-z]+)([\d.]+)", augmentation))
        setting = SETTINGS[whole]._replace(**changes)
        model = f"{path}-horizon{setting.horizon}.pt"
        yield "a", f"python gta_diffusion.py --env {env} --horizon {setting.horizon} --out {model}"
        given = {name: value for name, value in setting._asdict().items() if value != "-"}
        del given["horizon"]
        words = [f"--{name.replace('_', '-')} {value}" for name, value in given.items()]
        files = f"--checkpoint {model} --label {augmentation} --out {buffer}"
        yield "b", f"python gta_augment.py {' '.join(words)} {files}"
        flags = f"--aug {buffer}"
    name = f"{args.folder}/{learner}-{Path(env).name}-{augmentation}-{num_seeds}-agents"
    yield "c", f"python {learner}.py {flags} --num-seeds {num_seeds} --out {name}"


def list_commands(args):
    """Returns a table's commands by stage, none of them twice."""
    commands = {stage: {} for stage in STAGES}
    for learners, datasets, augmentations, num_seeds in TABLES[args.what]:
        for job in product(learners.split(), datasets, augmentations.split()):
            for stage, command in commands_of(*job, num_seeds, args):
                commands[stage][command] = None  # a dictionary keeps the order
    return {stage: list(commands[stage]) for stage in STAGES if args.stage in (None, stage)}


def main(args):
    if args.what == "settings":
        print(settings_table())
        return
    args.folder = shlex.quote(args.folder)
    for stage, commands in list_commands(args).items():
        print(f"stage {stage}: {len(commands)} commands", file=sys.stderr)
        sys.stdout.writelines(f"{command}\n" for command in commands)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
