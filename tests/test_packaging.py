"""Importing is light, settings agree with each other, and the wheel built from the sdist works elsewhere."""
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import flashvsr_nb
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_IN_MODULES = ["av", "matplotlib", "IPython", "fastcore", "nbdev", "sageattention", "spas_sage_attn", "pyiqa"]
HEAVY = ["torch", "numpy", "PIL", "safetensors", "tqdm", "ipywidgets", "triton", *NOT_IN_MODULES]


def python(code, *, cwd, path=ROOT):
    "Run `code` in a new interpreter that finds the package in `path`; what it printed, read as JSON."
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=os.environ | {"PYTHONPATH": str(path)},
                          stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def test_import_is_quick_and_light(tmp_path):
    code = ("import json, sys, time\nstart = time.perf_counter()\nimport flashvsr_nb\n"
            "took = time.perf_counter() - start\n"
            f"print(json.dumps([took, [m for m in {HEAVY} if m in sys.modules]]))")
    runs = [python(code, cwd=tmp_path) for _ in range(3)]
    assert min(took for took, _ in runs) < 0.3
    assert runs[0][1] == []


def test_modules_load_no_optional_package(tmp_path):
    widgets = {"widgets", "viewers", "tile_explorer"}  # they are of no use without
    names = sorted({path.stem for path in (ROOT / "flashvsr_nb").glob("*.py") if path.name[0] != "_"} - widgets)
    code = (f"import importlib, json, sys\nfound = {{}}\nfor name in {names}:\n"
            "    importlib.import_module('flashvsr_nb.' + name)\n"
            f"    for m in {NOT_IN_MODULES}:\n        if m in sys.modules: found.setdefault(m, name)\n"
            "print(json.dumps(found))")
    assert python(code, cwd=tmp_path) == {}


@pytest.mark.parametrize("name", flashvsr_nb.__all__)
def test_public_names_load(name):
    assert getattr(flashvsr_nb, name).__name__ == name
    assert name in dir(flashvsr_nb)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        flashvsr_nb.nothing


def test_versions_agree(settings):
    assert flashvsr_nb.__version__ == settings["version"]


def test_constraints_pin_what_a_checkout_installs(settings):
    def name(requirement):
        return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {name(line): line for line in lines if line and line[0] != "#"}
    keys = ["requirements", "notebooks_requirements", "dev_requirements", "eval_requirements"]
    wanted = [need.split(';')[0] for key in keys for need in settings[key].split()]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins.values())
    assert [need for need in wanted if name(need) not in pins] == []
    assert [need for need in wanted if "==" in need and pins[name(need)] != need] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "A wheel built from an sdist built from a copy of the checkout, without network."
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    source.mkdir()
    for name in ("settings.ini", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt"):
        shutil.copy(ROOT / name, source)
    for name in ("flashvsr_nb", "tests", "tools"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    quiet = dict(check=True, stdout=subprocess.DEVNULL)
    subprocess.run([sys.executable, "setup.py", "-q", "sdist", "-d", folder], cwd=source, **quiet)
    sdist, = folder.glob("*.tar.gz")
    offline = ["--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", *offline, "-w", folder, sdist], cwd=folder, **quiet)
    built, = folder.glob("*.whl")
    return built


def test_wheel_holds_the_package_and_nothing_else(wheel):
    stored = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = [p for p in (ROOT / "flashvsr_nb").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert stored == {path.relative_to(ROOT).as_posix() for path in files}


def test_wheel_metadata(wheel, settings):
    archive = zipfile.ZipFile(wheel)
    names = {name.split("/", 1)[1]: name for name in archive.namelist() if ".dist-info/" in name}
    about = Parser().parsestr(archive.read(names["METADATA"]).decode())
    assert about["Version"] == settings["version"] and about["Requires-Python"] == ">=" + settings["min_python"]
    assert {*about.get_all("Provides-Extra")} == {"hub", "eval", "notebooks", "gpu", "site", "dev", "all"}
    core = [need for need in about.get_all("Requires-Dist") if "extra ==" not in need]
    assert "torch>=2.11" in core and len(core) == len(settings["requirements"].split())
    everything = " ".join(need for need in about.get_all("Requires-Dist") if "all" in need.split("extra == ")[-1])
    assert all(word in everything for word in ("pyiqa", "jupyterlab", "triton", "sageattention"))
    assert "nbdev" not in everything
    assert "spas" not in " ".join(about.get_all("Requires-Dist"))
    assert "flashvsr_nb = flashvsr_nb.cli:main" in archive.read(names["entry_points.txt"]).decode()
    assert any("LICENSE" in name for name in names)


def test_wheel_works_outside_the_checkout(wheel, tmp_path):
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, wheel]
    subprocess.run(install, check=True, stdout=subprocess.DEVNULL)
    code = ("import json, flashvsr_nb; from importlib.resources import files\n"
            "assets = files('flashvsr_nb') / 'assets'\n"
            "names = sorted(p.name for p in assets.iterdir()) if assets.is_dir() else []\n"
            "print(json.dumps([flashvsr_nb.__file__, names]))")
    home, assets = python(code, cwd=tmp_path, path=target)
    assert Path(home).parent == target / "flashvsr_nb"
    assert assets == sorted(path.name for path in (ROOT / "flashvsr_nb").glob("assets/*"))
