"""INT8 blocks, off-loaded and quantised caches, and the order of their copies."""
import gc
import warnings
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from flashvsr_nb import small_caches
from flashvsr_nb.attention import LCSA, attend, attend_reference, pool_blocks
from flashvsr_nb.dit import DiT, ModelConfig
from flashvsr_nb.kv_cache import KVCache, chunk
from flashvsr_nb.small_caches import (
    CacheBytes,
    CacheGroup,
    OffloadedCache,
    QuantizedCache,
    QuantizedKV,
    cache_bytes,
    dequantize_blocks,
    quantize_blocks,
)

KINDS = ("resident", "offload", "int8", "int8-offload")


def random_kv(n, slab, *, batch=1, heads=2, d=4, dtype=torch.float32, device="cpu"):
    "Keys with channel outliers, values; laid out as the DiT's linear layers leave them"
    k, v = (torch.randn(batch, n * slab, heads, d, device=device).to(dtype).transpose(1, 2) for _ in "kv")
    return k + 3 * torch.randn(batch, heads, 1, d, device=device).to(dtype), v


def same(ours, theirs):
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def error(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


# ---- blocks

@given(batch=st.integers(1, 2), heads=st.integers(1, 3), tokens=st.integers(1, 150), d=st.integers(1, 9),
       block=st.integers(1, 80), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
       size=st.floats(1e-4, 1e4))
def test_blocks(batch, heads, tokens, d, block, dtype, size):
    torch.manual_seed(0)
    x = (torch.randn(batch, heads, tokens, d) * size).to(dtype)
    q, scale = quantize_blocks(x, block)
    assert (q.dtype, q.shape, scale.dtype) == (torch.int8, x.shape, torch.float32)
    assert scale.shape == (batch, heads, -(-tokens // block)) and int(q.min()) >= -127
    for i, part in enumerate(x.float().split(block, 2)):
        top = part.abs().amax((2, 3))
        assert torch.equal(scale[:, :, i], top / 127)
        step = scale[:, :, i, None, None].where(top[..., None, None] > 0, 1)
        assert torch.equal(q.split(block, 2)[i], (part / step).round().clamp(-127, 127).to(torch.int8))
    back = dequantize_blocks(q, scale, block=block)
    assert ((back - x.float()).abs() <= scale.repeat_interleave(block, 2)[:, :, :tokens, None] * 0.5001).all()
    again = quantize_blocks(back, block)
    assert torch.equal(again[0], q) and torch.allclose(again[1], scale, rtol=1e-6)
    assert dequantize_blocks(q, scale, block=block, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_blocks_ties_go_to_even():
    x = torch.tensor([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127]).view(1, 1, 8, 1)
    q, scale = quantize_blocks(x, 8)
    assert q.flatten().tolist() == [127, 0, 2, 2, 0, -2, -2, -127] and scale.item() == 1


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-40, 1e-38, 3e38])
def test_blocks_of_nothing_and_of_extremes(value):
    x = torch.full((1, 1, 4, 3), value)
    q, scale = quantize_blocks(torch.cat([x, -x, torch.ones(1, 1, 1, 3)], 2), 4)
    back = dequantize_blocks(q, scale, block=4)
    assert back.isfinite().all() and int(q.min()) >= -127
    assert back[0, 0, 0, 0] == 0 if value < 1e-44 else abs(back[0, 0, 0, 0] / value - 1) < 0.2
    assert torch.allclose(back[0, 0, 8], torch.ones(3))


def test_block_errors():
    with pytest.raises(ValueError, match="block=0 tokens, must be at least 1"):
        quantize_blocks(torch.ones(1, 1, 4, 2), 0)
    with pytest.raises(ValueError, match=r"scale has shape \(1, 1, 1\); \(1, 1, 130, 2\) in blocks of 64 tokens"):
        dequantize_blocks(torch.ones(1, 1, 130, 2, dtype=torch.int8), torch.ones(1, 1, 1))


# ---- off-loading

@settings(max_examples=60)
@given(keep=st.integers(1, 5), layers=st.integers(1, 4), batch=st.integers(1, 2), prefetch=st.booleans(),
       sizes=st.lists(st.integers(1, 4), min_size=1, max_size=8), slab=st.integers(1, 3))
def test_offloaded_is_the_ring(keep, layers, batch, prefetch, sizes, slab):
    "Any sequence of chunk lengths: the same slabs in the same slots, bit for bit."
    torch.manual_seed(0)
    group = CacheGroup("offload", prefetch=prefetch)
    ours, theirs = ([make(slab, keep=keep) for _ in range(layers)] for make in (group.make, KVCache))
    for n in sizes:
        for a, b in zip(ours, theirs):
            new = random_kv(n, slab, batch=batch)
            assert same(a.update(*new), b.update(*new))
            assert a.order == b.order


@pytest.mark.parametrize("keep", [1, 2, 3, 4])
@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_offloaded_over_a_stream(keep, prefetch, dtype):
    "Three slabs, then fourteen times one; alone and in a group of five layers."
    group = CacheGroup("offload", prefetch=prefetch)
    layers = [(group.make(4, keep=keep), OffloadedCache(4, keep=keep), KVCache(4, keep=keep)) for _ in range(5)]
    for i in range(15):
        for grouped, alone, ring in layers:
            new = random_kv(1 if i else 3, 4, dtype=dtype)
            expected = ring.update(*new)
            for cache in (grouped, alone):
                assert same(cache.update(*new), expected) and cache.order == ring.order
    assert len({t.data_ptr() for b in group.staging.buffers for t in b.tensors}) == (4 if prefetch else 2)


def test_streams_may_share_a_group():
    "Tiles advance together, one ends, another begins; each keeps its own memory."
    group, ring = CacheGroup("offload"), lambda: [KVCache(2) for _ in range(3)]
    streams = [([group.make(2) for _ in range(3)], ring()) for _ in range(3)]
    for i in range(12):
        if i == 6:
            streams[1] = [group.make(2) for _ in range(3)], ring()
        for s, (ours, theirs) in enumerate(streams):
            for a, b in zip(ours, theirs):
                new = random_kv(1 if i and (s, i) != (1, 6) else 3, 2)
                assert same(a.update(*new), b.update(*new))


def test_the_next_stream_takes_over_the_memory():
    group = CacheGroup("offload")

    def run(slab):
        layers = [group.make(slab) for _ in range(3)]
        for n in (3, 1, 1):
            for cache in layers:
                cache.update(*random_kv(n, slab))
        return {t.data_ptr() for cache in layers for t in cache.ring.host.tensors}

    first = run(4)
    assert len(first) == 6 and run(4) == first and len(group.staging.spare) == 3
    run(2)
    assert {m.shapes[0][0][0] for m in group.staging.spare} == {6}  # three slabs of 2: of no use are those of 4


def test_caches_die_with_their_stream():
    group = CacheGroup("int8-offload")
    layers = [group.make(128) for _ in range(2)]
    for cache in layers:
        cache.update(*random_kv(3, 128))
    refs = [weakref.ref(x) for cache in layers for x in (cache, cache.ring)]
    gc.disable()
    try:
        del layers, cache
        assert [ref() for ref in refs] == [None] * 4  # at once: no cycles that wait for the collector
    finally:
        gc.enable()


@pytest.mark.parametrize("fails", range(1, 5))
def test_out_of_memory_loses_nothing(monkeypatch, fails):
    "With keep=1 the second chunk needs smaller buffers: if one cannot be had, the chunk can be tried again."
    group, layers, left = CacheGroup("offload"), 4, [10**6]
    ours, theirs = [group.make(2, keep=1) for _ in range(layers)], [KVCache(2, keep=1) for _ in range(layers)]
    empty = torch.empty

    def scarce(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            raise torch.OutOfMemoryError("none left")
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", scarce)
    failed = 0
    for i, n in enumerate((3, 1, 1, 1)):
        for a, b in zip(ours, theirs):
            new, before = random_kv(n, 2), a.ring.written
            left[0] = fails if i == 1 and not failed else 10**6
            try:
                got = a.update(*new)
            except torch.OutOfMemoryError:
                failed, left[0] = failed + 1, 10**6
                got = a.update(*new) if a.ring.written == before else None  # or it was what comes next that failed
            expected = b.update(*new)
            assert got is None or same(got, expected)
    assert failed == 1


def test_a_buffer_that_was_given_up_holds_nothing(monkeypatch):
    "A larger stream took the memory that held a smaller one's slabs, and got none itself."
    group, expected = CacheGroup("offload"), KVCache(2)
    small, other, large = group.make(2), group.make(2), group.make(4)
    for n in (3, 1):
        new = random_kv(n, 2)
        assert same(small.update(*new), expected.update(*new))
        other.update(*new)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch, "empty", lambda *shape, dtype, device=None: none_left() if device else
                      torch.zeros(*shape, dtype=dtype))  # none on the device, as much as wanted on the host
        large.update(*random_kv(3, 4))
    new = random_kv(1, 2)
    assert same(small.update(*new), expected.update(*new))


def none_left():
    raise torch.OutOfMemoryError("none left")


def test_settle_waits_for_the_last_copy_to_the_host():
    cache, waited = OffloadedCache(2), []
    cache.update(*random_kv(3, 2))
    cache.ring.settle()  # nothing to wait for: copies on the CPU are made at once
    cache.ring.saved = type("Event", (), {"synchronize": lambda self: waited.append(self)})()
    cache.ring.settle()
    assert waited == [cache.ring.saved]


# ---- the order of copies on a GPU, without one: vector clocks

class Tape(TorchDispatchMode):
    "Every copy with the queue it is in, and what that queue had waited for by then."

    def __init__(self, forget=()):
        super().__init__()
        self.clocks, self.ops, self.now, self.forget, self.alive = {}, [], "main", forget, []
        self.names = ["main", "load", "save"]  # in the order in which a group makes its queues

    def log(self, lane, reads=(), writes=()):
        clock = self.clocks.setdefault(lane, {lane: 0})
        clock[lane] += 1
        self.alive += [*reads, *writes]  # or an address could be given out twice
        self.ops.append((lane, clock[lane], dict(clock), [*map(span, reads)], [*map(span, writes)]))

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        if fn is torch.ops.aten.copy_.default:
            self.log(self.now, reads=args[1:2], writes=args[:1])
        return fn(*args, **(kwargs or {}))

    def lane(self, device, side):
        return Lane(self, self.names.pop(0), device)

    def races(self):
        "Pairs of copies on the same bytes, one of them a write, of which neither waits for the other."
        return [(a[:2], b[:2]) for i, a in enumerate(self.ops) for b in self.ops[:i]
                if a[0] != b[0] and a[2].get(b[0], 0) < b[1] and b[2].get(a[0], 0) < a[1]
                and (overlap(a[4], b[3] + b[4]) or overlap(a[3], b[4]))]


class Lane:
    def __init__(self, tape, name, device):
        self.tape, self.name, self.device = tape, name, device
        self.clock = tape.clocks.setdefault(name, {name: 0})

    def mark(self):
        return dict(self.clock)

    def after(self, *marks):
        for i, mark in enumerate(marks):
            for lane, count in ({} if mark is None or (self.name, i) in self.tape.forget else mark).items():
                self.clock[lane] = max(self.clock.get(lane, 0), count)

    def copy(self, to, x):
        self.tape.now = self.name
        to.copy_(x)
        self.tape.now = "main"

    def uses(self, tensors):
        pass


def span(t):
    start = t.data_ptr()
    return start, start + t.element_size() * (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride())))


def overlap(these, those):
    return any(a < d and c < b for a, b in these for c, d in those)


def watched(monkeypatch, forget=(), layers=3, prefetch=True, keep=3, sizes=(3, 1, 1, 1, 1), streams=1):
    "Copies of some streams that share a group; attention reads what `update` gives."
    tape = Tape(forget)
    monkeypatch.setattr(small_caches, "_Lane", tape.lane)
    group = CacheGroup("offload", prefetch=prefetch)
    caches = [[group.make(2, keep=keep) for _ in range(layers)] for _ in range(streams)]
    with tape:
        for n in sizes:
            for cache in sum(caches, []):
                tape.log("main", reads=cache.update(*random_kv(n, 2)))
    return tape


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("keep, sizes", [(1, (3, 1, 1, 1)), (2, (3, 1, 1, 2, 1)), (3, (3, 1, 1, 1, 1)),
                                         (4, (3, 1, 3, 1))])
@pytest.mark.parametrize("streams", [1, 2])
def test_no_copy_overtakes_another(monkeypatch, layers, prefetch, keep, sizes, streams):
    tape = watched(monkeypatch, (), layers, prefetch, keep, sizes, streams)
    assert "load" in {op[0] for op in tape.ops} or layers * streams <= 1 + prefetch  # all of it stays on the device
    assert tape.races() == []


@pytest.mark.parametrize("forgotten", [("main", 0), ("main", 1), ("load", 0), ("load", 1), ("load", 2), ("save", 0)])
def test_each_wait_is_needed(monkeypatch, forgotten):
    "Were one of them left out, the test above would notice."
    layers = 1 if forgotten in [("main", 1), ("load", 2)] else 3
    assert watched(monkeypatch, [forgotten], layers=layers, keep=1).races()


# ---- the host's memory

class Cudart:
    "Stands in for CUDA's runtime: remembers what is page-locked."

    def __init__(self, error=0):
        self.error, self.locked = error, {}

    def cudaHostRegister(self, start, size, flags):
        assert all(start + size <= a or a + n <= start for a, n in self.locked.items())
        self.locked.update({} if self.error else {start: size})
        return self.error

    def cudaHostUnregister(self, start):
        del self.locked[start]


@pytest.fixture
def cudart(monkeypatch):
    fake = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return fake


def test_host_memory_is_locked_page_by_page_and_let_go(cudart):
    shapes = [((3, 1000), torch.bfloat16), ((7, 5), torch.float32), ((1, 4096), torch.int8)]
    memory, page = small_caches._HostMemory(shapes, torch.device("cuda")), small_caches.mmap.PAGESIZE
    assert [(t.shape, t.dtype) for t in memory.tensors] == shapes
    assert [t.data_ptr() for t in memory.tensors] == [*cudart.locked] and all(a % page == 0 for a in cudart.locked)
    assert [*cudart.locked.values()] == [-(-n // page) * page for n in (6000, 140, 4096)]
    for i, t in enumerate(memory.tensors):
        t.fill_(i)
    assert [t.unique().tolist() for t in memory.tensors] == [[0], [1], [2]]
    del memory, t
    assert cudart.locked == {}


def test_host_memory_that_cannot_be_locked_still_serves(cudart, monkeypatch):
    cudart.error, cleared = 2, []
    monkeypatch.setattr(small_caches, "_clear_error", cleared.append)
    with pytest.warns(UserWarning, match=r"could not be page-locked \(CUDA error 2\); copies will be slower"):
        memory = small_caches._HostMemory([((4, 4), torch.float32)], torch.device("cuda"))
    assert memory.tensors[0].fill_(1).sum() == 16 and cudart.locked == {} and cleared == [torch.device("cuda")]


# ---- INT8

@settings(max_examples=25)
@given(keep=st.integers(1, 4), sizes=st.lists(st.integers(1, 3), min_size=1, max_size=6),
       mean=st.sampled_from(["slab", "first"]), batch=st.integers(1, 2), blocks=st.integers(1, 2),
       dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_quantized_keeps_to_half_a_step(keep, sizes, mean, batch, blocks, dtype):
    "Against the ring in floating point: order, scales and means as defined, error at most half a step."
    torch.manual_seed(0)
    slab, frozen = 128 * blocks, None
    ours, theirs = QuantizedCache(slab, keep=keep, mean=mean), KVCache(slab, keep=keep)
    for n in sizes:
        new = random_kv(n, slab, batch=batch, dtype=dtype)
        frozen = new[0].float().mean(2) if frozen is None else frozen
        k, v = theirs.update(*new)
        got = ours.update(*new)
        assert ours.order == theirs.order and [x.dtype for x in got] == [dtype] * 2
        kv = ours.quantized()
        k, v, many = k.float(), v.float(), len(theirs.order)
        own = k.unflatten(2, (many, slab)).mean(3)
        assert torch.allclose(kv.k_mean, own if mean == "slab" else frozen[:, :, None].expand_as(own), atol=1e-5)
        assert torch.equal(kv.v_scale, v.unflatten(2, (many, slab)).abs().amax(3) / 127)
        assert torch.allclose(kv.pooled, pool_blocks(k, 128), atol=1e-5)
        assert kv.slab == slab and kv.k_scale.shape == (*k.shape[:2], many * slab // 64)
        back = kv.dequantize()
        for x, y, step in ((k, back[0], kv.k_scale.repeat_interleave(64, 2)[..., None]),
                           (v, back[1], kv.v_scale.repeat_interleave(slab, 2))):
            assert ((x - y).abs() <= 0.501 * step + 1e-5).all()
        assert all(torch.equal(a, b.to(dtype)) for a, b in zip(got, back))


@pytest.mark.parametrize("mean", ["slab", "first"])
@pytest.mark.parametrize("keep", [1, 2, 3, 4])
def test_offloaded_int8_is_resident_int8(keep, mean):
    group = CacheGroup("int8-offload", mean=mean)
    layers = [(group.make(128, keep=keep), QuantizedCache(128, keep=keep, mean=mean)) for _ in range(3)]
    for i in range(13):
        for ours, theirs in layers:
            new = random_kv(1 if i else 3, 128)
            assert same(ours.update(*new), theirs.update(*new))
            a, b = ours.quantized(), theirs.quantized()
            assert all(torch.equal(getattr(a, f), getattr(b, f)) for f in QuantizedKV.__dataclass_fields__)


def test_a_slab_is_quantised_once():
    "Its numbers stay as they are for as long as it is kept, whatever comes after."
    cache, seen = QuantizedCache(128), {}
    for i in range(8):
        cache.write(*random_kv(1 if i else 3, 128))
        kv = cache.quantized()
        for name in QuantizedKV.__dataclass_fields__:
            for s, part in zip(cache.order, getattr(kv, name).chunk(len(cache.order), 2)):
                assert torch.equal(part, seen.setdefault((name, s), part.clone()))
    assert len({s for _, s in seen}) == 10


def scores(q, kv):
    "q k' / sqrt(d) from the INT8 numbers alone, without what smoothing took"
    return q @ dequantize_blocks(kv.k, kv.k_scale).mT / q.shape[-1]**0.5


def test_scales_of_twice_the_block():
    "For kernels that take 128 keys at once: half as many scales, the same bound."
    new = random_kv(3, 128, dtype=torch.bfloat16)
    kv = CacheGroup("int8", block=128, mean="first").make(128).write(*new)
    assert kv.k_scale.shape == (1, 2, 3) and (kv.k_mean == kv.k_mean[:, :, :1]).all()
    for ours, theirs in zip((kv.k, kv.k_scale), quantize_blocks(new[0] - kv.k_mean[:, :, :1], 128)):
        assert torch.equal(ours, theirs)
    assert ((kv.dequantize()[0] - new[0]).abs() <= 0.501 * kv.k_scale.repeat_interleave(128, 2)[..., None] + 1e-5).all()


@pytest.mark.parametrize("mean", ["slab", "first"])
def test_bias_is_exact(mean):
    "Softmax does not see one mean, and sees several unless the bias is added."
    cache, q = QuantizedCache(128, mean=mean), torch.randn(1, 2, 40, 16)
    for n in (3, 1, 1):
        cache.write(*random_kv(n, 128, d=16))
    kv = cache.quantized()
    expected = (q @ kv.dequantize()[0].mT / 4).softmax(-1)
    bias = kv.bias(q)
    assert bias.shape == (1, 2, 40, 4) and (bias[..., 0] == 0).all()
    assert torch.allclose((scores(q, kv) + bias.repeat_interleave(128, -1)).softmax(-1), expected, atol=2e-6)
    assert (error(scores(q, kv).softmax(-1), expected) > 0.5) == (mean == "slab")
    assert torch.allclose(kv.bias(q, scale=1.0), bias * 4, atol=1e-5) and (mean == "slab" or bias.abs().max() == 0)


def test_heads_in_portions_are_heads_at_once(monkeypatch):
    new = random_kv(2, 128, heads=5)
    whole = QuantizedCache(128).write(*new)
    monkeypatch.setattr(small_caches, "_few_heads", lambda x: [slice(0, 2), slice(2, 4), slice(4, 5)])
    parts = QuantizedCache(128).write(*new)
    assert all(torch.equal(getattr(whole, f), getattr(parts, f)) for f in QuantizedKV.__dataclass_fields__)
    assert same(parts.dequantize(), whole.dequantize())


@given(heads=st.integers(1, 13), tokens=st.integers(1, 5), budget=st.integers(1, 40))
def test_few_heads(heads, tokens, budget):
    x = torch.zeros(1, heads, tokens, 1)
    parts = [x[:, h] for h in small_caches._few_heads(x, budget)]
    assert sum(p.shape[1] for p in parts) == heads
    assert all(p.numel() <= max(budget, tokens) for p in parts)


def test_silence_stays_silent():
    cache = QuantizedCache(128)
    k, v = cache.update(*[torch.zeros(1, 2, 384, 8)] * 2)
    assert not k.any() and not v.any()
    k, _ = cache.update(torch.full((1, 2, 128, 8), 5.0), torch.zeros(1, 2, 128, 8))
    assert (k[:, :, 384:] == 5).all()  # a constant is all mean


# ---- whole streams

@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    cfg = ModelConfig(dim=64, heads=2, layers=3, ffn_dim=96, text_dim=12, freq_dim=16, channels=4)
    net = DiT(cfg).requires_grad_(False)
    return net, net.condition(torch.randn(1, 3, 12)), torch.randn(1, 4, 14, 32, 16), torch.randn(1, 14 * 128, 64)


def stream(network, make, policy=None, keep=3):
    net, cond, x, lq = network
    caches, out = [make(256, keep=keep) for _ in net.blocks], []
    for f in (chunk(k).latents for k in range(5)):
        tokens = lq[:, 128 * f.start:128 * f.stop]
        out.append(net(x[:, :, f.start:f.stop], tokens, cond, f0=f.start, caches=caches, policy=policy))
    return torch.cat(out, 2)


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("prefetch", [True, False])
def test_stream_off_loaded_is_the_stream(network, keep, prefetch):
    assert torch.equal(stream(network, CacheGroup("offload", prefetch=prefetch).make, keep=keep),
                       stream(network, KVCache, keep=keep))


def test_stream_in_int8_is_close(network):
    everything = LCSA(1000, 9)  # no block is left out: a mask that flips at a near tie would be another error
    exact = stream(network, CacheGroup("resident").make, everything)
    for kind in ("int8", "int8-offload"):
        for mean in ("slab", "first"):
            assert 1e-5 < error(stream(network, CacheGroup(kind, mean=mean).make, everything), exact) < 5e-3


def test_streams_in_inference_mode_then_out_of_it(network):
    group = CacheGroup("int8-offload")
    with torch.inference_mode():
        a = stream(network, group.make)
    assert torch.equal(stream(network, group.make), a)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_no_gradient_and_no_graph_is_kept(kind):
    for mean in ("slab", "first"):
        cache = CacheGroup(kind, **({"mean": mean} if "int8" in kind else {})).make(128)
        for n in (3, 1, 1):
            new = [x.requires_grad_() for x in random_kv(n, 128)]
            assert not any(x.requires_grad for x in cache.update(*new))
        assert getattr(cache, "frozen", None) is None or not cache.frozen.requires_grad


# ---- bytes

def nbytes(tensors):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [1, 2, 3, 4])
@pytest.mark.parametrize("prefetch", [True, False])
def test_cache_bytes_are_those_of_the_tensors(kind, keep, prefetch):
    "Counted after the first chunk; with keep=1 its three slabs need more room than what follows."
    cfg, (height, width), batch = ModelConfig(dim=48, heads=3, layers=4), (200, 300), 2  # 2 x 3 blocks
    group = CacheGroup(kind, prefetch=prefetch)
    caches = [group.make(6 * 128, keep=keep) for _ in range(cfg.layers)]
    for cache in caches:
        k, v = cache.update(*random_kv(3, 6 * 128, batch=batch, heads=3, d=16, dtype=torch.bfloat16))
    said = cache_bytes(cfg, height, width, kind=kind, keep=keep, prefetch=prefetch, batch=batch)
    if "offload" in kind:
        assert said.device == nbytes(t for b in group.staging.buffers for t in b.tensors)
        assert said.host == nbytes(t for c in caches for t in c.ring.host.tensors)
    else:
        assert said.device == nbytes(t for c in caches for t in (c.ring.data if kind == "int8" else (c.k, c.v)))
        assert said.host == 0
    assert said.transient == (0 if "int8" not in kind else nbytes([k, v]) * max(3, keep + 1) // 3)


def test_cache_bytes_of_the_official_model():
    cfg, mib = ModelConfig.wan1_3b(), 2**20
    for height, width, S in ((768, 768, 36), (768, 1408, 66), (1024, 1792, 112), (2160, 3840, 510)):
        resident, off, int8, both = (cache_bytes(cfg, height, width, kind=kind) for kind in KINDS)
        assert resident == CacheBytes(device=4 * 22.5 * S * mib, transient=0, host=0)
        assert off.host == 3 * 22.5 * S * mib and off.device == resident.device / 30 * 2
        for a, b in ((int8.device, resident.device), (both.host, off.host), (both.device, off.device)):
            assert 0.5 < a / b < 0.511  # means, scales and pooled keys are the hundredth
        assert int8.transient == resident.device / 30
    assert cache_bytes(cfg, 2160, 3840, kind="int8-offload").host < 24 * 2**30


@pytest.mark.parametrize("kind", ["offload", "int8-offload"])
def test_device_memory_does_not_depend_on_the_layers(kind):
    few, many = (cache_bytes(ModelConfig(layers=n), 768, 768, kind=kind) for n in (10, 30))
    assert few.device == many.device and few.host * 3 == many.host


# ---- errors

def test_errors():
    for make in (OffloadedCache, QuantizedCache):
        with pytest.raises(ValueError, match=f"{make.__name__}: keep=0 slabs"):
            make(128, keep=0)
        for tokens in (0, 3, 200):
            with pytest.raises(ValueError, match=f"{tokens} tokens, must be whole slabs of 128"):
                make(128).update(*[torch.randn(1, 1, tokens, 2)] * 2)
    with pytest.raises(ValueError, match="slab=192 tokens, must be whole blocks of 128"):
        QuantizedCache(192)
    with pytest.raises(ValueError, match="mean='chunk' must be 'slab' or 'first'"):
        QuantizedCache(128, mean="chunk")
    for wrong in (lambda: QuantizedCache(128, block=32), lambda: CacheGroup("int8", block=32)):
        with pytest.raises(ValueError, match="block=32 tokens must be 64 or 128"):
            wrong()
    for call in (lambda: CacheGroup("disk"), lambda: cache_bytes(ModelConfig.nano(), 128, 128, kind="disk")):
        with pytest.raises(ValueError, match="kind='disk' must be one of: resident, offload, int8, int8-offload"):
            call()
    with pytest.raises(RuntimeError, match="nothing was written yet"):
        QuantizedCache(128).quantized()


def test_one_group_serves_one_device():
    group = CacheGroup("offload")
    group.make(2).update(*random_kv(3, 2))
    with pytest.raises(ValueError, match="keys on meta, earlier ones on cpu; one group for each"):
        group.make(2).update(*[torch.empty(1, 1, 2, 2, device="meta")] * 2)


# ---- on a GPU

@pytest.mark.cuda
@pytest.mark.parametrize("kind, same", [("offload", "resident"), ("int8-offload", "int8")])
@pytest.mark.parametrize("prefetch", [True, False])
def test_cuda_off_loaded_is_resident(kind, same, prefetch):
    "Copies beside a computation that takes longer, and one that takes less time than they do; bit for bit."
    slab, heads, d, layers = 66 * 128, 4, 128, 6
    group, resident = CacheGroup(kind, prefetch=prefetch), CacheGroup(same)
    ours, theirs = ([g.make(slab) for _ in range(layers)] for g in (group, resident))
    work, differ = torch.randn(4096, 4096, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    for i in range(14):
        for a, b in zip(ours, theirs):
            new = random_kv(1 if i else 3, slab, heads=heads, d=d, dtype=torch.bfloat16, device="cuda")
            with warnings.catch_warnings(action="error"):  # memory that could not be page-locked is told of by a warning
                got = a.update(*new)
            expected = b.update(*new)
            for _ in range(4 if i % 2 else 0):
                work = work @ work * 1e-3  # attention comes late: what is read must still be there
            differ += sum((x != y).sum() for x, y in zip(got, expected))  # no wait of the host in between
            assert a.order == b.order
    assert differ.item() == 0


@pytest.mark.cuda
def test_cuda_memory_does_not_depend_on_the_layers():
    slab, used = 36 * 128, []
    for layers in (3, 12):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        group = CacheGroup("offload")
        caches = [group.make(slab) for _ in range(layers)]
        for n in (3, 1, 1):
            for cache in caches:
                k, v = cache.update(*random_kv(n, slab, heads=4, d=128, dtype=torch.bfloat16, device="cuda"))
        del k, v
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated() - before)
        said = cache_bytes(ModelConfig(dim=512, heads=4, layers=layers), 768, 768, kind="offload")
        assert abs(used[-1] - said.device) < 2**20
        del caches, cache, group
    assert used[0] == used[1]


@pytest.mark.cuda
def test_cuda_a_dead_stream_leaves_nothing_behind():
    "Its last prefetch may still be on the way when its memory goes to others."
    slab = 66 * 128
    for _ in range(5):
        group = CacheGroup("offload")
        caches = [group.make(slab) for _ in range(4)]
        for n in (3, 1):
            for cache in caches:
                cache.update(*random_kv(n, slab, heads=4, d=128, dtype=torch.bfloat16, device="cuda"))
        del caches, cache, group
        ones = [torch.ones(4, slab * 4 * 128, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
        torch.cuda.synchronize()
        assert all((x == 1).all() for x in ones)
