"""Noise that knows its place, LQ of any size, and clips that come out whole, whatever comes in."""
import itertools
import subprocess
import sys
import warnings
import weakref
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flashvsr_nb import pipeline
from flashvsr_nb.dit import ModelConfig
from flashvsr_nb.memory_planner import open_stream, plan
from flashvsr_nb.pipeline import FlashVSR, Stream, Upscaled, noise_at, peak_memory, pick_device, prepare_lq
from flashvsr_nb.video import VideoReader, VideoWriter, probe, read_video, write_video
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
TINY = dict(dim=128, heads=1, layers=1, ffn_dim=128, text_dim=16, freq_dim=32, proj_dims=(16, 16),
            decoder_channels=(16, 16, 8, 8), residual=True, key_blocks=12., local_range=5, resize="torch",
            color_fix="none")
SEEDS = st.integers(-2**63, 2**63 - 1)


def tiny(**changes):
    torch.manual_seed(0)
    model = FlashVSR(ModelConfig(**TINY | changes)).freeze()
    model.decoder.decoder[-1].weight.mul_(10)  # as loud as a trained one: the latents show
    return model


@pytest.fixture(scope="module")
def model():
    return tiny()


def clip(frames, height=8, width=8, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, channels), dtype=np.uint8)


# ---- noise

@pytest.mark.parametrize("seed", [0, 1, -1, -2**63, 2**63 - 1])
def test_noise_is_standard_normal(seed):
    x = noise_at(range(40, 48), 96, 96, seed=seed).double().flatten()  # 1.2 million values
    assert abs(x.mean()) < 4 / len(x) ** 0.5
    assert abs(x.var() - 1) < 5 * (2 / len(x)) ** 0.5
    assert abs((x**3).mean()) < 5 * (15 / len(x)) ** 0.5
    assert abs((x**4).mean() - 3) < 5 * (96 / len(x)) ** 0.5
    for z, share in ((1, 0.317311), (2, 0.045500), (3, 0.002700)):  # tails
        assert abs((x.abs() > z).double().mean() - share) < 5 * (share / len(x)) ** 0.5


def test_noise_neighbours_are_independent():
    x = noise_at(range(0, 8), 96, 96)[0].double()
    for dim in range(4):
        for step in (1, 2, 5):
            a, b = (x.narrow(dim, start, x.shape[dim] - step).flatten() for start in (0, step))
            for f in (torch.Tensor.abs, torch.Tensor.square, lambda t: t):
                assert abs(torch.corrcoef(torch.stack([f(a), f(b)]))[0, 1]) < 5 / len(a) ** 0.5, (dim, step)
    other = noise_at(range(0, 8), 96, 96, seed=1)[0].double()
    assert abs(torch.corrcoef(torch.stack([x.flatten(), other.flatten()]))[0, 1]) < 5 / x.numel() ** 0.5


def test_noise_has_no_repetitions():
    x = noise_at(range(0, 4), 64, 64)
    assert len(x.unique()) > 0.98 * x.numel()  # float32 leaves a few collisions
    assert not (x[..., 1:] == x[..., :-1]).all(-1).any()


@settings(max_examples=40)
@given(seed=SEEDS, start=st.integers(0, 10**6), frames=st.integers(1, 4), top=st.integers(0, 10**5),
       left=st.integers(0, 10**5), height=st.integers(1, 9), width=st.integers(1, 9), data=st.data())
def test_noise_of_a_part_is_that_part_of_the_noise(seed, start, frames, top, left, height, width, data):
    whole = noise_at(range(start, start + frames), height, width, seed=seed, top=top, left=left)
    f, y, x = (data.draw(st.integers(0, n - 1)) for n in (frames, height, width))
    part = noise_at(range(start + f, start + frames), height - y, width - x, seed=seed, top=top + y, left=left + x)
    assert torch.equal(part, whole[:, :, f:, y:, x:])
    assert torch.equal(noise_at(range(start, start + frames), height, width, seed=seed, top=top, left=left, channels=3),
                       whole[:, :3])


def test_noise_values_never_change():
    # whoever fixes a seed relies on these; computed once, on another machine
    assert noise_at(range(3, 4), 1, 3, seed=7, channels=1, top=5, left=2).flatten().tolist() == pytest.approx(NOISE, abs=1e-6)
    assert noise_at(range(1), 2, 2).dtype == torch.float32


NOISE = [-0.614968, 0.219297, 0.181766]


@pytest.mark.parametrize("seed", [2**63, -2**63 - 1])
def test_noise_refuses_seeds_beyond_64_bits(seed):
    with pytest.raises(ValueError, match="seed="):
        noise_at(range(1), 1, 1, seed=seed)


# ---- LQ

@settings(max_examples=30)
@given(height=st.integers(1, 70), width=st.integers(1, 70), frames=st.integers(1, 2), scale=st.integers(1, 5))
def test_prepare_any_size(height, width, frames, scale):
    x = clip(frames, height, width)
    lq, (rows, cols) = prepare_lq(x, scale=scale)
    assert lq.shape[:3] == (1, 3, frames) and lq.shape[3] % 128 == lq.shape[4] % 128 == 0
    assert lq.shape[3] < height * scale + 128 and lq.shape[4] < width * scale + 128
    inside = lq[0, :, :, rows, cols]
    want = F.interpolate(torch.from_numpy(x).permute(0, 3, 1, 2) / 255, scale_factor=scale, mode="bicubic")
    want = (want.clamp(0, 1) * 255).round() / 127.5 - 1
    assert inside.shape == want.transpose(0, 1).shape and (inside - want.transpose(0, 1)).abs().max() < 1e-6
    grid = (lq + 1) * 127.5
    assert (grid - grid.round()).abs().max() < 1e-4 and lq.abs().max() <= 1
    for dim, part in ((3, rows), (4, cols)):  # mirrored as far as the mirror reaches, then repeated
        before, n = part.start, part.stop - part.start
        line = lq.movedim(dim, 0)
        for k in range(1, before + 1):
            assert torch.equal(line[before - k], line[before + min(k, n - 1)])
        for k in range(1, lq.shape[dim] - part.stop + 1):
            assert torch.equal(line[part.stop - 1 + k], line[part.stop - 1 - min(k, n - 1)])


def test_prepare_pads_as_torch_reflects():
    x = clip(1, 25, 30)
    lq, _ = prepare_lq(x)
    big = F.interpolate(torch.from_numpy(x).permute(0, 3, 1, 2) / 255, scale_factor=4, mode="bicubic")
    want = F.pad((big.clamp(0, 1) * 255).round() / 127.5 - 1, (4, 4, 14, 14), mode="reflect")
    assert (lq[0].transpose(0, 1) - want).abs().max() < 1e-6


@pytest.mark.parametrize("size", [(1, 1), (7, 33), (32, 32)])
def test_prepare_with_pillow_is_pillow(size):
    x = clip(2, *size)
    lq, (rows, cols) = prepare_lq(x, resize="pil")
    got = ((lq[0, :, :, rows, cols] + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
    for frame, sr in zip(x, got):
        want = Image.fromarray(frame).resize((4 * size[1], 4 * size[0]), Image.Resampling.BICUBIC)
        assert np.array_equal(sr, np.asarray(want))
    assert torch.equal(prepare_lq(torch.from_numpy(x) / 255, resize="pil")[0], lq)


def test_prepare_takes_floats_and_tensors():
    x = clip(2, 9, 11)
    want, _ = prepare_lq(x)
    kept = torch.from_numpy(x) / 255
    given = kept.clone()
    for frames in (torch.from_numpy(x), x.astype(np.float32) / 255, x / 255, given):
        assert (prepare_lq(frames)[0] - want).abs().max() < 1e-6
    assert torch.equal(given, kept)  # untouched


@pytest.mark.parametrize("frames, kwargs", [
    (np.zeros((2, 4, 4), np.uint8), {}), (np.zeros((2, 4, 4, 4), np.uint8), {}), (np.zeros((0, 4, 4, 3), np.uint8), {}),
    (np.zeros((1, 4, 4, 3), np.uint8), dict(resize="lanczos")), (np.zeros((1, 4, 4, 3), np.uint8), dict(scale=0)),
    (np.zeros((1, 4, 4, 3), np.uint8), dict(scale=1.5))])
def test_prepare_refuses(frames, kwargs):
    with pytest.raises(ValueError, match="prepare_lq"):
        prepare_lq(frames, **kwargs)


# ---- streams

def push_all(model, lq, **options):
    stream, out = Stream(model, **options), []
    with torch.inference_mode():
        for a, b in [(0, 25)] + [(i, i + 8) for i in range(25, lq.shape[2], 8)]:
            out.append(stream.push(lq[:, :, a:b]))
    return torch.cat(out, 2)


def test_stream_lengths_and_seeds(model):
    lq = torch.rand(1, 3, 41, 128, 128) * 2 - 1
    a = push_all(model, lq, seed=3)
    assert a.shape == (1, 3, 37, 128, 128) and a.dtype == torch.float32 and a.abs().max() <= 1
    assert torch.equal(a, push_all(model, lq, seed=3))
    assert not torch.equal(a, push_all(model, lq, seed=4))


def test_stream_takes_noise(model):
    lq = torch.rand(1, 3, 41, 128, 128) * 2 - 1
    noise = noise_at(range(10), 16, 16, seed=3)
    assert torch.equal(push_all(model, lq, noise=noise), push_all(model, lq, seed=3))
    for shape in ((1, 16, 9, 16, 16), (1, 8, 10, 16, 16), (1, 16, 10, 16, 8), (16, 10, 16, 16)):
        with pytest.raises(ValueError, match="noise: shape"):
            push_all(model, lq, noise=torch.zeros(shape))


def test_stream_does_not_see_beyond_four_frames(model):
    lq = torch.rand(1, 3, 41, 128, 128) * 2 - 1
    other = torch.cat([lq[:, :, :33], torch.rand(1, 3, 8, 128, 128)], 2)
    a, b = (push_all(model, x) for x in (lq, other))
    assert torch.equal(a[:, :, :29], b[:, :, :29]) and not torch.equal(a[:, :, 29:], b[:, :, 29:])


def test_stream_of_two_videos_at_once(model):
    lq = torch.rand(2, 3, 33, 128, 128) * 2 - 1
    both, single = push_all(model, lq), torch.cat([push_all(model, v[None]) for v in lq])
    assert (both - single).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(1, 3, 24, 128, 128), (1, 3, 25, 100, 128), (1, 1, 25, 128, 128), (3, 25, 128, 128)])
def test_stream_refuses(model, shape):
    with pytest.raises(ValueError, match="chunk 0 must be"):
        Stream(model).push(torch.zeros(shape))


def test_decoding_in_parts_changes_nothing(model):
    latents, lq = torch.randn(1, 16, 6, 16, 16), torch.rand(1, 3, 21, 128, 128)
    with torch.inference_mode():
        whole, _ = model.decoder(latents, lq, None)
        assert (Stream(model).decode(latents, lq) - (2 * whole - 1)).abs().max() < 1e-5


def test_stream_trains():
    net = FlashVSR(ModelConfig(**TINY))
    Stream(net).push(torch.rand(1, 3, 25, 128, 128)).square().mean().backward()
    assert all(p.grad is not None for p in net.projector.parameters()) and net.dit.patch_embedding.weight.grad is not None


# ---- arrays and iterators

@pytest.mark.parametrize("frames", [1, 4, 20, 21, 22, 25, 28, 29, 30])
def test_every_number_of_frames(model, frames):
    x = clip(frames)
    y = model.upscale(x, progress=False)
    assert y.shape == (frames, 32, 32, 3) and y.dtype == np.uint8
    assert np.array_equal(y, np.stack(list(model.upscale(iter(x), progress=False))))
    full = model.upscale(clip(30), progress=False)
    seen = 21 + (frames - 25) // 8 * 8 if frames >= 25 else 0  # frames of chunks that read no repeated one
    assert np.array_equal(y[:seen], full[:seen])


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(height=st.integers(1, 40), width=st.integers(1, 40))
def test_every_size(model, height, width):
    y = model.upscale(clip(2, height, width), progress=False)
    assert y.shape == (2, 4 * height, 4 * width, 3)


def test_an_untrained_residual_decoder_gives_bicubic():
    net = tiny()
    for p in net.decoder.decoder[-1].parameters():
        p.data.zero_()
    x = clip(23, 9, 13)
    want = F.interpolate(torch.from_numpy(x).permute(0, 3, 1, 2) / 255, scale_factor=4, mode="bicubic").clamp(0, 1)
    got = net.upscale(x, progress=False)  # every frame in its place, nothing shifted or lost
    assert np.array_equal(got, (want * 255).round().byte().permute(0, 2, 3, 1).numpy())


def test_one_picture(model):
    x = clip(1, 6, 7)[0]
    y = model.upscale(x, progress=False)
    assert y.shape == (24, 28, 3) and np.array_equal(y, model.upscale(x[None], progress=False)[0])


def test_grey_becomes_rgb(model):
    grey = clip(3, 6, 7, 1)
    want = model.upscale(np.repeat(grey, 3, 3), progress=False)
    for x in (grey, grey[..., 0]):
        assert np.array_equal(model.upscale(x, progress=False), want)
    assert np.array_equal(model.upscale(grey[0, ..., 0], progress=False), model.upscale(grey[0], progress=False))


def test_alpha_is_dropped_with_one_notice(model):
    x = clip(30, 4, 4, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = model.upscale(x, progress=False)
    assert [str(w.message) for w in caught] == ["input: transparency is dropped"]
    assert np.array_equal(y, model.upscale(x[..., :3], progress=False))


@pytest.mark.parametrize("frames, said", [
    ([], "no frames"), (np.zeros((0, 4, 4, 3), np.uint8), "no frames"), (np.zeros((2, 4, 4, 3)), "float64"),
    (np.zeros((2, 4, 4, 2), np.uint8), r"\(4, 4, 2\)"), (np.zeros((2, 0, 4, 3), np.uint8), r"\(0, 4, 3\)"),
    ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)], "frame 1 is 5x4, the first 4x4"),
    (np.zeros((1, 2, 4, 4, 3), np.uint8), "allowed is uint8")])
def test_refused_input(model, frames, said):
    with pytest.raises(ValueError, match=said):
        list(model.upscale(frames, progress=False))


def test_upscale_refuses_wrong_seed_and_input_at_once(model):
    with pytest.raises(ValueError, match="seed="):
        model.upscale(iter([]), seed=2**64)
    with pytest.raises(FileNotFoundError, match="nowhere.mp4: no such file"):
        model.upscale("nowhere.mp4")


def test_seed_and_noise(model):
    x = clip(22)
    a, b = (model.upscale(x, seed=s, progress=False) for s in (0, 1))
    assert not np.array_equal(a, b)
    assert np.array_equal(b, model.upscale(x, noise=noise_at(range(8), 16, 16, seed=1), progress=False))


def test_frames_come_while_reading(model):
    alive, most = [], []

    def read():
        for x in clip(80):
            frame = x.copy()
            alive.append(weakref.ref(frame))
            most.append(sum(ref() is not None for ref in alive))
            yield frame

    for n, _ in enumerate(model.upscale(read(), progress=False), 1):
        assert len(most) <= n + 25  # never reads further ahead than the first chunk does
    assert n == 80 and max(most) <= 26 and max(most[40:]) <= 10


def test_gradients_stay_on_for_the_reader(model):
    frames = model.upscale(iter(clip(2)), progress=False)
    next(frames)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_progress(model, capsys):
    calls = []
    model.upscale(clip(22), progress=lambda *call: calls.append(call))
    assert calls == [(n, 22) for n in range(1, 23)]
    list(model.upscale(iter(clip(2)), progress=lambda *call: calls.append(call)))
    assert calls[-1] == (2, None) and capsys.readouterr() == ("", "")
    model.upscale(clip(2))
    err = capsys.readouterr().err
    assert "2/2" in err and "frames/s" in err and "memory" in err and "<" in err  # < precedes the time left


# ---- scenes

def joined(first, second, cut, after, size=24):
    "The middle of two clips of data/, one after the other, (cut+after,size,size,3)."
    parts = [read_video(DATA / f"{name}_lr.mp4", frames=n) for name, n in ((first, cut), (second, after))]
    return np.concatenate(parts)[:, 36:36 + size, 68:68 + size]


@pytest.mark.parametrize("cut, after", [(21, 23), (23, 22), (5, 9), (29, 1)])
def test_frames_after_a_cut_equal_a_fresh_start(model, monkeypatch, cut, after):
    x, pushed, push = joined("bbb", "city", cut, after), [], Stream.push
    monkeypatch.setattr(Stream, "push", lambda self, lq: pushed.append(push(self, lq).clone()) or pushed[-1])
    whole = model.upscale(x, seed=3, progress=False)
    kept, pushed[:] = [*pushed], []
    assert np.array_equal(whole[cut:], model.upscale(x[cut:], seed=3, progress=False))
    fresh = torch.cat(pushed, 2)
    assert (torch.cat(kept[-len(pushed):], 2) - fresh).abs().max() < 1e-4  # in float32, before it is rounded
    pushed.clear()
    assert np.array_equal(whole[:cut], model.upscale(x[:cut], seed=3, progress=False))  # what precedes it ends there


def test_without_scenes_the_past_shows(model):
    x = joined("bbb", "city", 23, 9)
    off = model.upscale(x, scene_cut="off", progress=False)
    assert off.shape == (32, 96, 96, 3)
    assert not np.array_equal(off[23:], model.upscale(x[23:], progress=False))
    assert np.array_equal(off, np.stack(list(model.upscale(iter(x), scene_cut="off", progress=False))))
    calm = x[:23]
    assert np.array_equal(model.upscale(calm, progress=False), model.upscale(calm, scene_cut="off", progress=False))


def test_given_noise_starts_with_each_scene(model):
    x = joined("dog", "city", 7, 5)
    assert np.array_equal(model.upscale(x, noise=noise_at(range(6), 16, 16, seed=5), progress=False),
                          model.upscale(x, seed=5, progress=False))


def test_upscale_refuses_unknown_scene_cut(model):
    with pytest.raises(ValueError, match="scene_cut='on'; allowed are 'auto' and 'off'"):
        model.upscale(clip(1), scene_cut="on")


# ---- files

def small_video(path, frames=23, **options):
    write_video(path, clip(frames, 12, 16), **options)
    return path


def test_file_keeps_rate_sound_and_tags(model, tmp_path):
    source = probe(DATA / "bbb_lr.mp4")
    given = small_video(tmp_path / "in.mp4", like=source, audio_from=source.path)
    done = model.upscale(given, tmp_path / "out.mp4", progress=False)
    a, b = probe(given), probe(tmp_path / "out.mp4")
    assert isinstance(done, Upscaled)
    assert (done.path, done.frames, done.width, done.height) == (tmp_path / "out.mp4", 23, 64, 48)
    assert done.seconds > 0 and done.memory > 1e7
    assert (b.width, b.height, b.frames) == (64, 48, 23) and len(read_video(tmp_path / "out.mp4")) == 23
    for name in ("fps", "matrix", "range", "primaries", "transfer", "audio"):
        assert getattr(a, name) == getattr(b, name), name


def test_variable_rate_is_kept(model, tmp_path):
    stamps = [0, 1, 2, 7, 8, 9, 20, *range(21, 40)]
    like = probe(DATA / "city_lr.mp4")
    with VideoWriter(tmp_path / "in.mkv", 8, 8, like=like) as writer:
        for frame, t in zip(clip(26), stamps):
            writer.write(frame, round(t / like.fps / like.time_base))
    model.upscale(tmp_path / "in.mkv", tmp_path / "out.mkv", progress=False)

    def times(path):
        with VideoReader(path) as reader:
            return [reader.pts * reader.info.time_base for _ in reader]
    assert times(tmp_path / "out.mkv") == times(tmp_path / "in.mkv")
    assert len({*np.diff(times(tmp_path / "in.mkv"))}) > 1


def test_folder_in_folder_out(model, tmp_path):
    x = clip(5, 5, 6)
    write_video(tmp_path / "in", x)
    model.upscale(tmp_path / "in", tmp_path / "out", progress=False)
    assert np.array_equal(read_video(tmp_path / "out"), model.upscale(x, progress=False))
    assert np.array_equal(np.stack(list(model.upscale(tmp_path / "in", progress=False))), read_video(tmp_path / "out"))


def test_image_in_image_out(model, tmp_path):
    Image.fromarray(clip(1, 5, 6)[0]).save(tmp_path / "in.png")
    model.upscale(tmp_path / "in.png", tmp_path / "out.png", progress=False)
    assert Image.open(tmp_path / "out.png").size == (24, 20)
    with pytest.raises(ValueError, match="a .png holds one frame, the input has 2"):
        model.upscale(clip(2), tmp_path / "two.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.png", "out.png"]


def test_iterator_into_file(model, tmp_path):
    done = model.upscale(iter(clip(3)), tmp_path / "out.mp4", fps=10, progress=False)
    info = probe(done.path)
    assert (info.frames, info.fps, info.width) == (3, 10, 32)


def test_rate_can_be_given(model, tmp_path):
    small_video(tmp_path / "in.mp4", 4, fps=30)
    model.upscale(tmp_path / "in.mp4", tmp_path / "out.mp4", fps=10, progress=False)
    assert (probe(tmp_path / "out.mp4").fps, probe(tmp_path / "out.mp4").frames) == (10, 4)


def test_existing_output_is_safe(model, tmp_path):
    given, out = small_video(tmp_path / "in.mp4", 2), tmp_path / "out.mp4"
    out.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="overwrite"):
        model.upscale(given, out)
    with pytest.raises(ValueError, match="same"):
        model.upscale(given, given, overwrite=True)

    def fail(done, total):
        raise OSError("disk full")
    with pytest.raises(OSError, match="disk full") as caught:
        model.upscale(given, out, overwrite=True, progress=fail)
    assert out.read_bytes() == b"precious" and caught.value.__notes__ == ["nothing was written"]
    model.upscale(given, out, overwrite=True, progress=False)
    assert len(read_video(out)) == 2 and sorted(p.name for p in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]


@pytest.mark.parametrize("name", ["out.mp4", "out.mkv", "out"])
def test_ctrl_c_keeps_what_was_done(model, tmp_path, name):
    def stop(done, total):
        if done == 24:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt) as caught:
        model.upscale(clip(40), tmp_path / name, progress=stop)
    assert caught.value.__notes__ == [f"the first 24 frames are in {tmp_path / name}"]
    assert len(read_video(tmp_path / name)) == 24 and len([*tmp_path.iterdir()]) == 1


def test_ctrl_c_before_the_first_frame_leaves_nothing(model, tmp_path):
    def frames():
        yield from clip(3)
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt) as caught:
        model.upscale(frames(), tmp_path / "out.mp4", progress=False)
    assert caught.value.__notes__ == ["nothing was written"] and not [*tmp_path.iterdir()]


def test_ctrl_c_while_the_file_is_closed_leaves_nothing(model, tmp_path, monkeypatch):
    def stop(done, total):
        if done == 22:
            raise KeyboardInterrupt

    def again(self, whole):
        raise KeyboardInterrupt
    monkeypatch.setattr("flashvsr_nb.video._Encoder.finish", again)
    for progress in (stop, False):  # for the second time; after the last frame
        with pytest.raises(KeyboardInterrupt) as caught:
            model.upscale(clip(25), tmp_path / "out.mp4", progress=progress)
        assert caught.value.__notes__ == ["nothing was written"] and not [*tmp_path.iterdir()]


def test_the_bar_is_closed_before_the_error_is_told(model, tmp_path, monkeypatch, capsys):
    def full(self, frame, pts):
        raise OSError("disk full")
    monkeypatch.setattr("flashvsr_nb.video._Encoder.write", full)
    with pytest.raises(OSError, match="disk full"):
        model.upscale(clip(2), tmp_path / "out.mp4")
    assert capsys.readouterr().err.endswith("\n")


def test_a_reader_is_an_iterator_like_any_other(model, tmp_path):
    small_video(tmp_path / "in.mp4", 4, fps=30)
    done = model.upscale(VideoReader(tmp_path / "in.mp4", start=1), tmp_path / "out.mp4", fps=10, progress=False)
    assert (done.frames, probe(done.path).fps) == (3, 10)
    done = model.upscale(VideoReader(tmp_path / "in.mp4", start=1), tmp_path / "25.mp4", progress=False)
    assert (done.frames, probe(done.path).fps, probe(done.path).duration) == (3, 25, Fraction(3, 25))


def test_broken_off_input_gives_its_frames(model, tmp_path):
    whole = small_video(tmp_path / "in.mkv", 30).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[:len(whole) * 7 // 10])
    with pytest.warns(RuntimeWarning, match="damaged or breaks off"):
        done = model.upscale(tmp_path / "cut.mkv", tmp_path / "out.mkv", progress=False)
    assert 0 < done.frames < 30 and len(read_video(tmp_path / "out.mkv")) == done.frames


# ---- other sizes, and parts

@pytest.mark.parametrize("scale, size", [(1, (9, 13)), (1.5, (14, 20)), (2, (18, 26)), (3.3, (30, 43))])
def test_other_scales_are_resampled(model, scale, size):
    x = clip(23, 9, 13)
    y = model.upscale(x, scale=scale, progress=False)
    assert y.shape == (23, *size, 3)
    big = torch.from_numpy(model.upscale(x, progress=False)).permute(0, 3, 1, 2).float()
    want = F.interpolate(big, size, mode="bicubic", antialias=True).clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(y - want).max() < 1.5  # 8 bits only at the end


@pytest.mark.parametrize("scale", [0.9, 4.01, float("nan"), -2])
def test_refused_scales(model, scale):
    with pytest.raises(ValueError, match="must be between 1 and 4"):
        model.upscale(clip(1), scale=scale)


def test_video_has_even_sides_and_one_notice(model, tmp_path):
    x = clip(23, 9, 13)
    with pytest.warns(UserWarning, match="13x9 becomes 14x10, video needs even sides") as said:
        done = model.upscale(x, tmp_path / "a.mp4", scale=1, progress=False)
    assert len(said) == 1 and (done.width, done.height) == (14, 10)
    assert (probe(done.path).width, probe(done.path).height, probe(done.path).pixel_format) == (14, 10, "yuv420p")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = model.upscale(x, tmp_path / "a", scale=1, progress=False)
    assert read_video(done.path).shape == (23, 9, 13, 3)


@pytest.mark.parametrize("start, frames, part", [(0, 5, slice(0, 5)), (3, None, slice(3, None)), (3, 4, slice(3, 7)),
                                                 (20, 99, slice(20, None))])
def test_a_part_is_upscaled_as_if_it_were_all(model, tmp_path, start, frames, part):
    given, calls = small_video(tmp_path / "in.mkv", 23), []
    x = read_video(given)
    want = model.upscale(x[part], progress=False)
    assert np.array_equal(model.upscale(x, start=start, frames=frames, progress=False), want)
    some = model.upscale(iter(x), start=start, frames=frames, progress=False)
    assert np.array_equal(np.stack(list(some)), want)
    done = model.upscale(given, tmp_path / "out", start=start, frames=frames, progress=lambda *c: calls.append(c))
    assert np.array_equal(read_video(done.path), want)
    assert calls[-1][0] == len(want)


def test_a_part_keeps_time_and_what_sound_belongs_to_it(model, tmp_path):
    source = probe(DATA / "bbb_lr.mp4")
    given = small_video(tmp_path / "in.mp4", like=source, audio_from=source.path)
    done = model.upscale(given, tmp_path / "begin.mp4", frames=6, progress=False)
    info = probe(done.path)
    assert (info.frames, info.fps, info.audio, info.duration) == (6, 24, 1, Fraction(1, 4))
    assert sound_ends(done.path) < 0.4 < sound_ends(given)
    done = model.upscale(given, tmp_path / "later.mp4", start=12, frames=6, progress=False)
    with VideoReader(done.path) as reader:
        next(reader)
        assert reader.pts == 0 and reader.info.audio == 1 and reader.info.duration == Fraction(1, 4)
    assert 0.2 < sound_ends(done.path) < 0.3
    kept, whole = packets(done.path), packets(given)
    first = [data for _, data in whole].index(kept[0][1])
    assert [data for _, data in kept] == [data for _, data in whole[first:first + len(kept)]]  # the very packets,
    assert abs(whole[first][0] - kept[0][0] - 0.5) < 0.002 and kept[0][0] < 0.025  # half a second earlier
    assert not [*tmp_path.glob("*.nut")]


def test_a_part_of_a_file_whose_clock_does_not_start_at_0(model, tmp_path):
    source = probe(DATA / "bbb_lr.mp4")
    small_video(tmp_path / "in.mp4", like=source, audio_from=source.path)
    import av
    with av.open(str(tmp_path / "in.mp4")) as given, av.open(str(tmp_path / "late.ts"), "w") as late:
        streams = {s: late.add_stream_from_template(s) for s in given.streams}
        for packet in given.demux():
            if packet.dts is not None:
                by = round(100 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts + by, packet.dts + by, streams[packet.stream]
                late.mux(packet)
    assert probe(tmp_path / "late.ts").start > 90
    done = model.upscale(tmp_path / "late.ts", tmp_path / "out.mp4", start=12, frames=6, progress=False)
    info = probe(done.path)
    assert (info.frames, info.audio) == (6, 1) and info.start == 0 and abs(info.duration - Fraction(1, 4)) < Fraction(1, 50)
    assert 0.2 < sound_ends(done.path) < 0.3


def packets(path):
    import av
    with av.open(str(path)) as file:
        return [(float(p.pts * p.time_base), bytes(p)) for p in file.demux(audio=0) if p.size]


def sound_ends(path):
    import av
    with av.open(str(path)) as file:
        return max(float((p.pts + p.duration) * p.time_base) for p in file.demux(audio=0) if p.pts is not None)


@pytest.mark.parametrize("part", [dict(start=-1), dict(frames=0), dict(start=5), dict(start=99, frames=2)])
def test_parts_that_are_none(model, tmp_path, part):
    given = small_video(tmp_path / "in.mp4", 5)
    for x in (given, read_video(given), iter(read_video(given))):
        with pytest.raises(ValueError, match="start="):
            model.upscale(x, progress=False, **part)


# ---- models

def test_nano_is_ready_to_run():
    net = FlashVSR.from_pretrained("nano", device="cpu")
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert next(net.parameters()).dtype == torch.float32 and not hasattr(net.dit, "text_embedding")
    assert net.decoder.decoder[1].weight.is_contiguous(memory_format=torch.channels_last)
    lr, hr = read_video(DATA / "city_lr.mp4", frames=1), read_video(DATA / "city_hr.mp4", frames=1)
    lr, hr = lr[:, 32:64, 32:64], hr[:, 128:256, 128:256]
    bicubic = prepare_lq(lr)[0][0].permute(1, 2, 3, 0).numpy() * 127.5 + 127.5
    error = [np.square(x - hr.astype(float)).mean() for x in (net.upscale(lr, progress=False), bicubic)]
    assert error[0] < error[1]


def test_frozen_models_move_whole(model):
    net = tiny().to(torch.float64)
    assert {net.cond.t.dtype, net.cond.t6.dtype, net.cond.prompt[0][1].dtype} == {torch.float64}
    a, b = net.upscale(clip(2), progress=False), model.upscale(clip(2), progress=False)
    assert np.abs(a.astype(int) - b).max() <= 1
    assert net.freeze() is net  # twice does no harm


def test_freezing_keeps_the_result():
    torch.manual_seed(0)
    net = FlashVSR(ModelConfig(**TINY))
    lq = torch.rand(1, 3, 25, 128, 128)
    with torch.no_grad():
        a = Stream(net).push(lq)
        assert torch.allclose(a, Stream(net.freeze()).push(lq), atol=1e-5)


@pytest.mark.parametrize("config", [dict(resize="pil", color_fix="adain", residual=False), dict(color_fix="wavelet"),
                                    dict(projector="buffer"), dict(pyramid=True)])
def test_other_configs_run(config):
    y = tiny(**config).upscale(clip(3, 5, 9), progress=False)
    assert y.shape == (3, 20, 36, 3)


def test_bfloat16_stays_close(model):
    x = np.stack([np.asarray(Image.fromarray(f).resize((20, 20))) for f in read_video(DATA / "city_lr.mp4", frames=3)])
    a, b = model.upscale(x, progress=False), tiny().to(torch.bfloat16).upscale(x, progress=False)
    assert np.abs(a.astype(int) - b).mean() < 2


@pytest.mark.parametrize("name, said", [("tpu", "allowed are auto"), ("cuda:x", "allowed are auto"), ("", "allowed"),
                                        ("cuda:99", "use cpu"), (None, "allowed")])
def test_unknown_devices(name, said):
    with pytest.raises(ValueError, match=said):
        pick_device(name)
    assert pick_device("cpu") == pick_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("arguments, said", [
    (dict(attention="magic"), "attention='magic' cannot be used: there is no such back end; on cpu choose from auto"),
    (dict(attention="flex"), "attention='flex' cannot be used: needs CUDA"), (dict(name="micro"), "allowed are 'nano'"),
    (dict(version="v1"), "version='v1'")])
def test_from_pretrained_refuses(arguments, said):
    with pytest.raises(ValueError, match=said):
        FlashVSR.from_pretrained(device="cpu", **arguments)


def test_attention_is_used(monkeypatch):
    import flashvsr_nb.attention as attention
    used = []
    fn = attention.backends["reference"].fn
    spy = attention.Backend(lambda *a, **k: used.append(1) or fn(*a, **k), "spy")
    monkeypatch.setitem(attention.backends, "reference", spy)
    net = FlashVSR.from_pretrained("nano", device="cpu", attention="reference")
    net.upscale(clip(1, 4, 4), progress=False)
    assert len(used) == 3 * net.cfg.layers  # the three slabs of the first chunk, one after another


def test_peak_memory_grows():
    before = peak_memory(torch.device("cpu"))
    kept = np.ones(before // 4 + 2**25)  # bytes: more than all so far
    after = peak_memory(torch.device("cpu"))
    assert after > before and kept.nbytes > 0
    code = "import torch; from flashvsr_nb.pipeline import peak_memory; print(peak_memory(torch.device('cpu')))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert 10**7 < int(child.stdout) < after  # its own, not that of the process which started it


@pytest.mark.cuda
def test_cuda_agrees_with_cpu():
    x = read_video(DATA / "city_lr.mp4", frames=24)[:, :64, :64]
    cpu = FlashVSR.from_pretrained("nano", device="cpu").upscale(x, progress=False).astype(float)
    net = FlashVSR.from_pretrained("nano", device="cuda")
    assert next(net.parameters()).dtype == torch.bfloat16
    assert np.sqrt(np.square(net.upscale(x, progress=False) - cpu).mean()) < 2
    exact = FlashVSR.from_pretrained("nano", device="cuda", dtype=torch.float32).upscale(x, progress=False)
    assert np.sqrt(np.square(exact - cpu).mean()) < 0.5


# ---- memory does not grow with length

RUN = """
import sys, numpy as np, torch
torch.set_num_threads(1)
from flashvsr_nb.pipeline import FlashVSR, peak_memory
from flashvsr_nb.dit import ModelConfig
frames, size, config = int(sys.argv[1]), int(sys.argv[2]), eval(sys.argv[3])
model = FlashVSR(ModelConfig(**config)).freeze() if config else FlashVSR.from_pretrained("nano", device="cpu")
rng = np.random.default_rng(0)
model.upscale((rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(frames)), sys.argv[4], progress=False)
print(peak_memory(torch.device("cpu")))
"""


def peak(frames, size, config, folder):
    command = [sys.executable, "-c", RUN, str(frames), str(size), repr(config), f"{folder}/{frames}.mp4"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return int(done.stdout) / 2**20


def test_peak_memory_is_flat(tmp_path):
    short, long = (peak(n, 32, TINY, tmp_path) for n in (40, 400))
    assert long < 1.1 * short, f"{short:.0f} MiB for 40 frames, {long:.0f} MiB for 400"


@pytest.mark.slow
def test_peak_memory_is_flat_with_nano(tmp_path):
    short, long = (peak(n, 96, None, tmp_path) for n in (40, 400))
    assert long < 1.1 * short, f"{short:.0f} MiB for 40 frames, {long:.0f} MiB for 400"


def test_a_planned_stream_gives_the_same_frames(model):
    "With room for everything; what saves memory is tested where it is made."
    frames = np.random.default_rng(0).integers(0, 256, (22, 40, 32, 3), dtype=np.uint8)
    plain, planned = (model.upscale(frames, progress=False, vram=vram) for vram in (None, 4))
    assert np.abs(plain.astype(int) - planned).max() <= 1


OFFICIAL = plan(540, 960, 80)  # its plans need amounts that differ


@pytest.fixture(scope="module")
def two_scenes():
    noise = torch.randn(1, 16, 12, 32, 32, generator=torch.Generator().manual_seed(0))
    frames, options = np.concatenate([clip(23, 40, 40), 255 - clip(4, 40, 40) // 8]), dict(progress=False, noise=noise, scale=3)
    return frames, options, tiny().upscale(frames, **options)


@pytest.mark.parametrize("way", [p for p in OFFICIAL.others if not p.tile or p.tile == 128], ids=lambda p: p.name)
def test_every_plan_runs(two_scenes, monkeypatch, way):
    "Scenes, an end within a chunk, another size: what needs no INT8 and no tiles gives what a plain stream gives."
    frames, options, plain = two_scenes
    way = replace(way, tile=way.tile and 32, overlap=8, decoder_tile=(9, 32), fits=True)
    monkeypatch.setattr(pipeline, "plan", lambda *_, **__: way)
    planned = tiny().upscale(frames, vram=8, **options)
    assert planned.shape == plain.shape == (27, 120, 120, 3)
    off = np.abs(planned.astype(int) - plain)
    assert off.max() <= 1 if way.exact else 0 < off.mean() < 5


def test_a_scene_begins_as_the_one_before_ended(model, monkeypatch):
    frames = np.concatenate([clip(22, 40, 40), 255 - clip(22, 40, 40) // 8])
    plain, calls, opened = model.upscale(frames, progress=False), itertools.count(), []
    def fail(*_):
        if next(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory (a test's)")
    def kept(plan, *args, **options):
        opened.append(plan.kind)
        return open_stream(plan, *args, **options)
    monkeypatch.setattr(pipeline, "plan", lambda *_, **__: OFFICIAL)
    monkeypatch.setattr(pipeline, "open_stream", kept)
    hook = model.dit.blocks[0].ffn.register_forward_pre_hook(fail)
    try:
        with pytest.warns(UserWarning, match="out of memory with 'all resident'; going on with 'KV off-loaded"):
            planned = model.upscale(frames, progress=False, vram=80)
    finally:
        hook.remove()
    model.decoder.tile = model.decoder.store = None
    assert opened == ["resident", "offload"] and np.abs(plain.astype(int) - planned).max() <= 1


def test_plans_that_cannot_be(model):
    frames = np.zeros((21, 40, 32, 3), np.uint8)
    with pytest.raises(ValueError, match="give one of them"):
        model.upscale(frames, vram=4, tile=32, overlap=8)
    with pytest.raises(ValueError, match="above 1.5"):
        model.upscale(frames, vram=1)
