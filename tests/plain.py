"""One agent of several, written down plainly: its weights, and what updates of it are made of."""

import torch


def layers(net, i):
    """Weights and biases of agent i in a network of mlp, as leaves of their own: [(W, b), ...]"""
    linear = [layer for layer in net if hasattr(layer, "weight")]
    return [
        tuple(p[i].detach().clone().requires_grad_() for p in (layer.weight, layer.bias))
        for layer in linear
    ]


def mlp(net, x):
    """Linear layers with ReLU between them. [B, d_in] -> [B, d_out]"""
    for n, (W, b) in enumerate(net):
        x = x @ W + b
        x = x.relu() if n + 1 < len(net) else x
    return x


def params(*nets):
    return [p for net in nets for layer in net for p in layer]


def polyak(target, net, tau):
    for p_target, p in zip(params(target), params(net)):
        p_target.data = (1 - tau) * p_target.data + tau * p.data


def descend(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def difference(net, plain, i):
    """The largest difference of agent i's weights from the plain ones."""
    pairs = zip(params(layers(net, i)), params(plain))
    return max((p - q).abs().max().item() for p, q in pairs)


def random_batch(S, B, obs_dim, act_dim):
    """s, a, r, s', terminal of S agents, in the default type."""
    s, s_next = torch.randn(2, S, B, obs_dim)
    a, r = torch.randn(S, B, act_dim).clamp(-1, 1), torch.randn(S, B)
    return s, a, r, s_next, (torch.rand(S, B) < 0.3).to(r.dtype)


def unit_scale(obs_dim, act_dim):
    """A scale that changes nothing."""
    center, mean = torch.zeros(act_dim), torch.zeros(obs_dim)
    return {"mean": mean, "std": mean + 1, "center": center, "radius": center + 1}
