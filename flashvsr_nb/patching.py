"""Cutting images and video latents into patches, windows and positions"""
import math

import torch
from torch import nn

__all__ = ['WINDOW', 'patchify', 'unpatchify', 'sincos_positions', 'PatchEmbed', 'window_partition', 'window_merge',
           'block_grid', 'rope_frequencies', 'rope_table', 'apply_rope']

WINDOW = (2, 8, 8)  # one block: 2 latent frames x 8 x 8 patches = 128 tokens = 128x128 output pixels x 8 frames

def patchify(
    x: torch.Tensor, # (B, C, H, W) image or (B, C, F, H, W) video; every patched side a multiple of `patch`
    patch: int, # side P of a square patch, pixels
) -> torch.Tensor: # (B, N, P*P*C), N = H*W/P^2 (times F for video), rows first; within a patch: row, column, channel
    "Flatten `x` into non-overlapping `patch`x`patch` patches (paper eq. 4: R^{HxWxC} -> R^{N x P^2 C})"
    *lead, h, w = x.shape
    if h % patch or w % patch: raise ValueError(f"patchify: {h}x{w} is not a multiple of patch={patch}; pad or crop first")
    x = x.unflatten(-1, (w // patch, patch)).unflatten(-3, (h // patch, patch)) # ..., h/P, P, w/P, P
    if len(lead) == 2: x = x.unsqueeze(2) # an image is a video of one frame
    return x.permute(0, 2, 3, 5, 4, 6, 1).flatten(4).flatten(1, 3)

def unpatchify(
    tokens: torch.Tensor, # (B, N, P*P*C) as `patchify` gives them
    patch: int, # side P of a patch, pixels
    *,
    size: tuple, # (H, W) of the image, or (F, H, W) of the video, pixels
) -> torch.Tensor: # (B, C, H, W) or (B, C, F, H, W)
    "Inverse of `patchify`"
    f, h, w = size if len(size) == 3 else (1, *size)
    n = f * (h // patch) * (w // patch)
    if tokens.shape[1] != n: raise ValueError(f"unpatchify: {tokens.shape[1]} tokens, but size={size} with patch={patch} needs {n}")
    x = tokens.view(-1, f, h // patch, w // patch, patch, patch, tokens.shape[-1] // patch**2)
    x = x.permute(0, 6, 1, 2, 4, 3, 5).reshape(x.shape[0], -1, f, h, w)
    return x if len(size) == 3 else x.squeeze(2)

def sincos_positions(
    n: int, # number of positions
    dim: int, # width D, even
    *,
    max_period: float = 10000., # longest wavelength / 2 pi
) -> torch.Tensor: # (n, dim) float32, sines in the first half, cosines in the second
    "Fixed sine-cosine position embedding of positions 0..n-1"
    if dim % 2: raise ValueError(f"sincos_positions: dim={dim} must be even")
    angle = torch.arange(n, dtype=torch.float64)[:, None] * max_period ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    return torch.cat([angle.sin(), angle.cos()], 1).float()

class PatchEmbed(nn.Module):
    "ViT's input layer: patches, one linear map, learnt positions (paper eq. 4)"
    def __init__(
        self,
        patch: int, # side P of a patch, pixels
        channels: int, # image channels C
        *,
        dim: int, # token width D
        n: int, # number of patches N
    ):
        super().__init__()
        self.patch, self.proj, self.pos = patch, nn.Linear(patch**2 * channels, dim), nn.Parameter(sincos_positions(n, dim)[None])

    def forward(self, x): # (B, C, H, W) -> (B, N, D)
        "Patches to tokens"
        return self.proj(patchify(x, self.patch)) + self.pos

def block_grid(
    h: int, # tokens per column (output height / 16)
    w: int, # tokens per row (output width / 16)
) -> tuple: # (rows, columns) of blocks in one slab; their product is S
    "The block grid of one slab"
    if h % WINDOW[1] or w % WINDOW[2] or h < 1 or w < 1:
        raise ValueError(f"block_grid: {h}x{w} tokens do not divide into {WINDOW[1]}x{WINDOW[2]} windows; output sides must be multiples of 128")
    return h // WINDOW[1], w // WINDOW[2]

def window_partition(
    x: torch.Tensor, # (B, F, h, w, D) tokens on their grid; F even, h and w multiples of 8
) -> torch.Tensor: # (B, F*h*w, D) in window order: blocks by (slab, row, column), inside a block (2, 8, 8)
    "Put tokens in window order: each run of 128 tokens is one block"
    b, f, h, w, d = x.shape
    if f % WINDOW[0]: raise ValueError(f"window_partition: {f} latent frames, must be a multiple of {WINDOW[0]}")
    rows, cols = block_grid(h, w)
    x = x.view(b, f // WINDOW[0], WINDOW[0], rows, WINDOW[1], cols, WINDOW[2], d)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, f * h * w, d)

def window_merge(
    x: torch.Tensor, # (B, F*h*w, D) in window order
    *,
    size: tuple, # (F, h, w), tokens
) -> torch.Tensor: # (B, F, h, w, D)
    "Inverse of `window_partition`"
    f, h, w = size
    rows, cols = block_grid(h, w)
    x = x.view(x.shape[0], f // WINDOW[0], rows, cols, *WINDOW, x.shape[-1])
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(x.shape[0], f, h, w, -1)

def rope_frequencies(
    head_dim: int, # width d of one head, even
    *,
    theta: float = 10000., # base
    device=None, # where they are wanted; needs float64 there
) -> tuple: # three float64 vectors: omega for time, height, width; for d=128: 22, 21, 21 values
    "Angular frequency per complex pair: omega_i = theta^(-2i/n), n the real dims an axis owns: 44/42/42 of 128 (spec 3.4)"
    axis = head_dim // 3 // 2 * 2 # real dims of height and of width
    dims = (head_dim - 2 * axis, axis, axis)
    return tuple(theta ** (-torch.arange(0, n, 2, dtype=torch.float64, device=device) / n) for n in dims)

def rope_table(
    size: tuple, # (F, h, w) of the chunk, tokens
    head_dim: int, # width d of one head
    *,
    f0: int = 0, # absolute index of the chunk's first latent frame
    device=None, # where the tables are wanted
) -> tuple: # (cos, sin), each (F*h*w, d/2) float32 in window order
    "Angles of 3-D rotary positions, computed in float64 for any frame index (the reference's table ends at 1024)"
    where = 'cpu' if torch.device(device or 'cpu').type == 'mps' else device # MPS has no float64
    axes = [torch.arange(o, o + n, dtype=torch.float64, device=where) for n, o in zip(size, (f0, 0, 0))]
    grids = torch.meshgrid(*axes, indexing='ij')
    angle = torch.cat([g[..., None] * w for g, w in zip(grids, rope_frequencies(head_dim, device=where))], -1)
    angle = window_partition(angle[None])[0]
    return angle.cos().float().to(device), angle.sin().float().to(device)

def apply_rope(
    x: torch.Tensor, # (B, heads, L, d)
    cos: torch.Tensor, # (L, d/2) from `rope_table`
    sin: torch.Tensor, # (L, d/2)
) -> torch.Tensor: # as x
    "Rotate the interleaved pairs (2i, 2i+1) of each head by the position's angle, in float32 at least"
    dtype = torch.promote_types(x.dtype, torch.float32)
    a, b = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)
