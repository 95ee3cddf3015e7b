"""Decision Transformer: its data, its network and update against plain ones, causality, eq. 17."""

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SAMPLE
from learners import PlainAgent, draw_inputs, make_agents, make_args, take_update

import dt


class PlainDT(PlainAgent):
    def __init__(self, agents, i, args):
        super().__init__(agents, i)
        self.args = args
        options = {"kind": torch.optim.AdamW, "weight_decay": args.weight_decay}
        self.optimizer = self.adam(args.lr, "transformer", **options)
        self.warmup = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min((step + 1) / args.warmup_steps, 1)
        )

    def linear(self, name, x):
        w = self.weights["transformer"]
        return F.linear(x, w[name + ".weight"], w[name + ".bias"])

    def norm(self, name, x):
        w = self.weights["transformer"]
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"])

    def forward(self, returns, s, a, timestep):
        """The actions of one window, [L, act_dim], token after token."""
        time = self.weights["transformer"]["embed_timestep.weight"]
        tokens = []
        for i in range(len(returns)):
            tokens.append(self.linear("embed_return", returns[i : i + 1]) + time[timestep[i]])
            tokens.append(self.linear("embed_s", s[i]) + time[timestep[i]])
            tokens.append(self.linear("embed_a", a[i]) + time[timestep[i]])
        x = self.norm("norm", torch.stack(tokens))
        heads = self.args.num_heads
        for n in range(self.args.num_layers):
            block = f"blocks.{n}."
            qkv = self.linear(block + "qkv", self.norm(block + "norm1", x))
            q, k, v = (
                y.reshape(len(x), heads, -1).transpose(0, 1) for y in qkv.split(x.shape[1], dim=1)
            )
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.linear(block + "project", out.transpose(0, 1).reshape(x.shape))
            hidden = F.gelu(self.linear(block + "mlp.0", self.norm(block + "norm2", x)))
            x = x + self.linear(block + "mlp.2", hidden)
        x = self.norm(f"blocks.{self.args.num_layers}", x)
        return torch.tanh(self.linear("head", x[1::3]))

    def update(self, returns, s, a, timestep, mask):
        loss = 0.0
        for b in range(len(returns)):
            length = int(mask[b].sum())
            own = (x[b, :length] for x in (returns, s, a, timestep))  # without the padding
            predicted = self.forward(*own)
            loss = loss + ((predicted - a[b, :length]) ** 2).sum()
        loss = loss / a.numel()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights["transformer"].values(), self.args.grad_norm)
        self.optimizer.step()
        self.warmup.step()
        return loss.item()


SMALL = {"context": 5, "embedding_dim": 16, "num_layers": 2, "num_heads": 2, "warmup_steps": 3}


@pytest.mark.parametrize("changes", [SMALL, SMALL | {"grad_norm": 1e-3}], ids=["", "clipped"])
def test_update_is_the_papers_for_every_agent(float64, changes):
    """The plain agent never sees the padding: it has no part in anything."""
    args = make_args(dt, num_seeds=3, seed=5, dropout=0.0, **changes)
    agents = make_agents(dt, args)
    plain = [PlainDT(agents, i, args) for i in range(3)]
    torch.manual_seed(0)
    for step in range(1, 6):
        (sequences,) = draw_inputs(dt, args, B=8)
        losses = take_update(dt, agents, (sequences,), step, args)
        for i, agent in enumerate(plain):
            expected = agent.update(*(field[i] for field in sequences))
            assert losses["loss"][i].item() == pytest.approx(expected, rel=1e-9)
    for agent in plain:
        assert agent.largest_difference(agents) < 1e-9


def test_one_agents_gradient_does_not_clip_anothers(float64):
    params = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 1)}
    params["a"].grad = torch.tensor([[3.0, 0.0, 0.0], [0.1, 0.0, 0.0]])
    params["b"].grad = torch.tensor([[4.0], [0.0]])
    dt.clip_gradients(params, 1.0)
    torch.testing.assert_close(params["a"].grad[:, 0], torch.tensor([0.6, 0.1]))
    torch.testing.assert_close(params["b"].grad, torch.tensor([[0.8], [0.0]]))


def test_an_action_depends_on_the_past_alone(float64):
    """Step t's action moves with returns and states up to t and actions before t, with no other."""
    args = make_args(dt, dropout=0.0, context=6)
    torch.manual_seed(0)
    network = dt.DecisionTransformer(11, 3, args)
    returns, s, a = torch.randn(1, 6, 1), torch.randn(1, 6, 11), torch.randn(1, 6, 3)
    timestep = torch.arange(3, 9)[None]
    for t in range(6):
        inputs = [x.clone().requires_grad_() for x in (returns, s, a)]
        out = network(inputs[0].squeeze(-1), inputs[1], inputs[2], timestep)
        own = torch.autograd.grad(out[0, t].sum(), inputs)
        reach = [g[0].abs().amax(-1) > 0 for g in own]
        up_to_t = torch.arange(6) <= t
        assert torch.equal(reach[0], up_to_t) and torch.equal(reach[1], up_to_t)
        assert torch.equal(reach[2], torch.arange(6) < t)


def test_dropout_is_everywhere_and_off_in_evaluation():
    args = make_args(dt, num_seeds=2, **SMALL)
    agents = make_agents(dt, args)
    for p in agents.transformer.params.values():
        p.data[1] = p.data[0]  # two agents that differ in their dropout only
    torch.manual_seed(0)
    (sequences,) = draw_inputs(dt, args)
    sequences = dt.Sequences(*(field[:1].expand(2, *field.shape[1:]) for field in sequences))
    losses = take_update(dt, agents, (sequences,), 1, args)["loss"]
    assert (losses[0] - losses[1]).abs() > 1e-6
    acted = [agents.act(*sequences[:4]) for _ in range(2)]
    assert torch.equal(*acted)
    dropped = [m for m in agents.transformer.module.modules() if isinstance(m, torch.nn.Dropout)]
    assert len(dropped) == 1 + SMALL["num_layers"] and all(m.p == 0.1 for m in dropped)


def test_generated_returns_to_go_are_eq_17():
    rng = np.random.default_rng(0)
    first, rewards = rng.normal(size=4), rng.normal(size=(4, 6)).astype(np.float32)
    own = dt.generated_returns_to_go(first, rewards)
    for n in range(4):
        left = first[n]
        for h in range(6):
            assert own[n, h] == pytest.approx(left, abs=1e-9)
            left -= float(rewards[n, h])


def test_packed_steps_hold_what_episodes_and_buffer_hold(pipeline):
    """Returns to go, timesteps and steps left against loops, for the dataset and for the buffer."""
    buffer_path = pipeline[0] / "buffer.npz"
    args = make_args(dt, env=str(SAMPLE), aug=buffer_path)
    dataset, episodes, buffer, _ = dt.load_episodes(args)
    scaling = dt.make_scaling(episodes, dataset.source.action_space)
    data = dt.pack_steps(dataset, episodes, buffer, scaling, args, torch.device("cpu")).numpy()
    n, N = 0, len(dataset.episodes)
    for index, e in enumerate(episodes):
        T = len(e.rewards)
        if index < N:
            to_go, first = float(e.rewards.sum()), 0
        else:
            to_go = float(buffer["return_to_go"][index - N])
            first = int(buffer["timestep"][index - N])
            source = dataset.episodes[buffer["episode"][index - N]]
            assert to_go == pytest.approx(float(source.rewards[first:].sum()), rel=1e-5)
        if index % 20 == 0 or index >= N:
            for t in range(T):
                s = (e.observations[t] - scaling.obs_mean) / scaling.obs_std
                np.testing.assert_allclose(data[n + t, :11], s, atol=1e-4)
                np.testing.assert_allclose(data[n + t, 11:14], e.actions[t], atol=1e-6)
                assert data[n + t, 14] == pytest.approx(0.001 * to_go, abs=1e-5)
                assert data[n + t, 15] == first + t and data[n + t, 16] == T - t
                to_go -= float(e.rewards[t])
        n += T
    assert n == len(data)
    only = make_args(dt, env=str(SAMPLE), aug=buffer_path, aug_only=True)
    dataset, episodes, buffer, _ = dt.load_episodes(only)
    own = dt.pack_steps(dataset, episodes, buffer, scaling, only, torch.device("cpu")).numpy()
    np.testing.assert_allclose(own, data[-len(own) :], atol=1e-5)
    assert len(own) == 280


def test_windows_stay_in_their_episode_and_come_in_proportion_to_length():
    """Episodes of 3, 50 and 7 steps: the padding starts where the episode ends."""
    lengths, context = np.array([3, 50, 7]), 10
    rows = []
    for episode, T in enumerate(lengths):
        for t in range(T):
            rows.append([episode] * 2 + [t, t] + [t, T - t])  # s [2], a [1], return, t, left
    data = torch.tensor(rows, dtype=torch.float32)
    args = make_args(dt, num_seeds=2, batch_size=20_000, context=context)
    torch.manual_seed(0)
    sequences = dt.draw_sequences(data, 2, 2, 1, args)
    assert sequences.s.shape == (2, 20_000, context, 2) and sequences.timestep.dtype == torch.int64
    episode = sequences.s[..., 0, 0].long()
    first = sequences.timestep[..., 0]
    inside = torch.arange(context) < (torch.tensor(lengths)[episode] - first)[..., None]
    assert torch.equal(sequences.mask, inside.float())
    same = sequences.s[..., 0].long() == episode[..., None]
    assert same[inside].all()
    timestep = first[..., None] + torch.arange(context)
    assert torch.equal(sequences.timestep[inside], timestep[inside])
    share = torch.bincount(episode.flatten()) / episode.numel()
    np.testing.assert_allclose(share, lengths / 60, atol=0.01)
    starts = torch.bincount(first[episode == 1]) / (episode == 1).sum()
    np.testing.assert_allclose(starts, 1 / 50, atol=0.01)
    assert not torch.equal(sequences.s[0], sequences.s[1])

    args.s4rl_sigma = 0.1
    torch.manual_seed(0)
    noisy = dt.draw_sequences(data, 2, 2, 1, args)
    assert (noisy.s - sequences.s).std().item() == pytest.approx(0.1, rel=0.02)
    for field in ("returns", "a", "timestep", "mask"):
        assert torch.equal(getattr(noisy, field), getattr(sequences, field))


def test_episodes_longer_than_the_timestep_table_are_one_line(dataset):
    args = make_args(dt, env=str(SAMPLE), episode_len=999)
    dataset, episodes, buffer, _ = dt.load_episodes(args)
    scaling = dt.make_scaling(episodes, dataset.source.action_space)
    with pytest.raises(SystemExit, match="--episode-len 999: an episode, .* has 1000 steps"):
        dt.pack_steps(dataset, episodes, buffer, scaling, args, torch.device("cpu"))


def test_evaluation_is_the_environments_return_under_the_target(dataset):
    """Against a plain loop over one environment after the other, whole histories kept."""
    changes = SMALL | {"return_scale": 0.01, "target_return": 700.0}
    args = make_args(dt, num_seeds=2, seed=3, **changes)
    agents = make_agents(dt, args)
    for p in agents.transformer.params.values():
        p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    scaling = dt.make_scaling(dataset.episodes, dataset.source.action_space)
    device = torch.device("cpu")
    envs = dt.Envs(dt.find_eval_env(dataset), 4)
    returns = dt.evaluate_target_return(agents, envs, scaling, args, device)
    expected, lengths = np.zeros(2), []
    for agent in range(2):
        plain = PlainDT(agents, agent, args)
        for episode in range(2):
            env = gym.make("Hopper-v5")
            state, _ = env.reset(seed=1000 * (3 + agent) + episode)
            history, to_go, done = [], 700.0, False
            while not done:
                s = torch.tensor((state - scaling.obs_mean) / scaling.obs_std).float()
                history.append(
                    [torch.tensor(0.01 * to_go).float(), s, torch.zeros(3), len(history)]
                )
                past = history[-args.context :]
                R, s, a = (torch.stack([step[i] for step in past]) for i in range(3))
                timestep = torch.tensor([step[3] for step in past])
                with torch.no_grad():
                    action = plain.forward(R, s, a, timestep)[-1]
                history[-1][2] = action
                state, reward, terminated, truncated, _ = env.step(action.numpy())
                to_go -= reward
                expected[agent] += reward / 2
                done = terminated or truncated
            lengths.append(len(history))
    assert max(lengths) > args.context  # the context has moved on
    np.testing.assert_allclose(returns, expected, rtol=1e-3)


def test_target_returns(dataset, capsys):
    assert dt.find_target_return(dataset) == 3600.0
    other = dataset._replace(env_id="Swimmer-v5")
    best = max(e.rewards.sum() for e in dataset.episodes)
    assert dt.find_target_return(other) == pytest.approx(best)
    assert f"target return: the dataset's best, {best:.1f}" in capsys.readouterr().out


def test_a_buffer_without_returns_to_go_is_one_line(pipeline, tmp_path):
    path = tmp_path / "buffer.npz"
    with np.load(pipeline[0] / "buffer.npz", allow_pickle=False) as file:
        np.savez(path, **{key: file[key] for key in file.files if key != "return_to_go"})
    args = make_args(dt, env=str(SAMPLE), aug=path)
    dataset, episodes, buffer, _ = dt.load_episodes(args)
    scaling = dt.make_scaling(episodes, dataset.source.action_space)
    with pytest.raises(SystemExit, match="needs return_to_go and timestep"):
        dt.pack_steps(dataset, episodes, buffer, scaling, args, torch.device("cpu"))
