"""INT8 weights: rounding to half a step, every kind of layer, whole models in half the memory."""
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flashvsr_nb.decoder import TCDecoder, UpConv
from flashvsr_nb.dit import DiT, ModelConfig
from flashvsr_nb.int8_weights import (
    Int8Conv2d, Int8Linear, Int8StackedConv, Int8UpConv, dequantize_rows, quantize_rows, quantize_weights, weight_bytes)
from flashvsr_nb.kv_cache import LQProjector, StackedConv

CFG = ModelConfig(dim=64, heads=2, layers=1, ffn_dim=96, text_dim=12, freq_dim=16, channels=4)
few = settings(max_examples=15)
pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = [(lambda: nn.Linear(12, 10), Int8Linear, (3, 5, 12)), (lambda: nn.Linear(12, 10, bias=False), Int8Linear, (7, 12)),
          (lambda: nn.Conv2d(4, 10, 3, padding=1), Int8Conv2d, (2, 4, 5, 6)),
          (lambda: nn.Conv2d(4, 10, 1, bias=False), Int8Conv2d, (2, 4, 5, 6)),
          (lambda: UpConv(4, 10), Int8UpConv, (2, 4, 3, 5)), (lambda: StackedConv(3, 10), Int8StackedConv, (2, 12, 5, 6))]


@few
@given(out=st.integers(1, 9), shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), scale=st.floats(1e-6, 1e4))
def test_off_by_half_a_step_at_most(out, shape, scale):
    w = scale * torch.randn(out, *shape)
    q, step = quantize_rows(w)
    assert q.dtype == torch.int8 and q.shape == w.shape and step.shape == (out,) and q.abs().amax() == 127
    error = (dequantize_rows(q, step) - w).abs().flatten(1).amax(1)
    assert (error <= step / 2 * 1.001).all()


def test_the_largest_of_a_row_is_exact_and_rows_do_not_meet():
    w = torch.tensor([[1000.0, 1.0], [0.001, 0.0005]])
    back = dequantize_rows(*quantize_rows(w))
    torch.testing.assert_close(back[:, 0], w[:, 0])
    assert (back[1, 1] - w[1, 1]).abs() < 1e-5


def test_zero_rows_and_denormals_stay_finite():
    w = torch.stack([torch.zeros(4), torch.full((4,), 1e-44), torch.ones(4)])
    back = dequantize_rows(*quantize_rows(w))
    assert back.isfinite().all() and torch.equal(back[0], w[0]) and torch.equal(back[2], w[2])


@pytest.mark.parametrize("make, kind, shape", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 3, 100])
def test_layers_are_the_layers_with_rounded_weights(make, kind, shape, dtype, channels):
    "However many channels are turned back at a time."
    layer, x = make().requires_grad_(False).to(dtype), torch.randn(*shape).to(dtype)
    exact = copy.deepcopy(layer)
    assert quantize_weights(layer, smallest=1) is layer and type(layer) is kind and isinstance(layer, type(exact))
    exact.weight.copy_(layer.weight)
    layer.part = channels * layer.q[0].numel()
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, exact(x), atol=1e-6 if dtype == torch.float32 else 0.02, rtol=1e-5)
    assert "weight" not in dict(layer.named_parameters()) and layer.q.dtype == torch.int8


def test_twice_is_once():
    layer = quantize_weights(nn.Linear(70, 70))
    q = layer.q
    assert quantize_weights(layer).q is q


def test_small_layers_stay():
    net = quantize_weights(nn.Sequential(nn.Linear(64, 63), nn.Linear(63, 66)))
    assert [type(m) for m in net] == [nn.Linear, Int8Linear]
    with pytest.raises(ValueError, match="smallest=0; it must be at least 1"):
        quantize_weights(net, smallest=0)


def test_moving_and_saving_keep_the_integers():
    layer = quantize_weights(nn.Linear(70, 70))
    q, x = layer.q.clone(), torch.randn(2, 70)
    y = layer(x)
    fresh = quantize_weights(nn.Linear(70, 70))
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), y)
    layer.to(torch.bfloat16)
    assert layer.q.dtype == torch.int8 and torch.equal(layer.q, q)
    assert (layer(x.bfloat16()).float() - y).norm() < 0.02 * y.norm()


def test_channels_last_is_kept():
    layer = nn.Conv2d(32, 32, 3)
    layer.weight.data = layer.weight.contiguous(memory_format=torch.channels_last)
    assert quantize_weights(layer).weight.is_contiguous(memory_format=torch.channels_last)


def test_whole_parts_of_a_model():
    torch.manual_seed(0)
    with torch.no_grad():
        dit, x = DiT(CFG), torch.randn(1, 4, 2, 16, 16)
        lq, cond = torch.randn(1, 128, 64), dit.condition(torch.randn(1, 3, 12))
        decoder, latents, frames = TCDecoder((32, 24, 16, 12)), torch.randn(1, 16, 2, 4, 4), torch.rand(1, 3, 5, 32, 32)
        projector, clip = LQProjector((16, 24), 64), torch.rand(1, 3, 9, 32, 32)
        for part, run in ((dit, lambda: dit(x, lq, cond)), (decoder, lambda: decoder(latents, frames)[0]),
                          (projector, lambda: projector(clip)[0])):
            exact, size = run(), weight_bytes(part)
            quantize_weights(part, smallest=64)
            assert 0 < (run() - exact).norm() < 0.03 * exact.norm()
            assert weight_bytes(part) < 0.36 * size


@pytest.mark.parametrize("part, mib", [("dit", 1197), ("projector", 275), ("decoder", 43)])
def test_official_parts_in_half_the_memory(part, mib):
    with torch.device("meta"):
        net = dict(dit=DiT, projector=lambda cfg: LQProjector(), decoder=lambda cfg: TCDecoder())[part](ModelConfig.wan1_3b())
        net = net.to(torch.bfloat16)
        if part == "dit":
            net.drop_conditioning()
        assert round(weight_bytes(quantize_weights(net)) / 2**20) == mib
