"""Official weights: fetched from a stand-in hub, continued, checked; their version never guessed; loaded into a model."""
import hashlib
import json
import mmap
import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from loopback import Hub
from safetensors.torch import save_file

from flashvsr_nb import download as module
from flashvsr_nb.cli import main
from flashvsr_nb.dit import ModelConfig
from flashvsr_nb.download import FILES, HUB, KNOWN, WAN_VAE, download, sha256, weights_folder
from flashvsr_nb.pipeline import FlashVSR, pick_device
from flashvsr_nb.wan_decoder import WanDecoder
from flashvsr_nb.weights import build, empty_modules, load_weights, weights_version

ROOT = Path(__file__).resolve().parent.parent
SMALL = ModelConfig(dim=256, heads=2, layers=1, ffn_dim=64, text_dim=32, freq_dim=64, proj_dims=(16, 24),
                    decoder_channels=(16, 12, 8, 8))
ON_HUB = {part: name for part, name in FILES.items() if part != "context"} | {"vae": WAN_VAE}
# Runs `download`; argv: JSON of its arguments, JSON of what is added to KNOWN.
PROGRAM = """
import json, sys, huggingface_hub.constants
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 2**16
from flashvsr_nb import download as module
module.KNOWN |= {(version or None, name): (None, digest) for version, name, digest in json.loads(sys.argv[2])}
from flashvsr_nb.download import download
try:
    print(download(**json.loads(sys.argv[1])))
except (ValueError, OSError) as error:
    sys.exit("|".join([type(error).__name__, str(error), *getattr(error, "__notes__", [])]))
"""


pytestmark = pytest.mark.usefixtures("one_thread")


def random_state(net, seed):
    "A state dict of this form."
    draw = torch.Generator().manual_seed(seed)
    return {key: torch.randn(t.shape, generator=draw) * 0.05 for key, t in net.state_dict().items()}


def release(folder, cfg=SMALL, fill=random_state):
    "Write an official release with synthetic weights into an existing folder."
    nets = empty_modules(cfg) | {"vae": empty_modules(cfg, variant="full")["decoder"]}
    for seed, (part, net) in enumerate(nets.items()):
        state = fill(net, seed)
        if part == "vae":
            state |= {"encoder.conv1.bias": torch.zeros(2), "conv1.bias": torch.zeros(32)}
        (save_file if part == "dit" else torch.save)(state, folder / ON_HUB[part])
    torch.save(torch.randn(1, 8, cfg.text_dim), folder / FILES["context"])
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "The bytes of a small release, {name: bytes}."
    folder = release(tmp_path_factory.mktemp("release"))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def served(files, version="v1.1"):
    "As a hub has them: {path: bytes}."
    return {"/prompt" if name == FILES["context"] else f"/{HUB[version]}/resolve/main/{name}": data
            for name, data in files.items()}


def hashes(files, version="v1.1"):
    "What KNOWN must hold for these files to be the published ones: [version, name, SHA-256]."
    return [["" if name == FILES["context"] else version, name, hashlib.sha256(data).hexdigest()]
            for name, data in files.items()]


def start(hub, parent, known=(), *, env=(), **arguments):
    "`download` in a process of its own: the library reads its environment when it is imported."
    arguments = {"version": "v1.1", "parent": str(parent), "prompt_url": f"{hub.url}/prompt"} | arguments
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(parent / "cache"), "HF_TOKEN": "",
                        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])} | dict(env)
    return subprocess.Popen([sys.executable, "-c", PROGRAM, json.dumps(arguments), json.dumps([*known])], env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*args, **kwargs):
    "(exit code, what it said last)"
    child = start(*args, **kwargs)
    out, err = child.communicate(timeout=120)
    return child.returncode, (out + err).strip().splitlines()[-1]


def asked(hub, method="GET"):
    return [(path.rsplit("/")[-1], first) for m, path, first, _ in hub.log if m == method and path in hub.files]


# Fetching

def test_everything_arrives_and_is_checked(files, tmp_path):
    with Hub(served(files)) as hub:
        code, said = run(hub, tmp_path, hashes(files), full=True)
        assert (code, said) == (0, str(tmp_path / "FlashVSR-v1.1"))
        assert {path.name: path.read_bytes() for path in (tmp_path / "FlashVSR-v1.1").iterdir()} == files
        before = len(hub.log)
        assert run(hub, tmp_path, hashes(files), full=True)[0] == 0
        assert hub.log[before:] == []  # all there: not a single question


def test_the_wan_decoder_only_when_wanted(files, tmp_path):
    with Hub(served(files)) as hub:
        assert run(hub, tmp_path, hashes(files))[0] == 0
        assert not (tmp_path / "FlashVSR-v1.1" / WAN_VAE).exists() and WAN_VAE not in dict(asked(hub))


def test_killed_half_way_and_continued(files, tmp_path):
    part = tmp_path / "FlashVSR-v1.1" / f"{FILES['dit']}.part"
    assert len(files[FILES["dit"]]) > 1_000_000
    with Hub(served(files), pause=0.01) as hub:
        child = start(hub, tmp_path, hashes(files))
        deadline = time.monotonic() + 60
        while child.poll() is None and time.monotonic() < deadline and not (part.exists() and part.stat().st_size):
            time.sleep(0.005)
        child.kill()
        child.communicate()
    got = part.stat().st_size
    assert 0 < got < len(files[FILES["dit"]]) and not part.with_suffix("").exists()
    with Hub(served(files)) as hub:
        assert run(hub, tmp_path, hashes(files))[0] == 0
        assert asked(hub)[0] == (FILES["dit"], got)  # the prompt was there, the DiT's rest is asked for
        assert hub.sent == sum(len(files[FILES[p]]) for p in ("dit", "projector", "decoder")) - got
    assert (tmp_path / "FlashVSR-v1.1" / FILES["dit"]).read_bytes() == files[FILES["dit"]]
    assert not [*tmp_path.rglob("*.part")]


def test_a_part_of_another_file_is_noticed(files, tmp_path):
    "The hash of the whole is compared, not that of what came last."
    part = tmp_path / "FlashVSR-v1.1" / f"{FILES['decoder']}.part"
    part.parent.mkdir()
    part.write_bytes(b"x" * 1000)
    with Hub(served(files)) as hub:
        code, said = run(hub, tmp_path, hashes(files))
        assert code and "what came has SHA-256" in said and "thrown away" in said
        assert not part.exists() and not part.with_suffix("").exists()
        assert run(hub, tmp_path, hashes(files))[0] == 0


def test_a_part_that_is_too_long_starts_over(files, tmp_path):
    part = tmp_path / "FlashVSR-v1.1" / f"{FILES['decoder']}.part"
    part.parent.mkdir()
    part.write_bytes(b"x" * (len(files[FILES["decoder"]]) + 1))
    with Hub(served(files)) as hub:
        assert run(hub, tmp_path, hashes(files))[0] == 0


def test_another_hash_is_announced(files, tmp_path):
    "Refused before anything large travels; --unchecked takes it."
    wrong = [[version, name, "0" * 64 if name == FILES["dit"] else digest] for version, name, digest in hashes(files)]
    with Hub(served(files)) as hub:
        code, said = run(hub, tmp_path, wrong)
        assert code and said.startswith("ValueError") and "announces SHA-256" in said and "--unchecked" in said
        assert asked(hub) == [("prompt", 0)]
        assert run(hub, tmp_path, wrong, check=False)[0] == 0


@pytest.mark.parametrize("check", [True, False])
def test_damaged_on_the_way(files, tmp_path, check):
    "Even with check=False what comes must be what the server announced."
    path = f"/{HUB['v1.1']}/resolve/main/{FILES['decoder']}"
    announced = hashlib.sha256(files[FILES["decoder"]]).hexdigest()
    damaged = served(files) | {path: files[FILES["decoder"]][:-1] + b"!"}
    with Hub(damaged, announce={path: announced}) as hub:
        code, said = run(hub, tmp_path, hashes(files), check=check)
    assert code and f"it should have {announced}" in said
    assert not (tmp_path / "FlashVSR-v1.1" / FILES["decoder"]).exists()


def test_a_prompt_with_a_wrong_hash(files, tmp_path):
    with Hub(served(files)) as hub:
        code, said = run(hub, tmp_path)  # KNOWN holds the hash of the published one
    assert code and "/prompt: what came has SHA-256" in said and KNOWN[None, FILES["context"]][1] in said
    assert not [*(tmp_path / "FlashVSR-v1.1").iterdir()]


def test_v1_has_no_known_hashes_but_the_servers(files, tmp_path):
    prompt = [entry for entry in hashes(files) if entry[1] == FILES["context"]]
    with Hub(served(files, "v1")) as hub:
        assert run(hub, tmp_path, prompt, version="v1") == (0, str(tmp_path / "FlashVSR-v1"))


@pytest.mark.parametrize("name", [FILES["projector"], FILES["context"]])
def test_a_file_that_the_server_lacks(files, tmp_path, name):
    with Hub(served({n: data for n, data in files.items() if n != name})) as hub:
        code, said = run(hub, tmp_path, hashes(files))
    assert code and said.startswith("ConnectionError") and ("prompt" if "prompt" in name else name) in said and "404" in said


def test_offline(files, tmp_path):
    with Hub(served(files)) as hub:
        code, said = run(hub, tmp_path, hashes(files), env={"HF_HUB_OFFLINE": "1"})
        assert code and said.startswith("FileNotFoundError") and "HF_HUB_OFFLINE forbids" in said
        assert hub.log == [] and not (tmp_path / "FlashVSR-v1.1").exists()
        assert run(hub, tmp_path, hashes(files))[0] == 0
        before = len(hub.log)
        assert run(hub, tmp_path, hashes(files), env={"HF_HUB_OFFLINE": "1"})[0] == 0
        assert len(hub.log) == before


def test_no_server(files, tmp_path):
    with Hub(served(files)) as hub:
        pass  # now nobody listens at its address
    release(weights_folder("v1.1", tmp_path).mkdir() or weights_folder("v1.1", tmp_path))
    (weights_folder("v1.1", tmp_path) / FILES["decoder"]).unlink()
    code, said = run(hub, tmp_path, check=False)
    assert code and said.startswith("ConnectionError") and "check the connection" in said and FILES["decoder"] in said


def test_the_token_goes_to_the_hub_only(files, tmp_path):
    with Hub(served(files)) as hub:
        assert run(hub, tmp_path, hashes(files), env={"HF_TOKEN": "hf_secret"})[0] == 0
        sent = {path: token for method, path, _, token in hub.log if method == "GET" and path in hub.files}
    assert sent.pop("/prompt") is None and set(sent.values()) == {"Bearer hf_secret"}


def test_disk_full(files, tmp_path, monkeypatch):
    import huggingface_hub

    full = type("Usage", (), {"free": 10})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: full)
    with pytest.raises(OSError, match="1,000 bytes are to come, 10 are free"):
        module._transfer(huggingface_hub, "http://127.0.0.1:1", tmp_path / "x.part", 1000, None)


def test_the_library_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub.constants", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        download("v1", tmp_path)


def test_where_it_goes(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    assert weights_folder("v1") == tmp_path / "hf/flashvsr_nb/FlashVSR-v1"
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert weights_folder("v1.1") == tmp_path / "x/huggingface/flashvsr_nb/FlashVSR-v1.1"
    for version in HUB:
        assert weights_version(weights_folder(version)) == version


def test_addresses_are_the_published_ones():
    assert module.PROMPT_URL.endswith("OpenImagingLab/FlashVSR/raw/main/examples/WanVSR/prompt_tensor/posi_prompt.pth")
    assert HUB == {"v1": "JunhaoZhuang/FlashVSR", "v1.1": "JunhaoZhuang/FlashVSR-v1.1"}
    assert {(version, name) for version, name in KNOWN if version} == {("v1.1", name) for name in ON_HUB.values()}
    assert all(len(digest) == 64 and int(digest, 16) for _, digest in KNOWN.values())


# The command

def test_command(files, tmp_path, capsys, monkeypatch):
    given = {}
    monkeypatch.setattr(module, "download", lambda version, parent, **options: given.update(
        options, version=version, parent=parent) or weights_folder(version, parent))
    assert main(["download", "v1.1", "--full", "--prompt-url", "http://x/y"]) == 0
    assert given == dict(version="v1.1", parent=None, full=True, check=True, prompt_url="http://x/y")
    assert "use it with --weights v1.1" in capsys.readouterr().out
    assert main(["download", "v1", "--folder", str(tmp_path), "--unchecked"]) == 0
    assert given == dict(version="v1", parent=tmp_path, full=False, check=False, prompt_url=None)
    assert f"use it with --weights {tmp_path / 'FlashVSR-v1'}" in capsys.readouterr().out


@pytest.mark.parametrize("note, code", [(None, 2), ("x.part keeps what came; the same command goes on from there", 1)])
def test_command_fails_in_one_line(capsys, monkeypatch, note, code):
    def fail(*args, **options):
        stop = ConnectionError("http://x cannot be read")
        if note:
            stop.add_note(note)
        raise stop

    monkeypatch.setattr(module, "download", fail)
    assert main(["download", "v1"]) == code
    said = capsys.readouterr().err
    assert said.startswith("flashvsr_nb: http://x cannot be read") and said.count("\n") == 1 and (note or "") in said


# The version

@pytest.fixture
def known(files, monkeypatch):
    "The small release is the published v1.1."
    for version, name, digest in hashes(files):
        monkeypatch.setitem(KNOWN, (version or None, name), (len(files[name]), digest))


def put(folder, files):
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_version_by_hash(files, known, tmp_path):
    folder = put(tmp_path / "models", files)
    assert weights_version(folder) == weights_version(folder, "v1.1") == "v1.1"
    assert load_weights(folder, cfg=SMALL).cfg.projector == "causal"
    with pytest.raises(ValueError, match="holds files of v1.1 by their SHA-256, but version='v1' says v1; .* not be mixed"):
        load_weights(folder, version="v1", cfg=SMALL)


def test_a_name_that_contradicts_the_hash(files, known, tmp_path):
    folder = put(tmp_path / "FlashVSR-v1", files)
    with pytest.raises(ValueError, match="its name says v1"):
        load_weights(folder, cfg=SMALL)
    (folder / FILES["projector"]).write_bytes(b"another")  # one file of v1.1 is enough
    with pytest.raises(ValueError, match="its name says v1"):
        weights_version(folder)


def test_only_files_of_the_right_size_are_read(files, known, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr("flashvsr_nb.weights.sha256", lambda path: read.append(path.name) or sha256(path))
    folder = put(tmp_path / "FlashVSR-v1", {name: data + b"x" for name, data in files.items()})
    assert weights_version(folder) == "v1" and read == []
    (folder / FILES["decoder"]).write_bytes(files[FILES["decoder"]][:-1] + b"x")
    assert weights_version(folder) == "v1" and read == [FILES["decoder"]]


def test_the_wan_vae_is_no_witness(files, known, tmp_path):
    "Both versions may share it."
    assert weights_version(put(tmp_path / "FlashVSR-v1", {WAN_VAE: files[WAN_VAE]})) == "v1"


def test_unknown_version_is_asked_for(files, tmp_path):
    folder = put(tmp_path / "models", files)
    with pytest.raises(ValueError, match="--weights-version"):
        load_weights(folder, cfg=SMALL)
    assert load_weights(folder, version="v1", cfg=SMALL).cfg.projector == "buffer"


# Loading what was stored

@pytest.fixture
def stored(files, tmp_path, monkeypatch):
    "A small v1.1, where download puts it."
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(ModelConfig, "wan1_3b", staticmethod(lambda version: SMALL))
    return put(weights_folder("v1.1"), files)


@pytest.mark.parametrize("variant", ["tiny", "full"])
def test_from_pretrained_finds_it_and_runs(stored, variant):
    model = FlashVSR.from_pretrained("v1.1", variant=variant, device="cpu")
    assert model.projector.variant == "causal" and isinstance(model.decoder, WanDecoder) == (variant == "full")
    frames = torch.randint(0, 256, (23, 16, 24, 3), dtype=torch.uint8).numpy()
    sr = model.upscale(frames, progress=False)
    assert sr.shape == (23, 64, 96, 3) and sr.std() > 1


def test_variants_differ_in_the_decoder_alone(stored):
    tiny, full = (load_weights("v1.1", variant=variant) for variant in ("tiny", "full"))
    assert all(torch.equal(t, full.dit[key]) for key, t in tiny.dit.items())
    assert {key.split(".")[0] for key in full.decoder} == {"conv2", "decoder"}


def test_stored_but_contradicted(stored):
    with pytest.raises(ValueError, match="version='v1' contradicts"):
        load_weights("v1.1", version="v1")


def test_not_stored(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"v1 is not here, .*FlashVSR-v1 does not exist; 'flashvsr_nb download v1' gets"):
        FlashVSR.from_pretrained("v1")


@pytest.mark.parametrize("missing, part, variant, said", [
    (FILES["dit"], True, "tiny", "the download has not ended"), (FILES["context"], False, "tiny", "source repository"),
    (FILES["decoder"], False, "tiny", "'flashvsr_nb download'"), (WAN_VAE, False, "full", "'flashvsr_nb download --full'")])
def test_a_file_is_missing(stored, missing, part, variant, said):
    file = stored / missing
    file.rename(f"{file}.part" if part else f"{file}.old")
    with pytest.raises(FileNotFoundError, match=f"lacks {missing} .*{said}"):
        load_weights("v1.1", variant=variant)


def test_the_tiny_decoder_is_not_needed_for_full(stored):
    (stored / FILES["decoder"]).unlink()
    assert load_weights("v1.1", variant="full").variant == "full"


def test_full_is_strict(stored):
    state = torch.load(stored / WAN_VAE)
    torch.save({key: t for key, t in state.items() if key != "conv2.bias"}, stored / WAN_VAE)
    with pytest.raises(ValueError, match=r"Wan2.1_VAE.pth: .* of 108 keys, 1 missing \(conv2.bias\)"):
        load_weights("v1.1", variant="full")


def test_variant_is_checked(stored):
    with pytest.raises(ValueError, match="variant='full' cannot be used with nano"):
        load_weights("nano", variant="full")
    with pytest.raises(ValueError, match="variant='big' is unknown; allowed are tiny and full"):
        load_weights("v1.1", variant="big")


# Devices and dtypes

@pytest.mark.parametrize("device, capability, dtype", [
    ("cpu", None, torch.float32), ("cuda", (9, 0), torch.bfloat16), ("cuda", (8, 6), torch.bfloat16),
    ("cuda", (7, 5), torch.float16), ("mps", None, torch.float16)])
def test_usual_dtype(monkeypatch, device, capability, dtype):
    from flashvsr_nb.weights import _usual_dtype

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert _usual_dtype(torch.device(device)) == dtype


def test_float16_refuses_what_it_cannot_hold(stored):
    weights = load_weights("v1.1")
    weights.decoder["decoder.1.bias"][0] = 70_000
    with pytest.raises(ValueError, match="decoder.1.bias: numbers beyond 65,504 .* dtype=torch.float32"):
        build(weights, dtype=torch.float16)
    assert build(weights, dtype=torch.bfloat16)[2].decoder[1].bias[0] > 69_000


def test_apple_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="finds no Apple GPU; use cpu or auto"):
        pick_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("mps") == torch.device("mps")


# The official size

@pytest.fixture(scope="module")
def official(tmp_path_factory):
    "HF_HOME with a release of the official shapes in bfloat16, downloaded in two attempts, the first one killed."
    made, home = (tmp_path_factory.mktemp(name) for name in ("made", "home"))
    cfg = ModelConfig.wan1_3b("v1.1")
    release(made, cfg, lambda net, seed: {
        key: torch.ones(t.shape, dtype=torch.bfloat16) if key.endswith(("gamma", "norm_q.weight", "norm_k.weight"))
        else torch.empty(t.shape, dtype=torch.bfloat16).normal_(std=0.02) for key, t in net.state_dict().items()})
    torch.save(torch.randn(1, 512, cfg.text_dim).bfloat16(), made / FILES["context"])
    with ExitStack() as stack:
        mapped = {path.name: mmap.mmap(stack.enter_context(open(path, "rb")).fileno(), 0, access=mmap.ACCESS_READ)
                  for path in made.iterdir()}
        known, paths, parent = hashes(mapped), served(mapped), home / "flashvsr_nb"
        announce = {path: digest for path, (_, _, digest) in zip(paths, known, strict=True)}
        part = weights_folder("v1.1", parent) / f"{FILES['dit']}.part"
        hub = stack.enter_context(Hub(paths, announce=announce))
        child = start(hub, parent, known, full=True)
        while child.poll() is None and not (part.exists() and part.stat().st_size > 1e9):
            time.sleep(0.005)
        child.kill()
        child.communicate()
        got, before = part.stat().st_size, hub.sent
        child = start(hub, parent, known, full=True)
        assert child.wait(timeout=900) == 0, child.communicate()
        everything = sum(map(len, mapped.values())) - len(mapped[FILES["context"]])
        assert 1e9 < got < len(mapped[FILES["dit"]]) and everything - got <= hub.sent - before < everything - 1e9
    shutil.rmtree(made)
    yield home
    shutil.rmtree(home)  # gigabytes, which pytest would keep


@pytest.mark.slow
@pytest.mark.parametrize("variant, decoder", [("tiny", 45_338_371), ("full", 73_295_603)])
def test_official_shapes_load_strictly_and_one_chunk_runs(official, monkeypatch, variant, decoder):
    "On a GPU a chunk of 768x1408 in its usual dtype, else one of 128x128 in float32 on the CPU."
    monkeypatch.setenv("HF_HOME", str(official))
    model = FlashVSR.from_pretrained("v1.1", variant=variant)
    assert sum(p.numel() for p in model.projector.parameters()) == 287_845_888
    assert sum(p.numel() for p in model.decoder.parameters()) == decoder
    height, width = (192, 352) if torch.cuda.is_available() else (32, 32)
    frames = torch.randint(0, 256, (21, height, width, 3), dtype=torch.uint8).numpy()
    sr = model.upscale(frames, progress=False)
    assert sr.shape == (21, 4 * height, 4 * width, 3) and sr.std() > 1
