# /// script
# requires-python = ">=3.11"
# dependencies = ["matplotlib>=3.8", "tyro>=0.9"]
# ///
"""Draws the map of mu and alpha: true gain against next-state error of the settings tried.

    python data/draw_map.py

Reads data/figures/search.csv: each row is 100 windows of the bundled HalfCheetah data, generated
from sources of 3.95 a step. gain: MuJoCo's reward over theirs, per cent; error: of the next state,
the mean that metrics.py prints. Writes data/figures/map.png (--out).
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib.figure import Figure

FIGURES = Path(__file__).resolve().parent / "figures"
COLOURS = {"0.15": "C4", "0.25": "C0", "0.35": "C2", "0.5": "C1", "0.75": "C5", "1": "C3"}  # of mu


@dataclass
class Args:
    search: Path = FIGURES / "search.csv"
    out: Path = FIGURES / "map.png"


def has_right_neighbour(row, rows):
    """Says whether another setting's dot stands where the text right of this one would."""
    for other in rows:
        right = math.log(float(other["error"]) / float(row["error"]))
        above = math.log(float(other["gain"]) / float(row["gain"]))
        if other is not row and 0 <= right < 0.15 and abs(above) < 0.05:
            return True
    return False


def draw_settings(rows, axes):
    """Draws settings as dots of error and gain, with alpha and w beside them."""
    for row in rows:
        place = (float(row["error"]), float(row["gain"]))
        axes.scatter(*place, s=22, color=COLOURS[row["mu"]])
        side = {"xytext": (5, -2), "ha": "left"}
        if has_right_neighbour(row, rows):
            side = {"xytext": (-5, -2), "ha": "right"}
        text = f"{row['alpha']}, {row['w']}"
        axes.annotate(text, place, textcoords="offset points", fontsize=6.5, **side)
    axes.set(xscale="log", yscale="log", xlim=(0.02, 0.65), xlabel="error of the next state")
    axes.minorticks_off()
    axes.set_xticks([0.02, 0.05, 0.1, 0.2, 0.5])
    axes.set_yticks([0.5, 1, 2, 5, 10, 20, 50, 100])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")


def main(args):
    with args.search.open() as file:
        rows = list(csv.DictReader(file))
    figure = Figure((9.5, 6.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True, width_ratios=(2, 5))
    for axes, gamma in zip(panels, ("gamma 0.99", "gamma 0.95")):
        draw_settings([row for row in rows if row["stage_a"].startswith(gamma)], axes)
        axes.set_title(f"stage A with {gamma}", fontsize=10)
    panels[0].set_ylabel("gain of true reward, %")
    for mu, colour in COLOURS.items():
        panels[1].scatter([], [], s=22, color=colour, label=f"mu {mu}")
    panels[1].legend(title="beside a dot: alpha, w", loc="lower right", fontsize=8)
    figure.savefig(args.out, dpi=110)
    print(f"wrote {args.out}: {len(rows)} settings")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
