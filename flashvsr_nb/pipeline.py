"""Frames in, frames out: the streaming pipeline"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from flashvsr_nb.dit import DiT, ModelConfig
from flashvsr_nb.kv_cache import KVCache, LQProjector, chunk
from flashvsr_nb.decoder import TCDecoder, color_fix

def _mix(x): # int64 -> int64, one round of splitmix64's finaliser; shifts made logical by a mask
    for shift, mul in ((30, -0x40a7b892e31b1a47), (27, -0x6b2fb644ecceee15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * mul
    return x ^ ((x >> 31) & ((1 << 33) - 1))

def noise_at(
    frames: range, # absolute latent frames
    height: int, # of the latents
    width: int, # of the latents
    *,
    seed: int = 0,
    channels: int = 16,
    top: int = 0, # absolute row of the first value
    left: int = 0, # absolute column of the first value
) -> torch.Tensor: # (1, channels, F, height, width) float32 standard normal, on the CPU
    "Counter-based Gaussian noise: each value depends on seed, channel and absolute position alone"
    axis = lambda start, n: torch.arange(start, start + n, dtype=torch.int64)
    key = _mix(torch.tensor([seed], dtype=torch.int64) + 0x1e3779b97f4a7c15)
    for index, shape in ((axis(frames.start, len(frames)), (-1, 1, 1)), (axis(0, channels)[:, None, None, None], None),
                         (axis(top, height)[:, None], None), (axis(left, width), None)):
        key = _mix((key ^ (index.view(shape) if shape else index)) + 0x1e3779b97f4a7c15)
    u = ((key >> 11) & ((1 << 53) - 1)).double()
    v = ((_mix(key + 1) >> 11) & ((1 << 53) - 1)).double()
    z = (-2 * torch.log1p(-u / 2**53)).sqrt() * torch.cos(2 * math.pi * v / 2**53) # Box-Muller
    return z.float()[None]

class Stream:
    "One video on its way through the model: KV caches, projector and decoder memory, and the frames read ahead"
    def __init__(self, model, *, seed=0, noise=None, policy=None, kv_slabs=None, backend='auto', cache=KVCache, record=None):
        self.model, self.seed, self.noise, self.cache = model, seed, noise, cache
        self.options = dict(policy=policy, backend=backend, record=record)
        self.kv_slabs = kv_slabs or model.cfg.kv_slabs
        self.k, self.caches, self.projector, self.decoder, self.ahead = 0, None, None, None, None

    def denoise(self, lq): # (B, 3, 25 | 8, H, W) in [-1, 1] -> clean latents (B, 16, 6 | 2, H/8, W/8)
        "LQ tokens, noise, one DiT step: x0 = noise - velocity"
        m, c = self.model, chunk(self.k)
        tokens, self.projector = m.projector(lq, self.projector)
        h, w = lq.shape[-2] // 8, lq.shape[-1] // 8
        x = noise_at(c.latents, h, w, seed=self.seed, channels=m.cfg.channels) if self.noise is None else self.noise[:, :, c.latents.start:c.latents.stop]
        x = x.to(lq).expand(len(lq), -1, -1, -1, -1)
        if self.caches is None: self.caches = [self.cache(h * w // 2, keep=self.kv_slabs) for _ in m.dit.blocks]
        self.k += 1
        return x - m.dit(x, tokens, m.cond, f0=c.latents.start, caches=self.caches, **self.options)

    def decode(self, latents, lq): # clean latents, LQ frames (B, 3, 21 | 8, H, W) -> SR as LQ, about [-1, 1]
        "Pixels of a chunk, not yet colour corrected"
        y, self.decoder = self.model.decoder(latents, lq, self.decoder)
        return 2 * y.float() - 1

    def push(self, lq): # next 25 (first) or 8 LQ frames (B, 3, n, H, W) -> SR frames (B, 3, 21 | 8, H, W) in [-1, 1], float32
        "One chunk, 4 frames behind its input"
        latents = self.denoise(lq)
        lq = lq if self.ahead is None else torch.cat([self.ahead, lq], 2)
        lq, self.ahead = lq[:, :, :-4], lq[:, :, -4:]
        return color_fix(self.decode(latents, lq), lq, method=self.model.cfg.color_fix)

class FlashVSR(nn.Module):
    "The whole network: LQ projector, DiT, decoder and prompt context"
    def __init__(self, cfg, *, context=8): # ModelConfig; number of prompt positions
        super().__init__()
        self.cfg = cfg
        self.dit = DiT(cfg)
        self.projector = LQProjector(cfg.proj_dims, cfg.dim, variant=cfg.projector)
        self.decoder = TCDecoder(cfg.decoder_channels, cfg.channels, residual=cfg.residual)
        self.context = nn.Parameter(torch.randn(1, context, cfg.text_dim))

    @property
    def cond(self):
        return self.dit.condition(self.context)
