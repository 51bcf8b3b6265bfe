"""The diffusion transformer: names and shapes of the official file, norms, blocks, batches, dtypes, gradients, errors."""
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from flashvsr_nb.attention import LCSA
from flashvsr_nb.decoder import TCDecoder
from flashvsr_nb.dit import (
    Block, Conditioning, CrossAttention, DiT, Head, ModelConfig, RMSNorm, SelfAttention, modulate, timestep_embedding)
from flashvsr_nb.kv_cache import LQProjector
from flashvsr_nb.patching import rope_table

OFFICIAL = json.loads((Path(__file__).parent / "golden" / "official_state_dict_shapes.json").read_text())
CFG = ModelConfig(dim=32, heads=2, layers=2, ffn_dim=48, text_dim=12, freq_dim=16, channels=4)


class Dense:
    "A mask policy that allows everything."
    block_size = (128, 128)

    def __call__(self, q, k, *, grid):
        return None


def model(cfg=CFG, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return DiT(cfg).requires_grad_(False).to(dtype)


def inputs(batch=1, frames=2, height=16, width=16, *, cfg=CFG, dtype=torch.float32):
    "Latents of height x width, LQ tokens and a prompt."
    x = torch.randn(batch, cfg.channels, frames, height, width, dtype=dtype)
    lq = torch.randn(batch, frames * height * width // 4, cfg.dim, dtype=dtype)
    return x, lq, torch.randn(1, 3, cfg.text_dim, dtype=dtype)


@pytest.mark.parametrize("version", ["v1", "v1.1"])
def test_official_names_and_shapes(version):
    with torch.device("meta"):
        state = DiT(ModelConfig.wan1_3b(version)).state_dict()
    assert {name: list(t.shape) for name, t in state.items()} == OFFICIAL["dit"]
    assert len(state) == 825 and sum(t.numel() for t in state.values()) == 1_418_996_800


def test_drop_conditioning_frees_what_the_loop_does_not_use():
    with torch.device("meta"):
        net = DiT(ModelConfig.wan1_3b())
    before = {*net.state_dict()}
    count = sum(p.numel() for p in net.parameters())
    net.drop_conditioning()
    gone = before - {*net.state_dict()}
    assert count - sum(p.numel() for p in net.parameters()) == 167_270_400
    assert {name.split(".")[0] for name in gone} == {"text_embedding", "time_embedding", "time_projection", "blocks"}
    assert all("cross_attn" in name for name in gone if name.startswith("blocks"))


def test_forward_needs_only_what_is_left():
    net, (x, lq, context) = model(), inputs()
    cond = net.condition(context)
    before = net(x, lq, cond)
    net.drop_conditioning()
    assert torch.equal(net(x, lq, cond), before)
    with pytest.raises(RuntimeError, match="drop_conditioning"):
        net.condition(context)


def test_nano_is_small_as_a_whole():
    cfg = ModelConfig.nano()
    with torch.device("meta"):
        decoder = TCDecoder(cfg.decoder_channels, cfg.channels, residual=cfg.residual, pyramid=cfg.pyramid)
        parts = DiT(cfg), LQProjector(cfg.proj_dims, cfg.dim), decoder
    assert sum(p.numel() for part in parts for p in part.parameters()) <= 5_000_000
    assert cfg.dim // cfg.heads == 128


@pytest.mark.parametrize("said, values", [
    ("dim=30 must be a multiple of heads=4", dict(dim=30, heads=4)),
    ("projector='v1' must be one of: causal, buffer", dict(projector="v1")),
    ("resize='bicubic' must be one of: pil, torch", dict(resize="bicubic")),
    ("color_fix=None must be one of", dict(color_fix=None)),
])
def test_config_refuses(said, values):
    with pytest.raises(ValueError, match=said):
        ModelConfig(**values)


def test_config_is_a_value():
    assert ModelConfig.wan1_3b() == ModelConfig() and ModelConfig.wan1_3b("v1").projector == "buffer"
    assert dataclasses.replace(CFG, key_blocks=7., local_range=3).lcsa == LCSA(7., 3)
    assert hash(CFG) == hash(dataclasses.replace(CFG))
    with pytest.raises(dataclasses.FrozenInstanceError):
        CFG.dim = 3
    with pytest.raises(ValueError, match="version='v2'"):
        ModelConfig.wan1_3b("v2")


@given(t=st.floats(0, 1000), half=st.integers(1, 128))
def test_timestep_embedding_is_what_it_says(t, half):
    e = timestep_embedding(t, 2 * half)
    assert e.shape == (1, 2 * half) and e.dtype == torch.float64
    for i in {0, half // 2, half - 1}:
        angle = t * 10000 ** (-i / half)
        assert math.isclose(e[0, i], math.cos(angle), abs_tol=1e-9)
        assert math.isclose(e[0, half + i], math.sin(angle), abs_tol=1e-9)


@given(scale=st.floats(1e-3, 1e4), rows=st.integers(1, 4), dim=st.integers(1, 40))
def test_rms_norm(scale, rows, dim):
    torch.manual_seed(0)
    x, norm = scale * torch.randn(rows, dim), RMSNorm(dim).requires_grad_(False)
    nn.init.normal_(norm.weight)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    assert torch.allclose(norm(x).double(), exact, atol=1e-5)


def test_rms_norm_works_in_float32_inside():
    x = torch.full((1, 8), 300.0, dtype=torch.float16)  # its square, 90,000, is no float16
    assert torch.equal(RMSNorm(8).half()(x), torch.ones_like(x))
    assert RMSNorm(8).bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@given(batch=st.integers(1, 3), tokens=st.integers(1, 5), dim=st.integers(2, 20))
def test_modulate(batch, tokens, dim):
    torch.manual_seed(0)
    x, shift, scale = torch.randn(batch, tokens, dim), torch.randn(1, 1, dim), torch.randn(1, 1, dim)
    y = x.double()
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift
    assert torch.allclose(modulate(x, shift, scale).double(), y, atol=2e-4)


def by_the_book(net, x, lq, context, t=1000.0, f0=0):
    "The specification in float64 with dense attention, token by token in reading order: no windows, no tricks."
    W, cfg = {name: p.double() for name, p in net.state_dict().items()}, net.cfg
    x, lq, context = x.double(), lq.double(), context.double()
    linear = lambda y, name: y @ W[f"{name}.weight"].T + W[f"{name}.bias"]
    silu = lambda y: y / (1 + (-y).exp())
    gelu = lambda y: y / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))

    def norm(y):
        return (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + cfg.eps).sqrt()

    def rms(y, name):
        return y / (y.square().mean(-1, keepdim=True) + cfg.eps).sqrt() * W[f"{name}.weight"]

    b, channels, frames, height, width = x.shape
    grid = torch.cartesian_prod(torch.arange(frames) + f0, torch.arange(height // 2), torch.arange(width // 2)).double()
    d = cfg.dim // cfg.heads
    n = d // 3 // 2 * 2
    angle = torch.cat([grid[:, i:i + 1] * 10000 ** (-torch.arange(0, m, 2).double() / m)
                       for i, m in enumerate((d - 2 * n, n, n))], 1)

    def turn(y):
        a = torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angle), angle)
        return torch.view_as_real(a).flatten(-2)

    def attention(y, source, name, rotate):
        q, k, v = (linear(z, f"{name}.{part}") for z, part in ((y, "q"), (source, "k"), (source, "v")))
        q, k = rms(q, f"{name}.norm_q"), rms(k, f"{name}.norm_k")
        q, k, v = (z.unflatten(-1, (cfg.heads, d)).transpose(1, 2) for z in (q, k, v))
        q, k = (turn(q), turn(k)) if rotate else (q, k)
        y = (q @ k.mT / math.sqrt(d)).softmax(-1) @ v
        return linear(y.transpose(1, 2).flatten(2), f"{name}.o")

    freq = t * 10000 ** (-torch.arange(cfg.freq_dim // 2).double() / (cfg.freq_dim // 2))
    e = linear(torch.cat([freq.cos(), freq.sin()])[None], "time_embedding.0")
    e = linear(silu(e), "time_embedding.2")
    t6 = linear(silu(e), "time_projection.1").unflatten(1, (6, -1))
    c = linear(gelu(linear(context, "text_embedding.0")), "text_embedding.2")
    y = x.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)
    y = y @ W["patch_embedding.weight"].flatten(1).T + W["patch_embedding.bias"] + lq
    for i in range(cfg.layers):
        name = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = (W[f"{name}.modulation"] + t6)[0]
        z = norm(y) * (1 + scale1) + shift1
        y = y + gate1 * attention(z, z, f"{name}.self_attn", True)
        z = norm(y) * W[f"{name}.norm3.weight"] + W[f"{name}.norm3.bias"]
        y = y + attention(z, c.expand(b, -1, -1), f"{name}.cross_attn", False)
        z = norm(y) * (1 + scale2) + shift2
        y = y + gate2 * linear(gelu(linear(z, f"{name}.ffn.0")), f"{name}.ffn.2")
    shift, scale = W["head.modulation"][0] + e
    y = linear(norm(y) * (1 + scale) + shift, "head.head")
    y = y.view(b, frames, height // 2, width // 2, 2, 2, channels)
    return y.permute(0, 6, 1, 2, 4, 3, 5).reshape(x.shape)


@pytest.mark.parametrize("values", [dict(f0=0, t=1000.0), dict(f0=10, t=300.0)])
@pytest.mark.parametrize("eps", [1e-6, 1e-1])
def test_model_is_the_specification(eps, values):
    "A large epsilon shows in every norm that uses it."
    net = model(dataclasses.replace(CFG, eps=eps))
    for p in net.parameters():
        p.add_(0.1 * torch.randn_like(p))  # gains are not 1, offsets are not 0
    x, lq, context = inputs(2, 4, 16, 32)
    y = net(x, lq, net.condition(context, t=values["t"]), f0=values["f0"], policy=Dense())
    assert torch.allclose(y.double(), by_the_book(net, x, lq, context, **values), atol=1e-5, rtol=1e-5)


def test_cross_attention_reads_a_set():
    torch.manual_seed(0)
    layer, x, c = CrossAttention(CFG), torch.randn(2, 5, 32), torch.randn(1, 7, 32)
    with torch.no_grad():
        y = layer(x, layer.prompt(c))
        assert torch.allclose(y, layer(x, layer.prompt(c.flip(1))), atol=1e-6)
        assert torch.allclose(y, layer(x, layer.prompt(torch.cat([c, c], 1))), atol=1e-6)
        assert not torch.allclose(y, layer(x, layer.prompt(c[:, 1:])), atol=1e-3)
        assert torch.allclose(y[1:], layer(x[1:], layer.prompt(c)), atol=1e-6)


def test_self_attention_asks_policy_and_cache():
    "Keys go to the cache after norm and RoPE, values raw; the mask is made for what the cache returns."
    torch.manual_seed(0)
    layer, x, rope, seen = SelfAttention(CFG).requires_grad_(False), torch.randn(1, 128, 32), rope_table((2, 8, 8), 16), []

    class Cache:
        def update(self, k, v):
            seen.append((k, v))
            return torch.cat([k, k], 2), torch.cat([v, v], 2)

    class Policy(Dense):
        def __call__(self, q, k, *, grid):
            seen.append((q.shape, k.shape, grid))
            return torch.tensor([[[[True, False]]] * 2])

    masks = []
    y = layer(x, rope, grid=(1, 1), policy=Policy(), cache=Cache(), record=masks.append)
    assert torch.allclose(y, layer(x, rope, grid=(1, 1), policy=Dense()), atol=1e-6)  # the copy was masked away
    (k, v), shapes = seen
    assert shapes == ((1, 2, 128, 16), (1, 2, 256, 16), (1, 1)) and masks[0].shape == (1, 2, 1, 2)
    assert torch.equal(v.transpose(1, 2).flatten(2), layer.v(x))
    a, b = layer.norm_k(layer.k(x)).unflatten(-1, (2, 8, 2)).transpose(1, 2).unbind(-1)
    turned = torch.stack([a * rope[0] - b * rope[1], a * rope[1] + b * rope[0]], -1).flatten(-2)
    assert torch.allclose(k, turned, atol=1e-6)


def test_closed_gates_leave_only_the_prompt():
    torch.manual_seed(0)
    block, t6, x = Block(CFG).requires_grad_(False), torch.randn(1, 6, 32), torch.randn(1, 128, 32)
    block.modulation[:, [2, 5]] = -t6[:, [2, 5]]
    prompt = block.cross_attn.prompt(torch.randn(1, 3, 32))
    y = block(x, t6, prompt, rope_table((2, 8, 8), 16), grid=(1, 1), policy=Dense())
    assert torch.allclose(y, x + block.cross_attn(block.norm3(x), prompt), atol=1e-6)


def test_patches_in_and_out_keep_their_place():
    "Without blocks, a head that copies shows where each latent value goes."
    net = model(dataclasses.replace(CFG, layers=0, dim=16, heads=1))
    x, lq = torch.randn(2, 4, 4, 32, 16), torch.zeros(2, 4 * 16 * 8, 16)
    net.patch_embedding.weight.zero_()
    for y in range(2):
        for z in range(2):
            for c in range(4):
                net.patch_embedding.weight[(2 * y + z) * 4 + c, c, 0, y, z] = 1
    net.patch_embedding.bias.zero_()

    class Copy(nn.Module):
        def forward(self, tokens, t):
            return tokens

    net.head = Copy()
    assert torch.equal(net(x, lq, Conditioning(None, None, [])), x)


def test_head_is_modulated_by_the_time_vector():
    torch.manual_seed(0)
    head, x, t = Head(CFG).requires_grad_(False), torch.randn(2, 3, 32), torch.randn(1, 32)
    shift, scale = head.modulation[:, :1] + t, head.modulation[:, 1:] + t
    assert torch.allclose(head(x, t), head.head(modulate(x, shift, scale)), atol=1e-6)


@settings(max_examples=8)
@given(batch=st.integers(1, 3), slabs=st.integers(1, 2), rows=st.integers(1, 2), cols=st.integers(1, 2))
def test_batch_is_a_stack_of_singles(batch, slabs, rows, cols):
    net = model()
    x, lq, context = inputs(batch, 2 * slabs, 16 * rows, 16 * cols)
    cond = net.condition(context)
    y = net(x, lq, cond)
    assert y.shape == x.shape
    for i in range(batch):
        assert torch.allclose(y[i:i + 1], net(x[i:i + 1], lq[i:i + 1], cond), atol=1e-5)


def test_only_differences_of_time_matter():
    "Far beyond the 1,024 latent frames at which the reference stops."
    net, (x, lq, context) = model(), inputs(frames=4)
    cond = net.condition(context)
    near, far = net(x, lq, cond, policy=Dense()), net(x, lq, cond, f0=100_000, policy=Dense())
    assert torch.allclose(near, far, atol=1e-5)


def test_every_input_and_time_step_counts():
    net, (x, lq, context) = model(), inputs()
    y = net(x, lq, net.condition(context))
    for other in (net(x + 0.1 * torch.randn_like(x), lq, net.condition(context)),
                  net(x, lq + 0.1 * torch.randn_like(lq), net.condition(context)),
                  net(x, lq, net.condition(context + 1)), net(x, lq, net.condition(context, t=900.))):
        assert (y - other).abs().max() > 1e-3


def test_policy_and_record():
    net, (x, lq, context) = model(), inputs(height=32)
    cond, masks = net.condition(context), []
    net(x, lq, cond, record=masks.append, policy=LCSA(key_blocks=1, local_range=1))
    assert len(masks) == 2 and all(m.shape == (1, 2, 2, 2) and m.dtype == torch.bool for m in masks)
    assert not any(m[..., 0, 1].any() or m[..., 1, 0].any() for m in masks)  # range 1: only oneself
    dense = net(x, lq, cond, policy=Dense(), record=masks.append)
    assert masks[2:] == [None, None]
    assert torch.allclose(dense, net(x, lq, cond, policy=Dense(), backend="reference"), atol=1e-5)


def test_bfloat16_stays_close():
    net, (x, lq, context) = model(), inputs(height=32)
    exact = net(x, lq, net.condition(context), policy=Dense())
    net.to(torch.bfloat16)
    y = net(x.bfloat16(), lq.bfloat16(), net.condition(context), policy=Dense())
    assert y.dtype == torch.bfloat16
    assert (y.float() - exact).norm() < 0.03 * exact.norm()


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    net, (x, lq, context) = DiT(CFG), inputs()
    y = net(x, lq.requires_grad_(), net.condition(context.requires_grad_()), policy=Dense())
    y.square().sum().backward()
    named = {**dict(net.named_parameters()), "lq_tokens": lq, "context": context}
    assert [name for name, p in named.items() if p.grad is None or not p.grad.abs().max() > 0] == []


@pytest.mark.parametrize("said, shape, tokens", [
    ("63 lq_tokens", (1, 4, 2, 16, 16), 63),
    ("3 latent frames", (1, 4, 3, 16, 16), 192),
    ("multiples of 128", (1, 4, 2, 16, 24), 192),
])
def test_errors(said, shape, tokens):
    net = model()
    with pytest.raises(ValueError, match=said):
        net(torch.randn(shape), torch.randn(1, tokens, 32), net.condition(torch.randn(1, 3, 12)))


def test_unknown_backend_is_named():
    net, (x, lq, context) = model(), inputs()
    with pytest.raises(ValueError, match="'flash'"):
        net(x, lq, net.condition(context), backend="flash")


# In rows

@settings(max_examples=10)
@given(batch=st.integers(1, 2), slabs=st.integers(1, 3), cols=st.integers(1, 3), rows=st.integers(1, 500))
def test_rows_change_nothing(batch, slabs, cols, rows):
    "Any number of rows, batch and chunk; masks the same, bit for bit, and recorded as one."
    net, policy = model(), LCSA(key_blocks=2, local_range=3)
    x, lq, context = inputs(batch, 2 * slabs, 16, 16 * cols)
    cond, masks = net.condition(context), []
    with torch.no_grad():
        y = [net(x, lq, cond, policy=policy, rows=n, record=masks.append) for n in (0, rows)]
    assert torch.allclose(*y, atol=1e-6)
    assert len(masks) == 4 and all(torch.equal(a, b) for a, b in zip(masks[:2], masks[2:]))


def test_rows_in_a_stream_with_caches():
    from flashvsr_nb.kv_cache import KVCache
    net, policy, results = model(), LCSA(key_blocks=3, local_range=3), []
    cond = net.condition(inputs()[2])
    chunks = [(f0, *inputs(frames=f, width=32)[:2]) for f0, f in ((0, 6), (6, 2), (8, 2), (10, 2))]
    for rows in (0, 100):
        caches = [KVCache(128 * 2) for _ in net.blocks]
        with torch.no_grad():
            y = [net(x, lq, cond, f0=f0, caches=caches, policy=policy, rows=rows) for f0, x, lq in chunks]
        results.append(torch.cat(y, 2))
    assert torch.allclose(*results, atol=1e-6)


def test_one_block_in_rows_in_bfloat16():
    "The same input and the same mask: within 2^-8 of the plain block."
    torch.manual_seed(0)
    block, rope = Block(CFG).requires_grad_(False).bfloat16(), rope_table((4, 8, 16), 16)
    x, t6 = torch.randn(1, 512, 32).bfloat16(), torch.randn(1, 6, 32).bfloat16()
    prompt, masks = block.cross_attn.prompt(torch.randn(1, 3, 32).bfloat16()), []
    plain = block(x, t6, prompt, rope, grid=(1, 2), policy=LCSA(2, 3), record=masks.append).float()

    class Forced(Dense):
        def __call__(self, q, k, *, grid):
            return masks[0]

    lean = block.in_rows(x.clone(), t6, prompt, rope, rows=77, grid=(1, 2), policy=Forced()).float()
    assert (lean - plain).abs().max() <= 2**-8 * plain.abs().max()


def test_a_policy_of_unknown_reach_sees_all_queries():
    "Only LCSA's budget is known to be one slab's: other policies get the whole chunk, as before."
    net, (x, lq, context), seen = model(), inputs(frames=6), []

    class Policy(Dense):
        def __call__(self, q, k, *, grid):
            seen.append(q.shape[2])

    with torch.no_grad():
        net(x, lq, net.condition(context), policy=Policy())
    assert seen == [6 * 64] * 2


def test_tokens_may_come_slab_by_slab():
    net, (x, lq, context) = model(), inputs(2, 6, 16, 16)
    cond = net.condition(context)
    whole = net(x, lq, cond, policy=Dense())
    assert torch.equal(net(x, iter(lq.split(2 * 64, 1)), cond, policy=Dense()), whole)
    assert torch.equal(net(x, [lq[:, :256], lq[:, 256:]], cond, policy=Dense()), whole)
    for parts, n in (([lq[:, :256]], 256), ([lq, lq], 768), ([lq[:, :100]], 100)):
        with pytest.raises(ValueError, match=f"{n} lq_tokens, but latents"):
            net(x, parts, cond, policy=Dense())


def test_gradients_still_flow_where_they_are_wanted():
    net, (x, lq, context) = DiT(CFG), inputs()
    net(x, lq, net.condition(context), policy=Dense(), rows=16).square().mean().backward()
    assert all(p.grad is not None for p in net.blocks.parameters())
