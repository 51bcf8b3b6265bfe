"""Cut the clips of `data/` from three freely licensed videos. data/README.md says where to get those.

    python tools/make_data.py FOLDER        # FOLDER holds bigbuckbunny.mp4, cityCC0.mpg, VID_20191220_170832.mp4

Each `NAME_hr.mp4` is a crop of the source; each `NAME_lr.mp4` is what the preset `clean` makes of the decoded HR file.
`phone.mp4` is the beginning of the third, packet for packet: a clock that runs unevenly, as phones make it.
Another version of PyAV or x264 gives the same pictures but other bytes: write data/SHA256SUMS anew then.
"""
import hashlib, sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av, numpy as np
from PIL import Image

from flashvsr_nb.degradation import degrade_stream
from flashvsr_nb.video import VideoReader, VideoWriter

OUT = Path(__file__).resolve().parent.parent/'data'
BT601, BT709 = 6, 1


@dataclass(frozen=True)
class Cut:
    file: str        # name of the source file
    sha256: str      # of the source file
    matrix: int      # of the source's RGB -> YUV conversion (the first two files carry no tag)
    frames: list     # numbers of the source frames taken
    rate: Fraction   # frames/s of the result
    size: tuple      # (width, height) the source is reduced to first (Lanczos), or None
    left_top: tuple  # (x, y) of the 640x384 crop
    start: float = None  # seconds into the source's audio where the crop starts, or None for no audio


CUTS = {
    # the source repeats a frame (32) to turn 24 frames/s into 25: without it the film's own rhythm is back
    'bbb': Cut('bigbuckbunny.mp4', 'f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd', BT709,
               [i for i in range(8, 42) if i != 32], Fraction(24), (960, 540), (40, 30), 0.32),
    'city': Cut('cityCC0.mpg', 'fe129d341e5b1a174336b956bf16d2b215a506c4a07f6fa3351a1e9b58ca0279', BT601,
                list(range(117, 150)), Fraction(25), None, (40, 16)),
    'dog': Cut('VID_20191220_170832.mp4', '9b0710a436413f75cc3cd1c1048aa3c4d7c28f76f51ef6a25413d0018d22ec99', BT709,
               list(range(8, 41)), Fraction(30), (768, 432), (64, 16)),
}


def rgb_frames(path, matrix):
    "Every frame of `path` as RGB uint8 (H,W,3)."
    with av.open(str(path)) as c:
        for f in c.decode(video=0):
            yield f.reformat(format='rgb24', src_colorspace=matrix, dst_color_range=2).to_ndarray()


def audio_packets(path, start, seconds):
    "The audio packets of `path` between `start` and `start + seconds`, moved so that `start` becomes 0."
    c = av.open(str(path))
    stream = c.streams.audio[0]
    def packets():
        first, last = (round(t/stream.time_base) for t in (start, start + seconds))
        for p in c.demux(stream):
            if p.dts is None or not first <= p.pts < last: continue
            p.pts, p.dts = p.pts - first, p.dts - first
            yield p
    return stream, packets()


def write(path, frames, rate, audio=None):
    "H.264 4:2:0, BT.709 limited range and tagged so; one thread, so that the bytes do not depend on the machine."
    with av.open(str(path), 'w', options={'movflags': '+faststart', 'fflags': '+bitexact'}) as out:
        s = out.add_stream('libx264', rate=rate)
        s.height, s.width, s.pix_fmt = *frames[0].shape[:2], 'yuv420p'
        s.options = {'crf': '12', 'preset': 'slower', 'threads': '1'}
        c = s.codec_context
        c.colorspace = c.color_primaries = c.color_trc = c.color_range = 1
        sound = out.add_stream_from_template(audio[0]) if audio else None
        for i, a in enumerate(frames):
            f = av.VideoFrame.from_ndarray(np.ascontiguousarray(a), format='rgb24')
            f = f.reformat(format='yuv420p', dst_colorspace=BT709, dst_color_range=1)
            f.pts = i
            out.mux(s.encode(f))
        out.mux(s.encode(None))
        if audio:
            for p in audio[1]:
                p.stream = sound
                out.mux(p)


def reduce(hr, lr):
    "The preset `clean` of a file, its clock, tags and sound kept."
    with VideoReader(hr) as reader, VideoWriter(lr, reader.info.width//4, reader.info.height//4, like=reader.info,
                                                audio_from=hr, crf=8, overwrite=True) as writer:
        for frame in degrade_stream(reader, 'clean'): writer.write(frame)


def begin(source, target, frames):
    "The first frames of a file and their sound, packets copied as they are."
    with av.open(str(source)) as c, av.open(str(target), 'w', options={'fflags': '+bitexact'}) as out:
        new, end, n = {s: out.add_stream_from_template(s) for s in (c.streams.video[0], c.streams.audio[0])}, None, 0
        for p in c.demux(*new):
            if p.dts is None: continue
            if p.stream.type == 'video':
                n += 1
                if n > frames: end = end or p.pts*p.time_base
            if end is None or p.stream.type == 'audio' and p.pts*p.time_base < end:
                p.stream = new[p.stream]
                out.mux(p)


def main(folder):
    OUT.mkdir(exist_ok=True)
    for name, c in CUTS.items():
        src = Path(folder)/c.file
        if not src.is_file() or hashlib.sha256(src.read_bytes()).hexdigest() != c.sha256:
            sys.exit(f'{src} is missing or another file than expected: see data/README.md')
        wanted, (x, y) = set(c.frames), c.left_top
        hr = []
        for i, a in enumerate(rgb_frames(src, c.matrix)):
            if i not in wanted: continue
            if c.size: a = np.asarray(Image.fromarray(a).resize(c.size, Image.LANCZOS))
            hr.append(a[y:y+384, x:x+640])
        write(OUT/f'{name}_hr.mp4', hr, c.rate,
              audio_packets(src, c.start, len(hr)/c.rate) if c.start is not None else None)
        reduce(OUT/f'{name}_hr.mp4', OUT/f'{name}_lr.mp4')
    begin(Path(folder)/CUTS['dog'].file, OUT/'phone.mp4', 12)
    files = sorted(OUT.glob('*.mp4'))
    (OUT/'SHA256SUMS').write_text(''.join(f'{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n' for f in files))
    for f in files: print(f'{f.stat().st_size/1e6:6.2f} MB  {f.name}')


if __name__ == '__main__':
    if len(sys.argv) != 2: sys.exit(__doc__)
    main(sys.argv[1])
