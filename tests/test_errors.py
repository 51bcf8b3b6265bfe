"""What a user can get wrong: one line, exit code 1 or 2, nothing left behind or changed."""
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from flashvsr_nb.cli import main
from flashvsr_nb.video import read_video, write_video
from flashvsr_nb.weights import FILES
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
NANO = ROOT / "flashvsr_nb" / "assets" / "nano.safetensors"


def tree(folder):
    "Every file below a folder and what is in it."
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
            for p in sorted(folder.rglob("*"))}


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    "Run a command in an empty folder; it must end with 2 and one line that has all of `words`."
    monkeypatch.chdir(tmp_path)

    def run(*arguments, words, code=2):
        before = tree(tmp_path)
        assert main([str(a) for a in arguments]) == code
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("flashvsr_nb: ") and err.endswith("\n") and err.count("\n") == 1, err
        for word in words:
            assert word in err, err
        assert tree(tmp_path) == before
    return run


@pytest.fixture
def lr(tmp_path):
    write_video(tmp_path / "lr.mp4", np.zeros((3, 8, 8, 3), np.uint8))
    return "lr.mp4"


# ---- the input

@pytest.mark.parametrize("command", ["upscale", "degrade"])
def test_missing_file(refused, command):
    refused(command, "gone.mp4", "out.mp4", words=["gone.mp4: no such file"])


def test_missing_file_as_a_process(tmp_path):
    done = subprocess.run([sys.executable, "-m", "flashvsr_nb.cli", "upscale", "gone.mp4", "out.mp4"], cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2 and not os.listdir(tmp_path)
    assert (done.stdout, done.stderr) == ("", "flashvsr_nb: gone.mp4: no such file or folder\n")


@pytest.mark.parametrize("name, data", [("notes.txt", b"buy milk\n" * 50), ("notes.mp4", b"buy milk\n" * 50),
                                        ("noise.mp4", bytes(range(256)) * 40), ("empty.mp4", b""), ("bad.png", b"PNG")])
def test_not_a_video(refused, tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    refused("upscale", name, "out.mp4", words=[name, "not a"])


@pytest.mark.parametrize("name, said", [
    ("none.avi", "none.avi: no frame in it can be decoded"),
    ("none.mkv", "none.mkv: not a video that can be read (unknown format, empty or damaged)"),
    ("none.mp4", "none.mp4: no video in it that can be read: empty, damaged or never finished")])
def test_zero_frames(refused, tmp_path, name, said):
    with av.open(str(tmp_path / name), "w") as out:
        stream = out.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 16
        out.start_encoding()
    refused("upscale", name, "out.mp4", words=[said])


def test_empty_folder(refused, tmp_path):
    (tmp_path / "pictures").mkdir()
    refused("upscale", "pictures", "out.mp4", words=["pictures: no images"])


def test_audio_only(refused, tmp_path):
    with av.open(str(DATA / "bbb_lr.mp4")) as source, av.open(str(tmp_path / "song.m4a"), "w", format="mp4") as out:
        stream = out.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(source.streams.audio[0]):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    refused("upscale", "song.m4a", "out.mp4", words=["song.m4a: no video in it, only sound"])


def test_truncated_before_its_first_frame(refused, tmp_path):
    write_video(tmp_path / "whole.mp4", np.zeros((30, 16, 16, 3), np.uint8))
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:600])
    refused("upscale", "cut.mp4", "out.mp4", words=["cut.mp4", "damaged"])


@pytest.mark.parametrize("command, size", [("upscale", 64), ("degrade", 4)])
def test_truncated_later(tmp_path, monkeypatch, capsys, command, size):
    "What could be read is upscaled into a whole file; the line and exit code 1 say that frames are missing."
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3), dtype=np.uint8)
    write_video("whole.mp4", noise)
    data = Path("whole.mp4").read_bytes()
    Path("cut.mp4").write_bytes(data[:len(data) // 2])
    assert main([command, "cut.mp4", "out.mp4", "--quiet"]) == 1
    out, err = capsys.readouterr()
    frames = read_video("out.mp4")
    assert 0 < len(frames) < 30 and frames.shape[1:3] == (size, size)
    assert err == (f"flashvsr_nb: cut.mp4: damaged or breaks off: {len(frames)} frames could be read of 30; "
                   "the output has these\n")
    assert out == "" and sorted(os.listdir()) == ["cut.mp4", "out.mp4", "whole.mp4"]


@pytest.mark.parametrize("lost, words, code", [
    (800, ["2.jpg: damaged"], 2),  # not even its header is whole, which is seen before the start
    (200, ["2.jpg: damaged", "nothing was written"], 1)])
def test_image_that_breaks_off_among_others(refused, tmp_path, lost, words, code):
    (tmp_path / "pictures").mkdir()
    for i, noise in enumerate(np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)):
        Image.fromarray(noise).save(tmp_path / "pictures" / f"{i}.jpg")
    last = tmp_path / "pictures" / "2.jpg"
    last.write_bytes(last.read_bytes()[:-lost])
    refused("upscale", "pictures", "out.mp4", "--quiet", words=words, code=code)


# ---- the output

def test_output_folder_missing(refused, lr):
    refused("upscale", lr, "no/out.mp4", words=["no/out.mp4", "does not exist", "create it"])


def test_output_folder_is_a_file(refused, lr):
    refused("upscale", lr, "lr.mp4/out.mp4", words=["is a file, not a folder"])


def test_output_not_writable(refused, lr, tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(0o555)
    if os.access(tmp_path / "locked", os.W_OK):  # root may write anywhere
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path) and access(path, mode))
    refused("upscale", lr, "locked/out.mp4", words=["locked is not writable"])


@pytest.mark.parametrize("command", ["upscale", "degrade"])
def test_output_exists(refused, lr, tmp_path, command):
    (tmp_path / "out.mp4").write_bytes(b"precious")
    refused(command, lr, "out.mp4", words=["out.mp4: exists", "--overwrite"])


@pytest.mark.parametrize("command", ["upscale", "degrade"])
@pytest.mark.parametrize("name", ["lr.mp4", "./sub/../lr.mp4", "link.mp4"])
def test_output_is_the_input(refused, lr, tmp_path, command, name):
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.mp4").symlink_to(tmp_path / lr)
    refused(command, lr, name, "--overwrite", words=["output and input are the same"])


def test_output_of_unknown_kind(refused, lr):
    refused("upscale", lr, "out.xyz", words=["cannot write .xyz", ".mp4"])


def test_many_frames_into_one_png(refused, lr):
    refused("upscale", lr, "out.png", words=["a .png holds one frame"])


def test_sound_that_does_not_fit(refused):
    refused("upscale", DATA / "bbb_lr.mp4", "out.webm", words=["aac", "try .mkv"])


def test_disk_full(refused, lr, monkeypatch):
    def full(self, frame, pts=None):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("flashvsr_nb.video.VideoWriter.write", full)
    refused("upscale", lr, "out.mp4", "--quiet", words=["No space left on device", "nothing was written"], code=1)


# ---- the model

def test_unknown_weights(refused, lr):
    refused("upscale", lr, "out.mp4", "--weights", "giant", words=["'giant'", "unknown", "'nano'"])


@pytest.fixture
def official(tmp_path):
    "A folder that looks like an official release; its files are tiny."
    folder = tmp_path / "FlashVSR-v1.1"
    folder.mkdir()
    save_file({"head.head.weight": torch.zeros(64, 1536)}, folder / FILES["dit"])
    for part in ("projector", "decoder"):
        torch.save({"conv1.bias": torch.zeros(2048)}, folder / FILES[part])
    torch.save(torch.zeros(1, 512, 4096), folder / FILES["context"])
    return folder


@pytest.mark.parametrize("part", ["dit", "projector"])
def test_half_downloaded_checkpoint(refused, lr, official, part):
    file = official / FILES[part]
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])
    refused("upscale", lr, "out.mp4", "--weights", official, words=[FILES[part], "download it again"])


def test_checkpoint_lacks_a_file(refused, lr, official):
    (official / FILES["decoder"]).unlink()
    refused("upscale", lr, "out.mp4", "--weights", official, words=["lacks TCDecoder.ckpt"])


def test_checkpoint_of_unknown_version(refused, lr, official, tmp_path):
    official.rename(tmp_path / "weights")
    refused("upscale", lr, "out.mp4", "--weights", "weights", words=["v1 or v1.1?", "--weights-version"])


def test_official_checkpoint_with_wrong_keys(refused, lr, official):
    refused("upscale", lr, "out.mp4", "--weights", official, words=["not the weights of this model", "missing"])


@pytest.mark.parametrize("change, said", [("rename", "unexpected"), ("drop", "missing"), ("shape", "has shape")])
def test_wrong_key_or_shape(refused, lr, tmp_path, change, said):
    with safe_open(NANO, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    tensor = tensors.pop("dit.head.head.bias")
    if change != "drop":
        tensors["dit.head.head.bias" + "2" * (change == "rename")] = tensor[:-1].clone() if change == "shape" else tensor
    save_file(tensors, tmp_path / "w.safetensors", metadata)
    refused("upscale", lr, "out.mp4", "--weights", "w.safetensors", words=["w.safetensors", "head.head.bias", said])


@pytest.mark.parametrize("command", ["upscale", "bench"])
def test_cuda_without_a_gpu(refused, lr, monkeypatch, command):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    files = [lr, "out.mp4"] if command == "upscale" else []
    refused(command, *files, "--device", "cuda", words=["device='cuda'", "no CUDA GPU here", "use cpu"])


def test_unknown_device(refused, lr):
    refused("upscale", lr, "out.mp4", "--device", "tpu", words=["device='tpu'", "auto, cpu, cuda"])


@pytest.mark.parametrize("name, words", [
    ("magic", ["attention='magic'", "no such back end", "auto, reference, sdpa"]), ("flex", ["needs CUDA", "choose from"])])
def test_unknown_or_unusable_back_end(refused, lr, name, words):
    refused("upscale", lr, "out.mp4", "--attention", name, "--device", "cpu", words=words)
