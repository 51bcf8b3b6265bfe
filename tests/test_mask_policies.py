"Mask policies: what each lets through, alone and combined, at which budget, and what a run's attention adds up to."
import dataclasses

import pytest
import torch

from flashvsr_nb.attention import LCSA, attend, locality_mask
from flashvsr_nb.dit import DiT, ModelConfig
from flashvsr_nb.kv_cache import ConcatCache, KVCache
from flashvsr_nb.mask_policies import Dense, OwnPlace, Sparge, attention_table, mask_policy
from flashvsr_nb.sparge_attention import block_mass, listen, sparge_mask

NANO = ModelConfig.nano()
GRID, S = (2, 3), 6


def random_qk(slabs=1, memory=3, d=8, heads=2, b=1):
    return [torch.randn(b, heads, n * S * 128, d) for n in (slabs, memory)]


SMALL = {"lcsa": dict(key_blocks=4, local_range=3), "sparge": dict(cdf=0.6, similarity=-1)}  # random tokens quarrel
SMALL["lcsa+sparge"] = SMALL["lcsa"] | SMALL["sparge"]


@pytest.mark.parametrize("block_size", [(128, 128), (128, 64)])
@pytest.mark.parametrize("slabs", [1, 3])
def test_policies_give_masks_that_attention_takes(block_size, slabs):
    q, k = random_qk(slabs, 3, b=2)
    masks = {}
    for name, thresholds in SMALL.items():
        policy = mask_policy(name, NANO, block_size=block_size, **thresholds)
        mask = masks[name] = policy(q.requires_grad_(), k, grid=GRID)
        assert mask.dtype == torch.bool and mask.shape == (2, 2, slabs * S, 3 * S * 128 // block_size[1])
        assert not mask.requires_grad and policy.block_size == block_size and 0 < mask.float().mean() < 1
        assert attend(q, k, k, block_mask=mask, block_size=block_size).isfinite().all()
    assert not (masks["lcsa+sparge"] & ~masks["lcsa"]).any()
    assert torch.equal(masks["lcsa+sparge"].any(-1), masks["lcsa"].any(-1))
    assert masks["sparge"].any(-1).all()
    near = locality_mask(*GRID, 3).repeat_interleave(128 // block_size[1], 1).repeat(slabs, 3)
    assert not (masks["lcsa"] & ~near).any()
    assert mask_policy("dense", NANO)(q, k, grid=GRID) is None


def test_both_together_draft_among_the_blocks_that_the_first_keeps():
    q, k = random_qk()
    lcsa = LCSA(4, 3)
    got = Sparge(similarity=-1, cdf=0.5, within=lcsa)(q, k, grid=GRID)
    assert torch.equal(got, sparge_mask(q, k, similarity=-1, cdf=0.5, within=lcsa(q, k, grid=GRID)))
    apart = sparge_mask(q, k, similarity=-1, cdf=0.5) & lcsa(q, k, grid=GRID)
    assert not torch.equal(got, apart)  # not what each would choose alone
    by_number = Sparge(similarity=-1, topk=0.5, within=lcsa)(q, k, grid=GRID).sum(-1)
    assert torch.equal(by_number, (lcsa(q, k, grid=GRID).sum(-1) // 2).clamp_min(1) * lcsa(q, k, grid=GRID).any(-1))


def test_half_blocks_cost_the_same_tokens_unless_told_otherwise():
    q, k = random_qk(1, 4)
    tokens = {}
    for name, kw in {"whole": {}, "half": dict(block_size=(128, 64)),
                     "as the reference": dict(block_size=(128, 64), same_count=True)}.items():
        policy = mask_policy("lcsa", NANO, local_range=11, key_blocks=8, **kw)
        tokens[name] = policy(q, k, grid=GRID)[0, 0].sum().item() * policy.block_size[1]
    budget = 8 * S
    assert tokens == {"whole": (budget - 1) * 128, "half": (2 * budget - 1) * 64, "as the reference": (budget - 1) * 64}
    reference = dataclasses.replace(ModelConfig.wan1_3b().lcsa, block_size=(128, 64))
    assert mask_policy("lcsa", ModelConfig.wan1_3b(), block_size=(128, 64), same_count=True) == reference
    assert mask_policy("lcsa", NANO) == NANO.lcsa


@pytest.mark.parametrize("block_size", [(128, 128), (128, 64)])
@pytest.mark.parametrize("cache", [ConcatCache, KVCache])
def test_own_place_is_read_in_every_slab_in_whatever_order_they_lie(block_size, cache):
    policy = mask_policy("lcsa", NANO, key_blocks=1, block_size=block_size, own_place=True)
    memory = cache(S * 128, keep=2)
    for n in (2, 1, 1, 1):
        k, _ = memory.update(*torch.randn(2, 1, 2, n * S * 128, 8))
        q = torch.randn(1, 2, n * S * 128, 8)
        without, mask = policy.policy(q, k, grid=GRID), policy(q, k, grid=GRID)
        halves = 128 // block_size[1]
        for i in range(n * S):
            own = [(s * S + i % S) * halves + half for s in range(k.shape[2] // S // 128) for half in range(halves)]
            assert mask[0, :, i, own].all()
            rest = torch.ones(mask.shape[-1], dtype=torch.bool)
            rest[own] = False
            assert torch.equal(mask[0, :, i, rest], without[0, :, i, rest])
    assert isinstance(policy, OwnPlace) and policy.block_size == block_size
    assert isinstance(mask_policy("dense", NANO, own_place=True), Dense)


@pytest.mark.parametrize("name, kw, said", [
    ("Sparge", {}, "mask='Sparge' is unknown; choose dense, lcsa, sparge or lcsa.sparge"),
    ("", {}, "is unknown"), ("lcsa+", {}, "is unknown"),
    ("lcsa", dict(block_size=(64, 128)), r"block_size=\(64, 128\); it must be"),
    ("lcsa", dict(cdf=0.5), "cdf belongs to SpargeAttention; mask='lcsa' does not use it"),
    ("dense", dict(similarity=0.5), "similarity belongs to SpargeAttention; mask='dense'"),
    ("sparge", dict(local_range=5), "local_range belongs to LCSA"),
    ("sparge", dict(same_count=True), "same_count belongs to LCSA"),
    ("sparge", dict(cdf=1.5), "cdf=1.5; it must be between 0 and 1"),
    ("sparge", dict(topk=float("nan")), "topk=nan; it must be between 0 and 1"),
    ("lcsa", dict(local_range=0), "local_range=0; it must be between 1 and inf"),
    ("lcsa", dict(key_blocks=-1), "key_blocks=-1; it must be between 0"),
    ("lcsa+sparge", dict(cdf=0.5, topk=0.5), "cdf=0.5 and topk=0.5; give one of them")])
def test_what_does_not_go_together_is_refused(name, kw, said):
    with pytest.raises(ValueError, match=said):
        mask_policy(name, NANO, **kw)


def test_thresholds_arrive():
    assert mask_policy("sparge", NANO, cdf=0.4, similarity=-0.5) == Sparge(cdf=0.4, similarity=-0.5)
    assert mask_policy("sparge", NANO, topk=0.25).topk == 0.25
    both = mask_policy("lcsa+sparge", NANO, topk=0.25, key_blocks=3, local_range=7)
    assert both == Sparge(topk=0.25, within=LCSA(3, 7))
    assert mask_policy("sparge", NANO, cdf=0.0).cdf == 0 and mask_policy("lcsa", NANO, key_blocks=0).topk(6) == -1


@pytest.fixture(scope="module")
def dit():
    torch.manual_seed(0)
    cfg = dataclasses.replace(NANO, dim=32, heads=2, ffn_dim=32, text_dim=8, freq_dim=8)
    return DiT(cfg).eval().requires_grad_(False)


def test_the_model_takes_them(dit):
    x, tokens = torch.randn(1, 16, 2, 32, 48), torch.randn(1, 2 * 16 * 24, 32)
    cond = dit.condition(torch.randn(1, 4, 8))
    out = {}
    for name, kw in {"dense": {}, "sparge": dict(cdf=1.0), "lcsa": dict(key_blocks=2), "lcsa+sparge": dict(cdf=0.3),
                     "half": dict(block_size=(128, 64))}.items():
        seen = []
        policy = mask_policy(name if name != "half" else "lcsa", dit.cfg, **kw)
        out[name] = dit(x, tokens, cond, policy=policy, record=seen.append)
        assert out[name].isfinite().all() and len(seen) == 2
    torch.testing.assert_close(out["dense"], out["sparge"])
    assert (out["dense"] - out["lcsa"]).abs().max() > 1e-5


def test_table_adds_up():
    with listen("reference") as calls:
        for n, memory in ((2, 2), (2, 2), (1, 3), (1, 3)):
            q, k = random_qk(n, memory)
            policy = LCSA(3, 3, (128, 64)) if memory == 3 else Dense()
            attend(q, k, k, block_mask=policy(q, k, grid=GRID), block_size=policy.block_size, backend="listen")
    table = attention_table(calls, layers=2, grid=GRID)
    assert [(r["chunk"], r["layer"], r["head"]) for r in table] == [
        (c, i, h) for c in (0, 1) for i in (0, 1) for h in (0, 1)]
    for r in table:
        call = calls[2 * r["chunk"] + r["layer"]]
        if r["chunk"] == 0:
            assert r["density"] == 1 and r["coverage"] == pytest.approx(1) and r["back"] == []
            continue
        mass = block_mass(call["q"], call["k"], block_size=(128, 64))[0, r["head"]]
        mask = call["block_mask"][0, r["head"]]
        assert r["coverage"] == pytest.approx(mass[mask].sum().item() / S)
        assert r["density"] == pytest.approx(17 / (S * 36))
        p = (call["q"][0, r["head"]] @ call["k"][0, r["head"]].T / 8**0.5).softmax(-1)
        assert r["back"] == pytest.approx([p[:, s * 768:s * 768 + 768].sum().item() / 768 for s in (2, 1, 0)], abs=1e-4)
