"""Streaming: what to remember of the past, and how to read the input ahead of time"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ['Chunk', 'chunk', 'chunks_for', 'ConcatCache', 'KVCache', 'ChannelNorm', 'stacked_conv', 'LQProjector']

@dataclass(frozen=True)
class Chunk:
    "What one DiT call handles (spec 5)"
    latents: range # absolute latent frames: 6 in the first chunk, then 2
    lq: range # input frames that the projector reads for it
    frames: range # output frames it gives = input frames that the decoder is conditioned on

def chunk(
    k: int, # chunk number, from 0
) -> Chunk:
    "The k-th chunk of a stream: it reads 4 frames further than it gives (spec 5)"
    if k == 0: return Chunk(range(0, 6), range(0, 25), range(0, 21))
    return Chunk(range(4 + 2 * k, 6 + 2 * k), range(8 * k + 17, 8 * k + 25), range(8 * k + 13, 8 * k + 21))

def chunks_for(
    frames: int, # output frames wanted, at least 1
) -> int: # chunks that give at least so many
    "How many chunks a clip takes: 21 frames in the first, 8 in each further one"
    return 1 + max(0, -(-(frames - 21) // 8))

class ConcatCache:
    "The plain cache: concatenate, attend, cut to the newest `keep` slabs. Differentiable, but copies all at each step"
    def __init__(self, slab: int, *, keep: int = 3): # tokens per slab, 128*S; slabs remembered between chunks
        self.slab, self.keep, self.k, self.v = slab, keep, None, None

    def update(self, k, v): # new (B, heads, n*slab, d) -> all that this chunk attends to, oldest first
        "Append the chunk's keys and values"
        if self.k is not None: k, v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
        self.k, self.v = (t[:, :, -self.keep * self.slab:] for t in (k, v))
        return k, v

class KVCache:
    "A ring buffer of one layer's keys and values: memory is taken once, a new slab overwrites the oldest"
    def __init__(
        self,
        slab: int, # tokens per slab, 128*S
        *,
        keep: int = 3, # slabs remembered between chunks, at least 1
    ):
        if keep < 1: raise ValueError(f"KVCache: keep={keep} slabs, must be at least 1")
        self.slab, self.keep, self.written, self.k, self.v = slab, keep, 0, None, None

    @property
    def order(self) -> list: # absolute slab number held by each filled slot
        "Which slab lies where"
        n, last = self.slots, self.written - 1
        return [last - (last - s) % n for s in range(min(n, self.written))]

    @property
    def slots(self) -> int: # slabs that fit
        "Size of the ring"
        return 0 if self.k is None else self.k.shape[2] // self.slab

    def update(self, k, v): # new (B, heads, n*slab, d) -> all that this chunk attends to, in slot order
        "Write the chunk's keys and values over the oldest slabs; what comes back are views of the ring"
        n = k.shape[2] // self.slab
        if self.slots < n or self.slots > max(n, self.keep + 1): self._allocate(max(n, self.keep + 1), like=k)
        for i in range(n):
            at = slice((s := self.written % self.slots) * self.slab, (s + 1) * self.slab)
            new = slice(i * self.slab, (i + 1) * self.slab)
            self.k[:, :, at], self.v[:, :, at] = k[:, :, new], v[:, :, new]
            self.written += 1
        used = min(self.slots, self.written) * self.slab
        return self.k[:, :, :used], self.v[:, :, :used]

    def _allocate(self, slots, like): # the first chunk, and once more if it held more slabs than the ring needs from then on
        old, order, size = (self.k, self.v), self.order, (*like.shape[:2], slots * self.slab, like.shape[3])
        self.k, self.v = like.new_zeros(size), like.new_zeros(size)
        for slot, s in enumerate(order):
            if s < self.written - self.keep: continue
            for ring, past in zip((self.k, self.v), old):
                ring[:, :, s % slots * self.slab:(s % slots + 1) * self.slab] = past[:, :, slot * self.slab:(slot + 1) * self.slab]

class ChannelNorm(nn.Module):
    "Divide by the root mean square over channels, times a gain (spec 2.2)"
    def __init__(self, channels: int): # of the input
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def forward(self, x): # (N, C, h, w) -> same
        "Normalise the channels"
        return F.normalize(x, dim=1) * x.shape[1] ** 0.5 * self.gamma[..., 0]

def stacked_conv(
    x: torch.Tensor, # (N, I, h+2, w+2), padded
    weight: torch.Tensor, # (O, I, 3, 3)
    bias: torch.Tensor, # (O,)
) -> torch.Tensor: # (N, O, h, w)
    "A 3x3 convolution; on the CPU as one matrix product per image and nine shifted sums"
    if x.device.type != 'cpu': return F.conv2d(x, weight, bias)
    # with I = 3,072 a sum has 27,648 terms: direct convolution adds them one by one and loses a digit that a matrix product keeps
    n, _, h, w = x.shape
    taps = weight.permute(2, 3, 0, 1).flatten(0, 2) @ x.flatten(2) # N, 9*O, (h+2)*(w+2)
    taps = taps.view(n, 3, 3, -1, h, w)
    return sum(taps[:, i, j, :, i:h - 2 + i, j:w - 2 + j] for i in range(3) for j in range(3)) + bias[:, None, None]

class LQProjector(nn.Module):
    "LQ frames to DiT tokens, 4 frames ahead of the latents they condition (spec 2); keys as in LQ_proj_in.ckpt"
    def __init__(
        self,
        dims: tuple = (2048, 3072), # outputs of the two convolutions
        dim: int = 1536, # token width D
        *,
        variant: str = 'causal', # 'causal' (v1.1 weights: remembers) or 'buffer' (v1: each clip of 4 frames alone)
    ):
        super().__init__()
        if variant not in ('causal', 'buffer'): raise ValueError(f"LQProjector: variant={variant!r} must be 'causal' (v1.1) or 'buffer' (v1)")
        self.variant = variant
        self.conv1, self.norm1 = nn.Conv3d(768, dims[0], (4, 3, 3), stride=(2, 1, 1)), ChannelNorm(dims[0])
        self.conv2, self.norm2 = nn.Conv3d(dims[0], dims[1], (4, 3, 3), stride=(2, 1, 1)), ChannelNorm(dims[1])
        self.linear_layers = nn.ModuleList([nn.Linear(dims[1], dim)])

    def forward(
        self,
        lq: torch.Tensor, # (B, 3, n, H, W) in [-1, 1]; n = 1 + 4m frames at the start of a video, then 4m
        state=None, # what the last call returned; None at the start of a video
    ): # -> tokens (B, m*h*w, D) of the latents from the last call's on, order (f, h, w); new state
        "Tokens of the next m latent frames; frame 0 itself gives none"
        if (lq.shape[2] - (state is None)) % 4: raise ValueError(f"LQProjector: {lq.shape[2]} frames; needs 1+4m at the start, 4m later")
        x = self.unshuffle(lq)
        if state is None: x, state = x[:, 1:], self._first(x[:, :1])
        if not x.shape[1]: return lq.new_zeros(len(lq), 0, self.linear_layers[0].out_features), state
        if self.variant == 'buffer': # the cache is overwritten before it is read: clips of 4 frames, each its own past
            clips = x.unflatten(1, (-1, 4)).flatten(0, 1)
            y = self._conv(self.conv1, self.norm1, torch.cat([clips[:, 2:], clips], 1))
            y = self._conv(self.conv2, self.norm2, torch.cat([y, y], 1)).view(len(x), -1, self.conv2.out_channels, *x.shape[-2:])
        else:
            x = torch.cat([state[0], x], 1)
            y = torch.cat([state[1], self._conv(self.conv1, self.norm1, x)], 1)
            state = x[:, -2:], y[:, -2:]
            y = self._conv(self.conv2, self.norm2, y)
        return self.linear_layers[0](y.permute(0, 1, 3, 4, 2).flatten(1, 3)), state

    @staticmethod
    def unshuffle(lq): # (B, 3, n, H, W) -> (B, n, 768, H/16, W/16), channel (c*16 + y)*16 + x
        "Fold 16x16 pixels into channels"
        return F.pixel_unshuffle(lq.transpose(1, 2), 16)

    def _first(self, x): # frame 0 stands for its own past
        if self.variant == 'buffer': return ()
        return x.expand(-1, 2, -1, -1, -1), self._conv(self.conv1, self.norm1, x.expand(-1, 4, -1, -1, -1)).expand(-1, 2, -1, -1, -1)

    @staticmethod
    def _conv(conv, norm, x): # (B, 2+2m, C, h, w) -> (B, m, C', h, w)
        "The 3-D convolution of stride 2 as a 2-D one over 4 stacked frames: the same sums (spec 2.3)"
        x = x.unfold(1, 4, 2) # B, m, C, h, w, 4
        b, m, c, h, w, _ = x.shape
        x = F.pad(x.permute(0, 1, 2, 5, 3, 4).reshape(b * m, c * 4, h, w), (1, 1, 1, 1), mode='replicate')
        y = stacked_conv(x, conv.weight.flatten(1, 2), conv.bias)
        return F.silu(norm(y)).view(b, m, -1, h, w)
