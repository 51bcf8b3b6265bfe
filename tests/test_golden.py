"""Parity with the reference implementation, in float32 on the CPU: every case in the folder named by FLASHVSR_GOLDEN.

A case is a safetensors file: its metadata says how to make weights and inputs, its tensors are what the reference gave.
Models of full width are marked `slow`.
"""
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from golden_synth import generator, synthetic, video
from safetensors import safe_open

from flashvsr_nb.attention import LCSA
from flashvsr_nb.decoder import TCDecoder, adain, color_fix, wavelet
from flashvsr_nb.dit import DiT, ModelConfig
from flashvsr_nb.kv_cache import KVCache, LQProjector, chunk, chunks_for

STORED = Path(__file__).parent / "golden"
FOLDER = Path(os.environ.get("FLASHVSR_GOLDEN", STORED))
EXACT, LATENTS, FRAMES = 5e-6, 1e-5, 3e-5  # largest absolute difference allowed


def read(path):
    "-> (case as a dictionary, stored tensors by name)"
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["case"]), {name: file.get_tensor(name) for name in file.keys()}


def cases():
    "One parameter per file, in the order of their names; full-width models marked slow."
    for path in sorted(FOLDER.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            slow = json.loads(file.metadata()["case"]).get("config", {}).get("dim", 0) >= 1024
        yield pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if slow else [])


def close(got, stored, tolerance, what):
    assert got.shape == stored.shape, f"{what}: shape {tuple(got.shape)}, stored {tuple(stored.shape)}"
    worst = (got - stored).abs().max().item()
    print(f"{what}: largest difference {worst:.1e}, allowed {tolerance:.0e}")
    assert worst <= tolerance, f"{what}: {worst:.1e}"  # not a `>`: NaN must fail


def at_strides(x, strides):
    return x[tuple(slice(None, None, s) for s in strides)]


def model_config(case, **more):
    c = case["config"]
    return ModelConfig(dim=c["dim"], heads=c["num_heads"], layers=c["num_layers"], ffn_dim=c["ffn_dim"],
                       text_dim=c["text_dim"], freq_dim=c["freq_dim"], channels=c["in_dim"], eps=c["eps"],
                       proj_dims=tuple(c["lq_hidden_dims"]), decoder_channels=tuple(c["decoder_channels"]), **more)


def policy(case):
    blocks = tuple(int(n) for n in case["mask_blocks"].split("x"))
    return LCSA(topk_ratio=case["call"]["topk_ratio"], local_range=case["call"]["local_range"], block_size=blocks)


def kept_slabs(case):
    return max(2, int(case["call"]["kv_ratio"]))  # the reference drops one slab per step: 1 acts like 2


def condition(dit, case):
    return dit.condition(torch.randn(case["context"]["shape"], generator=generator(case["context"]["seed"])))


def oldest_first(mask, cache):
    "Key columns from the ring's slot order to the order of time."
    columns = mask.unflatten(-1, (len(cache.order), -1))
    return columns[..., torch.tensor(cache.order).argsort(), :].flatten(-2)


def check_projector(case, stored):
    projector = synthetic(LQProjector, tuple(case["hidden_dims"]), case["out_dim"], variant=case["version"])
    lq, state, tokens = video(case["video"]), None, []
    for start, stop in case["frame_slices"]:
        new, state = projector(lq[:, :, start:stop], state)
        tokens.append(new)
    close(torch.cat(tokens, 1), stored["tokens"], EXACT, "tokens, slice by slice")
    close(projector(lq[:, :, :stop])[0], stored["tokens"], EXACT, "tokens in one go")


def check_dit(case, stored):
    dit = synthetic(DiT, model_config(case))
    cond = condition(dit, case)
    close(cond.t, stored["t"], EXACT, "t")
    close(cond.t6, stored["t_mod"], EXACT, "t_mod")
    close(cond.prompt[1][0].transpose(1, 2).flatten(2), stored["cross_k_block1"], LATENTS, "prompt keys of block 1")
    latents, tokens = stored["latents"], stored["lq_tokens"]
    hw = latents.shape[-2] * latents.shape[-1] // 4
    caches = [KVCache(2 * hw, keep=kept_slabs(case)) for _ in dit.blocks]
    for i, (start, stop) in enumerate(case["chunks"]):
        velocity = dit(latents[:, :, start:stop], tokens[:, start * hw:stop * hw], cond, f0=start, caches=caches,
                       policy=policy(case))
        close(velocity, stored[f"velocity_{i}"], LATENTS, f"velocity of chunk {i}")


def check_decoder(case, stored):
    decoder = synthetic(TCDecoder, tuple(case["channels"]), case["latent_channels"] - 768)
    latents, lq, state, frames = stored["latents"].transpose(1, 2), video(case["cond"]), None, []
    for start, stop, first, last in case.get("chunks", [[0, latents.shape[2], 0, lq.shape[2]]]):
        new, state = decoder(latents[:, :, start:stop], lq[:, :, first:last], state)
        frames.append(new)
    close(torch.cat(frames, 2).transpose(1, 2), stored["frames"], FRAMES, "frames")


def check_color(case, stored):
    sr, lq = video(case["sr"]), video(case["lq"])
    for name, expected in stored.items():
        close({"adain": adain, "wavelet": wavelet}[name](sr, lq), expected, EXACT, name)


def check_prepare(case, stored):
    from flashvsr_nb.pipeline import prepare_lq
    frames = video(case["video"])[0].permute(1, 2, 3, 0)
    frames = torch.cat([frames, frames[-1:].expand(4, -1, -1, -1)])
    frames = frames[:(len(frames) - 1) // 8 * 8 + 1]
    assert len(frames) == case["num_frames"]
    lq, (rows, cols) = prepare_lq(frames, scale=case["scale"], resize="torch")
    height, width = lq.shape[-2:]
    assert [height, width] == case["target"]
    padding = [cols.start, width - cols.stop, rows.start, height - rows.stop]
    assert padding == case["padding_left_right_top_bottom"]
    close(at_strides(lq, case["out_stride"]), stored["out"], EXACT, "prepared frames")


def check_pipeline(case, stored):
    from flashvsr_nb.pipeline import Stream
    lq = video(case["video"])
    f, h, w = lq.shape[2:]
    model = SimpleNamespace(cfg=model_config(case, projector=case["lq_projector"]))
    model.dit = synthetic(DiT, model.cfg)
    model.cond = condition(model.dit, case)
    model.dit.drop_conditioning()  # at full width every part counts: what is done with goes
    model.projector = synthetic(LQProjector, model.cfg.proj_dims, model.cfg.dim, variant=model.cfg.projector)
    noise = torch.randn((1, 16, (f - 1) // 4, h // 8, w // 8), generator=generator(case["call"]["seed"]))
    masks = []

    def record(mask):
        masks.append(oldest_first(mask, stream.caches[len(masks) % len(stream.caches)]))
    stream = Stream(model, noise=noise, policy=policy(case), kv_slabs=kept_slabs(case), record=record)
    plan = [chunk(k) for k in range(chunks_for(f - 4))]
    latents = [stream.denoise(lq[:, :, c.lq.start:c.lq.stop]) for c in plan]
    del model.dit, model.projector, stream.caches
    kept = at_strides(torch.cat(latents, 2).transpose(1, 2), case["latents_stride"])
    close(kept, stored["latents"], LATENTS, "latents")
    assert [list(mask.shape) for mask in masks] == case["mask_shapes"]
    assert torch.equal(torch.cat([mask.flatten() for mask in masks]), stored["masks"].bool()), "masks differ"

    model.decoder = synthetic(TCDecoder, model.cfg.decoder_channels, model.cfg.channels)
    frames = []
    for c, z in zip(plan, latents):
        ahead = lq[:, :, c.frames.start:c.frames.stop]
        sr = stream.decode(z, ahead)
        frames.append(color_fix(sr, ahead, method="adain") if case["call"]["color_fix"] else sr)
    frames = torch.cat(frames, 2)[0]
    assert list(frames.shape) == case["frames_shape"]
    close(at_strides(frames, case["frames_stride"]), stored["frames"], FRAMES, "frames")


CHECKS = {"pipeline": check_pipeline, "lq_projector": check_projector, "dit_stream": check_dit,
          "decoder": check_decoder, "color": check_color, "prepare": check_prepare}


def test_the_folder_has_cases():
    assert [*FOLDER.glob("*.safetensors")], f"FLASHVSR_GOLDEN={str(FOLDER)!r} holds no *.safetensors"


@pytest.fixture
def exact_sums(monkeypatch):
    """oneDNN adds the products of a convolution one after another: for the widest that alone costs 2e-5 of the 3e-5
    allowed. Without it torch makes a matrix product of them, closer to float64 but slower: so only for long sums."""
    convolve = torch.nn.functional.conv2d

    def conv2d(x, weight, *args, **kwargs):
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", weight[0].numel() < 2000)
        return convolve(x, weight, *args, **kwargs)
    monkeypatch.setattr(torch.nn.functional, "conv2d", conv2d)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)


@pytest.mark.usefixtures("exact_sums")
@pytest.mark.parametrize("path", [*cases()])
@torch.no_grad()
def test_case(path):
    case, stored = read(path)
    CHECKS[case["kind"]](case, stored)


@pytest.mark.parametrize("version", ["v1", "v1.1"])
def test_official_names_and_shapes(version):
    official = json.loads((STORED / "official_state_dict_shapes.json").read_text())
    cfg = ModelConfig.wan1_3b(version)
    with torch.device("meta"):
        modules = {"dit": DiT(cfg), "tcdecoder": TCDecoder(cfg.decoder_channels, cfg.channels),
                   f"lq_proj_{version}_{cfg.projector}": LQProjector(cfg.proj_dims, cfg.dim, variant=cfg.projector)}
    for name, module in modules.items():
        assert {key: list(value.shape) for key, value in module.state_dict().items()} == official[name]
