"""Measure attention on this machine's GPU for the notebooks: `python tools/bench_attention.py FOLDER`.

Writes attention_h100.json (the table of `flashvsr_nb bench attention`) and attention_variants.json (our kernels with
other choices) to FOLDER; the notebooks read them from data/results/. Takes about a minute.
"""
import contextlib
import json
import sys
from pathlib import Path

import torch
from flashvsr_nb import hopper_kernel, performance, sparge_kernel


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


def main(folder):
    table = performance.attention_table(report=lambda row: print(row, flush=True))
    print(performance.table_text(table))
    for name, found in ("attention_h100", table), ("attention_variants", variants()):
        (Path(folder) / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
