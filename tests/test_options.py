"""What a user writes, turned into what is to be done."""
import argparse
import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from flashvsr_nb.options import MANUAL, in_frames, json_progress, moment, plan_jobs, say_json

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("text, want", [
    ("0", 0), ("48", 48), ("2s", Fraction(2)), ("0.04s", Fraction(1, 25)), ("1:30", Fraction(90)),
    ("1:02:03.5", Fraction(7447, 2)), ("90s", Fraction(90)), ("00:05", Fraction(5))])
def test_moments(text, want):
    got = moment(text)
    assert got == want and type(got) is type(want)


@pytest.mark.parametrize("text", ["", "s", "1.5", "-1", "-1s", "1:", ":1", "1:2:3:4", "1h", "nan", "½"])
def test_what_is_no_moment(text):
    with pytest.raises(argparse.ArgumentTypeError, match="write frames like 48"):
        moment(text)


def test_moments_in_frames():
    ntsc = Fraction(30000, 1001)
    assert [in_frames(at, ntsc) for at in (None, 7, Fraction(60), Fraction(1, 100), Fraction(0))] == [None, 7, 1798, 1, 0]


@pytest.fixture
def home(tmp_path):
    for name in ("film/b.AVI", "film/a.mp4", "film/readme.txt", "scans/1.png", "more/a.mp4", "one.mov", "one.jpg", "empty/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def names(home, inputs, output="out", **options):
    jobs = plan_jobs([home / i for i in inputs], home / output, **options)
    return [(str(a.relative_to(home)), str(b.relative_to(home))) for a, b in jobs]


@pytest.mark.parametrize("inputs, options, want", [
    (["one.mov"], {}, ["out"]), (["scans"], {}, ["out"]), (["one.jpg"], dict(kind="png"), ["out"]),
    (["one.mov"], dict(kind="video"), ["out/one.mov"]), (["scans"], dict(kind="video"), ["out/scans.mp4"]),
    (["film"], {}, ["out/a.mp4", "out/b.mkv"]), (["film"], dict(kind="png"), ["out/a", "out/b"]),
    (["one.mov", "film"], {}, ["out/one.mov", "out/a.mp4", "out/b.mkv"]),
    (["scans", "one.jpg"], {}, ["out/scans", "out/one.png"]), (["one.jpg", "film"], dict(kind="video"), ["out/one.mp4", "out/a.mp4", "out/b.mkv"]),
    (["one.mov"], dict(output="big.mkv", kind="video"), ["big.mkv"]), (["one.jpg"], dict(output="big.png", kind="png"), ["big.png"])])
def test_names_of_outputs(home, inputs, options, want):
    before = sorted(home.rglob("*"))
    assert [b for _, b in names(home, inputs, **options)] == want
    assert sorted(home.rglob("*")) == before  # a plan makes nothing
    if want[0].startswith("out/"):
        (home / "out").mkdir()
        assert [b for _, b in names(home, inputs, **options)] == want


@pytest.mark.parametrize("inputs, options, said", [
    (["gone.mp4"], {}, "gone.mp4: no such file"), (["one.mov", "gone"], {}, "gone: no such file"),
    (["film"], dict(output="out.mp4"), "2 inputs need a folder"), (["film", "more"], {}, "both would become"),
    (["film"], dict(output="film"), "are the same"), (["film"], dict(output="no/out"), "does not exist"),
    (["one.mov"], dict(output="out.mp4", kind="png"), "not a name for PNGs"),
    (["one.jpg"], dict(output="out.png", kind="video"), "not a name for a video"), (["one.mov"], dict(output="o.xyz"), "cannot write .xyz")])
def test_refused_plans(home, inputs, options, said):
    with pytest.raises((ValueError, OSError), match=said):
        names(home, inputs, **options)


def test_existing_outputs_are_safe(home):
    (home / "out").mkdir()
    (home / "out/a.mp4").write_bytes(b"old")
    with pytest.raises(FileExistsError, match="a.mp4: exists already"):
        names(home, ["film"])
    assert names(home, ["film"], overwrite=True)[0] == ("film/a.mp4", "out/a.mp4")


def test_lines_of_json(capsys):
    now = iter([0, 0.3, 0.6, 0.7, 1.2, 1.3])
    tell = json_progress(Path("a.mp4"), clock=lambda: next(now))
    for done in range(1, 6):
        tell(done, 5)
    say_json("done", output=Path("ö.mp4"))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["event"], line.get("done")) for line in lines] == [("progress", 2), ("progress", 4), ("progress", 5), ("done", None)]
    assert lines[0] == dict(event="progress", input="a.mp4", done=2, total=5, frames_per_second=3.333)
    assert lines[3] == dict(event="done", output="ö.mp4")


def test_the_manual_knows_the_options():
    shown = subprocess.run([sys.executable, "-m", "flashvsr_nb.cli", "upscale", "--help"], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.endswith(MANUAL) and "exit codes:" in MANUAL
    for word in MANUAL.split():
        if word.startswith("--"):
            assert word in shown.stdout.removesuffix(MANUAL)
