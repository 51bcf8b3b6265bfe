"Patches, windows and rotary positions: inverses, loops, awkward sizes, and scores that know distances only."
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashvsr_nb.patching import (WINDOW, PatchEmbed, apply_rope, block_grid, patchify, rope_frequencies, rope_table,
                                  sincos_positions, unpatchify, window_merge, window_partition)

few = settings(max_examples=25)
close = torch.testing.assert_close
SMALL = st.integers(1, 3)


# ---- patches

@few
@given(b=SMALL, c=st.integers(1, 4), f=st.integers(0, 3), rows=SMALL, cols=SMALL, patch=st.integers(1, 5))
def test_patches_there_and_back(b, c, f, rows, cols, patch):
    size = (*([f] if f else []), rows * patch, cols * patch)  # f = 0: an image
    x = torch.randn(b, c, *size)
    tokens = patchify(x, patch)
    assert tokens.shape == (b, max(f, 1) * rows * cols, patch**2 * c)
    assert torch.equal(unpatchify(tokens, patch, size=size), x)


def test_patchify_is_what_loops_do():
    x = torch.randn(2, 3, 2, 4, 6)
    want = [[x[b, k, t, 2 * r + i, 2 * s + j] for i, j, k in itertools.product(range(2), range(2), range(3))]
            for b, t, r, s in itertools.product(range(2), range(2), range(2), range(3))]
    assert torch.equal(patchify(x, 2).flatten(0, 1), torch.tensor(want))


def test_patches_of_any_layout_and_dtype():
    frames = torch.arange(2 * 8 * 8 * 3, dtype=torch.uint8).view(2, 8, 8, 3)  # as they come from a file
    x = frames.permute(0, 3, 1, 2)
    tokens = patchify(x, 4)
    assert tokens.dtype == torch.uint8 and torch.equal(tokens[1, 3], frames[1, 4:, 4:].flatten())
    halves = tokens.repeat(1, 1, 2)[..., :48]  # not contiguous
    assert torch.equal(unpatchify(halves, 4, size=(8, 8)), x)


@pytest.mark.parametrize("shape, patch, said", [
    ((1, 3, 8, 9), 4, "8x9 is not a multiple of patch=4"), ((1, 3, 9, 8), 4, "9x8"), ((1, 3, 8, 8), 0, "patch=0"),
    ((3, 8, 8), 4, r"shape \(3, 8, 8\)"), ((1, 1, 3, 2, 8, 8), 4, r"\(B,C,F,H,W\)")])
def test_patchify_refuses(shape, patch, said):
    with pytest.raises(ValueError, match=said):
        patchify(torch.zeros(shape), patch)


@pytest.mark.parametrize("shape, size", [((1, 3, 12), (4, 4)), ((1, 4, 12), (4, 5)), ((1, 4, 13), (4, 4)),
                                         ((1, 4, 12), (2, 4, 4))])
def test_unpatchify_refuses(shape, size):
    with pytest.raises(ValueError, match="do not make size=.*patch=2"):
        unpatchify(torch.zeros(shape), 2, size=size)


# ---- learnt and fixed positions

def test_sincos_positions_say_where():
    pos = sincos_positions(300, 64)
    assert pos.shape == (300, 64) and pos.dtype == torch.float32
    close((pos @ pos.T).diagonal(), torch.full((300,), 32.))
    assert ((pos @ pos.T).argmax(0) == torch.arange(300)).all()
    close(sincos_positions(9, 2, max_period=7)[:, 0], torch.arange(9.).sin())


@pytest.mark.parametrize("dim", [0, 7, -2])
def test_sincos_positions_refuses(dim):
    with pytest.raises(ValueError, match=f"dim={dim}"):
        sincos_positions(3, dim)


def test_patch_embed_learns_every_part():
    embed = PatchEmbed(4, 3, dim=10, n=6)
    x = torch.randn(2, 3, 8, 12)
    out = embed(x)
    assert out.shape == (2, 6, 10)
    close(out - embed.proj(patchify(x, 4)), embed.pos.expand(2, -1, -1))
    out.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in embed.parameters())


# ---- windows

@few
@given(b=SMALL, slabs=SMALL, rows=SMALL, cols=SMALL, d=st.integers(1, 3))
def test_windows_there_and_back(b, slabs, rows, cols, d):
    size = (2 * slabs, 8 * rows, 8 * cols)
    x = torch.randn(b, *size, d)
    y = window_partition(x)
    assert y.shape == (b, slabs * rows * cols * 128, d)
    assert torch.equal(window_merge(y, size=size), x)
    for s, r, c in itertools.product(range(slabs), range(rows), range(cols)):  # block number = (slab, row, column)
        block = y.unflatten(1, (-1, 128))[:, (s * rows + r) * cols + c]
        assert torch.equal(block, x[:, 2 * s:2 * s + 2, 8 * r:8 * r + 8, 8 * c:8 * c + 8].flatten(1, 3))


def test_windows_take_a_convolution_s_output_and_carry_gradients():
    x = torch.randn(1, 5, 2, 8, 16, requires_grad=True)
    y = window_partition(x.permute(0, 2, 3, 4, 1))
    close(window_merge(y.expand(3, -1, -1), size=(2, 8, 16))[2].permute(3, 0, 1, 2), x[0])
    (y * torch.arange(256.)[:, None]).sum().backward()
    assert sorted(x.grad[0, 0].flatten().tolist()) == list(range(256))


def test_window_is_128_tokens():
    assert WINDOW == (2, 8, 8)
    assert block_grid(768 // 16, 1408 // 16) == (6, 11)


@pytest.mark.parametrize("h, w", [(7, 8), (8, 12), (0, 8), (8, 0), (-8, 8)])
def test_block_grid_refuses(h, w):
    with pytest.raises(ValueError, match=f"{h}x{w} tokens.*multiples of 128"):
        block_grid(h, w)


def test_windows_refuse():
    with pytest.raises(ValueError, match="3 latent frames"):
        window_partition(torch.zeros(1, 3, 8, 8, 1))
    with pytest.raises(ValueError, match="127 tokens"):
        window_merge(torch.zeros(1, 127, 1), size=(2, 8, 8))
    with pytest.raises(ValueError, match="even F"):
        window_merge(torch.zeros(1, 192, 1), size=(3, 8, 8))


# ---- rotary positions

@few
@given(half=st.integers(1, 128))
def test_every_pair_has_an_axis(half):
    axes = rope_frequencies(2 * half)
    time, height, width = map(len, axes)
    assert time + height + width == half and height == width <= time <= height + 2
    assert all(w.dtype == torch.float64 and (w[:1] == 1).all() and (w.diff() < 0).all() for w in axes)


def test_frequencies_of_the_official_head():
    time, height, width = rope_frequencies(128)
    assert [len(w) for w in (time, height, width)] == [22, 21, 21]
    close(time[3].item(), 10000 ** (-6 / 44), rtol=1e-14, atol=0)
    close(width[20].item(), 10000 ** (-40 / 42), rtol=1e-14, atol=0)
    assert torch.equal(height, width)


@pytest.mark.parametrize("d", [0, 1, 127])
def test_frequencies_refuse(d):
    with pytest.raises(ValueError, match=f"head_dim={d}"):
        rope_frequencies(d)


def rotated(x, size=(2, 8, 8), f0=0):
    return apply_rope(x, *rope_table(size, x.shape[-1], f0=f0))


@few
@given(f0=st.integers(0, 10**6), shift=st.integers(0, 10**6), d=st.sampled_from([6, 32, 64, 128]))
def test_scores_know_distances_only(f0, shift, d):
    q, k = torch.randn(2, 1, 1, 128, d, generator=torch.Generator().manual_seed(d))
    here, there = (rotated(q, f0=f) @ rotated(k, f0=f).mT / d**0.5 for f in (f0, f0 + shift))
    close(here, there, atol=2e-5, rtol=1e-4)
    close(rotated(q, f0=f0).norm(dim=-1), q.norm(dim=-1))


def test_a_chunk_continues_the_one_before():
    "Later chunks of 2 latent frames start at 4 + 2k: the last slab of the first 6 frames has the angles of f0 = 4."
    whole, part = rope_table((6, 8, 16), 128), rope_table((2, 8, 16), 128, f0=4)
    for w, p in zip(whole, part):
        assert torch.equal(w[-256:], p) and not torch.equal(w[:256], p)


@pytest.mark.parametrize("step, owned", [((1, 0, 0), range(0, 44)), ((0, 1, 0), range(44, 86)),
                                         ((0, 0, 1), range(86, 128))])
def test_which_channels_turn_with_which_axis(step, owned):
    where = window_partition(torch.cartesian_prod(*map(torch.arange, (2, 8, 8))).view(1, 2, 8, 8, 3))[0]
    at = (where == torch.tensor(step)).all(1).nonzero().item()
    x = torch.ones(1, 1, 128, 128)
    turned = (rotated(x) != x)[0, 0]
    assert not turned[0].any()
    assert turned[at].nonzero().flatten().tolist() == [*owned]


def test_pairs_are_interleaved():
    x = torch.zeros(1, 1, 128, 128)
    for channel in (0, 1, 46, 127):
        y = rotated(x.index_fill(3, torch.tensor(channel), 1.), f0=1)[0, 0, -1]
        assert y.nonzero().flatten().tolist() == [channel // 2 * 2, channel // 2 * 2 + 1]


def test_apply_rope_is_a_complex_product():
    x = torch.randn(3, 2, 256, 128, dtype=torch.float64)
    cos, sin = rope_table((4, 8, 8), 128, f0=77)
    z = torch.view_as_complex(x.view(3, 2, 256, 64, 2)) * torch.complex(cos.double(), sin.double())
    close(apply_rope(x, cos, sin), torch.view_as_real(z).flatten(-2))


def test_tables_have_no_end():
    for f0 in (1023, 100_000, 2**24 + 1, 10**12):
        cos, sin = rope_table((2, 8, 8), 128, f0=f0)
        angle = (f0 + 1) * rope_frequencies(128)[0]
        close(cos[-1, :22], angle.cos().float(), atol=1e-7, rtol=0)
        close(sin[-1, :22], angle.sin().float(), atol=1e-7, rtol=0)
    assert cos.shape == sin.shape == (128, 64)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float32, 1e-6)])
def test_rope_turns_in_float32(dtype, tolerance):
    "The result is the exact one rounded once to the input's type."
    x = torch.randn(1, 2, 128, 128).to(dtype)
    out, exact = rotated(x, f0=999), rotated(x.double(), f0=999)
    assert out.dtype == dtype
    close(out.double(), exact, rtol=tolerance, atol=1e-6)


def test_gradient_turns_back():
    x = torch.randn(1, 1, 128, 6, requires_grad=True)
    y = torch.randn_like(x)
    cos, sin = rope_table((2, 8, 8), 6, f0=5)
    (apply_rope(x, cos, sin) * y).sum().backward()
    close(x.grad, apply_rope(y, cos, -sin))


@pytest.mark.cuda
def test_tables_on_the_gpu_are_those_of_the_cpu():
    x = torch.randn(1, 2, 256, 128)
    tables = {d: rope_table((4, 8, 8), 128, f0=100_000, device=d) for d in ("cpu", "cuda")}
    here, there = (apply_rope(x.to(d), *table).cpu() for d, table in tables.items())
    close(here, there, atol=1e-5, rtol=1e-5)
