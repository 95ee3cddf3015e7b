# /// script
# requires-python = ">=3.11"
# dependencies = ["torch", "numpy", "gymnasium[mujoco]", "h5py", "minari[create,hdf5]",
#     "stable-baselines3", "tyro"]
# ///
"""Make the two bundled datasets: policies stopped well short of an expert, sampled stochastically.

    python data/collect_sample.py                   HalfCheetah-v5, SAC: 13 minutes on one core
    python data/collect_sample.py --sample hopper   Hopper-v5, PPO: three minutes

Writes data/halfcheetah-medium-sample/ or data/hopper-medium-sample/, Minari datasets of whole
episodes. This is the only file that needs stable-baselines3 and minari[create]:

    pip install "minari[create,hdf5]" "gymnasium[mujoco]" stable-baselines3 tyro
"""

import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import h5py
import minari
import numpy as np
import tyro


@dataclass
class Args:
    sample: Literal["halfcheetah", "hopper"] = "halfcheetah"
    # folder to write; must not exist yet. Default: beside this file, the sample's name
    out: Path | None = None
    seed: int = 1  # of training and recording


def train_sac(args):
    """HalfCheetah, 100 000 steps. Returns the policy: observation -> sampled action."""
    from stable_baselines3 import SAC

    options = {"learning_starts": 2000, "train_freq": 2, "seed": args.seed, "device": "cpu"}
    sac = SAC("MlpPolicy", gym.make("HalfCheetah-v5"), **options)
    sac.learn(100_000)
    return lambda s: sac.predict(s)[0]


def train_ppo(args):
    """Hopper, 400 000 steps. Returns the policy: observation -> sampled action."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    envs = VecNormalize(make_vec_env("Hopper-v5", n_envs=8, seed=args.seed))
    options = {"n_steps": 512, "batch_size": 256, "policy_kwargs": {"net_arch": [64, 64]}}
    ppo = PPO("MlpPolicy", envs, **options, seed=args.seed, device="cpu")
    ppo.learn(400_000)
    envs.training = False
    return lambda s: ppo.predict(envs.normalize_obs(s))[0]  # clipped


SAMPLES = {  # environment, algorithm, what trains it, transitions, D4RL's reference returns
    "halfcheetah": ("HalfCheetah-v5", "SAC", train_sac, 60_000, (-280.178953, 12135.0)),
    "hopper": ("Hopper-v5", "PPO", train_ppo, 40_000, (-20.272305, 3234.3)),
}


class Float32(minari.StepDataCallback):
    """Stores observations in half the space."""

    def __call__(self, env, **step):
        step = super().__call__(env, **step)
        return {**step, "observation": step["observation"].astype(np.float32)}


def record_episodes(args, name, policy, num_transitions):
    """Records whole episodes until they hold num_transitions. Returns the collector and the
    returns [E]."""
    env = gym.make(name)
    space = gym.spaces.Box(-np.inf, np.inf, env.observation_space.shape, np.float32)
    env = minari.DataCollector(env, Float32, observation_space=space)
    returns, transitions = [], 0
    while transitions < num_transitions:
        # one seed per episode: an episode can be replayed alone
        observation, _ = env.reset(seed=args.seed * 1_000_000 + len(returns))
        episode_return, done = 0.0, False
        while not done:
            observation, reward, terminated, truncated, _ = env.step(policy(observation))
            episode_return += reward
            transitions += 1
            done = terminated or truncated
        returns.append(episode_return)
    return env, np.array(returns)


def compact(storage):
    """Rewrites the HDF5 file without the slack of its resizable chunks, a fifth of its size."""
    path = storage.data_path / "main_data.hdf5"
    compacted = path.with_suffix(".compact")
    with h5py.File(path) as source, h5py.File(compacted, "w") as target:

        def copy(name, item):
            if isinstance(item, h5py.Dataset):
                target.create_dataset(name, data=item[()])
            else:
                target.require_group(name).attrs.update(item.attrs)

        source.visititems(copy)
    compacted.replace(path)
    storage.update_metadata({"dataset_size": storage.get_size()})


def main(args):
    name, algorithm, train, num_transitions, references = SAMPLES[args.sample]
    out = args.out or Path(__file__).parent / f"{args.sample}-medium-sample"
    if out.exists():
        sys.exit(f"error: {out} exists; remove it or choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    policy = train(args)
    with tempfile.TemporaryDirectory(dir=out.parent) as root:
        os.environ["MINARI_DATASETS_PATH"] = root
        env, returns = record_episodes(args, name, policy, num_transitions)
        dataset = env.create_dataset(
            f"{args.sample}-medium-sample-v0",
            eval_env=name,
            algorithm_name=f"{algorithm}, stopped short of expert, sampled stochastically",
            author="GTA",
            author_email="none",
            code_permalink="data/collect_sample.py",
            description=f"{name} episodes of a {algorithm} policy stopped short of expert.",
            ref_min_score=references[0],
            ref_max_score=references[1],
            requirements=["gymnasium[mujoco]>=1.0"],
        )
        print(
            f"{dataset.total_episodes} episodes, {dataset.total_steps} transitions, "
            f"return {returns.mean():.0f} +- {returns.std():.0f}, "
            f"{returns.min():.0f} to {returns.max():.0f}"
        )
        env.close()
        compact(dataset.storage)
        shutil.move(Path(root) / dataset.id, out)
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    print(f"wrote {out} ({size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
