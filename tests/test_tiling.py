"""Tiles that cover, weights that sum to one, and streams in tiles that differ from the untiled one by context alone."""
from itertools import product

import numpy as np
import pytest
import torch
from flashvsr_nb.dit import ModelConfig
from flashvsr_nb.kv_cache import ConcatCache, chunk
from flashvsr_nb.lean_stream import to_levels
from flashvsr_nb.pipeline import FlashVSR
from flashvsr_nb.small_caches import OffloadedCache
from flashvsr_nb.streaming import Stream, noise_at, prepare_lq
from flashvsr_nb.tiling import (BLENDS, SHARED, LeanTiles, SeparateTiles, TiledStream, in_clips, make_stream, merge_author,
                                merge_tiles, tile_grid, tile_weights)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

TINY = dict(dim=128, heads=1, layers=1, ffn_dim=128, text_dim=16, freq_dim=32, proj_dims=(16, 16),
            decoder_channels=(16, 16, 8, 8), residual=True, key_blocks=12., local_range=5, resize="torch",
            color_fix="adain")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = FlashVSR(ModelConfig(**TINY)).freeze()
    net.decoder.decoder[-1].weight.mul_(30)  # the latents show
    return net


@pytest.fixture(autouse=True)
def quick(one_thread):
    with torch.inference_mode():
        yield


def clip(frames=25, height=32, width=64):
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def chunks(stream, frames):
    return torch.cat([stream.enlarge(frames[at.start:at.stop]) for at in (chunk(0).lq, chunk(1).lq)])


def spans(size, tile, overlap, **options):
    return tile_grid(size, tile, overlap=overlap, **options)


# ---- where tiles lie

@given(size=st.integers(1, 700), tile=st.integers(1, 300), overlap=st.integers(0, 299), snap=st.integers(1, 40),
       spread=st.booleans())
def test_tiles_cover_overlap_and_are_few(size, tile, overlap, snap, spread):
    tile = -(-tile // snap) * snap
    shared = -(-overlap // snap) * snap
    assume(shared < tile)
    grid = spans(size, tile, overlap, snap=snap, spread=spread)
    assert grid[0].start == 0 and grid[-1].stop == size
    assert all(s.start % snap == 0 and 0 < s.stop - s.start <= tile for s in grid)
    assert all(a.start < b.start and a.stop - b.start >= shared for a, b in zip(grid, grid[1:]))
    assert all(s.stop - s.start == min(tile, size) for s in grid[:-1])
    n = len(grid)  # one tile less could not reach: n-1 tiles with that overlap cover less than the axis
    assert n == 1 or (n - 1) * tile - (n - 2) * shared < size
    if spread and snap == 1:
        steps = {b.start - a.start for a, b in zip(grid, grid[1:])}
        assert not steps or max(steps) - min(steps) <= 1


def test_grid_examples():
    starts = lambda *a, **k: [s.start for s in spans(*a, **k)]
    assert starts(448, 192, 24, spread=False) == [0, 168, 256]
    assert starts(448, 192, 24) == starts(448, 192, 24, snap=32) == [0, 128, 256]
    assert starts(100, 25, 0) == [0, 25, 50, 75]
    assert spans(100, 100, 24) == spans(100, 5000, 24) == [slice(0, 100)]


@pytest.mark.parametrize("arguments", [(0, 8, 0), (8, 0, 0), (100, 8, -1), (100, 8, 8), (5, 8, 9)])
def test_grid_refuses(arguments):
    with pytest.raises(ValueError, match="tile_grid: "):
        spans(*arguments)
    with pytest.raises(ValueError, match="rounded up to a multiple of 32"):
        spans(1000, 32, 24, snap=32)
    with pytest.raises(ValueError, match="tile a multiple of snap"):
        spans(1000, 33, 0, snap=32)


# ---- how they are blended

GRIDS = dict(size=st.integers(1, 200), tile=st.integers(1, 90), share=st.floats(0, 0.99), spread=st.booleans())


@given(blend=st.sampled_from(BLENDS), **GRIDS)
def test_weights_sum_to_one_and_never_fade_at_the_border(size, tile, share, spread, blend):
    grid = spans(size, tile, int(tile * share), spread=spread)
    total, weights = np.zeros(size), [w.numpy() for w in tile_weights(grid, blend=blend)]
    for s, w in zip(grid, weights):
        assert w.shape == (s.stop - s.start,) and (w > 0).all()
        total[s] += w
    assert np.abs(total - 1).max() < 1e-14
    alone = np.zeros(size, int)
    for s in grid:
        alone[s] += 1
    for s, w in zip(grid, weights):
        assert (w[alone[s] == 1] == 1).all()  # the border of the picture among them


@settings(max_examples=40)
@given(blend=st.sampled_from(BLENDS), height=st.integers(1, 60), width=st.integers(1, 60), tile=st.integers(1, 30),
       share=st.floats(0, 0.99), level=st.integers(0, 255))
def test_uniform_grey_tiles_stay_uniform(blend, height, width, tile, share, level):
    rows, cols = (spans(n, tile, int(tile * share)) for n in (height, width))
    grey = level / 127.5 - 1
    parts = (torch.full((2, r.stop - r.start, c.stop - c.start), grey) for r, c in product(rows, cols))
    out = merge_tiles(parts, rows, cols, blend=blend)
    assert out.shape == (2, height, width) and torch.equal(((out + 1) * 127.5).round(), torch.full_like(out, level))


@pytest.mark.parametrize("blend", BLENDS)
def test_merging_cut_tiles_gives_the_picture_back(blend):
    x = torch.randn(1, 3, 50, 70)
    rows, cols = spans(50, 24, 10), spans(70, 24, 17)
    out = merge_tiles((x[..., r, c] for r, c in product(rows, cols)), rows, cols, blend=blend)
    assert (out - x).abs().max() < 1e-5
    assert merge_tiles([x.bfloat16()], [slice(0, 50)], [slice(0, 70)]).dtype == torch.bfloat16


def test_a_merge_is_the_weighted_sum():
    rows, cols = spans(5, 3, 1), spans(9, 5, 2)
    parts = [torch.randn(3, 5) for _ in product(rows, cols)]
    want = torch.zeros(5, 9, dtype=torch.float64)
    for n, ((i, r), (j, c)) in enumerate(product(enumerate(rows), enumerate(cols))):
        for y, x in product(range(r.start, r.stop), range(c.start, c.stop)):
            w = tile_weights(rows)[i][y - r.start] * tile_weights(cols)[j][x - c.start]
            want[y, x] += w * parts[n][y - r.start, x - c.start]
    assert (merge_tiles(parts, rows, cols) - want).abs().max() < 1e-6


def test_unknown_blends():
    with pytest.raises(ValueError, match="allowed are average, linear, hann, gaussian"):
        tile_weights([slice(0, 3)], blend="cubic")


def test_the_published_merge_has_a_black_rim_and_equals_ours_inside():
    rows, cols = spans(48, 32, 8, spread=False), spans(56, 32, 8)  # 8 + 32 - 8 + 32 - 8 = 56: overlaps of exactly 8
    x = torch.rand(48, 56) * 2 - 1
    out = merge_author([x[r, c] for r, c in product(rows, cols)], rows, cols, ramp=8)
    assert (out[[0, -1]] == -1).all() and (out[:, [0, -1]] == -1).all()
    assert (out - x)[1:-1, 1:-1].abs().max() < 1e-5  # agreeing tiles agree, whatever the weights
    one = merge_author([x], [slice(0, 48)], [slice(0, 56)], ramp=8)
    assert (one[0] == -1).all()
    tiles = [torch.full((32, 32), float(i)) for i in range(2)]  # an overlap of 16, ramps of 4: plain average between
    two = merge_author(tiles, [slice(0, 32)], [slice(0, 32), slice(16, 48)], ramp=4)
    assert torch.allclose(two[8, 20:28], torch.full((8,), 0.5)) and two[8, 16] == 0 and two[8, 31] == 1
    assert torch.equal(merge_author([x], [slice(0, 48)], [slice(0, 56)], ramp=0), x + 0)


# ---- streams in tiles

@pytest.mark.parametrize("blend", ["hann", "average"])
def test_one_tile_is_the_untiled_stream(model, blend):
    x = clip(33, 20, 50)
    assert torch.equal(chunks(TiledStream(model, tile=64, overlap=24, blend=blend, seed=5), x), chunks(Stream(model, seed=5), x))


def test_ours_stays_closer_than_either_baseline(model):
    x = clip(25, 32, 96)
    want = Stream(model).enlarge(x)
    off = {tiling: float((make_stream(model, tile=64, tiling=tiling).enlarge(x) - want).square().mean())
           for tiling in ("ours", "paper", "author")}
    assert off["ours"] < 0.05 * min(off["paper"], off["author"])


def test_each_thing_shared_brings_tiles_nearer(model):
    lq, _ = prepare_lq(clip(25, 32, 96))
    want = Stream(model).push(lq)

    def off(*shared):
        return float((TiledStream(model, tile=64, shared=shared, overlap=0).push(lq) - want).square().mean())

    alone, noise, tokens, colors, every = (off(), off("noise"), off("noise", "tokens"), off("noise", "tokens", "colors"),
                                           off(*SHARED))
    assert every < colors < tokens < noise < alone
    assert off("noise", "tokens", "latents") == every  # merged latents are corrected as one frame


def test_tiles_take_windows_of_one_canvas(model):
    lq, _ = prepare_lq(clip(25, 32, 96))
    noise = noise_at(range(6), 16, 48, seed=3)
    a = TiledStream(model, tile=32, overlap=8, seed=3).push(lq)
    assert torch.equal(a, TiledStream(model, tile=32, overlap=8, noise=noise).push(lq))
    assert not torch.equal(a, TiledStream(model, tile=32, overlap=8).push(lq))
    stream = Stream(model, seed=3, place=(2, 5))
    tokens = torch.zeros(1, 6 * 64, model.cfg.dim)
    given = Stream(model, noise=noise_at(range(6), 18, 21, seed=3)[..., 2:, 5:])
    assert torch.equal(stream.denoise(lq[..., :128], tokens=tokens), given.denoise(lq[..., :128], tokens=tokens))


def test_tiles_by_hand(model):
    lq, _ = prepare_lq(clip(25, 32, 96))
    tokens = model.projector(lq, None)[0].unflatten(1, (6, 8, 24))
    parts, cols = [], [slice(0, 256), slice(128, 384)]
    for c in cols:
        mine = tokens[:, :, :, c.start // 16:c.stop // 16].flatten(1, 3)
        parts.append(Stream(model, place=(0, c.start // 8)).denoise(lq[..., c], tokens=mine))
    w = tile_weights([slice(0, 32), slice(16, 48)])[0][16:].float()
    latents = torch.cat([parts[0][..., :16], parts[0][..., 16:] * w + parts[1][..., :16] * (1 - w), parts[1][..., 16:]], -1)
    want = Stream(model).finish(latents, lq[:, :, :-4])
    seen = []
    stream = TiledStream(model, tile=64, overlap=24, on_tile=lambda r, c, x: seen.append((r, c, x)))
    assert (stream.push(lq) - want).abs().max() < 1e-5
    assert [(r, c) for r, c, _ in seen] == [(slice(0, 16), slice(0, 32)), (slice(0, 16), slice(16, 48))]
    assert all(torch.equal(x, part) for (*_, x), part in zip(seen, parts))


@pytest.mark.parametrize("lean", [{}, dict(kind="offload", release=True), dict(kind="offload", decoder_host=True, decoder_tile=(16, 24))])
def test_lean_tiles_are_tiles(model, lean):
    "Also when frames are bytes, in every chunk, and with the decoder's state elsewhere."
    lq, _ = prepare_lq(clip(41, 64, 72))
    cut = [lq[:, :, :25], lq[:, :, 25:33], lq[:, :, 33:]]
    plain, values, levels = TiledStream(model, tile=32, overlap=8), *(LeanTiles(model, tile=32, overlap=8, lean=lean) for _ in range(2))
    with torch.inference_mode():
        for x in cut:
            want, got, bytes_ = plain.push(x), values.push(x), levels.push(to_levels(x))
            assert (got - want).abs().max() < 4e-5 and bytes_.dtype == torch.uint8
            assert (bytes_.int() - to_levels(want).int()).abs().max() <= 1
    model.decoder.tile = model.decoder.store = None
    if lean:
        assert not lean.get("release") or not any(b.tensors for b in values.group.staging.buffers)
        assert all(isinstance(c, OffloadedCache) for t in values.tiles for c in t.caches)


def test_lean_tiles_hand_a_tile_its_own_tokens_only(model, monkeypatch):
    seen = []
    def denoise(self, lq, *, tokens=None):
        seen.append((tokens.untyped_storage().nbytes() / tokens.nbytes, lq.untyped_storage().nbytes()))
        return plain(self, lq, tokens=tokens)
    plain = Stream.denoise
    monkeypatch.setattr(Stream, "denoise", denoise)
    with torch.inference_mode():
        LeanTiles(model, tile=32, overlap=8).push(prepare_lq(clip(25, 32, 72))[0])
    assert len(seen) > 1 and set(seen) == {(1, 4)}  # no view of all tokens, and LQ is a shape


@pytest.mark.parametrize("tiling", ["paper", "author"])
def test_lockstep_equals_one_tile_after_another(model, tiling):
    x, whole, ramp = clip(33, 24, 50), [], 4 * 8
    rows, cols = spans(24, 32, 8, spread=False), spans(50, 32, 8, spread=False)
    assert [s.start for s in cols] == [0, 18]
    for r, c in product(rows, cols):
        whole.append(chunks(Stream(model), x[:, r, c]))
    wide = [[slice(4 * s.start, 4 * s.stop) for s in axis] for axis in (rows, cols)]
    want = merge_tiles(whole, *wide, blend="average") if tiling == "paper" else merge_author(whole, *wide, ramp=ramp)
    stream = SeparateTiles(model, tile=32, overlap=8, tiling=tiling)
    assert stream.k == 0 and torch.equal(chunks(stream, x), want) and stream.k == 2
    assert want.shape == (29, 3, 96, 200)


def test_cache_bytes_count_every_tile(model):
    lq, _ = prepare_lq(clip(25, 32, 96))
    one, six = Stream(model), TiledStream(model, tile=32, overlap=0)
    assert one.cache_bytes == six.cache_bytes == 0
    one.push(lq), six.push(lq)
    tokens, width = 8 * 8 * 24, model.cfg.dim  # four slabs: three to remember, one for the next chunk
    assert one.cache_bytes == six.cache_bytes == 2 * 4 * tokens * width * model.cfg.layers  # keys and values, float32
    paper = SeparateTiles(model, tile=64, overlap=32)
    paper.enlarge(clip(25, 32, 96))
    assert paper.cache_bytes == one.cache_bytes * 4 // 3
    plain = Stream(model, cache=ConcatCache)
    plain.push(lq)
    assert plain.cache_bytes == one.cache_bytes * 3 // 4


def test_any_cache_and_options_reach_the_tiles(model):
    lq, _ = prepare_lq(clip(25, 32, 64))
    stream = TiledStream(model, tile=32, overlap=0, cache=ConcatCache, kv_slabs=2, backend="reference")
    stream.push(lq)
    assert all(isinstance(c, ConcatCache) and c.keep == 2 for t in stream.tiles for c in t.caches)
    assert all(t.options == dict(backend="reference") for t in stream.tiles)


@pytest.mark.parametrize("tile, overlap, snap", [(64, 24, 32), (32, 24, 4), (40, 24, 32), (33, 0, 32), (64, 40, 4)])
def test_tile_and_overlap_are_rounded_up(model, tile, overlap, snap):
    stream = TiledStream(model, tile=tile, overlap=overlap)
    stream._start(384, 1024)
    assert stream.snap == snap and stream.tile == -(-tile // 32) * 32
    assert all(s.start % (4 * snap) == 0 and (s.stop - s.start) % 128 == 0 for s in (*stream.rows, *stream.cols))


@pytest.mark.parametrize("options, said", [
    (dict(tile=0), "tile=0"), (dict(tile=64, overlap=64), "overlap=64"), (dict(tile=64, overlap=-1), "overlap=-1"),
    (dict(tile=64, blend="max"), "blend='max'"), (dict(blend="max"), "blend='max'"), (dict(tiling="mine"), "tiling='mine'"),
    (dict(tile=64, tiling="paper", noise=torch.zeros(1)), "use tiling='ours'")])
def test_refused_in_one_line(model, options, said):
    for call in (lambda: make_stream(model, **options), lambda: model.upscale(iter([]), **options)):
        with pytest.raises(ValueError, match=said) as error:
            call()
        assert "\n" not in str(error.value)


def test_unknown_things_to_share(model):
    with pytest.raises(ValueError, match="caches unknown; allowed are tokens, noise, latents, colors"):
        TiledStream(model, shared=("noise", "caches"))


# ---- clips

@given(frames=st.integers(0, 80), size=st.integers(1, 30), share=st.floats(0, 0.5))
def test_clips_keep_every_frame_in_order(frames, size, share):
    given = [np.full((1, 2, 3), i, np.uint8) for i in range(frames)]
    out = list(in_clips(iter, iter(given), clip=size, overlap=int(size * share)))
    assert [int(x.max()) for x in out] == list(range(frames))


def test_clips_average_where_they_overlap():
    runs = []

    def run(frames):
        runs.append(0)
        for i, frame in enumerate(frames):
            runs[-1] += 1
            yield frame + np.float32(100 * len(runs))

    out = list(in_clips(run, (np.zeros(1, np.float32) for _ in range(25)), clip=10, overlap=4))
    assert runs == [10, 10, 10, 7] and len(out) == 25
    assert [float(x[0]) for x in out] == [100] * 6 + [150] * 4 + [200] * 2 + [250] * 4 + [300] * 2 + [350] * 4 + [400] * 3


def test_clips_hold_only_the_overlap():
    read = []
    frames = (read.append(i) or np.zeros(1) for i in range(100))
    for n, _ in enumerate(in_clips(iter, frames, clip=10, overlap=2), 1):
        assert len(read) <= n + 10


@pytest.mark.parametrize("clip, overlap", [(0, 0), (6, 4), (6, -1)])
def test_clips_refuse(clip, overlap):
    with pytest.raises(ValueError, match="in_clips: overlap"):
        next(in_clips(iter, [], clip=clip, overlap=overlap))


# ---- the pipeline

@pytest.mark.parametrize("tiling", ["ours", "paper", "author"])
def test_upscale_in_tiles(model, tiling):
    x = clip(31, 20, 50)
    y = model.upscale(x, tile=32, overlap=8, tiling=tiling, progress=False)
    assert y.shape == (31, 80, 200, 3) and y.dtype == np.uint8
    assert (y[:, 0] == 0).all() == (tiling == "author")
    frames = np.stack(list(model.upscale(iter(x), tile=32, overlap=8, tiling=tiling, progress=False)))
    assert np.array_equal(y, frames)
    assert np.array_equal(y[:21], model.upscale(x[:26], tile=32, overlap=8, tiling=tiling, progress=False)[:21])


def test_scene_cuts_restart_all_tiles(model):
    rng, x = np.random.default_rng(1), clip(12, 20, 50) // 8
    a, b = np.sort(x, 1), 255 - np.sort(rng.integers(0, 32, (12, 20, 50, 3), dtype=np.uint8), 2)
    both = model.upscale(np.concatenate([a, b]), tile=32, overlap=8, progress=False)
    parts = [model.upscale(part, tile=32, overlap=8, progress=False) for part in (a, b)]
    assert np.array_equal(both, np.concatenate(parts))


def test_a_large_tile_changes_nothing(model):
    x = clip(9, 20, 30)
    assert np.array_equal(model.upscale(x, tile=192, progress=False), model.upscale(x, progress=False))
