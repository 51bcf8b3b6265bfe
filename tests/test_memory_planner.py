"""Plans are right, ordered and explained; a lean stream gives a plain one's frames, also after memory ran out on the way."""
import itertools
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashvsr_nb.dit import ModelConfig
from flashvsr_nb.kv_cache import KVCache
from flashvsr_nb.lean_stream import LeanStream, to_levels, to_values
from flashvsr_nb.memory_planner import _counted, _stages, _tiles_along, next_plan, open_stream, plan, run_options, stepper
from flashvsr_nb.pipeline import _Model
from flashvsr_nb.small_caches import OffloadedCache, QuantizedCache
from flashvsr_nb.streaming import Stream
from flashvsr_nb.tiling import tile_grid

RESULTS = Path(__file__).parents[1] / "data" / "results" / "memory_h100.json"
TINY = ModelConfig(dim=32, heads=2, layers=3, ffn_dim=48, text_dim=8, freq_dim=16, proj_dims=(6, 8), key_blocks=2.0,
                   local_range=3, decoder_channels=(8, 8, 6, 4), resize="torch")
pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = 4e-5  # a two-hundredth of a grey level: how a sum is grouped, by the number of threads too, moves frames by 2.4e-5


# Plans

def test_weights_are_counted_right():
    with torch.device("meta"):
        net = _Model(ModelConfig.wan1_3b()).to(torch.bfloat16)
        net.dit.drop_conditioning()
    real = sum(p.nbytes for part in (net.dit, net.projector, net.decoder) for p in part.parameters()) / 2**20
    prompt = 30 * 2 * 512 * 1536 * 2 / 2**20
    assert math.isclose(_counted(net.cfg, 1, False)[0], real + prompt, rel_tol=1e-3)


def test_state_is_counted_right():
    net = _Model(TINY)
    with torch.no_grad():
        _, state = net.decoder(torch.randn(1, 16, 1, 16, 32), torch.rand(1, 3, 1, 128, 256))
    assert math.isclose(_counted(TINY, 2, False)[1], sum(s.nbytes for s in state) / 2 / 2**20)  # float32 here


@pytest.mark.skipif(not RESULTS.exists(), reason="measurements are in the repository, not in the package")
def test_predictions_are_within_ten_percent_of_what_was_measured():
    cases = [c for c in json.loads(RESULTS.read_text())["cases"] if "error" not in c]
    assert len(cases) > 8
    for case in cases:
        o = dict(kind="resident", int8_weights=False, prefetch=True, release=False, decoder_host=False, decoder_tile=None)
        o |= case["options"]
        frame = tuple(16 * -(-4 * case[side] // 128) for side in ("height", "width"))
        guess = _stages(ModelConfig.wan1_3b(), frame[0] * frame[1] // 256, frame=frame, **o)[0]
        assert abs(guess / case["peak_reserved"] - 1) < 0.1, (case["name"], guess)


@settings(max_examples=25)
@given(h=st.integers(1, 700), w=st.integers(1, 1200), gb=st.floats(3, 90))
def test_the_best_that_fits(h, w, gb):
    p = plan(h, w, gb)
    assert p.budget == int(1024 * gb) - 970 and p in p.others
    if p.fits:
        assert p.vram <= p.budget
        assert not any(q.fits for q in p.others[:p.others.index(p)])
    else:
        assert p.vram == min(q.vram for q in p.others) > p.budget
    grades = [2 if q.tile else 0 if q.exact else 1 for q in p.others]
    assert grades == sorted(grades)
    assert plan(h, w, gb) == p and str(plan(h, w, gb)) == str(p)


@given(h=st.integers(20, 500), gb=st.floats(4, 40))
@settings(max_examples=10)
def test_more_memory_is_never_worse(h, gb):
    less, more = plan(h, 2 * h, gb), plan(h, 2 * h, gb + 4)
    assert more.fits >= less.fits
    if less.fits:
        assert (more.tile is None, more.exact) >= (less.tile is None, less.exact)


def test_what_a_plan_says():
    p = plan(270, 480)
    lines = str(p).splitlines()
    assert "480x270 to 1920x1080" in lines[0] and p.name in lines[0] and len(lines) == len(p.others) + 3
    assert sum(line.startswith(">") for line in lines[1:-1]) == 1
    values = json.loads(json.dumps(p.as_dict()))
    assert values["vram"] == p.vram and len(values["others"]) == len(p.others)
    assert "does not fit" in str(plan(2000, 4000, 2)).splitlines()[0]


def test_host_memory_counts_if_it_is_limited():
    free, tight = plan(540, 960, 10), plan(540, 960, 10, ram_gb=28)
    assert free.exact and free.ram > 28 * 1024 >= tight.ram and tight.kind == "int8-offload"


def test_freed_buffers_are_not_free():
    kept, freed = (next(p for p in plan(270, 480).others if p.name == name)
                   for name in ("KV off-loaded", "KV off-loaded, buffers freed"))
    assert freed.vram < kept.vram and kept.time < freed.time < kept.time * 1.03 and freed.decoder_tile == kept.decoder_tile


@given(blocks=st.integers(1, 40), tile=st.integers(1, 8), overlap=st.integers(0, 255))
def test_tiles_are_counted_right(blocks, tile, overlap):
    overlap = min(overlap, 32 * tile - 4)
    snap = 32 if -(-overlap // 32) < tile else 4  # as `TiledStream` does
    assert _tiles_along(blocks, 32 * tile, overlap) == len(tile_grid(32 * blocks, 32 * tile, overlap=overlap, snap=snap))


def test_tiles_save_the_transformers_share_and_no_more():
    def least(h, w, tile):
        return min(p.vram for p in plan(h, w, 2).others if bool(p.tile) == tile)  # nothing fits: the smallest strips
    assert least(540, 960, True) < 0.9 * least(540, 960, False)
    assert 0.95 < least(192, 352, True) / least(192, 352, False) < 1.05
    p = plan(540, 960, 6.5)
    assert p.fits and p.tile and not any(q.fits for q in p.others if not q.tile)


def test_a_plan_is_made_at_once():
    plan(540, 960)  # imports
    start = time.perf_counter()
    for _ in range(10):
        plan(540, 960)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("values, said", [
    (dict(height=0, width=9), "height=0"), (dict(height=9, width=1.5), "width=1.5"), (dict(height=9, width=9, frames=0), "frames=0"),
    (dict(height=9, width=9, vram_gb=1), "vram_gb=1; driver and CUDA alone"),
    (dict(height=9, width=9, vram_gb=math.nan), "vram_gb=nan"),
])
def test_refusals(values, said):
    with pytest.raises(ValueError, match=said):
        plan(**values)


def test_importing_the_planner_needs_no_torch():
    import subprocess
    import sys
    code = "import sys, flashvsr_nb.memory_planner; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_steps_down_and_ends():
    p, told = plan(270, 480, 24), []
    steps, stepped = [p], []
    down = stepper(p, tell=told.append, step=stepped.append)
    while (options := down()) is not None:
        p = next_plan(p)
        assert options == run_options(p)
        steps.append(p)
    assert stepped == steps[1:]
    assert len(steps) > 3 and len(told) == len(steps) - 1 and p.tile is None
    assert all(b.vram <= a.vram - 100 for a, b in itertools.pairwise(steps))
    assert p.name in told[-1] and "out of memory" in told[0]
    assert next_plan(replace(p, vram=0)) is None


# Streams

@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = _Model(TINY)
    for p in net.decoder.parameters():
        p.data.mul_(2)
    return net.freeze()


@pytest.fixture(scope="module")
def clip():
    generator = torch.Generator().manual_seed(0)
    lq = to_values(torch.randint(0, 256, (1, 3, 41, 128, 128), generator=generator).byte())
    return [lq[:, :, :25], lq[:, :, 25:33], lq[:, :, 33:]]


@pytest.fixture(scope="module")
def long_clip():
    generator = torch.Generator().manual_seed(1)
    return [torch.rand((1, 3, n, 128, 128), generator=generator) * 2 - 1 for n in (25, 8, 8, 8, 8, 8)]


def frames(stream, clip):
    with torch.no_grad():
        return torch.cat([stream.push(x) for x in clip], 2)


@pytest.fixture(scope="module")
def plain(net, clip):
    net.decoder.tile = net.decoder.store = None
    return frames(Stream(net), clip)


@pytest.mark.parametrize("options", [
    {}, dict(kind="offload"), dict(kind="offload", release=True, prefetch=False),
    dict(decoder_tile=9), dict(decoder_tile=(8, 16), decoder_host=True)])
def test_lean_is_plain(net, clip, plain, options):
    torch.testing.assert_close(frames(LeanStream(net, **options), clip), plain, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("kind", ["int8", "int8-offload"])
def test_int8_caches_are_close_and_off_loading_them_changes_nothing(net, clip, plain, kind):
    y = frames(LeanStream(net, kind=kind, release=kind != "int8"), clip)
    assert 0 < (y - plain).abs().max() < 0.05
    torch.testing.assert_close(y, frames(LeanStream(net, kind="int8"), clip), atol=CLOSE, rtol=0)


def test_levels(net, clip, plain):
    y = frames(LeanStream(net), [to_levels(x) for x in clip])
    assert y.dtype == torch.uint8 and (y.int() - to_levels(plain).int()).abs().max() <= 1
    assert torch.equal(to_values(to_levels(clip[0])), clip[0])


def failing(module, at):
    calls = itertools.count()

    def hook(m, args):
        if next(calls) in at:
            raise torch.OutOfMemoryError("CUDA out of memory (a test's)")
    return module.register_forward_pre_hook(hook)


@pytest.mark.parametrize("part", ["projector", "last layer", "decoder"])
@pytest.mark.parametrize("kind, then", [("resident", "offload"), ("resident", "int8"), ("int8", "int8-offload"), ("resident", "resident")])
def test_out_of_memory_loses_nothing(net, clip, plain, part, kind, then):
    "In the second chunk, wherever: frames are those of a run that had enough."
    module, at = dict([("projector", (net.projector.linear_layers[0], {7})), ("last layer", (net.dit.blocks[2].ffn[0], {2})),
                       ("decoder", (net.decoder.decoder[11], {6}))])[part]
    hook, steps = failing(module, at), []
    stream = LeanStream(net, kind=kind, step_down=lambda: steps.append(1) or dict(kind=then, decoder_tile=(8, 16)))
    try:
        y = frames(stream, clip)
    finally:
        hook.remove()
        net.decoder.tile = None
    assert steps == [1] and stream.group.kind == then
    cache = dict(offload=OffloadedCache, int8=QuantizedCache, resident=KVCache).get(then, QuantizedCache)
    assert all(isinstance(c, cache) for c in stream.caches)
    if "int8" in (kind, then):
        want = plain if kind == "resident" else frames(LeanStream(net, kind="int8"), clip)
        assert (y - want).abs().max() < (0.05 if kind == "resident" else 1e-4)
    else:
        torch.testing.assert_close(y, plain, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("part", [(0, "norm3"), (1, "ffn"), (2, "norm3"), (2, "ffn"), "head", "decoder"])
@pytest.mark.parametrize("kind, prefetch, k", [("offload", True, 1), ("offload", False, 3), ("int8-offload", True, 3)])
def test_off_loaded_layers_lose_nothing(net, long_clip, part, kind, prefetch, k):
    "Just after attention, half-way through a layer, after all of them, in the decoder; in the chunk that fills the ring, and later."
    module, at = dict(head=(net.dit.head, k), decoder=(net.decoder.decoder[11], 6 + 2 * (k - 1) + 1)).get(part) or (
        getattr(net.dit.blocks[part[0]], part[1]), k + 2)  # a layer's rows are those of a slab, and the first chunk has three
    want, steps = frames(LeanStream(net, kind=kind), long_clip), []
    stream = LeanStream(net, kind=kind, release=k == 1, prefetch=prefetch,
                        step_down=lambda: steps.append(stream.k) or dict(kind=kind, prefetch=False))
    hook = failing(module, {at})
    try:
        got = frames(stream, long_clip)
    finally:
        hook.remove()
    assert steps == [k + 1] and len(stream.group.staging.buffers) == 1
    assert torch.equal(got, want)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("kind, then", [("offload", dict(kind="int8-offload")), ("offload", dict(kind="resident")), ("int8-offload", dict(kind="int8")),
                                        ("offload", dict(kind="offload", decoder_host=True, decoder_tile=9))])
def test_off_loaded_layers_go_on_in_another_way(net, long_clip, layer, kind, then):
    "As if the stream had changed its way before that layer, on purpose."
    hook = failing(net.dit.blocks[layer].ffn, {5})  # in chunk 3
    try:
        got = frames(LeanStream(net, kind=kind, step_down=lambda: then), long_clip)
    finally:
        hook.remove()
    net.decoder.tile = net.decoder.store = None
    stream, calls = LeanStream(net, kind=kind), itertools.count()

    def after(*_):  # the layer before
        if next(calls) == 5:
            stream.change(**then)
    if layer:
        hook = net.dit.blocks[layer - 1].ffn.register_forward_hook(after)
    want = [frames(stream, long_clip[:3])]
    if not layer:
        stream.change(**then)
    want.append(frames(stream, long_clip[3:]))
    hook.remove()
    net.decoder.tile = net.decoder.store = None
    assert torch.equal(got, torch.cat(want, 2))


def test_several_steps_in_one_chunk_and_the_end_of_the_ladder(net, clip, plain):
    ways = iter([dict(kind="offload"), dict(kind="offload", decoder_tile=8, decoder_host=True)])
    hook = failing(net.dit.blocks[1].ffn[0], {0, 1})
    try:
        y = frames(LeanStream(net, step_down=lambda: next(ways, None)), clip)
    finally:
        hook.remove()
        net.decoder.tile = net.decoder.store = None
    torch.testing.assert_close(y, plain, atol=CLOSE, rtol=0)
    hook = failing(net.dit.blocks[1].ffn[0], {0})
    with pytest.raises(torch.OutOfMemoryError, match="a test's"):
        frames(LeanStream(net, step_down=lambda: None), clip)
    hook.remove()


def test_other_errors_are_not_memory(net, clip):
    with pytest.raises(ValueError, match="chunk 0 must be"):
        LeanStream(net, step_down=lambda: pytest.fail("asked to step down")).push(clip[1])


def test_a_plan_opens_its_stream(net, clip, plain):
    p = plan(32, 32, config=TINY)
    torch.testing.assert_close(frames(open_stream(p, net), clip), plain, atol=CLOSE, rtol=0)
    tiled = next(q for q in plan(40, 72, config=TINY, tiles=(64,), overlap=8).others if q.tile and not q.int8_weights)
    stream = open_stream(tiled, net, seed=3)
    assert (stream.tile, stream.overlap, stream.seed, stream.group.kind) == (64, 8, 3, "offload")
    net.decoder.tile = net.decoder.store = None
