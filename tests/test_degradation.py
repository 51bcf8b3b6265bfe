"The degradation operators on awkward inputs, and the promise that a seed gives the same bytes."
import itertools
import math
import subprocess
import sys
import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from flashvsr_nb.degradation import (PRESETS, Recipe, _decode, add_noise, blur, compose, compress, degrade,
                                     degrade_stream, downsample, encode_h264, gaussian_kernel, warp)
from flashvsr_nb.video import VideoInfo, _rgb_to_yuv, read_video, write_video

DATA = Path(__file__).resolve().parent.parent / "data"
SIDES = st.integers(1, 12)
EIGHTHS = st.integers(0, 32).map(lambda i: i / 8)
MODES = "bicubic", "bilinear", "area"
few = settings(max_examples=25, deadline=None)


def pictures(f, h, w, seed=0):
    "Smooth uint8 frames (f,h,w,3) that move, with a little texture."
    rng = np.random.default_rng(seed)
    y, x, t = np.arange(h)[:, None, None], np.arange(w)[:, None], np.arange(f)[:, None, None, None]
    wave = 128 + 80 * np.sin(x / 7 + t / 3 + np.arange(3)) * np.cos(y / 5)
    return (wave + rng.normal(0, 4, (f, h, w, 3))).clip(0, 255).astype(np.uint8)


def as_float(frames): return torch.from_numpy(frames).permute(0, 3, 1, 2) / 255


# ---- E

@few
@given(h=SIDES, w=SIDES, dx=st.integers(-5, 5), dy=st.integers(-5, 5))
def test_warp_by_whole_pixels_is_a_shift(h, w, dx, dy):
    x = torch.rand(2, 3, h, w)
    flow = torch.tensor([float(dx), float(dy)]).view(1, 2, 1, 1).expand(1, 2, h, w)
    rows, cols = (torch.arange(h) + dy).clamp(0, h - 1), (torch.arange(w) + dx).clamp(0, w - 1)
    torch.testing.assert_close(warp(x, flow), x[:, :, rows][..., cols], atol=1e-5, rtol=0)


def test_warp_keeps_dtype_and_precision_of_wide_frames():
    x = torch.arange(4096.).view(1, 1, 1, -1).expand(1, 1, 2, -1).remainder(16)
    out = warp(x.half(), torch.full((1, 2, 2, 4096), 1.))
    assert out.dtype == torch.half
    torch.testing.assert_close(out[..., :-1].float(), x[..., 1:], atol=2e-2, rtol=0)


def test_warp_has_a_flow_per_frame_and_a_gradient():
    x, flow = torch.rand(3, 1, 6, 7), torch.randn(3, 2, 6, 7).requires_grad_()
    each = torch.cat([warp(x[i:i+1], flow[i:i+1]) for i in range(3)])
    torch.testing.assert_close(warp(x, flow), each)
    warp(x, flow).sum().backward()
    assert flow.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", [(2, 6, 7), (2, 2, 6, 7), (1, 2, 7, 6), (1, 3, 6, 7)])
def test_warp_refuses_wrong_flow(shape):
    with pytest.raises(ValueError, match="3 or 1, 2, 6, 7"): warp(torch.rand(3, 1, 6, 7), torch.zeros(shape))


# ---- B

@few
@given(s1=EIGHTHS, s2=EIGHTHS, angle=st.floats(-4, 4))
def test_kernel_is_a_symmetric_mean(s1, s2, angle):
    k = gaussian_kernel(s1, across=s2, angle=angle)
    assert k.shape[0] == k.shape[1] == 2 * math.ceil(3 * max(s1, s2)) + 1
    assert (k >= 0).all() and abs(float(k.sum()) - 1) < 1e-5
    torch.testing.assert_close(k, k.flip(0, 1), atol=1e-6, rtol=0)
    torch.testing.assert_close(k, gaussian_kernel(s2, across=s1, angle=angle + math.pi / 2), atol=1e-4, rtol=0)


def test_kernel_has_the_variance_and_direction_asked_for():
    k, t = gaussian_kernel(3., across=1., angle=0.5), torch.arange(-9., 10)
    along = t * math.cos(0.5) + t[:, None] * math.sin(0.5)
    side = t[:, None] * math.cos(0.5) - t * math.sin(0.5)
    assert abs(float((k * along**2).sum())**0.5 - 3) < 0.1 and abs(float((k * side**2).sum())**0.5 - 1) < 0.05


def test_blur_with_a_kernel_per_frame():
    x, sigmas = torch.rand(3, 3, 9, 8), torch.tensor([0., 0.7, 1.9])
    out = blur(x, gaussian_kernel(sigmas))
    torch.testing.assert_close(out[0], x[0])
    for i, s in enumerate(sigmas):
        torch.testing.assert_close(out[i:i+1], blur(x[i:i+1], gaussian_kernel(s, size=13)), atol=1e-6, rtol=0)


def test_blur_is_larger_than_the_picture():
    x = torch.rand(1, 3, 1, 2)
    out = blur(x, gaussian_kernel(4.))
    assert out.shape == x.shape and out.min() >= x.min() - 1e-6 and out.max() <= x.max() + 1e-6


def test_blur_correlates_and_does_not_flip():
    x = torch.zeros(1, 1, 3, 3); x[..., 1, 1] = 1
    k = torch.zeros(3, 3); k[1, 2] = 1                     # each pixel becomes its right neighbour
    assert blur(x, k)[0, 0, 1, 0] == 1


@few
@given(beta=st.floats(0.5, 8), ratio=st.floats(0.4, 1), angle=st.floats(-4, 4))
def test_generalised_kernel_keeps_the_standard_deviations(beta, ratio, angle):
    k, t = gaussian_kernel(4., across=4 * ratio, angle=angle, beta=beta, size=81), torch.arange(-40., 41)
    along = t * math.cos(angle) + t[:, None] * math.sin(angle)
    side = t[:, None] * math.cos(angle) - t * math.sin(angle)
    assert abs(float((k * along**2).sum())**0.5 - 4) < 0.1 and abs(float((k * side**2).sum())**0.5 - 4 * ratio) < 0.1
    assert abs(float(k.sum()) - 1) < 1e-5 and k.argmax() == 40 * 81 + 40 or beta > 4    # flat in the middle


def test_beta_sharpens_or_flattens():
    peaks = [float(gaussian_kernel(3., beta=b, size=41)[20, 20]) for b in (0.5, 1., 2., 8.)]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > 2 * peaks[1]
    torch.testing.assert_close(gaussian_kernel(2., beta=1.), gaussian_kernel(2.), atol=0, rtol=0)


@pytest.mark.parametrize("bad", [lambda: gaussian_kernel(-0.1), lambda: gaussian_kernel(1., size=4),
                                 lambda: gaussian_kernel(1., beta=0.1), lambda: gaussian_kernel(1., beta=float("nan")),
                                 lambda: blur(torch.rand(2, 3, 8, 8), torch.ones(3, 3, 3)),
                                 lambda: blur(torch.rand(2, 3, 8, 8), torch.ones(3, 5))])
def test_blur_refuses(bad):
    with pytest.raises(ValueError): bad()


# ---- D

@few
@given(scale=st.integers(1, 5), h=st.integers(1, 5), w=st.integers(1, 5), mode=st.sampled_from(MODES))
def test_downsample_size_and_constants(scale, h, w, mode):
    x = torch.rand(1, 3, 1, 1).expand(2, 3, h * scale, w * scale)
    out = downsample(x, scale, mode=mode)
    assert out.shape == (2, 3, h, w)
    torch.testing.assert_close(out, x[..., :h, :w], atol=1e-5, rtol=0)


def test_downsample_is_centred():
    ramp = torch.arange(64.).expand(1, 1, 64, 64)
    expected = 4 * torch.arange(4., 12) + 1.5
    for mode in MODES: torch.testing.assert_close(downsample(ramp, mode=mode)[0, 0, 0, 4:-4], expected, atol=1e-3, rtol=0)


def test_antialias_removes_what_the_new_grid_cannot_hold():
    stripes = torch.arange(64).remainder(2).float().expand(1, 1, 64, 64)      # period 2 px; the new grid ends at 8
    fine = F.interpolate(stripes, size=(48, 48), mode="nearest")              # uneven: beats against the grid
    assert downsample(fine)[..., 2:-2, 2:-2].std() < 0.2 * downsample(fine, antialias=False)[..., 2:-2, 2:-2].std()


@pytest.mark.parametrize("kw, word", [(dict(scale=3), "scale=3"), (dict(scale=0), "scale=0"),
                                      (dict(scale=2.5), "scale=2.5"), (dict(mode="nearest"), "'area'")])
def test_downsample_refuses(kw, word):
    with pytest.raises(ValueError, match=word): downsample(torch.rand(1, 3, 8, 8), **kw)


# ---- n

def test_noise_depends_on_seed_and_frame_number_only():
    x = torch.zeros(6, 3, 5, 7)
    whole = add_noise(x, 2., seed=3)
    parts = [add_noise(x[a:b], 2., seed=3, start=a) for a, b in [(0, 1), (1, 5), (5, 6)]]
    torch.testing.assert_close(torch.cat(parts), whole)
    torch.testing.assert_close(add_noise(x.double(), 2., seed=3).float(), whole)
    streams = [add_noise(x, 2., seed=s)[i] for s in (3, 4) for i in range(6)]
    assert all((a != b).any() for a, b in itertools.combinations(streams, 2))


def test_noise_is_white_and_as_strong_as_asked():
    n = add_noise(torch.zeros(2, 3, 64, 64), torch.tensor([1., 3.])) * 255
    assert abs(n[0].std() - 1) < 0.03 and abs(n[1].std() - 3) < 0.09 and abs(n.mean()) < 0.06
    flat = (n[1] / 3).flatten(1)
    assert torch.corrcoef(flat).triu(1).abs().max() < 0.05                           # channels
    assert (n[1, :, :, 1:] * n[1, :, :, :-1]).mean().abs() / 9 < 0.03                # neighbours


def test_noise_from_a_generator():
    x = torch.zeros(2, 3, 8, 8)
    a, b, c = (add_noise(x, 1., generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(a, b) and (a != c).any()


# ---- codec

@few
@given(f=st.integers(1, 4), h=SIDES, w=SIDES)
def test_compress_any_size(f, h, w):
    assert np.stack(list(compress(pictures(f, h, w)))).shape == (f, h, w, 3)


def test_compress_is_the_same_every_time_and_in_another_process():
    code = ("import sys, hashlib; sys.path.insert(0, 'tests'); from test_degradation import pictures, degrade;"
            "print(hashlib.sha256(degrade(pictures(40, 72, 130), seed=9).tobytes()).hexdigest())")
    root = Path(__file__).resolve().parent.parent
    runs = {subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
            for _ in range(2)}
    assert len(runs) == 1
    frames = pictures(12, 34, 50)
    assert [bytes(p) for p in encode_h264(frames)] == [bytes(p) for p in encode_h264(list(frames))]


def test_compress_is_the_same_whatever_lies_in_memory():
    "x264's AVX code for its look-ahead reads bytes that it never wrote; small and grainy frames show it."
    frames, rng = degrade(read_video(DATA / "city_hr.mp4", frames=9), "clean"), np.random.default_rng(0)
    frames = (frames + rng.normal(0, 3, frames.shape)).clip(0, 255).round().astype(np.uint8)

    def with_litter():
        for frame in frames:
            yield frame.copy()
            [rng.integers(0, 255, n, dtype=np.uint8) for n in rng.integers(1000, 200_000, 3)]
    assert len({b"".join(bytes(p) for p in encode_h264(with_litter())) for _ in range(15)}) == 1


def test_crf_0_loses_colour_resolution_only(tmp_path):
    frames = pictures(5, 32, 48)
    tags = VideoInfo(tmp_path, 48, 32, Fraction(25), 5, Fraction(1, 25), matrix=1, range=1)
    write_video(tmp_path / "file.mp4", frames, like=tags, crf=0)
    np.testing.assert_array_equal(np.stack(list(compress(frames, crf=0))), read_video(tmp_path / "file.mp4"))
    grey = np.repeat(frames[..., :1], 3, -1)
    assert np.abs(np.stack(list(compress(grey, crf=0))).astype(int) - grey).max() <= 2


def test_compress_neither_darkens_nor_brightens():
    frames = pictures(9, 64, 96)
    assert abs(np.stack(list(compress(frames, crf=0))).astype(float).mean() - frames.mean()) < 0.3


def test_compress_keeps_colours_and_order():
    patches = np.zeros((6, 32, 32, 3), np.uint8)
    colours = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 50, 30], [255, 255, 255], [0, 0, 0]]
    patches[:] = np.array(colours)[:, None, None]
    assert np.abs(np.stack(list(compress(patches, crf=5))).astype(int) - patches).max() <= 6


def test_compress_does_not_read_to_the_end_first():
    taken = []
    def frames():
        for a in itertools.cycle(pictures(4, 16, 16)): taken.append(1); yield a
    out = compress(frames())
    for _ in range(200): next(out)
    assert len(taken) < 300


def test_higher_crf_is_smaller_and_worse():
    frames = pictures(12, 64, 96)
    size = [sum(p.size for p in encode_h264(frames, crf=c)) for c in (10, 25, 40)]
    error = [np.square(np.stack(list(compress(frames, crf=c))) - frames.astype(float)).mean() for c in (10, 25, 40)]
    assert size == sorted(size, reverse=True) and error == sorted(error)


def test_compress_refuses():
    assert list(compress([])) == []
    with pytest.raises(ValueError, match="crf=60"): list(compress(pictures(1, 8, 8), crf=60))
    with pytest.raises(ValueError, match="frame 1 has shape"): list(compress([*pictures(1, 8, 8), *pictures(1, 8, 6)]))


# ---- order, recipes, presets

def test_compose_acts_from_the_right():
    assert compose(lambda v: v + "D", lambda v: v + "B", lambda v: v + "E")("x") == "xEBD"
    assert compose()("x") == "x"


def test_clean_is_torchs_antialiased_bicubic_rounded():
    hr = pictures(3, 40, 52)
    expected = F.interpolate(as_float(hr), scale_factor=1/4, mode="bicubic", antialias=True).clamp(0, 1)
    np.testing.assert_array_equal(degrade(hr, "clean"), (expected * 255).round().byte().permute(0, 2, 3, 1).numpy())


def x264(frames):
    "Packets at crf 23, from PyAV's own calls."
    h, w = frames[0].shape[:2]
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.thread_count = w, h, "yuv420p", 1
    encoder.time_base, encoder.framerate = Fraction(1, 25), Fraction(25)
    encoder.options = {"crf": "23", "x264-params": "asm=SSE2"}
    colours = _rgb_to_yuv(w, h, "yuv420p", 1, 1, encoder.time_base)
    for i, a in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(a, format="rgb24")
        frame.pts, frame.time_base = i, encoder.time_base
        colours.push(frame)
        yield from encoder.encode(colours.pull())
    yield from encoder.encode(None)


@pytest.mark.parametrize("seed", [0, 11])
def test_mild_keeps_its_bytes(seed):
    "Blur, reduction, noise and codec in this order, written out in torch, numpy and PyAV: clips made earlier can be made again."
    hr, r = pictures(7, 64, 96), Recipe.draw("mild", seed=seed)
    drawn = np.random.default_rng(seed)
    assert (r.blur, r.noise, r.crf, r.scale) == (drawn.uniform(0.6, 1.6), drawn.uniform(0, 3), 23, 4)
    t = torch.arange(2 * math.ceil(3 * r.blur) + 1) - math.ceil(3 * r.blur)
    sigma = torch.tensor(r.blur)
    kernel = torch.exp(-((t / sigma) ** 2 + (t[:, None] / sigma) ** 2) / 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, *kernel.shape)
    small = []
    for i, x in enumerate(as_float(hr)):
        x = F.conv2d(F.pad(x[None], [kernel.shape[-1] // 2] * 4, mode="replicate"), kernel, groups=3)
        x = F.interpolate(x, size=(16, 24), mode="bicubic", antialias=True)
        noise = np.random.Generator(np.random.Philox(key=[seed, i])).standard_normal((3, 16, 24), dtype=np.float32)
        x = (x[0] + torch.from_numpy(noise) * torch.tensor(r.noise, dtype=torch.float32) / 255).clamp(0, 1)
        small.append((x * 255).round().byte().permute(1, 2, 0).numpy())
    packets = list(x264(small))
    assert [bytes(p) for p in packets] == [bytes(p) for p in encode_h264(small)]
    np.testing.assert_array_equal(degrade(hr, "mild", seed=seed), np.stack(list(_decode(packets))))


def test_draws_fill_their_ranges():
    drawn = [Recipe.draw(seed=s) for s in range(300)]
    for field in "blur", "noise":
        low, high = PRESETS["mild"][field]
        values = np.array([getattr(r, field) for r in drawn])
        assert low <= values.min() < low + 0.05 * (high - low) and high - 0.05 * (high - low) < values.max() <= high
    assert abs(np.corrcoef([r.blur for r in drawn], [r.noise for r in drawn])[0, 1]) < 0.2


def test_recipe_on_a_batch_equals_the_stream():
    hr = pictures(5, 32, 48)
    r = Recipe(blur=1.1, noise=2., seed=4)
    whole = r(as_float(hr))
    parts = torch.cat([r(as_float(hr[:2])), r(as_float(hr[2:]), start=2)])
    torch.testing.assert_close(whole, parts, atol=1e-6, rtol=0)
    assert whole.shape == (5, 3, 8, 12) and 0 <= whole.min() and whole.max() <= 1


def test_same_seed_same_bytes_from_array_list_and_stream():
    hr = pictures(10, 64, 80)
    expected = degrade(hr, seed=2)
    for frames in list(hr), iter(hr), hr[:, ::-1].copy()[:, ::-1]:
        np.testing.assert_array_equal(degrade(frames, seed=2), expected)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try: np.testing.assert_array_equal(degrade(hr, seed=2), expected)
    finally: torch.set_num_threads(threads)
    assert (degrade(hr, seed=3) != expected).any()


def test_read_only_frames_do_not_warn():
    hr = pictures(2, 16, 16)
    hr.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        degrade(hr)


@pytest.mark.parametrize("scale, size, expected", [(4, (17, 30), (4, 7)), (3, (17, 30), (5, 10)), (2, (5, 4), (2, 2))])
def test_sizes_that_do_not_divide_are_cut_with_one_notice(scale, size, expected):
    hr = pictures(3, *size)
    with pytest.warns(UserWarning, match=f"a multiple of {scale}") as notices: out = degrade(hr, scale=scale)
    assert out.shape == (3, *expected, 3) and len(notices) == 1
    h, w = (n * scale for n in expected)
    np.testing.assert_array_equal(out, degrade(hr[:, :h, :w], scale=scale))


def test_scale_1_and_tiny_frames():
    hr = pictures(2, 4, 4)
    assert degrade(hr).shape == (2, 1, 1, 3)
    np.testing.assert_array_equal(degrade(hr, "clean", scale=1), hr)


@pytest.mark.parametrize("call, word", [
    (lambda: degrade_stream([], "worst"), "'clean', 'mild', 'real'"),
    (lambda: Recipe.draw("real"), "use degrade or degrade_stream"),
    (lambda: degrade_stream([], scale=0), "scale=0"),
    (lambda: degrade_stream([], scale=1.5), "scale=1.5"),
    (lambda: degrade_stream([], seed=-1), "seed=-1"),
    (lambda: degrade([]), "none"),
    (lambda: degrade(pictures(1, 8, 8)[0]), "frame 0 is uint8"),
    (lambda: degrade(pictures(1, 8, 8) / 255), "float64"),
    (lambda: degrade(pictures(1, 8, 8)[..., :1]), r"\(8, 8, 1\)"),
    (lambda: degrade(pictures(1, 3, 9)), "smaller than scale=4"),
    (lambda: degrade([*pictures(1, 8, 8), *pictures(1, 8, 12)]), "frame 1 has shape"),
])
def test_refusals_say_what_is_wrong(call, word):
    with pytest.raises(ValueError, match=word): call()


def test_import_is_light():
    code = ("import sys, flashvsr_nb.degradation;"
            "print([m for m in ('av', 'matplotlib', 'IPython', 'fastcore', 'nbdev') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_operators_on_cuda_match_the_cpu():
    x, sigma = torch.rand(3, 3, 32, 48), torch.tensor([0.6, 1., 1.6])
    flow = 3 * torch.randn(3, 2, 32, 48)
    def chain(x, flow, sigma):
        kernel = gaussian_kernel(sigma, across=1., angle=0.3)
        return add_noise(downsample(blur(warp(x, flow), kernel)), sigma, seed=5)

    torch.testing.assert_close(chain(x.cuda(), flow.cuda(), sigma.cuda()).cpu(), chain(x, flow, sigma), atol=1e-4, rtol=0)
    g = torch.Generator("cuda").manual_seed(0)
    assert Recipe(blur=1., noise=2.)(x.cuda(), generator=g).is_cuda
