"""From latents to pixels: the Tiny Conditional Decoder, and colour correction"""
import torch
import torch.nn.functional as F
from torch import nn

__all__ = ['MemBlock', 'TGrow', 'TCDecoder', 'adain', 'wavelet', 'color_fix']

class MemBlock(nn.Module):
    "A residual block that also sees its own input of one step ago (spec 6.2)"
    def __init__(self, channels: int): # in and out
        super().__init__()
        conv = lambda n: nn.Conv2d(n, channels, 3, padding=1)
        self.conv = nn.Sequential(conv(2 * channels), nn.ReLU(), conv(channels), nn.ReLU(), conv(channels))

    def forward(self, x, past): # (T*B, C, h, w) steps in order, (B, C, h, w) the step before -> (T*B, C, h, w), new past
        "All steps of a chunk at once: the past of step t is the input at t-1"
        before = torch.cat([past, x[:-len(past)]])
        return F.relu(self.conv(torch.cat([x, before], 1)) + x), x[-len(past):]

class TGrow(nn.Module):
    "Twice the size, and one step becomes `stride` steps: a 1x1 convolution to stride*C channels, cut into time (spec 6.2)"
    def __init__(self, channels: int, stride: int): # in and out per step; steps out per step in
        super().__init__()
        self.stride, self.conv = stride, nn.Conv2d(channels, channels * stride, 1, bias=False)

    def forward(self, x, batch=1): # (T*B, C, h, w), B -> (T*stride*B, C, 2h, 2w)
        "Grow, then enlarge: nearest enlargement and a 1x1 convolution commute, and before it the convolution has 4 times less to do"
        y = self.conv(x)
        if self.stride > 1: y = y.unflatten(0, (-1, batch)).unflatten(2, (self.stride, -1)).transpose(1, 2).flatten(0, 2)
        return F.interpolate(y, scale_factor=2)

class TCDecoder(nn.Module):
    "Latents and LQ frames to SR frames (spec 6); keys as in TCDecoder.ckpt: decoder.{index of the layer}"
    def __init__(
        self,
        channels: tuple = (512, 256, 128, 128), # widths at H/8, H/4, H/2, H
        latent_channels: int = 16, # of the DiT's latents
        *,
        residual: bool = False, # add LQ to the result
    ):
        super().__init__()
        (c0, c1, c2, c3), self.residual, self.tail_steps = channels, residual, 1
        conv = lambda i, o, bias=False: nn.Conv2d(i, o, 3, padding=1, bias=bias)
        mem = lambda c: [MemBlock(c) for _ in range(3)]
        self.decoder = nn.ModuleList([
            nn.Identity(), conv(latent_channels + 768, c0, True), nn.ReLU(), conv(c0, c0), nn.ReLU(), *mem(c0),
            nn.Identity(), TGrow(c0, 1), conv(c0, c1), *mem(c1),
            nn.Identity(), TGrow(c1, 2), conv(c1, c2), *mem(c2),
            nn.Identity(), TGrow(c2, 2), conv(c2, c3), nn.ReLU(), conv(c3, c3), nn.ReLU(), conv(c3, 3, True)])

    def forward(
        self,
        latents: torch.Tensor, # (B, C, T, H/8, W/8)
        lq: torch.Tensor, # (B, 3, F, H, W) in [-1, 1]: F = 4T-3 at the start of a video, 4T later
        state=None, # what the last call returned; None at the start of a video
    ): # -> frames (B, 3, F, H, W) in about [0, 1]; new state
        "Decode the next T latents, every step of the chunk in one batch"
        first = state is None
        missing = 4 * latents.shape[2] - lq.shape[2]
        if missing != (3 if first else 0): raise ValueError(
            f"TCDecoder: {latents.shape[2]} latents need {4 * latents.shape[2] - 3 * first} LQ frames, got {lq.shape[2]}")
        b = len(lq)
        fold = self.fold(torch.cat([lq[:, :, :1].expand(-1, -1, missing, -1, -1), lq], 2))
        x = torch.cat([fold, latents.permute(2, 0, 1, 3, 4).flatten(0, 1)], 1)
        x = x.contiguous(memory_format=torch.channels_last)
        x, state = self._body(3 * torch.tanh(x / 3), state, b)
        y = torch.cat([self._tail(step, b) for step in x.split(b * self.tail_steps)])[missing * b:]
        y = y.unflatten(0, (-1, b)).permute(1, 2, 0, 3, 4)
        return (y + (lq + 1) / 2 if self.residual else y), state

    @staticmethod
    def fold(lq): # (B, 3, 4g, H, W) -> (g*B, 768, H/8, W/8), channel ((c*4 + t)*8 + y)*8 + x
        "Fold 4 frames of 8x8 pixels into channels"
        return F.pixel_unshuffle(lq.unflatten(2, (-1, 4)).permute(2, 0, 1, 3, 4, 5).flatten(0, 1).flatten(1, 2), 8)

    def _body(self, x, state, batch): # (T*B, 784, H/8, W/8) -> (2T*B, c2, H/2, W/2), new state
        past, new = iter(state or ()), []
        for layer in self.decoder[1:20]:
            if isinstance(layer, MemBlock):
                x, last = layer(x, next(past, torch.zeros_like(x[:batch])))
                new.append(last)
            else: x = layer(x, batch) if isinstance(layer, TGrow) else layer(x)
        return x, new

    def _tail(self, x, batch): # (n*B, c2, H/2, W/2) -> (2n*B, 3, H, W); no memory, so a few steps at a time: full-size tensors are large
        grow, *rest = self.decoder[21:]
        x = grow(x, batch)
        for layer in rest: x = layer(x)
        return x

def adain(
    sr: torch.Tensor, # (B, 3, F, H, W) in [-1, 1]
    lq: torch.Tensor, # as sr
) -> torch.Tensor: # float32 in [-1, 1]
    "Give each frame and channel of `sr` the mean and deviation of `lq` (spec 8)"
    stats = lambda x: (x.mean((-2, -1), keepdim=True), (x.var((-2, -1), unbiased=False, keepdim=True) + 1e-5).sqrt())
    sr, lq = sr.float(), lq.float()
    (mean, dev), (mean_lq, dev_lq) = stats(sr), stats(lq)
    return ((sr - mean) / dev * dev_lq + mean_lq).clamp(-1, 1)

def _low(x, levels=5): # (B, 3, F, H, W): dilated 1-2-1 blurs, one after another
    shape, x = x.shape, x.float().transpose(1, 2).flatten(0, 2)[:, None]
    k = torch.tensor([1., 2, 1], device=x.device)
    k = (k[:, None] * k / 16)[None, None]
    for d in (2**i for i in range(levels)): x = F.conv2d(F.pad(x, (d, d, d, d), mode='replicate'), k, dilation=d)
    return x.view(shape[0], shape[2], shape[1], *shape[3:]).transpose(1, 2)

def wavelet(
    sr: torch.Tensor, # (B, 3, F, H, W) in [-1, 1]
    lq: torch.Tensor, # as sr
) -> torch.Tensor: # float32 in [-1, 1]
    "Keep the fine detail of `sr`, take the five-level blur of `lq` (spec 8): the detail bands telescope to sr - low(sr)"
    return (sr.float() - _low(sr) + _low(lq)).clamp(-1, 1)

def color_fix(
    sr: torch.Tensor, # (B, 3, F, H, W) about [-1, 1]
    lq: torch.Tensor, # as sr
    *,
    method: str = 'adain', # 'adain', 'wavelet' or 'none'
) -> torch.Tensor: # float32 in [-1, 1]
    "Colour correction by name, always in float32"
    if method not in ('adain', 'wavelet', 'none'): raise ValueError(f"color_fix: method={method!r} must be adain, wavelet or none")
    return sr.float().clamp(-1, 1) if method == 'none' else {'adain': adain, 'wavelet': wavelet}[method](sr, lq)
