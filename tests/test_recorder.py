"""The recorder: what it keeps, that it keeps no more, and that it leaves nothing behind."""
import numpy as np
import pytest
import torch

from flashvsr_nb.attention import LCSA
from flashvsr_nb.dit import DiT, ModelConfig
from flashvsr_nb.kv_cache import ConcatCache, KVCache
from flashvsr_nb.recorder import Recording, capture, slab_frames
from flashvsr_nb.small_caches import CacheGroup

CFG = ModelConfig(dim=64, heads=2, layers=3, ffn_dim=32, text_dim=8, freq_dim=8, key_blocks=2.0, local_range=3)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dit():
    torch.manual_seed(0)
    return DiT(CFG).eval()


@torch.no_grad()
def run(dit, calls=1, *, rows=4096, cache=KVCache, policy=None, height=16, width=32, f0=0, caches=None):
    "A few chunks of a stream of random latents; 128*128 pixels are 16*16 latents and one block."
    slab = height * width // 2
    caches = caches or [cache(slab) for _ in dit.blocks] if cache else None
    cond, outs = dit.condition(torch.ones(1, 2, CFG.text_dim)), []
    for n in range(calls):
        f = 6 if f0 == 0 else 2
        g = torch.Generator().manual_seed(f0)
        x = torch.randn(1, 16, f, height, width, generator=g)
        tokens = torch.randn(1, f * slab // 2, CFG.dim, generator=g)
        outs.append(dit(x, tokens, cond, f0=f0, caches=caches, policy=policy, rows=rows))
        f0 += f
    return outs


def hooks(module):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_both_ways_through_a_block_are_recorded_alike(dit):
    with capture(dit) as lean:
        run(dit, 2, rows=100)
    with capture(dit) as plain:
        run(dit, 2, rows=0)
    assert len(lean.layers) == len(plain.layers) == 6
    for a, b in zip(lean.layers, plain.layers):
        np.testing.assert_array_equal(a.mask, b.mask)
        assert (a.layer, a.call, a.q_slabs, a.k_slabs) == (b.layer, b.call, b.q_slabs, b.k_slabs)
        for name in ("q_mean", "k_mean", "q_alike", "k_alike", "mass", "keys"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=2e-3)


@pytest.mark.parametrize("kind", ["offload", "int8"])
def test_other_caches_are_recorded_too(dit, kind):
    group = CacheGroup(kind)
    with capture(dit) as rec:
        run(dit, 3, cache=group.make)
    assert rec.at(1, chunk=2).k_slabs == (4, 1, 2, 3)


def test_the_users_own_callback_still_hears(dit):
    masks = []
    with capture(dit) as rec, torch.no_grad():
        x, tokens = torch.randn(1, 16, 6, 16, 16), torch.randn(1, 384, CFG.dim)
        dit(x, tokens, dit.condition(torch.ones(1, 2, CFG.text_dim)), record=masks.append)
    assert len(masks) == 3
    for mask, record in zip(masks, rec.layers):
        np.testing.assert_array_equal(mask[0], record.mask)


def test_chunks_streams_and_slabs_are_told_apart(dit):
    with capture(dit, calls=6) as rec:
        run(dit, 3)
        run(dit, 2, cache=ConcatCache)
    assert [(r.stream, r.chunk) for r in rec.layers[::3]] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    ring, plain = rec.at(0, chunk=2), rec.at(0, chunk=1, stream=1)
    assert (ring.q_slabs, ring.k_slabs) == ((4,), (4, 1, 2, 3))
    assert plain.k_slabs == (0, 1, 2, 3)
    assert rec.at(2, chunk=1).mask.shape == (2, 2, 8) and rec.calls == 5 and rec.dropped == 0


def test_two_streams_may_take_turns(dit):
    caches = [[KVCache(256) for _ in dit.blocks] for _ in range(2)]
    with capture(dit, calls=4) as rec:
        for f0 in (0, 6):
            for own in caches:
                run(dit, f0=f0, caches=own)
    assert [(r.stream, r.chunk) for r in rec.layers[::3]] == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_without_caches(dit):
    with capture(dit) as rec:
        run(dit, 2, cache=None)
    assert [(r.stream, r.chunk, r.k_slabs) for r in rec.layers[::3]] == [(0, 0, (0, 1, 2)), (0, 1, (3,))]


def test_all_queries_give_the_exact_mass(dit):
    seen = []

    class Policy(LCSA):
        def __call__(self, q, k, *, grid):
            seen.append((q.clone(), k.clone()))
            return super().__call__(q, k, grid=grid)

    with capture(dit, queries=128) as rec:
        run(dit, 2, policy=Policy(2.0, 3))
    pieces = iter(seen)
    for record in rec.layers:
        parts = [next(pieces) for _ in record.q_slabs]
        q, k = torch.cat([q for q, _ in parts], 2), parts[0][1]
        mass = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).unflatten(-1, (-1, 128)).sum(-1).unflatten(2, (-1, 128)).mean(3)
        np.testing.assert_allclose(record.mass, mass[0], atol=1e-3)
        np.testing.assert_allclose(record.scores(), q.unflatten(2, (-1, 128)).mean(3)[0] @ k.unflatten(2, (-1, 128)).mean(3)[0].mT
                                   / q.shape[-1] ** 0.5, atol=1e-5)
        np.testing.assert_allclose(record.covered(np.ones_like(record.mask)), 1, atol=2e-3)
        assert record.density == pytest.approx(record.mask.mean((1, 2)))


def test_half_blocks_and_dense_policies(dit):
    class Dense:
        block_size = (128, 128)
        def __call__(self, q, k, *, grid): return None

    with capture(dit, calls=2) as rec:
        run(dit, policy=LCSA(2.0, 3, (128, 64)))
        run(dit, policy=Dense())
    half, dense = rec.layers[0], rec.layers[-1]
    assert half.mask.shape == (2, 6, 12) and half.k_mean.shape == (2, 12, 32) and half.k_slabs == (0, 1, 2)
    assert dense.mask.all() and dense.density == pytest.approx(1)


def test_results_do_not_change_and_nothing_stays(dit):
    plain = run(dit, 2)
    with capture(dit) as rec:
        recorded = run(dit, 2)
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded)) and hooks(dit) == 0
    with pytest.raises(ZeroDivisionError), capture(dit) as rec:
        run(dit)
        1 / 0
    assert hooks(dit) == 0 and len(rec.layers) == 3 and rec.seconds[0]["dit"] > 0


def test_a_policy_that_raises_leaves_nothing(dit):
    class Broken(LCSA):
        def __call__(self, q, k, *, grid): raise RuntimeError("no mask today")

    with pytest.raises(RuntimeError, match="no mask today"), capture(dit) as rec:
        run(dit, policy=Broken())
    assert hooks(dit) == 0 and not rec.layers


def test_one_inside_another(dit):
    with capture(dit) as outer:
        with capture(dit, layers=[1]) as inner:
            run(dit)
        run(dit)
    assert [r.layer for r in inner.layers] == [1] and [r.layer for r in outer.layers] == [0, 1, 2] * 2
    np.testing.assert_array_equal(inner.layers[0].mask, outer.at(1).mask)
    assert hooks(dit) == 0


def test_only_what_was_asked_for(dit):
    with capture(dit, calls={1}, layers=[0, 2], tokens=64) as rec:
        run(dit, 3)
    assert [(r.call, r.layer) for r in rec.layers] == [(1, 0), (1, 2)] and len(rec.seconds) == 1 and rec.calls == 3
    assert rec.layers[0].keys.shape == (2, 64, 32)


def test_memory_is_bounded(dit):
    with capture(dit, calls=50) as rec:
        run(dit, 3)
    one = max(r.nbytes for r in rec.layers)
    with capture(dit, calls=50, limit=2 * one) as small:
        run(dit, 3)
    assert small.nbytes <= 2 * one and small.dropped == 9 - len(small.layers) > 0


def test_keys_are_those_of_the_newest_slab(dit):
    seen = []

    class Policy(LCSA):
        def __call__(self, q, k, *, grid):
            seen.append(k.clone())
            return super().__call__(q, k, grid=grid)

    with capture(dit, calls=4) as rec:
        run(dit, 3, policy=Policy(2.0, 3))
    record, k = rec.at(0, chunk=2), seen[12]  # 3 layers by 3 slabs, by 1, then this
    assert record.k_slabs[0] == 4  # slab 4 lies in slot 0
    np.testing.assert_allclose(record.keys, k[0, :, :256], atol=2e-3)


def test_saved_and_read_back(dit, tmp_path):
    with capture(dit) as rec:
        run(dit, 2)
    rec.save(tmp_path / "run.npz")
    back = Recording.load(tmp_path / "run.npz")
    assert len(back.layers) == len(rec.layers)
    for a, b in zip(rec.layers, back.layers):
        assert (a.layer, a.grid, a.k_slabs, a.block_size) == (b.layer, b.grid, b.k_slabs, b.block_size)
        for name in ("mask", "mass", "q_mean", "k_alike", "keys"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_times_add_up(dit):
    with capture(dit) as rec:
        run(dit, 2)
    for parts in rec.seconds:
        layers = sum(s for part, s in parts.items() if part[1:] == ("layer",))
        assert 0 < layers <= parts["dit"] and parts["recorder"] > 0
        assert all(0 < parts[i, "cross_attn"] + parts[i, "ffn"] < parts[i, "layer"] for i in range(3))


@pytest.mark.parametrize("options, words", [
    (dict(layers=[3]), "layers=\\[3\\]; this DiT has the layers 0 to 2"), (dict(queries=0), "queries=0"), (dict(tokens=0), "tokens=0")])
def test_wrong_options_are_refused_at_once(dit, options, words):
    with pytest.raises(ValueError, match=words), capture(dit, **options):
        pass
    assert hooks(dit) == 0


def test_what_is_not_there_is_named(dit):
    with capture(dit) as rec:
        run(dit)
    with pytest.raises(ValueError, match="layer=9, chunk=0, stream=0; recorded: layer 0, 1, 2; chunk 0; stream 0"):
        rec.at(9)
    with pytest.raises(ValueError, match="none"):
        Recording().at()
    with pytest.raises(ValueError, match="Linear has no DiT"), capture(torch.nn.Linear(1, 1)):
        pass


def test_frames_of_slabs_follow_each_other():
    frames = [f for slab in range(5) for f in slab_frames(slab)]
    assert frames == list(range(37))
