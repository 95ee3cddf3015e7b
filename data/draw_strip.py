# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=2", "matplotlib>=3.8", "gymnasium[mujoco]>=1", "mujoco<3.12",
#     "minari[hdf5,hf]>=0.5.4", "tyro>=0.9"]
# ///
"""Draws a film strip: a window of the dataset, and below it what was generated from it.

    python data/draw_strip.py --aug buffer.npz

Of the windows whose next-state error is below the median it takes the one that gains most true
reward. Reads a buffer of gta_augment.py and its dataset, writes a PNG (--out). It needs a renderer:
OSMesa (MUJOCO_GL=osmesa), a display (MUJOCO_GL=glfw), or EGL, which it takes by itself.
"""

import json
import os
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import tyro
from matplotlib.figure import Figure


@dataclass
class Args:
    aug: str = "buffer.npz"
    env: str | None = None  # Minari id, or folder of a Minari dataset; default: the buffer's
    every: int = 3  # steps from one picture to the next
    out: str = "strip.png"


def require(condition, message):
    """Ends the program with one line and exit code 1 unless the condition holds."""
    if not condition:
        sys.exit("error: " + " ".join(message.split()))


@contextmanager
def or_exit(message):
    """Ends the program with one line if what is inside fails by the user's data or machine."""
    try:
        yield
    except Exception as error:
        require(False, f"{message} ({error})")


def set_state(env, observation):
    """Puts MuJoCo into the state of a flattened observation. What it does not hold, the position
    in the world, is set to 0. Raises an error for an environment that it knows no way for."""
    if hasattr(env, "point_env"):  # PointMaze: achieved goal, desired goal, position, velocity
        env.goal = observation[2:4]
        env.point_env.set_state(observation[4:6], observation[6:8])
        return
    nq = env.model.nq
    nv = env.model.nv
    if hasattr(env, "observation_structure"):
        hidden = env.observation_structure.get("skipped_qpos", 0)
    else:  # version 4
        hidden = nq + nv - len(observation)
    assert 0 <= hidden <= 2, "how its observations make a state is not known"
    state = np.concatenate([np.zeros(hidden), observation])
    env.set_state(state[:nq], state[nq : nq + nv])


def read_dataset(name):
    """Opens a Minari dataset: a folder, here or beside this repository's scripts, or an id."""
    for folder in (Path(name), Path(__file__).resolve().parent.parent / name):
        if (folder / "data" / "metadata.json").is_file():
            return minari.MinariDataset(folder / "data")
    is_id = re.fullmatch(r"[\w/-]+-v\d+", name)
    require(is_id, f"--env {name}: no folder of a Minari dataset, no Minari id")
    return minari.load_dataset(name, download=True)


def make_renderer(dataset):
    """Makes the environment that was recorded, with a renderer, and a floor without squares."""
    camera = {"distance": 2.1, "elevation": -7.0, "lookat": np.array([0.0, 0.0, 0.5])}
    options = {"render_mode": "rgb_array", "width": 260, "height": 180}
    options["default_camera_config"] = camera
    env = gym.make(dataset.env_spec.id, **{**dataset.env_spec.kwargs, **options}).unwrapped
    env.reset(seed=0)
    floor = env.model.geom("floor")
    floor.matid = -1
    floor.rgba = [0.85, 0.85, 0.85, 1.0]
    floor.size = [40.0, 0.2, 1.0]
    env.model.light_castshadow[:] = False
    env.render()
    return env


def ask_mujoco(env, states, actions):
    """Returns the true rewards [H] and next states [H, obs_dim] of a window's transitions."""
    rewards = []
    next_states = []
    for state, action in zip(states, actions):
        set_state(env, state.astype(np.float64))
        s_next, reward, *_ = env.step(action)
        rewards.append(reward)
        next_states.append(s_next)
    return np.array(rewards), np.array(next_states)


def choose_window(env, buffer, source_rewards):
    """Returns the number of the window to draw, and the true rewards [N, H] of all."""
    s = buffer["observations"]
    std = s.std(axis=(0, 1)) + 1e-6
    rewards = []
    errors = []
    for states, actions in zip(s, buffer["actions"]):
        reward, s_next = ask_mujoco(env, states, actions)
        rewards.append(reward)
        errors.append(np.square((states[1:] - s_next) / std).mean())
    gains = (np.array(rewards) - source_rewards).sum(axis=1)
    gains[errors > np.median(errors)] = -np.inf
    return gains.argmax(), np.array(rewards)


def take_picture(env, state):
    """Returns a picture of a state [height, width, 3]."""
    set_state(env, state.astype(np.float64))
    return env.render()


def draw_strip(strips, steps):
    """Draws strips {title: pictures}, one below the other."""
    figure = Figure((1.6 * len(steps), 3.4), layout="constrained", facecolor="white")
    rows = figure.subfigures(len(strips), 1)
    for row, (title, pictures) in zip(rows, strips.items()):
        row.suptitle(title, x=0.01, ha="left", fontsize=11)
        for axes, picture, step in zip(row.subplots(1, len(steps)), pictures, steps):
            axes.imshow(picture)
            axes.set_axis_off()
            axes.set_title(f"step {step}", fontsize=8)
    return figure


def main(args):
    with or_exit(f"--aug {args.aug}: no buffer of gta_augment.py"):
        with np.load(args.aug, allow_pickle=False) as file:
            buffer = dict(file)
        metadata = json.loads(str(buffer["metadata"]))
        starts = list(zip(buffer["episode"], buffer["timestep"]))
        H = buffer["rewards"].shape[1]
    name = args.env or metadata["env"]
    with or_exit(f"--env {name} cannot be opened"):
        dataset = read_dataset(name)
    with or_exit("no renderer: see MUJOCO_GL"):
        os.environ.setdefault("MUJOCO_GL", "egl")
        env = make_renderer(dataset)

    episodes = list(dataset.iterate_episodes())
    source_rewards = np.array([episodes[i].rewards[t : t + H] for i, t in starts])
    window, rewards = choose_window(env, buffer, source_rewards)
    i, t = starts[window]
    steps = range(0, H + 1, args.every)
    states = {
        f"source: reward {source_rewards[window].mean():.2f} a step": episodes[i].observations[t:],
        f"generated: reward {rewards[window].mean():.2f} a step": buffer["observations"][window],
    }
    strips = {}
    for title, s in states.items():
        strips[title] = [take_picture(env, s[step]) for step in steps]
    env.close()
    with or_exit(f"{args.out} cannot be written"):
        draw_strip(strips, steps).savefig(args.out, dpi=110)
    print(f"wrote {args.out}: window {window} of {args.aug}, from step {t} of episode {i}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
