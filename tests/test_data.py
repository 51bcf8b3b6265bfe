"The clips of data/ are the ones that its README describes."
import hashlib
from fractions import Fraction
from pathlib import Path

import numpy as np, pytest

from flashvsr_nb.degradation import degrade
from flashvsr_nb.video import read_video

DATA = Path(__file__).resolve().parent.parent/'data'
CLIPS = {'bbb': (Fraction(24), True), 'city': (Fraction(25), False), 'dog': (Fraction(30), False)}   # rate, has sound
BT709, LIMITED = 1, 1


def decode(name):
    import av
    with av.open(str(DATA/f'{name}.mp4')) as c:
        s = c.streams.video[0]
        cc = s.codec_context
        tags = cc.name, cc.pix_fmt, cc.colorspace, cc.color_primaries, cc.color_trc, cc.color_range
        return read_video(DATA/f'{name}.mp4'), s.average_rate, tags, len(c.streams.audio)


def test_exact_file_set():
    names = {f'{n}_{k}.mp4' for n in CLIPS for k in ('hr', 'lr')}
    names |= {'evaluate.toml', 'evaluate_packages.toml', 'phone.mp4', 'README.md', 'SHA256SUMS', 'results'}
    assert {p.name for p in DATA.iterdir()} - {'packages'} == names  # packages: where a reader puts more clips
    assert sum(p.stat().st_size for p in DATA.iterdir()) <= 8e6


def test_checksums():
    listed = dict(reversed(line.split('  ')) for line in (DATA/'SHA256SUMS').read_text().splitlines())
    assert listed == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in DATA.glob('*.mp4')}


def test_readme_credits():
    text = (DATA/'README.md').read_text()
    for word in ('Blender Foundation', 'CC-BY-3.0', 'CC0', 'Mota Filho', 'CC-BY-SA-4.0'): assert word in text
    for p in DATA.glob('*.mp4'): assert f'`{p.name}`' in text, p.name


@pytest.mark.parametrize('name', CLIPS)
def test_clip(name):
    rate, sound = CLIPS[name]
    hr, hr_rate, hr_tags, hr_audio = decode(f'{name}_hr')
    lr, lr_rate, lr_tags, lr_audio = decode(f'{name}_lr')
    assert hr.shape == (33, 384, 640, 3) and lr.shape == (33, 96, 160, 3)
    assert hr_rate == lr_rate == rate
    assert hr_tags == lr_tags == ('h264', 'yuv420p', BT709, BT709, BT709, LIMITED)
    assert hr_audio == lr_audio == sound
    moved = np.abs(hr[1:].astype(int) - hr[:-1]).mean(axis=(1, 2, 3))
    assert moved.min() > 0.8, 'a repeated frame'
    # the LR clip is the clean reduction of the HR clip: brightness close and not shifted, colour at half resolution
    small = degrade(hr[::8], 'clean').astype(float)
    mse = np.square((small - lr[::8]) @ np.array([.2126, .7152, .0722])).mean()
    assert 10*np.log10(255**2/mse) > 40
    assert np.abs((small - lr[::8]).mean((0, 1, 2))).max() < 0.4
