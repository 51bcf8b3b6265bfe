"""Give a nano other sizes and keep what it has learnt: fewer channels by pruning, more by widening.

    python tools/resize_nano.py nano OUT.safetensors --channels 64 112 32 16 --ffn 256
    python tools/train_nano.py DATA OUT --from OUT.safetensors
"""
import argparse
from dataclasses import replace
from pathlib import Path

import torch

from flashvsr_nb.decoder import TCDecoder
from flashvsr_nb.pipeline import FlashVSR
from flashvsr_nb.training import _cut_between, prune, start_weights, trainable, widen
from flashvsr_nb.weights import load_weights, save_weights


@torch.no_grad()
def resize(weights, channels, ffn_dim):
    "A model of these sizes that gives about what the weights give; its seed is torch's."
    cfg = replace(weights.cfg, decoder_channels=tuple(channels), ffn_dim=ffn_dim)
    model, options = start_weights(FlashVSR(cfg)), dict(residual=cfg.residual, pyramid=cfg.pyramid)
    old = trainable(weights)
    least = list(weights.cfg.decoder_channels)
    for stage in (1, 2):
        least[stage] = min(least[stage], channels[stage])
        prune(old.decoder, stage=stage, width=least[stage])
    pruned = TCDecoder(tuple(least), **options)
    pruned.load_state_dict(old.decoder.state_dict())
    widen(model.decoder, pruned)
    for block in old.dit.blocks:
        _cut_between(block.ffn[0], block.ffn[2], ffn_dim)
    model.dit.load_state_dict(old.dit.state_dict())
    model.projector.load_state_dict(old.projector.state_dict())
    model.context.copy_(old.context)
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="nano, or a file of `save_weights`")
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--channels", type=int, nargs=4, required=True, help="of the decoder at H/8, H/4, H/2 and H")
    parser.add_argument("--ffn", type=int, required=True, help="hidden width of the DiT's feed-forward network, no more")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = resize(load_weights(args.weights), args.channels, args.ffn)
    save_weights(args.out, model.cfg, dit=model.dit.state_dict(), projector=model.projector.state_dict(),
                 decoder=model.decoder.state_dict(), context=model.context.detach())
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
