"""Streaming: chunks, the ring against the plain cache, a stream against the whole video, the LQ projector."""
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from flashvsr_nb.attention import LCSA, attend
from flashvsr_nb.dit import DiT, ModelConfig
from flashvsr_nb.kv_cache import ChannelNorm, ConcatCache, KVCache, LQProjector, chunk, chunks_for, stacked_conv

OFFICIAL = json.loads((Path(__file__).parent / "golden" / "official_state_dict_shapes.json").read_text())
VARIANTS = ["causal", "buffer"]


def slabs(x, slab):
    return x.unflatten(2, (-1, slab)).unbind(2)


def random_kv(n, slab, *, batch=1, heads=2, d=4, dtype=torch.float32):
    return [torch.randn(batch, heads, n * slab, d).to(dtype) for _ in "kv"]


# ---- chunks

@given(st.integers(0, 10_000))
def test_chunks_follow_each_other(k):
    a, b = chunk(k), chunk(k + 1)
    assert (a.latents.stop, a.lq.stop, a.frames.stop) == (b.latents.start, b.lq.start, b.frames.start)
    for c in (a, b):
        assert c.lq.stop == c.frames.stop + 4 == 4 * c.latents.stop + 1  # four frames of look-ahead
    assert (len(b.latents), len(b.lq), len(b.frames)) == (2, 8, 8)


def test_first_chunk():
    assert (chunk(0).latents, chunk(0).lq, chunk(0).frames) == (range(6), range(25), range(21))


@given(st.integers(1, 100_000))
def test_chunks_for_is_enough_and_not_too_many(frames):
    n = chunks_for(frames)
    assert chunk(n - 1).frames.stop >= frames
    assert n == 1 or chunk(n - 2).frames.stop < frames


# ---- caches

@given(keep=st.integers(1, 6), sizes=st.lists(st.integers(1, 6), min_size=1, max_size=8),
       slab=st.integers(1, 3), batch=st.integers(1, 2))
def test_ring_holds_what_the_plain_cache_holds(keep, sizes, slab, batch):
    "Any sequence of chunk lengths; `order` names the slab in each slot."
    torch.manual_seed(0)
    ring, plain, total = KVCache(slab, keep=keep), ConcatCache(slab, keep=keep), 0
    for n in sizes:
        new = random_kv(n, slab, batch=batch)
        expected, got = plain.update(*new), ring.update(*new)
        first = total - min(total, keep)
        total += n
        assert sorted(ring.order) == [*range(first, total)]
        for a, b in zip(got, expected):
            ours, theirs = slabs(a, slab), slabs(b, slab)
            assert len(ours) == len(theirs) == len(ring.order)
            assert all(torch.equal(x, theirs[s - first]) for x, s in zip(ours, ring.order))


@given(keep=st.integers(1, 5), first=st.integers(1, 4), chunks=st.integers(2, 12))
def test_ring_takes_its_memory_once(keep, first, chunks):
    ring = KVCache(2, keep=keep)
    ring.update(*random_kv(first, 2))
    ring.update(*random_kv(1, 2))
    k, v = ring.k, ring.v
    for _ in range(chunks):
        out = ring.update(*random_kv(1, 2))
        assert ring.k is k and ring.v is v
        assert [t.data_ptr() for t in out] == [k.data_ptr(), v.data_ptr()]
    assert k.untyped_storage().nbytes() == 2 * 4 * 2 * 4 * (keep + 1)  # heads, d, slab, float32: no more than it needs
    assert ring.slots == keep + 1 and len(ring.order) == min(keep + 1, first + 1 + chunks)


def test_ring_of_a_flashvsr_stream_never_grows():
    "Three slabs, then one by one, keep 3: four slots from the first chunk on."
    ring, places = KVCache(4), set()
    for n in (3, 1, 1, 1, 1, 1):
        ring.update(*random_kv(n, 4))
        places.add((ring.k.data_ptr(), ring.slots))
    assert len(places) == 1 and ring.slots == 4 and ring.order == [4, 5, 6, 7]


def test_ring_copies_its_input():
    "The tensors of a chunk may be freed or reused."
    ring, (k, v) = KVCache(2), random_kv(3, 2)
    before = k.clone()
    ring.update(k, v)
    k.zero_()
    assert torch.equal(ring.update(*random_kv(1, 2))[0][:, :, :6], before)


@given(keep=st.integers(1, 4), chunks=st.integers(1, 6))
def test_attention_does_not_mind_slot_order(keep, chunks):
    torch.manual_seed(0)
    ring, plain = KVCache(4, keep=keep), ConcatCache(4, keep=keep)
    for i in range(chunks):
        new, q = random_kv(1 if i else 3, 4, d=8), torch.randn(1, 2, 4, 8)
        a, b = attend(q, *ring.update(*new)), attend(q, *plain.update(*new))
    assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_ring_keeps_the_dtype(dtype):
    ring = KVCache(2, keep=1)
    for n in (3, 1, 1):
        assert {t.dtype for t in ring.update(*random_kv(n, 2, dtype=dtype))} == {dtype}


def test_concat_cache_carries_gradients():
    cache, inputs = ConcatCache(2, keep=2), [[t.requires_grad_() for t in random_kv(n, 2)] for n in (3, 1, 1)]
    for new in inputs:
        k, v = cache.update(*new)
    (k.sum() + v.sum()).backward()
    grad = inputs[0][0].grad.unflatten(2, (3, 2)).amax((0, 1, 3, 4))
    assert grad.tolist() == [0, 0, 1]  # of the first chunk, the last slab is still seen at the third


@pytest.mark.parametrize("cache", [KVCache, ConcatCache])
def test_cache_errors(cache):
    with pytest.raises(ValueError, match=f"{cache.__name__}: keep=0 slabs"):
        cache(4, keep=0)
    for tokens in (0, 3, 6):
        with pytest.raises(ValueError, match=f"{tokens} tokens, must be whole slabs of 4"):
            cache(4).update(*[torch.randn(1, 1, tokens, 2)] * 2)


# ---- a stream is the whole video

class WholeVideo:
    "Every chunk's queries choose among the slabs that their chunk would see."

    def __init__(self, lcsa, keep):
        self.lcsa, self.keep, self.block_size = lcsa, keep, lcsa.block_size

    def __call__(self, q, k, *, grid):
        blocks, (bq, bk) = grid[0] * grid[1], self.block_size
        n = q.shape[2] // (128 * blocks)
        mask = torch.zeros(*q.shape[:2], n * blocks * 128 // bq, n * blocks * 128 // bk, dtype=torch.bool)
        for first, last in [(0, 3)] + [(i, i + 1) for i in range(3, n)]:
            see = max(0, first - self.keep)
            rows, columns = (slice(a * blocks * 128, last * blocks * 128) for a in (first, see))
            part = self.lcsa(q[:, :, rows], k[:, :, columns], grid=grid)
            mask[:, :, rows.start // bq:rows.stop // bq, columns.start // bk:columns.stop // bk] = part
        return mask


@settings(max_examples=10)
@given(keep=st.integers(1, 5), chunks=st.integers(1, 4), cache=st.sampled_from([KVCache, ConcatCache]),
       key_blocks=st.integers(1, 8), local_range=st.integers(1, 3), block_size=st.sampled_from([(128, 128), (128, 64)]),
       batch=st.integers(1, 2))
def test_stream_equals_one_shot(keep, chunks, cache, key_blocks, local_range, block_size, batch):
    torch.manual_seed(0)
    cfg = ModelConfig(dim=32, heads=2, layers=2, ffn_dim=48, text_dim=12, freq_dim=16, channels=4)
    net = DiT(cfg).requires_grad_(False)
    cond, lcsa = net.condition(torch.randn(1, 3, 12)), LCSA(key_blocks, local_range, block_size)
    latents = chunk(chunks - 1).latents.stop
    x, lq = torch.randn(batch, 4, latents, 16, 32), torch.randn(batch, latents * 128, 32)
    whole = net(x, lq, cond, policy=WholeVideo(lcsa, keep))
    caches = [cache(256, keep=keep) for _ in net.blocks]
    for f in (chunk(k).latents for k in range(chunks)):
        tokens = lq[:, 128 * f.start:128 * f.stop]
        part = net(x[:, :, f.start:f.stop], tokens, cond, f0=f.start, caches=caches, policy=lcsa)
        assert torch.allclose(part, whole[:, :, f.start:f.stop], atol=1e-5)


# ---- the LQ projector

def by_the_book(p, lq):
    "The specification, clip by clip, with 3-D convolutions in float64."
    x = torch.stack([F.pixel_unshuffle(f, 16) for f in lq.double().unbind(2)], 2)

    def conv(layer, norm, clip, past):
        y = F.pad(torch.cat([past, clip], 2), (1, 1, 1, 1, 0, 0), mode="replicate")
        y = F.conv3d(y, layer.weight.double(), layer.bias.double(), stride=(2, 1, 1))
        return F.silu(y / y.square().sum(1, keepdim=True).sqrt() * y.shape[1] ** 0.5 * norm.gamma.double())

    clip = x[:, :, :1].repeat(1, 1, 4, 1, 1)
    past1, past2, tokens = clip[:, :, 2:], conv(p.conv1, p.norm1, clip, clip[:, :, :2]), []
    for clip in x[:, :, 1:].split(4, dim=2):
        y = conv(p.conv1, p.norm1, clip, clip[:, :, 2:] if p.variant == "buffer" else past1)
        z = conv(p.conv2, p.norm2, y, y if p.variant == "buffer" else past2)
        past1, past2 = clip[:, :, 2:], y
        tokens.append(z.permute(0, 2, 3, 4, 1).flatten(1, 3))
    layer = p.linear_layers[0]
    return torch.cat(tokens, 1) @ layer.weight.double().T + layer.bias.double()


def projector(variant, dims=(6, 10), dim=8):
    p = LQProjector(dims, dim, variant=variant).requires_grad_(False)
    torch.nn.init.uniform_(p.norm1.gamma, 0.5, 2)
    torch.nn.init.uniform_(p.norm2.gamma, 0.5, 2)
    return p


def test_official_names_and_shapes():
    with torch.device("meta"):
        state = LQProjector().state_dict()
    shapes = {name: list(t.shape) for name, t in state.items()}
    assert shapes in OFFICIAL.values()
    assert len(state) == 8 and sum(t.numel() for t in state.values()) == 287_845_888


@settings(max_examples=25)
@given(variant=st.sampled_from(VARIANTS), clips=st.integers(1, 5), batch=st.integers(1, 2), height=st.integers(1, 3),
       width=st.integers(1, 3), data=st.data())
def test_projector_in_any_portions(variant, clips, batch, height, width, data):
    "Whatever the portions of the stream, the tokens are those of the specification."
    torch.manual_seed(0)
    p, lq = projector(variant), torch.rand(batch, 3, 1 + 4 * clips, 16 * height, 16 * width) * 2 - 1
    expected = by_the_book(p, lq)
    cuts = sorted(data.draw(st.sets(st.integers(0, clips - 1)))) + [clips]
    state, parts, start = None, [], 0
    for c in cuts:
        tokens, state = p(lq[:, :, start:1 + 4 * c], state)
        parts.append(tokens)
        start = 1 + 4 * c
    assert torch.allclose(torch.cat(parts, 1).double(), expected, atol=2e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_frame_zero_alone_gives_no_tokens(variant):
    tokens, state = projector(variant)(torch.randn(2, 3, 1, 32, 16))
    assert tokens.shape == (2, 0, 8)
    assert projector(variant)(torch.randn(2, 3, 4, 32, 16), state)[0].shape == (2, 2, 8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_reach_in_time(variant):
    "causal: frames 4m-5..4m+4; buffer: 4m+1..4m+4, whatever came before."
    p, x = projector(variant), torch.randn(1, 3, 17, 16, 16)
    nudged = x + torch.eye(17)[:, None, :, None, None] * torch.randn(3, 1, 16, 16)
    moved = (p(nudged)[0] - p(x)[0]).abs().amax(-1) > 1e-6
    for m in range(4):
        first = 4 * m - 5 if variant == "causal" else 4 * m + 1
        assert moved[:, m].nonzero().flatten().tolist() == [*range(max(0, first), 4 * m + 5)]


def test_state_is_small_and_of_fixed_size():
    p, lq, state = projector("causal"), torch.randn(1, 3, 41, 32, 32), None
    for start, stop in ((0, 25), (25, 33), (33, 41)):
        _, state = p(lq[:, :, start:stop], state)
        assert [tuple(t.shape) for t in state] == [(1, 2, 768, 2, 2), (1, 2, 6, 2, 2)]
    assert projector("buffer")(lq)[1] == ()


@pytest.mark.parametrize("frames, state", [(0, None), (3, None), (24, None), (1, ()), (6, ())])
def test_projector_frame_count_errors(frames, state):
    with pytest.raises(ValueError, match=f"{frames} frames; needs 1\\+4m"):
        projector("buffer")(torch.zeros(1, 3, frames, 16, 16), state)


def test_unknown_variant():
    with pytest.raises(ValueError, match="variant='v1.1'"):
        LQProjector(variant="v1.1")


def test_projector_batch_is_a_stack_of_singles_and_keeps_dtype():
    p, lq = projector("causal"), torch.randn(3, 3, 9, 16, 32)
    together, _ = p(lq)
    for i in range(3):
        assert torch.allclose(together[i:i + 1], p(lq[i:i + 1])[0], atol=1e-6)
    half, state = p.bfloat16()(lq.bfloat16())
    assert {half.dtype, *(t.dtype for t in state)} == {torch.bfloat16}
    assert (half.float() - together).norm() < 0.05 * together.norm()


@pytest.mark.parametrize("variant", VARIANTS)
def test_projector_gradients(variant):
    p, lq = LQProjector((6, 10), 8, variant=variant), torch.randn(1, 3, 9, 16, 16, requires_grad=True)
    p(lq)[0].square().sum().backward()
    assert all(t.grad is not None and t.grad.abs().max() > 0 for t in p.parameters())
    assert (lq.grad.abs().amax((0, 1, 3, 4)) > 0).tolist() == [variant == "causal"] + [True] * 8


@given(n=st.integers(1, 3), i=st.integers(1, 9), o=st.integers(1, 9), h=st.integers(1, 6), w=st.integers(1, 6))
def test_stacked_conv_is_conv2d(n, i, o, h, w):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(n, i, h + 2, w + 2), torch.randn(o, i, 3, 3), torch.randn(o)
    assert torch.allclose(stacked_conv(x, weight, bias), F.conv2d(x, weight, bias), atol=1e-4)


def test_stacked_conv_keeps_its_digits():
    "27,648 terms a sum, as in the projector's first layer: a direct convolution is ten times worse on some CPUs."
    x, weight, bias = torch.randn(1, 3072, 10, 10), torch.randn(16, 3072, 3, 3) / 27_648**0.5, torch.zeros(16)
    exact = F.conv2d(x.double(), weight.double())
    assert (stacked_conv(x, weight, bias) - exact).square().mean().sqrt() < 1e-6


@given(scale=st.floats(1e-3, 1e3), channels=st.integers(1, 12))
def test_channel_norm(scale, channels):
    torch.manual_seed(0)
    norm, x = ChannelNorm(channels), torch.randn(2, channels, 3, 2)
    torch.nn.init.normal_(norm.gamma)
    exact = x / x.square().mean(1, keepdim=True).sqrt() * norm.gamma[..., 0]
    assert torch.allclose(norm(scale * x), exact, atol=1e-4)
    assert norm(torch.zeros(1, channels, 1, 1)).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_channel_norm_of_nothing_is_nothing(dtype):
    norm = ChannelNorm(4).to(dtype)
    x = torch.zeros(1, 4, 2, 2, dtype=dtype)
    x[..., 0, 0] = 3
    y = norm(x)
    assert y.isfinite().all() and (y[..., 1, :] == 0).all() and torch.allclose(y[..., 0, 0].float(), torch.ones(1, 4), atol=1e-2)
