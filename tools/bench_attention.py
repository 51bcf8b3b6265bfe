"""Measure attention on this machine's GPU for the notebooks: `python tools/bench_attention.py FOLDER [--only NAME]`.

Writes attention_h100.json (the table of `flashvsr_nb bench attention`), attention_variants.json (our kernels with
other choices) and prepared_h100.json (what comes before the kernel) to FOLDER; the notebooks read them from
data/results/. Takes about two minutes; with --only table, variants or prepared, one of them.
"""
import argparse
import contextlib
import json
from pathlib import Path

import torch
from flashvsr_nb import hopper_kernel, performance, sparge_kernel
from flashvsr_nb.attention import LCSA
from flashvsr_nb.dit import RMSNorm
from flashvsr_nb.kv_cache import KVCache
from flashvsr_nb.patching import rope_table, window_partition
from flashvsr_nb.prepared_cache import PreparedCache, norm_and_turn, turn_queries
from flashvsr_nb.small_caches import quantize_blocks


@contextlib.contextmanager
def set_to(module, **values):
    "Names of a module, changed for a while."
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def variants(repeats=20, lq=8448, lk=33792, density=0.25, heads=12, d=128):
    "Useful TFLOP/s of our kernels with other warps, stages, blocks, rings and formats: plan and kernel, keys prepared."
    generator = torch.Generator("cuda").manual_seed(1)
    q, k, v = performance._outlier_tokens(lq, lk, heads, d, generator)
    mask = torch.rand(1, heads, lq // 128, lk // 128, device="cuda", generator=generator) < density
    kv = {pv: sparge_kernel.prepare_kv(k, v, pv=pv) for pv in ("bf16", "fp8")}
    half_keys, half_queries = mask.repeat_interleave(2, -1), mask.repeat_interleave(2, -2)
    rows = []

    def row(name, pv="bf16", block_mask=mask, warps=(4, 5), ring=None, hopper=False, **kw):
        changed = {} if hopper else {"_on_hopper": lambda device: False, "_tuning": lambda device: warps}
        rings = {} if ring is None else {"RINGS": {128: ring, 64: ring}}
        with set_to(sparge_kernel, **changed), set_to(hopper_kernel, **rings):
            ms = performance._median_ms(
                lambda: sparge_kernel.sparge_attention_prepared(q, kv[pv], block_mask=block_mask, **kw), repeats)
        rows.append({"name": name, "ms": ms, "tflops": 4 * d * mask.sum().item() * 128**2 / ms / 1e9})
        print(f"{name:32} {ms:.3f} ms {rows[-1]['tflops']:.0f} TFLOP/s", flush=True)

    row("general, 8 warps, 4 stages", warps=(8, 4))
    row("general, 4 warps, 3 stages", warps=(4, 3))
    row("general, 4 warps, 4 stages", warps=(4, 4))
    row("general, 4 warps, 5 stages")
    row("general, blocks 128×64", block_mask=half_keys, block_size=(128, 64))
    row("general, blocks 64×128", block_mask=half_queries, block_size=(64, 128))
    row("general, skip test λ = 20", skip=20.0)
    row("general, FP8 values", "fp8")
    if sparge_kernel._on_hopper(q.device):
        row("09b, ring of 2 tiles", hopper=True, ring=2)
        row("09b, ring of 3 tiles", hopper=True, ring=3)
        row("09b, blocks 128×64", block_mask=half_keys, block_size=(128, 64), hopper=True)
        row("09b, FP8 values", "fp8", hopper=True)
    return {"machine": torch.cuda.get_device_name(), "torch": torch.__version__, "lq": lq, "lk": lk,
            "density": mask.float().mean().item(), "heads": heads, "d": d, "rows": rows}


def plain_write(k, v, norm, rope, mean, slab, size=None):
    "`PreparedCache.write_projected` in plain PyTorch; `slab`: the tensors to write to."
    if size is not None:
        v = window_partition(v.transpose(1, 2).flatten(2).unflatten(1, size)).unflatten(-1, v.shape[1::2]).transpose(1, 2)
    k = norm_and_turn(k, norm, rope, size=size)
    k8, scale = quantize_blocks(k.float() - mean, 128)
    for to, x in zip(slab, (k8, scale, v, k.unflatten(2, (-1, 64)).mean(3, dtype=torch.float32))):
        to.copy_(x)


def prepared(repeats=20, size=(2, 48, 88), heads=12, d=128, density=0.25):
    "Milliseconds of what comes before the kernel, for a chunk of one slab and a full ring of four, and of a whole step."
    generator, tokens = torch.Generator("cuda").manual_seed(1), size[0] * size[1] * size[2]
    norm = RMSNorm(heads * d).to("cuda", torch.bfloat16).requires_grad_(False)
    rope, grid = rope_table(size, d, device="cuda"), (size[1] // 8, size[2] // 8)
    rule = LCSA(key_blocks=4 * density * grid[0] * grid[1])

    def randn():
        x = torch.randn(1, tokens, heads * d, device="cuda", generator=generator)
        return x.bfloat16().unflatten(-1, (heads, d)).transpose(1, 2)
    q, k, v = randn(), randn() + 3 * randn()[:, :, :1], randn()
    cache, old = PreparedCache(tokens), KVCache(tokens)
    for _ in range(5):
        kv = cache.write_projected(k, v, norm=norm, rope=rope)
        plain = old.update(norm_and_turn(k, norm, rope), v)
    here = [torch.empty_like(x[:, :, :x.shape[2] // 4]) for x in (kv.k, kv.k_scale, kv.v, kv.pooled)]
    plain_write(k, v, norm, rope, cache.mean, here)
    start = (cache.order.index(4)) * tokens
    unequal = (kv.k[:, :, start:start + tokens] != here[0]).float().mean().item()
    compiled_write, compiled_turn = (torch.compile(f, dynamic=False) for f in (plain_write, norm_and_turn))
    turned = norm_and_turn(q, norm, rope)
    mask = rule(turned, kv, grid=grid)

    def before():
        keys, values = old.update(norm_and_turn(k, norm, rope), v)
        x = norm_and_turn(q, norm, rope)
        return sparge_kernel.sparge_attention(x, keys, values, block_mask=rule(x, keys, grid=grid))

    def after():
        ready, x = cache.write_projected(k, v, norm=norm, rope=rope), turn_queries(q, norm, rope)
        return sparge_kernel.sparge_attention_prepared(x, ready, block_mask=rule(x, ready, grid=grid))
    calls = {"write": {
        "eager": lambda: plain_write(k, v, norm, rope, cache.mean, here),
        "eager, row by row": lambda: plain_write(k, v, norm, rope, cache.mean, here, size),
        "compiled": lambda: compiled_write(k, v, norm, rope, cache.mean, here),
        "compiled, row by row": lambda: compiled_write(k, v, norm, rope, cache.mean, here, size),
        "eager, quantised by 09a": lambda: cache.write(norm_and_turn(k, norm, rope), v),
        "fused": lambda: cache.write_projected(k, v, norm=norm, rope=rope),
        "fused, row by row": lambda: cache.write_projected(k, v, norm=norm, rope=rope, size=size),
    }, "queries": {
        "eager": lambda: norm_and_turn(q, norm, rope), "compiled": lambda: compiled_turn(q, norm, rope),
        "fused": lambda: turn_queries(q, norm, rope),
    }, "mask": {
        "from keys": lambda: rule(turned, plain[0], grid=grid), "from noted means": lambda: rule(turned, kv, grid=grid),
    }, "attend": {
        "quantise all keys": lambda: sparge_kernel.sparge_attention(turned, *plain, block_mask=mask),
        "prepared": lambda: sparge_kernel.sparge_attention_prepared(turned, kv, block_mask=mask),
    }, "step": {"before": before, "after": after}}
    found = {"machine": torch.cuda.get_device_name(), "torch": torch.__version__, "tokens": tokens, "keys": kv.tokens,
             "heads": heads, "d": d, "density": mask.float().mean().item(), "unequal": unequal, "ms": {}}
    for part, ways in calls.items():
        found["ms"][part] = {name: performance._median_ms(call, repeats) for name, call in ways.items()}
        print(json.dumps({part: found["ms"][part]}), flush=True)
    return found


def table():
    "What `flashvsr_nb bench attention` prints."
    found = performance.attention_table(report=lambda row: print(row, flush=True))
    print(performance.table_text(found))
    return found


MEASURES = {"table": ("attention_h100", table), "variants": ("attention_variants", variants),
            "prepared": ("prepared_h100", prepared)}


def main(folder, only=None):
    for name, (file, measure) in MEASURES.items():
        if only in (None, name):
            found = measure()
            (Path(folder) / f"{file}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--only", choices=MEASURES)
    main(**vars(parser.parse_args()))
