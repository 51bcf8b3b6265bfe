"""What tiling costs and what sharing repairs: nano on the clips of data/, untiled, both baselines and ours, as JSON.

`python tools/bench_tiling.py data/results/tiling_nano.json`; each line is a process of its own, so that its peak memory
is its own. Times are CPU seconds of one thread.
"""
import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from flashvsr_nb.files import peak_memory
from flashvsr_nb.pipeline import FlashVSR
from flashvsr_nb.seams import KINDS, seam_lines, seam_score
from flashvsr_nb.streaming import prepare_lq
from flashvsr_nb.tiling import make_stream, tile_grid
from flashvsr_nb.video import read_video
from skimage.metrics import structural_similarity

ROOT = Path(__file__).resolve().parent.parent
CLIPS, WAYS, TILE, OVERLAP, FRAMES = ("bbb", "city", "dog"), ("untiled", "paper", "author", "ours"), 64, 24, 29


def luma(x):
    "BT.601 luma of (…,3) uint8, 16 to 235."
    return x.astype(np.float64) @ [65.481 / 255, 128.553 / 255, 24.966 / 255] + 16


def psnr_y(x, y):
    "Mean over frames, dB."
    return float((10 * np.log10(255**2 / np.square(luma(x) - luma(y)).mean((1, 2)))).mean())


def ssim_y(x, y):
    "Mean over frames."
    pairs = zip(luma(x), luma(y))
    return float(np.mean([structural_similarity(a, b, data_range=219, gaussian_weights=True) for a, b in pairs]))


def grids(lr, way):
    "Tiles of both axes, output pixels; for the untiled way those of ours."
    options = dict(overlap=OVERLAP) | (dict(snap=32) if way in ("untiled", "ours") else dict(spread=False))
    return [[slice(4 * s.start, 4 * s.stop) for s in tile_grid(n, TILE, **options)] for n in lr.shape[1:3]]


@torch.inference_mode()
def measure(clip, way):
    "One clip, one way."
    torch.set_num_threads(1)
    lr, hr = (read_video(ROOT / "data" / f"{clip}_{kind}.mp4") for kind in ("lr", "hr"))
    model = FlashVSR.from_pretrained("nano", device="cpu")
    options = {} if way == "untiled" else dict(tile=TILE, overlap=OVERLAP, tiling=way)
    stream, before = make_stream(model, **options), time.process_time()
    sr = torch.cat([stream.enlarge(lr[a:b]) for a, b in ((0, 25), (25, 33))])
    seconds, held = time.process_time() - before, peak_memory(torch.device("cpu"))
    sr = sr.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    hr, inner = hr[:FRAMES], (slice(None), slice(1, -1), slice(1, -1))
    rows, cols = grids(lr, way)
    tiles = [(r.stop - r.start) * (c.stop - c.start) for r in rows for c in cols] if way != "untiled" else [hr[0, ..., 0].size]
    lines = [seam_lines(axis) for axis in (rows, cols)]
    return dict(clip=clip, way=way, psnr_y=psnr_y(sr, hr), psnr_y_without_rim=psnr_y(sr[inner], hr[inner]),
                ssim_y=ssim_y(sr, hr), redundancy=sum(tiles) / hr[0, ..., 0].size, tiles=len(tiles), cpu_seconds=seconds,
                peak_mib=held / 2**20, cache_mib=stream.cache_bytes / 2**20,
                **{kind: vars(seam_score(sr, *lines, kind=kind)) for kind in KINDS})


def bicubic(clip):
    "PSNR of the plain enlargement, to know the scale of the numbers."
    lq, (rows, cols) = prepare_lq(read_video(ROOT / "data" / f"{clip}_lr.mp4", frames=FRAMES))
    plain = ((lq[0, :, :, rows, cols] + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
    return psnr_y(plain, read_video(ROOT / "data" / f"{clip}_hr.mp4", frames=FRAMES))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", help="JSON file; or, with --only, CLIP WAY to print one line of it")
    parser.add_argument("--only", metavar="WAY")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.output, args.only)))
        return
    lines = []
    for clip, way in ((clip, way) for clip in CLIPS for way in WAYS):
        done = subprocess.run([sys.executable, __file__, clip, "--only", way], capture_output=True, text=True, check=True)
        lines.append(json.loads(done.stdout))
        print(clip, way, f"{lines[-1]['psnr_y']:.3f} dB, {lines[-1]['cpu_seconds']:.0f} s", flush=True)
    setup = dict(model="nano", tile=TILE, overlap=OVERLAP, frames=FRAMES, lr="160x96", torch=torch.__version__,
                 machine=platform.machine(), threads=1, bicubic_psnr_y={clip: bicubic(clip) for clip in CLIPS})
    Path(args.output).write_text(json.dumps(dict(setup=setup, results=lines), indent=1) + "\n")


if __name__ == "__main__":
    main()
