"""The decoder decodes the same whatever the chunking, batching and tail; colour correction keeps its promises."""
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from flashvsr_nb.decoder import (
    MemBlock, TCDecoder, TGrow, UpConv, _Window, adain, color_fix, fold, wavelet, windows)

WIDTHS = (6, 5, 4, 3)
few = settings(max_examples=12)
sizes = st.integers(1, 5)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(1)
    return TCDecoder(WIDTHS).double().requires_grad_(False)


@pytest.fixture(scope="module")
def ours():
    torch.manual_seed(2)
    return TCDecoder(WIDTHS, residual=True, pyramid=True).double().requires_grad_(False)


def inputs(steps, *, batch=1, h=2, w=3, start=True):
    "Latents and as many LQ frames as belong to them."
    lq = torch.rand(batch, 3, 4 * steps - 3 * start, 8 * h, 8 * w).double() * 2 - 1
    return torch.randn(batch, 16, steps, h, w).double(), lq


# The parts

@few
@given(g=sizes, b=sizes, c=st.integers(0, 2), t=st.integers(0, 3), y=st.integers(0, 7), x=st.integers(0, 7))
def test_fold_puts_every_pixel_where_the_formula_says(g, b, c, t, y, x):
    lq = torch.rand(b, 3, 4 * g, 16, 24)
    channel = fold(lq)[:, ((c * 4 + t) * 8 + y) * 8 + x]
    assert torch.equal(channel, lq[:, c, t::4, y::8, x::8].transpose(0, 1).flatten(0, 1))


@few
@given(g=sizes, b=sizes, n=st.integers(1, 4), side=st.sampled_from([1, 2, 4]), data=st.data())
def test_fold_of_other_sizes(g, b, n, side, data):
    lq, (c, t, y, x) = torch.rand(b, 3, n * g, 8, 12), (data.draw(st.integers(0, m - 1)) for m in (3, n, side, side))
    channel = fold(lq, n, patch=side)[:, ((c * n + t) * side + y) * side + x]
    assert torch.equal(channel, lq[:, c, t::n, y::side, x::side].transpose(0, 1).flatten(0, 1))


@few
@given(n=sizes, c=sizes, out=sizes, h=sizes, w=sizes)
def test_upconv_is_enlarge_then_convolve(n, c, out, h, w):
    up, x = UpConv(c, out).double(), torch.randn(n, c, h, w).double()
    plain = F.conv2d(F.interpolate(x, scale_factor=2), up.weight, padding=1)
    assert plain.shape == (n, out, 2 * h, 2 * w)
    torch.testing.assert_close(up(x), plain)


def test_upconv_gradients_are_those_of_the_plain_form():
    up, x = UpConv(3, 2).double(), torch.randn(2, 3, 4, 5).double().requires_grad_()
    target = torch.randn(2, 2, 8, 10).double()
    grads = torch.autograd.grad((up(x) * target).sum(), [x, up.weight])
    plain = F.conv2d(F.interpolate(x, scale_factor=2), up.weight, padding=1)
    for got, want in zip(grads, torch.autograd.grad((plain * target).sum(), [x, up.weight])):
        torch.testing.assert_close(got, want)


@few
@given(t=sizes, b=sizes, s=st.integers(1, 3))
def test_tgrow_order_of_steps(t, b, s):
    grow, x = TGrow(4, s), torch.randn(t, b, 4, 2, 3)
    y = grow(x.flatten(0, 1), b).unflatten(0, (t * s, b))
    for step in range(t * s):
        torch.testing.assert_close(y[step], grow.conv(x[step // s])[:, step % s * 4:(step % s + 1) * 4])


@few
@given(t=st.integers(2, 6), b=sizes, data=st.data())
def test_memblock_may_be_split_anywhere(t, b, data):
    at = data.draw(st.integers(1, t - 1)) * b
    block, x = MemBlock(4).double(), torch.randn(t * b, 4, 3, 2).double()
    whole, state = block(x, x.new_zeros(b, 4, 3, 2))
    first, past = block(x[:at], x.new_zeros(b, 4, 3, 2))
    second, last = block(x[at:], past)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    assert torch.equal(state, last) and torch.equal(state, x[-b:])


def test_memblock_does_look_back():
    block, x = MemBlock(4), torch.randn(2, 4, 3, 3)
    assert not torch.equal(block(x[1:], x[:1])[0], block(x[1:], torch.zeros(1, 4, 3, 3))[0])


# The whole

def test_names_and_shapes_are_official():
    official = json.loads((Path(__file__).parent / "golden/official_state_dict_shapes.json").read_text())["tcdecoder"]
    with torch.device("meta"):
        model = TCDecoder()
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == official
    assert sum(p.numel() for p in model.parameters()) == 45_338_371


def by_the_list(weights, latents, lq, pyramid=False):
    "A whole clip, straight from the list of layers: every enlargement done, every step decoded on its own."
    def conv(x, i, bias=True):
        w = weights[f"decoder.{i}.weight"]
        return F.conv2d(x, w, weights[f"decoder.{i}.bias"] if bias else None, padding=w.shape[-1] // 2)

    def memory(steps, i):
        out, past = [], torch.zeros_like(steps[0])
        for x in steps:
            y = torch.cat([x, past], 1)
            for j in (0, 2, 4):
                y = conv(y if j == 0 else y.relu(), f"{i}.conv.{j}")
            out.append((x + y).relu())
            past = x
        return out

    def grow(steps, i, times):
        big = (F.interpolate(x, scale_factor=2, mode="nearest") for x in steps)
        return [y for x in big for y in conv(x, f"{i}.conv", False).chunk(times, 1)]

    lq = torch.cat([lq[:, :, :1]] * 3 + [lq], 2)
    steps = [torch.cat([F.pixel_unshuffle(lq[:, :, 4 * t:4 * t + 4].flatten(1, 2), 8), latents[:, :, t]], 1)
             for t in range(latents.shape[2])]
    skips = {}
    for first, i, n, side in ((5, 0, 4, 4), (11, 1, 2, 2), (17, 2, 1, 1)) if pyramid else ():
        w, bias = weights[f"skips.{i}.weight"], weights.get(f"skips.{i}.bias")
        skips[first] = [F.conv2d(F.pixel_unshuffle(lq[:, :, t:t + n].flatten(1, 2), side), w, bias,
                                 padding=w.shape[-1] // 2) for t in range(0, lq.shape[2], n)]
    steps = [conv(conv((x / 3).tanh() * 3, 1).relu(), 3, False).relu() for x in steps]
    for first, times in ((5, 1), (11, 2), (17, 2)):
        for i in range(first, first + 3):
            steps = memory(steps, i)
        steps = [conv(x, first + 5, False) for x in grow(steps, first + 4, times)]
        if pyramid:
            steps = [x + skip for x, skip in zip(steps, skips[first], strict=True)]
    steps = [conv(conv(x.relu(), 24, False).relu(), 26) for x in steps]
    return torch.stack(steps, 2)[:, :, 3:]


def test_decoder_does_what_the_list_of_layers_says(decoder, ours):
    latents, lq = inputs(3, batch=2)
    want = by_the_list(decoder.state_dict(), 2 * latents, lq)
    torch.testing.assert_close(decoder(2 * latents, lq)[0], want)
    want = by_the_list(ours.state_dict(), 2 * latents, lq, pyramid=True) + (lq + 1) / 2
    torch.testing.assert_close(ours(2 * latents, lq)[0], want)


def test_strict_loading_refuses_a_missing_key():
    model = TCDecoder(WIDTHS)
    weights = model.state_dict()
    TCDecoder(WIDTHS).load_state_dict(weights, strict=True)
    weights.pop("decoder.10.weight")
    with pytest.raises(RuntimeError, match="decoder.10.weight"):
        model.load_state_dict(weights, strict=True)


@few
@given(chunks=st.lists(st.integers(1, 4), min_size=1, max_size=4), batch=st.integers(1, 3), tail=st.integers(1, 9),
       with_pyramid=st.booleans())
def test_chunks_batches_and_tail_change_nothing(decoder, ours, chunks, batch, tail, with_pyramid):
    decoder = ours if with_pyramid else decoder
    latents, lq = inputs(sum(chunks), batch=batch)
    whole, end = decoder(latents, lq)
    state, at, frames = None, 0, []
    decoder.tail_steps = tail
    for n in chunks:
        part = lq[:, :, max(0, 4 * at - 3):4 * (at + n) - 3]
        y, state = decoder(latents[:, :, at:at + n], part, state)
        assert y.shape == part.shape
        frames.append(y)
        at += n
    decoder.tail_steps = 1
    torch.testing.assert_close(torch.cat(frames, 2), whole)
    for got, want in zip(state, end, strict=True):
        torch.testing.assert_close(got, want)
    for i in range(batch):
        torch.testing.assert_close(decoder(latents[i:i + 1], lq[i:i + 1])[0], whole[i:i + 1])


def test_forgetting_the_state_shows(decoder):
    latents, lq = inputs(3)
    whole, _ = decoder(latents, lq)
    _, state = decoder(latents[:, :, :1], lq[:, :, :1])
    forgotten, _ = decoder(latents[:, :, 1:], lq[:, :, 1:], [torch.zeros_like(s) for s in state])
    assert (forgotten - whole[:, :, 1:]).abs().max() > 1e-6


def test_first_frames_are_trimmed(decoder):
    latents, lq = inputs(2)
    y, state = decoder(latents, lq)
    padded = torch.cat([lq[:, :, :1]] * 3 + [lq], 2)
    raw, _ = decoder(latents, padded, [torch.zeros_like(s) for s in state])
    assert raw.shape[2] == 8
    torch.testing.assert_close(raw[:, :, 3:], y)


def test_state_holds_one_step_and_no_more(decoder):
    _, state = decoder(*inputs(6))
    assert len(state) == 9
    for s in state:
        assert len(s) == 1 and s.untyped_storage().nbytes() == s.nbytes


def test_inputs_and_state_stay_as_they_were(decoder):
    latents, lq = inputs(2, start=False)
    _, state = decoder(*inputs(2))
    kept = [x.clone() for x in (latents, lq, *state)]
    decoder(latents, lq, state)
    for x, old in zip((latents, lq, *state), kept, strict=True):
        assert torch.equal(x, old)


def test_a_latent_reaches_thirty_frames():
    probe = TCDecoder((2, 2, 2, 2)).double()
    for p in probe.parameters():
        p.data.copy_(torch.rand_like(p) if p.dim() > 1 else 0 * p)
    impulse = torch.zeros(1, 16, 12, 1, 1).double()
    impulse[:, :, 0] = 1
    with torch.no_grad():
        light = probe(impulse, torch.zeros(1, 3, 45, 8, 8).double())[0].sum((0, 1, 3, 4))
    assert light.nonzero().flatten().tolist() == list(range(31))


def test_a_halo_of_19_cells_is_exact(decoder):
    latents, lq = inputs(1, h=1, w=60)
    whole = decoder(latents, lq)[0][..., 24 * 8:30 * 8]
    for halo, exact in ((19, True), (12, False)):
        cut = slice(24 - halo, 30 + halo)
        tile, _ = decoder(latents[..., cut], lq[..., cut.start * 8:cut.stop * 8])
        assert ((tile[..., halo * 8:-halo * 8] - whole).abs().max() < 1e-14) == exact


@settings(max_examples=8)
@given(h=st.integers(1, 30), w=st.integers(1, 44), tile=st.one_of(st.integers(5, 25), st.tuples(*[st.integers(5, 44)] * 2)),
       batch=st.integers(1, 2), with_pyramid=st.booleans())
def test_tiles_change_nothing(decoder, ours, h, w, tile, batch, with_pyramid):
    "Every pixel of three chunks and the state, whatever the tiles."
    decoder = ours if with_pyramid else decoder
    latents, lq = inputs(4, batch=batch, h=h, w=w)
    results = []
    for decoder.tile in (None, tile):
        state, frames = None, []
        for a, b in ((0, 2), (2, 3), (3, 4)):
            y, state = decoder(latents[:, :, a:b], lq[:, :, max(0, 4 * a - 3):4 * b - 3], state)
            frames.append(y)
        results.append((torch.cat(frames, 2), state))
    decoder.tile = None
    torch.testing.assert_close(results[1], results[0], atol=1e-12, rtol=1e-10)


def test_tiles_may_change_in_mid_video(decoder):
    latents, lq = inputs(2, h=23, w=40)
    whole, _ = decoder(latents, lq)
    decoder.tile = 9
    first, state = decoder(latents[:, :, :1], lq[:, :, :1])
    decoder.tile = (23, 11)
    then, _ = decoder(latents[:, :, 1:], lq[:, :, 1:], state)
    decoder.tile = None
    torch.testing.assert_close(torch.cat([first, then], 2), whole, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("short", ["halo", 7, 13, 19])
def test_no_halo_may_be_shorter(short, monkeypatch):
    "One cell or pixel less anywhere, and tiles show."
    from flashvsr_nb import decoder as module
    decoder = TCDecoder((8, 8, 8, 8)).double().requires_grad_(False)
    for p in decoder.parameters():
        p.mul_(2)  # the longest paths must weigh something
    latents, lq = inputs(2, h=4, w=70)
    whole, _ = decoder(latents, lq)
    if short == "halo":
        monkeypatch.setattr(module, "windows", lambda h, w, tile: [_Window((0, 4), (a, a + 35), (4, 70), 18) for a in (0, 35)])
    else:
        monkeypatch.setitem(module._HALOS, short, module._HALOS[short] - 1)
    decoder.tile = 35
    tiled, _ = decoder(latents, lq)
    assert (tiled - whole).abs().max() > 1e-13 * whole.abs().max()


@few
@given(h=st.integers(1, 60), w=st.integers(1, 60), rows=st.integers(1, 70), cols=st.integers(1, 70))
def test_windows_cover_each_cell_once(h, w, rows, cols):
    seen = torch.zeros(h, w)
    for window in windows(h, w, (rows, cols)):
        seen[tuple(window.home(1))] += 1
        (top, bottom), (left, right) = window.spans
        assert bottom - top <= rows and right - left <= cols
    assert (seen == 1).all()


@pytest.mark.parametrize("tile", [0, -3, (4, 0)])
def test_tiles_need_a_cell(decoder, tile):
    with pytest.raises(ValueError, match="needs at least 1 each way"):
        windows(4, 4, tile)


def test_every_parameter_gets_a_gradient_through_a_chunk_border():
    model = TCDecoder(WIDTHS, residual=True, pyramid=True)
    latents, lq = (x.float() for x in inputs(2))
    latents.requires_grad_()
    _, state = model(latents, lq)
    y, _ = model(torch.randn(1, 16, 1, 2, 3), torch.rand(1, 3, 4, 16, 24), state)
    y.square().mean().backward()
    assert latents.grad.abs().sum() > 0
    assert [k for k, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_gradients_are_right():
    torch.manual_seed(3)
    model, (latents, lq) = TCDecoder((2, 2, 2, 2)).double(), inputs(1, h=1, w=1)
    assert torch.autograd.gradcheck(lambda z: model(z, lq)[0], latents.requires_grad_(), fast_mode=True)


def test_residual_starts_from_lq():
    model = TCDecoder(WIDTHS, residual=True)
    torch.nn.init.zeros_(model.decoder[26].weight)
    torch.nn.init.zeros_(model.decoder[26].bias)
    latents, lq = (x.float() for x in inputs(2))
    torch.testing.assert_close(model(latents, lq)[0], (lq + 1) / 2)


def test_bfloat16_stays_close_and_in_bfloat16():
    model = TCDecoder(WIDTHS).requires_grad_(False)
    latents, lq = (x.float() for x in inputs(2))
    want, _ = model(latents, lq)
    got, state = model.bfloat16()(latents.bfloat16(), lq.bfloat16())
    assert {got.dtype, *(s.dtype for s in state)} == {torch.bfloat16}
    torch.testing.assert_close(got.float(), want, atol=0.03, rtol=0.03)


def test_autocast_runs_and_trains():
    model = TCDecoder(WIDTHS)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = model(*(x.float() for x in inputs(2)))
        y, _ = model(*(x.float() for x in inputs(1, start=False)), state)
    y.float().mean().backward()
    assert model.decoder[10].weight.grad.dtype == torch.float32


@pytest.mark.cuda
def test_cuda_equals_cpu():
    torch.backends.cudnn.allow_tf32 = False
    model, (latents, lq) = TCDecoder(WIDTHS).requires_grad_(False), (x.float() for x in inputs(3))
    want, _ = model(latents, lq)
    torch.testing.assert_close(model.cuda()(latents.cuda(), lq.cuda())[0].cpu(), want, atol=5e-4, rtol=0)


@pytest.mark.parametrize("frames, height, state, said", [
    (8, 16, False, r"2 latents .* at the start of a video need \(1, 3, 5, 16, 24\)"),
    (5, 16, True, r"in mid-video need \(1, 3, 8, 16, 24\)"),
    (5, 24, False, r"lq: shape \(1, 3, 5, 24, 24\); .* need \(1, 3, 5, 16, 24\)"),
    (8, 16, "other size", r"state: from 1 videos of \(3, 3\) cells; the latents are 1 of \(2, 3\)"),
    (8, 16, "other batch", r"state: from 2 videos"),
])
def test_shapes_that_do_not_belong_together(decoder, frames, height, state, said):
    if state:
        _, state = decoder(*inputs(2, h=2 + (state == "other size"), batch=1 + (state == "other batch")))
    with pytest.raises(ValueError, match=said):
        decoder(inputs(2)[0], torch.zeros(1, 3, frames, height, 24).double(), state or None)


# Colour

def frames(*shape, low=-0.6, high=0.6):
    return torch.rand(*shape) * (high - low) + low


@few
@given(b=st.integers(1, 2), f=st.integers(1, 3), h=st.integers(1, 9), w=st.integers(1, 9))
def test_methods_leave_equal_colours_alone(b, f, h, w):
    x = frames(b, 3, f, h, w)
    for method in ("adain", "wavelet", "none"):
        torch.testing.assert_close(color_fix(x, x, method=method), x, atol=2e-6, rtol=0)


@few
@given(gain=st.floats(0.3, 2), offset=st.floats(-0.5, 0.5))
def test_adain_forgets_gain_and_offset(gain, offset):
    x, lq = frames(1, 3, 2, 12, 16, low=-0.4, high=0.4), frames(1, 3, 2, 12, 16)
    torch.testing.assert_close(adain(x * gain + offset, lq), adain(x, lq), atol=1e-3, rtol=0)


def test_adain_gives_each_frame_the_moments_of_lq():
    x, lq = frames(2, 3, 4, 12, 16, low=-0.2, high=0.3), frames(2, 3, 4, 12, 16, low=-0.5, high=0.4)
    y = adain(x, lq)
    torch.testing.assert_close(y.mean((-2, -1)), lq.mean((-2, -1)), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std((-2, -1)), lq.std((-2, -1)), atol=1e-3, rtol=0)
    torch.testing.assert_close(adain(x[:, :, 1:2], lq[:, :, 1:2]), y[:, :, 1:2])


def test_adain_of_flat_frames_is_the_colour_of_lq():
    flat = torch.full((1, 3, 1, 8, 8), 0.2)
    torch.testing.assert_close(adain(flat, flat - 0.5), flat - 0.5)


def test_wavelet_takes_the_coarse_from_lq_and_the_fine_from_sr():
    x, lq = frames(1, 3, 2, 40, 50, low=-0.2, high=0.2), frames(1, 3, 2, 40, 50, low=-0.2, high=0.2)
    torch.testing.assert_close(wavelet(x + 0.3, lq), wavelet(x, lq), atol=1e-6, rtol=0)
    torch.testing.assert_close(wavelet(x, lq + 0.3), wavelet(x, lq) + 0.3, atol=1e-6, rtol=0)
    stripes = (torch.arange(50) % 2 - 0.5).expand(1, 3, 2, 40, 50) * 0.4
    torch.testing.assert_close((wavelet(x + stripes, lq) - wavelet(x, lq))[..., 31:-31], stripes[..., 31:-31])


def test_wavelet_reaches_31_pixels():
    x = torch.zeros(1, 3, 1, 100, 100)
    spot = x.clone()
    spot[..., 50, 50] = 0.5
    changed = wavelet(x, spot)[0, 0, 0].nonzero()
    assert changed.min(0).values.tolist() == [19, 19] and changed.max(0).values.tolist() == [81, 81]


@pytest.mark.parametrize("method", ["adain", "wavelet", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_result_is_float32_within_bounds(method, dtype):
    x, lq = (frames(1, 3, 2, 9, 7, low=-1.5, high=1.5).to(dtype) for _ in range(2))
    y = color_fix(x, lq, method=method)
    assert y.dtype == torch.float32 and y.shape == x.shape and y.abs().max() <= 1
    torch.testing.assert_close(y, color_fix(x.float(), lq.float(), method=method))


def test_color_fix_refuses():
    x = torch.zeros(1, 3, 2, 8, 8)
    with pytest.raises(ValueError, match="method='lab': must be 'adain', 'wavelet' or 'none'"):
        color_fix(x, x, method="lab")
    with pytest.raises(ValueError, match=r"lq: shape \(1, 3, 1, 8, 8\); must be that of sr, \(1, 3, 2, 8, 8\)"):
        color_fix(x, x[:, :, :1])
