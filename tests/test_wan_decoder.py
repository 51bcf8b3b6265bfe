"""The Wan decoder: names and shapes of the official file, the function of the description, the same in any pieces."""
import hashlib
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from flashvsr_nb.wan_decoder import WanDecoder

few = settings(max_examples=10)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(1)
    net = WanDecoder(4).double().requires_grad_(False)
    for key, p in net.named_parameters():  # gains of one and unequal widths would hide mistakes
        if key.endswith("gamma"):
            p.copy_(torch.rand_like(p) + 0.5)
    return net


def latents(steps, *, batch=1, h=2, w=3):
    return torch.randn(batch, 16, steps, h, w).double()


# Names and shapes

def encoder_shapes():
    "The half of the official file that is not used: the encoder and conv1."
    shapes = {}

    def conv(name, out, channels, *size):
        shapes.update({f"{name}.weight": (out, channels, *size), f"{name}.bias": (out,)})

    def res(name, channels, out):
        shapes.update({f"{name}.residual.0.gamma": (channels, 1, 1, 1), f"{name}.residual.3.gamma": (out, 1, 1, 1)})
        conv(f"{name}.residual.2", out, channels, 3, 3, 3)
        conv(f"{name}.residual.6", out, out, 3, 3, 3)
        if channels != out:
            conv(f"{name}.shortcut", out, channels, 1, 1, 1)

    conv("conv1", 32, 32, 1, 1, 1)
    conv("encoder.conv1", 96, 3, 3, 3, 3)
    layers = [(96, 96), (96, 96), 96, (96, 192), (192, 192), 192, (192, 384), (384, 384), 384, (384, 384), (384, 384)]
    for i, width in enumerate(layers):
        name = f"encoder.downsamples.{i}"
        if isinstance(width, tuple):
            res(name, *width)
            continue
        conv(f"{name}.resample.1", width, width, 3, 3)
        if i > 2:
            conv(f"{name}.time_conv", width, width, 3, 1, 1)
    res("encoder.middle.0", 384, 384)
    res("encoder.middle.2", 384, 384)
    shapes["encoder.middle.1.norm.gamma"] = (384, 1, 1)
    conv("encoder.middle.1.to_qkv", 1152, 384, 1, 1)
    conv("encoder.middle.1.proj", 384, 384, 1, 1)
    shapes["encoder.head.0.gamma"] = (384, 1, 1, 1)
    conv("encoder.head.2", 32, 384, 3, 3, 3)
    return shapes


def test_names_and_shapes_are_official():
    with torch.device("meta"):
        ours = {key: tuple(t.shape) for key, t in WanDecoder().state_dict().items()}
    assert {key.split(".")[0] for key in ours} == {"conv2", "decoder"}
    assert sum(map(math.prod, ours.values())) == 73_295_603
    whole = ours | encoder_shapes()
    assert len(whole) == 194 and sum(map(math.prod, whole.values())) == 126_892_531
    words = sorted([*whole, *(f"{key}:{'_'.join(map(str, shape))}" for key, shape in whole.items())])
    assert hashlib.md5(",".join(words).encode()).hexdigest() == "ccc42284ea13e1ad04693284c7a09be6"


# The function

MEAN = [-.7571, -.7089, -.9113, .1075, -.1745, .9653, -.1517, 1.5508, .4134, -.0715, .5517, -.3632, -.1922, -.9497, .2503,
        -.2921]
STD = [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253,
       2.8251, 1.9160]


def whole_video(weights, x):
    "A whole clip at once with 3-D convolutions, straight from the description; no state, no frames apart."
    def conv(x, key):
        w = weights[f"{key}.weight"]
        t, h, _ = w.shape[2:]
        return F.conv3d(F.pad(x, (h // 2,) * 4 + (t - 1, 0)), w, weights[f"{key}.bias"])

    def norm(x, key):
        return F.normalize(x, dim=1) * x.shape[1] ** 0.5 * weights[key].view(-1, 1, 1, 1)

    def res(x, key):
        y = conv(F.silu(norm(x, f"{key}.residual.0.gamma")), f"{key}.residual.2")
        y = conv(F.silu(norm(y, f"{key}.residual.3.gamma")), f"{key}.residual.6")
        return y + (conv(x, f"{key}.shortcut") if f"{key}.shortcut.weight" in weights else x)

    def attend(x, key):
        y = norm(x, f"{key}.norm.gamma")
        qkv = F.conv3d(y, weights[f"{key}.to_qkv.weight"][:, :, None], weights[f"{key}.to_qkv.bias"])
        q, k, v = (t.flatten(3) for t in qkv.chunk(3, 1))  # B, C, T, positions
        p = (torch.einsum("bcti,bctj->btij", q, k) / q.shape[1] ** 0.5).softmax(-1)
        y = torch.einsum("btij,bctj->bcti", p, v).reshape(x.shape)
        return x + F.conv3d(y, weights[f"{key}.proj.weight"][:, :, None], weights[f"{key}.proj.bias"])

    def enlarge(x, key):
        if f"{key}.time_conv.weight" in weights:
            even, odd = conv(x[:, :, 1:], f"{key}.time_conv").chunk(2, 1)
            x = torch.cat([x[:, :, :1], torch.stack([even, odd], 3).flatten(2, 3)], 2)
        x = F.interpolate(x, scale_factor=(1, 2, 2))
        w, bias = weights[f"{key}.resample.1.weight"], weights[f"{key}.resample.1.bias"]
        return F.conv3d(x, w[:, :, None], bias, padding=(0, 1, 1))

    x = x * x.new_tensor(STD).view(-1, 1, 1, 1) + x.new_tensor(MEAN).view(-1, 1, 1, 1)
    x = conv(conv(x, "conv2"), "decoder.conv1")
    x = res(attend(res(x, "decoder.middle.0"), "decoder.middle.1"), "decoder.middle.2")
    for i in range(15):
        x = (enlarge if i in (3, 7, 11) else res)(x, f"decoder.upsamples.{i}")
    x = conv(F.silu(norm(x, "decoder.head.0.gamma")), "decoder.head.2")
    return (x.clamp(-1, 1) + 1) / 2


def test_it_is_the_function_of_the_description(decoder):
    z = latents(4, batch=2)
    want = whole_video(decoder.state_dict(), z)
    assert want.shape == (2, 3, 13, 16, 24) and want.std() > 0.01
    torch.testing.assert_close(decoder(z)[0], want)


@few
@given(pieces=st.lists(st.integers(1, 3), min_size=1, max_size=4), batch=st.integers(1, 2))
def test_pieces_change_nothing(decoder, pieces, batch):
    z = latents(sum(pieces), batch=batch)
    whole, end = decoder(z)
    assert whole.shape[2] == 4 * sum(pieces) - 3
    state, frames = None, []
    for part in z.split(pieces, 2):
        y, state = decoder(part, state=state)
        frames.append(y)
    torch.testing.assert_close(torch.cat(frames, 2), whole)
    for got, want in zip(state, end, strict=True):
        torch.testing.assert_close(got, want)


def test_forgetting_shows(decoder):
    z = latents(3)
    _, state = decoder(z[:, :, :2])
    forgotten, _ = decoder(z[:, :, 2:], state=[torch.zeros_like(t) for t in state])
    assert (forgotten - decoder(z)[0][:, :, 5:]).abs().max() > 1e-6


def test_state_holds_two_steps_and_no_more(decoder):
    for steps in (1, 3):
        _, state = decoder(latents(steps, batch=2))
        assert len(state) == 32
        assert all(len(t) == 4 and t.untyped_storage().nbytes() == t.nbytes for t in state)


def test_inputs_and_state_stay_as_they_were(decoder):
    z = latents(2)
    _, state = decoder(latents(1))
    kept = [t.clone() for t in (z, *state)]
    decoder(z, state=state)
    for t, old in zip((z, *state), kept, strict=True):
        assert torch.equal(t, old)


@pytest.mark.parametrize("dtype, close", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_stays_close(decoder, dtype, close):
    net, z = WanDecoder(4).requires_grad_(False), latents(2)
    net.load_state_dict(decoder.state_dict())
    y, state = net.to(dtype)(z.to(dtype))
    assert y.dtype == torch.float32 and {t.dtype for t in state} == {dtype}
    torch.testing.assert_close(y.double(), decoder(z)[0], atol=close, rtol=0)


def test_the_norm_survives_float16():
    "96 channels of 20,000 have a length of 195,959, three times float16's end; all zeros must not become NaN."
    net = WanDecoder(24).half()
    norm = net.decoder["middle"][0].residual[0]
    torch.testing.assert_close(norm(torch.full((1, 96, 1, 1), 20_000.).half()), torch.ones(1, 96, 1, 1).half())
    assert torch.equal(norm(torch.zeros(1, 96, 1, 1).half()), torch.zeros(1, 96, 1, 1).half())


@pytest.mark.parametrize("shape, said", [((1, 8, 2, 2, 3), r"\(1, 8, 2, 2, 3\); they must be \(B,16,T,h,w\)"),
                                         ((1, 16, 0, 2, 3), r"must be \(B,16,T,h,w\)"),
                                         ((16, 2, 2, 3), r"must be \(B,16,T,h,w\)")])
def test_wrong_latents(decoder, shape, said):
    with pytest.raises(ValueError, match=said):
        decoder(torch.zeros(shape).double())


def test_state_of_another_video(decoder):
    _, state = decoder(latents(1))
    for z in (latents(1, h=3), latents(1, batch=2)):
        with pytest.raises(ValueError, match=r"state: from 1 videos of \(2, 3\) cells; .* start a new video"):
            decoder(z, state=state)


@pytest.mark.cuda
def test_cuda_equals_cpu(decoder):
    net, z = WanDecoder(4).requires_grad_(False), latents(2).float()
    net.load_state_dict(decoder.state_dict())
    want, _ = net(z)
    torch.backends.cudnn.allow_tf32 = False
    torch.testing.assert_close(net.cuda()(z.cuda())[0].cpu(), want, atol=5e-4, rtol=0)
