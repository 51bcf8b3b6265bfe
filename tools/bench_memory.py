"""Measure memory, time and exactness of the official size (random weights) on a GPU: `python tools/bench_memory.py OUT.json`.

Every case runs under a cap (`set_per_process_memory_fraction`); what is reported is the caching allocator's reserved peak.
On the CPU (`--cpu`) the same script runs with a tiny model, to try it out.
"""
import argparse
import gc
import json
import os
import time
import traceback
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.nn.functional as F

from flashvsr_nb.attention import LCSA
from flashvsr_nb.dit import Block, ModelConfig
from flashvsr_nb.kv_cache import chunk
from flashvsr_nb.lean_stream import LeanStream, to_levels
from flashvsr_nb.patching import rope_table
from flashvsr_nb.pipeline import FlashVSR, _Model
from flashvsr_nb.small_caches import cache_bytes
from flashvsr_nb.streaming import Stream

GIB = 2**30
TINY = ModelConfig(dim=64, heads=2, layers=2, ffn_dim=96, text_dim=16, freq_dim=32, proj_dims=(8, 12),
                   decoder_channels=(16, 12, 8, 8), key_blocks=3.0, local_range=3, resize="torch")


def model(cfg, device, dtype):
    "A model of this size with random weights, made where it is used."
    torch.manual_seed(0)
    before, _ = torch.get_default_dtype(), torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return _Model(cfg, context=512 if device == "cuda" else 8).freeze()
    finally:
        torch.set_default_dtype(before)


def levels(frames, height, width, seed=0):
    "A clip of smooth moving noise as LQ, (1,3,F,H,W) uint8 in the host's memory, H and W multiples of 128."
    g = torch.Generator().manual_seed(seed)
    h, w = -(-4 * height // 128) * 128, -(-4 * width // 128) * 128
    coarse = torch.rand(1, 3, 1 + frames // 8, h // 32, w // 32, generator=g).expand(-1, -1, -1, -1, -1)
    out = torch.empty(1, 3, frames, h, w, dtype=torch.uint8)
    where = "cuda" if torch.cuda.is_available() else "cpu"
    for i in range(frames):
        a, b = coarse[:, :, i // 8], coarse[:, :, min(i // 8 + 1, coarse.shape[2] - 1)]
        frame = F.interpolate((a + (b - a) * (i % 8) / 8).to(where), size=(h, w), mode="bicubic")
        out[:, :, i] = to_levels(2 * frame - 1).cpu()
    return out


def host_memory(reset=False):
    "Bytes: resident now and at its highest since the last reset."
    if reset:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [int(lines[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM")]


class Watched(LeanStream):
    "Notes the highest allocated memory of each stage."
    def denoise(self, lq, *, tokens=None):
        return self.watch("denoise", super().denoise, lq, tokens=tokens)

    def finish(self, latents, lq):
        return self.watch("decode", super().finish, latents, lq)

    def watch(self, name, step, *args, **kwargs):
        sync(), torch.cuda.is_available() and torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        try:
            return step(*args, **kwargs)
        finally:
            sync()
            peaks = [f() if torch.cuda.is_available() else 0 for f in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)]
            vars(self).setdefault("notes", []).append((name, *peaks, time.perf_counter() - start))


def sync():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def case(net, height, width, *, chunks=3, cap=None, clip=None, **options):
    "Run a few chunks; memory in MiB, seconds per chunk."
    cuda, _ = torch.cuda.is_available(), gc.collect()
    clip = levels(min(41, 25 + 8 * (chunks - 1)), height, width) if clip is None else clip
    if cuda:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap * GIB / total) if cap else 1.0)
    base = host_memory(reset=True)[0]
    out = dict(height=height, width=width, cap_gib=cap, chunks=chunks, options=options)
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    reserved, seconds, stream = [], [], None
    try:
        stream = Watched(net, backend=options.pop("backend", "auto"), **options)
        for k in range(chunks):
            part = clip[:, :, chunk(k).lq.start:chunk(k).lq.stop]
            if part.shape[2] < len(chunk(k).lq):  # a long run repeats its clip
                part = clip[:, :, 17:25]
            start = time.perf_counter()
            stream.push(part)
            sync()
            seconds.append(time.perf_counter() - start)
            reserved.append(torch.cuda.memory_reserved() if cuda else 0)
        out["checksum"] = float(stream.projector[0].float().mean()) if stream.projector else 0.0
    except torch.OutOfMemoryError as error:
        out["error"] = str(error).split(". ")[0]
    now, peak = host_memory()
    mib = lambda n: round(n / 2**20)
    notes = vars(stream).get("notes", []) if stream else []
    out |= dict(peak_reserved=mib(max([n[2] for n in notes] + reserved, default=0)), reserved_after=[mib(r) for r in reserved[:3] + reserved[-1:]],
                host_more=mib(now - base), host_peak_more=mib(peak - base), host_peak=mib(peak),
                seconds=[round(s, 3) for s in seconds[:4] + seconds[-1:]])
    if len(seconds) > 2:
        out["seconds_per_frame"] = round(sorted(seconds[1:])[len(seconds[1:]) // 2] / 8, 4)
    for name in ("denoise", "decode"):
        mine = [note[1:] for note in notes if note[0] == name][:3]
        out[name] = dict(allocated=[mib(n[0]) for n in mine], reserved=[mib(n[1]) for n in mine],
                         seconds=[round(n[2], 3) for n in mine])
    kind = options.get("kind", "resident")
    size = [-(-4 * n // 128) * 128 for n in (height, width)]
    out["kv"] = {k: mib(v) for k, v in cache_bytes(net.cfg, *size, kind=kind, prefetch=options.get("prefetch", True))._asdict().items()}
    return out


class Forced:
    "The masks of a plain run, given to a lean one: same input, same mask."
    block_size = (128, 128)

    def __init__(self, mask):
        self.mask = mask

    def __call__(self, q, k, *, grid):
        return self.mask


def exactness(cfg, device, dtype, grid=(4, 6)):
    "One block, plain against in rows, given the same masks: relative error, L2 and largest."
    torch.manual_seed(0)
    with torch.device(device):
        block = Block(cfg).to(dtype).requires_grad_(False)
        n = 3 * 128 * grid[0] * grid[1]
        x, t6 = torch.randn(1, n, cfg.dim, dtype=dtype), 0.3 * torch.randn(1, 6, cfg.dim, dtype=dtype)
        prompt = block.cross_attn.prompt(torch.randn(1, 16, cfg.dim, dtype=dtype))
    rope = rope_table((6, 8 * grid[0], 8 * grid[1]), cfg.dim // cfg.heads, device=device)
    masks = []
    plain = block(x, t6, prompt, rope, grid=grid, policy=cfg.lcsa, record=masks.append).float()
    out = {}
    for name, policy in dict(same_mask=Forced(masks[0]), own_mask=cfg.lcsa).items():
        lean = block.in_rows(x.clone(), t6, prompt, rope, rows=4096, grid=grid, policy=policy).float()
        out[name] = dict(l2=float((lean - plain).norm() / plain.norm()),
                         largest=float((lean - plain).abs().max() / plain.abs().max()))
    return out


def end_to_end(net, height, width, chunks=3):
    "PSNR in dB of 8-bit frames against the plain stream of the same model."
    clip = levels(25 + 8 * (chunks - 1), height, width, seed=1)
    device = net.context.device
    dtype = net.dit.patch_embedding.weight.dtype

    def run(stream, plain=False):
        out = []
        for k in range(chunks):
            part = clip[:, :, chunk(k).lq.start:chunk(k).lq.stop]
            y = stream.push((part.to(device).float() * (2 / 255) - 1)) if plain else stream.push(part)
            out.append(to_levels(y).cpu() if plain else y)
        return torch.cat(out, 2).float()

    def psnr(a, b):
        mse = (a - b).square().mean().item()
        return None if mse == 0 else round(10 * torch.log10(torch.tensor(255**2 / mse)).item(), 2)  # None: equal

    plain = run(Stream(net), plain=True)
    out = {}
    for name, options in dict(resident={}, offload=dict(kind="offload", decoder_tile=32, decoder_host=True),
                              int8=dict(kind="int8"), int8_offload=dict(kind="int8-offload")).items():
        out[name] = psnr(run(LeanStream(net, **options)), plain)
    return out | dict(dtype=str(dtype).split(".")[1], frames=plain.shape[2], size=list(plain.shape[-2:]))


def steady(net, height, width, *, marks=(53, 1005), **options):
    "Peak memory in MiB after so many frames of one stream: of the process, and reserved on the device."
    clip, out = levels(33, height, width), {}
    cuda = torch.cuda.is_available()
    stream, given = LeanStream(net, **options), 0
    host_memory(reset=True)
    while given < max(marks):
        stream.push(clip[:, :, :25] if stream.k == 0 else clip[:, :, 25:33])
        given = chunk(stream.k - 1).frames.stop
        if given in marks:
            out[f"after_{given}"] = dict(host=host_memory()[1] >> 20, device=torch.cuda.max_memory_reserved() >> 20 if cuda else 0)
    return out | dict(height=height, width=width, frames=given)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cases", default="", help="JSON file: list of {name, height, width, cap, int8_weights, ...}")
    parser.add_argument("--checks", default="exact,psnr", help="comma-separated: exact, psnr, none")
    parser.add_argument("--cpu", action="store_true", help="a tiny model on the CPU, to try the script")
    parser.add_argument("--steady", action="store_true", help="only: memory of nano after 53 and after 1,005 frames")
    parser.add_argument("--limit", type=float, default=500, help="seconds after which no further case starts")
    args = parser.parse_args()
    began = time.perf_counter()
    device, dtype = ("cpu", torch.float32) if args.cpu else ("cuda", torch.bfloat16)
    cfg = TINY if args.cpu else ModelConfig.wan1_3b()
    result = dict(torch=torch.__version__, device="cpu", allocator=os.environ["PYTORCH_CUDA_ALLOC_CONF"], cases=[])
    torch.set_grad_enabled(False)
    if not args.cpu:
        torch.ones(1, device="cuda") @ torch.ones(1, device="cuda")
        free, total = torch.cuda.mem_get_info()
        result |= dict(device=torch.cuda.get_device_name(), total=total >> 20,
                       context=(total - free - torch.cuda.memory_reserved()) >> 20)

    def save(**more):
        result.update(more)
        args.out.write_text(json.dumps(result, indent=1))

    def attempt(step):
        try:
            return step()
        except Exception as error:  # one failed part must not cost the others
            traceback.print_exc()
            return dict(error=f"{type(error).__name__}: {str(error)[:300]}")

    if args.steady:
        nano = FlashVSR.from_pretrained("nano", device=device)
        save(steady=dict(model="nano") | steady(nano, 32, 32))
        return print(json.dumps(result["steady"]))
    if "exact" in args.checks:
        save(exact={str(d).split(".")[1]: attempt(lambda: exactness(cfg, device, d)) for d in (torch.float32, torch.bfloat16)})
        print(json.dumps(result["exact"]), flush=True)
    net, quantized = model(cfg, device, dtype), False
    cases = json.loads(Path(args.cases).read_text()) if args.cases else []
    if "psnr" in args.checks:
        save(psnr=attempt(lambda: end_to_end(net, 64, 64) if args.cpu else end_to_end(net, 192, 192)))
        print(json.dumps(result["psnr"]), flush=True)
    for i, one in enumerate(sorted(cases, key=lambda c: c.get("int8_weights", False))):
        name = one.pop("name", f"case {i}")
        if time.perf_counter() - began > args.limit:
            print("out of time before", name, flush=True)
            continue
        row = dict(name=name) | attempt(lambda: case(net, **one))
        result["cases"].append(row)
        save(seconds=round(time.perf_counter() - began))
        print(json.dumps({k: row.get(k) for k in ("name", "height", "width", "peak_reserved", "reserved_after", "host_peak_more",
                                                  "seconds", "seconds_per_frame", "denoise", "decode", "error")}), flush=True)


if __name__ == "__main__":
    main()
