"""Decision Transformer: updates against a plain one, causality, data and eq. 17, evaluation."""

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import HOPPER, ROOT, run, write_minari
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
    is_step = torch.arange(L) < torch.randint(1, L + 2, (S, B, 1))
    t = torch.randint(998, (S, B, 1)) + torch.arange(L)  # some beyond the last embedding
    return torch.randn(S, B, L, 1), torch.randn(S, B, L, OBS), torch.randn(S, B, L, ACT), t, is_step


class PlainDT:
    """Agent i of agents, written down for one window."""

    def __init__(self, agents, i):
        params = agents.named_parameters()
        self.w = {key: p[i].detach().clone().requires_grad_() for key, p in params}
        self.adam = torch.optim.AdamW(self.w.values(), 1e-4, weight_decay=1e-4)
        self.lr = torch.optim.lr_scheduler.LambdaLR(self.adam, lambda n: min((n + 1) / 3, 1))

    def linear(self, key, x):
        return x @ self.w[key + ".weight"] + self.w[key + ".bias"]

    def norm(self, key, x):
        scale, shift = (self.w[key + own].flatten() for own in ("scale", "shift"))
        return F.layer_norm(x, x.shape[-1:], scale, shift)

    def actions(self, R, s, a, t):
        tokens = []
        for n in range(len(t)):
            time = self.w["embed_t"][min(int(t[n]), 999)]
            fields = enumerate((R[n : n + 1], s[n : n + 1], a[n : n + 1]))
            tokens += [self.linear(f"embed.{k}", x)[0] + time for k, x in fields]
        x = self.norm("", torch.stack(tokens))
        for key in ("blocks.0.", "blocks.1."):
            q, k, v = self.linear(key + "qkv", self.norm(key + "qkv.", x)).chunk(3, dim=1)
            out = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
            x = x + self.linear(key + "project", out)
            hidden = F.gelu(self.linear(key + "mlp.0", self.norm(key + "mlp.0.", x)))
            x = x + self.linear(key + "mlp.2", hidden)
        return self.linear("head.0", self.norm("head.0.", x[1::3])).tanh()

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
        losses, norms = zip(*(own.update(*(x[i] for x in batch)) for i, own in enumerate(plain)))
        assert loss.item() == pytest.approx(sum(losses), rel=1e-11)
        assert max(norms) > 0.25 > min(norms)
    for key, p in agents.named_parameters():
        for i, own in enumerate(plain):
            assert (p[i] - own.w[key]).abs().max() < 1e-11


def test_an_action_depends_on_the_past_alone(float64):
    """Step n's action moves with returns and states up to n and actions before n, with no other."""
    agents, (R, s, a, t, _) = make(), draw(2)
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


def test_windows_hold_what_episodes_and_buffer_hold(pipeline, monkeypatch):
    """Returns to go (eq. 17), timesteps and padding against loops, one window from every step."""
    args = dt.Args(aug=str(pipeline / "buffer.npz"), context=10, return_scale=0.01, device="cpu")
    (dataset,), real, episodes, _ = dt.load_data(args)
    buffer, steps = dt.read_buffer(args.aug)[0], []
    for n, e in enumerate(episodes):
        R, t = e.rewards.sum(), 0
        if n >= len(real):
            R, t = (float(buffer[key][n - len(real)]) for key in ("return_to_go", "timestep"))
        for k, r in enumerate(e.rewards):
            steps.append([0.01 * R, *e.observations[k], *e.actions[k], t + k, n])
            R = R - float(r)
    steps = torch.tensor(np.array(steps))
    N, args.batch_size = len(steps), len(steps)
    draw_batch, scale = dt.pack_steps(real, episodes, dataset.action_space, args)
    torch.testing.assert_close(scale["std"], steps[:, 1:12].std(0, correction=0) + 1e-6)
    monkeypatch.setattr(torch, "randint", lambda high, size, device: torch.arange(high).view(size))
    R, s, a, t, is_step = draw_batch()
    index = torch.arange(N)[:, None] + torch.arange(10)
    inside, index = index < N, index.clamp(max=N - 1)
    inside &= steps[index, -1] == steps[:, None, -1]
    own = torch.cat([R, s * scale["std"] + scale["mean"], a, t[..., None]], dim=-1)[0]
    torch.testing.assert_close(own[inside], steps[index, :-1][inside], rtol=1e-5, atol=1e-5)
    assert torch.equal(is_step[0], inside) and t.dtype == torch.int64

    args.s4rl_sigma = 0.1
    assert (draw_batch()[1] - s).std() == pytest.approx(0.1, rel=0.01)
    monkeypatch.setattr(dt, "read_buffer", lambda path: ({"timestep": []}, {}))
    with pytest.raises(SystemExit, match="no returns to go"):
        dt.pack_steps(real, episodes, dataset.action_space, args)


def test_evaluation_equals_a_plain_loop():
    """Eleven episodes of two agents, ten side by side, of which the last steps are seen."""
    torch.manual_seed(0)
    agents = make(num_seeds=2, target_return=700.0, return_scale=0.01, eval_episodes=11, seed=3)
    agents.mean += 0.5
    agents.radius /= 2
    (dataset,) = dt.open_datasets(HOPPER)
    envs, env = dt.make_envs(dataset, agents.args, {}), gym.make("Hopper-v5")
    expected = np.zeros(2)
    for i in range(2):
        own = PlainDT(agents, i)
        for episode in range(11):
            s, _ = env.reset(seed=1000 * (3 + i) + episode)
            history, to_go, done = [], 700.0, False
            while not done:
                R, s = (torch.from_numpy(x).float() for x in (np.array([0.01 * to_go]), s - 0.5))
                history.append([R, s, torch.zeros(ACT), torch.tensor(len(history))])
                fields = (torch.stack(x) for x in zip(*history[-L:]))
                history[-1][2] = own.actions(*fields)[-1].detach()
                s, r, terminated, truncated, _ = env.step(history[-1][2].numpy() / 2)
                to_go, expected[i] = to_go - r, expected[i] + r / 11
                done = terminated or truncated
            assert len(history) > L
    np.testing.assert_allclose(dt.evaluate(agents, envs, agents.args), expected, rtol=1e-4)


def test_a_target_return_that_is_not_known_is_the_datasets_best(tmp_path):
    box, spec = gym.spaces.Box(-1, 1, (2,)), EnvSpec("PointMaze_UMaze-v3", entry_point="a:b")
    episodes = [(np.eye(T + 1, 2), np.eye(T, 2), np.ones(T), np.zeros(T, bool)) for T in (8, 12)]
    env = write_minari(tmp_path / "maze", episodes, box, box, env_spec=spec)
    flags = ["--train-steps", 2, "--batch-size", 4, "--eval-every", 0, "--out", "out"]
    result = run(ROOT / "dt.py", "--env", env, *flags, cwd=tmp_path)
    assert "target return: 12; the dataset's best is 12" in result.stdout
    args = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["args"]
    assert args["target_return"] == 12 and args["return_scale"] == 1
