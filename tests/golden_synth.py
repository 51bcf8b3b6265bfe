"""Synthetic weights and videos of the golden cases: drawn from names and seeds, so that no weight file is needed."""
import math
import zlib

import torch
from torch import nn


def generator(seed):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def fill(module):
    "A module on the meta device -> the same on the CPU, its weights drawn one by one, each by the CRC-32 of its key."
    module = module.to_empty(device="cpu").eval().requires_grad_(False)
    for key, value in module.state_dict().items():
        torch.randn(value.shape, generator=generator(zlib.crc32(key.encode())), out=value)
        leaf = key.rsplit(".", 1)[-1]
        if leaf == "bias":
            value.mul_(0.02)
        elif leaf == "modulation":
            value.mul_(0.3)
        elif leaf == "gamma" or value.ndim == 1:  # gains of norms
            value.mul_(0.1).add_(1)
        else:  # weights by their fan-in; the decoder's convolutions, the only 4-D ones, feed ReLUs
            value.mul_(math.sqrt((1.25 if value.ndim == 4 else 1) / math.prod(value.shape[1:])))
    return module


def synthetic(make, *args, **kwargs):
    "`make(*args, **kwargs)` with synthetic weights, without initialising it first."
    with torch.device("meta"):
        module = make(*args, **kwargs)
    return fill(module)


def video(spec):
    "The smooth noisy video of `spec` (shape, seed and, if given, times, plus, clamp) -> (B,C,F,H,W) float32."
    b, c, f, h, w = shape = spec["shape"]
    draw = generator(spec["seed"])
    coarse = torch.randn(b, c, max(2, f // 4), max(2, h // 16), max(2, w // 16), generator=draw)
    x = nn.functional.interpolate(coarse, size=(f, h, w), mode="trilinear", align_corners=True)
    x = torch.tanh(x + 0.1 * torch.randn(shape, generator=draw)) * spec.get("times", 1) + spec.get("plus", 0)
    return x.clamp(*spec["clamp"]) if "clamp" in spec else x
