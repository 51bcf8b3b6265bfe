"The sparge kernels: against plain PyTorch and exact attention, in Triton's interpreter, compiled for every card, on CUDA."
import json
import math
import os
import subprocess
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
pytest.importorskip("triton")
from triton.language import standard  # noqa: E402

if "TRITON_INTERPRET" in os.environ and isinstance(standard.max, sys.modules["triton"].JITFunction):
    pytest.skip("Triton was imported before TRITON_INTERPRET=1: set it in the environment", allow_module_level=True)

import triton  # noqa: E402
from flashvsr_nb import performance, sparge_kernel  # noqa: E402
from flashvsr_nb.attention import attend, attend_reference, backends, expand_mask  # noqa: E402
from flashvsr_nb.small_caches import quantize_blocks  # noqa: E402
from flashvsr_nb.sparge_kernel import (BLOCKS, PreparedKV, prepare_kv, sparge_attention,  # noqa: E402
                                       sparge_attention_prepared, sparge_reference)
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMIT = {"bf16": 0.02, "fp8": 0.05}
pytestmark = pytest.mark.usefixtures("one_thread")


def tokens(lq, lk, b=1, h=1, d=64, dtype=torch.float32):
    "Random q, k, v whose keys share a large common part."
    k = torch.randn(b, h, lk, d) + 3 * torch.randn(b, h, 1, d)
    return [x.to(DEVICE, dtype) for x in (torch.randn(b, h, lq, d), k, torch.randn(b, h, lk, d))]


def random_mask(b, h, lq, lk, block_size, share=0.5):
    "Keeps about `share`; the first query block of all keeps nothing, the last one all."
    mask = torch.rand(b, h, -(-lq // block_size[0]), -(-lk // block_size[1]), device=DEVICE) < share
    mask[0, 0, 0], mask[-1, -1, -1] = False, True
    return mask


def exact(q, k, v, mask=None, block_size=(128, 128), scale=None):
    "Float32 attention, tokens of unfinished blocks too."
    scores = q.float() @ k.float().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~expand_mask(mask, block_size)[:, :, :q.shape[2], :k.shape[2]], -math.inf)
    return scores.softmax(-1).nan_to_num(0) @ v.float()


def error(out, want):
    return ((out.float() - want.float()).norm() / want.float().norm()).item()


CASES = [  # queries, keys, d, block size, more
    (256, 384, 128, (128, 128), {}), (256, 256, 64, (128, 64), {}), (128, 256, 64, (64, 128), {}),
    (200, 300, 64, (128, 128), {}), (130, 70, 64, (64, 128), {}), (100, 190, 64, (128, 64), {}),
    (256, 384, 64, (128, 128), {"skip": 3.0}), (256, 256, 64, (128, 128), {"scale": 0.1}),
    (256, 256, 64, (128, 128), {"pv": "fp8"}), (128, 200, 64, (128, 64), {"pv": "fp8"}),
]


@pytest.mark.parametrize("lq,lk,d,block_size,more", CASES)
def test_kernel_is_what_plain_pytorch_computes(lq, lk, d, block_size, more):
    more = dict(more)
    q, k, v = tokens(lq, lk, b=2, h=2, d=d)
    mask, pv = random_mask(2, 2, lq, lk, block_size), more.pop("pv", "bf16")
    kv = prepare_kv(k, v, pv=pv)
    out = sparge_attention_prepared(q, kv, block_mask=mask, block_size=block_size, **more)
    plain = sparge_reference(q, kv, block_mask=mask, block_size=block_size, **more)
    assert error(out, plain) < (4e-3 if pv == "bf16" else 0.03)  # the rounding of the weights
    if "skip" not in more:
        assert error(out, exact(q, k, v, mask, block_size, more.get("scale"))) < LIMIT[pv]
    assert out.isfinite().all() and out.shape == q.shape
    assert (out[0, 0, :block_size[0]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_and_no_mask(dtype):
    q, k, v = tokens(128, 192, h=2, dtype=dtype)
    out = sparge_attention(q, k, v)
    assert out.dtype == dtype and error(out, exact(q, k, v)) < 0.02


def test_any_strides_give_the_same():
    q, k, v = tokens(128, 256, b=2, h=2)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert not turned[0].is_contiguous()
    torch.testing.assert_close(sparge_attention(*turned), sparge_attention(q, k, v), rtol=0, atol=0)
    spread = [torch.stack([x, -x], -1)[..., 0] for x in (q, k, v)]  # the last dimension is not dense either
    assert spread[0].stride(-1) == 2
    torch.testing.assert_close(sparge_attention(*spread), sparge_attention(q, k, v), rtol=0, atol=0)


def test_inputs_stay_as_they_are():
    q, k, v = tokens(128, 200)
    before = [x.clone() for x in (q, k, v)]
    sparge_attention(q, k, v)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before))


def test_padding_is_never_read_as_keys():
    q, k, v = tokens(128, 130)
    kv = prepare_kv(k - 40, v)  # all scores far from 0, the score of a padded key
    kv.v[:, :, 130:] = 1e4
    assert error(sparge_attention_prepared(q, kv), exact(q, k, v)) < 0.02


def test_smoothing_halves_the_error():
    q, k, v = tokens(128, 512, h=3)
    raw = prepare_kv(k, v, mean=torch.zeros(1, 3, 1, 64, device=DEVICE))
    want = exact(q, k, v)
    assert error(sparge_attention_prepared(q, raw), want) > 2 * error(sparge_attention(q, k, v), want)


def test_a_frozen_mean_makes_slabs_that_fit_together():
    q, k, v = tokens(128, 256)
    mean = k[:, :, :128].mean(2, keepdim=True)
    a, b = (prepare_kv(k[:, :, s], v[:, :, s], mean=mean) for s in (slice(0, 128), slice(128, 256)))
    both = PreparedKV(*(torch.cat([getattr(x, n) for x in (a, b)], 2) for n in ("k", "k_scale")), mean,
                      torch.cat([a.v, b.v], 2), None, 256)
    whole = prepare_kv(k, v, mean=mean)
    assert torch.equal(both.k, whole.k)
    torch.testing.assert_close(sparge_attention_prepared(q, both), sparge_attention_prepared(q, whole))


@settings(max_examples=15)
@given(lk=st.integers(1, 300), d=st.sampled_from([64, 128]), power=st.integers(-20, 4), seed=st.integers(0, 99))
def test_keys_are_quantised_as_plainly(lk, d, power, seed):
    g = torch.Generator().manual_seed(seed)
    k = (torch.randn(1, 2, lk, d, generator=g) * 10.0**power).to(DEVICE)
    k[:, 1] = 0
    kv = prepare_kv(k, k, mean=torch.zeros(1, 2, 1, d, device=DEVICE))
    k8, scale = quantize_blocks(k, 128)
    assert kv.k.shape[2] % 128 == 0 and (kv.k[:, :, lk:] == 0).all()
    torch.testing.assert_close(kv.k_scale, scale)
    assert (kv.k[:, :, :lk].int() - k8.int()).abs().max() <= (1 if DEVICE == "cuda" else 0)


@settings(max_examples=15)
@given(nq=st.integers(1, 4), nk=st.integers(1, 9), share=st.sampled_from([0, 0.3, 1]), seed=st.integers(0, 99))
def test_lists_are_the_kept_columns(nq, nk, share, seed):
    mask = (torch.rand(1, 2, nq, nk, generator=torch.Generator().manual_seed(seed)) < share).to(DEVICE)
    q, k, v = (x[:, :, :n] for x, n in zip(tokens(64 * nq, 128 * nk, h=2), (64 * nq, 128 * nk, 128 * nk)))
    q8, qs, cols, scales, count = sparge_kernel._make_plan(q, prepare_kv(k, v), mask, (64, 128), 1.0, mask.shape)
    assert torch.equal(count, mask.sum(-1, dtype=torch.int32))
    for at in torch.cartesian_prod(torch.arange(2), torch.arange(nq)).tolist():
        kept = mask[0][tuple(at)].nonzero()[:, 0].tolist()
        assert cols[0][tuple(at)][:len(kept)].tolist() == kept
        assert kept or cols[0][tuple(at)][0] == 0


def test_values_come_back_from_fp8():
    v = torch.randn(1, 2, 256, 64, device=DEVICE) * torch.logspace(-6, 3, 64, device=DEVICE)
    v[..., 5] = 0
    kv = prepare_kv(v, v, pv="fp8")
    top = v.abs().amax(2, keepdim=True)
    assert ((sparge_kernel._plain_values(kv) - v).abs() <= v.abs() / 15 + top / 2**16).all()


def test_the_registry_knows_it():
    q, k, v = tokens(128, 128, d=32)
    assert backends["sparge"].fn is sparge_attention and not backends["sparge"].exact
    assert backends["sparge"].block_sizes == BLOCKS
    with pytest.raises((ValueError, RuntimeError), match="64 or 128|needs CUDA"):
        attend(q, k, v, backend="sparge")


@pytest.mark.parametrize("change,said", [
    (lambda q, k, v: sparge_attention(q[..., :48], k[..., :48], v[..., :48]), "takes 64 or 128"),
    (lambda q, k, v: sparge_attention(q, k, v, pv="int8"), "bf16 or fp8"),
    (lambda q, k, v: sparge_attention(q, k, v, block_size=(128, 32)), "must be one of"),
    (lambda q, k, v: sparge_attention(q, k, v, scale=-0.1), "must not be negative"),
    (lambda q, k, v: sparge_attention(q, k, v, block_mask=torch.ones(1, 1, 1, 3).bool()), r"must be torch.bool \(1, 1, 1, 2\)"),
    (lambda q, k, v: sparge_attention(q, k, v, block_mask=torch.ones(1, 1, 1, 2)), "torch.float32"),
    (lambda q, k, v: sparge_attention_prepared(q.repeat(1, 2, 1, 1), prepare_kv(k, v)), "alike"),
    (lambda q, k, v: prepare_kv(k, v[:, :, :-1]), "k and v"),
    (lambda q, k, v: sparge_attention(q.requires_grad_(), k, v), "no gradients"),
    (lambda q, k, v: sparge_attention(q, k, v.requires_grad_()), "no gradients"),
    (lambda q, k, v: prepare_kv(k, v, mean=torch.zeros(1, 2, 1, 64)), "mean"),
])
def test_what_does_not_fit_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        change(*tokens(128, 256))


def test_benchmark_needs_a_gpu_and_whole_blocks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="needs a CUDA device"):
        performance.attention_table()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="multiples of 128 tokens, given 100"):
        performance.attention_table(((100, 256),))


def test_error_of_the_benchmark_sees_what_is_wrong():
    q, k, v = tokens(128, 256, h=2)
    want = attend_reference(q, k, v)
    assert performance._relative_error(want, q, k, v, None) < 1e-5
    half = want.clone()
    half[:, :, ::2] = math.nan
    assert math.isnan(performance._relative_error(half, q, k, v, None))


# ---- every architecture: compiled here, without a GPU, in an interpreter of Python without TRITON_INTERPRET

BUILD = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from flashvsr_nb import sparge_kernel
capability, warps, stages = map(int, sys.argv[1:])
fixed = dict(BM=128, BN=64, D=128, BK=128, FP8=False, TAIL=False, SKIP=False, WIDE=False, STAGES=stages)
kinds = dict(Q8="*i8", QS="*fp32", K8="*i8", V="*bf16", VS="*fp32", COLS="*i32", SCALES="*fp32", COUNT="*i32", OUT="*bf16",
             skip="fp32", tokens="i32", keys="i32", padded="i32", nq="i32", nk="i32")
aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kinds) if n.isupper() or n[-1].isdigit() or n == "padded"}
source = ASTSource(fn=sparge_kernel._attend, signature=kinds | {n: "constexpr" for n in fixed}, constexprs=fixed,
                   attrs=aligned)
built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(num_warps=warps, num_stages=stages))
ptx = built.asm["ptx"]
int8 = ".s32.s8.s8" in ptx or "kind::i8" in ptx
print(json.dumps({"shared": built.metadata.shared, "int8": int8, "async": ptx.count("cp.async.c")}))
"""

BUILD_HOPPER = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from flashvsr_nb.hopper_kernel import RINGS, _hopper, gl
def tile(kind, rows, dtype):
    return f"tensordesc<{kind}[{rows}, 128],{gl.NVMMASharedLayout.get_default_for([rows, 128], dtype)!r}>"
kinds = dict(q_desc=tile("i8", 64, gl.int8), k_desc=tile("i8", 128, gl.int8), v_desc=tile("bf16", 128, gl.bfloat16),
             QS="*fp32", VS="*fp32", COLS="*i32", SCALES="*fp32", COUNT="*i32", OUT="*bf16", tokens="i32", padded="i32",
             nq="i32", nk="i32", RING="constexpr")
aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kinds) if n.isupper() and n != "RING" or n == "padded"}
source = GluonASTSource(fn=_hopper, signature=kinds, constexprs=dict(RING=RINGS[128]), attrs=aligned)
built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4))
ptx = built.asm["ptx"]
print(json.dumps({"shared": built.metadata.shared, "int8": ptx.count("wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8"),
                  "copies": ptx.count("cp.async.bulk.tensor")}))
"""


def build(code, *arguments):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=env, text=True, stdout=subprocess.PIPE,
                          check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_builds_for_every_architecture(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: divmod(capability, 10))
    warps, stages = sparge_kernel._tuning.__wrapped__(torch.device("cuda"))
    built = build(BUILD, capability, warps, stages)
    assert built["int8"], "the scores must be native INT8 products"
    assert built["async"] >= 10, "tiles must be fetched ahead"
    assert built["shared"] <= 99 * 1024, "must fit the smallest card"


def test_the_hopper_kernel_builds():
    built = build(BUILD_HOPPER)
    assert built["int8"] and built["copies"] and built["shared"] <= 227 * 1024


def test_a_triton_without_the_hopper_kernel_is_said_once_and_done_without(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(sparge_kernel, "_try_hopper", lambda device: 1 / 0)
    with pytest.warns(UserWarning, match="does not take the Hopper kernel .ZeroDivisionError"):
        assert not sparge_kernel._on_hopper.__wrapped__(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert not sparge_kernel._on_hopper.__wrapped__(torch.device("cuda"))


def test_hopper_gets_a_whole_plan(monkeypatch):
    def attend_hopper(q8, qs, cols, scales, count, kv, out, bk):
        assert (q8.shape[2] == qs.shape[2] == 256 and cols.shape == scales.shape == (1, 1, 2, 2)
                and count.tolist() == [[[2, 2]]] and kv.k.shape == out.shape and bk == 128)
        return out
    monkeypatch.setattr("flashvsr_nb.hopper_kernel.attend_hopper", attend_hopper)
    assert sparge_kernel._try_hopper(torch.device(DEVICE)).shape == (1, 1, 256, 128)


# ---- on CUDA

@pytest.mark.cuda
@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("pv", ["bf16", "fp8"])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("block_size", BLOCKS)
def test_on_cuda(block_size, d, pv, general, monkeypatch):
    if pv == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8")
    if general:
        monkeypatch.setattr(sparge_kernel, "_on_hopper", lambda device: False)
    for lq, lk in (512, 1024), (500, 1024), (500, 1000):
        q, k, v = tokens(lq, lk, b=2, h=3, d=d, dtype=torch.bfloat16)
        mask = random_mask(2, 3, lq, lk, block_size)
        out = sparge_attention(q, k, v, block_mask=mask, block_size=block_size, pv=pv)
        assert out.isfinite().all() and (out[0, 0, :block_size[0]] == 0).all()
        assert error(out, exact(q, k, v, mask, block_size)) < LIMIT[pv]


@pytest.mark.cuda
def test_no_host_sync():
    q, k, v = tokens(256, 512, dtype=torch.bfloat16)
    kv, mask = prepare_kv(k, v), random_mask(1, 1, 256, 512, (128, 128))
    sparge_attention_prepared(q, kv, block_mask=mask)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sparge_attention_prepared(q, kv, block_mask=mask)
        prepare_kv(k, v)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_benchmark_runs():
    table = performance.attention_table(((512, 1024),), (0.5, 1.0), heads=2, repeats=2)
    assert {"flex", "sparge", "sdpa cudnn"} <= {r["name"] for r in table["rows"]}
    assert [r for r in table["rows"] if not r["error"] <= LIMIT["fp8" if "fp8" in r["name"] else "bf16"]] == []
    assert triton.__version__ in performance.table_text(table)
