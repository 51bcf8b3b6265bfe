"""Reading and writing of video files and folders of images, and every error a file can cause."""
import hashlib
import math
import os
import signal
import subprocess
import sys
import tracemalloc
import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import flashvsr_nb.video_encoding as encoding
from flashvsr_nb.video import (VideoInfo, VideoReader, VideoWriter, check_output, plot_style, probe, read_video,
                               show_images, write_video)

NTSC = Fraction(30000, 1001)
WEIGHTS = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087),
           9: (0.2627, 0.0593)}  # H.273 matrix: weights of red and blue


def numbered(n, height=48, width=64):
    "n frames; the grey level of frame i says which one it is."
    frames = np.full((n, height, width, 3), 128, np.uint8)
    for i in range(n):
        frames[i] = 20 + 7 * i % 210
        frames[i, : height // 2, : width // 2] = (200, 60, 40)
    return frames


def textured(n, height=96, width=160):
    "n frames of a moving pattern that does not compress well, so that a file has many bytes to cut."
    base = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    return np.stack([np.roll(base, 3 * i, 1) for i in range(n)])


def make(path, frames, *, fps=Fraction(25), codec="libx264", options=None, pixels="yuv420p", stamps=None, base=None,
         tags=None, audio=(), rotation=0, aspect=None, fast=True):
    "Write a clip with PyAV alone; `stamps` are in ticks of `base`, `tags` are (matrix, range)."
    path = str(path)
    flags = {"movflags": "+faststart"} if fast and path.endswith((".mp4", ".mov")) else {}
    with av.open(path, "w", options=flags) as out:
        stream = out.add_stream(codec, rate=fps, options={"crf": "4"} if options is None else options)
        first = frames[0]
        stream.height, stream.width = first.shape[:2] if isinstance(first, np.ndarray) else (first.height, first.width)
        stream.pix_fmt = pixels
        context = stream.codec_context
        if base:
            stream.time_base = context.time_base = base
        if tags:
            context.colorspace, context.color_range = tags
        if rotation:
            stream.set_display_rotation(rotation)
        if aspect:
            context.sample_aspect_ratio = aspect
        sounds = [out.add_stream(name, rate=48000, layout="mono") for name in audio]
        out.start_encoding()
        for i, frame in enumerate(frames):
            picture = frame if isinstance(frame, av.VideoFrame) else av.VideoFrame.from_ndarray(frame, format="rgb24")
            if picture.format.name != pixels:
                picture = picture.reformat(format=pixels, dst_colorspace=tags[0] if tags else 5,
                                           dst_color_range=tags[1] if tags else 1)
            picture.pts, picture.time_base = (i, 1 / fps) if stamps is None else (stamps[i], base)
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))
        for k, sound in enumerate(sounds):
            tone(out, sound, float(len(frames) / fps), 440 * (k + 1))


def tone(out, stream, seconds, pitch):
    "Encode a sine."
    context, n = stream.codec_context, int(48000 * seconds)
    wave = np.sin(2 * np.pi * pitch * np.arange(n) / 48000, dtype=np.float64)[None] * 0.3
    step, kind = context.frame_size or 1024, context.format.name
    for k in range(0, n, step):
        part = np.ascontiguousarray(wave[:, k:k + step])
        full, dtype = {"s16": (2**15 - 1, np.int16), "s32": (2**31 - 1, np.int32), "flt": (1, np.float32)}[kind[:3]]
        part = (part * full).astype(dtype)
        frame = av.AudioFrame.from_ndarray(part, format=kind, layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 48000, k, Fraction(1, 48000)
        out.mux(stream.encode(frame))
    out.mux(stream.encode(None))


def stamps(path):
    "Seconds at which the frames are shown."
    with av.open(str(path)) as c:
        return [frame.pts * frame.time_base for frame in c.decode(video=0)]


def sounds(path):
    "For each audio stream its packets: (seconds, hash)."
    with av.open(str(path)) as c:
        found = {s.index: [] for s in c.streams.audio}
        for p in c.demux(c.streams.audio):
            if p.dts is not None:
                found[p.stream.index].append((p.pts * p.time_base, hashlib.md5(bytes(p)).hexdigest()))
    return list(found.values())


def copy(source, target, **options):
    "A file through RGB frames into another one, as the pipeline does."
    with VideoReader(source) as reader:
        with VideoWriter(target, reader.info.width, reader.info.height, like=reader.info, audio_from=source,
                         **options) as writer:
            for frame in reader:
                writer.write(frame, pts=reader.pts)


def order(frames, n):
    "Which of `numbered(n)` each frame is."
    levels = numbered(n)[:, -1, -1, 0].astype(int)
    return [int(np.abs(levels - frame[-1, -1, 0]).argmin()) for frame in frames]


def psnr(a, b):
    return 10 * math.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    "30 numbered frames with B-frames, NTSC rate, AAC sound."
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    make(path, numbered(30), fps=NTSC, audio=["aac"])
    return path


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory):
    "60 textured frames, no sound."
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    make(path, textured(60), options={"crf": "20"})
    return path


# ---- reading

@pytest.mark.parametrize("fps", [Fraction(25), NTSC, Fraction(24000, 1001), Fraction(25, 2)])
def test_every_frame_in_order_and_exact_rate(tmp_path, fps):
    make(tmp_path / "a.mp4", numbered(29), fps=fps)
    with av.open(str(tmp_path / "a.mp4")) as c:
        pts = [p.pts for p in c.demux(video=0) if p.dts is not None]
    assert pts != sorted(pts), "the clip must have B-frames for this test to mean anything"
    info = probe(tmp_path / "a.mp4")
    assert (info.fps, info.frames, info.width, info.height, info.audio) == (fps, 29, 64, 48, 0)
    assert order(read_video(tmp_path / "a.mp4"), 29) == list(range(29))


def test_reader_gives_time_stamps(clip):
    with VideoReader(clip) as reader:
        times = [reader.pts * reader.info.time_base for _ in reader]
    assert times == [i / NTSC for i in range(30)]


def test_start_and_frames(clip):
    assert order(read_video(clip, start=7, frames=5), 30) == [7, 8, 9, 10, 11]
    assert order(read_video(clip, start=25), 30) == [25, 26, 27, 28, 29]
    assert len(read_video(clip, frames=100)) == 30


@pytest.mark.parametrize("wrong", [dict(start=-1), dict(frames=0), dict(start=30)])
def test_wrong_start_or_frames(clip, wrong):
    with pytest.raises(ValueError, match="start="):
        read_video(clip, **wrong)


@pytest.mark.parametrize("name, codec", [("a.mkv", "libx264"), ("a.mov", "libx264"), ("a.webm", "libvpx-vp9"),
                                         ("a.avi", "mpeg4"), ("a.ts", "libx264"), ("a.mpg", "mpeg2video")])
def test_other_containers_are_read(tmp_path, name, codec):
    make(tmp_path / name, numbered(12), codec=codec, options={"b": "8000000"} if codec.startswith("mpeg") else None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert order(read_video(tmp_path / name), 12) == list(range(12))


# ---- colours

def patches():
    "RGB colours in blocks large enough that 4:2:0 does not mix them, and their exact Y, U, V."
    return np.random.default_rng(1).integers(0, 256, (6, 8, 3), np.uint8).repeat(16, 0).repeat(16, 1)


def to_yuv(rgb, matrix, range_):
    kr, kb = WEIGHTS[matrix]
    r, g, b = np.moveaxis(rgb / 255.0, -1, 0)
    y = kr * r + (1 - kr - kb) * g + kb * b
    u, v = (b - y) / 2 / (1 - kb), (r - y) / 2 / (1 - kr)
    full = [255 * y, 255 * u + 128, 255 * v + 128]
    return np.stack(full if range_ == 2 else [219 * y + 16, 224 * u + 128, 224 * v + 128])


@pytest.mark.parametrize("range_", [1, 2])
@pytest.mark.parametrize("matrix", WEIGHTS)
def test_colours_are_read_as_tagged(tmp_path, matrix, range_):
    yuv = to_yuv(patches(), matrix, range_).round().clip(0, 255).astype(np.uint8)
    make(tmp_path / "a.mkv", [av.VideoFrame.from_ndarray(yuv, format="yuv444p")] * 2, pixels="yuv444p",
         codec="ffv1", options={}, tags=(matrix, range_))
    info = probe(tmp_path / "a.mkv")
    assert (info.matrix, info.range) == (matrix, range_)
    assert np.abs(read_video(tmp_path / "a.mkv")[0].astype(int) - patches()).max() <= 3


@pytest.mark.parametrize("scale, matrix", [(1, 6), (8, 1)])
def test_untagged_is_601_below_720_lines_else_709(tmp_path, scale, matrix):
    rgb = patches().repeat(scale, 0).repeat(scale, 1)
    yuv = to_yuv(rgb, matrix, 1).round().astype(np.uint8)
    make(tmp_path / "a.mkv", [av.VideoFrame.from_ndarray(yuv, format="yuv444p")], pixels="yuv444p", options={"qp": "0"})
    assert probe(tmp_path / "a.mkv").matrix == 2
    assert np.abs(read_video(tmp_path / "a.mkv")[0].astype(int) - rgb).max() <= 3


def test_unknown_matrix_is_refused(tmp_path):
    make(tmp_path / "a.mkv", numbered(2), tags=(8, 1))  # YCgCo
    with pytest.raises(ValueError, match="colour matrix 8 is not supported"):
        read_video(tmp_path / "a.mkv")


@pytest.mark.parametrize("matrix, range_", [(1, 1), (6, 1), (9, 1), (1, 2), (5, 2)])
def test_colours_are_written_as_the_source_has_them(tmp_path, matrix, range_):
    like = VideoInfo(Path("x"), 64, 48, Fraction(25), 1, Fraction(1, 25), matrix=matrix, range=range_, primaries=5,
                     transfer=6)
    write_video(tmp_path / "a.mkv", [patches()], like=like, crf=0)
    with av.open(str(tmp_path / "a.mkv")) as c:
        frame = next(c.decode(video=0))
    assert [int(x) for x in (frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc)] == [
        matrix, range_, 5, 6]
    planes = frame.to_ndarray(format="yuv444p")[:, 8::16, 8::16].astype(float)  # centres of the blocks
    assert np.abs(planes - to_yuv(patches(), matrix, range_)[:, 8::16, 8::16]).max() < 3
    assert np.abs(read_video(tmp_path / "a.mkv")[0, 8::16, 8::16].astype(int) - patches()[8::16, 8::16]).max() <= 4


@pytest.mark.parametrize("like", [None, VideoInfo(Path("x"), 64, 48, Fraction(25), 1, Fraction(1, 25)),
                                  VideoInfo(Path("x"), 64, 48, Fraction(25), 1, Fraction(1, 25), matrix=0, range=2)])
def test_colours_are_written_as_709_limited_otherwise(tmp_path, like):
    write_video(tmp_path / "a.mp4", [patches()], like=like, crf=0)
    info = probe(tmp_path / "a.mp4")
    assert (info.matrix, info.range, info.primaries, info.transfer) == (1, 1, 1, 1)
    assert np.abs(read_video(tmp_path / "a.mp4")[0, 8::16, 8::16].astype(int) - patches()[8::16, 8::16]).max() <= 4


def test_colour_samples_sit_at_the_left_as_h264_has_them(tmp_path):
    x = np.arange(256)
    ramp = np.broadcast_to(np.stack([60 + 0 * x, 60 + 0 * x, x * 0.9], -1), (64, 256, 3)).astype(np.uint8)
    write_video(tmp_path / "a.mp4", [ramp], crf=0)
    with av.open(str(tmp_path / "a.mp4")) as c:
        plane = next(c.decode(video=0)).planes[1]
        u = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[16, 20:100].astype(float)
    exact = to_yuv(ramp.astype(float), 1, 1)[1, 32]
    slope = (exact[200] - exact[40]) / 160
    shift = ((u - exact[40:200:2]) / slope).mean()
    assert abs(shift) < 0.35, "0.5 would be the centre of a pixel pair"


def test_three_generations_do_not_drift(tmp_path):
    image = first = textured(1, 192, 320)
    for i in range(3):
        write_video(tmp_path / f"{i}.mp4", image, crf=4)
        image = read_video(tmp_path / f"{i}.mp4")
    assert np.abs((image - first.astype(float)).mean((0, 1, 2))).max() < 0.5


def test_more_than_8_bits_and_transparency_are_noticed(tmp_path):
    make(tmp_path / "ten.mkv", numbered(3), pixels="yuv420p10le")
    with pytest.warns(UserWarning, match="10 bits a colour are read as 8") as seen:
        assert order(read_video(tmp_path / "ten.mkv"), 3) == [0, 1, 2]
    assert len(seen) == 1
    make(tmp_path / "alpha.mkv", numbered(3), pixels="yuva420p", codec="ffv1", options={})
    with pytest.warns(UserWarning, match="transparency is dropped"):
        assert order(read_video(tmp_path / "alpha.mkv"), 3) == [0, 1, 2]


@pytest.mark.parametrize("pixels, codec, tags", [("gray", "ffv1", None), ("rgb24", "libx264rgb", None),
                                                 ("rgba", "png", None), ("yuvj420p", "mjpeg", (5, 2))])
@pytest.mark.filterwarnings("ignore:.*transparency")
def test_grey_rgb_and_jpeg_pixels(tmp_path, pixels, codec, tags):
    path = tmp_path / ("a.mov" if codec == "png" else "a.mkv")
    frames = numbered(3)
    if pixels == "gray":
        frames = [av.VideoFrame.from_ndarray(np.ascontiguousarray(f[..., 0]), format="gray") for f in frames]
    make(path, frames, pixels=pixels, codec=codec, options={"qp": "0"} if "x264" in codec else {},
         tags=tags)
    got = read_video(path)
    assert order(got, 3) == [0, 1, 2]
    assert np.abs(got[:, -10:, -10:].astype(int) - numbered(3)[:, -10:, -10:]).max() <= 3


# ---- writing

@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".m4v"])
def test_copy_keeps_count_clock_and_sound(clip, tmp_path, suffix):
    copy(clip, tmp_path / f"b{suffix}")
    a, b = probe(clip), probe(tmp_path / f"b{suffix}")
    assert (b.fps, b.audio, b.width, b.height) == (a.fps, 1, 64, 48)
    assert order(read_video(tmp_path / f"b{suffix}"), 30) == list(range(30))
    tick = Fraction(1, 1000) if suffix == ".mkv" else Fraction(1, 30000)
    before, after = stamps(clip), stamps(tmp_path / f"b{suffix}")
    (sound_before,), (sound_after,) = sounds(clip), sounds(tmp_path / f"b{suffix}")
    assert [h for _, h in sound_before] == [h for _, h in sound_after]
    shift = after[0] - before[0]  # Matroska cannot start below 0: it moves pictures and sound alike
    assert all(abs(y - x - shift) <= tick for x, y in zip(before, after))
    assert all(abs(y - x - shift) <= tick for (x, _), (y, _) in zip(sound_before, sound_after))


def test_several_audio_streams_are_copied_and_interleaved(tmp_path):
    # 24 s: FFmpeg itself interleaves what comes within 10 s of each other
    make(tmp_path / "a.mkv", textured(120, 48, 64), fps=Fraction(5), audio=["aac", "libmp3lame"])
    copy(tmp_path / "a.mkv", tmp_path / "b.mp4")
    before, after = sounds(tmp_path / "a.mkv"), sounds(tmp_path / "b.mp4")
    assert [[h for _, h in s] for s in before] == [[h for _, h in s] for s in after] and len(after) == 2
    with av.open(str(tmp_path / "b.mp4")) as c:
        packets = sorted((p.pos, p.stream.type) for p in c.demux() if p.dts is not None)
    runs = [0]
    for (_, a), (_, b) in zip(packets, packets[1:]):
        runs = [*runs[:-1], runs[-1] + 1] if a == b else [*runs, 0]
    assert max(runs) < len(packets) / 8, "sound must lie between the pictures, not after them"


def test_sound_longer_than_the_pictures_is_kept_whole(clip, tmp_path):
    with VideoReader(clip, frames=5) as reader, VideoWriter(tmp_path / "b.mp4", 64, 48, like=reader.info,
                                                            audio_from=clip) as writer:
        for frame in reader:
            writer.write(frame, pts=reader.pts)
    assert [h for _, h in sounds(tmp_path / "b.mp4")[0]] == [h for _, h in sounds(clip)[0]]


def test_webm(tmp_path):
    make(tmp_path / "a.webm", numbered(12), codec="libvpx-vp9", audio=["libopus"])
    copy(tmp_path / "a.webm", tmp_path / "b.webm")
    assert probe(tmp_path / "b.webm").codec.startswith(("vp9", "libvpx"))
    assert order(read_video(tmp_path / "b.webm"), 12) == list(range(12))
    assert [h for _, h in sounds(tmp_path / "b.webm")[0]] == [h for _, h in sounds(tmp_path / "a.webm")[0]]


def test_sound_that_a_container_cannot_hold(clip, tmp_path):
    with pytest.raises(ValueError, match=r"\.webm cannot hold .* with the sound of .*; try \.mkv"):
        copy(clip, tmp_path / "b.webm")
    assert list(tmp_path.iterdir()) == []
    make(tmp_path / "a.webm", numbered(3), codec="libvpx-vp9", audio=["libopus"])
    with pytest.raises(ValueError, match=r"\.mov cannot hold"):  # refused later, by the header
        copy(tmp_path / "a.webm", tmp_path / "b.mov")
    assert [p.name for p in tmp_path.iterdir()] == ["a.webm"]


def test_unknown_codec(tmp_path):
    with pytest.raises(ValueError, match="cannot hold nonsense video"):
        VideoWriter(tmp_path / "a.mp4", 64, 48, codec="nonsense")
    assert list(tmp_path.iterdir()) == []


def test_other_codec(tmp_path):
    write_video(tmp_path / "a.mp4", numbered(5), codec="libx265", crf=10)
    assert probe(tmp_path / "a.mp4").codec == "hevc"


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_varying_rate_keeps_its_stamps(tmp_path, suffix):
    base, ticks = Fraction(1, 1000), np.cumsum([0] + [33, 40, 20, 50, 77] * 5).tolist()
    make(tmp_path / "a.mp4", numbered(len(ticks)), stamps=ticks, base=base, fps=Fraction(30))
    copy(tmp_path / "a.mp4", tmp_path / f"b{suffix}")
    before, after = stamps(tmp_path / "a.mp4"), stamps(tmp_path / f"b{suffix}")
    assert all(abs(a - b) <= base for a, b in zip(before, after, strict=True))
    assert order(read_video(tmp_path / f"b{suffix}"), len(ticks)) == list(range(len(ticks)))


def test_matroska_milliseconds_become_the_exact_rate_again(tmp_path):
    make(tmp_path / "a.mkv", numbered(40), fps=NTSC)
    assert stamps(tmp_path / "a.mkv")[1] == Fraction(33, 1000)
    copy(tmp_path / "a.mkv", tmp_path / "b.mp4")
    assert stamps(tmp_path / "b.mp4") == [i / NTSC for i in range(40)]
    assert probe(tmp_path / "b.mp4").fps == NTSC


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=40), st.sampled_from([24, 25, NTSC, Fraction(54321, 1999)]),
       st.sampled_from([Fraction(1, 1000), Fraction(1, 90000), Fraction(1, 12800)]))
def test_clock_stays_within_a_tick_and_never_stands_still(steps, fps, base):
    clock, source = encoding._Clock(Fraction(fps), base), np.cumsum(steps).tolist()
    ticks = [clock(s) for s in source]
    assert all(b > a for a, b in zip(ticks, ticks[1:]))
    if all(b > a + 4 for a, b in zip(source, source[1:])):
        assert all(abs(t * clock.tick - s * base) <= base + clock.tick for t, s in zip(ticks, source))


def test_clock_with_stamps_that_repeat_or_go_back():
    clock = encoding._Clock(Fraction(25), Fraction(1, 1000))
    assert [clock(s) for s in (0, 0, 500, 300, 1000)] == [0, 1, 500, 501, 1000]


def test_counting_gives_the_exact_rate(tmp_path):
    for fps, exact in ((30000 / 1001, NTSC), (NTSC, NTSC), (24, 24), (None, 25)):
        write_video(tmp_path / "a.mp4", numbered(6), fps=fps, overwrite=True)
        assert probe(tmp_path / "a.mp4").fps == exact
        assert stamps(tmp_path / "a.mp4") == [i / Fraction(exact) for i in range(6)]


def matrix_of(turn):
    "A stream side-data display matrix that turns by quarter turns counter-clockwise and then mirrors left and right."
    quarter, mirror = turn
    a, b, c, d = [(1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0)][quarter]
    return [-a, b, -c, d] if mirror else [a, b, c, d]


@pytest.mark.parametrize("turn", [(q, m) for q in range(4) for m in (False, True)])
def test_pictures_are_set_upright(tmp_path, turn):
    a, b, c, d = matrix_of(turn)
    with av.open(str(tmp_path / "a.mov"), "w") as out:
        stream = out.add_stream("png", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb24"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        one = 1 << 16
        stream.set_display_matrix([a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30])
        picture = av.VideoFrame.from_ndarray(numbered(1)[0], format="rgb24")
        picture.pts = 0
        out.mux([*stream.encode(picture), *stream.encode(None)])
    upright = np.rot90(numbered(1)[0], turn[0])
    upright = upright[:, ::-1] if turn[1] else upright
    info = probe(tmp_path / "a.mov")
    assert np.array_equal(read_video(tmp_path / "a.mov")[0], upright)
    assert (info.width, info.height) == upright.shape[1::-1]
    assert info.aspect == (Fraction(3, 4) if turn[0] % 2 else Fraction(4, 3))
    copy(tmp_path / "a.mov", tmp_path / "b.mp4")
    after = probe(tmp_path / "b.mp4")
    assert (after.width, after.height, after.aspect, after.turn) == (info.width, info.height, info.aspect, "")


@pytest.mark.parametrize("degrees, quarters", [("90", 3), ("180", 2), ("270", 1), ("-90", 1), ("0", 0), ("x", 0)])
def test_the_old_tag_turns_clockwise(tmp_path, degrees, quarters):
    with av.open(str(tmp_path / "a.mkv"), "w") as out:
        stream = out.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "bgr0"
        stream.metadata["rotate"] = degrees
        picture = av.VideoFrame.from_ndarray(numbered(1)[0], format="rgb24").reformat(format="bgr0")
        picture.pts = 0
        out.mux([*stream.encode(picture), *stream.encode(None)])
    assert np.array_equal(read_video(tmp_path / "a.mkv")[0], np.rot90(numbered(1)[0], quarters))
    copy(tmp_path / "a.mkv", tmp_path / "b.mkv")
    assert probe(tmp_path / "b.mkv").turn == ""


def test_a_slanted_picture_is_noticed(tmp_path):
    make(tmp_path / "a.mp4", numbered(2), rotation=30)
    with pytest.warns(UserWarning, match="only quarter turns are applied"):
        assert read_video(tmp_path / "a.mp4").shape == (2, 48, 64, 3)


@pytest.mark.parametrize("name", ["b.mkv", "b.mov", "b"])
def test_turned_clips_come_out_upright_everywhere(tmp_path, name):
    make(tmp_path / "a.mp4", numbered(2), rotation=90)
    copy(tmp_path / "a.mp4", tmp_path / name)
    upright = np.rot90(numbered(2), 1, (1, 2)).astype(int)
    got = read_video(tmp_path / name)
    assert got.shape == upright.shape and np.abs(got - upright).mean() < 4


def interlaced(n):
    "n frames of two moments each, odd lines first, and what each moment looked like."
    base = textured(1, 96, 224)[0]
    base = (np.roll(base, 4, 1) // 3 + base // 3 + np.roll(base, 2, 0) // 3)[..., :1].repeat(3, 2)  # colour has fewer lines
    moments = [base[:, 3 * i:][:, :160] for i in range(2 * n)]
    odd = np.arange(96)[:, None, None] % 2
    return [np.where(odd, a, b) for a, b in zip(moments[::2], moments[1::2])], moments


@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("codec, options", [("libx264", {"crf": "1", "x264-params": "bff=1"}),
                                            ("mpeg2video", {"flags": "+ildct+ilme", "b": "20000000"})])
def test_interlaced_becomes_whole_frames(tmp_path, codec, options, n):
    frames, moments = interlaced(n)
    make(tmp_path / "a.mkv", frames, codec=codec, options=options)
    if codec == "mpeg2video":  # its frames carry the flag only when they are encoded as fields
        with av.open(str(tmp_path / "a.mkv")) as c:
            if not next(c.decode(video=0)).interlaced_frame:
                pytest.skip("this FFmpeg writes progressive MPEG-2")
    with pytest.warns(UserWarning, match="interlaced; one frame is made of each two fields") as seen:
        got = read_video(tmp_path / "a.mkv")
    assert len(seen) == 1 and len(got) == n
    if n > 4:  # nearer to the first moment of each frame than the woven frame is
        assert all(psnr(g, m) > psnr(f, m) + 3 for g, f, m in zip(got, frames, moments[::2]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copy(tmp_path / "a.mkv", tmp_path / "b.mp4")
    assert stamps(tmp_path / "b.mp4") == [Fraction(i, 25) for i in range(n)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_video(tmp_path / "b.mp4")


def test_a_clip_that_becomes_interlaced(tmp_path):
    for name, options in (("a", {"crf": "1"}), ("b", {"crf": "1", "x264-params": "bff=1"})):
        make(tmp_path / f"{name}.h264", interlaced(6)[0], options=options)
    (tmp_path / "c.h264").write_bytes((tmp_path / "a.h264").read_bytes() + (tmp_path / "b.h264").read_bytes())
    with pytest.warns(UserWarning, match="interlaced; one frame is made") as seen:
        got = read_video(tmp_path / "c.h264")
    frames, moments = interlaced(6)
    assert len(got) == 12 and len(seen) == 1
    assert all(psnr(g, f) > 30 for g, f in zip(got[:6], frames)), "these are progressive and stay as they are"
    assert all(psnr(g, m) > psnr(f, m) + 3 for g, f, m in zip(got[6:], frames, moments[::2]))


def test_reading_a_part_of_an_interlaced_clip(tmp_path):
    make(tmp_path / "a.mkv", interlaced(8)[0], options={"crf": "1", "x264-params": "bff=1"})
    with pytest.warns(UserWarning, match="interlaced"):
        with VideoReader(tmp_path / "a.mkv", start=2, frames=3) as reader:
            assert [reader.pts * reader.info.time_base for _ in reader] == [Fraction(i, 25) for i in (2, 3, 4)]


def test_mp4_starts_playing_before_it_is_loaded(clip, tmp_path):
    copy(clip, tmp_path / "b.mp4")
    data = (tmp_path / "b.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 35), st.integers(1, 35), st.integers(1, 4), st.sampled_from([".mp4", ".mkv", ""]))
def test_any_size_and_count_survives(tmp_path_factory, height, width, n, suffix):
    path = tmp_path_factory.mktemp("any") / f"out{suffix}"
    colours = np.random.default_rng(height).integers(0, 256, (n, 1, 1, 3), np.uint8)
    frames = colours + np.zeros((1, height, width, 1), np.uint8)
    write_video(path, frames, crf=0)
    got = read_video(path)
    assert got.shape == frames.shape
    assert np.abs(got.astype(int) - frames).max() <= (4 if suffix else 0)


# ---- what is copied: subtitles, chapters, title, a late start

HEADER = b"[Script Info]\r\nScriptType: v4.00+\r\n\r\n[Events]\r\nFormat: Layer, Text\r\n"


def captioned(path, kind, *, late=0, notes=None):
    "A clip with a title, two chapters and two lines of subtitles; everything begins `late` ms after 0."
    from av.subtitles.subtitle import SubtitleSet

    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        out.metadata.update(notes or {"title": "Grün", "comment": "a clip"})
        lines = out.add_stream(kind)
        lines.metadata["language"] = "fra"
        lines.codec_context.subtitle_header = HEADER
        out.set_chapters([{"id": i, "start": late + 400 * i, "end": late + 400 * i + 400, "metadata": {"title": name},
                           "time_base": Fraction(1, 1000)} for i, name in enumerate(("One", "Two"))])
        out.start_encoding()
        for i, frame in enumerate(numbered(20)):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p")
            picture.pts, picture.time_base = late + 40 * i, Fraction(1, 1000)
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))
        for ms, text in ((80, "Ça va ?"), (480, "Très bien.")):
            packet = lines.codec_context.encode_subtitle(
                SubtitleSet.create(b"0,0,Default,,0,0,0,," + text.encode(), 0, 200, pts=0))
            packet.stream, packet.time_base, packet.duration = lines, Fraction(1, 1000), 200
            packet.pts = packet.dts = late + ms
            out.mux(packet)


def captions(path):
    "For each stream of subtitles its codec, language and lines: (ms, text without styles)."
    import re

    found = []
    with av.open(str(path)) as c:
        for s in c.streams.subtitles:
            lines = [(round(1000 * p.pts * p.time_base), re.sub(r"{.*?}|^.*,,", "", rect.dialogue.decode()))
                     for p in c.demux(s) if p.dts is not None and bytes(p) != bytes(2)
                     for rect in s.codec_context.decode2(p) or ()]
            found.append((s.codec_context.name, s.metadata.get("language"), lines))
            c.seek(0)
    return found


@pytest.mark.parametrize("source, kind", [("a.mkv", "subrip"), ("a.mkv", "ass"), ("a.mp4", "mov_text"),
                                          ("a.mkv", "webvtt")])
@pytest.mark.parametrize("target", ["b.mp4", "b.mov", "b.mkv"])
def test_subtitles_chapters_and_title_are_copied(tmp_path, source, kind, target):
    captioned(tmp_path / source, kind)
    copy(tmp_path / source, tmp_path / target)
    ((name, language, lines),) = captions(tmp_path / target)
    assert lines == [(80, "Ça va ?"), (480, "Très bien.")] and language == "fra"
    assert (name == "mov_text") == (target != "b.mkv")
    with av.open(str(tmp_path / target)) as c:
        assert c.metadata["title"] == "Grün" and {k.lower(): v for k, v in c.metadata.items()}["comment"] == "a clip"
        assert [(x["start"] * x["time_base"], x["end"] * x["time_base"], x["metadata"]["title"]) for x in c.chapters()] == [
            (0, Fraction(2, 5), "One"), (Fraction(2, 5), Fraction(4, 5), "Two")]


def test_a_silent_clip_keeps_its_subtitles(tmp_path):
    "Through the pipeline's way into a file, which is told of sound only where there is some."
    from flashvsr_nb.files import Clip, write_clip

    captioned(tmp_path / "a.mkv", "subrip")
    clip = Clip(tmp_path / "a.mkv")
    write_clip(clip, (np.repeat(np.repeat(f, 4, 0), 4, 1) for f in clip.frames), tmp_path / "b.mp4", size=(256, 192))
    ((_, language, lines),) = captions(tmp_path / "b.mp4")
    assert lines == [(80, "Ça va ?"), (480, "Très bien.")] and language == "fra"


def test_webm_gets_its_own_subtitles(tmp_path):
    captioned(tmp_path / "a.mkv", "subrip")
    copy(tmp_path / "a.mkv", tmp_path / "b.webm")
    assert captions(tmp_path / "b.webm") == [("webvtt", "fra", [(80, "Ça va ?"), (480, "Très bien.")])]


def test_subtitles_that_are_pictures_are_left_out_with_a_notice(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as out:
        stream, pictures = out.add_stream("libx264", rate=25), out.add_stream("dvdsub")
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        pictures.codec_context.extradata = b"palette: " + b", ".join([b"000000"] * 16)
        for i, frame in enumerate(numbered(3)):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p")
            picture.pts, picture.time_base = i, Fraction(1, 25)
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))
    with pytest.warns(UserWarning, match="subtitles of kind dvd_?sub.* are left out; only .mkv can hold them"):
        copy(tmp_path / "a.mkv", tmp_path / "b.webm")
    assert len(read_video(tmp_path / "b.webm")) == 3
    copy(tmp_path / "a.mkv", tmp_path / "b.mkv")
    with av.open(str(tmp_path / "b.mkv")) as c:
        assert len(c.streams.subtitles) == 1


def test_title_and_chapters_come_with_like_alone(tmp_path):
    captioned(tmp_path / "a.mkv", "subrip")
    write_video(tmp_path / "b.mp4", numbered(20), like=probe(tmp_path / "a.mkv"))
    assert captions(tmp_path / "b.mp4") == []
    with av.open(str(tmp_path / "b.mp4")) as c:
        assert c.metadata["title"] == "Grün" and len(c.chapters()) == 2


def test_a_phone_s_long_notes_are_kept(tmp_path):
    notes = {"com.apple.quicktime.model": "Phone 7", "com.apple.quicktime.location.ISO6709": "+48.1+011.5/"}
    captioned(tmp_path / "c.mkv", "subrip", notes=notes)
    with av.open(str(tmp_path / "c.mkv")) as c:
        said = {k.lower(): v for k, v in c.metadata.items()}
    copy(tmp_path / "c.mkv", tmp_path / "b.mov")
    with av.open(str(tmp_path / "b.mov")) as c:
        after = {k.lower(): v for k, v in c.metadata.items()}
    assert {k.lower(): after.get(k.lower()) for k in notes} == {k.lower(): said[k.lower()] for k in notes}


@pytest.mark.parametrize("target", ["b.mp4", "b.mov", "b.mkv"])
def test_a_clip_that_begins_late_begins_at_once(tmp_path, target):
    captioned(tmp_path / "a.mkv", "subrip", late=90_000)
    assert probe(tmp_path / "a.mkv").start == 90
    copy(tmp_path / "a.mkv", tmp_path / target)
    assert stamps(tmp_path / target) == [Fraction(i, 25) for i in range(20)]
    assert captions(tmp_path / target)[0][2] == [(80, "Ça va ?"), (480, "Très bien.")]
    with av.open(str(tmp_path / target)) as c:
        assert [x["start"] * x["time_base"] for x in c.chapters()] == [0, Fraction(2, 5)]


def test_a_broadcast_keeps_its_sound_in_step(tmp_path):
    make(tmp_path / "a.ts", numbered(30), audio=["mp2"])
    assert probe(tmp_path / "a.ts").start > 0
    copy(tmp_path / "a.ts", tmp_path / "b.mp4")
    (before,), (after,) = sounds(tmp_path / "a.ts"), sounds(tmp_path / "b.mp4")
    shift = stamps(tmp_path / "b.mp4")[0] - stamps(tmp_path / "a.ts")[0]
    assert shift < 0 and [h for _, h in before] == [h for _, h in after]
    assert all(abs(b - a - shift) <= Fraction(1, 48000) + Fraction(1, 90000) for (a, _), (b, _) in zip(before, after))


@pytest.mark.parametrize("target", ["b.mp4", "b.mkv"])
def test_two_recordings_in_one_file_follow_each_other(tmp_path, target):
    make(tmp_path / "a.ts", numbered(50), audio=["mp2"])
    (tmp_path / "twice.ts").write_bytes((tmp_path / "a.ts").read_bytes() * 2)
    once = stamps(tmp_path / "twice.ts")
    assert len(once) == 100 and once[50] < once[49] - 1, "its clock must go back for this test to mean anything"
    with pytest.warns(RuntimeWarning, match=r"damaged or breaks off: 9\d frames"):  # the seam breaks a packet
        copy(tmp_path / "twice.ts", tmp_path / target)
    times = stamps(tmp_path / target)
    assert max(b - a for a, b in zip(times, times[1:])) <= Fraction(3, 25) and len(times) >= 97
    assert order(read_video(tmp_path / target), 50)[-50:] == [i % 30 for i in range(50)]
    (before,), (after,) = sounds(tmp_path / "twice.ts"), sounds(tmp_path / target)
    assert [h for _, h in before] == [h for _, h in after]
    steps = [b - a for (a, _), (b, _) in zip(after, after[1:])]
    assert all(abs(step - Fraction(24, 1000)) <= Fraction(1, 1000) for step in steps)


@settings(max_examples=20, deadline=None)
@given(st.integers(-5000, 5000), st.integers(1, 60))
def test_a_clock_that_starts_anywhere(first, step):
    clock = encoding._Clock(Fraction(25), Fraction(1, 1000), Fraction(first, 1000))
    times = [clock(first + step * i) * clock.tick * 1000 for i in range(5)]
    assert times[0] == 0 and all(abs(time - step * i) <= 1 for i, time in enumerate(times))


# ---- codecs, pixel formats, 10 bits, HDR

MASTERED = "master-display=G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,50):max-cll=1000,400"


def deep(n=3):
    "n frames of 16 bits, smooth, so that a codec keeps them."
    x = np.linspace(0, 65535, 64)[None, :, None] * np.array([1, 0.7, 0.4]) * np.ones((48, 1, 1))
    return np.stack([np.roll(x, i, 1) for i in range(n)]).round().astype(np.uint16)


def hdr(path, transfer=16, light=MASTERED):
    "A clip of HDR."
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx265", rate=25, options={"x265-params": f"log-level=none:{light}".rstrip(":")})
        stream.width, stream.height, stream.pix_fmt, context = 64, 48, "yuv420p10le", stream.codec_context
        context.colorspace, context.color_range, context.color_primaries, context.color_trc = 9, 1, 9, transfer
        for i, frame in enumerate(deep()):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb48le")
            picture = picture.reformat(format="yuv420p10le", dst_colorspace=9, dst_color_range=1)
            picture.pts = i
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))


@pytest.mark.parametrize("target", ["b.mp4", "b.mkv", "b.mov"])
@pytest.mark.parametrize("transfer, light", [(16, MASTERED), (16, ""), (18, "")])
def test_hdr_is_kept_in_16_bits(tmp_path, transfer, light, target):
    hdr(tmp_path / "a.mkv", transfer, light)
    before = probe(tmp_path / "a.mkv")
    assert (before.light, before.bits) == (light, 10)
    with VideoReader(tmp_path / "a.mkv", bits=16) as reader, VideoWriter(tmp_path / target, 64, 48, like=reader.info,
                                                                         bits=16, crf=2) as writer:
        frames = [frame for frame in reader if writer.write(frame, pts=reader.pts) is None]
    after = probe(tmp_path / target)
    for name in ("matrix", "range", "primaries", "transfer", "light", "bits", "pixel_format", "codec"):
        assert getattr(before, name) == getattr(after, name)
    off = np.abs(read_video(tmp_path / target, bits=16).astype(int) - frames)
    assert np.median(off) < 128, "two steps of 10 bits"


@pytest.mark.parametrize("transfer, name", [(16, "PQ"), (18, "HLG")])
def test_hdr_is_refused_in_8_bits(tmp_path, transfer, name):
    hdr(tmp_path / "a.mkv", transfer)
    with pytest.raises(ValueError, match=rf"HDR \({name}\) would show bands.*make an SDR copy .*bits=16") as error:
        VideoReader(tmp_path / "a.mkv")
    one_line(error)
    for wrong in ({}, {"bits": 16, "pixel_format": "yuv420p"}):
        with pytest.raises(ValueError, match=rf"HDR \({name}\) needs frames of 16 bits") as error:
            VideoWriter(tmp_path / "b.mkv", 64, 48, like=probe(tmp_path / "a.mkv"), **wrong)
        one_line(error)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mkv"]


def test_light_levels_that_a_codec_cannot_keep_are_noticed(tmp_path):
    hdr(tmp_path / "a.mkv")
    with pytest.warns(UserWarning, match="light levels of HDR10 are kept by hevc only"):
        write_video(tmp_path / "b.mkv", deep(), like=probe(tmp_path / "a.mkv"), codec="av1")


def test_16_bits_lose_nothing_in_ffv1(tmp_path):
    write_video(tmp_path / "a.mkv", deep(), codec="ffv1")
    assert np.array_equal(read_video(tmp_path / "a.mkv", bits=16), deep())
    write_video(tmp_path / "b.mkv", numbered(3), codec="ffv1")
    assert np.array_equal(read_video(tmp_path / "b.mkv"), numbered(3))
    assert np.array_equal(read_video(tmp_path / "b.mkv", bits=16), numbered(3) * np.uint16(257))


@pytest.mark.parametrize("tags", [(1, 1), (9, 1), (6, 2)])
def test_10_bits_are_read_as_16_with_their_matrix_and_range(tmp_path, tags):
    like = VideoInfo(Path("x"), 64, 48, Fraction(25), 1, Fraction(1, 25), matrix=tags[0], range=tags[1])
    write_video(tmp_path / "a.mkv", deep(), like=like, codec="ffv1", pixel_format="yuv444p10le")
    assert (probe(tmp_path / "a.mkv").matrix, probe(tmp_path / "a.mkv").range) == tags
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is dropped, so nothing is said
        off = np.abs(read_video(tmp_path / "a.mkv", bits=16).astype(int) - deep())
    assert off.max() < 256, "a step of 8 bits"
    assert off.mean() < (64 if tags[1] == 1 else 80), "a step of 10 bits; swscale stretches full range by 0.2 %"


@pytest.mark.parametrize("name, codec, pixels, found", [
    ("a.mp4", None, None, ("h264", "yuv420p")), ("a.mp4", "h264", "yuv444p", ("h264", "yuv444p")),
    ("a.mp4", "hevc", "yuv422p10le", ("hevc", "yuv422p10le")), ("a.mp4", "av1", None, ("libdav1d", "yuv420p")),
    ("a.mov", "prores", None, ("prores", "yuv422p10le")), ("a.mkv", "vp9", None, ("vp9", "yuv420p")),
    ("a.mkv", "ffv1", None, ("ffv1", "bgr0")), ("a.webm", "av1", "yuv420p10le", ("libdav1d", "yuv420p10le")),
    ("a.mkv", "libx264", "yuv420p10le", ("h264", "yuv420p10le"))])
@pytest.mark.filterwarnings("ignore:.*10 bits")
def test_codec_and_pixel_format_by_choice(tmp_path, name, codec, pixels, found):
    write_video(tmp_path / name, numbered(5), codec=codec, pixel_format=pixels)
    info = probe(tmp_path / name)
    assert (info.codec, info.pixel_format) == found
    assert order(read_video(tmp_path / name), 5) == list(range(5))


@pytest.mark.parametrize("options, said", [
    (dict(codec="h265"), "no such video encoder; allowed are h264 hevc"), (dict(codec="aac"), "no such video encoder"),
    (dict(pixel_format="yuv410p"), "cannot have pixel format yuv410p; allowed are yuv420p"),
    (dict(codec="vp9", pixel_format="yuv420p10le"), "cannot have pixel format"),
    (dict(codec="av1", width=65), "cannot have pixel format yuv444p; allowed are"),
    (dict(pixel_format="yuv420p", width=65), "needs even sides, not 65x48; take yuv444p"),
    (dict(bits=10), "bits=10: allowed are 8 and 16"), (dict(codec="av1", crf=64), "crf from 0 to 51")])
def test_what_does_not_go_together_is_refused(tmp_path, options, said):
    with pytest.raises(ValueError, match=said) as error:
        VideoWriter(tmp_path / "a.mkv", **{"width": 64, "height": 48, **options})
    one_line(error)
    assert list(tmp_path.iterdir()) == []


def test_16_bits_and_images_do_not_go_together(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="bits=8 only"):
        VideoReader(tmp_path / "a.png", bits=16)
    with pytest.raises(ValueError, match="bits=8 only"):
        VideoWriter(tmp_path / "out", 64, 48, bits=16)
    with pytest.raises(ValueError, match="allowed are 8 and 16"):
        VideoReader(tmp_path / "a.png", bits=12)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_apple_s_players_recognise_hevc(tmp_path, n):
    write_video(tmp_path / "a.mp4", numbered(n), codec="hevc")
    assert b"hvc1" in (tmp_path / "a.mp4").read_bytes()
    assert order(read_video(tmp_path / "a.mp4"), n) == list(range(n))


def test_an_encoder_that_refuses_is_quoted(tmp_path):
    with pytest.raises(ValueError, match=r"\.mkv cannot hold mjpeg video of 64x48 \(.*\); try another codec") as error:
        VideoWriter(tmp_path / "a.mkv", 64, 48, codec="mjpeg")
    one_line(error)
    assert list(tmp_path.iterdir()) == []


def test_open_gop_gives_every_frame(tmp_path):
    make(tmp_path / "a.mkv", textured(40), options={"crf": "1", "x264-params": "open-gop=1:keyint=8:bframes=3:b-adapt=0"})
    got = read_video(tmp_path / "a.mkv")
    assert len(got) == 40 and min(psnr(g, t) for g, t in zip(got, textured(40))) > 20
    copy(tmp_path / "a.mkv", tmp_path / "b.mp4")
    assert stamps(tmp_path / "b.mp4") == [Fraction(i, 25) for i in range(40)]


# ---- images

def test_folder_of_images_in_natural_order(tmp_path):
    for i in (1, 2, 10):
        Image.new("RGB", (8, 6), (i, 0, 0)).save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    info = probe(tmp_path)
    assert (info.width, info.height, info.frames, info.is_folder, info.audio) == (8, 6, 3, True, 0)
    assert read_video(tmp_path)[:, 0, 0, 0].tolist() == [1, 2, 10]
    assert read_video(tmp_path, start=1, frames=1)[:, 0, 0, 0].tolist() == [2]


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".webp", ".jpg"])
def test_one_image(tmp_path, suffix):
    Image.fromarray(patches()).save(tmp_path / f"a{suffix}", **({"lossless": True} if suffix == ".webp" else {}))
    got = read_video(tmp_path / f"a{suffix}")
    assert got.shape == (1, 96, 128, 3)
    if suffix == ".jpg":
        assert np.abs(got.mean((0, 1, 2)) - patches().mean((0, 1))).max() < 3
    else:
        assert np.array_equal(got[0], patches())


def test_grey_palette_and_16_bit_images(tmp_path):
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "b.png")
    Image.fromarray(grey).convert("P").save(tmp_path / "c.png")
    got = read_video(tmp_path)
    assert got.shape == (3, 6, 8, 3)
    assert (got == grey[None, ..., None]).all()


def test_transparency_is_dropped_with_one_notice(tmp_path):
    for i in range(3):
        Image.new("RGBA", (8, 6), (10, 20, 30, 40)).save(tmp_path / f"{i}.png")
    with pytest.warns(UserWarning, match="transparency is dropped") as seen:
        got = read_video(tmp_path)
    assert len(seen) == 1
    assert (got == (10, 20, 30)).all()


def test_a_camera_s_turn_is_applied(tmp_path):
    image = Image.new("RGB", (8, 6), "red")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert (probe(tmp_path / "a.jpg").width, probe(tmp_path / "a.jpg").height) == (6, 8)
    assert read_video(tmp_path / "a.jpg").shape == (1, 8, 6, 3)


def test_folder_of_pngs_is_lossless(tmp_path):
    frames = textured(3)
    write_video(tmp_path / "out", frames)
    assert np.array_equal(read_video(tmp_path / "out"), frames)
    write_video(tmp_path / "out", frames[:2], overwrite=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["00000001.png", "00000002.png"]
    write_video(tmp_path / "one.png", frames[:1])
    assert np.array_equal(read_video(tmp_path / "one.png"), frames[:1])


def test_replacing_a_folder_spares_what_came_in_meanwhile(tmp_path):
    write_video(tmp_path / "out", numbered(3))
    with VideoWriter(tmp_path / "out", 64, 48, overwrite=True) as writer:
        writer.write(numbered(1)[0])
        (tmp_path / "out" / "notes.txt").write_text("precious")
    assert sorted(os.listdir(tmp_path / "out")) == ["00000001.png", "notes.txt"]
    assert os.listdir(tmp_path) == ["out"]


def test_a_png_holds_one_frame(tmp_path):
    with pytest.raises(ValueError, match="a .png holds one frame"):
        write_video(tmp_path / "one.png", numbered(2))
    assert list(tmp_path.iterdir()) == []


def test_sound_of_images_is_no_sound(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "in.png")
    copy(tmp_path / "in.png", tmp_path / "out.mp4")
    assert len(read_video(tmp_path / "out.mp4")) == 1


# ---- inputs that are wrong, one clear line each

def one_line(error):
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    return str(error.value)


def test_missing_input(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.mp4: no such file or folder") as error:
        VideoReader(tmp_path / "nothing.mp4")
    one_line(error)


@pytest.mark.parametrize("name, content", [("a.mp4", b"hello world\n" * 99), ("a.mp4", b""), ("a.txt", b"hello\n" * 99),
                                           ("a.mkv", bytes(5000))])
def test_not_a_video(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="not a video") as error:
        VideoReader(tmp_path / name)
    one_line(error)


def test_zero_frames(long_clip, tmp_path):
    data = long_clip.read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[:data.index(b"mdat") + 60])  # all headers, no whole frame
    with pytest.raises(ValueError, match="no frame in it can be decoded") as error:
        VideoReader(tmp_path / "a.mp4")
    one_line(error)


@pytest.mark.parametrize("cover", [False, True])
def test_only_sound(tmp_path, cover):
    path = tmp_path / ("a.mp3" if cover else "a.m4a")
    with av.open(str(path), "w", format=None if cover else "mp4") as out:
        stream = out.add_stream("libmp3lame" if cover else "aac", rate=48000, layout="mono")
        if cover:
            from av.stream import Disposition

            picture = out.add_stream("mjpeg", rate=25)
            picture.width, picture.height, picture.pix_fmt = 128, 96, "yuvj420p"
            picture.disposition = Disposition.attached_pic
            out.start_encoding()
            frame = av.VideoFrame.from_ndarray(patches(), format="rgb24").reformat(format="yuvj420p")
            frame.pts = 0
            out.mux(picture.encode(frame))
            out.mux(picture.encode(None))
        tone(out, stream, 0.5, 440)
    with pytest.raises(ValueError, match="no video in it, only sound") as error:
        VideoReader(path)
    one_line(error)


@pytest.mark.parametrize("suffix, codec", [(".mp4", "libx264"), (".mov", "libx264"), (".mkv", "libx264"),
                                           (".webm", "libvpx-vp9"), (".avi", "mpeg4")])
def test_file_that_breaks_off(tmp_path, suffix, codec):
    whole, cut = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    options = {"b": "2000000"} if codec == "mpeg4" else {"crf": "20"}
    make(whole, textured(60), codec=codec, options=options, audio=["aac"] if suffix == ".mkv" else [])
    data = whole.read_bytes()
    cut.write_bytes(data[:len(data) * 6 // 10])
    with pytest.warns(RuntimeWarning, match=r"breaks off: \d+ frames could be read of 60") as seen:
        got = read_video(cut)
    assert len(seen) == 1 and f": {len(got)} frames" in str(seen[0].message)
    assert 5 < len(got) < 55
    intact = len(got) - 4 * (suffix == ".mkv")  # there the last packet looks whole, and the decoder patches it up
    assert np.array_equal(got[:intact], read_video(whole)[:intact])


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".webm", ".ts", ".avi"])
def test_cut_anywhere_it_is_said_in_our_words(tmp_path, suffix):
    whole, cut = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    codec = {".webm": "libvpx-vp9", ".avi": "mpeg4"}.get(suffix, "libx264")
    make(whole, textured(12), codec=codec, options={"b": "2000000"} if codec == "mpeg4" else {"crf": "20"})
    data = whole.read_bytes()
    for end in [*range(0, 900, 37), *range(900, len(data), len(data) // 40)]:
        cut.write_bytes(data[:end])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert len(read_video(cut)) <= 12
        except ValueError as error:
            assert str(error).startswith(str(cut)) and "Errno" not in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("target", ["b.mkv", "b.mp4"])
def test_copying_what_is_damaged_fails_in_our_words_or_not_at_all(tmp_path, target):
    make(tmp_path / "a.mkv", textured(25), options={"crf": "20"}, audio=["aac", "libmp3lame"])
    data, dice, done = (tmp_path / "a.mkv").read_bytes(), np.random.default_rng(0), 0
    for trial in range(30):
        bad = bytearray(data[:dice.integers(len(data) // 3, len(data))] if trial % 2 else data)
        for at in dice.integers(600, len(bad), 0 if trial % 4 == 1 else 8):
            bad[at] ^= 1 << dice.integers(8)
        (tmp_path / "c.mkv").write_bytes(bad)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                copy(tmp_path / "c.mkv", tmp_path / target, overwrite=True)
            done += 1
        except ValueError as error:
            assert str(error).startswith(str(tmp_path)) and "Errno" not in str(error) and "\n" not in str(error)
    assert done > 15


def test_a_read_error_is_the_end_of_the_file(tmp_path, monkeypatch):
    import flashvsr_nb.video as reading

    make(tmp_path / "a.mkv", textured(12))
    error = av.error.FFmpegError(5, "Input/output error")

    def broken(path):
        raise error

    monkeypatch.setattr(av, "open", lambda *a, **k: broken(a))
    with pytest.raises(ValueError, match="a.mkv: not a video that can be read"):
        reading.probe(tmp_path / "a.mkv")


def test_mp4_without_its_table_of_contents(tmp_path):
    make(tmp_path / "a.mp4", textured(20), fast=False)  # the table comes last
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(data[:len(data) // 2])
    with pytest.raises(ValueError, match="not a video that can be read") as error:
        VideoReader(tmp_path / "b.mp4")
    one_line(error)


def test_frames_hidden_by_an_edit_list_are_not_missed(tmp_path):
    make(tmp_path / "a.mp4", numbered(30), stamps=list(range(-10, 20)), base=Fraction(1, 25))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert order(read_video(tmp_path / "a.mp4"), 30) == list(range(10, 30))


def test_folder_without_images(tmp_path):
    with pytest.raises(ValueError, match="no images in this folder") as error:
        VideoReader(tmp_path)
    one_line(error)


def test_images_of_different_sizes(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    Image.new("RGB", (9, 6)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match="a.png is 8x6, b.png is 9x6") as error:
        VideoReader(tmp_path)
    one_line(error)


def test_damaged_images(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="a.png: not an image") as error:
        VideoReader(tmp_path)
    one_line(error)
    Image.fromarray(textured(1)[0]).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:300])
    with pytest.raises(ValueError, match="a.png: damaged or incomplete image") as error:
        read_video(tmp_path)
    one_line(error)


def test_a_size_that_changes(tmp_path):
    parts = []
    for i, size in enumerate([(48, 64), (32, 64)]):
        make(tmp_path / f"{i}.h264", numbered(4, *size))
        parts.append((tmp_path / f"{i}.h264").read_bytes())
    (tmp_path / "a.h264").write_bytes(b"".join(parts))
    with pytest.raises(ValueError, match="frame 5 is 64x32, the first 64x48") as error:
        read_video(tmp_path / "a.h264")
    one_line(error)


# ---- outputs that are wrong, before any work and without a trace

def refused(kind, match, path, source=None, overwrite=False):
    "Both the check and the writer refuse, in one line."
    like = source and VideoInfo(Path(source), 64, 48, Fraction(25), 1, Fraction(1, 25))
    for call in (lambda: check_output(path, source=source, overwrite=overwrite),
                 lambda: VideoWriter(path, 64, 48, like=like, overwrite=overwrite)):
        with pytest.raises(kind, match=match) as error:
            call()
        one_line(error)


def test_output_folder_missing(tmp_path):
    refused(FileNotFoundError, "does not exist; create it first", tmp_path / "no" / "out.mp4")


def test_output_folder_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    refused(NotADirectoryError, "is a file, not a folder", tmp_path / "file" / "out.mp4")


def test_output_folder_not_writable(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    refused(PermissionError, "is not writable", tmp_path / "out.mp4")


@pytest.mark.parametrize("name", ["out.mp4", "out.png"])
def test_output_exists(tmp_path, name):
    (tmp_path / name).write_text("precious")
    refused(FileExistsError, "exists already.*--overwrite", tmp_path / name)
    assert (tmp_path / name).read_text() == "precious"
    assert check_output(tmp_path / name, overwrite=True) == tmp_path / name


def test_output_folder_exists(tmp_path):
    (tmp_path / "out").mkdir()
    check_output(tmp_path / "out")  # an empty folder is fine
    (tmp_path / "out" / "0001.png").write_text("an earlier frame")
    refused(FileExistsError, "exists already", tmp_path / "out")
    check_output(tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "holiday.jpg").write_text("precious")
    refused(FileExistsError, "holds other things", tmp_path / "out", overwrite=True)


def test_output_is_of_another_kind(tmp_path):
    (tmp_path / "out").write_text("a file")
    refused(ValueError, "exists and is not a folder", tmp_path / "out", overwrite=True)
    os.mkfifo(tmp_path / "pipe.mp4")
    refused(ValueError, "exists and is not a file", tmp_path / "pipe.mp4", overwrite=True)


@pytest.mark.parametrize("how", ["same", "relative", "symlink", "hard link"])
def test_output_equals_input(tmp_path, monkeypatch, how):
    source, target = tmp_path / "in.mp4", tmp_path / "out.mp4"
    source.write_text("precious")
    monkeypatch.chdir(tmp_path)
    if how == "symlink":
        target.symlink_to(source)
    elif how == "hard link":
        target.hardlink_to(source)
    else:
        target = source if how == "same" else Path("../" + tmp_path.name) / "in.mp4"
    refused(ValueError, "output and input are the same", target, source=source, overwrite=True)
    assert source.read_text() == "precious"


def test_output_equals_any_input(tmp_path):
    (tmp_path / "a.mp4").write_text("precious")
    (tmp_path / "b.mp4").write_text("precious")
    like = VideoInfo(tmp_path / "a.mp4", 64, 48, Fraction(25), 1, Fraction(1, 25))
    for target in "ab":
        with pytest.raises(ValueError, match="output and input are the same"):
            VideoWriter(tmp_path / f"{target}.mp4", 64, 48, like=like, audio_from=tmp_path / "b.mp4", overwrite=True)


def test_output_equals_input_folder(tmp_path):
    frames = tmp_path / "frames"
    frames.mkdir()
    refused(ValueError, "output and input are the same", frames, source=frames, overwrite=True)


@pytest.mark.parametrize("name", ["out.doc", "out.avi", "out.jpg"])
def test_output_suffix(tmp_path, name):
    refused(ValueError, "allowed are .mp4", tmp_path / name)


@pytest.mark.parametrize("wrong", [dict(width=0), dict(height=-1), dict(fps=0), dict(crf=60)])
def test_writer_arguments(tmp_path, wrong):
    with pytest.raises(ValueError, match="allowed are sides from 1"):
        VideoWriter(tmp_path / "a.mp4", **{"width": 64, "height": 48, **wrong})
    assert list(tmp_path.iterdir()) == []


def test_missing_audio_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="audio_from"):
        VideoWriter(tmp_path / "a.mp4", 64, 48, audio_from=tmp_path / "no.mp4")


@pytest.mark.parametrize("frame", [np.zeros((48, 64), np.uint8), np.zeros((64, 48, 3), np.uint8),
                                   np.zeros((48, 64, 3))])
def test_wrong_frame(tmp_path, frame):
    with pytest.raises(ValueError, match="allowed is uint8 of shape"):
        with VideoWriter(tmp_path / "a.mp4", 64, 48) as writer:
            writer.write(frame)
    assert list(tmp_path.iterdir()) == []


# ---- whole or nothing

@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "frames"])
def test_error_leaves_nothing(tmp_path, name):
    with pytest.raises(RuntimeError, match="broken"):
        with VideoWriter(tmp_path / name, 64, 48) as writer:
            writer.write(numbered(1)[0])
            assert len(list(tmp_path.iterdir())) == 1
            raise RuntimeError("broken")
    assert list(tmp_path.iterdir()) == []


def test_error_keeps_the_earlier_output(tmp_path):
    write_video(tmp_path / "a.mp4", numbered(3))
    before = (tmp_path / "a.mp4").read_bytes()
    with pytest.raises(RuntimeError):
        with VideoWriter(tmp_path / "a.mp4", 64, 48, overwrite=True) as writer:
            writer.write(numbered(1)[0])
            raise RuntimeError("broken")
    assert (tmp_path / "a.mp4").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "frames"])
def test_ctrl_c_keeps_a_playable_file(clip, tmp_path, name):
    with pytest.raises(KeyboardInterrupt):
        with (VideoReader(clip) as reader,
              VideoWriter(tmp_path / name, 64, 48, like=reader.info, audio_from=clip) as writer):
            for i, frame in enumerate(reader):
                if i == 12:
                    raise KeyboardInterrupt
                writer.write(frame, pts=reader.pts)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert order(read_video(tmp_path / name), 30) == list(range(12))
    if name != "frames":
        assert float(sounds(tmp_path / name)[0][-1][0]) < 12 / NTSC + 0.1


@pytest.mark.parametrize("name", ["frames", "one.png"])
def test_ctrl_c_while_a_png_is_written_leaves_no_half_picture(tmp_path, monkeypatch, name):
    save = Image.Image.save

    def half(self, path, *args, **kwargs):
        save(self, path, *args, **kwargs)
        if name == "one.png" or Path(path).name == "00000003.png":
            Path(path).write_bytes(Path(path).read_bytes()[:100])
            raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(KeyboardInterrupt):
        with VideoWriter(tmp_path / name, 64, 48) as writer:
            for frame in numbered(5):
                writer.write(frame)
    if name == "one.png":
        assert list(tmp_path.iterdir()) == []
    else:
        assert order(read_video(tmp_path / name), 5) == [0, 1]


def test_a_real_sigint_keeps_a_playable_file(tmp_path):
    code = ("import itertools, sys, time, numpy as np; from flashvsr_nb.video import VideoWriter\n"
            "with VideoWriter(sys.argv[1], 64, 48) as writer:\n"
            "    for i in itertools.count():\n"
            "        writer.write(np.full((48, 64, 3), i % 256, np.uint8)); time.sleep(0.002); print(i, flush=True)")
    run = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a.mp4")], stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True)
    while int(run.stdout.readline()) < 60:
        pass
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=30)
    assert "KeyboardInterrupt" in err
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
    assert abs(len(read_video(tmp_path / "a.mp4")) - (int(out.split()[-1]) if out else 60)) <= 2


def test_ctrl_c_before_the_first_frame_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with VideoWriter(tmp_path / "a.mp4", 64, 48):
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.mp4", "frames"])
def test_no_frames_is_an_error(tmp_path, name):
    with pytest.raises(ValueError, match="no frame was written"):
        with VideoWriter(tmp_path / name, 64, 48):
            pass
    with pytest.raises(ValueError, match="nothing to write"):
        write_video(tmp_path / name, [])
    assert list(tmp_path.iterdir()) == []


def test_failure_while_closing_leaves_nothing(tmp_path, monkeypatch):
    def full(self, whole):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encoding._Encoder, "finish", full)
    with pytest.raises(OSError, match="No space left"):
        write_video(tmp_path / "a.mp4", numbered(2))
    assert list(tmp_path.iterdir()) == []


def test_closing_twice_is_harmless(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", 64, 48)
    writer.write(numbered(1)[0])
    writer.close()
    writer.close()
    writer.discard()
    assert len(read_video(tmp_path / "a.mp4")) == 1


# ---- memory and imports

def test_frames_do_not_pile_up(tmp_path):
    def peak(n):
        make(tmp_path / f"{n}.mp4", [textured(1)[0]] * n)
        tracemalloc.start()
        copy(tmp_path / f"{n}.mp4", tmp_path / f"{n}b.mp4")
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(5)  # imports
    frame = 96 * 160 * 3
    assert peak(120) - peak(20) < 3 * frame


def test_memory_of_the_process_does_not_grow_with_the_clip(tmp_path):
    code = ("import resource, sys; from flashvsr_nb.video import VideoReader, write_video; import numpy as np\n"
            "frames = (np.full((192, 320, 3), i % 250, np.uint8) for i in range(int(sys.argv[1])))\n"
            "write_video(sys.argv[2], frames)\n"
            "with VideoReader(sys.argv[2]) as reader: assert sum(1 for f in reader) == int(sys.argv[1])\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    rss = [int(subprocess.run([sys.executable, "-c", code, str(n), str(tmp_path / f"{n}.mp4")], check=True, text=True,
                              capture_output=True).stdout) for n in (80, 480)]
    assert rss[1] < 1.1 * rss[0], rss


def test_import_is_light():
    code = ("import sys, flashvsr_nb.video; "
            "print([m for m in ('av', 'torch', 'matplotlib', 'IPython', 'PIL', 'fastcore') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], check=True, text=True, capture_output=True).stdout == "[]\n"


# ---- pictures in notebooks

def test_show_images_lays_out_a_sheet():
    frames = textured(5, 96, 160)
    sheet = show_images(frames, [f"frame {i}" for i in range(5)], cols=2, width=400, display=False)
    assert sheet.width <= 400 and sheet.mode == "RGB"
    assert show_images(frames[:2], display=False).size == (160 * 2 + 6, 96)
    assert show_images(frames[:1], zoom=2, display=False).size == (320, 192)
    assert np.array_equal(np.asarray(show_images(frames[:1], zoom=2, display=False))[::2, ::2], frames[0])


def test_show_images_takes_all_kinds():
    torch = pytest.importorskip("torch")
    grey = np.linspace(0, 1, 48).reshape(6, 8)
    kinds = [grey, (grey * 255).round().astype(np.uint8), np.repeat(grey[None], 3, 0), np.repeat(grey[..., None], 3, 2),
             torch.tensor(grey)[None], torch.tensor(grey, dtype=torch.float32).expand(3, 6, 8)]
    sheets = [np.asarray(show_images([k], display=False)) for k in kinds]
    assert all(np.array_equal(s, sheets[0]) for s in sheets)
    for wrong in ([], [np.zeros((2, 6, 8))], [np.zeros(5)]):
        with pytest.raises(ValueError, match="images: "):
            show_images(wrong, display=False)


def test_show_images_displays_a_jpeg(monkeypatch):
    display = pytest.importorskip("IPython.display")
    shown = []
    monkeypatch.setattr(display, "display", shown.append)
    assert show_images(textured(2), ["left ×4", "right"]) is None
    assert shown[0].data[:3] == b"\xff\xd8\xff"


def test_plot_style_keeps_figures_within_900_pixels():
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context():
        plot_style()
        assert matplotlib.rcParams["figure.figsize"][0] * matplotlib.rcParams["figure.dpi"] <= 900
