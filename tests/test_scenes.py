"""Scene cuts: found where two clips meet, and nowhere else."""
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from flashvsr_nb.scenes import change, mark_cuts, signature, split_scenes
from flashvsr_nb.video import read_video

DATA = Path(__file__).resolve().parent.parent / "data"
NAMES = "bbb", "city", "dog"


@pytest.fixture(scope="module")
def clips():
    return {name: read_video(DATA / f"{name}_lr.mp4") for name in NAMES}


def cuts(frames, **thresholds):
    return [i for i, (_, cut) in enumerate(mark_cuts(frames, **thresholds)) if cut]


@pytest.mark.parametrize("first, second", [*permutations(NAMES, 2)])
def test_every_cut_is_found(clips, first, second):
    for n in (1, 2, 9, 33):
        assert cuts(np.concatenate([clips[first][:n], clips[second]])) == [n]
    assert cuts(np.concatenate([clips[first], clips[second][:1]])) == [33]  # a last frame of its own
    assert cuts(np.concatenate([clips[first][:12], clips[second][:5], clips[first][:12]])) == [12, 17]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["hr", "lr"])
def test_no_false_alarm_in_a_clip(name, kind):
    frames = read_video(DATA / f"{name}_{kind}.mp4")
    for step in (1, 3, 8, -2):
        assert cuts(frames[::step]) == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.3])
def test_no_false_alarm_on_a_fast_pan(name, share):
    wide = read_video(DATA / f"{name}_hr.mp4", frames=1)[0]
    x = [*range(0, 384, int(256 * share))]
    frames = [wide[:256, i:i + 256] for i in x]
    assert cuts(frames) == cuts(frames[::-1]) == [] and cuts([frames[0]] * 9 + frames + [frames[-1]] * 9) == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gain, lift, length", [
    (2, 40, 3), (3, 60, 3), (5, 150, 1), (1, 80, 1), (1, 255, 1), (1, 255, 5), (0, 0, 1), (0, 0, 5), (1.4, 0, 3), (0.4, 0, 9)])
def test_no_false_alarm_on_a_flash_or_a_black_frame(clips, name, gain, lift, length):
    frames = clips[name].astype(float)
    for at in (1, 12):
        lit = frames.copy()
        lit[at:at + length] = lit[at:at + length] * gain + lift
        assert cuts(lit.clip(0, 255).astype(np.uint8)) == []


def test_a_cut_soon_after_a_flash_is_found(clips):
    lit = clips["city"][:12].copy()
    lit[8] = (lit[8] * 2. + 40).clip(0, 255)
    assert cuts(np.concatenate([lit, clips["dog"][:8]])) == [12]


def test_through_black_and_white(clips):
    blank = np.zeros_like(clips["city"][:3])
    for gap in (blank, blank + 255):
        assert cuts(np.concatenate([gap, clips["bbb"][:8], gap, clips["city"][:8], gap])) == [14]
        assert cuts(np.concatenate([clips["bbb"][:8], gap, clips["bbb"][8:16]])) == []


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (3, 2), (17, 31), (40, 1)])
def test_noise_and_tiny_frames_are_no_scenes(size):
    frames = np.random.default_rng(0).integers(0, 256, (12, *size, 3), dtype=np.uint8)
    assert len(signature(frames[0])[1]) == 64 and cuts(np.repeat(frames[:1], 5, 0)) == []
    assert len(cuts(frames)) <= 2


def test_change_is_a_distance(clips):
    a, b = (signature(clips[name][0]) for name in ("bbb", "dog"))
    assert change(a, a) < 1e-6 and change(a, b) == change(b, a) > 0.35
    assert abs(a[0].mean()) < 1e-5 and abs(a[0].std() - 1) < 1e-4 and abs(a[1].sum() - 1) < 1e-9
    brighter = signature((clips["bbb"][0] * 1.2).clip(0, 255).astype(np.uint8))
    assert change(a, brighter) < 0.05


def test_thresholds_are_used(clips):
    frames = np.concatenate([clips["bbb"][:12], clips["city"][:12]])
    assert cuts(frames, least=0.99) == [] and cuts(frames, rise=1e6) == []


def test_scenes_come_while_reading(clips):
    read = []

    def reading():
        for i, frame in enumerate(np.concatenate([clips["bbb"][:4], clips["city"][:4]])):
            read.append(i)
            yield frame
    given = []
    for number, scene in enumerate(split_scenes(reading())):
        for frame in scene:
            given.append(number)
            assert len(read) <= len(given) + 1  # one ahead
    assert given == [0] * 4 + [1] * 4
    assert [*split_scenes([])] == [] and [len([*s]) for s in split_scenes(clips["dog"][:1])] == [1]
