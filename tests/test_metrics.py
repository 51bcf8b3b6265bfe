"""Metrics against skimage and pyiqa, weights found at their places, and what is said where they are missing."""
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from flashvsr_nb import metrics as M
from flashvsr_nb.degradation import warp
from flashvsr_nb.evaluation import bootstrap, luma, motion, optical_flow, psnr, ssim, still_parts, warping_error
from flashvsr_nb.methods import bicubic
from flashvsr_nb.naturalness import Unfit, niqe
from flashvsr_nb.video import read_video

DATA = Path(__file__).resolve().parent.parent / "data"
PAIRS = [("bbb", 0), ("bbb", 20), ("city", 0), ("city", 20), ("dog", 0)]  # clip, frame


def pair(clip, frame):
    "A bicubic enlargement and its truth, sides odd."
    truth = read_video(DATA / f"{clip}_hr.mp4", start=frame, frames=1)[0]
    low = read_video(DATA / f"{clip}_lr.mp4", start=frame, frames=1)
    return bicubic(low, scale=4)[0][:381, :637], truth[:381, :637]


@pytest.mark.parametrize("clip, frame", PAIRS)
def test_equal_to_skimage(clip, frame):
    of = pytest.importorskip("skimage.metrics")
    a, b = pair(clip, frame)
    assert psnr(a, b, eps=0) == pytest.approx(of.peak_signal_noise_ratio(b, a, data_range=255), abs=1e-9)
    x, y = np.rint(luma(a)), np.rint(luma(b))
    theirs = of.structural_similarity(x, y, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    assert ssim(a, b, positive=False) == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize("clip, frame", PAIRS)
def test_equal_to_pyiqa(clip, frame, tmp_path):
    io = pytest.importorskip("scipy.io")
    M._torchvision()
    pyiqa = pytest.importorskip("pyiqa")
    tools = pytest.importorskip("pyiqa.utils.download_util")
    from importlib.resources import files

    with (files("flashvsr_nb") / "assets/niqe.npz").open("rb") as raw, np.load(raw) as z:
        io.savemat(tmp_path / "niqe_modelparameters.mat", {"mu_prisparam": z["mean"][None], "cov_prisparam": z["covariance"]})
    a, b = pair(clip, frame)
    x, y = (torch.from_numpy(v.copy()).permute(2, 0, 1)[None].float() / 255 for v in (a, b))
    before, tools.DEFAULT_CACHE_DIR = tools.DEFAULT_CACHE_DIR, str(tmp_path)
    try:
        theirs = [float(pyiqa.create_metric(n, device="cpu")(*v)) for n, v in (
            ("psnr", (x, y)), ("psnry", (x, y)), ("ssim", (x, y)), ("niqe", (x,)))]
    finally:
        tools.DEFAULT_CACHE_DIR = before
    assert [psnr(a, b), psnr(luma(a), luma(b)), ssim(a, b), niqe(a)] == pytest.approx(theirs, abs=1e-4)


def test_niqe_tells_what_is_worse():
    truth = read_video(DATA / "bbb_hr.mp4", frames=1)[0]
    noisy = np.clip(truth + np.random.normal(0, 20, truth.shape), 0, 255).astype(np.uint8)
    assert niqe(truth) < niqe(pair("bbb", 0)[0]) and niqe(truth) < niqe(noisy)
    assert niqe(truth) == niqe(np.ascontiguousarray(truth))
    with pytest.raises(Unfit, match="two blocks of 96x96"):
        niqe(truth[:191, :95])
    with pytest.raises(Unfit, match="not flat"):
        niqe(np.full((200, 200, 3), 7, np.uint8))


@settings(max_examples=12)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_flow_of_any_size(h, w, seed):
    a, b = np.random.default_rng(seed).integers(0, 256, (2, h, w, 3), dtype=np.uint8)
    flow = optical_flow(a, b)
    assert flow.shape == (1, 2, h, w) and torch.isfinite(flow).all()


def test_flow_finds_known_motion(one_thread):
    frame = read_video(DATA / "bbb_hr.mp4", frames=1)[0][:200, :240]
    known = torch.tensor([5.0, -3.0]).view(1, 2, 1, 1).expand(1, 2, 200, 240)
    moved = warp(torch.from_numpy(frame).permute(2, 0, 1)[None].float(), known)[0].permute(1, 2, 0).numpy()
    assert float((optical_flow(frame, moved) - known).norm(dim=1)[0, 16:-16, 16:-16].mean()) < 0.25


def test_warping_error_of_a_pan_is_small_and_of_noise_is_not(one_thread):
    wide = read_video(DATA / "city_hr.mp4", frames=1)[0]
    pan = np.stack([wide[:160, x:x + 200] for x in (0, 3, 6)])
    moves = motion(pan)
    clean = warping_error(pan, moves)
    noisy = warping_error(np.clip(pan + np.random.normal(0, 10, pan.shape), 0, 255).astype(np.uint8), moves)
    assert max(clean) < 0.3 and min(noisy) > 2 * (10 / 255) ** 2 * 1000 * 0.7


def test_still_parts_of_a_still_clip():
    clip = np.repeat(read_video(DATA / "dog_lr.mp4", frames=1), 3, 0)
    assert all(mask.all() for mask in still_parts(clip))
    run, _ = M.open_metric("flicker")
    assert run(M.Material(clip)) == [0, 0]
    moving = np.stack([np.roll(clip[0], 9 * i, 1) for i in range(3)])
    with pytest.raises(Unfit, match="stands still"):
        run(M.Material(clip, guide=M.Guide(np.random.randint(0, 256, moving.shape).astype(np.uint8))))


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20), st.integers(0, 5))
def test_bootstrap_is_inside_the_values(values, seed):
    low, high = bootstrap(values, seed=seed, draws=100)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert bootstrap(values, seed=seed, draws=100) == (low, high)


def test_every_metric_has_a_value_or_names_what_it_lacks(tmp_path, monkeypatch, one_thread):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(M, "_SHIPPED", {})
    hr = read_video(DATA / "bbb_hr.mp4", frames=2)[:, :100, :200]
    material = M.Material(bicubic(read_video(DATA / "bbb_lr.mp4", frames=2), scale=4)[:, :100, :200], hr,
                          seams=([48], [96]))
    lacking = {}
    for name in M.METRICS:
        try:
            run, weights = M.open_metric(name)
        except M.Missing as error:
            lacking[name] = str(error)
        else:
            if name != "vmaf":
                assert all(map(math.isfinite, run(material)))
    for name, file in {"lpips": "alexnet-owt-7be5be79.pth from https://", "musiq": "musiq_koniq_ckpt-e95806b9.pth from https://",
                       "clipiqa": "RN50.pt from https://", "dover": "DOVER.pth from https://", "tlpips": "LPIPS_v0.1_alex",
                       "dover_technical": "convnext_tiny_1k_224_ema.pth from https://"}.items():
        assert file in lacking[name]
    assert not {"psnr", "psnr_y", "ssim", "niqe", "seam", "warping_error", "flicker"} & {*lacking}


class FakeHub:
    "A stand-in for pyiqa that reads the files it is said to read, where it is said to look for them."

    def __init__(self, wanted):
        self.wanted, self.seen = wanted, {}

    def create_metric(self, name, device):
        for file, kind in self.wanted:
            self.seen[file] = Path(torch.hub.get_dir(), kind, file).read_bytes()

        def metric(x, y=None):
            assert x.shape[1] == 3 and x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1
            return x.mean() if y is None else (x - y).abs().mean()

        return metric


@pytest.mark.parametrize("name, wanted", [
    ("lpips", [("alexnet-owt-7be5be79.pth", "checkpoints"), ("LPIPS_v0.1_alex-df73285e.pth", "pyiqa")]),
    ("musiq", [("musiq_koniq_ckpt-e95806b9.pth", "pyiqa")]), ("clipiqa", [("RN50.pt", "clip")]),
    ("tlpips", [("alexnet-owt-7be5be79.pth", "checkpoints"), ("LPIPS_v0.1_alex-df73285e.pth", "pyiqa")])])
@pytest.mark.parametrize("sorted_", [True, False])
def test_weights_reach_pyiqa_from_a_folder(tmp_path, monkeypatch, name, wanted, sorted_):
    hub = FakeHub(wanted)
    tools = types.ModuleType("pyiqa.utils.download_util")
    tools.DEFAULT_CACHE_DIR = "before"
    monkeypatch.setitem(sys.modules, "pyiqa.utils.download_util", tools)
    monkeypatch.setattr(M, "_package", lambda *a: hub)
    for file, kind in wanted:
        place = tmp_path / ("hub/" + kind if sorted_ else ".") / file
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.encode())
    before = torch.hub.get_dir()
    run, hashes = M.open_metric(name, tmp_path)
    assert torch.hub.get_dir() == before and tools.DEFAULT_CACHE_DIR == "before"
    assert hub.seen == {file: file.encode() for file, _ in wanted} and set(hashes) == {file for file, _ in wanted}
    frames = np.random.randint(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    values = run(M.Material(frames, frames[::-1]))
    assert len(values) == 3 - (name == "tlpips") and all(map(math.isfinite, values))
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(M.Missing, match=f"{wanted[0][0]} from https://"):
        M.open_metric(name, tmp_path / "elsewhere")


def test_dover_runs_the_official_interface(tmp_path, monkeypatch):
    network = torch.nn.Linear(1, 1)
    torch.save(network.state_dict(), tmp_path / "DOVER.pth")
    (tmp_path / "convnext_tiny_1k_224_ema.pth").write_bytes(b"trunk")
    calls = {"built": 0}

    class DOVER(torch.nn.Linear):
        def __init__(self, **arguments):
            super().__init__(1, 1)
            assert arguments["backbone"]["technical"]["type"] == "swin_tiny_grpb" and arguments["divide_head"]
            assert Path(torch.hub.get_dir(), "checkpoints", "convnext_tiny_1k_224_ema.pth").read_bytes() == b"trunk"
            calls["built"] += 1

        def forward(self, views):
            assert views["technical"].shape == (3, 3, 32, 224, 224) and views["aesthetic"].shape == (1, 3, 32, 224, 224)
            return [torch.full((3, 1), 0.1107), torch.full((1, 1), -0.08285)]

    def views(path, kinds, samplers):
        assert read_video(path).shape == (4, 64, 64, 3) and set(samplers) == set(kinds)
        return {"technical": torch.zeros(3, 96, 224, 224), "aesthetic": torch.zeros(3, 32, 224, 224)}, None

    package, models, data = (types.ModuleType(n) for n in ("dover", "dover.models", "dover.datasets"))
    package.__spec__ = models.__spec__ = data.__spec__ = types.SimpleNamespace(name="dover")
    models.DOVER, data.UnifiedFrameSampler, data.spatial_temporal_view_decomposition = DOVER, lambda *a: a, views
    for module in (package, models, data):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(M, "_DOVER_LOADED", {})
    material = M.Material(np.zeros((4, 64, 64, 3), np.uint8))
    parts = {name: M.open_metric(name, tmp_path)[0](material)[0] for name in ("dover", "dover_technical", "dover_aesthetic")}
    assert parts["dover"] == pytest.approx(50, abs=1e-3) and parts["dover_technical"] == pytest.approx(0.1107, abs=1e-6)
    assert calls == {"built": 1}


def test_a_broken_file_is_told_and_not_raised_as_a_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(M, "_all", lambda files, package: (_ for _ in ()).throw(RuntimeError("magic number")))
    with pytest.raises(M.Missing, match="cannot be used .*magic number"):
        M.open_metric("musiq", tmp_path)
