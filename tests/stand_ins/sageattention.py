"""What the package sageattention 1.0.6 does, refuses and gets wrong, in plain PyTorch and on any device.

Written from observed behaviour, so that the guards of flashvsr_nb.sage_attention can be tested without a GPU.
"""
import torch
import torch.nn.functional as F


def codes(x, block):
    "INT8 values and their scale, per token, of blocks of tokens; halves are rounded away from zero."
    y = F.pad(x.float(), (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, block))
    scale = y.abs().amax((-1, -2), keepdim=True) / 127
    y = (y / scale.where(scale > 0, 1)).flatten(2, 3)[:, :, : x.shape[2]]
    return (y + 0.5 * y.sign()).trunc(), scale.expand(-1, -1, -1, block, 1).flatten(2, 3)[:, :, : x.shape[2]]


def dense(q, k, v, scale):
    "INT8 scores, 16-bit values, sums of 64 keys in float16."
    (qi, qs), (ki, ks) = codes(q, 128), codes(k, 64)
    score = qi @ ki.mT * qs * ks.mT * scale
    p = (score - score.amax(-1, keepdim=True)).exp()
    tiles = zip(p.half().split(64, -1), v.half().split(64, 2))
    return (sum((a @ b).float() for a, b in tiles) / p.sum(-1, keepdim=True)).to(q.dtype)


def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True, **kwargs):
    assert tensor_layout == "HND" and not is_causal, "the stand-in knows no other"
    assert q.dtype in (torch.float16, torch.bfloat16, torch.float32)
    assert q.dtype == k.dtype == v.dtype and q.device == k.device == v.device
    assert q.shape[-1] in (64, 96, 128), "headdim should be in [64, 96, 128]."
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    if smooth_k:
        k -= k.mean(2, keepdim=True)  # fault: the caller's tensor changes
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    pad = (0, 0, 0, -k.shape[2] % 64)
    return dense(q, F.pad(k, pad), F.pad(v, pad), scale)  # faults: keys that do not exist; kwargs without effect
