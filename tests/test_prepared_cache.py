"The prepared cache: fused against plain, slabs against preparing anew, streams with and without it."
import os
import sys
from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
pytest.importorskip("triton")
from triton.language import standard  # noqa: E402

if "TRITON_INTERPRET" in os.environ and isinstance(standard.max, sys.modules["triton"].JITFunction):
    pytest.skip("Triton was imported before TRITON_INTERPRET=1: set it in the environment", allow_module_level=True)

from flashvsr_nb.attention import LCSA, attend, backends  # noqa: E402
from flashvsr_nb.dit import ModelConfig, RMSNorm  # noqa: E402
from flashvsr_nb.kv_cache import KVCache  # noqa: E402
from flashvsr_nb.lean_stream import LeanStream  # noqa: E402
from flashvsr_nb.mask_policies import mask_policy  # noqa: E402
from flashvsr_nb.patching import rope_table, window_partition  # noqa: E402
from flashvsr_nb.pipeline import FlashVSR  # noqa: E402
from flashvsr_nb.prepared_cache import PreparedCache, norm_and_turn, turn_queries  # noqa: E402
from flashvsr_nb.sparge_kernel import prepare_kv  # noqa: E402
from flashvsr_nb.streaming import Stream  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from test_sparge_kernel import build  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("one_thread")


def error(out, want):
    return ((out.float() - want.float()).norm() / want.float().norm()).item()


def projected(frames, h, w, *, heads=2, d=64, dtype=torch.float32, f0=0):
    "Keys (heads share a token, as a projection gives them), values, their norm and rotary positions."
    norm = RMSNorm(heads * d).requires_grad_(False)
    norm.weight.copy_(torch.rand(heads * d) + 0.5)
    k = torch.randn(2, frames * h * w, heads * d) + 2 * torch.linspace(-1, 1, heads * d)
    k, v = (x.to(DEVICE, dtype).unflatten(-1, (heads, d)).transpose(1, 2) for x in (k, torch.randn_like(k).bfloat16()))
    return k, v, norm.to(DEVICE, dtype), rope_table((frames, h, w), d, f0=f0, device=DEVICE)


def in_windows(x, size):
    "(B,heads,tokens,d) row by row -> in window order."
    return window_partition(x.movedim(1, 2).unflatten(1, size).flatten(4)).unflatten(2, x.shape[1::2]).movedim(2, 1)


@settings(max_examples=10)
@given(chunks=st.lists(st.integers(1, 3), min_size=1, max_size=5), keep=st.integers(1, 3), seed=st.integers(0, 99))
def test_a_cache_holds_what_preparing_anew_would(chunks, keep, seed):
    torch.manual_seed(seed)
    cache, slabs = PreparedCache(128, keep=keep), []
    for n in chunks:
        k, v = torch.randn(2, 1, 2, 128 * n, 64, device=DEVICE)
        kv = cache.write(k + 3, v)
        slabs += zip((k + 3).split(128, 2), v.split(128, 2))
        assert {*range(len(slabs) - n - min(keep, len(slabs) - n), len(slabs))} <= {*cache.order}
        whole, v = (torch.cat([slabs[s][i] for s in cache.order], 2) for i in (0, 1))
        anew = prepare_kv(whole, v, mean=cache.mean)
        assert kv.tokens == anew.tokens and kv.shape == whole.shape and kv.k.is_contiguous() and kv.v.is_contiguous()
        for name in ("k", "k_scale", "v"):
            want = getattr(anew, name)
            assert torch.equal(getattr(kv, name)[:, :, :want.shape[2]], want)
        for block in (64, 128):
            torch.testing.assert_close(kv.pool(block), whole.unflatten(2, (-1, block)).mean(3))
        assert all(error(x, y) < 0.02 for x, y in zip(kv.dequantize(), (whole, v)))


CASES = [((16, 16), True, torch.float32, 64), ((16, 8), False, torch.float16, 128), ((8, 8), True, torch.float16, 64)]
CASES += [pytest.param((16, 24), raster, torch.bfloat16, 128, marks=pytest.mark.cuda) for raster in (False, True)]


@pytest.mark.parametrize("size,raster,dtype,d", CASES)
def test_fused_writing_is_plain_writing(size, raster, dtype, d):
    slab = 2 * size[0] * size[1]
    fused, plain = PreparedCache(slab, keep=2), PreparedCache(slab, keep=2)
    for f0, frames in ((0, 4), (4, 2), (6, 2)):
        shape = (frames, *size) if raster else None
        k, v, norm, rope = projected(frames, *size, d=d, dtype=dtype, f0=f0)
        got = fused.write_projected(k, v, norm=norm, rope=rope, size=shape)
        want = plain.write(norm_and_turn(k, norm, rope, size=shape), in_windows(v, shape) if raster else v)
        wrong = (got.k.int() - want.k.int()).abs()
        assert wrong.max() <= 1 and (wrong > 0).float().mean() < (1e-5 if dtype == torch.float32 else 0.01)
        assert torch.equal(got.v, want.v) and got.tokens == want.tokens and fused.order == plain.order
        for name in ("k_scale", "mean", "pooled"):
            close = dict(rtol=0.01, atol=torch.finfo(dtype).eps)
            torch.testing.assert_close(getattr(got, name), getattr(want, name), **close)
        q = norm_and_turn(k, norm, rope)
        torch.testing.assert_close(turn_queries(k, norm, rope), q, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_writing_projections_has_no_gradients():
    k, v, norm, rope = projected(2, 8, 8)
    with pytest.raises(ValueError, match="no gradients"):
        PreparedCache(128).write_projected(k.requires_grad_(), v, norm=norm, rope=rope)


@pytest.mark.parametrize("block_size", [(128, 128), (128, 64)])
def test_masks_from_noted_means_are_those_from_keys(block_size):
    k, v, norm, rope = projected(4, 16, 16)
    q = norm_and_turn(k, norm, rope)
    kv = PreparedCache(512).write(q, v)
    rule = LCSA(key_blocks=2, local_range=3, block_size=block_size)
    assert torch.equal(rule(q, kv, grid=(2, 2)), rule(q, q, grid=(2, 2)))


def test_another_back_end_refuses_prepared_keys():
    k, v, norm, rope = projected(2, 8, 8)
    kv = PreparedCache(128).write(k, v)
    with pytest.raises(ValueError, match="'sdpa' takes no PreparedKV"):
        attend(k, kv, kv, backend="sdpa")


class Requantising(KVCache):
    "Not the back end's own: its keys are quantised at every use."


@pytest.fixture
def sparge(monkeypatch):
    "The back end, on this device too."
    monkeypatch.setitem(backends.data, "sparge", replace(backends["sparge"], devices=None))


@pytest.fixture(scope="module")
def nano():
    return FlashVSR.from_pretrained("nano", device=DEVICE, dtype=torch.float32)


def two_chunks(stream):
    lq = torch.rand(1, 3, 33, 128, 128, generator=torch.Generator().manual_seed(0)).to(DEVICE) * 2 - 1
    with torch.inference_mode():
        return torch.cat([stream.denoise(lq[:, :, :25]), stream.denoise(lq[:, :, 25:])], 2)


@pytest.mark.parametrize("mask", ["lcsa", "sparge"])
def test_streams_agree_and_quantise_once(sparge, nano, mask):
    options = dict(backend="sparge", policy=mask_policy(mask, nano.cfg))
    stream = Stream(nano, **options)
    once = two_chunks(stream)
    assert all(type(c) is PreparedCache for c in stream.caches)
    assert 0.75 < stream.cache_bytes / (len(stream.caches) * 4 * 128 * nano.cfg.dim * 4) < 0.85  # of bfloat16's
    again = two_chunks(Stream(nano, cache=Requantising, **options))
    exact = two_chunks(Stream(nano, policy=options["policy"]))
    for part in (slice(0, 6), slice(0, 8)):  # the first chunk's keys have the same mean either way, later ones do not
        a, b, c = (x[:, :, part] for x in (once, again, exact))
        assert error(a, b) < error(b, c) < 1e-2 and error(a, c) < 1.2 * error(b, c)


def test_a_lean_stream_takes_them_along(sparge, nano):
    lq = torch.rand(1, 3, 33, 128, 128, generator=torch.Generator().manual_seed(0)).to(DEVICE) * 2 - 1
    stream = LeanStream(nano, backend="sparge")
    with torch.inference_mode():
        first = stream.denoise(lq[:, :, :25])
        assert all(type(c) is PreparedCache for c in stream.caches)
        stream.change(kind="offload")
        moved = torch.cat([first, stream.denoise(lq[:, :, 25:])], 2)
    assert error(moved, two_chunks(Stream(nano, backend="sparge"))) < 5e-3


BUILD = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from flashvsr_nb import prepared_cache
kinds = dict.fromkeys(("X", "K", "V", "WEIGHT", "VALUES"), "*bf16") | {"K8": "*i8", "eps": "fp32"}
shared = []
for name, fixed in ("_inverse_rms", dict(ROWS=16)), ("_turn", dict(ROWS=64)), ("_write", dict(RASTER=True)):
    kernel, fixed = getattr(prepared_cache, name), fixed | dict(D=128)
    signature = {n: kinds.get(n, "*fp32" if n.isupper() else "i32") for n in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature | dict.fromkeys(fixed, "constexpr"), constexprs=fixed)
    built = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=dict(num_warps=8))
    shared.append(built.metadata.shared)
print(max(shared))
"""


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_builds_for_every_architecture(capability):
    assert build(BUILD, capability) <= 48 * 1024, "bytes of shared memory that every card has"


@pytest.mark.cuda
def test_writing_never_waits():
    k, v, norm, rope = projected(4, 16, 16, dtype=torch.bfloat16)
    cache = PreparedCache(512)
    cache.write_projected(k, v, norm=norm, rope=rope)
    torch.cuda.set_sync_debug_mode("error")
    try:
        cache.write_projected(k, v, norm=norm, rope=rope)
        turn_queries(k, norm, rope)
    finally:
        torch.cuda.set_sync_debug_mode("default")
