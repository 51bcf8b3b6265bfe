"""The course is copied whole, what a reader wrote survives every update, and a wheel carries it."""
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from flashvsr_nb import lab as lab_module
from flashvsr_nb.lab import copy_notebooks, course_files, lab, lab_problem, open_lab
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
WORDS = st.sampled_from([None, "1", "2", "3"])


def course(folder, **texts):
    "A course of three files, or of those with a text."
    for name, text in ({"a": "1", "b": "1", "c": "1"} | texts).items():
        path = folder / ("data/c.mp4" if name == "c" else f"nbs/{name}.ipynb")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
    return folder


def test_course_holds_what_the_notebooks_read():
    files = course_files()
    code = [cell["source"] for name, path in files.items() if name.endswith(".ipynb")
            for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    named = {m for source in code for m in re.findall(r"\.\./((?:data|tests)/[\w./]+\.\w+)", "".join(source))}
    assert len(named) > 10
    assert sorted(name for name in named if name not in files) == []
    assert {f"nbs/{path.name}" for path in (ROOT / "nbs").glob("*.ipynb")} <= {*files}
    assert "nbs/images/compare.jpg" in files and not any(".part" in name for name in files)


@given(steps=st.lists(st.tuples(WORDS, st.sampled_from(["1", "2"])), max_size=5))
def test_what_a_reader_wrote_is_never_lost(steps, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    source, copy = course(folder / "source"), folder / "copy"
    copy_notebooks(copy, root=source)
    then = "1"
    for written, new in steps:
        course(copy, a=written)
        course(source, a=new)
        fates = copy_notebooks(copy, root=source)
        now = (copy / "nbs/a.ipynb").read_text()
        mine = written not in (None, new, then)
        assert now == (written if mine else new)
        assert ("nbs/a.ipynb" in fates["kept"]) == mine
        assert sorted(sum(fates.values(), [])) == ["data/c.mp4", "nbs/a.ipynb", "nbs/b.ipynb"]
        then = then if mine else new


@pytest.mark.parametrize("record", ["", "[]", "{", None])
def test_without_a_readable_record_nothing_is_replaced(record, tmp_path):
    source, copy = course(tmp_path / "source"), tmp_path / "copy"
    copy_notebooks(copy, root=source)
    (copy / ".flashvsr_nb.json").unlink()
    if record is not None:
        (copy / ".flashvsr_nb.json").write_text(record)
    course(source, a="2")
    assert copy_notebooks(copy, root=source)["kept"] == ["nbs/a.ipynb"]
    assert (copy / "nbs/a.ipynb").read_text() == "1"


def test_links_and_folders_in_the_way_are_kept(tmp_path):
    source, copy, own = course(tmp_path / "source"), tmp_path / "copy", tmp_path / "own.ipynb"
    own.write_text("1")
    (copy / "nbs/b.ipynb").mkdir(parents=True)
    (copy / "nbs/a.ipynb").symlink_to(own)
    assert copy_notebooks(copy, root=course(source, a="2"))["kept"] == ["nbs/a.ipynb", "nbs/b.ipynb"]
    assert own.read_text() == "1" and (copy / "nbs/a.ipynb").is_symlink()


def test_a_copy_that_breaks_off_goes_on(tmp_path, monkeypatch):
    source, copy, moves = course(tmp_path / "source"), tmp_path / "copy", []
    replace = os.replace

    def full(part, path):
        moves.append(path)
        if len(moves) == 2:
            raise OSError(28, "No space left on device")
        replace(part, path)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        copy_notebooks(copy, root=source)
    course(source, c="2")
    fates = copy_notebooks(copy, root=source)
    assert fates["refreshed"] == ["data/c.mp4"] and fates["kept"] == []
    assert (copy / "nbs/a.ipynb").read_text() == "1"


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="these are the originals"):
        copy_notebooks(ROOT)
    with pytest.raises(ValueError, match="no notebooks there; they are in the source distribution and at http"):
        copy_notebooks(tmp_path / "copy", root=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="name a folder"):
        copy_notebooks(tmp_path / "file")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_a_missing_package_is_said_before_anything_is_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(lab_module, "_NEEDS", ("json", "a_package_nobody_has"))
    assert lab_problem().startswith("a_package_nobody_has missing; pip install 'flashvsr_nb[notebooks]'")
    for start in (lab, open_lab):
        with pytest.raises(ValueError, match="a_package_nobody_has missing"):
            start(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_lab_copies_says_what_it_kept_and_opens(tmp_path, monkeypatch, capsys):
    app = pytest.importorskip("jupyterlab.labapp").LabApp
    calls = []
    monkeypatch.setattr(app, "launch_instance", calls.append)
    source, copy = course(tmp_path / "source", a="1"), tmp_path / "copy"
    (source / "nbs/index.ipynb").write_text("1")
    monkeypatch.setattr(lab_module, "course_files", lambda root, real=course_files: real(root or source))
    lab(copy)
    course(copy, a="mine")
    lab(copy, browser=False)
    assert calls[0] == [f"--ServerApp.root_dir={copy}", "--LabApp.default_url=/lab/tree/nbs/index.ipynb"]
    assert calls[1] == [*calls[0], "--no-browser"]
    first, second, kept = capsys.readouterr().out.splitlines()
    assert first.endswith("copy: 4 copied") and second.endswith("copy: 3 same")
    assert kept == "kept as you changed them (rename one to get the new version): nbs/a.ipynb"


def test_wheel_carries_the_course(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("settings.ini", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt"):
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("__pycache__", "assets")
    shutil.copytree(ROOT / "flashvsr_nb", source / "flashvsr_nb", ignore=ignore)
    names = ["nbs/index.ipynb", "nbs/11e_lab.ipynb", "nbs/images/compare.jpg", "data/README.md", "data/city_lr.mp4",
             "data/results/widgets.json", "tests/loopback.py", "tests/stand_ins/sageattention.py"]
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    (source / "tests/test_nothing.py").touch()
    quiet = dict(check=True, stdout=subprocess.DEVNULL)
    subprocess.run([sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path], cwd=source, **quiet)
    sdist, = tmp_path.glob("*.tar.gz")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index",
                    "-w", tmp_path, sdist], cwd=tmp_path, **quiet)
    wheel, = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = ("from flashvsr_nb.lab import copy_notebooks; import json, sys\n"
            "print(json.dumps([copy_notebooks('course')['copied'], 'torch' in sys.modules]))")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": "site"},
                          stdout=subprocess.PIPE, text=True, check=True)
    assert json.loads(done.stdout) == [sorted(names), False]
    for name in names:
        assert (tmp_path / "course" / name).read_bytes() == (ROOT / name).read_bytes()
