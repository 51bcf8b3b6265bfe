"""Widgets without a browser: numbers, posters, errors; and their front end's numbers against Python's, through node."""
import base64
import io
import json
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from flashvsr_nb.attention import locality_mask
from flashvsr_nb.dit import ModelConfig
from flashvsr_nb.kv_cache import KVCache, chunk
from flashvsr_nb.recorder import LayerRecord, Recording, _layer_record, _of_keys, _of_queries, slab_frames
from flashvsr_nb.small_caches import cache_bytes
from flashvsr_nb.sparge_attention import sparge_mask
from flashvsr_nb.tile_explorer import TileExplorer, layout, seam_map
from flashvsr_nb.tiling import BLENDS, tile_grid, tile_weights
from flashvsr_nb.viewers import CacheTimeline, QuantViewer, SparsityViewer, quantisation, replay, ring_table
from flashvsr_nb.widgets import CompareVideo, SeamViewer, jpeg_frames, seam_heat, step_profile

pytestmark = pytest.mark.usefixtures("one_thread")
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


def node(widget, expression, **values):
    "What a function of a widget's front end gives for JSON values."
    code = f"{widget._esm}\nimport {{ readFileSync }} from 'node:fs';\nconst given = JSON.parse(readFileSync(0));\n"
    code += f"console.log(JSON.stringify({expression}));"
    done = subprocess.run(["node", "--input-type=module", "-e", code], input=json.dumps(values), capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def clip(frames=5, height=48, width=64, seed=0):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (frames, height // 8, width // 8, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(f).resize((width, height))) for f in small])


def recording(grid=(2, 3), *, slabs=3, block_size=(128, 128), heads=2, d=16, seed=0, chunks=(0, 1)):
    "A made-up recording, and the q and k that it is of."
    g, records, tensors = torch.Generator().manual_seed(seed), [], []
    s, (bq, bk) = grid[0] * grid[1], block_size
    for n in chunks:
        queries = slabs if n == 0 else 1
        keys = slabs if n == 0 else slabs + 1
        tint = torch.randn(heads, s * keys * 128 // 32, 1, d, generator=g).expand(-1, -1, 32, -1).flatten(1, 2)
        q = torch.randn(heads, s * queries * bq, d, generator=g) * 0.5 + tint[:, :s * queries * bq]
        k = torch.randn(heads, s * keys * 128, d, generator=g) * 0.5 + tint
        last = slabs - 1 + n
        record = _layer_record([_of_queries(q[None], k[None], block_size, 4)], _of_keys(k[None], block_size, 64, 0), None,
                               call=n, stream=0, chunk=n, layer=0, grid=grid, block_size=block_size,
                               q_slabs=tuple(range(last + 1 - queries, last + 1)),
                               k_slabs=tuple(range(last + 1 - keys, last + 1)))
        records.append(record)
        tensors.append((q[None], k[None]))
    return Recording(records), tensors


@pytest.mark.parametrize("block_size", [(128, 128), (128, 64)])
@pytest.mark.parametrize("tau, theta", [(0.0, -1.0), (0.5, 0.1), (0.9, 0.3), (1.0, 0.0), (0.7, 0.99)])
def test_replayed_masks_are_the_policies_own(block_size, tau, theta):
    from flashvsr_nb.attention import LCSA
    rec, tensors = recording(block_size=block_size)
    for record, (q, k) in zip(rec.layers, tensors):
        masks = replay(record, local_range=3, key_blocks=4.0, tau=tau, theta=theta)
        local = locality_mask(*record.grid, 3).repeat_interleave(128 // block_size[1], 1)
        local = local.repeat(len(record.q_slabs), len(record.k_slabs))
        np.testing.assert_array_equal(masks["lcsa"], LCSA(4.0, 3, block_size)(q, k, grid=record.grid)[0])
        for name, within in (("sparge", None), ("inside", local.expand(1, 2, -1, -1))):
            want = sparge_mask(q, k, block_size=block_size, similarity=theta, cdf=tau, within=within)[0]
            np.testing.assert_array_equal(masks[name], want)


@needs_node
@pytest.mark.parametrize("block_size", [(128, 128), (128, 64)])
def test_the_browser_draws_the_masks_of_python(block_size):
    rec, _ = recording(block_size=block_size)
    frames = clip(30, 64, 96)
    for n, query in ((0, 0), (1, 3)):
        w = SparsityViewer(rec, frames, chunk=n, query=query, head=1)
        for local_range, key_blocks, tau, theta in ((3, 4.0, 0.5, 0.1), (4, 1.5, 0.9, 0.35), (15, 50.0, 1.0, -0.1),
                                                    (1, 0.2, 0.0, 0.99), (2, 6.25, 0.98, 0.0)):
            w.local_range, w.key_blocks, w.tau, w.theta = local_range, key_blocks, tau, theta
            given = dict(meta=dict(w.meta), raw=base64.b64encode(w.data).decode(), range=local_range, blocks=key_blocks,
                         tau=tau, theta=theta)
            got = node(w, """(() => { const raw = Uint8Array.from(atob(given.raw), c => c.charCodeAt(0));
                const d = unpack(given.meta, new DataView(raw.buffer)), { range, blocks, tau, theta } = given;
                const masks = { lcsa: lcsa(d, { range, blocks }), sparge: sparge(d, { tau, theta, range: 0 }),
                                inside: sparge(d, { tau, theta, range }), used: Uint8Array.from(d.used) };
                return Object.fromEntries(Object.entries(masks).map(([k, m]) => [k, { mask: [...m], ...measures(d, m) }]));
                })()""", **given)
            table = w.table()
            for name, mask in w.masks().items():
                np.testing.assert_array_equal(np.reshape(got[name]["mask"], mask.shape), mask, err_msg=f"{name} {given['range']}")
                assert (got[name]["density"], got[name]["covered"]) == pytest.approx(table[name], abs=1e-5)


@needs_node
def test_the_browser_draws_the_ring_sizes_of_python():
    w = CacheTimeline(ModelConfig.wan1_3b(), chunk=9)
    for height, width, keep in ((128, 128, 1), (300, 650, 3), (2160, 3840, 6)):
        w.height, w.width, w.keep = height, width, keep
        for kind in w.kinds:
            given = dict(kind, rows=-(-height // 128), cols=-(-width // 128), slots=keep + 1)
            assert node(w, "cacheBytes(given)", **given) == w.sizes()[kind["name"]]
    exact = cache_bytes(ModelConfig.wan1_3b(), 2160, 3840, keep=6)
    assert w.sizes()["bfloat16"] == exact.device and w.sizes()["float32"] == 2 * exact.device
    assert w.sizes()["INT8"] == cache_bytes(ModelConfig.wan1_3b(), 2160, 3840, kind="int8", keep=6).device


@needs_node
def test_the_browser_lays_tiles_as_python_does():
    rng, w, cases = np.random.default_rng(0), TileExplorer(clip()[0]), []
    for _ in range(150):
        tile = 32 * int(rng.integers(1, 9))
        cases.append(dict(height=int(rng.integers(32, 700)), width=int(rng.integers(32, 1200)), tile=tile,
                          overlap=int(rng.integers(0, tile // 2 + 1)), snap=int(rng.choice([4, 32]))))
    got = node(w, "given.cases.map(c => layout(c.height, c.width, c))", cases=cases)
    for case, browser in zip(cases, got, strict=True):
        plan = layout(case["height"], case["width"], tile=case["tile"], overlap=case["overlap"], snap=case["snap"])
        for axis in ("rows", "cols"):
            assert browser[axis] == [[s.start, s.stop] for s in plan[axis]], case
        assert browser["redundancy"] == pytest.approx(plan["redundancy"], abs=1e-12)


@needs_node
@pytest.mark.parametrize("blend", BLENDS)
def test_the_browser_weighs_tiles_as_python_does(blend):
    w = TileExplorer(clip()[0])
    for size, tile, overlap, snap in ((100, 40, 12, 1), (320, 96, 24, 32), (64, 64, 0, 1), (333, 60, 30, 4), (90, 30, 0, 1)):
        spans = tile_grid(size, tile, overlap=overlap, snap=snap)
        got = node(w, "tileWeights(given.spans, given.blend).map(w => [...w])", spans=[[s.start, s.stop] for s in spans], blend=blend)
        for mine, theirs in zip(got, tile_weights(spans, blend=blend), strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-12)


@needs_node
def test_the_first_idea_of_seams_lies_on_the_borders_of_tiles():
    w = TileExplorer(clip()[0])
    flat = [50.0] * 64 + [150.0] * 64
    given = dict(grey=flat * 64, layout=dict(rows=[[0, 64]], cols=[[0, 64], [64, 128]], full=[64, 128]))
    heat = np.reshape(node(w, "[...coarseSeams(Float32Array.from(given.grey), 64, 128, given.layout, 'average')]", **given), (64, 128))
    assert np.nonzero(heat.max(0) > 1e-6)[0].tolist() == [63]
    none = dict(given, grey=[80.0] * 64 * 128)
    assert max(node(w, "[...coarseSeams(Float32Array.from(given.grey), 64, 128, given.layout, 'hann')]", **none)) < 1e-6


@needs_node
def test_magnified_regions_stay_inside_the_picture():
    w = CompareVideo(clip(), clip())
    assert node(w, "region(100, 50, given)", zoom=1, x=0.9, y=0.1) == [0, 0, 100, 50]
    assert node(w, "region(100, 50, given)", zoom=4, x=1, y=0) == [75, 0, 25, 12.5]
    assert node(w, "region(100, 50, given)", zoom=2, x=0.5, y=0.5) == [25, 12.5, 50, 25]


def test_jpegs_one_after_another():
    frames = clip()
    data, ends = jpeg_frames(frames, width=32)
    starts = [0, *ends[:-1]]
    for frame, a, b in zip(frames, starts, ends, strict=True):
        picture = np.asarray(Image.open(io.BytesIO(data[a:b])))
        assert picture.shape == (24, 32, 3)
        assert abs(picture.mean() - frame.mean()) < 2


@pytest.mark.parametrize("axis, at", [("x", 24), ("y", 16)])
def test_a_step_is_found_where_it_is(axis, at):
    frames = np.full((2, 48, 64, 3), 100, np.uint8)
    frames[(slice(None), slice(None), slice(at, None)) if axis == "x" else (slice(None), slice(at, None))] += 3
    for kind in ("tint", "step"):
        steps = step_profile(frames, axis=axis, kind=kind)
        assert steps.shape == (2, 64 if axis == "x" else 48)
        np.testing.assert_array_equal(np.nonzero(steps.any(0))[0], [at])
        np.testing.assert_allclose(steps[:, at], 3)
    heat = seam_heat(frames, cell=4)
    assert heat.shape == (2, 12, 16)
    np.testing.assert_array_equal(np.nonzero(heat.any(0).any(0 if axis == "x" else 1))[0], [at // 4])


@pytest.mark.parametrize("height, width", [(5, 7), (48, 64), (33, 130)])
def test_heat_of_any_size_and_of_no_seam(height, width):
    heat = seam_heat(np.full((1, height, width, 3), 77, np.uint8))
    assert heat.shape == (1, -(-height // 4), -(-width // 4)) and not heat.any()


def test_ratios_of_a_tile_border():
    noise = np.random.default_rng(0).integers(0, 12, (3, 96, 128, 3))
    plain = (noise + np.arange(128)[:, None] // 2).astype(np.uint8)
    tiled = plain.copy()
    tiled[:, :, 64:] += 4
    w = SeamViewer(tiled, plain, columns=[64], rows=[40], over_time="mean")
    before, after = w.ratios()
    assert before > 3 and after < 2
    w.seam = 1
    assert w.ratios()[0] == pytest.approx(w.ratios()[1], rel=0.2)


def test_ring_of_any_length_is_the_caches_own():
    for keep in (1, 2, 3, 5):
        cache, table = KVCache(1, keep=keep), ring_table(9, keep=keep)
        for k, column in enumerate(table):
            new = torch.zeros(1, 1, len(chunk(k).latents) // 2, 1)
            cache.update(new, new)
            assert cache.order == column and max(column) == k + 2 and set(range(k + 3 - min(keep, k + 2), k + 3)) <= {*column}


def test_smoothing_pays_where_there_are_outliers():
    g = torch.Generator().manual_seed(0)
    plain = torch.randn(256, 64, generator=g)
    d = quantisation(plain + 4 * torch.randn(64, generator=g))
    assert all(before > 1.5 * after for before, after in zip(*d["error"]))
    assert max(d["peak"][0]) > 1.5 * max(d["peak"][1])
    near = quantisation(plain)
    assert all(abs(before / after - 1) < 0.2 for before, after in zip(*near["error"]))
    assert all(sum(codes) == pytest.approx(1) for half in d["codes"] for codes in half)


def widgets():
    rec, _ = recording()
    frames = clip(30, 64, 96)
    yield CompareVideo(frames, clip(30, 32, 48))
    yield SeamViewer(frames, frames, columns=[48])
    yield SparsityViewer(rec, frames)
    yield SparsityViewer(rec, np.repeat(np.repeat(frames, 4, 1), 4, 2))  # the result instead of the input
    yield CacheTimeline(ModelConfig.wan1_3b())
    yield QuantViewer(rec)
    yield TileExplorer(frames[0], tile=32, overlap=8, snap="4")


def test_every_widget_has_a_poster_in_picture_and_words():
    for w in widgets():
        data, meta = w._repr_mimebundle_()
        kind = next(k for k in data if k.startswith("image/"))
        picture = Image.open(io.BytesIO(base64.b64decode(data[kind])))
        assert picture.format.lower() == kind[6:] and 200 <= picture.width <= 900 and np.asarray(picture.convert("L")).std() > 5
        assert "application/vnd.jupyter.widget-view+json" in data
        assert data["text/plain"] == meta[kind]["alt"] == w.alt() and len(w.alt()) > 20
        assert "http" not in w._esm.replace("http://www.w3.org", "") and "import " not in w._esm  # nothing from elsewhere


def test_every_slider_has_a_label_and_keeps_its_keys():
    for w in widgets():
        assert "data-lm-suppress-shortcuts" in w._esm and '"aria-label": label' in w._esm


def test_frames_are_kept_in_range():
    w = CompareVideo(clip(4), clip(4))
    for given, kept in ((99, 3), (-5, 0), (2, 2)):
        w.frame = given
        assert w.frame == kept
    s = SeamViewer(clip(4), clip(4), columns=[8, 16])
    s.seam = 7
    assert s.seam == 1


def test_a_file_does_as_well(tmp_path):
    from flashvsr_nb.video import write_video
    frames = clip(6)
    write_video(tmp_path / "a.mp4", frames)
    w = CompareVideo(tmp_path / "a.mp4", frames[:4], most=4)
    assert w.frames == 4


def test_layers_heads_and_chunks_change_the_data():
    rec, _ = recording()
    w = SparsityViewer(rec, clip(30, 64, 96), query=17)
    first = w.data
    w.head = 1
    assert w.data != first and len(w.data) == 4 * (3 * 18 * 18 + 36)
    w.chunk = 1
    assert w.query == 5 and w.meta["kSlabs"] == [0, 1, 2, 3] and len(w.data) == 4 * (3 * 6 * 24 + 30)


@pytest.mark.parametrize("make, words", [
    (lambda: CompareVideo(clip(3), clip(4)), "before has 3 frames of 64×48, after 4 of 64×48"),
    (lambda: CompareVideo(clip(3), clip(3, 48, 48)), "same number of frames and the same shape"),
    (lambda: CompareVideo(clip(3) / 255, clip(3)), "before: float64 of shape"),
    (lambda: CompareVideo(np.zeros((0, 4, 4, 3), np.uint8), clip(3)), "give uint8 frames"),
    (lambda: SeamViewer(clip(3), clip(3), rows=[48]), "a border at y = 48; the picture is 64×48"),
    (lambda: SparsityViewer(Recording(), clip()), "recording is empty"),
    (lambda: SparsityViewer(recording()[0], clip(30, 64, 64)), "the recording has 2×3 blocks"),
    (lambda: SparsityViewer(recording()[0], clip(30, 64, 96), start=40), "start=40"),
    (lambda: SparsityViewer(recording()[0], clip(30, 64, 96), stream=4), "stream 0"),
    (lambda: CacheTimeline(ModelConfig.nano(), chunks=0), "chunks=0"),
    (lambda: QuantViewer(np.zeros(4)), "keys of shape"),
    (lambda: QuantViewer(recording()[0], layer=3), "layer=3; there are 0"),
    (lambda: TileExplorer(clip(1, 24, 64)), "the frame is 64×24"),
    (lambda: TileExplorer(clip()).measure(), "seam maps need a model"),
])
def test_what_a_user_gets_wrong_is_said_in_one_line(make, words):
    with pytest.raises(ValueError, match=words) as error:
        make()
    assert "\n" not in str(error.value)


def test_the_explorers_layout_is_that_of_a_tiled_stream():
    from flashvsr_nb.pipeline import FlashVSR
    from flashvsr_nb.tiling import TiledStream
    nano = FlashVSR.from_pretrained("nano", device="cpu")
    w = TileExplorer(clip(1, 64, 96)[0], model=nano, tile=64, overlap=16, snap="4")
    stream = TiledStream(nano, tile=64, overlap=16, snap=4)
    stream._start(256, 384)
    assert [[4 * s.start, 4 * s.stop] for s in w.layout()["cols"]] == [[s.start, s.stop] for s in stream.cols]
    heat = w.measure()
    assert heat.shape == (256, 384) and heat.max() > 0 and w.measured_for == "64 16 hann 4"
    assert len(w.measured) == w.measured_size[0] * w.measured_size[1] and max(w.measured) == 255
    np.testing.assert_array_equal(seam_map(nano, clip(1, 64, 96)[0], tile=96, overlap=16), 0)  # one tile: untiled


def test_the_explorer_predicts_what_the_planner_does():
    from flashvsr_nb.memory_planner import _CONTEXT, plan
    w = TileExplorer(clip(1, 144, 256)[0])
    for w.size, w.tile in ((1, 128), (4, 160), (6, 256)):
        for w.vram in (6, 9.5, 16, 32):
            rows = [p for p in plan(*w.sizes[w.size], w.vram, tiles=(w.tile,)).others if p.tile]
            fit, got = [p for p in rows if p.fits], w.predicted()
            assert got["fits"] == bool(fit)
            best = min(fit, key=lambda p: p.time) if fit else min(rows, key=lambda p: p.vram)
            assert 1024 * got["gib"] == pytest.approx(best.vram + _CONTEXT, abs=2)


def test_records_are_what_the_viewer_expects():
    assert {"mass", "q_alike", "k_alike", "bits"} <= {*LayerRecord.__dataclass_fields__}
    assert [*slab_frames(1)] == [5, 6, 7, 8, 9, 10, 11, 12]
