"""Execute notebooks and store tidy outputs, then export their modules: `python tools/render.py nbs/00_video.ipynb ...`.

A notebook is written only when it ran and its outputs hold no error, warning, machine path or bare widget.
Cells marked `#| eval: false`, `#| slow` or `#| gpu` keep the outputs they have, unless `--all` runs the last two.
"""
import argparse
import hashlib
import os
import sys
import time
from datetime import datetime
from pathlib import Path

import nbformat
from lint import MAX_BYTES, ROOT, WIDGET, check_outputs, directives
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.clean import nbdev_clean
from nbdev.export import nb_export

SKIP = "skip-execution"
KERNEL = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}


def execute(nb, run_all):
    "Run the notebook's cells in nbs/, with the checkout's package first on the path."
    marks = {"eval: false"} | (set() if run_all else {"slow", "gpu"})
    for cell in nb.cells:
        cell.metadata["tags"] = [SKIP] if marks.intersection(directives(cell)) else []
    NotebookClient(
        nb, kernel_name="python3", timeout=None if run_all else 300, coalesce_streams=True, skip_cells_with_tag=SKIP,
        resources={"metadata": {"path": str(ROOT / "nbs")}},
    ).execute()


def tidy(nb):
    "Drop what only this run or this machine knows; name cells by their content, so that ids survive conversion."
    nb.metadata = nbformat.from_dict(KERNEL)
    seen = {}
    for cell in nb.cells:
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:8]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if any(kind.startswith("image/") for kind in data):
                data.pop(WIDGET, None)


def slowest(nb, count=3):
    "The `count` slowest cells as `(seconds, cell number)`, slowest first."
    spent = []
    for i, cell in enumerate(nb.cells):
        stamps = cell.metadata.get("execution", {})
        if {"iopub.execute_input", "shell.execute_reply"} <= {*stamps}:
            start, end = (datetime.fromisoformat(stamps[k]) for k in ("iopub.execute_input", "shell.execute_reply"))
            spent.append(((end - start).total_seconds(), i))
    return sorted(spent, reverse=True)[:count]


def render(path, run_all=False):
    "Render one notebook; returns its problems, and writes nothing when there are any."
    nb = nbformat.read(path, as_version=4)
    start = time.perf_counter()
    try:
        execute(nb, run_all)
    except CellExecutionError as error:
        return [str(error)]
    seconds = time.perf_counter() - start
    slow_cells = ", ".join(f"cell {i} {s:.1f} s" for s, i in slowest(nb))
    tidy(nb)
    if problems := check_outputs(nb):
        return problems
    text = nbformat.writes(nb)
    if len(text.encode()) > MAX_BYTES:
        return [f"{len(text.encode()) / 1e6:.1f} MB, allowed {MAX_BYTES / 1e6:.1f}"]
    path.write_text(text + "\n", encoding="utf-8")
    nbdev_clean(str(path))
    if any(d.startswith("default_exp") for cell in nb.cells for d in directives(cell)):
        nb_export(path.relative_to(ROOT), ROOT / "flashvsr_nb")
    size = path.stat().st_size / 1e3
    print(f"{path.name}: {seconds:.0f} s, {size:.0f} kB, {len(nb.cells)} cells; slowest: {slow_cells}")
    return []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", nargs="+", type=Path)
    parser.add_argument("--all", action="store_true", help="run the cells marked slow or gpu too")
    args = parser.parse_args()
    paths = [path.resolve() for path in args.notebook]
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    failed = False
    for path in paths:
        for problem in render(path, args.all):
            failed = True
            print(f"{path.name}: NOT WRITTEN: {problem}", file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main())
