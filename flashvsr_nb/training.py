"""How nano was trained: noise in, video out, in one step, in minutes"""
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from flashvsr_nb.kv_cache import ConcatCache
from flashvsr_nb.pipeline import Stream

# ---- clips: real ones, and stills set in motion
def wander(
    frames: int, # length of the path
    speed: float, # typical change per frame
    *,
    device='cpu',
) -> torch.Tensor: # (frames,) float32, starts at 0
    "A smooth random path: a random velocity that drifts slowly"
    kick = torch.randn(1, 1, frames, device=device) * 0.35
    hann = torch.hann_window(9, periodic=False, device=device)
    drift = F.conv1d(F.pad(kick, (4, 4), mode='replicate'), (hann / hann.sum())[None, None])[0, 0]
    path = torch.cumsum((torch.randn((), device=device) + drift) * speed, 0)
    return path - path[0]

def fly_over(
    still: torch.Tensor, # (3, h, w) uint8 on any device
    frames: int, # length of the clip
    size: int, # side of the square frames, pixels
    *,
    speed: float = 2., # typical motion, pixels per frame
    zoom: float = 1., # picture pixels per clip pixel
) -> torch.Tensor: # (frames, 3, size, size) float32 in [0, 1]
    "A camera that shifts, turns, zooms and tilts smoothly over a picture (bicubic sampling)"
    dev = still.device
    path = lambda s: wander(frames, s, device=dev)[:, None, None]
    r = torch.arange(size, device=dev) + 0.5 - size / 2
    y, x = r[None, :, None], r[None, None, :]
    tilt = 1 + path(0.0004 * speed) * x / (size / 2) + path(0.0004 * speed) * y / (size / 2)
    x, y, angle, grow = x / tilt, y / tilt, path(0.0015 * speed), zoom * torch.exp(path(0.0015 * speed))
    px = (angle.cos() * x - angle.sin() * y) * grow + path(speed) * zoom
    py = (angle.sin() * x + angle.cos() * y) * grow + path(0.7 * speed) * zoom
    place = lambda p, n: p - p.min() + torch.rand((), device=dev) * (n - 1 - (p.max() - p.min())) # anywhere inside; mirrored where the picture ends
    h, w = still.shape[-2:]
    grid = torch.stack([place(px, w) / (w - 1), place(py, h) / (h - 1)], -1) * 2 - 1
    picture = (still[None].float() / 255).expand(frames, -1, -1, -1)
    return F.grid_sample(picture, grid, mode='bicubic', padding_mode='reflection', align_corners=True).clamp(0, 1)

def moving_stills(
    stills: list, # uint8 (3, h, w) pictures on the device
    frames: int,
    size: int,
) -> torch.Tensor: # (frames, 3, size, size) uint8
    "One synthetic clip: a flight over one picture, half of the time with a second one moving in front, sometimes motion-blurred"
    pick = lambda: stills[int(torch.randint(len(stills), ()))]
    back, speed = pick(), float(torch.rand(())) ** 2 * 6
    most = min(1.8, max(1., min(back.shape[-2:]) / size / 1.2))
    zoom = 1 + float(torch.rand(())) * (most - 1)
    if zoom > 1.15: back = (F.interpolate(back[None].float(), scale_factor=1 / zoom, mode='bicubic', antialias=True)[0]).clamp(0, 255)
    blur = 3 if torch.rand(()) < 0.25 else 1 # sub-frames per frame
    clip = fly_over(back, frames * blur, size, speed=speed / blur)
    if torch.rand(()) < 0.4:
        front = fly_over(pick(), frames * blur, size, speed=1.5 * speed / blur)
        blob = F.interpolate(torch.randn(1, 1, 8, 8, device=back.device), size=(size, size), mode='bicubic', align_corners=True)[0]
        mask = fly_over(((blob > 0.9) * 255).to(torch.uint8).expand(3, -1, -1), frames * blur, size, speed=1.5 * speed / blur)
        clip = clip * (1 - mask) + front * mask
    return (clip.unflatten(0, (frames, blur)).mean(1) * 255).round().to(torch.uint8)

def crop(
    video: torch.Tensor, # (F, 3, h, w) uint8
    frames: int,
    size: int,
) -> torch.Tensor: # (frames, 3, size, size) uint8, mirrored where the video is smaller
    "A random piece of a real clip"
    video = video[int(torch.randint(max(1, len(video) - frames + 1), ())):][:frames]
    pad = [max(0, size - n) for n in video.shape[-2:]]
    if any(pad): video = F.pad(video.float(), (0, min(pad[1], video.shape[-1] - 1), 0, min(pad[0], video.shape[-2] - 1)), mode='reflect').to(torch.uint8)
    if video.shape[-2] < size or video.shape[-1] < size: return crop(video, frames, size)
    y, x = (int(torch.randint(n - size + 1, ())) for n in video.shape[-2:])
    return video[..., y:y + size, x:x + size]

def jitter(x): # (F, 3, S, S) -> same, one of 16 symmetries of space and time
    "Random flips, transposition and time reversal"
    for dim in (-1, -2, 0):
        if torch.rand(()) < 0.5: x = x.flip(dim)
    return x.transpose(-1, -2) if torch.rand(()) < 0.5 else x

class Clips:
    "An endless supply of HR clips: a pool of synthetic ones, renewed one at a time, and crops of real ones"
    def __init__(self, stills, videos, *, frames=33, size=256, pool=1000, real=0.25):
        self.stills, self.videos, self.frames, self.size, self.real, self.next = stills, videos, frames, size, real, 0
        self.pool = [moving_stills(stills, frames, size + 32) for _ in range(pool)]

    def batch(self, n): # -> (n, F, 3, S, S) uint8
        "n random clips"
        self.pool[self.next % len(self.pool)] = moving_stills(self.stills, self.frames, self.size + 32)
        self.next += 1
        def one():
            source = self.videos if torch.rand(()) < self.real else self.pool
            return jitter(crop(source[int(torch.randint(len(source), ()))], self.frames, self.size))
        return torch.stack([one() for _ in range(n)])

# ---- degradation on the GPU
def gaussian_blur(x, sigma): # (N, 3, h, w), sigma (N,) pixels
    "A Gaussian of its own width for each image"
    r = torch.arange(-6, 7, device=x.device, dtype=x.dtype)
    k = torch.exp(-r**2 / (2 * sigma[:, None] ** 2))
    k = (k / k.sum(1, keepdim=True)).repeat_interleave(x.shape[1], 0)
    y = F.pad(x, (6, 6, 6, 6), mode='reflect').flatten(0, 1)[None]
    y = F.conv2d(y, k[:, None, None, :], groups=y.shape[1])
    return F.conv2d(y, k[:, None, :, None], groups=y.shape[1])[0].view(x.shape)

def _dct(n=8):
    i = torch.arange(n, dtype=torch.float64)
    m = torch.cos(math.pi / n * (i + 0.5) * i[:, None]) * (2 / n) ** 0.5
    m[0] /= 2**0.5
    return m.float()

_RGB_YCC = torch.tensor([[.2126, .7152, .0722], [-.1146, -.3854, .5], [.5, -.4542, -.0458]])
_CONST = {}
def _constants(device):
    if device not in _CONST: _CONST[device] = tuple(t.to(device) for t in (_RGB_YCC, torch.linalg.inv(_RGB_YCC), _dct()))
    return _CONST[device]

def fake_h264(x, step): # (B, F, 3, h, w) in [0, 1]; quantiser step (B,) in 1/255
    "What a video codec does to pixels, without the codec: halved chroma, 8x8 DCT, dead-zone quantiser, every frame coded as a change of the last"
    to_ycc, to_rgb, d = _constants(x.device)
    ycc = torch.einsum('ij,bfjhw->bfihw', to_ycc, x)
    chroma = F.interpolate(F.avg_pool2d(ycc[:, :, 1:].flatten(0, 1), 2), size=x.shape[-2:], mode='bilinear').view_as(ycc[:, :, 1:])
    ycc = torch.cat([ycc[:, :, :1], chroma], 2)
    q = (step / 255)[:, None, None, None, None, None]
    blocks = lambda t: t.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).transpose(-2, -3) # ..., h/8, w/8, 8, 8
    plain = lambda t: t.transpose(-2, -3).flatten(-4, -3).flatten(-2)
    last, out = torch.zeros_like(ycc[:, 0]), []
    for t in range(x.shape[1]):
        c = d @ blocks(ycc[:, t] - last) @ d.T
        c = c.sign() * (c.abs() / q + 0.33).floor() * q
        last = last + plain(d.T @ c @ d)
        out.append(last)
    return torch.einsum('ij,bfjhw->bfihw', to_rgb, torch.stack(out, 1))

def degrade_batch(hr): # (B, F, 3, H, W) float in [0, 1] -> LR (B, F, 3, H/4, W/4), 8-bit values in [0, 1]
    "Half clean, half blurred, noisy and coded; parameters drawn per clip"
    b, f = hr.shape[:2]; dev = hr.device
    dirty = torch.rand(b, device=dev) < 0.5
    each = lambda v: v[:, None].expand(-1, f).flatten()
    sigma = torch.where(dirty, 0.4 + 1.4 * torch.rand(b, device=dev), torch.full((b,), 1e-2, device=dev))
    x = gaussian_blur(hr.flatten(0, 1), each(sigma))
    x = F.interpolate(x, scale_factor=0.25, mode='bicubic', antialias=True).view(b, f, 3, hr.shape[-2] // 4, -1)
    level = dirty * torch.rand(b, device=dev) * 3.5 / 255
    x = ((x + torch.randn_like(x) * level[:, None, None, None, None]).clamp(0, 1) * 255).round() / 255
    coded = dirty & (torch.rand(b, device=dev) < 0.8)
    x = torch.where(coded[:, None, None, None, None], fake_h264(x, 4 + 14 * torch.rand(b, device=dev)), x)
    return (x.clamp(0, 1) * 255).round() / 255

# ---- loss
def luma(x): # (..., 3, H, W) -> (..., H, W), BT.601
    "Weighted sum of the colours"
    r, g, b = x.unbind(-3)
    return 0.299 * r + 0.587 * g + 0.114 * b

def loss_terms(sr, hr): # (B, F, 3, H, W) in [0, 1] -> dict of scalars
    "Charbonnier on colour and luma, gradients, spectrum, temporal differences"
    charbonnier = lambda d: (d.square() + 1e-6).sqrt().mean()
    ys, yh = luma(sr), luma(hr)
    e = ys - yh
    return dict(pixel=charbonnier(sr - hr), luma=charbonnier(e), gradient=(e.diff(dim=-1).abs().mean() + e.diff(dim=-2).abs().mean()),
                spectrum=torch.fft.rfft2(e, norm='ortho').abs().mean(), motion=e.diff(dim=1).abs().mean())

WEIGHTS = dict(pixel=0.5, luma=1., gradient=0.1, spectrum=0.05, motion=0.2)

def psnr_y(a, b): # (F, 3, H, W) in [0, 1] -> dB, mean over frames; BT.601 studio luma of 8-bit values
    "PSNR of luma as papers report it"
    y = lambda x: luma((x.clamp(0, 1) * 255).round()) * 219 / 255
    return float((10 * torch.log10(255**2 / (y(a) - y(b)).square().mean((-1, -2)).clamp_min(1e-9))).mean())

def start_weights(model): # FlashVSR -> itself, in place
    "Variance-preserving start; residual branches small, the last layer zero: training begins at plain bicubic"
    for m in model.decoder.modules():
        if isinstance(m, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(m.weight, nonlinearity='linear' if m.kernel_size == (1, 1) else 'relu')
            if m.bias is not None: torch.nn.init.zeros_(m.bias)
        if hasattr(m, 'conv') and isinstance(m.conv, torch.nn.Sequential): last = m.conv[-1].weight; last.data.mul_(0.3)
    torch.nn.init.zeros_(model.decoder.decoder[-1].weight)
    return model
