# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch",
#     "numpy",
#     "gymnasium[mujoco]",
#     "h5py",
#     "minari[create,hdf5]",
#     "stable-baselines3",
#     "tyro",
# ]
# ///
"""Make `hopper-medium-sample`, the small dataset that every script uses when no --env is given.

PPO learns Hopper-v5 and is stopped well short of an expert. Its stochastic policy is then recorded
until the dataset holds enough transitions, always in whole episodes. About three minutes on two
cores.

    python data/collect_sample.py

Writes: data/hopper-medium-sample/ (a Minari dataset; an existing one is left alone)

This is the only file that needs stable-baselines3 and minari[create]:

    pip install "minari[create,hdf5]" "gymnasium[mujoco]" stable-baselines3 tyro
"""

import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import tyro

# D4RL's reference returns of Hopper: a random policy and an expert.
REF_MIN_SCORE, REF_MAX_SCORE = -20.272305, 3234.3


@dataclass
class Args:
    # folder to write; must not exist yet
    out: Path = Path(__file__).parent / "hopper-medium-sample"
    dataset_id: str = "hopper-medium-sample-v0"  # Minari id stored in the metadata
    env_id: str = "Hopper-v5"  # Gymnasium environment
    train_steps: int = 400_000  # environment steps of PPO before recording
    # stop recording after the episode that reaches this many transitions
    num_transitions: int = 40_000
    seed: int = 1  # seed of training and recording


def train_ppo(args):
    """Returns the policy and the running mean and variance of its observations."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    envs = VecNormalize(make_vec_env(args.env_id, n_envs=8, seed=args.seed))
    ppo = PPO(
        "MlpPolicy",
        envs,
        n_steps=512,
        batch_size=256,
        gae_lambda=0.95,
        policy_kwargs={"net_arch": [64, 64]},
        seed=args.seed,
        device="cpu",
    )
    ppo.learn(args.train_steps)
    envs.training = False
    return ppo, envs.normalize_obs


def record_episodes(args, ppo, normalize_obs):
    """Records whole episodes of the sampled policy. Returns the collector and the returns [E]."""
    import minari

    env = minari.DataCollector(gym.make(args.env_id))
    returns, transitions = [], 0
    while transitions < args.num_transitions:
        # one seed per episode: an episode can be replayed alone
        observation, _ = env.reset(seed=args.seed * 1_000_000 + len(returns))
        episode_return, done = 0.0, False
        while not done:
            action, _ = ppo.predict(normalize_obs(observation), deterministic=False)  # clipped
            observation, reward, terminated, truncated, _ = env.step(action)
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
    if args.out.exists():
        sys.exit(f"error: {args.out} exists; remove it or choose another --out")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    ppo, normalize_obs = train_ppo(args)
    with tempfile.TemporaryDirectory(dir=args.out.parent) as root:
        os.environ["MINARI_DATASETS_PATH"] = root
        env, returns = record_episodes(args, ppo, normalize_obs)
        dataset = env.create_dataset(
            args.dataset_id,
            eval_env=args.env_id,
            algorithm_name=f"PPO, {args.train_steps} steps, sampled stochastically",
            author="GTA",
            author_email="none",
            code_permalink="data/collect_sample.py",
            description=f"{args.env_id} episodes of a PPO policy stopped short of expert.",
            ref_min_score=REF_MIN_SCORE,
            ref_max_score=REF_MAX_SCORE,
            requirements=["gymnasium[mujoco]>=1.0"],
        )
        print(
            f"{dataset.total_episodes} episodes, {dataset.total_steps} transitions, "
            f"return {returns.mean():.0f} +- {returns.std():.0f}, "
            f"{returns.min():.0f} to {returns.max():.0f}"
        )
        env.close()
        compact(dataset.storage)
        shutil.move(Path(root) / args.dataset_id, args.out)
    size = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file())
    print(f"wrote {args.out} ({size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main(tyro.cli(Args))
