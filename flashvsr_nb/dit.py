"""From denoising step by step to one step: the diffusion transformer"""
import math
from dataclasses import dataclass, field, asdict

import torch
import torch.nn.functional as F
from torch import nn

from flashvsr_nb.attention import LCSA, attend
from flashvsr_nb.patching import apply_rope, block_grid, rope_table, window_merge, window_partition

__all__ = ['ModelConfig', 'RMSNorm', 'modulate', 'timestep_embedding', 'SelfAttention', 'CrossAttention', 'Block', 'Conditioning', 'DiT']

@dataclass(frozen=True)
class ModelConfig:
    "The numbers that describe one model: DiT, LQ projector, decoder and the policies they were trained with"
    dim: int = 1536 # token width D
    heads: int = 12 # attention heads; D/heads is the head width d
    layers: int = 30 # DiT blocks
    ffn_dim: int = 8960 # hidden width of the feed-forward network
    text_dim: int = 4096 # width of the prompt context
    freq_dim: int = 256 # width of the time step's sinusoidal embedding
    channels: int = 16 # latent channels, in and out
    eps: float = 1e-6 # of every norm in the DiT
    proj_dims: tuple = (2048, 3072) # outputs of the LQ projector's two convolutions
    projector: str = 'causal' # its cache rule: 'causal' (v1.1 weights) or 'buffer' (v1)
    decoder_channels: tuple = (512, 256, 128, 128) # decoder widths at H/8, H/4, H/2, H
    residual: bool = False # True: the decoder predicts what to add to LQ
    key_blocks: float = 120. # LCSA: average key blocks per query block
    local_range: int = 11 # LCSA: window side, blocks
    kv_slabs: int = 3 # slabs kept in the KV cache
    resize: str = 'pil' # x4 filter that makes LQ: 'pil' (bicubic a=-0.5, 8-bit) or 'torch' (a=-0.75)
    color_fix: str = 'adain' # 'adain', 'wavelet' or 'none'

    @classmethod
    def wan1_3b(cls, version: str = 'v1.1'): # 'v1.1' or 'v1' -> ModelConfig
        "The official FlashVSR: 1.4 B parameters in the DiT"
        if version not in ('v1', 'v1.1'): raise ValueError(f"version={version!r}: must be 'v1' or 'v1.1'")
        return cls(projector='causal' if version == 'v1.1' else 'buffer')

    @classmethod
    def nano(cls):
        "Our small model: under 5 M parameters, trained in minutes, shipped with the package"
        return cls(dim=256, heads=2, layers=2, ffn_dim=512, text_dim=64, freq_dim=64, proj_dims=(24, 64), decoder_channels=(80, 64, 24, 16),
                   residual=True, key_blocks=12., local_range=5, resize='torch', color_fix='none')

    @property
    def lcsa(self): # -> LCSA
        "The mask policy these weights were trained with"
        return LCSA(self.key_blocks, self.local_range)

class RMSNorm(nn.Module):
    "x / rms(x) * weight over the last axis, in float32 (spec 3.5)"
    def __init__(self, dim: int, eps: float = 1e-6): # width; added to the mean square
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x): # (..., dim) -> same
        "Normalise the last axis"
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight.to(x.dtype)

def modulate(
    x: torch.Tensor, # (B, L, D) tokens
    shift: torch.Tensor, # (B, 1, D)
    scale: torch.Tensor, # (B, 1, D)
    *,
    eps: float = 1e-6, # of the layer norm
) -> torch.Tensor: # (B, L, D)
    "adaLN: a layer norm whose gain and offset come from the condition"
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift

def timestep_embedding(
    t: float, # diffusion time, 0 (clean) .. 1000 (noise)
    dim: int, # width, even
    *,
    device=None, # where it is wanted
) -> torch.Tensor: # (1, dim) float64: cosines, then sines, of t * 10000^(-2i/dim)
    "Sinusoidal embedding of the diffusion time (spec 3.2)"
    angle = t * 10000. ** (-torch.arange(dim // 2, dtype=torch.float64, device=device) / (dim // 2))
    return torch.cat([angle.cos(), angle.sin()])[None]

def _heads(x, n): return x.unflatten(-1, (n, -1)).transpose(1, 2) # (B, L, D) -> (B, heads, L, d)
def _merge(x): return x.transpose(1, 2).flatten(2) # (B, heads, L, d) -> (B, L, D)

class _Attention(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.heads = cfg.heads
        self.q, self.k, self.v, self.o = (nn.Linear(cfg.dim, cfg.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(cfg.dim, cfg.eps), RMSNorm(cfg.dim, cfg.eps)

class SelfAttention(_Attention):
    "Windowed block-sparse attention of a chunk on itself and on what the KV cache remembers (spec 3.5)"
    def forward(
        self,
        x, # (B, L, D) in window order
        rope, # (cos, sin) of `rope_table`
        *,
        grid, # (rows, cols) of blocks in a slab
        policy, # policy(q, k, grid=grid) -> block mask or None; has block_size
        cache=None, # KV cache of this layer: cache.update(k, v) -> all keys and values
        backend='auto', # attention back end
        record=None, # called with the block mask
    ): # -> (B, L, D)
        "Queries of this chunk against its own keys and the cached ones"
        q, k, v = _heads(self.norm_q(self.q(x)), self.heads), _heads(self.norm_k(self.k(x)), self.heads), _heads(self.v(x), self.heads)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if cache is not None: k, v = cache.update(k, v)
        mask = policy(q, k, grid=grid)
        if record is not None: record(mask)
        return self.o(_merge(attend(q, k, v, block_mask=mask, block_size=policy.block_size, backend=backend)))

class CrossAttention(_Attention):
    "Attention of the tokens on the prompt, whose keys and values never change"
    def forward(self, x, kv): # (B, L, D) and (k, v), each (1, heads, n, d) -> (B, L, D)
        "Queries against the prompt's keys"
        q = _heads(self.norm_q(self.q(x)), self.heads)
        return self.o(_merge(F.scaled_dot_product_attention(q, *(t.expand(q.shape[0], -1, -1, -1) for t in kv))))

    def prompt(self, c): # (1, n, D) -> (k, v), each (1, heads, n, d)
        "Keys and values of the prompt"
        return _heads(self.norm_k(self.k(c)), self.heads), _heads(self.v(c), self.heads)

class Block(nn.Module):
    "One DiT block: self-attention and FFN with adaLN and gates, cross-attention between them (spec 3.5)"
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.eps = cfg.eps
        self.self_attn, self.cross_attn = SelfAttention(cfg), CrossAttention(cfg)
        self.norm3 = nn.LayerNorm(cfg.dim, eps=cfg.eps)
        self.ffn = nn.Sequential(nn.Linear(cfg.dim, cfg.ffn_dim), nn.GELU('tanh'), nn.Linear(cfg.ffn_dim, cfg.dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, cfg.dim) / cfg.dim**0.5)

    def forward(self, x, t6, prompt, rope, **attn): # (B, L, D), (1, 6, D), (k, v), tables, `SelfAttention` options -> (B, L, D)
        "x plus what attention and FFN add to it"
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + t6).split(1, 1)
        x = x + gate1 * self.self_attn(modulate(x, shift1, scale1, eps=self.eps), rope, **attn)
        x = x + self.cross_attn(self.norm3(x), prompt)
        return x + gate2 * self.ffn(modulate(x, shift2, scale2, eps=self.eps))

class Head(nn.Module):
    "Tokens to latent patches, with adaLN"
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.eps = cfg.eps
        self.modulation = nn.Parameter(torch.randn(1, 2, cfg.dim) / cfg.dim**0.5)
        self.head = nn.Linear(cfg.dim, 4 * cfg.channels)

    def forward(self, x, t): # (B, L, D), (1, D) -> (B, L, 4*channels)
        "Shift and scale by the time vector, then one linear map"
        return self.head(modulate(x, *(self.modulation + t[:, None]).split(1, 1), eps=self.eps))

@dataclass
class Conditioning:
    "What time step and prompt contribute: constant in one-step inference, computed once (spec 3.2)"
    t: torch.Tensor # (1, D)
    t6: torch.Tensor # (1, 6, D)
    prompt: list # per block: (k, v), each (1, heads, n, d)

class DiT(nn.Module):
    "The streaming video DiT; module and parameter names are those of the official checkpoint (825 tensors at full size)"
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        D = cfg.dim
        self.patch_embedding = nn.Conv3d(cfg.channels, D, (1, 2, 2), stride=(1, 2, 2))
        self.text_embedding = nn.Sequential(nn.Linear(cfg.text_dim, D), nn.GELU('tanh'), nn.Linear(D, D))
        self.time_embedding = nn.Sequential(nn.Linear(cfg.freq_dim, D), nn.SiLU(), nn.Linear(D, D))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.head = Head(cfg)

    def condition(
        self,
        context: torch.Tensor, # (1, n, text_dim) prompt context
        *,
        t: float = 1000., # diffusion time: 1000 is pure noise, the only step of a one-step model
    ) -> Conditioning:
        "Everything that depends on prompt and time step only"
        w = self.text_embedding[0].weight
        e = self.time_embedding(timestep_embedding(t, self.cfg.freq_dim, device=w.device).to(w))
        c = self.text_embedding(context.to(w))
        return Conditioning(e, self.time_projection(e).unflatten(1, (6, -1)), [b.cross_attn.prompt(c) for b in self.blocks])

    def drop_conditioning(self):
        "Free what `condition` alone uses: 319 MiB of the official model in bf16 (spec 3.2)"
        del self.text_embedding, self.time_embedding, self.time_projection
        for b in self.blocks: del b.cross_attn.k, b.cross_attn.v, b.cross_attn.norm_k

    def forward(
        self,
        x: torch.Tensor, # (B, 16, f, H/8, W/8) noisy latents, f even, H and W multiples of 128
        lq_tokens: torch.Tensor, # (B, f*h*w, D) from the LQ projector, order (f, h, w)
        cond: Conditioning, # from `condition`
        *,
        f0: int = 0, # absolute index of the first latent frame
        caches=None, # one KV cache per block
        policy=None, # mask policy; None: the config's LCSA
        backend: str = 'auto', # attention back end
        record=None, # called with every block's mask
    ) -> torch.Tensor: # (B, 16, f, H/8, W/8) velocity
        "Velocity of one chunk; x0 = x - velocity"
        y = self.patch_embedding(x)
        size = y.shape[2:]
        y = window_partition(y.permute(0, 2, 3, 4, 1)) + window_partition(lq_tokens.unflatten(1, size))
        attn = dict(grid=block_grid(*size[1:]), policy=policy or self.cfg.lcsa, backend=backend, record=record)
        rope = rope_table(size, self.cfg.dim // self.cfg.heads, f0=f0, device=x.device)
        for i, block in enumerate(self.blocks):
            y = block(y, cond.t6, cond.prompt[i], rope, cache=None if caches is None else caches[i], **attn)
        y = window_merge(self.head(y, cond.t), size=size) # B, f, h, w, (2, 2, 16)
        return y.unflatten(-1, (2, 2, -1)).permute(0, 6, 1, 2, 4, 3, 5).reshape(x.shape)
