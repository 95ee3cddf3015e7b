"""One agent of several, written down plainly: its networks, and what updates of it are made of."""

import torch
from torch import nn

from td3bc import Scale


def network(net, i):
    """Returns agent i's own copy of a network of mlp: PyTorch's layers, ReLU between them."""
    layers = []
    for layer in net:
        if hasattr(layer, "weight"):
            linear = nn.Linear(*layer.weight.shape[1:])
            linear.weight.data = layer.weight.data[i].T.clone()
            linear.bias.data = layer.bias.data[i, 0].clone()
            layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def twins(critic, i):
    """Returns agent i's own copies of Q_1 and Q_2."""
    S = len(critic.net[0].weight) // 2
    return nn.ModuleList([network(critic.net, i), network(critic.net, S + i)])


def q(critics, s, a):
    """Returns Q_1(s, a) and Q_2(s, a). [B, obs_dim], [B, act_dim] -> [2, B]"""
    x = torch.cat([s.expand(*a.shape[:-1], -1), a], dim=-1)
    return torch.stack([critic(x).squeeze(-1) for critic in critics])


def descend(*steps):
    """Takes steps of optimizers on losses, all of the same weights."""
    for optimizer, loss in steps:
        optimizer.zero_grad()
        loss.backward(inputs=optimizer.param_groups[0]["params"], retain_graph=True)
    for optimizer, _ in steps:
        optimizer.step()


def polyak(target, net, tau):
    for p_target, p in zip(target.parameters(), net.parameters()):
        p_target.data = (1 - tau) * p_target.data + tau * p.data


def assert_same(net, expected, atol=1e-12):
    for p, q in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=atol)


def random_batch(S, B, obs_dim, act_dim):
    """Returns s, a, r, s', terminal of S agents, in the default type."""
    s, s_next = torch.randn(2, S, B, obs_dim)
    a = torch.randn(S, B, act_dim).clamp(-1, 1)
    r = torch.randn(S, B)
    return s, a, r, s_next, (torch.rand(S, B) < 0.3).to(r.dtype)


def unit_scale(obs_dim, act_dim):
    """Returns a scale that changes nothing."""
    ones = torch.ones(act_dim)
    return Scale(torch.zeros(obs_dim), torch.ones(obs_dim), -ones, ones)
