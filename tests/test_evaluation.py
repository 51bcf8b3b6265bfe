"""Manifests, data sets in their layouts, the runner on clips that are odd in every way, and the report."""
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashvsr_nb import runner
from flashvsr_nb.datasets import LAYOUTS, Item, Manifest, checksum, fingerprint, load_item, read_manifest
from flashvsr_nb.methods import bicubic, check_frames, flashvsr, lanczos
from flashvsr_nb.report import published, report, tables
from flashvsr_nb.runner import evaluate
from flashvsr_nb.video import read_video, write_video

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
FAST = ["psnr", "ssim"]


def texture(frames, height, width, seed=0):
    "A clip of smooth colours that move, (F,H,W,3) uint8."
    y, x = np.mgrid[:height, :width]
    t = np.arange(frames)[:, None, None]
    waves = [np.sin((x + 2 * t) / 5 + c + seed) + np.cos((y - t) / (4 + c)) for c in range(3)]
    return np.clip(np.stack(waves, -1) * 50 + 128, 0, 255).astype(np.uint8)


def pngs(folder, frames):
    folder.mkdir(parents=True)
    for i, f in enumerate(frames):
        Image.fromarray(f).save(folder / f"{i:08}.png")


def manifest(folder, text):
    (folder / "m.toml").write_text(textwrap.dedent(text), encoding="utf-8")
    return folder / "m.toml"


def run(plan, out, **options):
    return evaluate(plan, out, **({"metrics": FAST, "progress": False} | options))


def whys(results):
    return {(p["clip"], p["configuration"]): p["why"] for p in results["problems"]}


BICUBIC = '\n[[configuration]]\nname = "bicubic"\nmethod = "bicubic"\n'


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    high, low, only = LAYOUTS[layout]
    for clip in (only or ("000", "001"))[:2]:
        if high:
            pngs(tmp_path / high[0].replace("{clip}", clip), texture(2, 32, 48))
        if low:
            pngs(tmp_path / low[0].replace("{clip}", clip), texture(2, 8, 12))
    results = run(manifest(tmp_path, f'[[set]]\nname = "s"\nlayout = "{layout}"\npath = "."\n{BICUBIC}'), tmp_path / "out")
    assert len(results["clips"]) == 2
    assert len(results["values"]) == (4 if high else 0)
    missing = len(only) - 2 if only else 0  # of a set with known clips, those that are not there are told
    assert len(results["problems"]) == missing and all("no ground truth" in p["why"] for p in results["problems"])


def test_clips_odd_in_every_way(tmp_path):
    pngs(tmp_path / "odd size", texture(3, 37, 51))
    pngs(tmp_path / "one", texture(1, 40, 48))
    pngs(tmp_path / "grey.v2", [f[..., 0] for f in texture(2, 40, 48)])
    write_video(tmp_path / "ten bits.mp4", texture(3, 64, 64).astype(np.uint16) * 257, pixel_format="yuv420p10le")
    write_video(tmp_path / "ünï %.mp4", texture(3, 64, 66))
    path = manifest(tmp_path, f'[[set]]\nname = "set / 1"\nhr = "."\ndegrade = "mild"\n{BICUBIC}')
    results = run(path, tmp_path / "out", metrics=["psnr", "ssim", "niqe", "warping_error", "flicker"])
    assert results["problems"] == []
    sizes = {c["clip"]: (c["frames"], c["width"], c["height"]) for c in results["clips"]}
    assert sizes == {"odd size": (3, 48, 36), "one": (1, 48, 40), "grey.v2": (2, 48, 40), "ten bits": (3, 64, 64), "ünï %": (3, 64, 64)}
    assert {v["clip"] for v in results["values"] if v["metric"] == "psnr"} == set(sizes)
    assert all(15 < v["mean"] < 60 for v in results["values"] if v["metric"] == "psnr")
    why = {(n["clip"], n["metric"]): n["why"] for n in results["not_taken"]}
    assert "2 frames" in why["one", "warping_error"] and "96x96" in why["grey.v2", "niqe"]
    lq = read_video(tmp_path / "out" / "lq" / "set _ 1" / "odd size")  # what other methods are given
    assert checksum(lq) == next(c["lq_pixels_sha256"] for c in results["clips"] if c["clip"] == "odd size")
    assert "ünï %" in report(tmp_path / "out")


def test_truth_that_does_not_fit_names_the_clip(tmp_path):
    for name, hr, lq in (("good", (3, 40, 48), (3, 10, 12)), ("frames", (4, 40, 48), (3, 10, 12)), ("size", (3, 44, 48), (3, 10, 12)),
                         ("cut", (3, 43, 50), (3, 10, 12)), ("smaller", (3, 39, 48), (3, 10, 12))):
        pngs(tmp_path / "GT" / name, texture(*hr))
        pngs(tmp_path / "LQ" / name, texture(*lq))
    pngs(tmp_path / "LQ" / "lonely", texture(3, 10, 12))
    path = manifest(tmp_path, f'[[set]]\nname = "s"\nhr = "GT"\nlq = "LQ"\n{BICUBIC}')
    results = run(path, tmp_path / "out")
    said = {clip: why for (clip, _), why in whys(results).items()}
    assert set(said) == {"frames", "size", "smaller", "lonely"}
    assert said["frames"] == "ground truth has 4 frames, LQ 3"
    assert "ground truth is 48x44, LQ 12x10; 4 times the LQ would be 48x40" in said["size"]
    assert said["lonely"] == "no ground truth of that name"
    assert {v["clip"] for v in results["values"]} == {"good", "cut"}
    text = report(tmp_path / "out")
    assert "## Failed" in text and "lonely" in text


def test_damaged_files_name_the_clip(tmp_path):
    write_video(tmp_path / "whole.mp4", texture(12, 96, 96))
    write_video(tmp_path / "long.mkv", texture(40, 96, 96))
    raw = (tmp_path / "long.mkv").read_bytes()
    (tmp_path / "long.mkv").unlink()
    (tmp_path / "breaks off.mp4").write_bytes((DATA / "city_lr.mp4").read_bytes()[:60_000])
    (tmp_path / "nothing.mp4").write_bytes(b"")
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    middle = len(raw) // 2
    (tmp_path / "hurt.mkv").write_bytes(raw[:middle] + bytes(600) + raw[middle + 600:])
    pngs(tmp_path / "png", texture(3, 40, 40))
    (tmp_path / "png" / "00000001.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    path = manifest(tmp_path, f'[[set]]\nname = "s"\nhr = "."\ndegrade = "clean"\n{BICUBIC}')
    results = run(path, tmp_path / "out")
    said = whys(results)
    assert {clip for clip, _ in said} >= {"breaks off", "nothing", "noise", "png"}
    assert {v["clip"] for v in results["values"]} <= {"whole", "hurt"} and "whole" in {v["clip"] for v in results["values"]}
    assert "damaged or breaks off" in said["breaks off", None]


@pytest.mark.parametrize("make, said", [
    (lambda big: big / np.float32(255) * np.where(np.arange(3) == 1, np.nan, 1)[:, None, None, None], "frame 1 of the result holds NaN"),
    (lambda big: big[:2], "the result has 2 frames, the clip 3"), (lambda big: big[:, 1:], "is 48x39; it must be 48x40"),
    (lambda big: big.astype(np.float32), "floats must be in [0,1]"), (lambda big: 1 // 0, "ZeroDivisionError")])
def test_a_method_that_fails_is_named_and_the_rest_is_kept(tmp_path, make, said):
    pngs(tmp_path / "a", texture(3, 40, 48))
    path = manifest(tmp_path, f'[[set]]\nname = "s"\nhr = "."\ndegrade = "clean"\n{BICUBIC}')
    results = run(path, tmp_path / "out", methods={"mine": lambda lq, *, scale, seed: make(bicubic(lq, scale=scale))})
    assert said in whys(results)["a", "mine"]
    assert [(v["configuration"], v["metric"]) for v in results["values"]] == [("bicubic", "psnr"), ("bicubic", "ssim")]


def test_floats_lists_and_tensors_are_frames_too():
    import torch

    frames = texture(2, 8, 8)
    for given in (frames / 255, [*frames], iter(frames), torch.from_numpy(frames)):
        np.testing.assert_array_equal(check_frames(given, frames.shape), frames)


def test_results_of_others(tmp_path):
    for clip in ("a b", "c"):
        pngs(tmp_path / "hr" / clip, texture(3, 40, 48))
    path = manifest(tmp_path, '[[set]]\nname = "s"\nhr = "hr"\ndegrade = "mild"\n' + BICUBIC + "".join(
        f'\n[[configuration]]\nname = "{n}"\nframes = "{n}/{{clip}}"\n' for n in ("folder", "array", "video", "half")))
    first = run(path, tmp_path / "out")
    assert {c for _, c in whys(first)} == {"folder", "array", "video", "half"}
    for clip in ("a b", "c"):
        big = bicubic(read_video(tmp_path / "out/lq/s" / clip), scale=4)
        pngs(tmp_path / "folder" / clip, big)
        for kind in ("array", "video"):
            (tmp_path / kind).mkdir(exist_ok=True)
        np.save(tmp_path / "array" / f"{clip}.npy", big / np.float32(255))
        write_video(tmp_path / "video" / f"{clip}.mp4", big, crf=0, pixel_format="yuv444p")
    pngs(tmp_path / "half" / "c", texture(3, 20, 24))
    results = run(path, tmp_path / "out")
    mean = {(v["configuration"], v["clip"]): v["mean"] for v in results["values"] if v["metric"] == "psnr"}
    for clip in ("a b", "c"):
        assert mean["folder", clip] == mean["array", clip] == mean["bicubic", clip]
        assert mean["video", clip] == pytest.approx(mean["bicubic", clip], abs=0.2)
    assert "the result is 24x20; it must be 48x40" in whys(results)["c", "half"]
    assert "no frames at" in whys(results)["a b", "half"]
    Image.fromarray(texture(1, 40, 48)[0]).save(tmp_path / "folder/c/00000000.png")  # their frames change: measured anew
    again = run(path, tmp_path / "out")
    assert mean["folder", "c"] != [v["mean"] for v in again["values"] if (v["configuration"], v["clip"], v["metric"]) == ("folder", "c", "psnr")][0]


def test_same_bytes_whatever_the_workers_and_the_folder(tmp_path):
    for i in range(3):
        pngs(tmp_path / "hr" / f"c{i}", texture(3, 48, 64, i))
    path = manifest(tmp_path, f'[[set]]\nname = "s"\nhr = "hr"\ndegrade = "real"\nseed = 3\nborder = 2\n{BICUBIC}')
    out = [run(path, tmp_path / f"out{w}", workers=w, metrics=["psnr", "warping_error"]) and (tmp_path / f"out{w}" / "results.json").read_bytes()
           for w in (1, 3)]
    assert out[0] == out[1]
    assert str(tmp_path).encode() not in out[0]


def test_only_what_changed_is_measured_again(tmp_path):
    pngs(tmp_path / "hr" / "a", texture(2, 40, 48))
    calls = []

    def mine(lq, *, scale, seed, strength=1):
        calls.append(strength)
        return bicubic(lq, scale=scale)

    text = '[[set]]\nname = "s"\nhr = "hr"\ndegrade = "mild"\nborder = 0\n\n[[configuration]]\nname = "m"\nmethod = "mine"\nstrength = 1\n'
    go = lambda t, **more: run(manifest(tmp_path, t), tmp_path / "out", methods={"mine": mine}, **more)
    go(text), go(text)
    assert calls == [1]
    go(text, metrics=["psnr", "ssim", "psnr_y"])  # one more metric needs the frames again
    go(text.replace("strength = 1", "strength = 2"))
    go(text.replace("border = 0", "border = 1"))
    go(text.replace('"mild"', '"clean"'))
    Image.fromarray(texture(1, 40, 48, 9)[0]).save(tmp_path / "hr/a/00000000.png")
    go(text)
    assert calls == [1, 1, 2, 1, 1, 1]


def test_killed_and_gone_on_with(tmp_path):
    for i in range(4):
        pngs(tmp_path / "hr" / f"c{i}", texture(4, 64, 64, i))
    path = manifest(tmp_path, f'[[set]]\nname = "s"\nhr = "hr"\ndegrade = "mild"\n{BICUBIC}\n[[configuration]]\nname = "l"\nmethod = "lanczos"\n')
    code = f"from flashvsr_nb.runner import evaluate; evaluate({str(path)!r}, {str(tmp_path / 'out')!r}, metrics={FAST}, workers=2, progress=False)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    whole = run(path, tmp_path / "whole") and (tmp_path / "whole/results.json").read_bytes()
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    cells, deadline = tmp_path / "out/cells", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and (not cells.exists() or len(list(cells.iterdir())) < 5):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for cell in cells.glob("*.json"):  # whole, each of them
        json.loads(cell.read_text())
    run(path, tmp_path / "out")
    assert (tmp_path / "out/results.json").read_bytes() == whole


def test_ctrl_c_keeps_what_was_measured(tmp_path):
    pngs(tmp_path / "hr" / "a", texture(2, 40, 48))
    path = manifest(tmp_path, f'[[set]]\nname = "s"\nhr = "hr"\ndegrade = "mild"\n{BICUBIC}')

    def interrupted(lq, *, scale, seed):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stop:
        run(path, tmp_path / "out", methods={"mine": interrupted})
    assert "goes on from there" in stop.value.__notes__[0]
    assert len(list((tmp_path / "out/cells").glob("*.json"))) >= 3
    assert run(path, tmp_path / "out")["problems"] == []


@pytest.mark.parametrize("text, said", [
    ('[[set]]\nname = "s"\nhr = "x"\n', "no clips at"), ("", "needs \\[\\[set\\]\\]"), ('name = 3\n', "must be of type str"),
    ('[[set]]\nname = "s"\nhr = "GT"\n', "say lq = …, or degrade = one of clean, mild, real"),
    ('[[set]]\nname = "s"\nhr = "GT"\ndegrade = "hard"\n', "allowed are clean, mild, real"),
    ('[[set]]\nname = "s"\nhr = "GT"\ndegrade = "mild"\ncrop = [1, 2]\n', "4 whole numbers"),
    ('[[set]]\nname = "s"\nhr = "GT"\ndegrade = "mild"\nframes = [4, 4]\n', "end must be above"),
    ('[[set]]\nname = "s"\nhr = "GT"\ndegrade = "mild"\nscale = 0\n', "scale from 1"),
    ('[[set]]\nname = "s"\nhr = "GT"\ndegrade = "mild"\n' * 2, "two sets are called 's'"),
    ('[[set]]\nname = "s"\nhr = "GT"\ndegrade = "mild"\n[[configuration]]\nmethod = "bicubic"\n', "needs a name"),
    ('[[set]]\nname = "s"\nhr = "GT"\ndegrade = "mild"\n[[configuration]]\nname = "x"\nframes = "y"\n', "pattern with"),
    ('metrics = ["pnsr"]\n[[set]]\nname = "s"\nhr = "GT"\ndegrade = "mild"\n', "allowed are psnr"),
    ('weights = "nowhere"\n[[set]]\nname = "s"\nhr = "GT"\ndegrade = "mild"\n', "weights of metrics")])
def test_manifests_that_are_refused(tmp_path, text, said):
    pngs(tmp_path / "GT" / "a", texture(1, 16, 16))
    with pytest.raises((ValueError, OSError), match=said):
        evaluate(manifest(tmp_path, text), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_out_that_is_a_file_and_no_manifest(tmp_path):
    pngs(tmp_path / "GT" / "a", texture(1, 16, 16))
    path = manifest(tmp_path, '[[set]]\nname = "s"\nhr = "GT"\ndegrade = "mild"\n')
    (tmp_path / "out").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        run(path, tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        run(tmp_path / "nowhere.toml", tmp_path / "o")
    with pytest.raises(ValueError, match="workers=0"):
        run(path, tmp_path / "o", workers=0)


def test_seed_of_a_clip_does_not_depend_on_the_others(tmp_path):
    for c in "abc":
        pngs(tmp_path / "GT" / c, texture(1, 16, 16))
    seeds = [{i.clip: i.seed for i in read_manifest(manifest(tmp_path, f'[[set]]\nname = "s"\nhr = "GT"\ndegrade = "mild"\n{more}')).items}
             for more in ("", 'clips = ["b"]\n')]
    assert seeds[1] == {"b": seeds[0]["b"]} and len(set(seeds[0].values())) == 3


def test_crop_of_both_and_border(tmp_path):
    pngs(tmp_path / "GT/a", texture(2, 64, 64))
    pngs(tmp_path / "LQ/a", texture(2, 16, 16))
    item = Item("s", "a", tmp_path / "GT/a", tmp_path / "LQ/a", crop=(8, 4, 40, 32))
    lq, hr = load_item(item)
    assert lq.shape == (2, 8, 10, 3) and hr.shape == (2, 32, 40, 3)
    np.testing.assert_array_equal(hr, texture(2, 64, 64)[:, 4:36, 8:48])
    with pytest.raises(ValueError, match="multiples of 4"):
        load_item(Item("s", "a", tmp_path / "GT/a", tmp_path / "LQ/a", crop=(8, 4, 41, 32)))
    results = run(Manifest("m", [Item("s", "a", tmp_path / "GT/a", None, "clean", border=32)], []), tmp_path / "out")
    assert all("border = 32 leaves nothing" in why for why in whys(results).values())
    assert fingerprint(tmp_path / "GT/a") != fingerprint(tmp_path / "LQ/a")


def test_unknown_options_of_flashvsr_are_told(tmp_path):
    pngs(tmp_path / "hr" / "a", texture(2, 40, 48))
    path = manifest(tmp_path, f'[[set]]\nname = "s"\nhr = "hr"\ndegrade = "mild"\n{BICUBIC}\n[[configuration]]\nname = "n"\nmethod = "flashvsr"\ntiel = 3\n'
                              '\n[[configuration]]\nname = "w"\nmethod = "flashvsr"\nweights = "nowhere"\n')
    said = whys(run(path, tmp_path / "out"))
    assert "'tiel' is not an option of FlashVSR" in said["a", "n"] and "nowhere" in said["a", "w"]


def test_nano_gives_the_same_through_the_runner(tmp_path, one_thread):
    pngs(tmp_path / "hr" / "a", texture(2, 64, 64))
    path = manifest(tmp_path, '[[set]]\nname = "s"\nhr = "hr"\ndegrade = "mild"\n[[configuration]]\nname = "nano"\nmethod = "flashvsr"\ndevice = "cpu"\n')
    results = run(path, tmp_path / "out")
    lq, hr = load_item(read_manifest(path).items[0])
    from flashvsr_nb.evaluation import psnr

    sr = flashvsr(lq, scale=4, device="cpu")
    assert results["values"][0]["values"] == [round(psnr(a, b), 6) for a, b in zip(sr, hr)]
    assert len(results["configurations"][0]["weights"]["nano.safetensors"]) == 64


def test_published_numbers_are_a_section_apart(tmp_path):
    one, two = published()
    assert one["sets"]["REDS"]["PSNR"] == [23.31, 23.16, 23.13] and two["sets"]["REDS"]["PSNR"][-1] == 24.11
    assert all(len(v) == len(t["columns"]) for t in (one, two) for s in t["sets"].values() for v in s.values())
    pngs(tmp_path / "hr" / "a|b", texture(2, 40, 48)) if os.name != "nt" else None
    pngs(tmp_path / "hr" / "c", texture(2, 40, 48))
    path = manifest(tmp_path, f'[[set]]\nname = "s"\nhr = "hr"\ndegrade = "mild"\n{BICUBIC}\n[[configuration]]\nname = "l"\nmethod = "lanczos"\n')
    results = run(path, tmp_path / "out")
    text = report(tmp_path / "out")
    ours = text.split("## Published numbers")[0]
    assert "24.11" in text and "24.11" not in ours and "psnr ↑ dB" in ours
    rows = tables(results)["s"]
    assert rows[0] == ["metric", "bicubic", "l"] and "(" in rows[1][2] and "(" not in rows[1][1]
    assert (tmp_path / "out/report.html").read_text(encoding="utf-8").count("<table>") >= 5


def test_csv_holds_every_number(tmp_path):
    pngs(tmp_path / "hr" / "a", texture(3, 40, 48))
    results = run(manifest(tmp_path, f'[[set]]\nname = "s"\nhr = "hr"\ndegrade = "mild"\n{BICUBIC}'), tmp_path / "out")
    lines = (tmp_path / "out/results.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "set,clip,configuration,metric,index,value"
    assert len(lines) == 1 + sum(len(v["values"]) for v in results["values"]) == 7
    timings = json.loads((tmp_path / "out/timings.json").read_text())
    assert {t["metric"] for t in timings} == set(FAST) and all(t["seconds"] >= 0 for t in timings)
    assert runner.METHODS["lanczos"] is lanczos
