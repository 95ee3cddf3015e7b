"""The mixer U-Net written down directly, channels first, nothing folded: what it must compute.

Used to check that gta_diffusion.MixerUNet is the same function.
"""

import math

import torch
import torch.nn.functional as F


def mixer_block(net, x, emb):
    """x [B, C, R, D]"""
    B, C, R, D = x.shape
    by_row = x.permute(0, 2, 3, 1).reshape(B, R, D * C)
    row = net.mix_row(net.norm_row(by_row)).view(B, R, D, C).permute(0, 3, 1, 2)
    by_column = x.permute(0, 1, 3, 2).contiguous()
    time = net.mix_time(net.norm_time(by_column)).permute(0, 1, 3, 2).contiguous()
    h = row + time
    if not isinstance(net.project, torch.nn.Identity):
        h = F.conv2d(h, net.project.weight[:, :, None, None], net.project.bias)
        x = F.conv2d(x, net.skip.weight[:, :, None, None], net.skip.bias)
    return h + net.emb(emb)[:, :, None, None] + x


def attention(net, x, heads=4):
    """x [B, C, R, D]"""
    B, C, R, D = x.shape
    h = F.instance_norm(x, weight=net.norm.weight, bias=net.norm.bias)
    q, k, v = (
        F.conv2d(h, net.qkv.weight[:, :, None, None]).view(B, 3, heads, -1, R * D).unbind(1)
    )  # [B, heads, d, n]
    context = torch.einsum("bhdn,bhen->bhde", k.softmax(dim=-1), v)
    out = torch.einsum("bhde,bhdn->bhen", context, q).reshape(B, -1, R, D)
    return x + F.conv2d(out, net.out.weight[:, :, None, None], net.out.bias)


def plain_unet(net, x, c_noise, y):
    """What the MixerUNet net computes. y None means no condition: zeros for its embedding."""
    angles = 2 * math.pi * c_noise[:, None] * net.frequencies
    noise = net.emb_noise(torch.cat([c_noise[:, None], angles.sin(), angles.cos()], dim=1))
    condition = torch.zeros_like(noise) if y is None else net.emb_y(y[:, None])
    emb = torch.cat([condition, noise], dim=1)
    x, skips = x[:, None], []
    for block_1, block_2, attend, down in [*net.downs, net.bottom]:
        x = attention(attend, mixer_block(block_2, mixer_block(block_1, x, emb), emb))
        skips.append(x)
        x = down(x)
    x = mixer_block(net.middle_1, x, emb)
    x = mixer_block(net.middle_2, attention(net.middle_attention, x), emb)
    for block_1, block_2, attend, up in net.ups:
        x = torch.cat([x, skips.pop()], dim=1)
        x = attention(attend, mixer_block(block_2, mixer_block(block_1, x, emb), emb))
        x = up(x)
    return net.last(x)[:, 0]
