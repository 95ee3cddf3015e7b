# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.5", "numpy>=2", "h5py>=3", "gymnasium>=1", "minari[hdf5]>=0.5.3",
#     "dm_control>=1.0.20", "tyro>=0.9", "tqdm", "wandb"]
# ///
"""DrQ+BC on V-D4RL's images (Lu et al., 2023), and GTA on its latents (Table 3, appendix C.4).

    python baselines/drqbc.py train --data vd4rl/walker_walk/medium --out runs/walker
    python baselines/drqbc.py encode --run runs/walker --out data/walker-latents
    python gta_diffusion.py --env data/walker-latents
    python gta_augment.py --mu 0.1 --alpha 2.0 --reweight-bins 50
    python baselines/drqbc.py finetune --run runs/walker --aug buffer.npz

`train` learns encoder, policy and Q. `encode` writes latents, what the trunks of policy and Q see,
as a Minari dataset. `finetune` trains the heads of policy and Q on, on real and generated latents.

Reads a folder of V-D4RL, or a run of this script and buffer.npz. Writes runs/<name>/ as the other
learners do, or a dataset folder. Frames are rendered without a screen by MUJOCO_GL=egl.
"""

import copy
import json
import math
import os
import re
import sys
import tempfile
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

import gymnasium as gym
import h5py
import minari
import numpy as np
import torch
import tyro
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage
from torch import nn
from tqdm import tqdm


@dataclass
class Args:
    """What train and finetune share."""

    # --- DrQ+BC ---
    lr: float = 3e-4  # learning rate of Adam
    discount: float = 0.99  # discount factor
    tau: float = 0.01  # step of the target network towards the trained one
    std_steps: int = 125_000  # gradient steps in which the policy's noise falls from 1 to 0.1
    alpha: float = 2.5  # weight of Q against imitation
    # --- run ---
    batch_size: int = 256  # transitions in a batch
    eval_every: int = 50_000  # updates between evaluations, each of which writes a checkpoint
    eval_episodes: int = 10  # episodes of an evaluation; 0: none, and no renderer
    # folder to write, or to go on with. Default: runs/drqbc-<data>-<augmentation>-<seed>-<time>
    out: str | None = None
    seed: int = 0  # seed of weights, batches, noise and evaluation episodes
    # CUDA_VISIBLE_DEVICES picks the card
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    track: bool = False  # log to Weights & Biases; WANDB_PROJECT and WANDB_ENTITY say where
    # no flags; config.json holds them, as that of the other learners does
    env: str | None = field(default=None, init=False)  # folder of V-D4RL, which names the results
    num_seeds: int = field(default=1, init=False)  # agents


@dataclass(kw_only=True)
class Train(Args):
    """Trains encoder, policy and Q on images."""

    data: str  # V-D4RL's folder of .hdf5 or .npz, or above its 84px
    # of dm_control, two of its steps a frame. Default: the one that --data names
    task: Literal["walker_walk", "cheetah_run", "humanoid_walk"] | None = None
    n_step: int = 3  # rewards until the target's bootstrap
    train_steps: int = 550_000  # gradient steps (V-D4RL: 1.1 M, one update in two)


@dataclass
class Encode:
    """Writes the latents of a run's images as a folder that --env takes."""

    run: str  # folder of a run of train
    out: str  # folder to write
    data: str | None = None  # folder of V-D4RL. Default: what the run was trained on
    # CUDA_VISIBLE_DEVICES picks the card
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(kw_only=True)
class Finetune(Args):
    """Trains the heads of policy and Q on, on latents. Targets look one step ahead."""

    run: str  # folder of the run of train whose latents they are
    aug: str | None = None  # buffer.npz to train on, too
    # folder that encode has written; alone it is the control. Default: what --aug was made from
    data: str | None = None
    train_steps: int = 300_000  # gradient steps (GTA, C.4)


# --- networks ---

SIZE = 84  # pixels
FEATURES = 50  # of a trunk; a latent is those of the actor's and of the critic's


def init(layer):
    """Initialises a layer as DrQ-v2 does: orthogonal weights, no biases."""
    if isinstance(layer, (nn.Linear, nn.Conv2d)):
        nn.init.orthogonal_(layer.weight, math.sqrt(2) if isinstance(layer, nn.Conv2d) else 1.0)
        nn.init.zeros_(layer.bias)


def make_encoder():
    layers = [nn.Conv2d(9, 32, 3, stride=2), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Conv2d(32, 32, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten())


def make_trunk():
    return nn.Sequential(nn.Linear(39_200, FEATURES), nn.LayerNorm(FEATURES), nn.Tanh())


def make_head(d_in, d_out, hidden=1024):
    layers = [nn.Linear(d_in, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, d_out))


# --- DrQ+BC ---


class DrQBC(nn.Module):
    """Policy and twin Q, each a head on a trunk on the encoder. In place of images all functions
    take latents [B, 100], what the trunks see: then only the heads are in use."""

    def __init__(self, args, act_dim):
        super().__init__()
        self.args = args
        d_in = FEATURES + act_dim
        self.encoder = make_encoder()
        self.actor = nn.ModuleList([make_trunk(), make_head(FEATURES, act_dim)])
        self.critic = nn.ModuleList([make_trunk(), make_head(d_in, 1), make_head(d_in, 1)])
        self.apply(init)
        self.critic_target = copy.deepcopy(self.critic)
        self.step = nn.Buffer(torch.zeros(()))  # gradient steps

    def encode(self, s):
        """uint8 [B, 9, 84, 84] -> [B, 39 200]; a latent stays what it is."""
        return s if s.dim() == 2 else self.encoder(s / 255 - 0.5)

    def latents(self, s):
        """Returns what the trunks see. uint8 [B, 9, 84, 84] -> [B, 100]"""
        x = self.encode(s)
        return torch.cat([self.actor[0](x), self.critic[0](x)], dim=1)

    def policy(self, x):
        """Returns the mean action. [B, 39 200], or latents -> [B, act_dim]"""
        trunk, head = self.actor
        return head(x[:, :FEATURES] if x.shape[1] == 2 * FEATURES else trunk(x)).tanh()

    def act(self, s):
        """What the environment takes at the last three frames. [B, 9, 84, 84] -> [B, act_dim]"""
        return self.policy(self.encode(s))

    def q(self, x, a, critic):
        """Returns Q_1 and Q_2. [B, 39 200], or latents, and [B, act_dim] -> [2, B]"""
        trunk, *heads = critic
        h = x[:, FEATURES:] if x.shape[1] == 2 * FEATURES else trunk(x)
        return torch.stack([head(torch.cat([h, a], dim=1)) for head in heads]).squeeze(-1)

    def sample(self, x, noise_clip=0.3, eps=1e-6):
        """Returns an action of the noisy policy, cut off at its bounds; the gradient passes."""
        mu = self.policy(x)
        std = 1 - 0.9 * (self.step / self.args.std_steps).clamp(max=1)
        a = mu + (std * torch.randn_like(mu)).clamp(-noise_clip, noise_clip)
        return a + (a.clamp(eps - 1, 1 - eps) - a).detach()

    def critic_loss(self, x, a, r, discount, x_next):
        """Clipped double Q-learning over n steps; r and discount are of all of them."""
        with torch.no_grad():
            q_next = self.q(x_next, self.sample(x_next), self.critic_target)
            target = r + discount * q_next.amin(0)
        return (self.q(x, a, self.critic) - target).square().mean(-1).sum()

    def actor_loss(self, x, a):
        """-lambda min Q(s, pi) + (pi - a)^2, lambda = alpha / mean |Q|, as TD3+BC's eq. 5."""
        pi = self.sample(x)
        q = self.q(x, pi, self.critic).amin(0)
        lmbda = self.args.alpha / q.abs().mean().detach()
        return -lmbda * q.mean() + (pi - a).square().mean()


def descend(optimizer, loss):
    """Takes a step on the loss, which may also reach networks of other optimizers. Returns it."""
    optimizer.zero_grad()
    loss.backward(inputs=[p for group in optimizer.param_groups for p in group["params"]])
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def polyak(target, network, tau):
    """Moves the target's weights by the share tau towards the network's."""
    torch._foreach_lerp_(list(target.parameters()), list(network.parameters()), tau)


def update(agent, optimizers, draw_batch):
    """One step of encoder and critic, then one of the actor, on the same batch."""
    s, a, r, discount, s_next = draw_batch()
    x = agent.encode(s)
    with torch.no_grad():
        x_next = agent.encode(s_next)
    critic_loss = descend(optimizers["critic"], agent.critic_loss(x, a, r, discount, x_next))
    actor_loss = descend(optimizers["actor"], agent.actor_loss(x.detach(), a))
    polyak(agent.critic_target, agent.critic, agent.args.tau)
    agent.step += 1
    return {"critic_loss": critic_loss, "actor_loss": actor_loss}


def make_optimizers(agent, args):
    """Only the critic's loss trains the encoder. On latents only the heads have gradients."""
    parts = {"critic": nn.ModuleList([agent.critic, agent.encoder]), "actor": agent.actor}
    adam = partial(torch.optim.Adam, lr=args.lr, fused=True, capturable=True)
    return {key: adam(own.parameters()) for key, own in parts.items()}


# --- what the user gives ---


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


MAY_BE_NEGATIVE = (
    "reward_bias",
    "min_gap",
    "target_gap",
    "target_return",
    "source_min_return",
    "p_mean",
)
MAY_BE_ZERO = ("seed", "eval_episodes", "warmup_steps", "reweight_bins")  # of the integers


def check_flags(args):
    """Ends the program if a flag is an empty text, NaN, a negative number, or a size of 0."""
    for name, value in asdict(args).items():
        flag = f"--{name.replace('_', '-')}"
        require(value != "", f"{flag} is empty")
        require(value == value, f"{flag} is not a number")
        if type(value) in (int, float) and name not in MAY_BE_NEGATIVE:
            least = 1 if type(value) is int and name not in MAY_BE_ZERO else 0
            require(value >= least, f"{flag} {value}: must be at least {least}")
        if name == "seed":
            require(value < 2**32, f"{flag} {value}: must be less than 2**32")
    require(args.device == "cpu" or torch.cuda.is_available(), "--device cuda: there is no GPU")


# --- images ---


class Frames(NamedTuple):
    """V-D4RL's arrays, R rows: one episode after the other. A row's action and reward led to it."""

    observation: torch.Tensor  # uint8 [R, 3, 84, 84]
    action: torch.Tensor  # [R, act_dim]
    reward: torch.Tensor  # [R]
    discount: torch.Tensor  # [R] 0: a terminal
    step_type: torch.Tensor  # [R] 0: an episode's first


def read_file(path):
    """Returns the arrays of a file of V-D4RL, in the order of Frames."""
    open_file = np.load if path.suffix == ".npz" else h5py.File
    with or_exit(f"--data {path}: no file of V-D4RL"), open_file(path, "r") as file:
        images = file["observation"][:]
        numbers = [file[key][:].astype(np.float32) for key in Frames._fields[1:]]
    R = len(images)
    needed = [(R, 3, SIZE, SIZE), (R, numbers[0].shape[-1]), (R,), (R,), (R,)]
    shapes = [x.shape for x in (images, *numbers)]
    is_right = R > 0 and images.dtype == np.uint8 and shapes == needed
    require(is_right, f"--data {path}: {shapes}, not uint8 images of 3 x {SIZE} x {SIZE}")
    require(all(np.isfinite(x).all() for x in numbers), f"--data {path} holds NaN")
    require(numbers[-1][0] == 0, f"--data {path} begins within an episode")
    return images, *numbers


def read_frames(folder):
    """Returns what V-D4RL's files in the folder, or in its 84px, hold."""
    paths = sorted(Path(folder).glob("84px/*")) or sorted(Path(folder).glob("*"))
    paths = [path for path in paths if path.suffix in (".hdf5", ".npz")]
    require(paths, f"--data {folder}: no folder with .hdf5 files of V-D4RL")
    parts = [read_file(path) for path in paths]
    with or_exit(f"--data {folder}: its files do not fit together"):
        frames = Frames(*(torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts)))
    num_episodes = (frames.step_type == 0).sum()
    print(f"dataset: {folder}, {num_episodes} episodes, {len(frames.reward)} frames")
    return frames


def find_episodes(step_type):
    """Returns the first and the last row of the episode that a row belongs to. [R] -> [R], [R]"""
    starts = torch.nonzero(step_type == 0).squeeze(1)
    lengths = torch.diff(starts, append=torch.tensor([len(step_type)]))
    first = starts.repeat_interleave(lengths)
    return first, first + lengths.repeat_interleave(lengths) - 1


def stack(row, first):
    """Returns the rows of a state's frames, oldest first; at the start it is the first thrice.
    [M] -> [M, 3]"""
    return torch.maximum(row[:, None] - torch.tensor([2, 1, 0]), first[:, None])


def n_step_transitions(frames, n_step, discount):
    """Returns transitions of n steps: the rows of the frames of s [M, 3], a [M, act_dim], the sum
    of gamma^j r_j [M], gamma^n times what s' counts [M], the rows of the frames of s' [M, 3]."""
    first, last = find_episodes(frames.step_type)
    row = torch.arange(len(first))  # where the action's frame is: s is the row before
    row = row[(row > first) & (row + n_step - 1 <= last)]
    rewards = frames.reward[row[:, None] + torch.arange(n_step)]
    R_n = (rewards * discount ** torch.arange(n_step)).sum(1)
    end = row + n_step - 1
    s = stack(row - 1, first[row])
    s_next = stack(end, first[row])
    return s, frames.action[row], R_n, discount**n_step * frames.discount[end], s_next


def random_shift(images, pad=4):
    """Moves every image by up to pad pixels, its border repeated. [B, C, 84, 84] DrQ-v2 resamples
    it bilinearly at whole pixels, which is the same to rounding."""
    B, size = len(images), images.shape[-1]
    shift = torch.randint(-pad, pad + 1, (2, B, 1), device=images.device)
    rows, columns = (shift + torch.arange(size, device=images.device)).clamp(0, size - 1)
    image = torch.arange(B, device=images.device)[:, None, None]
    return images[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def draw(transitions, args):
    """Returns a batch of transitions, arrays [M, ...] on the device, drawn uniformly."""
    index = torch.randint(len(transitions[0]), (args.batch_size,), device=args.device)
    return [x[index] for x in transitions]


def make_image_sampler(frames, args):
    """Returns a function that draws a batch of s, a, r, discount, s', the states shifted images."""
    transitions = n_step_transitions(frames, args.n_step, args.discount)
    require(len(transitions[0]), f"--data: no episode is longer than --n-step {args.n_step}")
    transitions = [x.to(args.device) for x in transitions]
    images = frames.observation.to(args.device)

    def draw_batch():
        rows, a, r, discount, next_rows = draw(transitions, args)
        s = random_shift(images[rows].flatten(1, 2))
        s_next = random_shift(images[next_rows].flatten(1, 2))
        return s, a, r, discount, s_next

    return draw_batch


# --- latents ---


class Episode(NamedTuple):
    observations: np.ndarray  # [T + 1, obs_dim]
    actions: np.ndarray  # [T, act_dim]
    rewards: np.ndarray  # [T], float64: a sum of float16 overflows
    terminals: np.ndarray  # [T] whether the environment terminated; a truncation is no terminal


class Buffer(NamedTuple):
    """What buffer.npz holds: N windows of H transitions, and where they come from."""

    metadata: dict
    observations: np.ndarray  # [N, H + 1, obs_dim]
    actions: np.ndarray  # [N, H, act_dim]
    rewards: np.ndarray  # [N, H]
    terminals: np.ndarray  # [N, H]
    episode: np.ndarray | None = None  # [N] source episode; a buffer of your own has no source
    timestep: np.ndarray | None = None  # [N] the window's first step in it
    return_to_go: np.ndarray | None = None  # [N] of the source from that step on, undiscounted
    condition: np.ndarray | None = None  # [N] the return that was asked for


class Transitions(NamedTuple):
    s: np.ndarray  # [N, obs_dim]
    a: np.ndarray  # [N, act_dim]
    r: np.ndarray  # [N]
    s_next: np.ndarray  # [N, obs_dim]
    terminal: np.ndarray  # [N]


@torch.no_grad()
def encode_episodes(agent, frames, chunk=256):
    """Returns the episodes as Minari stores them, their observations latents [T + 1, 100]."""
    first, last = find_episodes(frames.step_type)
    episodes = []
    for start in first.unique():
        row = torch.arange(start, last[start] + 1)
        s = frames.observation[stack(row, first[row])].flatten(1, 2)  # [T + 1, 9, 84, 84]
        z = torch.cat([agent.latents(x.to(agent.step.device)).cpu() for x in s.split(chunk)])
        row = row[1:]
        episode = EpisodeBuffer(
            observations=z.numpy(),
            actions=frames.action[row].numpy(),
            rewards=frames.reward[row].numpy(),
            terminations=(frames.discount[row] == 0).numpy(),
            truncations=(row == last[start]).numpy(),
        )
        episodes.append(episode)
    return episodes


def count_transitions(episodes):
    """Returns how many transitions the episodes have together."""
    return sum(len(episode) for episode in episodes)


def try_size(path, episodes, environment):
    """Writes zeros, for a moment, as many as the episodes will take at most. HDF5 itself answers a
    full disk with a crash."""
    _, observation_space, action_space = environment
    width = gym.spaces.flatdim(observation_space) + gym.spaces.flatdim(action_space) + 2
    size = 9 * width * count_transitions(episodes) + 2**15 * len(episodes)  # measured: less
    with open(path, "wb") as file:
        for _ in range(0, size, 2**20):
            file.write(bytes(2**20))
    path.unlink()


def name_latents(agent):
    """Returns what the Minari id of an agent's latents begins with: other weights, another id."""
    return f"{agent.args.task.replace('_', '-')}-latents-{model_crc(agent):08x}-"


def write_latents(out, dataset_id, episodes):
    """Writes a folder with a Minari dataset of the episodes, all or nothing."""
    states = gym.spaces.Box(-1, 1, episodes[0].observations.shape[1:])
    actions = gym.spaces.Box(-1, 1, episodes[0].actions.shape[1:])
    with (
        or_exit(f"{out} cannot be written"),
        tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder,
    ):
        data = Path(folder) / "new" / "data"
        data.parent.mkdir()
        try_size(Path(folder) / "zeros", episodes, (None, states, actions))
        storage = MinariStorage.new(data, states, actions)
        storage.update_metadata({"dataset_id": dataset_id, "minari_version": minari.__version__})
        storage.update_episodes(episodes)
        os.rename(data.parent, out)
    print(f"wrote {out}: {dataset_id}, {count_transitions(episodes)} transitions")


def read_latents(folder):
    """Returns the Minari id and the episodes of a folder that encode has written."""
    episodes = []
    with or_exit(f"--data {folder}: no folder that encode has written"):
        dataset = minari.MinariDataset(Path(folder) / "data")
        for e in dataset.iterate_episodes():
            r = e.rewards.astype(np.float64)
            episodes.append(Episode(e.observations, e.actions, r, e.terminations))
    return dataset.id, episodes


def read_buffer(path):
    """Returns the buffer at path, of gta_augment.py or a program of your own."""
    with or_exit(f"--aug {path}: no buffer of gta_augment.py"):
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in Buffer._fields if key in file}
        metadata = json.loads(str(arrays.pop("metadata")))
        buffer = Buffer(metadata, **arrays)
        metadata["label"] = metadata.get("label") or metadata.get("method") or Path(path).stem
        found = (metadata["format"], metadata["format_version"])
    require(found == ("gta-buffer", 1), f"--aug {path}: {found}, not version 1 of gta-buffer")
    finite = all(np.isfinite(x).all() for x in arrays.values())
    require(finite, f"--aug {path} holds NaN or infinite numbers")
    return buffer


def checksum(arrays):
    """Returns a CRC of what the arrays hold: an input is that, not the name of its file."""
    crc = 0
    for array in arrays:
        crc = zlib.crc32(np.ascontiguousarray(array), crc)
    return crc


def require_made_from(flag, metadata, inputs):
    """Ends the program if the buffer that a flag names was made from other data than inputs."""
    for key, value in inputs.items():
        found = metadata.get(key, value)  # a buffer of your own may lack it
        require(found == value, f"{flag} was made from {key} {found}, not from {value}")


def model_crc(agent):
    """Returns a CRC of the agent's weights."""
    return checksum(x.cpu().numpy() for x in agent.state_dict().values())


def identify_latents(args, agent, dataset_id, episodes, buffer):
    """Returns what tells these data from others, for config.json. Ends the program if the latents
    are another network's, or the buffer was made from others."""
    name = name_latents(agent)
    require(dataset_id.startswith(name), f"--data {args.data}: {dataset_id}, not this run's {name}")
    inputs = {
        "model_crc": model_crc(agent),
        "dataset_ids": [dataset_id],
        "dataset_crc": checksum(x for episode in episodes for x in episode),
    }
    label = "none"
    if buffer:
        require_made_from(f"--aug {args.aug}", buffer.metadata, inputs)
        inputs["buffer_crc"] = checksum(x for x in buffer[1:] if x is not None)
        label = buffer.metadata["label"]
    inputs["aug_label"] = f"latents, {label}"
    return inputs


def concatenate_windows(parts, num_dropped):
    """Returns each field, joined over all parts: their windows [N, H, ...] become rows, of which
    the first num_dropped are left out."""
    fields = []
    with or_exit("states or actions of the datasets, or of --aug, differ in size"):
        for windows in zip(*parts):
            flat = [x.reshape(-1, *x.shape[2:]) for x in windows]
            fields.append(np.concatenate(flat, dtype=np.float32)[num_dropped:])
    lengths = {len(field) for field in fields}
    require(
        len(lengths) == 1 and 0 not in lengths, f"arrays have lengths {lengths}, which do not fit"
    )
    return fields


def make_transitions(episodes, buffer, aug_only=False):
    """Returns the transitions of the episodes, unless the buffer's alone are wanted, and those of
    the buffer's windows."""
    parts = []  # windows [N, H, ...], no copies; an episode is one window
    for s, a, r, terminal in episodes:
        parts.append(Transitions(s[None, :-1], a[None], r[None], s[None, 1:], terminal[None]))
    if buffer:
        s = buffer.observations
        parts.append(
            Transitions(s[:, :-1], buffer.actions, buffer.rewards, s[:, 1:], buffer.terminals)
        )
    num_dropped = 0
    if aug_only:  # the episodes were only there for the check of sizes
        num_dropped = sum(len(episode.rewards) for episode in episodes)
    return Transitions(*concatenate_windows(parts, num_dropped))


def make_latent_sampler(episodes, buffer, args):
    """Returns a function that draws a batch of s, a, r, discount, s', the states latents."""
    transitions = make_transitions(episodes, buffer)
    s, a, r, s_next, terminal = (torch.from_numpy(x).to(args.device) for x in transitions)
    return partial(draw, (s, a, r, args.discount * (1 - terminal), s_next), args)


# --- evaluation ---


def make_env(task, agent):
    """Returns dm_control's environment, or says what a machine without a screen needs."""
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")
    lacks = "on Debian: apt install libegl1 libegl-mesa0 libgl1-mesa-dri; or --eval-episodes 0"
    with or_exit(f"cannot render {task}, MUJOCO_GL={os.getenv('MUJOCO_GL')}; {lacks}"):
        from dm_control import suite

        env = suite.load(*task.split("_", 1), visualize_reward=False)
        env.reset()
        take_frame(env)
    same = env.action_spec().shape == agent.actor[1][-1].bias.shape
    require(same, f"--task {task} takes other actions than the data hold")
    return env


def take_frame(env):
    """Returns one frame. uint8 [3, 84, 84]"""
    return env.physics.render(SIZE, SIZE, camera_id=0).transpose(2, 0, 1)


@torch.no_grad()
def evaluate(agent, env, args, action_repeat=2):
    """Returns the mean return of whole episodes, always from the same states, and its score, which
    is 100 at a return of 1000. [1], [1]"""
    env.task.random.seed(args.seed)
    total = 0.0
    for _ in range(args.eval_episodes):
        time_step = env.reset()
        frames = [take_frame(env)] * 3
        while not time_step.last():
            s = torch.from_numpy(np.concatenate(frames)[None]).to(args.device)
            a = agent.act(s)[0].cpu().numpy()
            for _ in range(action_repeat):  # an episode has 1000 steps
                time_step = env.step(a)
                total += time_step.reward
            frames = [*frames[-2:], take_frame(env)]
    returns = np.array([total / args.eval_episodes])
    return returns, returns / 10


# --- files ---

PACKAGES = ("torch", "numpy", "gymnasium", "minari")
# flags that may differ when --out exists: paths (of inputs the checksums count) and the machine
FREE = "env aug checkpoint diffusion data run env_package device track out versions".split()


def require_same(path, old, new, flag="--out"):
    """Ends the program unless what is at path was made with the same flags from the same inputs."""
    new = json.loads(json.dumps(new))  # as old, which comes from a file
    for key, value in new.items():
        same = key in FREE or old.get(key) == value
        require(same, f"{path} was made with {key} {old.get(key)}; choose another {flag}")


def try_to_write(path):
    """Ends the program now if no file could be written at path when the work is done."""
    folder = Path(path).resolve().parent
    with or_exit(f"{path} cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


@contextmanager
def new_file(path):
    """Gives a name to write to; what is written takes its place at path when it is whole."""
    path = Path(path).resolve()  # a symbolic link stays one
    temporary = Path(f"{path}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # of PyTorch, for a full disk
        require(False, f"{path} cannot be written ({error})")
    finally:
        with suppress(OSError):
            temporary.unlink()


# --- run ---


def record(function, warm_up=3):
    """Returns function as a CUDA graph, one launch of the GPU. The first warm_up calls run it as it
    is, as CUDA asks before a capture. The next one captures it, which computes nothing, and replays
    it; later ones only replay it."""
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    calls = 0
    outputs = None

    def call():
        nonlocal calls, outputs
        calls += 1
        if calls <= warm_up:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                outputs = function()
            torch.cuda.current_stream().wait_stream(stream)
            return outputs
        if calls == warm_up + 1:
            with torch.cuda.graph(graph):
                outputs = function()
        graph.replay()
        return outputs

    return call


def read_config(out):
    """Returns config.json of a run of this script."""
    with or_exit(f"--out {out} holds files, but no run of {Path(__file__).name}; choose another"):
        config = json.loads((out / "config.json").read_text())
        assert config["script"] == Path(__file__).stem, "another program's"
    return config


def open_run(args, inputs, may_be_longer):
    """Returns the folder of this run, new or begun with the same flags and data, and its config."""
    script = Path(__file__).stem
    now = datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    name = f"{script}-{args.env}-{inputs['aug_label']}-{args.seed}-{now}"
    out = Path(args.out or "runs/" + re.sub(r"[^A-Za-z0-9.+-]+", "_", name)[-200:])
    config = {"script": script, **asdict(args), **inputs}
    config["versions"] = {package: version(package) for package in PACKAGES}
    if any(out.glob("*")):
        old = read_config(out)
        if may_be_longer:
            old["train_steps"] = max(old["train_steps"], args.train_steps)
        require_same(out, old, config)
    return out, config


def load_checkpoint(out, agents, optimizers, args):
    """Puts agents and optimizers into the state in which --out stopped. Returns the update and the
    evaluations until then."""
    path = out / "checkpoint.pt"
    if not path.exists():
        lost = (out / "evals.csv").exists()
        require(not lost, f"{out} holds evals.csv, but no checkpoint.pt; choose another --out")
        return 0, []
    with or_exit(f"{path} cannot be read; choose another --out"):
        checkpoint = torch.load(path, map_location=args.device, weights_only=True)
        agents.load_state_dict(checkpoint["agents"])
        for key, optimizer in optimizers.items():
            optimizer.load_state_dict(checkpoint["optimizers"][key])
    print(f"{out} is at update {checkpoint['step']} of {args.train_steps}")
    return checkpoint["step"], checkpoint["evals"]


def write_evals(out, evals):
    """Writes evals.csv."""
    with new_file(out / "evals.csv") as file:
        np.savetxt(file, evals, "%.10g", ",", header="update,agent,return,score", comments="")


def save_checkpoint(out, config, agents, optimizers, step, evals):
    """Writes checkpoint.pt and evals.csv, unless the folder is another run's by now."""
    require_same(out, read_config(out), config)
    checkpoint = {
        "args": asdict(agents.args),
        "step": step,
        "evals": evals,
        "agents": agents.state_dict(),
        "optimizers": {key: optimizer.state_dict() for key, optimizer in optimizers.items()},
    }
    with new_file(out / "checkpoint.pt") as file:
        torch.save(checkpoint, file)
    write_evals(out, evals)


def load_agents(path, device="cpu"):
    """Returns the trained agent of the checkpoint at path. Its act is the policy at the last three
    frames: uint8 [B, 9, 84, 84] -> actions [B, act_dim]."""
    checkpoint = torch.load(path, map_location=device, weights_only=True)
    weights = checkpoint["agents"]
    args = SimpleNamespace(**checkpoint["args"])
    agent = DrQBC(args, len(weights["actor.1.4.bias"])).to(device)
    agent.load_state_dict(weights)
    return agent.eval().requires_grad_(False)


def describe_result(evals, num_seeds):
    """Returns the last score: its mean and deviation over agents."""
    if not evals:
        return "not evaluated"
    scores = np.array([score for _, _, _, score in evals[-num_seeds:]])
    if num_seeds == 1:
        return f"{scores[0]:.1f} over 1 seed"
    return f"{scores.mean():.1f} +- {scores.std():.1f} over {num_seeds} seeds"


def run(args, inputs, agents, optimizers, train, benchmark, updates=1, may_be_longer=True):
    """Trains to --train-steps from where --out stopped, evaluates and writes. A call of train makes
    that many updates, and returns the losses, summed over the agents."""
    out, config = open_run(args, inputs, may_be_longer)
    step, evals = load_checkpoint(out, agents, optimizers, args)
    if step > 0:
        write_evals(out, evals)  # a kill may have come between the two files
    if args.track:
        with or_exit("--track"):
            import wandb

            wandb.init(name=out.name, config=config)
    with new_file(out / "config.json") as file:
        file.write_text(json.dumps(config, indent=2))
    torch.manual_seed(args.seed + step)
    if args.device == "cuda":
        train = record(train)
    steps = range(step + updates, args.train_steps + updates, updates)
    every = 0.1 if sys.stderr.isatty() else 60  # seconds: a log file takes a line a minute
    progress = tqdm(steps, unit="call", mininterval=every, maxinterval=every)
    for step in progress:
        losses = train()
        is_due = step % args.eval_every < updates  # this call has come to a multiple of it
        if not is_due and step < args.train_steps:
            continue
        log = {key: loss.item() / args.num_seeds for key, loss in losses.items()}
        require(all(map(math.isfinite, log.values())), f"update {step}: {log}; try a lower --lr")
        if benchmark:
            returns, scores = evaluate(agents, benchmark, args)
            for i in range(args.num_seeds):
                evals.append([step, i, returns[i].item(), scores[i].item()])
            log["score"] = scores.mean()
            if args.num_seeds > 1:
                log["deviation"] = scores.std()
        save_checkpoint(out, config, agents, optimizers, step, evals)
        progress.write(f"update {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in log.items()))
        if args.track:
            wandb.log(log, step=step)
        torch.manual_seed(args.seed + step)  # a run that goes on from here draws the same
    result = describe_result(evals, args.num_seeds)
    print(f"wrote {out}\n{args.env} | {config['script']} | {inputs['aug_label']} | {result}")


# --- the three programs ---


def load_run(args):
    """Returns the agent of --run, which must be of train."""
    with or_exit(f"--run {args.run}: no run of drqbc.py on images"):
        agent = load_agents(Path(args.run) / "checkpoint.pt", args.device)
        assert hasattr(agent.args, "task"), "it was fine-tuned"
    return agent


def train_agent(args, inputs, agent, draw_batch, task):
    """Trains an agent on batches of images or of latents."""
    env = make_env(task, agent) if args.eval_episodes else None
    optimizers = make_optimizers(agent, args)
    run(args, inputs, agent, optimizers, partial(update, agent, optimizers, draw_batch), env)


def train_on_images(args):
    """Trains encoder, policy and Q on the frames of --data."""
    named = re.search("walker_walk|cheetah_run|humanoid_walk", args.data)
    require(args.task or named, f"--data {args.data} names no task; give --task walker_walk")
    args.task = args.task or named[0]
    args.env = args.data
    torch.manual_seed(args.seed)
    frames = read_frames(args.data)
    inputs = {"dataset_crc": checksum(x.numpy() for x in frames), "aug_label": "none"}
    agent = DrQBC(args, frames.action.shape[1]).to(args.device)
    train_agent(args, inputs, agent, make_image_sampler(frames, args), args.task)


def encode(args):
    """Writes the latents of the frames that --run was trained on."""
    out = Path(args.out).resolve()
    metadata = None
    if out.exists():
        with or_exit(f"--out {out} holds no latents; choose another"):
            metadata = json.loads((out / "data" / "metadata.json").read_text())
    else:
        try_to_write(out)
    agent = load_run(args)
    frames = read_frames(args.data or agent.args.data)
    dataset_id = f"{name_latents(agent)}{checksum(x.numpy() for x in frames):08x}-v0"
    if metadata:
        require_same(out, metadata, {"dataset_id": dataset_id})
        print(f"{out} is finished, {dataset_id}")
        return
    write_latents(out, dataset_id, encode_episodes(agent, frames))


def finetune(args):
    """Trains the heads of policy and Q of --run on, on latents."""
    require(args.aug or args.data, "finetune needs --aug, or --data alone for the control")
    agent = load_run(args)
    old = agent.args
    buffer = read_buffer(args.aug) if args.aug else None
    args.data = args.data or buffer.metadata.get("env")
    require(args.data, f"--aug {args.aug} does not name its latents; give --data")
    args.env = old.data
    dataset_id, episodes = read_latents(args.data)
    inputs = identify_latents(args, agent, dataset_id, episodes, buffer)
    agent.args = args
    agent.train().requires_grad_(True)
    train_agent(args, inputs, agent, make_latent_sampler(episodes, buffer, args), old.task)


COMMANDS = {Train: train_on_images, Encode: encode, Finetune: finetune}


def main(args):
    check_flags(args)
    torch.set_float32_matmul_precision("high")  # TF32
    COMMANDS[type(args)](args)


if __name__ == "__main__":
    main(tyro.cli(Train | Encode | Finetune, description=__doc__))
