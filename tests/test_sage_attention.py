"INT8 attention: quantisation against loops, errors against exact attention, and every guard around the package."
import importlib
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import Largest
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from flashvsr_nb.attention import attend, attend_reference, backends, expand_mask
from flashvsr_nb.pipeline import FlashVSR
from flashvsr_nb.sage_attention import (BACKEND, GROUPS, _fit_half, _whole, quantize_tokens, sage, sage_package,
                                        sage_reference)

few = settings(max_examples=25)
close = torch.testing.assert_close
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def error(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def striped(lq=256, lk=512, d=128, heads=2, size=3, b=1):
    "Keys with a constant of their own per head and channel."
    q, k, v = torch.randn(b, heads, lq, d), torch.randn(b, heads, lk, d), torch.randn(b, heads, lk, d)
    return q, k + size * torch.randn(b, heads, 1, d), v


def random_mask(b=1, heads=2, nq=2, nk=4, share=0.5):
    return torch.rand(b, heads, nq, nk) < share


@pytest.fixture(params=[1, 2], ids=["v1", "v2"])
def package(request, monkeypatch):
    "`import sageattention` gives a stand-in for the package; `calls` lists the shapes of q and k."
    monkeypatch.syspath_prepend(Path(__file__).parent / "stand_ins")
    monkeypatch.delitem(sys.modules, "sageattention", raising=False)
    module = importlib.import_module("sageattention")
    if request.param == 2:
        monkeypatch.delitem(sys.modules, "sageattention2", raising=False)
        module = importlib.import_module("sageattention2")
    monkeypatch.setitem(sys.modules, "sageattention", module)
    inner, module.calls, module.version = module.sageattn, [], request.param

    def sageattn(q, k, v, **kw):
        module.calls.append((tuple(q.shape), tuple(k.shape)))
        return inner(q, k, v, **kw)
    monkeypatch.setattr(module, "sageattn", sageattn)
    module.inner = inner
    yield module
    sys.modules.pop("sageattention2", None)


def seen_by(package, *tensors):
    "What reaches the kernel of float32 tensors: version 2 takes 16 bits only."
    return [x.bfloat16() if package.version == 2 and x.dtype == torch.float32 else x for x in tensors]


# ---- quantisation

@few
@given(group=st.sampled_from(sorted({g for pair in GROUPS.values() for g in pair})), tokens=st.integers(1, 150),
       d=st.integers(1, 9), seed=st.integers(0, 99))
def test_tokens_share_scales_as_written(group, tokens, d, seed):
    x = torch.randn(2, 2, tokens, d, generator=torch.Generator().manual_seed(seed))
    codes, scale = quantize_tokens(x, group)
    assert codes.dtype == torch.int8 and codes.shape == x.shape and scale.shape == (2, 2, tokens)
    n, groups, m = group
    number = [t // (n * groups * m) * groups + t // m % groups for t in range(tokens)]
    for g in set(number):
        member = [t for t in range(tokens) if number[t] == g]
        close(scale[:, :, member], (x[:, :, member].abs().amax((2, 3)) / 127)[..., None].expand(-1, -1, len(member)))
    assert ((codes * scale[..., None] - x).abs() <= scale[..., None] * 0.5001).all()


def test_groups_are_those_of_the_hardware():
    "A thread of a matrix instruction holds rows 0, 8, 16, 24 and columns 0, 1, 8, 9, …"
    x = torch.ones(1, 1, 128, 1)
    for name, side, together in (("block", 0, range(128)), ("block", 1, range(64)), ("warp", 0, range(32)),
                                 ("thread", 0, (0, 8, 16, 24)), ("token", 0, (0,)),
                                 ("thread", 1, [8 * i + j for i in range(8) for j in (0, 1)])):
        y = x.clone()
        y[:, :, 0] = 2
        _, scale = quantize_tokens(y, GROUPS[name][side])
        assert (scale[0, 0] > 1.5 / 127).nonzero().flatten().tolist() == [*together]


# ---- the definition

@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("pv, bound", [("fp16", 0.02), ("bf16", 0.02), ("fp8", 0.05)])
def test_promised_errors(groups, pv, bound):
    q, k, v = striped(heads=4)
    mask = random_mask(1, 4, 2, 4)
    mask[0, 1, 1] = False
    for block_mask in (None, mask):
        out = sage_reference(q, k, v, block_mask=block_mask, groups=groups, pv=pv)
        assert error(out, attend_reference(q, k, v, block_mask=block_mask)) <= bound
    assert not out[0, 1, 128:].any() and out.isfinite().all()


def test_smoothing_halves_the_error():
    gains = []
    for _ in range(6):
        q, k, v = striped(heads=4)
        exact = attend_reference(q, k, v)
        gains.append(error(sage_reference(q, k, v, smooth=False), exact) / error(sage_reference(q, k, v), exact))
    assert sum(gains) / 6 > 2 and min(gains) > 1.7


def test_what_all_keys_share_is_not_noticed():
    q, k, v = striped(size=0)
    far = k + 50 * torch.randn(1, 2, 1, 128)
    close(sage_reference(q, far, v), sage_reference(q, k, v), atol=2e-3, rtol=0)
    assert error(sage_reference(q, far, v, smooth=False), attend_reference(q, k, v)) > 0.1


@few
@given(lq=st.integers(1, 70), lk=st.integers(1, 130), d=st.integers(1, 40), groups=st.sampled_from(sorted(GROUPS)),
       pv=st.sampled_from(["fp16", "bf16", "fp8"]), scale=st.sampled_from([None, 0.0, 0.3]), seed=st.integers(0, 99))
def test_any_length_and_width(lq, lk, d, groups, pv, scale, seed):
    torch.manual_seed(seed)
    q, k, v = striped(lq, lk, d)
    out = sage_reference(q, k, v, groups=groups, pv=pv, scale=scale)
    assert (out - attend_reference(q, k, v, scale=scale)).abs().max() < 0.15 * v.abs().max()


@few
@given(nq=st.integers(1, 3), nk=st.integers(1, 4), block_size=st.sampled_from([(4, 4), (4, 2), (2, 3), (128, 64)]),
       share=st.sampled_from([0, 0.4, 1]), seed=st.integers(0, 99))
def test_masks_are_honoured(nq, nk, block_size, share, seed):
    "The masked result is that of the unmasked one with the weights of dropped keys taken out: values say who was read."
    torch.manual_seed(seed)
    q, k, _ = striped(nq * block_size[0], nk * block_size[1], nk * block_size[1])
    mask = random_mask(1, 2, nq, nk, share)
    eye = torch.eye(k.shape[2]).expand(1, 2, -1, -1)
    read = sage_reference(q, k, eye, block_mask=mask, block_size=block_size)
    want = attend_reference(q, k, eye, block_mask=mask, block_size=block_size)
    assert not read[~expand_mask(mask, block_size)].any()
    close(read, want, atol=0.1, rtol=0)
    close(read.sum(-1), expand_mask(mask, block_size).any(-1).float(), atol=2e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types(dtype):
    q, k, v = (x.to(dtype) for x in striped())
    out = sage_reference(q, k, v)
    assert out.dtype == dtype and error(out, attend_reference(q.float(), k.float(), v.float())) <= 0.02


@pytest.mark.parametrize("pv", ["fp16", "bf16", "fp8"])
@pytest.mark.parametrize("change", [lambda q, k, v: (q * 0, k, v), lambda q, k, v: (q, k * 0, v),
                                    lambda q, k, v: (q, k * 0 + 7, v), lambda q, k, v: (q, k, v * 0),
                                    lambda q, k, v: (q, k, v * 1e6), lambda q, k, v: (q * 1e3, k * 1e3, v),
                                    lambda q, k, v: (q, k, v * 1e-9)])
def test_never_nan(change, pv):
    q, k, v = change(*striped(64, 96))
    out = sage_reference(q, k, v, pv=pv)
    assert out.isfinite().all()
    assert error(sage_reference(q, k, v * 0 + 3, pv=pv), torch.full_like(q, 3)) < 0.03


@pytest.mark.parametrize("pv", ["fp16", "bf16", "fp8"])
def test_values_alike_come_back_exactly(pv):
    q, k, v = striped(64, 96)
    v = v[:, :, :1].bfloat16().float().expand_as(v)  # a constant per channel
    close(sage_reference(q, k, v, pv=pv, scale=0.0), v[:, :, :64], rtol=1e-6, atol=0)


def test_inputs_stay_as_they_are():
    q, k, v = striped()
    before = [x.clone() for x in (q, k, v)]
    sage_reference(q, k, v, block_mask=random_mask())
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), before))


def test_memory_is_one_row_of_blocks():
    q, k, v = striped(1024, 1024, 16)
    with Largest() as seen:
        sage_reference(q, k, v)
    assert seen.elements == 2 * 128 * 1024


@pytest.mark.parametrize("given, said", [(dict(groups="row"), "groups='row' is unknown; choose from block, warp, "),
                                         (dict(pv="int4"), "pv='int4' is unknown; choose from fp16, bf16, fp8")])
def test_definition_refuses(given, said):
    with pytest.raises(ValueError, match=said):
        sage_reference(*striped(8, 8, 8), **given)


@few
@given(power=st.floats(-8, 30), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_values_fit_half_precision(power, dtype):
    v = (torch.randn(2, 3, 64, 8) * 2**power).to(dtype)
    small, s = _fit_half(v)
    assert torch.equal(small * s, v) and s.shape == (2, 3, 1, 1) and torch.equal(s.log2(), s.log2().round())
    assert (small.float().abs().amax((2, 3)) <= 1000).all() and (s >= 1).all()
    assert ((s == 1) | (small.float().abs().amax((2, 3), keepdim=True) > 499)).all()  # no more than needed


# ---- the package: what it gets wrong alone, and not through us

@pytest.mark.parametrize("package", [1], indirect=True)
def test_the_stand_in_is_as_wrong_as_the_package(package):
    "Without these faults the tests below would prove nothing."
    q, k, v = striped()
    assert error(package.inner(q, k.clone(), v), attend_reference(q, k, v)) < 0.02  # right for 512 keys
    assert error(package.inner(q, k[:, :, :100].clone(), v[:, :, :100]),
                 attend_reference(q, k[:, :, :100], v[:, :, :100])) > 0.1
    mine = k.clone()
    package.inner(q, mine, v)
    assert (mine - k).abs().max() > 3
    assert not package.inner(q, k.clone(), 1e5 * v).isfinite().all()
    masked = package.inner(q, k.clone(), v, attn_mask=torch.zeros(256, 512, dtype=torch.bool))
    close(masked, package.inner(q, k.clone(), v))
    with pytest.raises(AssertionError):
        package.inner(q[..., :80], k[..., :80].clone(), v[..., :80])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("d", [128, 96, 64, 40, 100])
def test_package_is_the_definition(package, dtype, d):
    q, k, v = (x.to(dtype) for x in striped(d=d))
    out = sage_package(q, k, v)
    assert out.dtype == dtype and out.shape == q.shape
    assert error(out, sage_reference(*seen_by(package, q, k, v))) < 0.008
    assert error(out, attend_reference(q, k, v)) <= 0.02
    close(sage_package(q, k, v, scale=0.0), v.float().mean(2, keepdim=True).expand_as(q).to(dtype), atol=0.01, rtol=0)


@pytest.mark.parametrize("block_size", [(128, 128), (128, 64), (64, 128)])
def test_package_honours_masks(package, block_size):
    q, k, v = striped(b=2)
    before = [x.clone() for x in (q, k, v)]
    mask = random_mask(2, 2, 256 // block_size[0], 512 // block_size[1])
    mask[0, 1, 1], mask[1, 0, 0] = False, True
    out = sage_package(q, k, v, block_mask=mask, block_size=block_size)
    assert error(out, attend_reference(q, k, v, block_mask=mask, block_size=block_size)) <= 0.02
    if block_size[0] == 128:  # 64 queries on their own have a finer scale than the definition's
        definition = sage_reference(*seen_by(package, q, k, v), block_mask=mask, block_size=block_size)
        assert error(out, definition) < (0.008 if package.version == 1 else 0.015)  # 2.x smooths the kept keys again
    assert not out[0, 1, block_size[0]:2 * block_size[0]].any()
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), before))
    assert sum(q[0] * k[2] for q, k in package.calls) == mask.sum() * block_size[1]  # the kept keys and no others
    close(sage_package(q, k, v, block_mask=mask, block_size=block_size, budget=1), out, atol=0.02, rtol=0)


def test_package_masks_that_drop_all_or_nothing(package):
    q, k, v = striped()
    full = torch.ones(1, 2, 2, 4, dtype=torch.bool)
    assert torch.equal(sage_package(q, k, v, block_mask=full), sage_package(q, k, v))
    assert package.calls == [((1, 2, 256, 128), (1, 2, 512, 128))] * 2  # nothing was copied
    assert not sage_package(q, k, v, block_mask=~full).any() and len(package.calls) == 2


def test_package_leaves_the_caller_s_tensors(package):
    cache = torch.randn(3, 1, 2, 512, 128)  # as a ring buffer hands them out: views
    before = cache.clone()
    sage_package(*cache.unbind(0))
    sage_package(cache[0, :, :, :256], cache[1], cache[2], block_mask=random_mask())
    assert torch.equal(cache, before)


@pytest.mark.parametrize("size", [1e3, 1e5, 1e30])
@pytest.mark.parametrize("mask", [None, torch.tensor([[True, False, True, True], [False, True, False, False]])])
def test_package_with_large_values(package, size, mask):
    q, k, v = striped()
    mask = None if mask is None else mask.expand(1, 2, 2, 4)
    exact = attend_reference(q, k, v, block_mask=mask)
    v = torch.cat([size * v[:, :1], v[:, 1:]], 1)  # one head only; the other must not suffer
    out = sage_package(q, k, v, block_mask=mask)
    assert out.isfinite().all()
    assert error(out[:, 0] / size, exact[:, 0]) <= 0.02 and error(out[:, 1], exact[:, 1]) <= 0.02
    out = sage_package(q.bfloat16(), k.bfloat16(), v.bfloat16(), block_mask=mask)
    assert error(out[:, 0] / size, exact[:, 0]) < 0.03


def test_package_counts_no_phantoms(package):
    "Version 1 counts keys up to a multiple of 64; version 2 does not."
    q, k, v = striped(lk=100)
    if package.version == 1:
        with pytest.raises(ValueError, match="100 keys; the installed sageattention is right for multiples of 64 only"):
            sage_package(q, k, v)
        q, k, v = striped(128, 96)
        with pytest.raises(ValueError, match="blocks of 32 keys; the installed sageattention"):
            sage_package(q, k, v, block_mask=random_mask(1, 2, 1, 3), block_size=(128, 32))
        assert not package.calls
    else:
        assert error(sage_package(q, k, v), attend_reference(q, k, v)) <= 0.02


@pytest.mark.parametrize("capability, v1, v2", [((8, 0), 64, 1), ((9, 0), 64, 128), ((12, 0), 64, 1)])
def test_whole_numbers_of_keys(package, monkeypatch, capability, v1, v2):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert _whole(package, CUDA) == (v1 if package.version == 1 else v2)
    assert _whole(package, CPU) == (64 if package.version == 1 else 1)


def test_package_refuses_wide_heads(package):
    with pytest.raises(ValueError, match="heads of width d=160; the package sageattention takes up to 128"):
        sage_package(*striped(64, 64, 160))


def test_views_of_any_layout(package):
    x = torch.randn(1, 256, 2, 3 * 64)  # (B, tokens, heads, 3*d), as one linear layer gives q, k and v
    q, k, v = x.transpose(1, 2).chunk(3, -1)
    assert error(sage_package(q, k, v), attend_reference(q, k, v)) <= 0.02
    q, k, v = (t.mT.contiguous().mT for t in (q, k, v))  # the last axis is not the fastest
    assert error(sage_package(q, k, v), attend_reference(q, k, v)) <= 0.02


# ---- the back end

def test_registered_and_used():
    q, k, v = striped()
    mask = random_mask()
    assert backends["sage"] is BACKEND and not BACKEND.exact
    assert torch.equal(attend(q, k, v, block_mask=mask, scale=0.1, backend="sage"),
                       sage_reference(q, k, v, block_mask=mask, scale=0.1))
    with pytest.raises(ValueError, match="takes dtype .*given torch.float64"):
        attend(q.double(), k.double(), v.double(), backend="sage")
    with pytest.raises(ValueError, match="takes heads of width d = 1 to 128, given 130"):
        attend(*striped(8, 8, 130), backend="sage")
    with pytest.raises(ValueError, match="takes masks of block_size .128, 128. or .*given .4, 4."):
        attend(*striped(8, 16, 8), block_mask=random_mask(), block_size=(4, 4), backend="sage")


def test_a_clip_through_nano():
    "Nano's pictures hardly depend on its latents; their own error is the notebook's matter."
    clip = (torch.rand(5, 16, 16, 3) * 255).byte().numpy()
    exact, rounded = (FlashVSR.from_pretrained("nano", device="cpu", attention=name).upscale(clip, progress=False)
                      for name in ("sdpa", "sage"))
    assert rounded.shape == (5, 64, 64, 3) and abs(rounded.astype(int) - exact).max() <= 2


def test_gradients_are_refused():
    q, k, v = striped(8, 8, 8)
    for x in (q, k, v):
        x.requires_grad_()
        with pytest.raises(ValueError, match="sage: INT8 has no gradients; train with back end sdpa"):
            attend(q, k, v, backend="sage")
        with torch.no_grad():
            assert sage(q, k, v).isfinite().all()
        x.requires_grad_(False)


@pytest.mark.parametrize("fault, said", [
    (None, "needs the package sageattention: pip install sageattention==1.0.6"),
    ("import triton_that_is_missing", "needs the package triton_that_is_missing: pip install triton_that_is_missing"),
    ("raise ImportError('undefined\\nsymbol')", "sageattention cannot be loaded: undefined symbol"),
    ("raise OSError('libcuda.so')", "sageattention cannot be loaded: libcuda.so"), ("", None)])
def test_doctor_learns_why(monkeypatch, tmp_path, fault, said):
    if fault is None:
        monkeypatch.setitem(sys.modules, "sageattention", None)
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("sageattention")
    else:
        monkeypatch.delitem(sys.modules, "sageattention", raising=False)
        (tmp_path / "sageattention.py").write_text(fault)
        monkeypatch.syspath_prepend(tmp_path)
    assert BACKEND.unusable(CUDA) == said
    assert BACKEND.unusable(CPU) is None
    sys.modules.pop("sageattention", None)


INTERPRETED = """
import torch, sageattention
from flashvsr_nb.attention import attend_reference
from flashvsr_nb.sage_attention import sage_package, sage_reference
from test_sage_attention import error, striped
torch.manual_seed(0)
q, k, v = striped(128, 256, 64, heads=1)
before, mask = k.clone(), torch.tensor([[[[True, False]]]])
print(error(sage_package(q, k, v), sage_reference(q, k, v)),
      error(sage_package(q, k, v, block_mask=mask), sage_reference(q, k, v, block_mask=mask)),
      error(sage_package(q, k, 1e5 * v) / 1e5, attend_reference(q, k, v)), (k - before).abs().max().item())
alone, short, mine = sageattention.sageattn, (k[:, :, :100], v[:, :, :100]), k.clone()
print(error(alone(q, short[0].clone(), short[1]), attend_reference(q, *short)) > 0.1,
      torch.equal(alone(q, k.clone(), v, attn_mask=mask), alone(q, mine, v)), bool((mine - k).abs().max() > 1),
      not alone(q, k.clone(), 1e5 * v).isfinite().all())
"""


@pytest.mark.skipif(not (find_spec("sageattention") and find_spec("triton")), reason="needs sageattention and triton")
def test_the_real_package_interpreted():
    "On a CPU, by Triton's interpreter; -O, because the package asserts that it is given CUDA tensors."
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""), *sys.path])
    done = subprocess.run([sys.executable, "-O", "-W", "ignore", "-c", INTERPRETED], capture_output=True, text=True,
                          env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-2000:]
    guarded, faults = done.stdout.splitlines()
    dense, masked, large, changed = map(float, guarded.split())
    assert dense < 0.003 and masked < 0.003 and large <= 0.02 and changed == 0
    if not hasattr(importlib.import_module("sageattention"), "sageattn_qk_int8_pv_fp16_triton"):
        assert faults.split() == ["True"] * 4  # phantoms, a mask ignored, K changed, overflow: else a guard can go


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_real_package(dtype):
    pytest.importorskip("sageattention")
    q, k, v = (x.to("cuda", dtype) for x in striped(512, 1024, heads=3))
    mask = random_mask(1, 3, 4, 8).cuda()
    mask[0, 1, 1] = False
    before = k.clone()
    for block_mask in (None, mask):
        out = attend(q, k, v, block_mask=block_mask, backend="sage")
        assert error(out, attend_reference(q, k, v, block_mask=block_mask)) <= 0.05  # 2.x: FP8 values on some
        assert error(out, sage_reference(q, k, v, block_mask=block_mask)) <= 0.05 and out.isfinite().all()
    assert not out[0, 1, 128:256].any() and torch.equal(k, before)
    assert attend(q, k, 1e4 * v, backend="sage").isfinite().all()
