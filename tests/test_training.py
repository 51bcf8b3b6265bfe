"""Pairs to learn from, the losses, the wider decoder, and what came out: nano itself."""
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from flashvsr_nb.clips import Clips, draw_recipe, fly_over, moving_stills
from flashvsr_nb.decoder import TCDecoder
from flashvsr_nb.dit import ModelConfig
from flashvsr_nb.pipeline import FlashVSR
from flashvsr_nb.training import (
    Trainer, detail_target, load_checkpoint, loss_terms, psnr_y, run_clip, save_checkpoint, start_weights, widen)
from flashvsr_nb.weights import load_weights, save_weights

NANO = Path(__file__).resolve().parent.parent / "flashvsr_nb/assets/nano.safetensors"
SMALL = replace(ModelConfig.nano(), dim=128, heads=1, layers=1, ffn_dim=32, text_dim=8, freq_dim=8, proj_dims=(4, 8),
                decoder_channels=(8, 8, 4, 4))


@pytest.fixture
def stills():
    torch.manual_seed(0)
    return [F.interpolate(torch.rand(1, 3, 20, 30), (200, 300), mode="bicubic").mul(255).clamp(0, 255).byte()[0]]


def pairs(stills, **options):
    with ThreadPoolExecutor(1) as workers:
        return Clips(stills, [], frames=25, size=128, pool=2, workers=workers, **options).batch(2)


def test_clean_pairs_are_exact_reductions(stills):
    "LR is cut from the reduced clip: away from the cut's border it is the reduction of the HR crop."
    hr, lr = pairs(stills, coded=0.0)
    small = F.interpolate(hr.flatten(0, 1) / 255, scale_factor=1 / 4, mode="bicubic", antialias=True)
    d = (small.clamp(0, 1) * 255).round() - lr.flatten(0, 1)
    assert d[..., 3:-3, 3:-3].abs().max() <= 1


def test_coded_pairs_are_damaged(stills):
    hr, lr = pairs(stills, coded=1.0)
    small = F.interpolate(hr.flatten(0, 1) / 255, scale_factor=1 / 4, mode="bicubic", antialias=True)
    error = (small * 255 - lr.flatten(0, 1)).mean(1)  # of grey: 4:2:0 takes most colour from a picture this motley
    assert 0.5 < error.abs().mean() < 14  # 30, were they two pixels apart


def test_frozen_pairs_repeat_one_frame(stills):
    hr, lr = pairs(stills, frozen=1.0)
    assert hr.shape == (2, 25, 3, 128, 128) and lr.shape == (2, 25, 3, 32, 32)
    assert (hr == hr[:, :1]).all() and (lr == lr[:, :1]).all()


def test_real_clips_smaller_than_a_crop_are_mirrored(stills):
    torch.manual_seed(0)
    video = torch.randint(0, 256, (30, 3, 50, 400), dtype=torch.uint8)
    with ThreadPoolExecutor(1) as workers:
        hr, _ = Clips(stills, [video], frames=25, size=128, pool=1, real=1.0, frozen=0.0, workers=workers).batch(1)
    assert hr.shape == (1, 25, 3, 128, 128)


def test_same_seed_same_clip(stills):
    made = []
    for _ in range(2):
        torch.manual_seed(5)
        made.append((moving_stills(stills, 4, size=64), draw_recipe()))
    assert torch.equal(made[0][0], made[1][0]) and made[0][1] == made[1][1]


def test_camera_moves_by_its_speed(stills):
    torch.manual_seed(1)
    slow, fast = (fly_over(stills[0], 6, size=64, speed=s).diff(dim=0).abs().mean() for s in (0.2, 6.0))
    assert 0 < slow < fast / 3


def test_camera_sees_any_angle_and_distance(stills):
    def view(**options):
        torch.manual_seed(2)
        return fly_over(stills[0], 2, size=64, speed=0.0, **options)
    assert torch.allclose(view(angle=torch.pi), view().flip(-1, -2), atol=1e-4)
    detail = lambda x: x.diff(dim=-1).abs().mean()
    assert 0.4 < detail(view(zoom=0.5)) / detail(view()) < 0.7  # twice as near: half as steep


def test_camera_that_stands_still_shows_the_clip(stills):
    torch.manual_seed(2)
    clip = torch.stack([stills[0], 255 - stills[0], stills[0]])
    seen = fly_over(clip, 3, size=64, speed=0.0, zoom=0.8, angle=1.0)
    assert torch.equal(seen[0], seen[2]) and torch.allclose(seen[1], 1 - seen[0], atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(more=st.tuples(*[st.integers(0, 5)] * 4), seed=st.integers(0, 99), pyramid=st.booleans())
def test_wider_decoder_gives_the_same(more, seed, pyramid):
    torch.manual_seed(seed)
    channels = (6, 4, 4, 3)
    narrow, wide = (TCDecoder(c, 16, residual=True, pyramid=pyramid)
                    for c in (channels, tuple(a + b for a, b in zip(channels, more))))
    widen(wide, narrow)
    z, lq = torch.randn(1, 16, 2, 4, 4), torch.rand(1, 3, 5, 32, 32) * 2 - 1
    with torch.no_grad():
        assert (wide(z, lq)[0] - narrow(z, lq)[0]).abs().max() < 1e-5


def test_detail_of_the_first_latent_is_frame_0():
    torch.manual_seed(0)
    hr, lq = torch.rand(1, 9, 3, 16, 16), torch.rand(1, 9, 3, 16, 16)
    target = detail_target(hr, lq)
    assert target.shape == (1, 16, 3, 2, 2)
    assert torch.allclose(target[:, :, 0], detail_target(hr[:, :1], lq[:, :1])[:, :, 0], atol=1e-6)
    one = sum(detail_target(hr[:, t:t + 1], lq[:, t:t + 1])[:, :, 0] for t in range(1, 5)) / 4
    assert torch.allclose(target[:, :, 1], one, atol=1e-5)


def test_losses_vanish_only_at_the_truth():
    torch.manual_seed(0)
    hr = torch.rand(1, 3, 3, 16, 16)
    same, off = loss_terms(hr, hr), loss_terms((hr + 0.1 * torch.randn_like(hr)).clamp(0, 1), hr)
    assert all(off[name] > same[name] + 1e-3 for name in same)
    assert psnr_y(hr[0], hr[0]) > 80 > 30 > psnr_y(hr[0], 1 - hr[0])


def test_some_steps_make_it_better(stills):
    torch.manual_seed(0)
    hr, lr = pairs(stills, coded=1.0)
    trainer = Trainer(start_weights(FlashVSR(SMALL)), minutes=1, lr=3e-3, warmup=1)
    losses = [float(trainer.update(hr[:1], lr[:1])["loss"]) for _ in range(6)]
    assert losses[-1] < losses[0] - 0.002


def test_parts_without_gradients_stay(stills, tmp_path):
    torch.manual_seed(0)
    hr, lr = pairs(stills, coded=1.0)
    model = FlashVSR(SMALL)
    model.dit.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = Trainer(model, minutes=1, warmup=1)
    trainer.update(hr[:1], lr[:1])
    moved = {k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved >= {"decoder"} and "dit" not in moved
    save_checkpoint(trainer, tmp_path)
    again = Trainer(FlashVSR(SMALL), minutes=1)
    again.model.dit.requires_grad_(False)
    load_checkpoint(again, tmp_path)
    assert all(torch.equal(v, again.model.state_dict()[k]) for k, v in model.state_dict().items())


def test_gradients_reach_every_weight(stills):
    torch.manual_seed(0)
    hr, lr = pairs(stills, coded=0.0)
    model = FlashVSR(SMALL)
    sr, latents = run_clip(model, lr[:1] / 255)
    (sr.square().mean() + latents.square().mean()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_a_model_of_other_sizes_begins_where_the_old_one_ended(tmp_path, monkeypatch):
    "Channels of zeros go first, wider stages do not change the result: the resized file gives what the old one gives."
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "tools")
    import resize_nano
    torch.manual_seed(0)
    model = start_weights(FlashVSR(SMALL)).eval().requires_grad_(False)
    torch.nn.init.normal_(model.decoder.decoder[-1].weight, std=0.05)
    padded = TCDecoder((8, 8, 6, 4), residual=True, pyramid=True).requires_grad_(False)
    for p in padded.parameters():
        p.zero_()
    widen(padded, model.decoder)
    dit = {k: F.pad(v, (0, 0, 0, 8) if k.endswith("ffn.0.weight") else (0, 8) if ".ffn.0" in k or k.endswith("ffn.2.weight")
                    else (0, 0)) for k, v in model.dit.state_dict().items()}
    old = tmp_path / "old.safetensors"
    save_weights(old, replace(SMALL, decoder_channels=(8, 8, 6, 4), ffn_dim=40), dit=dit, context=model.context,
                 projector=model.projector.state_dict(), decoder=padded.state_dict())
    new = tmp_path / "new.safetensors"
    monkeypatch.setattr("sys.argv", ["resize_nano", str(old), str(new), *"--channels 8 12 4 4 --ffn 32".split()])
    resize_nano.main()
    assert load_weights(new).cfg == replace(SMALL, decoder_channels=(8, 12, 4, 4))
    x = torch.rand(1, 25, 3, 32, 32)
    before, after = (run_clip(FlashVSR.from_pretrained(p, device="cpu"), x, noise=0.0)[0] for p in (old, new))
    torch.testing.assert_close(after, before, atol=2e-3, rtol=0)
    assert (before - before.mean()).abs().max() > 0.1


def test_nano_is_what_the_config_says():
    weights = load_weights("nano")
    size = sum(t.numel() for part in (weights.dit, weights.projector, weights.decoder) for t in part.values())
    assert weights.cfg == ModelConfig.nano()
    assert size + weights.context.numel() < 5e6 and NANO.stat().st_size < 10e6
