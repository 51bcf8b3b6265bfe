"""Train nano on one GPU or several: from the weights in the package, or from nothing.

    python tools/training_data.py DATA && python tools/train_nano.py DATA OUT --minutes 9
    python -m torch.distributed.run --nproc-per-node 2 tools/train_nano.py DATA OUT --minutes 9

Writes OUT/nano.safetensors (the moving average, ready for `flashvsr_nb upscale --weights`), OUT/log.json and
OUT/checkpoint (all that `--resume` needs). The first of these is written every half minute, too.
"""
import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from flashvsr_nb.clips import Clips
from flashvsr_nb.dit import ModelConfig
from flashvsr_nb.pipeline import FlashVSR
from flashvsr_nb.training import Trainer, load_checkpoint, save_checkpoint, start_weights, trainable, widen
from flashvsr_nb.video import read_video
from flashvsr_nb.weights import load_weights, save_weights


def frames_first(video):
    "(F, H, W, 3) uint8 array to (F, 3, H, W) tensor."
    return torch.from_numpy(video).permute(0, 3, 1, 2).contiguous()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that tools/training_data.py wrote")
    parser.add_argument("out", type=Path, help="folder for what comes out")
    parser.add_argument("--minutes", type=float, default=9, help="of training, setting up not counted (default: 9)")
    parser.add_argument("--until", type=float, help="minutes from the start of this program instead, all counted")
    parser.add_argument("--stop", type=float, help="minutes of training after which to break off, to be resumed")
    parser.add_argument("--peak", type=float, default=1e-3, help="peak learning rate (default: 1e-3)")
    parser.add_argument("--coded", type=float, default=0.6, help="share of damaged clips (default: 0.6)")
    parser.add_argument("--from", dest="start", metavar="nano|PATH", help="weights, all of them, to start from, and sizes")
    parser.add_argument("--decoder-from", metavar="nano|PATH", help="weights whose decoder, not wider, is the start")
    parser.add_argument("--freeze", nargs="+", choices=("dit", "projector", "decoder", "context"), default=(),
                        help="parts that stay as they are")
    parser.add_argument("--resume", type=Path, help="checkpoint folder of an earlier run to go on from")
    parser.add_argument("--batch", type=int, default=6, help="clips per step (default: 6)")
    parser.add_argument("--pool", type=int, default=800, help="clips kept (default: 800)")
    parser.add_argument("--workers", type=int, default=14, help="processes for the codec (default: 14)")
    parser.add_argument("--device", default="cuda", help="where to train (default: cuda)")
    args = parser.parse_args()
    began, rank = time.perf_counter(), int(os.environ.get("RANK", 0))
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(rank)
    with ProcessPoolExecutor(args.workers) as workers:
        list(workers.map(abs, range(args.workers)))  # the processes start here, before the GPU is touched
        if "RANK" in os.environ:  # started by torch.distributed.run
            args.device = args.device if args.device == "cpu" else f"cuda:{os.environ['LOCAL_RANK']}"
            if args.device != "cpu":
                torch.cuda.set_device(args.device)
            dist.init_process_group("gloo" if args.device == "cpu" else "nccl")
        stills = [torch.from_numpy(np.array(Image.open(p).convert("RGB"))).permute(2, 0, 1).contiguous().to(args.device)
                  for p in sorted((args.data / "stills").glob("*.jpg"))]
        videos = [frames_first(read_video(p)).to(args.device) for p in sorted((args.data / "clips").glob("*.mp4"))]
        print(f"{time.perf_counter() - began:.0f} s: {len(stills)} stills, {len(videos)} clips", flush=True)
        torch.manual_seed(0)  # all processes begin with the same weights
        model = trainable(load_weights(args.start)) if args.start else start_weights(FlashVSR(ModelConfig.nano()))
        if args.decoder_from:
            widen(model.decoder, FlashVSR.from_pretrained(args.decoder_from, device="cpu").decoder)
        for part in args.freeze:
            getattr(model, part).requires_grad_(False)
        torch.manual_seed(rank)
        model.to(args.device)
        options = dict(coded=args.coded, workers=workers)
        small = Clips(stills, videos, pool=args.pool, **options)
        large = Clips(stills, videos, size=640, pool=max(1, args.pool // 40), fresh=1, **options)
        print(f"{time.perf_counter() - began:.0f} s: {args.pool} pairs", flush=True)
        minutes = args.minutes if args.until is None else args.until - (time.perf_counter() - began) / 60 - 0.1
        trainer = Trainer(model, minutes=minutes, lr=args.peak)
        if args.resume:
            load_checkpoint(trainer, args.resume)
        log, saved, resumed = [], time.perf_counter(), trainer.spent

        def save():
            part = lambda p: {k.removeprefix(f"{p}."): v for k, v in trainer.ema.items() if k.startswith(f"{p}.")}
            save_weights(args.out / "nano.safetensors", model.cfg, dit=part("dit"), projector=part("projector"),
                         decoder=part("decoder"), context=trainer.ema["context"])
            (args.out / "log.json").write_text(json.dumps(log))

        def report(row):
            nonlocal saved
            if args.stop and trainer.spent - resumed > args.stop * 60:
                trainer.budget = trainer.spent  # the clock is one for all processes: so is this
            if rank:
                return
            log.append(row)
            print({k: round(v, 4) for k, v in row.items()}, flush=True)
            if time.perf_counter() - saved > 30:
                save()
                saved = time.perf_counter()

        trainer.fit(small, large, batch=args.batch, report=report)
        if rank:
            return
        save()
        save_checkpoint(trainer, args.out / "checkpoint")
        record = {"steps": trainer.step, "seconds": round(trainer.spent, 1), "torch": torch.__version__,
                  "machine": torch.cuda.get_device_name() if args.device != "cpu" else "CPU", "batch": args.batch,
                  "processes": dist.get_world_size() if dist.is_initialized() else 1,
                  "parameters": sum(p.numel() for p in model.parameters()), "peak_lr": args.peak, "pool": args.pool}
        (args.out / "log.json").write_text(json.dumps(record | {"log": log}))
        print(record, f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
