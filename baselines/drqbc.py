# /// script
# requires-python = ">=3.11"
# dependencies = ["torch", "numpy", "h5py", "minari[hdf5]", "gymnasium", "dm_control", "tyro",
#     "tqdm", "wandb"]
# ///
"""DrQ+BC on V-D4RL's images (Lu et al., 2023), and GTA on its latents (Table 3, appendix C.4).

    python baselines/drqbc.py --data vd4rl/walker_walk/medium
    python baselines/drqbc.py --encode runs/<name> --out data/walker-walk-medium-latents
    python gta_diffusion.py --env data/walker-walk-medium-latents
    python gta_augment.py --mu 0.1 --alpha 2.0 --reweight-bins 50
    python baselines/drqbc.py --finetune runs/<name> --aug buffer.npz

The first trains encoder, policy and Q. The second writes latents, what the trunks of policy and Q
see, as a Minari dataset. The last trains the heads of policy and Q on, on real and generated ones.

Reads a folder of V-D4RL, or a run of this script and buffer.npz. Writes runs/<name>/ as the other
learners do, or a dataset folder. Frames are rendered without a screen by MUJOCO_GL=egl.
"""

import copy
import hashlib
import json
import math
import os
import re
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Literal

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
    # V-D4RL's folder of .hdf5 or .npz, or above its 84px; of --finetune: of latents, if not --aug's
    data: str | None = None
    encode: str | None = None  # folder of a run whose latents are to be written to --out
    finetune: str | None = None  # folder of a run to go on from, on latents
    aug: str | None = None  # of --finetune: buffer.npz to train on, too
    # of dm_control, two of its steps a frame. Default: the one that --data names
    task: Literal["walker_walk", "cheetah_run", "humanoid_walk"] | None = None
    # gradient steps. Default: 550 000 (V-D4RL: 1.1 M, one update in two); --finetune 300 000 (C.4)
    train_steps: int | None = None
    batch_size: int = 256  # transitions in a batch
    lr: float = 3e-4  # learning rate of Adam
    discount: float = 0.99  # discount factor
    n_step: int = 3  # rewards until the target's bootstrap; on latents 1, as SynthER's transitions
    tau: float = 0.01  # step of the target network towards the trained one
    std_steps: int = 125_000  # gradient steps in which the policy's noise falls from 1 to 0.1
    alpha: float = 2.5  # weight of Q against imitation
    eval_every: int = 50_000  # steps between evaluations, checkpoints; 0: none, write at the end
    eval_episodes: int = 10  # episodes of an evaluation; 0: checkpoints alone, no renderer
    # folder to write, or to go on with. Default: runs/drqbc-<data>-<augmentation>-<seed>-<time>
    out: str | None = None
    seed: int = 0  # seed of weights, batches, noise and evaluation episodes
    # CUDA_VISIBLE_DEVICES picks the card
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    track: bool = False  # log to Weights & Biases; WANDB_PROJECT and WANDB_ENTITY say where
    env: tyro.conf.Suppress[str | None] = None  # of results: the --data that the encoder has seen
    num_seeds: tyro.conf.Suppress[int] = 1


def require(condition, message):
    """Ends the program with one line and exit code 1 unless the condition holds."""
    if not condition:
        sys.exit("error: " + " ".join(message.split()))


@contextmanager
def blame(message):
    """Turns an exception into one line: what is run inside fails by the user's data or machine."""
    try:
        yield
    except Exception as error:
        require(False, f"{message} ({error})")


# --- data ---

SIZE = 84  # pixels
FEATURES = 50  # of a trunk; a latent is those of the actor's and of the critic's
KEYS = ("observation", "action", "reward", "discount", "step_type")


def read_frames(folder):
    """Returns V-D4RL's arrays: observation uint8 [R, 3, 84, 84], action [R, act_dim], reward,
    discount, step_type (0: an episode's first) [R]. A row's action and reward led to it."""
    paths = sorted([*Path(folder).glob("84px/*")] or Path(folder).glob("*"))
    paths = [p for p in paths if p.suffix in (".hdf5", ".npz")]
    require(paths, f"--data {folder}: no folder with .hdf5 files of V-D4RL")
    parts = []
    for path in paths:
        with blame(f"--data {path}: no file of V-D4RL"):
            with (np.load if path.suffix == ".npz" else h5py.File)(path, "r") as file:
                part = [file[key][:] for key in KEYS]
            shapes, (R, A) = [x.shape for x in part], part[1].shape
            fits = part[0].dtype == np.uint8 and shapes == [(R, 3, SIZE, SIZE), (R, A), *[(R,)] * 3]
            require(fits, f"--data {path}: {shapes}, not uint8 images of 3 x {SIZE} x {SIZE}")
            fits = all(np.isfinite(x).all() for x in part[1:]) and part[-1][0] == 0
            require(fits, f"--data {path} holds NaN, or begins within an episode")
        parts.append(part)
    with blame(f"--data {folder}: its files do not fit together"):
        images, *numbers = (torch.from_numpy(np.concatenate(x)) for x in zip(*parts))
    print(f"dataset: {folder}, {(numbers[-1] == 0).sum()} episodes, {len(images)} frames")
    return dict(zip(KEYS, [images, *(x.float() for x in numbers)]))


def find_episodes(step_type):
    """The first and the last row of the episode that a row belongs to. [R] -> [R], [R]"""
    starts = torch.nonzero(step_type == 0).squeeze(1)
    lengths = torch.diff(starts, append=torch.tensor([len(step_type)]))
    return starts.repeat_interleave(lengths), (starts + lengths - 1).repeat_interleave(lengths)


def stack(row, first):
    """Rows of a state's frames, oldest first; at the start the first thrice. [M] -> [M, 3]"""
    return torch.maximum(row[:, None] - torch.tensor([2, 1, 0]), first[:, None])


def n_step_transitions(data, n_step, discount):
    """Transitions of n steps: rows of the frames of s and of s' [M, 3], a [M, act_dim], the sum of
    gamma^j r_j [M], gamma^n times what s' counts [M]."""
    first, last = find_episodes(data["step_type"])
    row = torch.arange(len(first))  # where the action's frame is: s is the row before
    row = row[(row > first) & (row + n_step - 1 <= last)]
    rewards = data["reward"][row[:, None] + torch.arange(n_step)]
    R_n = (rewards * discount ** torch.arange(n_step)).sum(1)
    end = row + n_step - 1
    s, s_next = stack(row - 1, first[row]), stack(end, first[row])
    return s, data["action"][row], R_n, discount**n_step * data["discount"][end], s_next


def random_shift(frames, pad=4):
    """Moves every image by up to pad pixels, its border repeated. [B, C, 84, 84] DrQ-v2 resamples
    it bilinearly at whole pixels, which is the same to rounding."""
    B, size = len(frames), frames.shape[-1]
    shift = torch.randint(-pad, pad + 1, (2, B, 1), device=frames.device)
    rows, columns = (shift + torch.arange(size, device=frames.device)).clamp(0, size - 1)
    image = torch.arange(B, device=frames.device)[:, None, None]
    return frames[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def draw(transitions, args):
    """A batch of transitions, whose parts are arrays [M, ...] on the device, drawn uniformly."""
    index = torch.randint(len(transitions[0]), (args.batch_size,), device=args.device)
    return [x[index] for x in transitions]


def draw_images(data, args):
    """Returns what draws a batch of transitions between shifted images, and act_dim."""
    transitions = [x.to(args.device) for x in n_step_transitions(data, args.n_step, args.discount)]
    frames = data["observation"].to(args.device)
    require(len(transitions[0]), f"--data: no episode is longer than --n-step {args.n_step}")

    def draw_batch():
        s, a, r, discount, s_next = draw(transitions, args)
        s, s_next = (random_shift(frames[x].flatten(1, 2)) for x in (s, s_next))
        return s, a, r, discount, s_next

    return draw_batch, transitions[1].shape[1]


# --- networks ---


def init(layer):
    """DrQ-v2's: orthogonal weights, no biases."""
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
        self.args, d = args, FEATURES + act_dim
        self.encoder = make_encoder()
        self.actor = nn.ModuleList([make_trunk(), make_head(FEATURES, act_dim)])
        self.critic = nn.ModuleList([make_trunk(), make_head(d, 1), make_head(d, 1)])
        self.apply(init)
        self.critic_target = copy.deepcopy(self.critic)
        self.register_buffer("step", torch.zeros(()))  # gradient steps

    def encode(self, s):
        """uint8 [B, 9, 84, 84] -> [B, 39 200]; a latent stays what it is."""
        return s if s.dim() == 2 else self.encoder(s / 255 - 0.5)

    def latents(self, s):
        """What the trunks see. uint8 [B, 9, 84, 84] -> [B, 100]"""
        x = self.encode(s)
        return torch.cat([self.actor[0](x), self.critic[0](x)], dim=1)

    def policy(self, x):
        """The mean action. [B, 39 200], or latents -> [B, act_dim]"""
        trunk, head = self.actor
        return head(x[:, :FEATURES] if x.shape[1] == 2 * FEATURES else trunk(x)).tanh()

    def q(self, x, a, critic):
        """Q_1 and Q_2. [B, 39 200], or latents, and [B, act_dim] -> [2, B]"""
        trunk, *heads = critic
        h = x[:, FEATURES:] if x.shape[1] == 2 * FEATURES else trunk(x)
        return torch.stack([head(torch.cat([h, a], dim=1)) for head in heads]).squeeze(-1)

    def sample(self, x, noise_clip=0.3, eps=1e-6):
        """An action of the noisy policy, cut off at its bounds; the gradient passes unhindered."""
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


def record(function):
    """Returns function as one launch of the GPU: a CUDA graph of it. Calls it three times before,
    as capture needs: updates that --train-steps does not count."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    with torch.cuda.graph(graph):  # waits for them
        outputs = function()
    return lambda: (graph.replay(), outputs)[1]


# --- latents ---


@torch.no_grad()
def encode_episodes(agent, data, chunk=256):
    """Yields every episode as Minari stores it, its observations latents [T + 1, 100]."""
    first, last = find_episodes(data["step_type"])
    for i, start in enumerate(first.unique()):
        row = torch.arange(start, last[start] + 1)
        s = data["observation"][stack(row, first[row])].flatten(1, 2)  # [T + 1, 9, 84, 84]
        z = torch.cat([agent.latents(x.to(agent.step.device)).cpu() for x in s.split(chunk)])
        a, r, discount = (data[key][row[1:]].numpy() for key in ("action", "reward", "discount"))
        ends = {"terminations": discount == 0, "truncations": row[1:].numpy() == row[-1].item()}
        yield EpisodeBuffer(id=i, observations=z.numpy(), actions=a, rewards=r, infos={}, **ends)


def name_latents(agent, task):
    """What the Minari id of a network's latents begins with: other weights, another id."""
    parts = nn.ModuleList([agent.encoder, agent.actor[0], agent.critic[0]])
    weights = nn.utils.parameters_to_vector(parts.parameters()).detach().cpu().numpy()
    return f"{task.replace('_', '-')}-latents-{hashlib.sha256(weights.tobytes()).hexdigest()[:8]}"


def write_latents(args):
    """--encode: writes the latents of the run's dataset as a folder that --env takes."""
    old, agent = load_agent(args.encode, args)
    data, out = read_frames(args.data or old["data"]), Path(args.out).resolve()
    rewards = hashlib.sha256(data["reward"].numpy().tobytes()).hexdigest()[:8]
    dataset_id = f"{name_latents(agent, old['task'])}-{rewards}-v0"
    if out.exists():
        with blame(f"--out {out} holds no latents; choose another"):
            there = json.loads((out / "data" / "metadata.json").read_text())["dataset_id"]
        require(there == dataset_id, f"--out {out} holds {there}, not {dataset_id}; choose another")
        return print(f"{out} is finished, {dataset_id}")
    with blame(f"--out {out}: cannot be written"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
            new = Path(folder) / "new"
            new.mkdir()
            spaces = [gym.spaces.Box(-1, 1, (d,)) for d in (2 * FEATURES, data["action"].shape[1])]
            storage = MinariStorage.new(new / "data", *spaces, None)
            about = {"dataset_id": dataset_id, "minari_version": minari.__version__}
            storage.update_metadata(about)
            storage.update_episodes(encode_episodes(agent, data))
            os.rename(new, out)
    print(f"wrote {args.out}: {dataset_id}")


def read_buffer(path):
    """Returns the arrays of buffer.npz, which the README lists, and its metadata."""
    with blame(f"--aug {path}: no buffer of gta_augment.py"):
        with np.load(path, allow_pickle=False) as file:
            buffer = dict(file)
        metadata = json.loads(str(buffer.pop("metadata")))
        kind = metadata["format"], metadata["format_version"]
        finite = all(np.isfinite(x).all() for x in buffer.values())
        buffer["terminals"] = buffer["terminals"].astype(bool)
    require(kind == ("gta-buffer", 1), f"--aug {path}: {kind}, not version 1 of gta-buffer")
    require(finite, f"--aug {path} holds NaN or infinite numbers")
    return buffer, metadata


def draw_latents(agent, task, args):
    """Returns what draws a batch of the dataset's and --aug's transitions, and their name."""
    buffer, metadata = read_buffer(args.aug) if args.aug else ({}, {})
    own, folder = name_latents(agent, task), args.data or metadata["env"]
    with blame(f"--data {folder}: no folder that --encode has written"):
        dataset = minari.MinariDataset(Path(folder) / "data")
    require(dataset.id.startswith(own), f"--data {folder}: {dataset.id}, not this run's {own}")
    ids = metadata.get("dataset_ids", [dataset.id])
    require(ids == [dataset.id], f"--aug {args.aug}: of {ids}, not of {folder}, {dataset.id}")
    trajectories = [[e.observations, e.actions, e.rewards, e.terminations] for e in dataset]
    keys = ("observations", "actions", "rewards", "terminals")
    trajectories += [*zip(*(buffer.get(key, []) for key in keys))]
    parts = [(z[:-1], a, r, args.discount * (1 - ends), z[1:]) for z, a, r, ends in trajectories]
    transitions = [torch.as_tensor(np.concatenate(x)).float().to(args.device) for x in zip(*parts)]
    label = f"latents, {metadata.get('label', 'none')}"
    print(f"{label}: {len(transitions[0])} transitions")
    return partial(draw, transitions, args), label


# --- evaluation ---


def make_env(task, agent):
    """Returns dm_control's environment, or says what a machine without a screen needs."""
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")
    lacks = "on Debian: apt install libegl1 libegl-mesa0 libgl1-mesa-dri; or --eval-episodes 0"
    with blame(f"cannot render {task}, MUJOCO_GL={os.getenv('MUJOCO_GL')}; {lacks}"):
        from dm_control import suite

        env = suite.load(*task.split("_", 1), visualize_reward=False)
        env.reset()
        take_frame(env)
    fits = env.action_spec().shape == agent.actor[1][-1].bias.shape
    require(fits, f"--task {task} takes other actions than the data hold")
    return env


def take_frame(env):
    """One frame. uint8 [3, 84, 84]"""
    return env.physics.render(SIZE, SIZE, camera_id=0).transpose(2, 0, 1)


@torch.no_grad()
def evaluate(agent, env, args, action_repeat=2):
    """Returns the mean return of whole episodes, always from the same states, as an array [1]."""
    env.task.random.seed(args.seed)
    total = 0.0
    for _ in range(args.eval_episodes):
        time_step = env.reset()
        frames = [take_frame(env)] * 3
        while not time_step.last():
            s = torch.from_numpy(np.concatenate(frames)[None]).to(args.device)
            a = agent.policy(agent.encode(s))[0].cpu().numpy()
            for _ in range(action_repeat):  # an episode has 1000 steps
                time_step = env.step(a)
                total += time_step.reward
            frames = [*frames[-2:], take_frame(env)]
    return np.array([total / args.eval_episodes])


# --- run ---


def load_checkpoint(path, args):
    """Returns the checkpoint at path. Ends the program if it is of a run with other flags."""
    with blame(f"{path} cannot be read; remove it to start anew"):
        checkpoint = torch.load(path, map_location=args.device, weights_only=True)
        old = {**checkpoint["args"], "device": args.device, "track": args.track, "out": args.out}
    other = [f"{key} {old.get(key)}" for key, x in asdict(args).items() if x != old.get(key)]
    require(not other, f"{path} was made with {', '.join(other)}; choose another --out")
    return checkpoint


def load_agent(folder, args):
    """Returns the flags of a run of this script on images, and its agent."""
    path = Path(folder) / "checkpoint.pt"
    with blame(f"{path}: no run of drqbc.py"):
        checkpoint = torch.load(path, map_location=args.device, weights_only=True)
        weights, old = checkpoint["agents"], checkpoint["args"]
        agent = DrQBC(args, weights["actor.1.4.bias"].shape[0]).to(args.device)
        agent.load_state_dict(weights)
    require(not old["finetune"], f"{path} was fine-tuned; give the run on images")
    return old, agent


def stamp(path):
    """Returns what tells a file from another run's at the same path, None if there is none."""
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None


def save(path, values, since, texts=None):
    """Writes under another name, then renames: what is at path is whole, whenever a run dies. Ends
    the program if path's stamp is no longer since; returns the new one. texts go beside it."""
    require(stamp(path) == since, f"{path} is now of another run; choose another --out")
    for name, text in (texts or {}).items():
        path.with_name(name).write_text(text)
    temporary = f"{path}.{os.getpid()}.tmp"
    torch.save(values, temporary)
    os.replace(temporary, path)
    return stamp(path)


def run(args, about, agents, optimizers, draw_batch, envs, updates=1):
    """Trains until --train-steps updates are done, going on where --out stopped, evaluates and
    writes. A call of update() does so many updates; its losses are sums over the agents."""
    script, now = Path(__file__).stem, datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    name = f"{script}-{args.env}-{about['aug_label']}-{args.seed}-{now}"
    out = Path(args.out or "runs/" + re.sub(r"[^A-Za-z0-9.+-]+", "_", name)[-200:])
    step, evals, path = 0, [], out / "checkpoint.pt"
    since = stamp(path)
    if since:
        checkpoint = load_checkpoint(path, args)
        agents.load_state_dict(checkpoint["agents"])
        for key, optimizer in optimizers.items():
            optimizer.load_state_dict(checkpoint["optimizers"][key])
        step, evals = checkpoint["step"], checkpoint["evals"]
        print(f"{out} is at update {step} of {args.train_steps}, with these flags")
    versions = {package.__name__: package.__version__ for package in (torch, np, gym, minari)}
    config = {"script": script, **asdict(args), **about, "versions": versions}
    if args.track:
        import wandb

        with blame("--track"):
            wandb.init(name=out.name, config=config)
    with blame(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed + step)
    train = partial(update, agents, optimizers, draw_batch)
    train = record(train) if args.device == "cuda" else train
    steps = range(step + updates, args.train_steps + updates, updates)
    progress = tqdm(steps, unit="update", unit_scale=updates)
    for step in progress:
        losses = train()
        is_due = args.eval_every and step % args.eval_every < updates
        if not is_due and step < args.train_steps:
            continue
        log = {key: loss.item() / args.num_seeds for key, loss in losses.items()}
        finite = np.isfinite([*log.values()]).all()
        require(finite, f"update {step}: {log}; {out} stays as it is; try a lower --lr")
        if envs is not None:
            returns, (low, high) = evaluate(agents, envs, args), about["reference_returns"]
            scores = 100 * (returns - low) / (high - low)
            evals += [[step, i, returns[i].item(), x.item()] for i, x in enumerate(scores)]
            log |= {"score": scores.mean(), "deviation": scores.std()}
        state = {"args": asdict(args), "step": step, "evals": evals, "agents": agents.state_dict()}
        state["optimizers"] = {key: own.state_dict() for key, own in optimizers.items()}
        rows = [",".join(map(str, row)) for row in [("update", "agent", "return", "score"), *evals]]
        texts = {"evals.csv": "\n".join(rows) + "\n", "config.json": json.dumps(config, indent=2)}
        since = save(path, state, since, texts)
        progress.write(f"update {step}: {', '.join(f'{k} {v:.4g}' for k, v in log.items())}")
        if args.track:
            wandb.log(log, step=step)
        torch.manual_seed(args.seed + step)  # a run that goes on from here draws the same
    scores = np.array([row[3] for row in evals[-args.num_seeds :]])
    result = f"{scores.mean():.1f} +- {scores.std():.1f}" if evals else "not evaluated"
    algorithm = script if about["aug_label"] == "none" else f"{script} + {about['aug_label']}"
    seeds = f"{args.num_seeds} seed{'s' * (args.num_seeds > 1)}"
    print(f"wrote {out}\n{args.env} | {algorithm} | {result} over {seeds}")


def main(args):
    require(args.device == "cpu" or torch.cuda.is_available(), "--device cuda: there is no GPU")
    torch.set_float32_matmul_precision("high")  # TF32
    fits = args.aug or args.data if args.finetune else args.data and not args.aug
    fits = args.out and not (args.finetune or args.aug) if args.encode else fits
    require(fits, "give --data; --encode and --out; or --finetune, and --aug or --data of latents")
    if args.encode:
        return write_latents(args)
    args.train_steps = args.train_steps or (300_000 if args.finetune else 550_000)
    torch.manual_seed(args.seed)
    if args.finetune:
        old, agent = load_agent(args.finetune, args)
        args.n_step, args.task, args.env = 1, old["task"], old["data"]
        draw_batch, label = draw_latents(agent, args.task, args)
    else:
        named = re.search("walker_walk|cheetah_run|humanoid_walk", args.data)
        require(args.task or named, f"--data {args.data} names no task; give --task walker_walk")
        args.task, args.env, label = args.task or named[0], args.data, "none"
        draw_batch, act_dim = draw_images(read_frames(args.data), args)
        agent = DrQBC(args, act_dim).to(args.device)
    about = {"aug_label": label, "reference_returns": (0.0, 1000.0)}
    env = make_env(args.task, agent) if args.eval_every and args.eval_episodes else None
    run(args, about, agent, make_optimizers(agent, args), draw_batch, env)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
