"""What nano was trained on: licences are read rightly, nothing held out is in it, the attribution file is complete."""
import gzip
import re
from pathlib import Path

import pytest
import training_data
from PIL import Image

ATTRIBUTION = Path(__file__).resolve().parent.parent / "flashvsr_nb" / "assets" / "nano_attribution.md"
COPYRIGHT = """Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: game

Files: images/land/*
Copyright: Various
License: public-domain
 Taken from pictures.com, a collection
 .
 of photographs.

Files: images/land/*-ann*
Copyright: 2018-2020 Ann Other (ann@example.com)
License: CC-BY-SA-4.0

Files:
 images/land/mountain1*
 images/land/lava0*
Copyright: 2019, NASA <nasa@example.com>
           2020, Nobody
License: CC0-1.0

License: CC0-1.0
 The text of the licence.
"""


@pytest.fixture
def packages(tmp_path):
    "A folder with the first package: five tiny pictures, of which four are free and one of those held out."
    root = tmp_path / "packages" / "endless-sky-data"
    land, doc = root / training_data.STILLS[root.name].folder, root / "usr/share/doc" / root.name
    land.mkdir(parents=True)
    doc.mkdir(parents=True)
    for name in ("lava0", "mountain1", "mountain16-ann", "badlands5", "sea0"):
        Image.new("RGB", (16, 8), "red").save(land / f"{name}.jpg")
    (doc / "copyright").write_text(COPYRIGHT)
    (doc / "changelog.Debian.gz").write_bytes(gzip.compress(b"endless-sky (0.9.8-1.2) unstable; urgency=medium\n"))
    return root.parent


def rows(text):
    return [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| \S+\.(jpg|mp4) ", line)]


@pytest.mark.parametrize("name, said", [
    ("forest0.jpg", ("Various (pictures.com)", "public-domain")),
    ("lava0.jpg", ("NASA", "CC0-1.0")),               # the last paragraph that matches decides
    ("mountain16.jpg", ("NASA", "CC0-1.0")),
    ("mountain16-ann.jpg", ("Ann Other", "CC-BY-SA-4.0")),  # but a photographer's suffix outranks it
    ("mountain16-bob.jpg", None),                     # and an unknown one may be under any licence
])
def test_licence_of_a_picture(name, said):
    paragraphs = training_data.read_copyright(COPYRIGHT)
    assert len(paragraphs) == 3
    assert training_data.author_and_licence(f"images/land/{name}", paragraphs) == said


def test_a_dash_means_a_photographer_only_where_the_copyright_file_says_so():
    paragraphs = training_data.read_copyright("Files: *\nCopyright: 2012 A. Body <a@b.c>\nLicense: Expat\n")
    assert training_data.author_and_licence("examples/pot-holder.jpg", paragraphs) == ("A. Body", "Expat")


@pytest.mark.parametrize("held_out", [False, True])
def test_pictures_written(packages, tmp_path, held_out):
    name = "endless-sky-data"
    manifest = training_data.write_stills(name, packages / name, tmp_path, held_out)
    kept = {"stills/es_lava0.jpg", "stills/es_mountain1.jpg", "stills/es_sea0.jpg"}
    assert {e["file"] for e in manifest} == kept | ({"held_out/es_badlands5.jpg"} if held_out else set())
    assert (tmp_path / "held_out").exists() == held_out
    for e in manifest:
        assert e["held_out"] == e["file"].startswith("held_out/")
        assert (tmp_path / e["file"]).read_bytes() == (packages / name / e["source"]).read_bytes()
    sea = next(e for e in manifest if "sea" in e["file"])
    assert sea == {
        "file": "stills/es_sea0.jpg", "package": name, "version": "0.9.8-1.2",
        "source": "usr/share/games/endless-sky/images/land/sea0.jpg", "author": "Various (pictures.com)",
        "licence": "public domain", "size": [16, 8], "changes": "none", "held_out": False}
    shown = rows(training_data.attribution(manifest))
    assert ["es_sea0.jpg", "Various (pictures.com)", "public domain", f"{name} 0.9.8-1.2"] in shown
    assert len(shown) == 3, "what is held out needs no credit: nano never saw it"


def test_photographs_are_reduced(packages, tmp_path):
    name = "libjs-jquery-backstretch"
    package, root = training_data.STILLS[name], packages / name
    (root / package.folder).mkdir(parents=True)
    for file in package.scales:
        Image.new("RGB", (64, 32), "green").save(root / package.folder / file)
    doc = root / "usr/share/doc" / name
    (doc / "copyright").write_text("Files: *\nCopyright: 2012 A. Body\nLicense: Expat\n")
    (doc / "changelog.Debian.gz").write_bytes(gzip.compress(b"x (2.0) unstable"))
    manifest = training_data.write_stills(name, root, tmp_path, False)
    assert {e["file"]: e["size"] for e in manifest} == {
        f"stills/bs_{stem}.jpg": size for stem, size in (
            ("coffee", [64, 32]), ("dome", [64, 32]), ("pot-holder", [64, 32]), ("sample1_1920", [48, 24]))}
    for e in manifest:
        assert list(Image.open(tmp_path / e["file"]).size) == e["size"]


@pytest.mark.parametrize("said, change", [
    ("exists and is not empty", lambda out, packages: (out.mkdir(), (out / "x").touch())),
    ("no such folder", lambda out, packages: packages.rename(out.parent / "other")),
    ("0 files lomiri-wallpapers-16.04_*.deb and no folder", lambda out, packages: None),
    ("lomiri-wallpapers-16.04: the package has no usr/share/doc", lambda out, packages:
        (packages / "lomiri-wallpapers-16.04").mkdir()),
    ("no picture with a permissive licence", lambda out, packages:
        (packages / "endless-sky-data/usr/share/doc/endless-sky-data/copyright").write_text("Files: *\n")),
])
def test_errors_are_one_line_and_leave_nothing(packages, tmp_path, said, change):
    out = tmp_path / "out"
    change(out, packages)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        training_data.main([str(out), "--packages", str(packages)])
    assert said in stop.value.code and "\n" not in stop.value.code
    assert sorted(tmp_path.rglob("*")) == before


def test_no_apt_get_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="apt-get: not found; .*--packages DIR"):
        training_data.main([str(tmp_path / "out")])
    assert not any(tmp_path.iterdir())


def test_attribution_file_is_complete():
    text = ATTRIBUTION.read_text(encoding="utf-8")
    shown = rows(text)
    names = [name for name, *_ in shown]
    assert sum(name.endswith(".jpg") for name in names) == 182 and len({*names}) == 184
    assert {name for name in names if name.endswith(".mp4")} == {*training_data.CLIPS}
    assert not training_data.HELD_OUT.intersection(names) and len(training_data.HELD_OUT) == 14
    assert {licence for _, _, licence, _ in shown} <= {*training_data.LICENCES.values()}
    assert {package for *_, package in shown} <= {f"{k} {v}" for k, v in training_data.VERSIONS.items()}
    manifest = [
        {"file": ("clips/" if name.endswith(".mp4") else "stills/") + name, "author": author, "licence": licence,
         "package": package.split()[0], "version": package.split()[1], "held_out": False}
        for name, author, licence, package in shown]
    assert training_data.attribution(manifest) == text, "written by another version of tools/training_data.py"
