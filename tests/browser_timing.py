"""How fast widgets answer: `python tests/browser_timing.py` runs notebooks in JupyterLab, moves sliders, writes JSON.

Names of notebooks after it: only those; what the file says of others is kept.
"""
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import browser_page as bp

EVENTS = 12  # of each slider
KERNEL = {"Sparsity viewer": ("layer", "head", "chunk"), "Quantisation viewer": ("layer", "head", "chunk")}


def summary(times, name):
    "Median and worst of some milliseconds, as entries of a row."
    return {f"{name}_ms": round(statistics.median(times), 1), f"{name}_worst_ms": round(max(times), 1)}


def places(low, high, step):
    "Where to move a slider, from one end to the other; a short one goes to and fro."
    count = round((high - low) / step) + 1
    if count < EVENTS:
        return [low + step * (i % count) for i in range(1, EVENTS + 1)]
    return [low + round((count - 1) * i / (EVENTS - 1)) * step for i in range(EVENTS)]


def sliders(root, label):
    "Moves every slider of a widget; {name: times of drawing and of the frame, or of what the kernel answered}."
    limits = root.evaluate("""root => Object.fromEntries([...root.querySelectorAll('input[type=range]')].map(
        i => [i.name, [Number(i.min), Number(i.max), Number(i.step)]]))""")
    out = {}
    for name, limit in limits.items():
        if name in KERNEL.get(label, ()):
            seen = [bp.watch(root, name, place) for place in places(*limit)]
            answers = [last for _, last in seen if last is not None]
            out[name] = {**summary(answers, "kernel"), "events": len(answers)}
        else:
            drawn, shown = zip(*(bp.move(root, name, place) for place in places(*limit)))
            out[name] = {**summary(drawn, "draw"), **summary(shown, "frame"), "events": len(drawn)}
    return out


def seam_maps(root):
    "The tile explorer's seam map of the frame itself: a first idea at once, and what the model measures after it."
    for name, value in (("size", 0), ("tile", 32), ("view", "seams")):
        bp.move(root, name, value)
    moves = [("overlap", x) for x in (0, 8, 12)] + [("blend", x) for x in ("average", "linear", "gaussian")]
    ideas, measured = [], []
    for move in moves:
        start = time.perf_counter()
        ideas.append(bp.watch(root, *move, quiet=50)[0])
        root.get_by_text("Seam map: measured").wait_for(timeout=60_000)
        measured.append(1000 * (time.perf_counter() - start))
    return {**summary(ideas, "idea"), **summary(measured, "measured"), "events": len(moves)}


def main(names):
    names = names or [p.name for p in sorted((bp.ROOT / "nbs").glob("12*.ipynb")) if p.name != "12a_clips.ipynb"]
    rows, load = {}, os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, bp.browser() as chromium:
        folder = Path(folder)
        bp.workspace(folder, *names)
        with bp.lab(folder) as address:
            for name in names:
                page = chromium.new_page(viewport={"width": 1400, "height": 1000})
                bp.run_all(page, address(name), seconds=200)
                seen = set()
                for root in page.locator(".jp-OutputArea-output .fvsr").all():
                    widget = root.get_attribute("aria-label")
                    if widget in seen:  # a second one with other contents
                        continue
                    seen.add(widget)
                    rows |= {f"{widget}: {slider}": row for slider, row in sliders(root, widget).items()}
                    if widget == "Tile explorer":
                        rows[f"{widget}: seam map"] = seam_maps(root)
                page.close()
                store(chromium.version, load, rows)
    for name, row in rows.items():
        print(f"{name:34} " + "  ".join(f"{k.removesuffix('_ms')} {v:g}" for k, v in row.items()))


def store(version, load, rows):
    machine = f"JupyterLab in Chromium {version.split('.')[0]}, headless, software rendering, {os.cpu_count()} CPU cores"
    path = bp.ROOT / "data" / "results" / "widgets.json"
    known = json.loads(path.read_text())["sliders"] if path.exists() else {}
    result = {"machine": machine, "load": round(load, 1), "sliders": known | rows}
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
