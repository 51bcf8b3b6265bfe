"""The command `flashvsr_nb`: what it does, what it says, and what it leaves behind."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import flashvsr_nb
import numpy as np
import pytest
import torch
from flashvsr_nb.cli import main
from flashvsr_nb.degradation import degrade
from flashvsr_nb.dit import ModelConfig
from flashvsr_nb.pipeline import FlashVSR
from flashvsr_nb.video import probe, read_video, write_video
from flashvsr_nb.weights import FILES
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
COMMAND = [sys.executable, "-m", "flashvsr_nb.cli"]


def shell(*arguments, **options):
    "The command in a process of its own."
    env = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, env=env, **options)


def clip(frames, height=16, width=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


@pytest.fixture
def lr(tmp_path):
    write_video(tmp_path / "lr.mp4", clip(5))
    return tmp_path / "lr.mp4"


def test_help_is_quick_and_loads_no_torch(tmp_path):
    code = ("import sys; from flashvsr_nb.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
            "print([m for m in ('torch', 'av', 'numpy', 'tqdm') if m in sys.modules])")
    spent = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path,
                              env=os.environ | {"PYTHONPATH": str(ROOT)})
        spent.append(time.perf_counter() - start)
    assert done.stdout.endswith("[]\n") and "upscale" in done.stdout and "doctor" in done.stdout
    assert min(spent) < 0.5


@pytest.mark.parametrize("command", ["upscale", "degrade", "doctor", "bench"])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and f"usage: flashvsr_nb {command}" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"flashvsr_nb {flashvsr_nb.__version__}\n"


@pytest.mark.parametrize("arguments, said", [
    ([], "COMMAND"), (["enlarge"], "invalid choice: 'enlarge'"), (["upscale"], "IN, OUT"),
    (["upscale", "a", "b", "--sed", "1"], "--sed"), (["upscale", "a", "b", "--seed", "x"], "'x'"),
    (["upscale", "a", "b", "--seed", "-1"], "-1 is not between 0 and"), (["upscale", "a", "b", "--crf", "52"], "0 and 51"),
    (["upscale", "a", "b", "--weights-version", "v2"], "v1.1"), (["upscale", "a", "b", "--scene-cut", "on"], "auto"),
    (["upscale", "a", "b", "--scale", "5"], "between 1 and 4"), (["upscale", "a", "b", "--start", "1.5"], "like 2.5s"),
    (["upscale", "a", "b", "--preview", "a minute"], "1:30"), (["bench", "--size", "640"], "like 640x384"),
    (["bench", "--size", "641x384"], "multiples of 4"), (["bench", "--frames", "0"], "between 1")])
def test_wrong_arguments_are_one_line_and_2(arguments, said, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("flashvsr_nb: ") and err.count("\n") == 1 and said in err and "--help" in err


# ---- upscale

def test_upscale_as_a_command(lr, tmp_path):
    done = shell("upscale", lr.name, "sr.mp4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"sr.mp4: 5 frames of 64x64 in [\d.]+ s, [\d.]+ frames/s, at most [\d.]+ GiB\n", done.stdout)
    assert "5/5" in done.stderr and "frames/s" in done.stderr and "memory" in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["lr.mp4", "sr.mp4"]
    info = probe(tmp_path / "sr.mp4")
    assert (info.width, info.height, info.frames, info.fps) == (64, 64, 5, probe(lr).fps)


def test_upscale_is_what_the_library_gives(lr, tmp_path, capsys):
    assert main(["upscale", str(lr), str(tmp_path / "sr"), "--quiet", "--seed", "3", "--device", "cpu"]) == 0
    assert capsys.readouterr() == ("", "")
    want = FlashVSR.from_pretrained("nano", device="cpu").upscale(read_video(lr), seed=3, progress=False)
    assert np.array_equal(read_video(tmp_path / "sr"), want)


def test_upscale_options_reach_the_model(lr, tmp_path, monkeypatch):
    seen = {}

    class Stub:
        @staticmethod
        def from_pretrained(*a, **k):
            seen["load"] = a, k
            return Stub()

        def upscale(self, *a, **k):
            seen["run"] = a, k
    monkeypatch.setattr("flashvsr_nb.pipeline.FlashVSR", Stub)
    assert main(["upscale", str(lr), str(tmp_path / "o.mkv"), "--weights", "w", "--weights-version", "v1", "--device",
                 "cuda", "--attention", "sdpa", "--seed", "7", "--crf", "20.5", "--overwrite", "--quiet",
                 "--scene-cut", "off", "--scale", "1.5", "--start", "2", "--preview", "0.1s", "--mask", "dense",
                     "--codec", "hevc", "--pixel-format", "yuv420p10le", "--tile", "64", "--overlap", "8", "--blend",
                     "linear", "--tiling", "paper"]) == 0
    assert seen["load"] == (("w",), dict(version="v1", variant="tiny", device="cuda", attention="sdpa",
                                         mask="dense"))
    assert seen["run"] == ((lr, tmp_path / "o.mkv"), dict(
        scale=1.5, start=2, frames=2, seed=7, crf=20.5, codec="hevc", pixel_format="yuv420p10le", overwrite=True,
        scene_cut="off", vram=None, tile=64, overlap=8, blend="linear", tiling="paper", progress=False))


def test_upscale_with_a_folder_of_official_files(lr, tmp_path, monkeypatch, capsys):
    cfg = ModelConfig(dim=128, heads=1, layers=1, ffn_dim=128, text_dim=16, freq_dim=32, proj_dims=(16, 16),
                      decoder_channels=(16, 16, 8, 8), key_blocks=12.)  # the official one, made small
    monkeypatch.setattr(ModelConfig, "wan1_3b", lambda version: cfg)
    folder = tmp_path / "FlashVSR-v1.1"
    folder.mkdir()
    net = FlashVSR(cfg)
    save_file(net.dit.state_dict(), folder / FILES["dit"])
    for part in ("projector", "decoder"):
        torch.save(getattr(net, part).state_dict(), folder / FILES[part])
    torch.save(net.context.detach(), folder / FILES["context"])
    assert main(["upscale", str(lr), str(tmp_path / "sr"), "--weights", str(folder), "--quiet", "--device", "cpu"]) == 0
    assert capsys.readouterr() == ("", "")
    assert np.array_equal(read_video(tmp_path / "sr"), net.freeze().upscale(read_video(lr), progress=False))
    assert cfg.resize == "pil" and cfg.color_fix == "adain"


def test_overwrite(lr, tmp_path):
    out = tmp_path / "sr.mp4"
    out.write_bytes(b"old")
    assert main(["upscale", str(lr), str(out), "--quiet"]) == 2 and out.read_bytes() == b"old"
    assert main(["upscale", str(lr), str(out), "--quiet", "--overwrite"]) == 0 and len(read_video(out)) == 5


def test_a_notice_is_one_tidy_line(tmp_path, capsys):
    from PIL import Image
    Image.fromarray(np.zeros((4, 4, 4), np.uint8)).save(tmp_path / "in.png")
    assert main(["upscale", str(tmp_path / "in.png"), str(tmp_path / "out.png"), "--quiet"]) == 0
    assert capsys.readouterr().err == f"flashvsr_nb: {tmp_path / 'in.png'}: transparency is dropped\n"


def test_a_bug_shows_its_traceback(lr, tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    monkeypatch.setattr("flashvsr_nb.pipeline._enlarge", broken)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(RuntimeError, match="mat1"):
        main(["upscale", str(lr), str(tmp_path / "sr.mp4"), "--quiet"])
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nGPU 0 has ..."),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    MemoryError("Unable to allocate 20. GiB for an array")])
def test_out_of_memory_is_one_line(lr, tmp_path, monkeypatch, capsys, error):
    def broken(*args):
        raise error
    monkeypatch.setattr("flashvsr_nb.pipeline._enlarge", broken)
    assert main(["upscale", str(lr), str(tmp_path / "sr.mp4"), "--quiet"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("flashvsr_nb: out of memory") and err.count("\n") == 1
    assert os.listdir(tmp_path) == ["lr.mp4"]


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_keeps_a_playable_file(tmp_path):
    write_video(tmp_path / "lr.mp4", clip(2000))
    run = subprocess.Popen([*COMMAND, "upscale", "lr.mp4", "sr.mp4"], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                           env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    seen = ""
    while not re.search(r"[1-9]\d*/2000", seen):  # until the bar counts frames
        got = run.stderr.read(1)
        assert got, seen
        seen += got
    time.sleep(0.3)
    run.send_signal(signal.SIGINT)
    err = run.communicate(timeout=120)[1]
    assert run.returncode == 130
    kept = int(re.search(r"flashvsr_nb: interrupted; the first (\d+) frames are in sr.mp4\n$", err)[1])
    assert 0 < kept < 2000 and len(read_video(tmp_path / "sr.mp4")) == kept
    assert sorted(os.listdir(tmp_path)) == ["lr.mp4", "sr.mp4"] and "Traceback" not in err


def test_ctrl_c_while_loading_leaves_nothing(lr, tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr("flashvsr_nb.pipeline.load_weights", interrupted)
    assert main(["upscale", str(lr), str(tmp_path / "sr.mp4")]) == 130
    assert capsys.readouterr().err == "flashvsr_nb: interrupted; nothing was written\n"
    assert os.listdir(tmp_path) == ["lr.mp4"]


# ---- several inputs, parts, lines for programs

@pytest.fixture
def videos(tmp_path):
    (tmp_path / "in").mkdir()
    for i, name in enumerate(("a.mp4", "b.mkv")):
        write_video(tmp_path / "in" / name, clip(3 + i, seed=i))
    return tmp_path / "in"


def test_a_folder_of_videos(videos, tmp_path, capsys):
    assert main(["upscale", str(videos), str(tmp_path / "out"), "--device", "cpu", "--scale", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 2 and "a.mp4: 3 frames of 32x32" in out and "b.mkv: 4 frames of 32x32" in out
    assert sorted(os.listdir(tmp_path / "out")) == ["a.mp4", "b.mkv"]


def test_one_of_several_fails(videos, tmp_path, monkeypatch, capsys):
    whole = FlashVSR.upscale

    def fail(self, source, *args, **kwargs):
        if source.name == "a.mp4":
            error = OSError("disk full")
            error.add_note("nothing was written")
            raise error
        return whole(self, source, *args, **kwargs)
    monkeypatch.setattr(FlashVSR, "upscale", fail)
    out = tmp_path / "out"
    assert main(["upscale", str(videos / "a.mp4"), str(videos / "b.mkv"), str(out), "--quiet", "--output-format", "png"]) == 1
    err = capsys.readouterr().err.splitlines()
    assert err == [f"flashvsr_nb: {videos / 'a.mp4'}: disk full; nothing was written",
                   f"flashvsr_nb: 1 of 2 inputs failed, the others are in {out}"]
    assert os.listdir(out) == ["b"] and len(read_video(out / "b")) == 4


def test_several_inputs_are_checked_first(videos, tmp_path, capsys):
    (videos / "c.mp4").write_text("no video")
    assert main(["upscale", str(videos), str(tmp_path / "out")]) == 2
    assert "c.mp4: not a video" in capsys.readouterr().err and os.listdir(tmp_path) == ["in"]


def test_broken_off_input_of_several_is_1(videos, tmp_path, capsys):
    write_video(videos / "c.mkv", clip(30))
    whole = (videos / "c.mkv").read_bytes()
    (videos / "c.mkv").write_bytes(whole[:len(whole) * 7 // 10])
    assert main(["upscale", str(videos), str(tmp_path / "out"), "--quiet", "--frames", "30"]) == 1
    assert "c.mkv: damaged or breaks off" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path / "out")) == ["a.mp4", "b.mkv", "c.mkv"]


def test_lines_for_programs(lr, tmp_path, capsys):
    assert main(["upscale", str(lr), str(tmp_path / "sr.mp4"), "--json", "--preview", "2"]) == 0
    out, err = capsys.readouterr()
    *progress, done = map(json.loads, out.splitlines())
    assert err == "" and progress[-1]["done"] == progress[-1]["total"] == 2 and progress[-1]["event"] == "progress"
    assert (done["event"], done["output"], done["frames"], done["width"]) == ("done", str(tmp_path / "sr.mp4"), 2, 64)
    assert main(["upscale", str(lr), str(tmp_path / "sr.mp4"), "--json"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["exit_code"] == 2 and json.loads(out)["message"] in err and "exists already" in err


# ---- degrade

def test_degrade_same_seed_same_bytes(tmp_path):
    source = str(DATA / "bbb_hr.mp4")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert main(["degrade", source, str(tmp_path / f"{name}.mp4"), "--seed", str(seed), "--quiet"]) == 0
    a, b, c = ((tmp_path / f"{name}.mp4").read_bytes() for name in "abc")
    assert a == b != c
    was, now = probe(source), probe(tmp_path / "a.mp4")
    assert (now.width, now.height, now.frames, now.fps, now.audio) == (160, 96, was.frames, was.fps, was.audio)
    want = degrade(read_video(source), "mild", seed=1).astype(float)
    assert np.abs(read_video(tmp_path / "a.mp4") - want).mean() < 2.5  # nearly lossless, colours at half resolution


def test_degrade_to_a_folder_is_exact(tmp_path, capsys):
    write_video(tmp_path / "hr", clip(4, 24, 32))
    assert main(["degrade", str(tmp_path / "hr"), str(tmp_path / "lr"), "--preset", "clean"]) == 0
    assert np.array_equal(read_video(tmp_path / "lr"), degrade(clip(4, 24, 32), "clean"))
    assert capsys.readouterr().out == f"{tmp_path / 'lr'}: 4 frames of 8x6, preset clean, seed 0\n"


def test_degrade_cuts_odd_sizes_with_a_notice(tmp_path, capsys):
    write_video(tmp_path / "hr", clip(2, 23, 30))
    assert main(["degrade", str(tmp_path / "hr"), str(tmp_path / "lr"), "--quiet"]) == 0
    assert read_video(tmp_path / "lr").shape == (2, 5, 7, 3)
    assert capsys.readouterr().err == "flashvsr_nb: degrade: 30x23 is cut to 28x20, a multiple of 4\n"


@pytest.mark.parametrize("shape, extra, said", [
    ((3, 40), [], "cannot be made 4 times smaller"), ((16, 16), ["--preset", "worst"], "'clean', 'mild'")])
def test_degrade_refuses(tmp_path, capsys, shape, extra, said):
    write_video(tmp_path / "hr", clip(2, *shape))
    assert main(["degrade", str(tmp_path / "hr"), str(tmp_path / "lr"), *extra]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and os.listdir(tmp_path) == ["hr"]


def test_degrade_interrupted_keeps_what_was_done(tmp_path, monkeypatch, capsys):
    write_video(tmp_path / "hr", clip(4))

    def stream(frames, *args, **kwargs):
        for i, frame in enumerate(frames):
            if i == 3:
                raise KeyboardInterrupt
            yield frame[:4, :4]
    monkeypatch.setattr("flashvsr_nb.degradation.degrade_stream", stream)
    assert main(["degrade", str(tmp_path / "hr"), str(tmp_path / "lr"), "--quiet"]) == 130
    assert f"the first 3 frames are in {tmp_path / 'lr'}" in capsys.readouterr().err and len(read_video(tmp_path / "lr")) == 3


# ---- doctor and bench

def test_doctor(capsys):
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.endswith("all well\n")
    for word in (f"torch {torch.__version__}", "av ", "cpu: ", "auto is ", "reference: usable", "sdpa: usable", "flex:",
                 "nano: ", "sageattention", "spas_sage_attn", "triton"):
        assert word in out, word
    if not torch.cuda.is_available():
        assert "flex: not usable here, needs CUDA" in out and "cuda: none" in out


@pytest.mark.parametrize("fault, said", [("raise ImportError('libc10.so: cannot open')", "libc10.so"),
                                         ("raise OSError('no kernel')", "no kernel"), ("", "AttributeError")])
def test_doctor_survives_a_broken_torch(tmp_path, fault, said):
    (tmp_path / "torch.py").write_text(fault)
    done = shell("doctor", env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr == "" and "BROKEN" in done.stdout and said in done.stdout
    assert done.stdout.endswith("not well: devices, attention, weights; install flashvsr_nb again\n")


def test_doctor_reports_missing_weights(monkeypatch, capsys):
    def missing(name):
        raise FileNotFoundError("nano is missing from this installation")
    monkeypatch.setattr("flashvsr_nb.weights.load_weights", missing)
    assert main(["doctor"]) == 1 and "BROKEN: FileNotFoundError: nano is missing" in capsys.readouterr().out


def test_plan(capsys):
    assert main(["plan", "270", "480", "--vram", "10", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["vram"] <= found["budget"] < 10 * 1024 and len(found["others"]) > 5
    assert main(["plan", "2160", "3840", "--vram", "4"]) == 1
    assert "does not fit" in capsys.readouterr().out


def test_attention_bench_needs_cuda(capsys):
    if not torch.cuda.is_available():
        assert main(["bench", "attention"]) == 2 and "CUDA" in capsys.readouterr().err


def test_bench(tmp_path, capsys):
    assert main(["bench", "--size", "64x32", "--frames", "3", "--json", str(tmp_path / "b.json")]) == 0
    result = json.loads((tmp_path / "b.json").read_text())
    assert result["size"] == "64x32" and result["frames"] == 3 and result["torch"] == torch.__version__
    assert result["model_frames_per_second"] > 0 and result["end_to_end_frames_per_second"] > 0
    assert result["peak_memory_bytes"] > 10**7 and os.listdir(tmp_path) == ["b.json"]
    out = capsys.readouterr().out
    assert f"model frames per second      {result['model_frames_per_second']}" in out


def test_bench_checks_its_report_first(tmp_path, capsys):
    assert main(["bench", "--json", str(tmp_path / "no" / "b.json")]) == 2
    assert "does not exist" in capsys.readouterr().err
