# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.5", "numpy>=2", "gymnasium[mujoco]>=1", "mujoco<3.12", "h5py>=3",
#     "minari[create,hdf5]>=0.5.3", "stable-baselines3>=2.3", "tyro>=0.9"]
# ///
"""Make the bundled datasets: episodes of policies that were stopped short of an expert.

    python data/collect_sample.py                   HalfCheetah-v5, SAC: 13 minutes on one core
    python data/collect_sample.py --sample hopper   Hopper-v5, PPO: three minutes
    python data/collect_sample.py --sample replay   HalfCheetah-v5, all that SAC learned from

Writes data/halfcheetah-medium-sample/, hopper-medium-sample/ or halfcheetah-replay-sample/, Minari
datasets of whole episodes. This is the only file that needs stable-baselines3 and minari[create]:

    pip install "minari[create,hdf5]" "gymnasium[mujoco]" stable-baselines3 tyro
"""

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import h5py
import minari
import numpy as np
import tyro


@dataclass
class Args:
    sample: Literal["halfcheetah", "hopper", "replay"] = "halfcheetah"
    # folder to write; must not exist yet. Default: beside this file, the sample's name
    out: Path | None = None
    seed: int = 1  # of training and recording


# --- training ---


def train_sac(env, args, num_steps=100_000):
    """Trains SAC in env, and returns it."""
    from stable_baselines3 import SAC

    options = {"learning_starts": 2000, "train_freq": 2, "seed": args.seed, "device": "cpu"}
    return SAC("MlpPolicy", env, **options).learn(num_steps)


def train_ppo(args, num_steps=400_000):
    """Trains PPO in Hopper. Returns its policy: observation -> sampled action, clipped."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    envs = VecNormalize(make_vec_env("Hopper-v5", n_envs=8, seed=args.seed))
    options = {"n_steps": 512, "batch_size": 256, "policy_kwargs": {"net_arch": [64, 64]}}
    ppo = PPO("MlpPolicy", envs, **options, seed=args.seed, device="cpu").learn(num_steps)
    envs.training = False
    return lambda s: ppo.predict(envs.normalize_obs(s))[0]


# --- recording ---


class Float32(minari.StepDataCallback):
    """Stores observations in half the space."""

    def __call__(self, env, **step):
        step = super().__call__(env, **step)
        return {**step, "observation": step["observation"].astype(np.float32)}


class Recorder(minari.DataCollector):
    """Records episodes, each with a seed of its own, so that it can be replayed alone."""

    def __init__(self, env_id, seed):
        env = gym.make(env_id)
        space = gym.spaces.Box(-np.inf, np.inf, env.observation_space.shape, np.float32)
        super().__init__(env, Float32, observation_space=space)
        self.next_seed = seed * 1_000_000

    def reset(self, *, seed=None, options=None):
        seed = self.next_seed
        self.next_seed += 1
        return super().reset(seed=seed, options=options)


def record_episodes(env, policy, num_transitions):
    """Records whole episodes of a policy until they hold num_transitions."""
    transitions = 0
    while transitions < num_transitions:
        observation, _ = env.reset()
        done = False
        while not done:
            observation, _, terminated, truncated, _ = env.step(policy(observation))
            transitions += 1
            done = terminated or truncated


def record_halfcheetah(env, args):
    """Records the policy that SAC has learned elsewhere."""
    sac = train_sac(gym.make("HalfCheetah-v5"), args)
    record_episodes(env, lambda s: sac.predict(s)[0], 60_000)


def record_hopper(env, args):
    """Records the policy that PPO has learned elsewhere."""
    record_episodes(env, train_ppo(args), 40_000)


class Recording(NamedTuple):
    name: str
    env_id: str
    record: Callable
    algorithm: str
    references: tuple[float, float]  # D4RL's returns of a random policy and of an expert


STOPPED = "stopped short of expert, sampled stochastically"
HALFCHEETAH = (-280.178953, 12135.0)
HOPPER = (-20.272305, 3234.3)
SAMPLES = {
    "halfcheetah": Recording(
        "halfcheetah-medium-sample",
        "HalfCheetah-v5",
        record_halfcheetah,
        f"SAC, {STOPPED}",
        HALFCHEETAH,
    ),
    "hopper": Recording(
        "hopper-medium-sample", "Hopper-v5", record_hopper, f"PPO, {STOPPED}", HOPPER
    ),
    "replay": Recording(
        "halfcheetah-replay-sample",
        "HalfCheetah-v5",
        train_sac,  # in the environment that records
        "SAC, all that it learned from",
        HALFCHEETAH,
    ),
}


# --- output ---


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


def try_to_write(path):
    """Ends the program now if no file could be written at path when the work is done."""
    folder = Path(path).resolve().parent
    with or_exit(f"{path} cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def compact(storage):
    """Rewrites the HDF5 file compressed, each array as one chunk."""
    path = storage.data_path / "main_data.hdf5"
    compacted = path.with_suffix(".compact")
    options = {"compression": 9, "shuffle": True}
    # HDF5 1.10's format spends less on each of many small arrays
    with h5py.File(path) as source, h5py.File(compacted, "w", libver=("v110", "v110")) as target:

        def copy(name, item):
            if isinstance(item, h5py.Dataset):
                target.create_dataset(name, data=item[()], chunks=item.shape, **options)
            else:
                target.require_group(name).attrs.update(item.attrs)

        source.visititems(copy)
    compacted.replace(path)
    storage.update_metadata({"dataset_size": storage.get_size()})


def create_dataset(env, sample):
    """Returns what env has recorded, as a Minari dataset in the folder MINARI_DATASETS_PATH."""
    low, high = sample.references
    dataset = env.create_dataset(
        f"{sample.name}-v0",
        eval_env=sample.env_id,
        algorithm_name=sample.algorithm,
        author="GTA",
        author_email="none",
        code_permalink="data/collect_sample.py",
        description=f"{sample.env_id} episodes of {sample.algorithm}.",
        ref_min_score=low,
        ref_max_score=high,
        requirements=["gymnasium[mujoco]>=1.0"],
    )
    compact(dataset.storage)
    return dataset


def main(args):
    needed = ("stable_baselines3", "jax")  # jax: of minari[create]
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    advice = "pip install stable-baselines3 'minari[create,hdf5]'"
    require(not missing, f"{' and '.join(missing)} are missing: {advice}")
    sample = SAMPLES[args.sample]
    out = (args.out or Path(__file__).parent / sample.name).resolve()
    require(not out.exists(), f"{out} exists; remove it or choose another --out")
    try_to_write(out)
    with tempfile.TemporaryDirectory(dir=out.parent) as root:
        os.environ["MINARI_DATASETS_PATH"] = root
        env = Recorder(sample.env_id, args.seed)
        sample.record(env, args)
        dataset = create_dataset(env, sample)
        returns = np.array([e.rewards.sum() for e in dataset.iterate_episodes()])
        env.close()
        shutil.move(Path(root) / dataset.id, out)
    print(
        f"{len(returns)} episodes, {dataset.total_steps} transitions, "
        f"return {returns.mean():.0f} +- {returns.std():.0f}, "
        f"{returns.min():.0f} to {returns.max():.0f}"
    )
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"wrote {out} ({size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
