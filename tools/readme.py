"""Write README.md from nbs/index.ipynb; with `--check`, only say whether it is up to date."""
import difflib
import posixpath
import re
import sys
from pathlib import Path

import nbformat
from lint import directives
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"(\]\(\s*|\b(?:src|href)=[\"'])([^)\"'\s]+)")
_CODE = re.compile(r"((?:^|\n)```.*?\n```|`[^`\n]+`)", re.S)


def from_root(found):
    "A link written for a reader in nbs/, as a reader in the repository's root needs it."
    before, link = found.groups()
    if re.match(r"\w+:|[#/]", link):
        return found.group()
    path, mark, anchor = link.partition("#")
    return before + posixpath.normpath(posixpath.join("nbs", path)) + mark + anchor


def relink(text):
    "Markdown with its relative links rewritten, code left alone."
    return "".join(part if i % 2 else _LINK.sub(from_root, part) for i, part in enumerate(_CODE.split(text)))


def readme(path):
    "The text of the README that the notebook at `path` stands for."
    nb = nbformat.read(path, as_version=4)
    nb.metadata["language_info"] = {"name": "python"}
    cells = []
    for cell in nb.cells:
        marks = directives(cell)
        if cell.cell_type == "raw" or "hide" in marks:
            continue
        if cell.cell_type == "markdown":
            cell.source = relink(cell.source)
        if any(kind.startswith("image/") for output in cell.get("outputs", []) for kind in output.get("data", {})):
            raise ValueError(f"{path}: a code cell shows a picture; save it in nbs/images and link to it from markdown")
        if marks:
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
        cells.append(cell)
    nb.cells = cells
    body, _ = MarkdownExporter().from_notebook_node(nb)
    body = re.sub(r"[ \t]+$", "", body, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


def main(arguments):
    target, text = ROOT / "README.md", readme(ROOT / "nbs" / "index.ipynb")
    if arguments != ["--check"]:
        target.write_text(text, encoding="utf-8")
        return 0
    stored = target.read_text(encoding="utf-8")
    print("".join(difflib.unified_diff(stored.splitlines(True), text.splitlines(True), "README.md", "nbs/index.ipynb"))
          or "README.md is up to date")
    return int(stored != text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
