"The operators of real footage on awkward inputs, and that `real` gives the same bytes in constant memory."
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_degradation import SIDES, as_float, pictures

from flashvsr_nb.cli import main
from flashvsr_nb.degradation import _encode, blur, degrade, degrade_stream
from flashvsr_nb.real_world import (_CODECS, REAL, colour_noise, compress_to, jpeg, one_pass, real_stream, shot_noise,
                                    sinc_kernel, strengths, walk)
from flashvsr_nb.video import read_video, write_video

ROOT = Path(__file__).resolve().parent.parent
few = settings(max_examples=15, deadline=None)
NOISES = {"shot": shot_noise, "colour": colour_noise}
IDLE = next(strengths(1)) | {"blur": 0., "filter": "bicubic", "ring": False, "noise": "colour", "sigma": 0.,
                             "code": "nothing"}


def take(stream, n):
    return list(itertools.islice(stream, n))


def error(a, b):
    return float(np.square(np.stack(list(a)) - np.asarray(b, float)).mean())


# ---- ringing

@few
@given(cutoff=st.floats(0.1, math.pi), half=st.integers(0, 12))
def test_sinc_is_a_symmetric_mean(cutoff, half):
    k = sinc_kernel(cutoff, size=2 * half + 1)
    assert k.shape == (2 * half + 1,) * 2 and abs(float(k.sum()) - 1) < 1e-5
    for turned in k.flip(0), k.flip(1), k.T: torch.testing.assert_close(k, turned, atol=1e-6, rtol=0)


@pytest.mark.parametrize("angle", [0., 0.5, math.pi / 4])
def test_sinc_passes_slow_waves_and_stops_fast_ones(angle):
    x, k = torch.arange(200.), sinc_kernel(1.5, size=61)
    across = x * math.cos(angle) + x[:, None] * math.sin(angle)
    for frequency, low, high in (0.5, 0.9, 1.1), (1., 0.9, 1.1), (2., 0., 0.1), (2.2, 0., 0.1):
        wave = torch.cos(frequency * across)[None, None]
        assert low <= blur(wave, k)[..., 60:-60, 60:-60].std() / wave[..., 60:-60, 60:-60].std() <= high


@pytest.mark.parametrize("cutoff, size", [(0, 15), (-1, 15), (3.2, 15), (float("nan"), 15), (1, 4), (1, -1)])
def test_sinc_refuses(cutoff, size):
    with pytest.raises(ValueError, match="up to pi"): sinc_kernel(cutoff, size=size)


# ---- noise

@pytest.mark.parametrize("add", NOISES.values(), ids=NOISES)
def test_noise_depends_on_seed_and_frame_number_only(add):
    x = torch.full((6, 3, 5, 7), 0.5)
    whole = add(x, 8., seed=3)
    parts = [add(x[a:b], 8., seed=3, start=a) for a, b in [(0, 1), (1, 5), (5, 6)]]
    torch.testing.assert_close(torch.cat(parts), whole, atol=0, rtol=0)
    torch.testing.assert_close(add(x.double(), 8., seed=3).float(), whole)
    streams = [add(x, 8., seed=s)[i] for s in (3, 4) for i in range(6)]
    assert all((a != b).any() for a, b in itertools.combinations(streams, 2))


@pytest.mark.parametrize("add", NOISES.values(), ids=NOISES)
def test_noise_has_a_strength_per_frame_no_bias_and_the_type_of_its_input(add):
    white = torch.ones(3, 3, 128, 128)
    n = (add(white, torch.tensor([0., 2., 8.]), seed=1) - white) * 255
    assert n[0].abs().max() < 0.01 and abs(n[1].std() - 2) < 0.05 and abs(n[2].std() - 8) < 0.2 and abs(n.mean()) < 0.1
    assert add(white.half(), 2.).dtype == torch.half


@few
@given(level=st.floats(0.05, 1), sigma=st.floats(1, 40))
def test_shot_noise_counts(level, sigma):
    x = torch.full((1, 1, 100, 100), level, dtype=torch.float64)
    white = (255 / sigma) ** 2
    counts = (shot_noise(x, torch.tensor(sigma, dtype=torch.float64)) * white).flatten()
    torch.testing.assert_close(counts, counts.round(), atol=1e-4, rtol=0)
    assert abs(counts.var() / (level * white) - 1) < 0.1 and abs(counts.mean() / (level * white) - 1) < 0.05


def test_shot_noise_leaves_the_dark_alone():
    dark = torch.tensor([-0.1, 0.]).expand(1, 3, 20, 2)
    torch.testing.assert_close(shot_noise(dark, 20.), dark)


def test_colour_noise_is_shared_as_asked():
    for rho in (0., 0.3, 1.):
        n = colour_noise(torch.zeros(1, 3, 200, 200), 6., correlation=rho)[0]
        others = torch.corrcoef(n.flatten(1))[~torch.eye(3, dtype=bool)]
        assert (others - rho).abs().max() < 0.02
        assert (n[:, :, 1:] * n[:, :, :-1]).mean().abs() < 0.02 * n.var()                  # neighbours
    torch.testing.assert_close(n[0], n[1], atol=1e-7, rtol=0)
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"): colour_noise(torch.zeros(1, 3, 2, 2), 1., correlation=bad)


# ---- codes

@few
@given(h=SIDES, w=SIDES, quality=st.integers(1, 95))
def test_jpeg_is_a_file_read_back(h, w, quality, tmp_path_factory):
    frame, file = pictures(1, h, w)[0], tmp_path_factory.mktemp("jpeg") / "frame.jpg"
    Image.fromarray(frame).save(file, quality=quality, subsampling="4:2:0")
    np.testing.assert_array_equal(jpeg(frame, quality), np.asarray(Image.open(file)))


def test_jpeg_takes_any_memory_and_refuses_wrong_quality():
    frame = pictures(1, 24, 30)[0]
    view = frame[:, ::-1]
    view.setflags(write=False)
    np.testing.assert_array_equal(jpeg(view, 40), jpeg(view.copy(), 40))
    assert error([jpeg(frame, 95)], [frame]) < error([jpeg(frame, 50)], [frame]) < error([jpeg(frame, 5)], [frame])
    for quality in (0, 96, -3):
        with pytest.raises(ValueError, match=f"quality={quality}"): jpeg(frame, quality)


@few
@given(f=st.integers(1, 4), h=SIDES, w=SIDES, codec=st.sampled_from([*_CODECS]))
def test_compress_to_any_size(f, h, w, codec):
    frames = pictures(f, h, w)
    assert np.stack(list(compress_to(frames, codec=codec, bits=2.))).shape == frames.shape


@pytest.mark.parametrize("codec", _CODECS)
def test_compress_to_keeps_colours_order_and_brightness(codec):
    colours = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 50, 30], [255, 255, 255], [0, 0, 0]]
    patches = np.broadcast_to(np.array(colours, np.uint8)[:, None, None], (6, 32, 32, 3))
    assert np.abs(np.stack(list(compress_to(patches, codec=codec, bits=8.))).astype(int) - patches).max() <= 8
    frames = pictures(30, 48, 64)
    assert abs(np.stack(list(compress_to(frames, codec=codec, bits=4.))).mean() - frames.mean()) < 0.5


@pytest.mark.parametrize("codec", _CODECS)
def test_bits_are_spent_as_granted_and_more_are_better(codec):
    frames = degrade(read_video(ROOT / "data" / "city_hr.mp4"), "clean")
    frames = np.concatenate([frames, frames[::-1]] * 3)
    encoder, options, side = _CODECS[codec]
    lost = []
    for bits in (0.2, 0.3, 0.5):
        packets = list(_encode(frames, encoder, options, side=side, bits=bits))
        assert abs(8 * sum(p.size for p in packets) / frames[..., 0].size / bits - 1) < 0.15
        lost.append(error(compress_to(frames, codec=codec, bits=bits), frames))
    assert lost == sorted(lost, reverse=True) and lost[0] > 1.5 * lost[2]


@pytest.mark.parametrize("codec", _CODECS)
def test_compress_to_does_not_read_to_the_end_first(codec):
    taken = []
    def frames():
        for a in itertools.cycle(pictures(4, 16, 16)): taken.append(1); yield a
    take(compress_to(frames(), codec=codec), 150)
    assert len(taken) < 250


def test_compress_to_refuses():
    assert list(compress_to([])) == []
    for bad in dict(codec="h265"), dict(bits=0), dict(bits=-1.), dict(bits=float("nan")):
        with pytest.raises(ValueError, match="'h264', 'hevc', 'mpeg4'"): compress_to(pictures(1, 8, 8), **bad)
    with pytest.raises(ValueError, match="frame 1 has shape"):
        list(compress_to([*pictures(1, 8, 8), *pictures(1, 8, 6)], codec="hevc"))


@pytest.mark.parametrize("codec", _CODECS)
def test_compress_to_is_the_same_at_every_run(codec):
    rng = np.random.default_rng(0)
    frames = (pictures(10, 96, 160) + rng.normal(0, 3, (10, 96, 160, 3))).clip(0, 255).astype(np.uint8)

    def with_litter():
        for frame in frames:
            yield frame.copy()
            [rng.integers(0, 255, n, dtype=np.uint8) for n in rng.integers(1000, 200_000, 3)]
    encoder, options, side = _CODECS[codec]
    assert len({b"".join(map(bytes, _encode(with_litter(), encoder, options, side=side, bits=0.2))) for _ in range(15)}) == 1


def test_same_bytes_whatever_lies_in_unwritten_memory():
    "glibc fills new memory with the byte it is told to; other C libraries ignore the request."
    code = ("import sys, hashlib; sys.path.insert(0, 'tests'); from test_degradation import *\n"
            "from flashvsr_nb.real_world import compress_to\n"
            "city = degrade(read_video(DATA / 'city_hr.mp4', frames=12), 'clean')\n"
            "city = (city + np.random.default_rng(0).normal(0, 3, city.shape)).clip(0, 255).round().astype(np.uint8)\n"
            "digest = lambda frames: hashlib.sha256(b''.join(f.tobytes() for f in frames)).hexdigest()\n"
            "print(digest(compress(city)), *[digest(compress_to(city, codec=c)) for c in ('h264', 'hevc', 'mpeg4')],\n"
            "      *[digest(compress_to(city[:, :h, :w], codec=c)) for c in ('h264', 'hevc', 'mpeg4')\n"
            "        for h, w in ((63, 26), (47, 159), (19, 84), (58, 31))],\n"
            "      *[digest(degrade(pictures(12, 72, 130), 'real', seed=s)) for s in range(6)])")
    runs = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                           env=os.environ | {"MALLOC_PERTURB_": byte}).stdout for byte in ("0", "85", "170")]
    assert len({*runs}) == 1 and len({*runs[0].split()}) == 22


# ---- time

@few
@given(low=st.floats(-5, 5), width=st.floats(0, 10), seed=st.integers(0, 2**63 - 1), every=st.integers(1, 40),
       step=st.floats(0, 3))
def test_walk_stays_inside_and_returns(low, width, seed, every, step):
    values = take(walk(low, low + width, seed=seed, every=every, step=step), 150)
    assert low - 1e-9 <= min(values) and max(values) <= low + width + 1e-9
    assert values == take(walk(low, low + width, seed=seed, every=every, step=step), 150)


def test_walk_is_smooth_and_never_rests():
    values = np.array(take(walk(0, 1, seed=3), 2000))
    assert np.abs(np.diff(values)).max() < 0.1 and np.abs(np.diff(values, 2)).max() < 0.02
    assert np.abs(np.diff(values[::25])).min() > 0 and np.ptp(values) > 0.8
    assert values[:200].tolist() != take(walk(0, 1, seed=4), 200)


def test_walk_is_at_every_step_as_likely_here_as_there():
    ends = np.array([take(walk(0, 1, seed=s, every=2), 61)[::20] for s in range(1500)])
    for column in ends.T:
        assert np.abs(np.quantile(column, [0.1, 0.25, 0.5, 0.75, 0.9]) - [0.1, 0.25, 0.5, 0.75, 0.9]).max() < 0.05


# ---- the table

@pytest.mark.parametrize("number", [1, 2])
def test_strengths_come_from_the_table(number):
    drawn = [take(strengths(number, seed=s), 60)[::59] for s in range(120)]
    assert {*drawn[0][0]} == {*REAL, "seed"}
    for name, (how, *ranges) in REAL.items():
        first, last = ([d[i][name] for d in drawn] for i in (0, 1))
        if how == "pick":
            shares = [first.count(v) / len(first) for v in ranges[number - 1]]
            assert sum(shares) == pytest.approx(1) and min(shares) > 0.6 / len(shares) and first == last
        elif how == "chance":
            assert abs(np.mean(first) - ranges[number - 1][0]) < 0.15 and first == last
        else:
            low, high = ranges[number - 1]
            assert all(low <= v <= high for v in first + last)
            assert high == low or np.ptp(first) > 0.9 * (high - low) or how == "log"
            assert (first == last) == (how != "walk")
    middle = np.median([d[0]["bits"] for d in drawn])
    assert 0.2 < middle < 0.4                                  # the geometric mean of the range; the arithmetic is 0.45


def test_passes_and_seeds_draw_independently():
    drawn = np.array([[next(strengths(n, seed=s))[name] for n in (1, 2) for name in ("blur", "sigma", "bits", "quality")]
                      for s in range(200)])
    assert np.abs(np.triu(np.corrcoef(drawn.T), 1)).max() < 0.25
    assert len({next(strengths(n, seed=s))["seed"] for n in (1, 2) for s in range(50)}) == 100


# ---- a pass

def test_an_idle_pass_reduces_only():
    hr = pictures(3, 40, 52)
    np.testing.assert_array_equal(np.stack(list(one_pass(hr, itertools.repeat(IDLE), (10, 13)))), degrade(hr, "clean"))


def test_a_pass_follows_its_strengths_from_frame_to_frame():
    grey = np.full((4, 64, 64, 3), 128, np.uint8)
    for kind in NOISES:
        now = (IDLE | {"noise": kind, "sigma": s} for s in (0., 4., 0., 12.))
        spread = [a.std() for a in one_pass(grey, now, (64, 64))]
        assert spread[0] == spread[2] == 0 and 2 < spread[1] < 5 < 7 < spread[3] < 13
    edge = np.zeros((3, 32, 32, 3), np.uint8)
    edge[:, :, 16:] = 200
    soft = one_pass(edge, (IDLE | {"blur": b} for b in (0., 1., 3.)), (32, 32))
    steepest = [np.diff(a[16, :, 0].astype(int)).max() for a in soft]
    assert steepest[0] == 200 > steepest[1] > steepest[2]
    ringing, = one_pass(edge[:1], iter([IDLE | {"ring": True, "cutoff": 1.5}]), (32, 32))
    assert ringing.max() > 205
    coarse = list(one_pass(pictures(2, 32, 32), (IDLE | {"code": "jpeg", "quality": q} for q in (95., 5.4)), (32, 32)))
    np.testing.assert_array_equal(coarse[1], jpeg(pictures(2, 32, 32)[1], 5))


@pytest.mark.parametrize("code", [*_CODECS, "jpeg", "nothing"])
def test_a_pass_ends_in_its_code(code):
    frames = pictures(5, 24, 36)
    out = list(one_pass(frames, itertools.repeat(IDLE | {"code": code, "bits": 0.3, "quality": 60}), (24, 36)))
    expected = {"jpeg": [jpeg(a, 60) for a in frames], "nothing": frames}
    np.testing.assert_array_equal(out, expected[code] if code in expected else
                                  list(compress_to(frames, codec=code, bits=0.3)))


# ---- the preset

def test_real_is_two_passes():
    hr, seed = pictures(6, 64, 96), 5
    now = [strengths(n, seed=seed) for n in (1, 2)]
    share = next(strengths(1, seed=seed))["share"]
    between = tuple(round(n * (1 / 4) ** share) for n in (64, 96))
    assert (16, 24) < between < (64, 96)
    by_hand = one_pass(one_pass(hr, now[0], between), now[1], (16, 24))
    np.testing.assert_array_equal(degrade(hr, "real", seed=seed), np.stack(list(by_hand)))


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_same_seed_same_bytes_from_array_list_and_stream(seed):
    hr = pictures(8, 64, 80)
    expected = degrade(hr, "real", seed=seed)
    assert expected.shape == (8, 16, 20, 3) and expected.dtype == np.uint8
    for frames in list(hr), iter(hr), hr[:, ::-1].copy()[:, ::-1]:
        np.testing.assert_array_equal(degrade(frames, "real", seed=seed), expected)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try: np.testing.assert_array_equal(np.stack(list(real_stream(hr, seed=seed))), expected)
    finally: torch.set_num_threads(threads)
    assert (degrade(hr, "real", seed=1) != expected).any()


def test_a_longer_clip_begins_with_the_same_strengths():
    "Strengths are bound to the frame's number, whatever follows."
    assert take(strengths(1, seed=4), 30) == take(strengths(1, seed=4), 90)[:30]


@pytest.mark.parametrize("scale, size, expected", [(4, (17, 30), (4, 7)), (3, (18, 30), (6, 10)), (1, (9, 11), (9, 11)),
                                                   (4, (4, 4), (1, 1)), (2, (2, 64), (1, 32))])
def test_real_at_any_size(scale, size, expected):
    cut = tuple(n * scale for n in expected) != size
    with pytest.warns(UserWarning, match="is cut to") if cut else pytest.MonkeyPatch.context():
        for seed in range(4): assert degrade(pictures(3, *size), "real", seed=seed, scale=scale).shape == (3, *expected, 3)


def test_real_reads_a_little_ahead_only():
    taken = []
    def frames():
        for a in itertools.cycle(pictures(4, 32, 32)): taken.append(1); yield a
    for seed in (0, 1):                                         # H.264 then HEVC, H.264 twice
        taken.clear()
        take(degrade_stream(frames(), "real", seed=seed), 150)
        assert len(taken) < 300


@pytest.mark.parametrize("call, word", [
    (lambda: degrade_stream([], "real", scale=0), "scale=0"),
    (lambda: real_stream([], seed=-1), "seed=-1"),
    (lambda: degrade([], "real"), "none"),
    (lambda: degrade(pictures(1, 8, 8) / 255, "real"), "float64"),
    (lambda: degrade(pictures(1, 3, 9), "real"), "smaller than scale=4"),
    (lambda: degrade([*pictures(1, 8, 8), *pictures(1, 8, 12)], "real"), "frame 1 has shape"),
])
def test_refusals_say_what_is_wrong(call, word):
    with pytest.raises(ValueError, match=word): call()


def test_real_from_the_command_line(tmp_path, capsys):
    write_video(tmp_path / "hr", pictures(4, 24, 32))
    arguments = ["degrade", str(tmp_path / "hr"), str(tmp_path / "lr"), "--preset", "real", "--seed", "6"]
    assert main(arguments) == 0
    assert np.array_equal(read_video(tmp_path / "lr"), degrade(pictures(4, 24, 32), "real", seed=6))
    assert capsys.readouterr().out == f"{tmp_path / 'lr'}: 4 frames of 8x6, preset real, seed 6\n"
    with pytest.raises(SystemExit): main(["degrade", "--help"])
    assert "clean, mild or real" in capsys.readouterr().out


def test_real_is_worse_than_mild_and_less_alike():
    hr = read_video(ROOT / "data" / "bbb_hr.mp4", frames=6)[:, 128:320, 120:416]
    lr = degrade(hr, "clean")
    lost = {p: 10 * np.log10([error(degrade(hr, p, seed=s), lr) for s in range(6)]) for p in ("mild", "real")}
    assert np.median(lost["real"]) > np.median(lost["mild"]) + 2 and np.ptp(lost["real"]) > 2 * np.ptp(lost["mild"])


def test_import_is_light():
    code = ("import sys, flashvsr_nb.real_world;"
            "print([m for m in ('av', 'PIL', 'matplotlib', 'IPython', 'fastcore', 'nbdev') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
