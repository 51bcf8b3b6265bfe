"Attention: every back end against the plain one, masks with and without keys, the selection rule against loops."
import math
import sys

import pytest
import torch
from conftest import Largest
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import flashvsr_nb.attention as attention
from flashvsr_nb.attention import (LCSA, Backend, attend, attend_gathered, attend_reference, backends,
                                   block_probabilities, expand_mask, locality_mask, pick_backend, pool_blocks,
                                   select_blocks)

few = settings(max_examples=25)
close = torch.testing.assert_close
SMALL = st.integers(1, 3)


def random_qkv(b=1, heads=1, lq=8, lk=8, d=4, seed=0, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(b, heads, n, d, generator=g).to(device, dtype) for n in (lq, lk, lk)]


def random_mask(b, heads, nq, nk, share=0.5, seed=0):
    return torch.rand(b, heads, nq, nk, generator=torch.Generator().manual_seed(seed)) < share


def by_loops(q, k, v, mask, block_size, scale):
    "One query token after the other, in float64."
    q, k, v = (x.double() for x in (q, k, v))
    out = torch.zeros_like(q)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        keys = [j for j in range(k.shape[2]) if mask[b, h, i // block_size[0], j // block_size[1]]]
        if keys:
            out[b, h, i] = (k[b, h, keys] @ q[b, h, i] * scale).softmax(0) @ v[b, h, keys]
    return out


# ---- back ends

@few
@given(b=SMALL, heads=SMALL, nq=SMALL, nk=SMALL, block_size=st.sampled_from([(4, 4), (4, 2), (2, 3)]),
       share=st.sampled_from([0, 0.3, 0.7, 1]), scale=st.sampled_from([None, 0.0, 1.5]), seed=st.integers(0, 99))
def test_exact_back_ends_are_what_loops_do(b, heads, nq, nk, block_size, share, scale, seed):
    q, k, v = random_qkv(b, heads, nq * block_size[0], nk * block_size[1], 5, seed)
    mask = random_mask(b, heads, nq, nk, share, seed)
    want = by_loops(q, k, v, mask, block_size, 5**-0.5 if scale is None else scale).float()
    for name in ("reference", "sdpa"):
        close(attend(q, k, v, block_mask=mask, block_size=block_size, scale=scale, backend=name), want)


@few
@given(budget=st.integers(1, 5000), share=st.floats(0, 1))
def test_groups_of_any_size_give_the_same(budget, share):
    q, k, v = random_qkv(2, 2, 24, 40, 4)
    mask = random_mask(2, 2, 6, 10, share)
    close(attention._sdpa(q, k, v, block_mask=mask, block_size=(4, 4), budget=budget),
          attend_reference(q, k, v, block_mask=mask, block_size=(4, 4)))


@few
@given(budget=st.integers(1, 2000), share=st.floats(0, 1), block_size=st.sampled_from([(4, 4), (4, 2), (2, 4)]))
def test_a_kernel_without_masks_gets_groups_of_equal_rows(budget, share, block_size):
    q, k, v = random_qkv(2, 2, 24, 40, 4)
    mask = random_mask(2, 2, 24 // block_size[0], 40 // block_size[1], share)
    sizes = []

    def dense(q, k, v, pad):
        assert pad is None and q.shape[2] == block_size[0]
        sizes.append((len(k), k.shape[2]))
        return F.scaled_dot_product_attention(q, k, v)
    out = attend_gathered(dense, q, k, v, block_mask=mask, block_size=block_size, budget=budget, even=True)
    close(out, attend_reference(q, k, v, block_mask=mask, block_size=block_size))
    assert sum(rows * keys for rows, keys in sizes) == mask.sum() * block_size[1]  # nothing is copied but what is kept
    assert all(rows == 1 or rows * keys * 4 <= budget for rows, keys in sizes)


@pytest.mark.parametrize("name", ["reference", "sdpa"])
def test_no_mask_full_mask_and_empty_mask(name):
    q, k, v = random_qkv(2, 3, 256, 384, 16)
    plain = F.scaled_dot_product_attention(q, k, v)
    close(attend(q, k, v, backend=name), plain)
    close(attend(q, k, v, block_mask=torch.ones(2, 3, 2, 3, dtype=torch.bool), backend=name), plain)
    assert not attend(q, k, v, block_mask=torch.zeros(2, 3, 2, 3, dtype=torch.bool), backend=name).any()


@pytest.mark.parametrize("name", ["reference", "sdpa"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2**-7), (torch.float16, 2**-9), (torch.float64, 1e-12)])
def test_types(name, dtype, tolerance):
    q, k, v = random_qkv(1, 2, 256, 512, 32, dtype=dtype)
    q = q * 4  # sharp: rounded scores would show
    mask = random_mask(1, 2, 2, 4)
    mask[0, 0, 1] = False
    out = attend(q, k, v, block_mask=mask, backend=name)
    assert out.dtype == dtype
    exact = attend_reference(q.double(), k.double(), v.double(), block_mask=mask)
    close(out.double(), exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", ["reference", "sdpa"])
def test_gradients_pass_and_empty_rows_give_none(name):
    inputs = [x.requires_grad_() for x in random_qkv(1, 2, 12, 16, 4)]
    mask = random_mask(1, 2, 3, 4, 0.6)
    mask[0, 1, 2] = False
    attend(*inputs, block_mask=mask, block_size=(4, 4), backend=name).square().sum().backward()
    grads = [x.grad for x in inputs]
    inputs = [x.detach().double().requires_grad_() for x in inputs]
    dense = (inputs[0] @ inputs[1].mT / 2).masked_fill(~expand_mask(mask, (4, 4)), -math.inf).softmax(-1).nan_to_num()
    close(grads[2], torch.autograd.grad((dense @ inputs[2]).square().sum(), inputs[2])[0].float())
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in grads)
    assert not grads[0][0, 1, 8:].any()


def test_views_of_any_layout():
    x = torch.randn(2, 16, 3, 12)  # (B, tokens, heads, 3*d), as one linear layer gives q, k and v
    q, k, v = x.transpose(1, 2).chunk(3, -1)
    mask = random_mask(2, 3, 4, 4)
    close(attend(q, k, v, block_mask=mask, block_size=(4, 4)),
          attend_reference(*(t.contiguous() for t in (q, k, v)), block_mask=mask, block_size=(4, 4)))
    close(attend(q[:1].expand(2, -1, -1, -1), k, v, block_mask=mask, block_size=(4, 4))[0],
          attend(q, k, v, block_mask=mask, block_size=(4, 4))[0])


def test_memory_stays_bounded():
    q, k, v = random_qkv(1, 2, 64 * 4, 256 * 4, 8)
    mask = torch.rand(1, 2, 64, 256).argsort(-1) < 64
    inputs = max(q.numel(), k.numel(), mask.numel())
    budget = 2 * inputs
    gathered = mask.sum().item() * 4 * 8
    assert gathered > 2 * budget  # it has to work in groups
    with Largest() as seen:
        attention._sdpa(q, k, v, block_mask=mask, block_size=(4, 4), budget=budget)
    assert budget / 2 < seen.elements <= budget
    with Largest() as seen:
        attend_reference(q, k, v, block_mask=mask, block_size=(4, 4))
    assert seen.elements == 2 * q.shape[2] * k.shape[2] > 2 * budget


# ---- flex: the lists everywhere, the kernel on CUDA

@pytest.fixture
def uncompiled(monkeypatch):
    "FlexAttention run by plain PyTorch; it reads the mask function only. Calls are recorded."
    from torch.nn.attention.flex_attention import flex_attention
    calls = []

    def run(*args, **kw):
        calls.append(kw)
        return flex_attention(*args, **kw)
    monkeypatch.setattr(attention, "_compiled_flex", lambda: run)
    return calls


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("block_size", [(128, 128), (128, 64)])
def test_flex_says_the_mask_twice(uncompiled, block_size):
    "As lists of blocks for the kernel, and as a function for the day torch does not compile it."
    q, k, v = random_qkv(2, 2, 256, 384, 16)
    mask = random_mask(2, 2, 2, 384 // block_size[1], 0.4)
    mask[1, 0, 1] = False
    close(attention._flex(q, k, v, block_mask=mask, block_size=block_size, scale=0.25),
          attend_reference(q, k, v, block_mask=mask, block_size=block_size, scale=0.25))
    lists = uncompiled[0]["block_mask"]
    assert torch.equal(lists.to_dense().bool(), mask) and not lists.kv_num_blocks.any()
    close(attention._flex(q, k, v, scale=0.25), attend_reference(q, k, v, scale=0.25))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 4e-3), (torch.float32, 1e-2)])
def test_flex_on_cuda(dtype, tolerance):
    "More shapes than torch recompiles by default: the mask must hold in all of them."
    assert pick_backend("cuda") == "flex"
    shapes = [(2, n) for n in range(2, 12)] if dtype is torch.bfloat16 else [(2, 8)]
    for nq, nk in shapes:
        for block_size in [(128, 128), (128, 64)] if nk == 8 else [(128, 128)]:
            q, k, v = random_qkv(1, 2, nq * 128, nk * 128, 128, dtype=dtype, device="cuda")
            mask = random_mask(1, 2, nq, nk * 128 // block_size[1], 0.4, seed=nk).cuda()
            mask[0, 1, 1] = False
            out = attend(q, k, v, block_mask=mask, block_size=block_size)
            want = attend_reference(q, k, v, block_mask=mask, block_size=block_size)
            close(out, want, atol=tolerance, rtol=tolerance)
            assert not out[0, 1, 128:256].any()


@pytest.mark.cuda
def test_sdpa_on_cuda():
    q, k, v = random_qkv(1, 2, 256, 512, 128, device="cuda")
    mask = random_mask(1, 2, 2, 4, 0.5).cuda()
    out = attend(q, k, v, block_mask=mask, backend="sdpa")
    close(out, attend_reference(q, k, v, block_mask=mask), atol=1e-2, rtol=1e-2)


# ---- the registry

def test_auto_is_exact():
    assert pick_backend("cpu") == pick_backend(torch.device("cpu")) == "sdpa"
    assert all(backends[pick_backend(d)].exact for d in ("cpu", "cuda", "mps"))


def test_a_new_back_end_gets_what_it_was_promised(monkeypatch):
    def spy(q, k, v, **kw):
        seen.update(kw)
        return q
    seen = {}
    monkeypatch.setitem(backends, "spy", Backend(spy, "for this test", exact=False))
    q, k, v = random_qkv(d=16)
    assert attend(q, k, v, backend="spy") is q
    assert seen == dict(block_mask=None, block_size=(128, 128), scale=0.25)
    mask = random_mask(1, 1, 2, 4)
    attend(q, k, v, block_mask=mask, block_size=[4, 2], scale=0.0, backend="spy")
    assert seen == dict(block_mask=mask, block_size=(4, 2), scale=0.0)


def test_a_back_end_that_cannot_run_says_why(monkeypatch):
    never = Backend(attend_reference, "for this test", why_not=lambda device: f"no luck on {device.type}")
    monkeypatch.setitem(backends, "never", never)
    with pytest.raises(RuntimeError, match="'never' cannot run here: no luck on cpu; use auto or sdpa"):
        attend(*random_qkv(), backend="never")
    with pytest.raises(RuntimeError, match="'flex' cannot run here: needs CUDA, tensors are on cpu"):
        attend(*random_qkv(), backend="flex")
    with pytest.raises(ValueError, match="'Flex' is unknown; choose auto or one of: reference, sdpa, flex, "
                       "sage, sparge, spas, never"):
        attend(*random_qkv(), backend="Flex")


LIMITS = [(dict(dtypes=(torch.float16, torch.bfloat16)),
           "takes dtype torch.float16 or torch.bfloat16, given torch.float32"),
          (dict(head_dims=(64, 128)), "takes heads of width d = 64 or 128, given 4"),
          (dict(head_dims=range(8, 65, 8)), "takes heads of width d = 8 to 64 in steps of 8, given 4"),
          (dict(head_dims=range(5, 129)), "takes heads of width d = 5 to 128, given 4"),
          (dict(block_sizes=((128, 128), (128, 64))),
           "takes masks of block_size .128, 128. or .128, 64., given .4, 2."),
          (dict(block_sizes=()), "takes no block_mask")]


@pytest.mark.parametrize("limits, said", LIMITS)
def test_a_back_end_states_what_it_takes(monkeypatch, limits, said):
    called = []
    monkeypatch.setitem(backends, "some", Backend(lambda q, k, v, **kw: called.append(1), "for this test", **limits))
    inputs = dict(block_mask=random_mask(1, 1, 2, 4), block_size=[4, 2], backend="some")
    with pytest.raises(ValueError, match=f"attention backend 'some' {said}; use auto or sdpa"):
        attend(*random_qkv(), **inputs)
    assert not called
    if "block_sizes" in limits:  # of no interest without a mask
        attend(*random_qkv(), backend="some")
        assert called


def test_limits_that_are_kept(monkeypatch):
    wide = Backend(attend_reference, "for this test", devices=("cpu", "cuda"), dtypes=(torch.float32,),
                   head_dims=range(4, 9, 4), block_sizes=((4, 4), (4, 2)))
    monkeypatch.setitem(backends, "wide", wide)
    mask = random_mask(1, 1, 2, 4)
    close(attend(*random_qkv(), block_mask=mask, block_size=[4, 2], backend="wide"),
          attend_reference(*random_qkv(), block_mask=mask, block_size=(4, 2)))
    assert wide.unusable(torch.device("cuda:1")) is None
    assert wide.unusable(torch.device("mps")) == "needs CPU or CUDA, tensors are on mps"


def test_modules_are_loaded_when_asked_for(monkeypatch, tmp_path):
    "What is not there, does not load or lacks a package is not usable, and says so."
    monkeypatch.setattr("flashvsr_nb.__path__", [str(tmp_path)])
    sources = {"absent": None, "lacking": "import no_such_package", "broken": "raise OSError('two\\nlines')",
               "other": "x = 1",
               "other_torch": "raise ImportError('undefined symbol')",
               "good": "from flashvsr_nb.attention import Backend, attend_reference\n"
                       "BACKEND = Backend(attend_reference, 'fine', exact=False)"}
    for name, text in sources.items():
        if text:
            (tmp_path / f"late_{name}.py").write_text(text)
        monkeypatch.setitem(backends.data, name, f"late_{name}")
        monkeypatch.delitem(sys.modules, f"flashvsr_nb.late_{name}", raising=False)
    cpu = torch.device("cpu")
    assert "flashvsr_nb.late_good" not in sys.modules and "good" in backends
    assert {n: backends[n].unusable(cpu) for n in sources} == {
        "absent": "needs flashvsr_nb.late_absent, which is not installed",
        "lacking": "needs no_such_package, which is not installed", "broken": "late_broken cannot be loaded: two lines",
        "other": "flashvsr_nb.late_other has no BACKEND", "other_torch": "late_other_torch cannot be loaded: undefined symbol",
        "good": None}
    assert not any(backends[n].exact for n in sources) and {*dict(backends.items())} >= {*sources}
    close(attend(*random_qkv(), backend="good"), attend_reference(*random_qkv()))
    with pytest.raises(RuntimeError, match="'absent' cannot run here: needs flashvsr_nb.late_absent"):
        attend(*random_qkv(), backend="absent")
    for name in ("good", "other"):
        del sys.modules[f"flashvsr_nb.late_{name}"]


def test_optional_back_ends_are_named_and_not_exact():
    assert {"sage", "sparge", "spas"} <= {*backends}
    assert all(not b.exact for name, b in backends.items() if name not in ("reference", "sdpa", "flex"))


@pytest.mark.parametrize("change, said", [
    (lambda q, k, v: (q[0], k, v), "must be .B,heads,tokens,d."),
    (lambda q, k, v: (q, k[0], v[0]), "must be .B,heads,tokens,d."),
    (lambda q, k, v: (q, k[:, :, :4], v), "k and v in all"),
    (lambda q, k, v: (q[..., :2], k, v), "alike in B, heads and d"),
    (lambda q, k, v: (q[:, :1], k, v), "alike in B, heads and d"),
    (lambda q, k, v: (q.half(), k, v), "torch.float16 on cpu, torch.float32 on cpu.*share dtype and device"),
    (lambda q, k, v: (q, k.to("meta"), v), "share dtype and device")])
@pytest.mark.parametrize("name", ["reference", "sdpa", "auto"])
def test_tensors_that_do_not_fit_are_refused(change, said, name):
    with pytest.raises(ValueError, match=said):
        attend(*change(*random_qkv(2, 2)), backend=name)


@pytest.mark.parametrize("mask, block_size, said", [
    (torch.ones(1, 2, 2, 2, dtype=torch.bool), (4, 4), r"for q \(2, 2, 8, 4\).*must be torch.bool \(2, 2, 2, 2\)"),
    (torch.ones(2, 2, 2, 4, dtype=torch.bool), (4, 4), r"block_mask is torch.bool \(2, 2, 2, 4\)"),
    (torch.ones(2, 2, 2, 2), (4, 4), "block_mask is torch.float32"),
    (torch.ones(2, 2, 2, 2, dtype=torch.bool, device="meta"), (4, 4), "on meta"),
    (torch.ones(2, 2, 2, 2, dtype=torch.bool), (3, 4), r"not whole blocks of block_size=\(3, 4\)"),
    (torch.ones(2, 2, 1, 1, dtype=torch.bool), (128, 128), "not whole blocks")])
@pytest.mark.parametrize("name", ["reference", "sdpa"])
def test_masks_that_do_not_fit_are_refused(mask, block_size, said, name):
    with pytest.raises(ValueError, match=said):
        attend(*random_qkv(2, 2), block_mask=mask, block_size=block_size, backend=name)


# ---- masks and their selection

@few
@given(nq=SMALL, nk=SMALL, bq=SMALL, bk=SMALL)
def test_expand_mask_repeats_every_entry(nq, nk, bq, bk):
    mask = random_mask(2, 2, nq, nk, seed=nq + 7 * nk)
    wide = expand_mask(mask, (bq, bk))
    assert wide.shape == (2, 2, nq * bq, nk * bk)
    assert all(wide[b, h, i, j] == mask[b, h, i // bq, j // bk]
               for b, h, i, j in torch.cartesian_prod(*map(torch.arange, wide.shape)).tolist())


def test_pool_blocks_is_a_mean_in_the_input_s_type():
    x = torch.randn(2, 3, 12, 5)
    close(pool_blocks(x, 4), torch.stack([x[:, :, 4 * i:4 * i + 4].mean(2) for i in range(3)], 2))
    assert pool_blocks(x.bfloat16(), 4).dtype == torch.bfloat16


@few
@given(rows=st.integers(1, 6), cols=st.integers(1, 6), r=st.integers(1, 13))
def test_locality_is_what_loops_do(rows, cols, r):
    steps = range(-(r // 2), r - r // 2)
    want = [[j // cols - i // cols in steps and j % cols - i % cols in steps for j in range(rows * cols)]
            for i in range(rows * cols)]
    mask = locality_mask(rows, cols, r)
    assert mask.dtype == torch.bool and mask.tolist() == want
    assert mask.diagonal().all() and (r % 2 == 0 or torch.equal(mask, mask.T))


@pytest.mark.parametrize("r", [0, -1])
def test_locality_refuses(r):
    with pytest.raises(ValueError, match=f"local_range={r}; it must be at least 1"):
        locality_mask(2, 3, r)


@pytest.mark.parametrize("block_size", [(4, 4), (4, 2)])
def test_draft_probabilities_are_what_loops_do(block_size):
    rows, cols, bk = 2, 3, block_size[1]
    local, halves = locality_mask(rows, cols, 3), 4 // bk
    q, k, _ = random_qkv(2, 2, 2 * 6 * 4, 3 * 6 * 4, 5)  # two slabs ask, three are there
    p = block_probabilities(q, k, local=local, block_size=block_size)
    assert p.shape == (2, 2, 12, 18 * halves)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, p.shape[:3])).tolist():
        score = [q[b, h, 4 * i:4 * i + 4].mean(0) @ k[b, h, bk * j:bk * j + bk].mean(0) / 5**0.5
                 if local[i % 6, j // halves % 6] else torch.tensor(-math.inf) for j in range(p.shape[3])]
        close(p[b, h, i], torch.stack(score).softmax(0))


@pytest.mark.parametrize("lq, lk, block_size", [(20, 24, (4, 4)), (24, 20, (4, 4)), (24, 24, (4, 3))])
def test_draft_refuses_part_of_a_slab(lq, lk, block_size):
    q, k, _ = random_qkv(lq=lq, lk=lk)
    with pytest.raises(ValueError, match=f"{lq} query and {lk} key tokens.*slabs of 6 blocks of 4"):
        block_probabilities(q, k, local=locality_mask(2, 3, 3), block_size=block_size)


@few
@given(slabs=SMALL, slab=SMALL, nk=st.integers(1, 5), topk=st.integers(-2, 20), ties=st.booleans(),
       seed=st.integers(0, 99))
def test_selection_is_what_sorting_does(slabs, slab, nk, topk, ties, seed):
    g = torch.Generator().manual_seed(seed)
    p = torch.randint(0, 4, (2, 2, slabs * slab, nk), generator=g) / 4
    p = p if ties else torch.rand(p.shape, generator=g)
    mask = select_blocks(p, topk=topk, slab=slab)
    for b, h, s in torch.cartesian_prod(*map(torch.arange, (2, 2, slabs))).tolist():
        rows = slice(s * slab, s * slab + slab)
        values = p[b, h, rows].flatten().sort(descending=True).values
        threshold = values[min(topk, len(values) - 1)] if topk > 0 else 1
        want = p[b, h, rows] > threshold
        assert torch.equal(mask[b, h, rows], want)
        assert want.sum() <= max(topk, 0) and (ties or topk < 1 or want.sum() == min(topk, slab * nk - 1))


def test_selection_refuses_part_of_a_slab():
    with pytest.raises(ValueError, match="5 query blocks are not whole slabs of slab=2"):
        select_blocks(torch.rand(1, 1, 5, 4), topk=3, slab=2)


OFFICIAL = [((4, 4), 1919, 256, 0.999, 0.999), ((5, 5), 2999, 625, 1, 1), ((6, 6), 4319, 1296, 1, 0.833),
            ((8, 8), 7679, 3364, 0.625, 0.469), ((6, 10), 7199, 2880, 0.667, 0.5), ((6, 11), 7919, 3276, 0.606, 0.454),
            ((8, 14), 13439, 7192, 0.357, 0.268)]


@pytest.mark.parametrize("grid, topk, pairs, first, later", OFFICIAL)
def test_official_sizes(grid, topk, pairs, first, later):
    "Table 4.4 of the specification, in both units of the budget."
    s = grid[0] * grid[1]
    policies = LCSA(block_size=(1, 1)), LCSA(block_size=(1, 1), topk_ratio=2.0 * 768 * 1280 / (s * 128**2))
    assert [p.topk(s) for p in policies] == [topk, topk]
    assert locality_mask(*grid, 11).sum() == pairs
    for slabs, want in ((3, first), (4, later)):
        q, k, _ = random_qkv(lq=s, lk=s * slabs, d=8)
        share = [p(q, k, grid=grid).float().mean().item() for p in policies]
        assert share[0] == share[1] == pytest.approx(want, abs=6e-4)


def test_heads_slabs_and_batch_do_not_compete():
    policy = LCSA(key_blocks=2, local_range=3, block_size=(2, 2))
    q, k, _ = random_qkv(2, 3, 2 * 6 * 2, 3 * 6 * 2, 4)
    mask = policy(q, k, grid=(2, 3))
    assert mask.shape == (2, 3, 12, 18) and not mask.requires_grad
    for b, h, s in torch.cartesian_prod(*map(torch.arange, (2, 3, 2))).tolist():
        alone = policy(q[b:b + 1, h:h + 1, 12 * s:12 * s + 12], k[b:b + 1, h:h + 1], grid=(2, 3))
        assert torch.equal(mask[b, h, 6 * s:6 * s + 6], alone[0, 0])
        assert alone.sum() == policy.topk(6) == 11
    assert not (mask & ~locality_mask(2, 3, 3).repeat(2, 3)).any()


def test_half_blocks_keep_as_many_entries():
    q, k, _ = random_qkv(1, 1, 15 * 128, 60 * 128, 8)
    masks = [LCSA(12, 5, size)(q, k, grid=(3, 5)) for size in ((128, 128), (128, 64))]
    assert [m.shape[-1] for m in masks] == [60, 120]
    assert [m.sum().item() for m in masks] == [12 * 15 - 1] * 2
    close(attend(q, k, k, block_mask=masks[1], block_size=(128, 64)),
          attend_reference(q, k, k, block_mask=masks[1], block_size=(128, 64)))


def test_selection_gives_no_gradient():
    q, k, _ = random_qkv(1, 1, 8, 8)
    mask = LCSA(2, 3, (2, 2))(q.requires_grad_(), k, grid=(2, 2))
    assert not mask.requires_grad and mask.dtype == torch.bool
