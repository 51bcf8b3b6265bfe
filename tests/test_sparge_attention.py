"SpargeAttention: both stages against loops, the bound of stage 2, INT8, and the adapter against a faulty package."
import dataclasses
import importlib
import math
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashvsr_nb.sparge_attention as sparge
from flashvsr_nb.attention import attend, attend_reference, backends, expand_mask
from flashvsr_nb.sparge_attention import (BACKEND, block_mass, block_similarity, convert_mask, listen, select_mass,
                                          skip_bound, sparge_mask, sparge_reference)

few = settings(max_examples=25)
close = torch.testing.assert_close
BIG, HALF, TALL = (128, 128), (128, 64), (64, 128)


def random_qkv(lq=32, lk=48, d=8, heads=2, b=1, outliers=0.0, dtype=torch.float32):
    q, k, v = torch.randn(b, heads, lq, d), torch.randn(b, heads, lk, d), torch.randn(b, heads, lk, d)
    return [x.to(dtype) for x in (q, k + outliers * torch.randn(b, heads, 1, d), v)]


def random_mask(*shape, share=0.5):
    return torch.rand(*shape) < share


def off(out, exact):
    return ((out.double() - exact.double()).norm() / exact.double().norm()).item()


# ---- stage 1

def pairwise(x):
    unit = x / x.norm(dim=-1, keepdim=True)
    return (unit @ unit.mT).mean((-1, -2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_similarity_is_the_mean_of_all_pairs(dtype):
    x = (torch.randn(2, 3, 48, 6) + torch.randn(2, 3, 1, 6)).to(dtype)
    s = block_similarity(x, 16)
    assert s.dtype == torch.float32 and s.shape == (2, 3, 3)
    close(s, pairwise(x.float().unflatten(2, (3, 16))))
    mean = x.mean(2, keepdim=True)
    close(block_similarity(x, 16, mean=mean.float()), block_similarity(x.float() - mean.float(), 16))
    x[0, 0, :16] = 0
    assert block_similarity(x, 16)[0, 0, 0] == 0
    close(block_similarity(torch.ones(1, 1, 4, 3), 2), torch.ones(1, 1, 2))


def test_similarity_of_many_blocks_goes_in_parts():
    x = torch.randn(1, 2, 2 * 150, 4)  # 150 blocks, 64 at a time
    close(block_similarity(x, 2), pairwise(x.unflatten(2, (150, 2))))


@few
@given(n=st.integers(1, 9), cdf=st.floats(0, 1), seed=st.integers(0, 99))
def test_mass_keeps_the_largest_while_their_sum_allows(n, cdf, seed):
    p = torch.randn(2, 3, 4, n, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(-1)
    mask = select_mass(p, cdf=cdf)
    for row, kept in zip(p.flatten(0, 2), mask.flatten(0, 2)):
        largest = sorted(row.double().tolist(), reverse=True)
        want = max(1, sum(sum(largest[:i + 1]) <= cdf for i in range(n)))
        assert kept.sum() == want or abs(sum(largest[:kept.sum()]) - cdf) < 1e-6  # rounding of the sum
        assert row[kept].min() >= row[~kept].max() if want < n else kept.all()
    assert select_mass(p, cdf=1).all()


def test_a_share_of_the_row_is_rounded_down_and_never_none():
    p = torch.rand(1, 2, 3, 10).softmax(-1)
    for topk, want in ((0, 1), (0.09, 1), (0.2, 2), (0.29, 2), (0.7, 7), (1, 10)):
        mask = select_mass(p, topk=topk)
        assert (mask.sum(-1) == want).all()
        assert (p.where(mask, 2).amin(-1) >= p.where(~mask, -1).amax(-1)).all()  # the largest ones
    assert select_mass(p, topk=torch.tensor([0.2, 0.5])).sum(-1).tolist() == [[[2] * 3, [5] * 3]]
    assert select_mass(p, cdf=[0.0, 1.0]).sum(-1).tolist() == [[[1] * 3, [10] * 3]]


@pytest.mark.parametrize("kw", [{}, dict(cdf=0.5, topk=0.5), dict(cdf=1.1), dict(topk=-0.1), dict(cdf=math.nan)])
def test_selection_refuses(kw):
    with pytest.raises(ValueError, match="select_mass: cdf=.*topk=.*(exactly one|between 0 and 1)"):
        select_mass(torch.rand(1, 1, 2, 2), **kw)


def stage_one(q, k, bq, bk, theta, cdf, topk, within):
    "The algorithm of the paper, one row after the other, in float64."
    q, k = q.double(), k.double()
    k = k - k.mean(2, keepdim=True)
    mask = torch.zeros(*q.shape[:2], q.shape[2] // bq, k.shape[2] // bk, dtype=torch.bool)
    for b, h in torch.cartesian_prod(torch.arange(len(q)), torch.arange(q.shape[1])).tolist():
        ks, qs = k[b, h].split(bk), q[b, h].split(bq)
        lone = [pairwise(x).item() <= theta for x in ks]
        for i, block in enumerate(qs):
            allowed = [j for j in range(len(ks)) if within is None or within[b, h, i, j]]
            open_ = [j for j in allowed if not lone[j]]
            p = torch.tensor([block.mean(0) @ ks[j].mean(0) for j in open_]).div(q.shape[-1] ** 0.5).softmax(0)
            ranked = [open_[j] for j in p.argsort(descending=True).tolist()]
            n = int(((p.sort(descending=True).values.cumsum(0) <= cdf).sum()) if topk is None else topk * len(allowed))
            keep = set(ranked[:max(1, n)]) | {j for j in allowed if lone[j]}
            for j in allowed if pairwise(block).item() <= theta else keep:
                mask[b, h, i, j] = True
    return mask


@few
@given(block=st.sampled_from([(16, 16), (16, 8), (8, 16)]), theta=st.sampled_from([-0.1, 0.08, 0.15, 0.99]),
       rule=st.sampled_from([dict(cdf=0.6), dict(cdf=0.95), dict(topk=0.3), dict(topk=0.01)]), some=st.booleans(),
       seed=st.integers(0, 99))
def test_stage_one_is_what_loops_do(block, theta, rule, some, seed):
    torch.manual_seed(seed)
    q, k, _ = random_qkv(48, 96, b=2, outliers=2)
    within = random_mask(2, 2, 48 // block[0], 96 // block[1]) if some else None
    mask = sparge_mask(q, k, block_size=block, similarity=theta, within=within, **rule)
    assert torch.equal(mask, stage_one(q, k, *block, theta, rule.get("cdf"), rule.get("topk"), within))
    reachable = torch.ones_like(mask) if within is None else within
    assert torch.equal(mask.any(-1), reachable.any(-1))  # no row is empty that need not be


def test_a_common_part_of_the_keys_changes_nothing():
    q, k, _ = random_qkv(64, 64)
    masks = [sparge_mask(q, k + shift, block_size=(16, 16), similarity=0.05, cdf=0.6)
             for shift in (0, 5 * torch.randn(1, 2, 1, 8))]
    assert torch.equal(*masks) and 0 < masks[0].float().mean() < 1


def test_thresholds_per_head_and_blocks_that_always_fail():
    q, k, _ = random_qkv(64, 64)
    mixed = sparge_mask(q, k, block_size=(16, 16), similarity=torch.tensor([1.0, -1.0]), cdf=[0.9, 0.2])
    assert mixed[:, 0].all() and torch.equal(
        mixed[:, 1:], sparge_mask(q[:, 1:], k[:, 1:], block_size=(16, 16), similarity=-1, cdf=0.2))
    assert not mixed[:, 1].all() and not mixed.requires_grad


@pytest.mark.parametrize("rule", [dict(cdf=0.5), dict(topk=0.5), dict(cdf=[0.5, 0.9], similarity=[0.1, 0.2])])
def test_nothing_is_read_back_from_the_device(rule):
    "Tensors without values would refuse it; a GPU would have to be waited for."
    q, k, _ = (x.to("meta") for x in random_qkv(64, 64))
    within = torch.ones(1, 2, 4, 4, dtype=torch.bool, device="meta")
    mask = sparge_mask(q, k, block_size=(16, 16), within=within, **rule)
    assert mask.shape == (1, 2, 4, 4) and mask.device.type == "meta"


@pytest.mark.parametrize("kw, said", [
    (dict(block_size=(24, 16)), "64 query and 64 key tokens; they must be whole blocks"),
    (dict(block_size=(16, 16), similarity=[0.1] * 3), "similarity=.*one number, or 2"),
    (dict(block_size=(16, 16), cdf=[0.1] * 3), "cdf=.*one number, or 2"),
    (dict(block_size=(16, 16), cdf=None), "exactly one")])
def test_stage_one_refuses(kw, said):
    q, k, _ = random_qkv(64, 64)
    with pytest.raises(ValueError, match=said):
        sparge_mask(q, k, **dict(cdf=0.5) | kw)


def test_block_mass_is_attention_added_up():
    q, k, _ = random_qkv(32, 48)
    p = (q @ k.mT * 0.7).softmax(-1)
    mass = block_mass(q, k, block_size=(16, 8), scale=0.7)
    close(mass, p.unflatten(-1, (-1, 8)).sum(-1).unflatten(2, (-1, 16)).mean(3))
    close(mass.sum(-1), torch.ones(1, 2, 2))
    assert block_mass(q.bfloat16(), k.bfloat16(), block_size=(16, 8)).dtype == torch.float32


# ---- stage 2

@few
@given(block=st.sampled_from([(16, 16), (16, 8), (8, 16)]), share=st.sampled_from([0, 0.3, 1]), masked=st.booleans(),
       skip=st.sampled_from([None, -1e4]), rows=st.sampled_from([None, 4]), scale=st.sampled_from([None, 0.0, 2.0]))
def test_without_skipping_it_is_masked_attention(block, share, masked, skip, rows, scale):
    q, k, v = random_qkv(b=2)
    mask = random_mask(2, 2, 32 // block[0], 48 // block[1], share=share) if masked else None
    out, skipped = sparge_reference(q, k, v, block_mask=mask, block_size=block, scale=scale, skip=skip, rows=rows)
    close(out, attend_reference(q, k, v, block_mask=mask, block_size=block, scale=scale))
    assert skipped == 0


def stage_two(q, k, v, mask, bq, bk, skip, rows):
    "Tile after tile, in float64; the share of kept tiles that were skipped, and the weight that went with them."
    q, k, v, out, kept, gone, lost = q.double(), k.double(), v.double(), torch.zeros(q.shape).double(), 0, 0, 0.0
    for h, i in torch.cartesian_prod(torch.arange(q.shape[1]), torch.arange(q.shape[2] // rows)).tolist():
        at = slice(i * rows, i * rows + rows)
        s = q[0, h, at] @ k[0, h].mT / q.shape[-1] ** 0.5
        top, use = torch.full((rows, 1), -math.inf).double(), torch.zeros(k.shape[2], dtype=torch.bool)
        tiles = [j for j in range(k.shape[2] // bk) if mask[0, h, i * rows // bq, j]]
        for j in tiles:
            best = s[:, j * bk:j * bk + bk].amax(1, keepdim=True)
            top = torch.maximum(top, best)
            if (best - top).max() < skip:
                gone += 1
            else:
                use[j * bk:j * bk + bk] = True
        kept += len(tiles)
        if use.any():
            out[0, h, at] = s[:, use].softmax(1) @ v[0, h, use]
            all_ = torch.cat([torch.arange(j * bk, j * bk + bk) for j in tiles])
            lost = max(lost, 1 - (s[:, use].logsumexp(1) - s[:, all_].logsumexp(1)).exp().min().item())
    return out, gone / max(kept, 1), lost


@few
@given(rows=st.sampled_from([16, 4, 1]), skip=st.sampled_from([-0.5, -2.0, -5.0]), sharp=st.sampled_from([1, 4]),
       share=st.sampled_from([0.4, 1]), seed=st.integers(0, 99))
def test_stage_two_is_what_loops_do_and_keeps_its_bound(rows, skip, sharp, share, seed):
    torch.manual_seed(seed)
    q, k, v = random_qkv()
    mask = random_mask(1, 2, 2, 6, share=share)
    out, skipped = sparge_reference(q * sharp, k, v, block_mask=mask, block_size=(16, 8), skip=skip, rows=rows)
    want, gone, lost = stage_two(q * sharp, k, v, mask, 16, 8, skip, rows)
    close(out, want.float(), atol=1e-4, rtol=1e-4)
    assert skipped == pytest.approx(gone)
    exact = attend_reference(q * sharp, k, v, block_mask=mask, block_size=(16, 8))
    bound = skip_bound(skip, 40)  # of 48 keys, the tile of the best stays
    assert lost <= bound + 1e-9
    assert ((out - exact).abs() <= bound * (v.amax(2, keepdim=True) - v.amin(2, keepdim=True)) + 1e-5).all()


def test_stage_two_saves_something_and_then_costs_something():
    q, k, v = random_qkv(64, 256)
    out = [sparge_reference(4 * q, k, v, block_size=(4, 16), skip=s, rows=1) for s in (-30, -3)]
    exact = attend_reference(4 * q, k, v)
    assert out[0][1] < 0.05 < 0.3 < out[1][1]
    assert off(out[0][0], exact) < 1e-5 < off(out[1][0], exact) < skip_bound(-3, 240)
    assert skip_bound(-30, 256) < 1e-10 and skip_bound(-1e-9, 10) == pytest.approx(10 / 11)


@pytest.mark.parametrize("kw, said", [(dict(skip=0), "skip=0; it must be below 0"), (dict(skip=math.nan), "skip=nan"),
                                      (dict(rows=5), "rows=5"), (dict(block_size=(24, 16)), "32 query and 48 key")])
def test_the_reference_refuses(kw, said):
    with pytest.raises(ValueError, match=said):
        sparge_reference(*random_qkv(), **dict(block_size=(16, 16)) | kw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block, share", [(BIG, 0.4), (HALF, 0.4), (TALL, 0.25), (BIG, 1)])
def test_int8_with_strong_outliers(dtype, block, share):
    "Relative L2 error against float32 attention with the same mask; without smoothing at least twice as large."
    q, k, v = random_qkv(256, 640, 128, outliers=3, dtype=dtype)
    mask = random_mask(1, 2, 256 // block[0], 640 // block[1], share=share)
    mask[0, 1, -1] = False
    exact = attend_reference(q.float(), k.float(), v.float(), block_mask=mask, block_size=block)
    out, _ = sparge_reference(q, k, v, block_mask=mask, block_size=block, int8=True)
    assert out.dtype == dtype and out.isfinite().all() and not out[0, 1, -block[0]:].any()
    assert off(out, exact) <= 0.02
    before = k.clone()
    sparge_reference(q, k, v, block_mask=mask, block_size=block, int8=True, skip=-8)
    assert torch.equal(k, before)


def test_without_smoothing_int8_errs_more_than_twice_as_much():
    q, k, v = random_qkv(256, 512, 128, heads=8, outliers=6)
    mask = random_mask(1, 8, 2, 4)
    exact = attend_reference(q, k, v, block_mask=mask)
    rough = attend_reference(sparge._rounded(q, 128), sparge._rounded(k, 64), v, block_mask=mask)
    assert off(rough, exact) > 2 * off(sparge_reference(q, k, v, block_mask=mask, int8=True)[0], exact)


# ---- masks in other blocks

@few
@given(have=st.sampled_from([(4, 4), (4, 2), (2, 4), (2, 2)]), to=st.sampled_from([(4, 4), (4, 2), (2, 4), (1, 8)]),
       seed=st.integers(0, 99))
def test_conversion_cuts_exactly_and_joins_by_any(have, to, seed):
    torch.manual_seed(seed)
    mask = random_mask(2, 2, 8 // have[0], 16 // have[1], share=0.4)
    made = convert_mask(mask, have, to=to)
    before, after = expand_mask(mask, have), expand_mask(made, to)
    assert after.shape == before.shape and not (before & ~after).any()
    blocks = before.unflatten(2, (-1, to[0])).unflatten(4, (-1, to[1])).any(5).any(3)
    assert torch.equal(made, blocks)
    if have[0] % to[0] == 0 and have[1] % to[1] == 0:
        assert torch.equal(before, after)


@pytest.mark.parametrize("have, to", [((128, 64), (128, 96)), ((64, 64), (128, 64)), ((128, 64), (128, 128))])
def test_conversion_refuses(have, to):
    with pytest.raises(ValueError, match="do not make whole blocks of"):
        convert_mask(torch.ones(1, 1, 3, 3, dtype=torch.bool), have, to=to)


# ---- the adapter, against a package with faults

@pytest.fixture(params=[(8, 0), (8, 9), (9, 0), (12, 0)], ids=lambda a: f"sm_{a[0]}{a[1]}")
def package(request, monkeypatch):
    "The stand-in, on a GPU of this architecture, behind the back end `spas` with its check of the device taken out."
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "stand_ins"))
    monkeypatch.delitem(sys.modules, "spas_sage_attn", raising=False)
    module = importlib.import_module("spas_sage_attn")
    monkeypatch.setattr(module, "arch", request.param)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: request.param)
    monkeypatch.setitem(backends, "spas", dataclasses.replace(BACKEND, devices=None))
    yield module
    sys.modules.pop("spas_sage_attn", None)


def native(package):
    return TALL if package.arch == (9, 0) else HALF


@pytest.mark.parametrize("block", [BIG, HALF, TALL])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_spas_honours_the_mask(package, block, dtype):
    q, k, v = random_qkv(256, 512, 64, outliers=3, dtype=dtype)
    mask = random_mask(1, 2, 512 // block[1], 256 // block[0]).mT  # the package needs it contiguous
    mask[0, 0, 0], mask[0, 1, -1], mask[0, 1, 0] = False, False, True
    widened = any(a < b for a, b in zip(block, native(package)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        out = attend(q, k, v, block_mask=mask, block_size=block, backend="spas")
    assert [str(w.message)[:14] for w in said] == ["spas_sage_attn"] * widened
    read = convert_mask(convert_mask(mask, block, to=native(package)), native(package), to=(64, 64))
    exact = attend_reference(q.float(), k.float(), v.float(), block_mask=read, block_size=(64, 64))
    empty = ~mask.any(-1).repeat_interleave(block[0], -1)
    assert not out[empty].any() and empty.any() and out.dtype == dtype
    exact[empty] = 0
    assert off(out, exact) < 0.03
    if not widened:
        close(exact, attend_reference(q.float(), k.float(), v.float(), block_mask=mask, block_size=block))


def test_spas_without_a_mask_and_with_a_scale(package):
    q, k, v = random_qkv(128, 256, 128, dtype=torch.float16)
    for scale in (None, 0.3):
        out = attend(q, k, v, scale=scale, backend="spas")
        assert off(out, attend_reference(q.float(), k.float(), v.float(), scale=scale)) < 0.03
    nothing = attend(q, k, v, block_mask=torch.zeros(1, 2, 1, 2, dtype=torch.bool), backend="spas")
    assert not nothing.any()


@pytest.mark.parametrize("size", [3000.0, 1e5, 1e30])
def test_spas_with_large_values(package, size):
    "float16 ends at 65,504; a head of small values keeps its digits beside one of large ones."
    q, k, v = random_qkv(128, 512, 64, dtype=torch.bfloat16)
    v = (v.abs() * torch.tensor([size, 1e-2])[:, None, None]).bfloat16()
    out = attend(q, k, v, backend="spas")
    exact = attend_reference(q.float(), k.float(), v.float())
    assert out.isfinite().all()
    assert all(off(out[:, h], exact[:, h]) < 0.03 for h in (0, 1))


def test_spas_leaves_its_inputs_alone(package):
    inputs = random_qkv(128, 256, 64, outliers=3, dtype=torch.float16)
    before = [x.clone() for x in inputs]
    attend(*inputs, backend="spas")
    assert all(map(torch.equal, inputs, before))


@pytest.mark.parametrize("lq, lk, d, dtype, said", [
    (128, 192, 64, torch.float16, "128 query and 192 key tokens; both must be multiples of 128"),
    (64, 128, 64, torch.float16, "64 query and 128 key tokens; both must be multiples of 128"),
    (0, 128, 64, torch.float16, "0 query and 128 key tokens"),
    (128, 128, 96, torch.float16, "takes heads of width d = 64 or 128, given 96"),
    (128, 128, 64, torch.float32, "takes dtype torch.float16 or torch.bfloat16, given torch.float32")])
def test_spas_refuses(package, lq, lk, d, dtype, said):
    with pytest.raises(ValueError, match=f"'spas'.*{said}"):
        attend(*random_qkv(lq, lk, d, dtype=dtype), backend="spas")


def test_spas_refuses_other_blocks(package):
    with pytest.raises(ValueError, match=r"given \(64, 64\); use auto or sdpa"):
        attend(*random_qkv(128, 128, 64, dtype=torch.float16), block_mask=torch.ones(1, 2, 2, 2, dtype=torch.bool),
               block_size=(64, 64), backend="spas")


def test_the_stand_in_has_the_faults(package):
    "Called without the guards, it gives garbage, infinities, or another mask's result."
    f = package.block_sparse_sage2_attn_cuda
    q, k, v = random_qkv(256, 512, 64, dtype=torch.bfloat16)
    nq, nk = 256 // native(package)[0], 512 // native(package)[1]
    mask = torch.ones(1, 2, nq, nk, dtype=torch.int8)
    mask[0, 0, 1] = 0
    rows = slice(native(package)[0], 2 * native(package)[0])
    assert f(q, k, v, mask_id=mask)[0, 0, rows].isnan().any()
    with pytest.raises(AttributeError, match="dim"):
        f(q, k, v)
    with pytest.raises(UnboundLocalError):
        f(q, k, v, mask_id=mask, smooth_k=False)
    assert not f(q, k, v.abs() * 3e5, mask_id=torch.ones_like(mask)).isfinite().all()
    wrong = random_mask(1, 2, *((2, 8) if package.arch == (9, 0) else (4, 4))).to(torch.int8)  # in the other's blocks
    assert wrong.numel() == mask.numel()
    if package.arch == (9, 0):
        wrong[..., 0] = 1
        exact = attend_reference(q.float(), k.float(), v.float(), block_mask=wrong.bool(), block_size=HALF)
        assert off(f(q, k, v, mask_id=wrong).nan_to_num(), exact) > 0.1
    else:
        with pytest.raises(RuntimeError, match="lut must have shape"):
            f(q, k, v, mask_id=wrong)


@pytest.mark.parametrize("content, said", [
    (None, "needs the package spas_sage_attn, built from .*No module named"),
    ("raise ImportError('_qattn.so: undefined symbol')", "needs the package .*undefined symbol"),
    ("import a_package_that_is_not_there", "needs the package .*a_package_that_is_not_there"),
    ("x = 1", "needs a spas_sage_attn that has block_sparse"),
    ("def block_sparse_sage2_attn_cuda(): pass", "compute capability 8.0 or more, this one has 7.5")])
def test_spas_says_why_it_cannot_run(content, said, tmp_path, monkeypatch):
    if content:
        (tmp_path / "spas_sage_attn.py").write_text(content)
        monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "spas_sage_attn", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    why = BACKEND.unusable(torch.device("cuda"))
    sys.modules.pop("spas_sage_attn", None)
    assert re.search(said, why) and "\n" not in why
    assert BACKEND.unusable(torch.device("cpu")) == "needs CUDA, tensors are on cpu" and not BACKEND.exact


@pytest.mark.cuda
@pytest.mark.parametrize("block", [BIG, HALF, TALL])
@pytest.mark.parametrize("d", [64, 128])
def test_spas_with_the_real_package(block, d):
    pytest.importorskip("spas_sage_attn")
    q, k, v = (x.cuda() for x in random_qkv(512, 1024, d, outliers=3, dtype=torch.bfloat16))
    mask = random_mask(1, 2, 512 // block[0], 1024 // block[1]).cuda()
    mask[0, 1, 1] = False
    reads = sparge._native(q.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = attend(q, k, v, block_mask=mask, block_size=block, backend="spas")
    read = convert_mask(convert_mask(mask, block, to=reads), reads, to=(64, 64))
    exact = attend_reference(q, k, v, block_mask=read, block_size=(64, 64))
    exact[~mask.any(-1).repeat_interleave(block[0], -1)] = 0
    assert not out[0, 1, block[0]:2 * block[0]].any()
    assert off(out, exact) < 0.06  # FP8 values on new chips


# ---- listening

def test_listen_notes_calls_and_is_gone_afterwards():
    q, k, v = random_qkv(32, 48)
    mask = random_mask(1, 2, 2, 3)
    with listen("reference") as calls:
        out = attend(q, k, v, block_mask=mask, block_size=(16, 16), backend="listen")
        k.zero_()
    close(out, attend_reference(q, calls[0]["k"], v, block_mask=mask, block_size=(16, 16)))
    assert calls[0]["block_size"] == (16, 16) and torch.equal(calls[0]["block_mask"], mask) and calls[0]["k"].any()
    with pytest.raises(RuntimeError, match="inside"), listen():
        raise RuntimeError("inside")
    assert "listen" not in backends
