"""Seams that are there are found, those that are not are not, and the controls can fail."""
from pathlib import Path

import numpy as np
import pytest
import torch
from flashvsr_nb.seams import (KINDS, SeamScore, difference_map, overlap_disagreement, overlap_sharpness, seam_lines,
                               seam_profile, seam_score)
from flashvsr_nb.tiling import merge_author, merge_tiles, tile_grid
from flashvsr_nb.video import read_video
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent


def grids(height, width, tile=64, overlap=16):
    return tuple(tile_grid(n, tile, overlap=overlap, snap=16) for n in (height, width))


@pytest.fixture(scope="module")
def natural():
    "Eight frames of a film, twice as large as it is so that the lines have somewhere to go, (8,192,320,3) float."
    x = torch.from_numpy(read_video(ROOT / "data" / "city_lr.mp4", frames=8)).permute(0, 3, 1, 2).float()
    return torch.nn.functional.interpolate(x, scale_factor=2, mode="bicubic").permute(0, 2, 3, 1).numpy()


def lines_of(video):
    rows, cols = grids(*video.shape[1:3])
    return seam_lines(rows), seam_lines(cols)


def stairs(video, cols, size=1.0):
    "Tiles that are lighter by `size` in turn."
    odd = np.cumsum(np.isin(np.arange(video.shape[2]), cols)) % 2
    return video + size * odd[:, None]


def test_lines_lie_at_the_ends_of_overlaps():
    assert seam_lines([slice(0, 30), slice(20, 50), slice(40, 70)]) == [20, 30, 40, 50]
    assert seam_lines([slice(0, 30), slice(30, 60)]) == [30]
    assert seam_lines([slice(0, 9)]) == seam_lines([]) == []


# ---- profiles

def test_a_single_step_is_seen_in_its_place_and_with_its_size():
    x = np.zeros((3, 64, 100))
    x[:, :, 37:] = 5
    for kind in ("step", "tint"):
        profile = seam_profile(x, kind=kind)
        assert np.nanargmax(profile) == 37 and profile[37] == pytest.approx(5)
        assert profile.shape == (101,) and np.isnan(profile[:16]).all() and np.isnan(profile[-16:]).all()
        assert np.array_equal(seam_profile(x.transpose(0, 2, 1), kind=kind, axis=0), profile, equal_nan=True)
    assert np.nanmax(np.abs(seam_profile(x, kind="texture"))) == 0


def test_a_slope_is_no_seam():
    x = np.broadcast_to(3.0 * np.arange(100), (2, 64, 100))
    for kind in ("step", "tint"):
        assert np.nanmax(np.abs(seam_profile(x, kind=kind))) < 1e-3
    assert np.nanmax(np.abs(seam_profile(x, kind="texture"))) < 1e-6


def test_texture_sees_fineness_and_not_brightness():
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (4, 128, 96))
    x[:, :, 48:] *= 3
    profile = seam_profile(x, kind="texture")
    assert abs(np.nanargmax(profile) - 48) <= 2 and 0.7 * np.log(3) < profile[48] < 1.1 * np.log(3)
    assert np.array_equal(np.nanargmax(seam_profile(x + 50 * (np.arange(96) >= 20), kind="texture")), np.nanargmax(profile))


def test_tint_keeps_what_stands_still():
    rng = np.random.default_rng(0)
    edge = np.zeros((40, 64, 100))
    for frame in edge:  # content with a hard edge that wanders
        frame[:, rng.integers(20, 80):] = 40
    edge[:, :, 50:] += 1
    assert np.nanargmax(seam_profile(edge, kind="tint")[45:56]) == 5


@pytest.mark.parametrize("video", [np.zeros((2, 3)), np.zeros((0, 64, 64)), np.zeros((1, 2, 64, 64, 3))])
def test_wrong_videos(video):
    with pytest.raises(ValueError, match="it must be"):
        seam_profile(video)


def test_unknown_kind():
    with pytest.raises(ValueError, match="allowed are step, tint, texture"):
        seam_profile(np.zeros((1, 64, 64)), kind="hue")


# ---- scores

@pytest.mark.parametrize("kind", KINDS)
def test_an_untiled_film_scores_as_chance_does(natural, kind):
    score = seam_score(natural, *lines_of(natural), kind=kind)
    assert abs(score.z) < 3


def test_chance_is_what_it_says():
    "On pure noise z is 0 ± 1."
    z = {kind: [] for kind in KINDS}
    for seed in range(30):
        x = np.random.default_rng(seed).normal(128, 10, (1, 160, 160))
        for kind in KINDS:
            z[kind].append(seam_score(x, *lines_of(x), kind=kind, period=1, seed=seed).z)
    for kind in KINDS:
        assert abs(np.mean(z[kind])) < 0.75 and 0.5 < np.std(z[kind]) < 1.6, kind


def test_one_grey_level_is_found(natural):
    rows, cols = lines_of(natural)
    assert seam_score(stairs(natural, cols), [], cols, kind="tint").z > 6
    assert seam_score(stairs(natural, cols).transpose(0, 2, 1, 3), cols, [], kind="tint").z > 6
    assert abs(seam_score(stairs(natural, [x + 7 for x in cols]), [], cols, kind="tint").z) < 3  # not there, not found


def test_rounding_to_eight_bits_hides_no_level(natural):
    _, cols = lines_of(natural)
    x = np.clip(stairs(natural, cols), 0, 255).round().astype(np.uint8)
    assert seam_score(x, [], cols, kind="tint").z > 5


def test_faded_overlaps_are_texture(natural):
    rows, cols = grids(*natural.shape[1:3])
    inside = np.zeros(natural.shape[2], bool)
    for a, b in zip(cols, cols[1:]):
        inside[b.start:a.stop] = True
    grain = np.random.default_rng(0).normal(0, 8, (2, *natural.shape[:3], 1))
    faded = natural + np.where(inside[:, None], grain.mean(0), grain[0])
    lines = seam_lines(cols)
    assert seam_score(faded, [], lines, kind="texture").z > seam_score(natural + grain[0], [], lines, kind="texture").z + 3
    one = [slice(0, natural.shape[1])]
    ratio = overlap_sharpness(faded, one, cols) / overlap_sharpness(natural + grain[0], one, cols)
    assert 0.65 < ratio < 0.9


def test_a_grid_of_the_network_is_no_seam():
    x = np.random.default_rng(0).normal(128, 1, (2, 192, 320)) + 5 * (np.indices((192, 320)) // 16 % 2).sum(0)
    assert seam_score(x, *lines_of(x), period=1).z > 5
    assert abs(seam_score(x, *lines_of(x), period=16).z) < 3


def test_scores_repeat_and_say_what_they_are(natural):
    a, b = (seam_score(natural, *lines_of(natural)) for _ in range(2))
    assert isinstance(a, SeamScore) and a == b and a.ratio == pytest.approx(a.value / a.usual)


@pytest.mark.parametrize("rows, cols, options, said", [([], [], {}, "there must be a line"), ([3], [], {}, "there must be a line"),
                                                       ([], [64], dict(period=900), "period=900 is too long")])
def test_scores_refuse(rows, cols, options, said):
    with pytest.raises(ValueError, match=said):
        seam_score(np.random.default_rng(0).normal(size=(1, 128, 128)), rows, cols, **options)


# ---- tiles before and after

def test_disagreement_by_hand():
    rows, cols = [slice(0, 4)], [slice(0, 6), slice(4, 10), slice(5, 12)]
    parts = [np.full((2, 4, s.stop - s.start), float(i)) for i, s in enumerate(cols)]
    d = overlap_disagreement(parts, rows, cols)
    assert np.isnan(d[:, [0, 3, 10, 11]]).all()
    assert np.allclose(d[:, 4], 0.5) and np.allclose(d[:, 5], np.std([0, 1, 2])) and np.allclose(d[:, 7], 0.5)
    assert np.nanmax(overlap_disagreement([p * 0 + 3 for p in parts], rows, cols)) == 0


@settings(max_examples=20)
@given(height=st.integers(1, 50), width=st.integers(1, 50), tile=st.integers(2, 30), overlap=st.integers(0, 29))
def test_cut_tiles_agree(height, width, tile, overlap):
    rows, cols = (tile_grid(n, tile, overlap=min(overlap, tile - 1)) for n in (height, width))
    x = np.random.default_rng(0).normal(size=(3, height, width))
    d = overlap_disagreement([x[:, r, c] for r in rows for c in cols], rows, cols)
    assert d.shape == (height, width) and not (d > 1e-9).any()


def test_sharpness_needs_both_kinds_of_places():
    x = np.random.default_rng(0).normal(size=(1, 40, 60))
    for cols in ([slice(0, 60)], [slice(0, 30), slice(30, 60)], [slice(0, 60), slice(0, 60)]):
        with pytest.raises(ValueError, match="there is nothing to compare"):
            overlap_sharpness(x, [slice(0, 40)], cols)
    cols = tile_grid(60, 30, overlap=10)
    assert overlap_sharpness(x, [slice(0, 40)], cols, reference=x) == 1


def test_difference_map():
    a = np.zeros((2, 4, 5, 3), np.uint8)
    b = a.copy()
    b[0, 1, 2] = 10
    d = difference_map(a, b)
    assert d.shape == (4, 5) and d[1, 2] == pytest.approx(10 / 2**0.5, abs=1e-4) and np.count_nonzero(d) == 1
    with pytest.raises(ValueError, match="must be the same"):
        difference_map(a, b[:1])


# ---- the simplest control, on a grid with crossings

@pytest.mark.parametrize("level", [0, 1, 100, 255])
def test_uniform_tiles_come_back_uniform_and_the_published_merge_is_caught(level):
    rows, cols = grids(96, 160)
    grey = [torch.full((1, r.stop - r.start, c.stop - c.start), level / 127.5 - 1) for r in rows for c in cols]
    for blend in ("average", "linear", "hann", "gaussian"):
        assert (((merge_tiles(grey, rows, cols, blend=blend) + 1) * 127.5).round() == level).all()
    published = ((merge_author(grey, rows, cols, ramp=16) + 1) * 127.5).round()
    assert (published != level).sum() == (0 if level == 0 else 2 * (96 + 160) - 4)
