"""Decision Transformer: updates against a plain one, causality, data and eq. 17, evaluation."""

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import HOPPER, ROOT, call, message, write_minari
from gymnasium.envs.registration import EnvSpec
from plain import unit_scale

import dt

S, L, OBS, ACT = 3, 5, 11, 3


def make(dropout=0.0, **flags):
    args = dt.Args(**{"num_seeds": S, "context": L, "warmup_steps": 3, "device": "cpu", **flags})
    agents = dt.DT(args, unit_scale(OBS, ACT), dim=16, num_layers=2, dropout=dropout)
    for p in agents.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return agents


def draw(B):
    R = torch.randn(S, B, L, 1)
    s = torch.randn(S, B, L, OBS)
    a = torch.randn(S, B, L, ACT)
    t = torch.randint(990, (S, B, 1)) + torch.arange(L)
    is_step = torch.arange(L) < torch.randint(1, L + 2, (S, B, 1))
    t[:, 0] = 997 + torch.arange(L)  # beyond the last embedding
    is_step[:, 0] = True
    return R, s, a, t, is_step


class PlainDT:
    """Agent i of agents, written down for one window."""

    def __init__(self, agents, i):
        params = agents.named_parameters()
        self.w = {key: p[i].detach().clone().requires_grad_() for key, p in params}
        self.adam = torch.optim.AdamW(self.w.values(), 1e-4, weight_decay=1e-4)
        self.lr = torch.optim.lr_scheduler.LambdaLR(self.adam, lambda n: min((n + 1) / 3, 1))

    def linear(self, key, x):
        return x @ self.w[f"{key}.weight"] + self.w[f"{key}.bias"]

    def norm(self, key, x):
        scale = self.w[f"{key}.scale"].flatten()
        return F.layer_norm(x, x.shape[-1:], scale, self.w[f"{key}.shift"].flatten())

    def norm_linear(self, key, x):
        return self.linear(key, self.norm(key, x))

    def actions(self, R, s, a, t):
        tokens = []
        for n in range(len(t)):
            time = self.w["embed_t"][min(int(t[n]), 999)]
            for k, field in enumerate((R, s, a)):
                tokens.append(self.linear(f"embed.{k}", field[n])[0] + time)
        x = self.norm("norm", torch.stack(tokens))
        for key in ("blocks.0", "blocks.1"):
            q, k, v = self.norm_linear(f"{key}.qkv", x).chunk(3, dim=1)
            out = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
            x = x + self.linear(f"{key}.project", out)
            hidden = F.gelu(self.norm_linear(f"{key}.mlp.0", x))
            x = x + self.linear(f"{key}.mlp.2", hidden)
        return self.norm_linear("head.0", x[1::3]).tanh()

    def update(self, R, s, a, t, is_step):
        """Windows without their padding. Returns the loss and the gradient's norm."""
        loss = 0.0
        for b, n in enumerate(is_step.sum(1)):
            error = self.actions(R[b, :n], s[b, :n], a[b, :n], t[b, :n]) - a[b, :n]
            loss = loss + error.square().sum() / a.numel()
        self.adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.w.values(), 0.25)
        self.adam.step()
        self.lr.step()
        return loss.item(), norm.item()


# --- the algorithm ---


def test_updates_equal_a_plain_rewrite(float64):
    """Each agent's gradient is clipped by its own norm; the learning rate rises for three updates;
    seven windows are no multiple of the parts; padding has no part in anything."""
    torch.manual_seed(0)
    agents = make(batch_size=7)
    for p in agents.head[0].parameters():
        p.data[2] *= 0.1
    plain = [PlainDT(agents, i) for i in range(S)]
    adam = torch.optim.AdamW(agents.parameters(), torch.tensor(0.0), weight_decay=1e-4, fused=True)
    for _ in range(5):
        batch = draw(7)
        batch[2][2] *= 0.01  # agent 2: small errors, a small gradient
        loss = dt.update(agents, {"transformer": adam}, [batch].pop)["loss"]
        results = [plain[i].update(*(field[i] for field in batch)) for i in range(S)]
        losses, norms = zip(*results)
        assert loss.item() == pytest.approx(sum(losses), rel=1e-12)
        assert max(norms) > 0.25 > min(norms)
    for key, p in agents.named_parameters():
        for i in range(S):
            assert (p[i] - plain[i].w[key]).abs().max() < 1e-12


def test_an_action_depends_on_the_past_alone(float64):
    """Step n's action moves with returns and states up to n and actions before n, with no other."""
    agents = make()
    R, s, a, t, _ = draw(2)
    for n in range(L):
        fields = [x.clone().requires_grad_() for x in (R, s, a)]
        gradients = torch.autograd.grad(agents(*fields, t)[:, :, n].sum(), fields)
        for gradient, last in zip(gradients, (n, n, n - 1)):
            reach = (gradient != 0).any(-1)
            assert torch.equal(reach, (torch.arange(L) <= last).expand(reach.shape))


def test_dropout_differs_by_agent_and_is_off_in_evaluation():
    agents = make(dropout=0.1)
    for p in agents.parameters():
        p.data[1:] = p.data[0]
    fields = [x[:1].expand(S, *x.shape[1:]) for x in draw(4)[:4]]
    assert (agents(*fields)[0] - agents(*fields)[1]).abs().max() > 1e-5
    assert torch.equal(agents.eval()(*fields), agents(*fields))
    agents = dt.DT(dt.Args(device="cpu"), unit_scale(OBS, ACT))
    assert {m.p for m in agents.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}


# --- data ---


@pytest.mark.parametrize("aug_only", [False, True])
def test_windows_hold_what_episodes_and_buffer_hold(pipeline, monkeypatch, aug_only):
    """Returns to go (eq. 17), timesteps and padding against loops, one window from every step."""
    args = dt.Args(context=10, return_scale=0.01, device="cpu")
    datasets = dt.open_datasets(HOPPER)
    episodes = dt.load_episodes(datasets)
    buffer = dt.read_buffer(pipeline / "buffer.npz")
    windows = [] if aug_only else [(*e[:3], e.rewards.sum(), 0) for e in episodes]
    windows += zip(*buffer[1:4], buffer.return_to_go.tolist(), buffer.timestep)
    steps = []
    for n, (s, a, r, R, t) in enumerate(windows):
        for k in range(len(r)):
            steps.append([0.01 * R, *s[k], *a[k], t + k, n])
            R = R - float(r[k])
    steps = torch.tensor(np.array(steps))
    N = len(steps)
    args.batch_size = N
    made = dt.make_steps(episodes, buffer, aug_only)
    scale = dt.fit_scale(made.s, datasets[0].action_space, eps=1e-6)
    std = steps[:, 1:12].std(0, correction=0) + 1e-6
    torch.testing.assert_close(scale.std, std.float())
    draw_batch = dt.make_window_sampler(made, scale, args)
    monkeypatch.setattr(torch, "randint", lambda high, size, device: torch.arange(high).view(size))
    R, s, a, t, is_step = draw_batch()
    index = torch.arange(N)[:, None] + torch.arange(10)
    inside = index < N
    index = index.clamp(max=N - 1)
    inside &= steps[index, -1] == steps[:, None, -1]
    drawn = torch.cat([R, s * scale.std + scale.mean, a, t[..., None]], dim=-1)[0].double()
    expected = steps[index, :-1][inside]
    torch.testing.assert_close(drawn[inside], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(is_step[0], inside) and t.dtype == torch.int64

    args.s4rl_sigma = 0.1
    assert (draw_batch()[1] - s).std() == pytest.approx(0.1, rel=0.01)


def test_a_buffer_that_does_not_do():
    arrays = (np.zeros((4, 3, 2)), np.zeros((4, 2, 1)), np.zeros((4, 2)), np.zeros((4, 2)))
    source = {"return_to_go": np.zeros(4), "timestep": np.zeros(4)}
    assert len(dt.make_steps([], dt.Buffer({}, *arrays, **source)).R) == 8
    changes = [
        ({"return_to_go": None}, "no return_to_go"),
        ({"timestep": None}, "no timestep"),
        ({"return_to_go": np.zeros(1)}, "no N windows"),
        ({"timestep": np.zeros(1)}, "have lengths"),
        ({"rewards": np.zeros(4)}, "no N windows"),
        ({"actions": np.zeros((3, 2, 1))}, "have lengths"),
    ]
    for change, text in changes:
        buffer = dt.Buffer({}, *arrays, **source)._replace(**change)
        assert text in message(dt.make_steps, [], buffer)


# --- evaluation ---


def test_evaluation_equals_a_plain_loop():
    """Eleven episodes of two agents, ten side by side, of which the last steps are seen."""
    torch.manual_seed(0)
    agents = make(num_seeds=2, target_return=700.0, return_scale=0.01, eval_episodes=11, seed=3)
    agents.scale.mean += 0.5
    agents.scale.low /= 2
    agents.scale.high /= 2
    (dataset,) = dt.open_datasets(HOPPER)
    benchmark = dt.make_benchmark(dataset, agents.args)
    env = gym.make("Hopper-v5")
    expected = np.zeros(2)
    for i in range(2):
        plain = PlainDT(agents, i)
        for episode in range(11):
            s, _ = env.reset(seed=1000 * (3 + i) + episode)
            history = []
            to_go = 700.0
            done = False
            while not done:
                R = torch.tensor([0.01 * to_go]).float()
                s = torch.from_numpy(s - 0.5).float()
                history.append([R, s, torch.zeros(ACT), torch.tensor(len(history))])
                fields = (torch.stack(field) for field in zip(*history[-L:]))
                history[-1][2] = plain.actions(*fields)[-1].detach()
                s, r, terminated, truncated, _ = env.step(history[-1][2].numpy() / 2)
                to_go = to_go - r
                expected[i] += r / 11
                done = terminated or truncated
            assert len(history) > L
    returns, scores = dt.evaluate(agents, benchmark, agents.args)
    np.testing.assert_allclose(returns, expected, rtol=1e-4)
    np.testing.assert_allclose(scores, (returns + 20.272305) / 3254.572305 * 100)


def test_loaded_agents_act_as_the_trained_ones(tmp_path):
    """So do those of a run that was made longer; the learning rate goes on rising."""
    flags = ["--env", HOPPER, "--num-seeds", 2, "--batch-size", 8, "--warmup-steps", 3]
    flags += ["--eval-every", 2, "--eval-episodes", 1]
    for out, train_steps in (("once", 4), ("twice", 2), ("twice", 4)):
        steps = ["--train-steps", train_steps, "--out", out]
        call(ROOT / "dt.py", *flags, *steps, cwd=tmp_path)
    assert (tmp_path / "once/evals.csv").read_text() == (tmp_path / "twice/evals.csv").read_text()
    agents = dt.load_agents(tmp_path / "once" / "checkpoint.pt")
    assert not agents.training  # no dropout
    (dataset,) = dt.open_datasets(HOPPER)
    states = np.concatenate([e.observations[:-1] for e in dt.load_episodes([dataset])])
    np.testing.assert_allclose(agents.scale.std, states.std(0) + 1e-6, rtol=1e-5)
    benchmark = dt.make_benchmark(dataset, agents.args)
    evals = np.loadtxt(tmp_path / "once" / "evals.csv", delimiter=",", skiprows=1)
    np.testing.assert_allclose(dt.evaluate(agents, benchmark, agents.args), evals[2:, 2:].T)


class Named:
    """A dataset of which no more than the environment's name is known."""

    def __init__(self, name):
        self.env_spec = EnvSpec(name, entry_point="a:b") if name else None
        self.id = "walker2d-medium-v2"


@pytest.mark.parametrize(
    "name, target",
    [
        ("HalfCheetah-v5", 12000),
        ("halfcheetah-medium-replay-v2", 12000),
        ("hopper-medium-v2", 3600),
        (None, 5000),
        ("AdroitHandPen-v1", 3100),
        ("pen-human-v1", 3100),
        ("AdroitHandDoor-v1", 2900),
        ("door-cloned-v1", 2900),
        ("AdroitHandHammer-v1", 12800),
        ("hammer-expert-v1", 12800),
        ("AdroitHandRelocate-v1", 4300),
        ("relocate-human-v1", 4300),
        ("Pendulum-v1", None),
        ("InvertedPendulum-v5", None),
        ("AdroitHandPenSparse-v1", None),  # one for a success
        ("antmaze-umaze-v2", None),
        ("AntMaze_UMaze-v5", None),
        ("kitchen-complete-v0", None),
    ],
)
def test_target_returns_by_gymnasiums_and_d4rls_names(name, target):
    dataset = Named(name)
    assert dt.find_target_return(dataset) == target
    if dataset.env_spec:
        dataset.env_spec.max_episode_steps = 200  # of which the table's target for pen is not
        is_pen = "HandPen" in dataset.env_spec.id
        assert dt.find_target_return(dataset) == (None if is_pen else target)


@pytest.mark.parametrize("name", ["PointMaze_UMaze-v3", "maze2d-umaze-v1"])
def test_a_target_return_that_is_not_known_is_the_datasets_best(tmp_path, name):
    """A sum of its float16 rewards would be infinite."""
    box = gym.spaces.Box(-1, 1, (2,))
    episodes = []
    for T in (8, 12):
        rewards = np.full(T, 40000, np.float16)
        episodes.append((np.eye(T + 1, 2), np.eye(T, 2), rewards, np.zeros(T, bool)))
    spec = EnvSpec(name, entry_point="a:b")
    env = write_minari(tmp_path / "maze", episodes, box, box, env_spec=spec)
    flags = ["--train-steps", 2, "--batch-size", 4, "--eval-episodes", 0, "--out", "out"]
    result = call(ROOT / "dt.py", "--env", env, *flags, cwd=tmp_path)
    assert "target return: 480000; the dataset's best is 480000" in result.stdout
    args = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["args"]
    assert args["target_return"] == 480000 and args["return_scale"] == 1
