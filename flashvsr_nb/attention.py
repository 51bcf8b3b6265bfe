"""Attention by hand, in blocks, and through whichever back end runs here"""
import functools
import importlib.util
import math
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F

__all__ = ['attend', 'attend_reference', 'backends', 'Backend', 'pick_backend', 'expand_mask', 'pool_blocks', 'block_probabilities',
           'locality_mask', 'select_blocks', 'LCSA']

# ---- masks
def expand_mask(
    block_mask: torch.Tensor, # bool (B, heads, query blocks, key blocks)
    block_size: tuple = (128, 128), # tokens per query block, tokens per key block
) -> torch.Tensor: # bool (B, heads, query tokens, key tokens)
    "A block mask spelt out token by token"
    return block_mask.repeat_interleave(block_size[0], -2).repeat_interleave(block_size[1], -1)

def pool_blocks(
    x: torch.Tensor, # (B, heads, tokens, d) in window order
    block: int, # tokens per block
) -> torch.Tensor: # (B, heads, blocks, d)
    "One mean vector per block (spec 4.1)"
    return x.unflatten(2, (-1, block)).mean(3)

def locality_mask(
    rows: int, # block rows of a slab
    cols: int, # block columns of a slab
    local_range: int, # window side R, blocks; even values reach one block further up and left
    *,
    device=None, # where the mask is wanted
) -> torch.Tensor: # bool (S, S), S = rows*cols: may query block i see key block j of any slab?
    "Which block may look at which: -R//2 <= distance <= R-1-R//2 on both axes (spec 4.2)"
    def near(n): # bool (n, n) along one axis
        distance = (i := torch.arange(n, device=device))[None] - i[:, None]
        return (distance >= -(local_range // 2)) & (distance <= local_range - 1 - local_range // 2)
    return (near(rows)[:, None, :, None] & near(cols)[None, :, None, :]).reshape(rows * cols, rows * cols)

def block_probabilities(
    q: torch.Tensor, # (B, heads, query tokens, d) in window order
    k: torch.Tensor, # (B, heads, key tokens, d)
    *,
    local: torch.Tensor, # bool (S, S) from `locality_mask`
    block_size: tuple = (128, 128), # tokens per query and per key block
) -> torch.Tensor: # (B, heads, query blocks, key blocks) float32, rows sum to one
    "Draft attention between block means, softmax over the allowed key blocks (spec 4.1-4.3)"
    score = pool_blocks(q, block_size[0]) @ pool_blocks(k, block_size[1]).transpose(-1, -2) / math.sqrt(q.shape[-1])
    halves = block_size[0] // block_size[1]
    allow = local.repeat_interleave(halves, 1)
    allow = allow.repeat(score.shape[-2] // allow.shape[0], score.shape[-1] // allow.shape[1])
    return score.float().masked_fill(~allow, -math.inf).softmax(-1)

def select_blocks(
    p: torch.Tensor, # (B, heads, query blocks, key blocks) draft probabilities
    *,
    topk: int, # entries to keep per head and query slab
    slab: int, # query blocks S of one slab: they share the budget
) -> torch.Tensor: # bool, as p
    "Keep the entries strictly above the (topk+1)-th largest of their head and query slab (spec 4.3)"
    groups = p.unflatten(2, (-1, slab)).flatten(3) # B, heads, slabs, S*Nk
    if topk <= 0: return torch.zeros_like(p, dtype=torch.bool)
    k = min(topk, groups.shape[-1] - 1)
    threshold = groups.topk(k + 1, -1).values[..., -1:]
    return (groups > threshold).view_as(p)

@dataclass(frozen=True)
class LCSA:
    "Locality-constrained sparse attention: which key blocks a query block reads (spec 4)"
    key_blocks: float = 120. # average number of 128-token key blocks per query block
    local_range: int = 11 # window side R, blocks
    block_size: tuple = (128, 128) # (128, 64) selects half blocks with the same number of entries, as the reference's variant does
    topk_ratio: float | None = None # the reference's own unit, instead of key_blocks: topk = int(S*S*topk_ratio) - 1

    def topk(self, slab: int) -> int: # S, blocks per slab -> entries kept per head and query slab
        "The budget of one head and query slab"
        return int(slab * self.key_blocks if self.topk_ratio is None else slab * slab * self.topk_ratio) - 1

    def __call__(
        self,
        q: torch.Tensor, # (B, heads, query tokens, d) in window order, after RoPE
        k: torch.Tensor, # (B, heads, key tokens, d), whole slabs
        *,
        grid: tuple, # (rows, cols) of a slab
    ) -> torch.Tensor: # bool (B, heads, query blocks, key blocks)
        "The block mask of one layer and chunk"
        with torch.no_grad():
            p = block_probabilities(q, k, local=locality_mask(*grid, self.local_range, device=q.device), block_size=self.block_size)
            return select_blocks(p, topk=self.topk(grid[0] * grid[1]), slab=grid[0] * grid[1])

# ---- back ends
def attend_reference(q, k, v, *, block_mask=None, block_size=(128, 128), scale=None):
    "softmax(q k^T * scale) v in plain PyTorch, float32 softmax, every score in memory; rows without keys give 0"
    score = (q @ k.transpose(-1, -2)).float() * scale
    if block_mask is not None: score = score.masked_fill(~expand_mask(block_mask, block_size), -math.inf)
    p = (score - score.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)).exp()
    return ((p / p.sum(-1, keepdim=True).clamp_min(1e-30)).to(v.dtype) @ v)

def _sdpa(q, k, v, *, block_mask=None, block_size=(128, 128), scale=None, budget=2**25):
    "Gather each query block's own key blocks, at most `budget` elements at a time, and call torch's kernel on them"
    if block_mask is None: return F.scaled_dot_product_attention(q, k, v, scale=scale)
    (b, h, lq, d), (bq, bk), nk = q.shape, block_size, block_mask.shape[-1]
    out = torch.zeros_like(q, memory_format=torch.contiguous_format).view(-1, 1, bq, d)
    q, k, v = q.reshape(-1, 1, bq, d), k.reshape(-1, bk, d), v.reshape(-1, bk, d)
    rows = block_mask.reshape(-1, nk) # one row per (batch, head, query block)
    count, order = rows.sum(-1).sort(descending=True) # rows of similar length together: little padding
    count = [n for n in count.tolist() if n] # empty rows stay 0
    start = 0
    while start < len(count):
        n = count[start] # the longest row of this group
        stop = min(start + max(1, budget // (n * bk * d)), len(count))
        row = order[start:stop]
        keep, column = rows[row].to(torch.uint8).sort(dim=-1, descending=True, stable=True)
        column = column[:, :n] + (row // (lq // bq) * nk)[:, None]
        pad = None if count[stop - 1] == n else keep[:, None, None, :n].bool().repeat_interleave(bk, -1)
        kr, vr = (x[column].flatten(1, 2)[:, None] for x in (k, v))
        out[row] = F.scaled_dot_product_attention(q[row], kr, vr, attn_mask=pad, scale=scale)
        start = stop
    return out.view(b, h, lq, d)

@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention
    return torch.compile(flex_attention, dynamic=False)

def _flex(q, k, v, *, block_mask=None, block_size=(128, 128), scale=None):
    "torch's FlexAttention: skips the blocks that the mask leaves out; every kept block is full"
    from torch.nn.attention.flex_attention import BlockMask
    if block_mask is None: return _compiled_flex()(q, k, v, scale=scale)
    count, column = block_mask.sum(-1, dtype=torch.int32), block_mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    mask = BlockMask.from_kv_blocks(torch.zeros_like(count), torch.zeros_like(column, dtype=torch.int32), count,
                                    column.to(torch.int32), BLOCK_SIZE=block_size, seq_lengths=(q.shape[2], k.shape[2]))
    out = _compiled_flex()(q, k, v, block_mask=mask, scale=scale)
    return torch.where((count > 0).repeat_interleave(block_size[0], -1)[..., None], out, 0)

def _flex_usable(device):
    if device.type != 'cuda': return f"needs CUDA, tensors are on {device.type}"
    return None if importlib.util.find_spec('triton') else "needs the package triton: pip install triton"

@dataclass(frozen=True)
class Backend:
    "One way to compute attention"
    fn: Callable # fn(q, k, v, *, block_mask, block_size, scale) -> (B, heads, query tokens, d)
    about: str # one line
    exact: bool = True # does it compute what `reference` does, up to rounding? `auto` picks only from these
    unusable: Callable = lambda device: None # torch.device -> why it cannot run there, or None

backends = {
    'reference': Backend(attend_reference, "plain PyTorch, all scores in memory"),
    'sdpa': Backend(_sdpa, "torch scaled_dot_product_attention on each query block's own key blocks"),
    'flex': Backend(_flex, "torch flex_attention, compiled, skips masked blocks", unusable=_flex_usable),
}

def pick_backend(
    device, # torch.device or its name
) -> str: # the fastest exact back end that is usable there
    "What `auto` means on this device"
    return 'sdpa' if backends['flex'].unusable(torch.device(device)) else 'flex'

def attend(
    q: torch.Tensor, # (B, heads, query tokens, d)
    k: torch.Tensor, # (B, heads, key tokens, d), same dtype and device as q
    v: torch.Tensor, # as k
    *,
    block_mask: torch.Tensor | None = None, # bool (B, heads, query blocks, key blocks); None: every key
    block_size: tuple = (128, 128), # tokens per query block, per key block
    scale: float | None = None, # of the scores; None: 1/sqrt(d)
    backend: str = 'auto', # a name in `backends`, or 'auto': the fastest exact one here
) -> torch.Tensor: # as q; a query block that keeps no key block gives 0
    "Block-sparse attention: softmax over the kept keys only; the mask is honoured or the call refused"
    if backend == 'auto': backend = pick_backend(q.device)
    if backend not in backends: raise ValueError(f"attention backend {backend!r} is unknown; choose auto or one of: {', '.join(backends)}")
    if why := backends[backend].unusable(q.device): raise RuntimeError(f"attention backend {backend!r} cannot run here: {why}; use auto or sdpa")
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attend: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must agree in batch, heads and head_dim, k and v in all")
    if block_mask is not None: _check_mask(q, k, block_mask, block_size)
    return backends[backend].fn(q, k, v, block_mask=block_mask, block_size=tuple(block_size), scale=scale or q.shape[-1] ** -0.5)

def _check_mask(q, k, block_mask, block_size):
    need = (*q.shape[:2], q.shape[2] / block_size[0], k.shape[2] / block_size[1])
    if block_mask.dtype != torch.bool or tuple(block_mask.shape) != need:
        raise ValueError(f"attend: block_mask is {block_mask.dtype} {tuple(block_mask.shape)}, must be bool "
                         f"{need} for q {tuple(q.shape)}, k {tuple(k.shape)} and block_size={tuple(block_size)}")
