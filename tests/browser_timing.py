"""How fast widgets answer: `python tests/browser_timing.py` runs notebooks in JupyterLab, moves sliders, writes JSON."""
import json
import os
import statistics
import tempfile
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
            changed = [s for s in seen if s[0] is not None]
            out[name] = {**summary([first for first, _ in changed], "kernel"),
                         **summary([last for _, last in changed], "kernel_settled"), "events": len(changed)}
        else:
            drawn, shown = zip(*(bp.move(root, name, place) for place in places(*limit)))
            out[name] = {**summary(drawn, "draw"), **summary(shown, "frame"), "events": len(drawn)}
    return out


def seam_maps(root):
    "The tile explorer's seam map: its first idea at once, what the model measures after it."
    root.evaluate("root => { const s = root.querySelector('[name=size]'); s.value = s.min; s.dispatchEvent(new Event('input')); }")
    bp.move(root, "view", "seams")
    seen = [bp.watch(root, "overlap", overlap, quiet=6000, most=20_000) for overlap in (0, 8, 16, 24, 32, 28)]
    return {**summary([first for first, _ in seen], "idea"), **summary([last for _, last in seen], "measured"),
            "events": len(seen)}


def main():
    names = [p.name for p in sorted((bp.ROOT / "nbs").glob("12*.ipynb")) if p.name != "12a_clips.ipynb"]
    rows, load = {}, os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, bp.browser() as chromium:
        folder = Path(folder)
        bp.workspace(folder, *names)
        with bp.lab(folder) as address:
            for name in names:
                page = chromium.new_page(viewport={"width": 1400, "height": 1000})
                bp.run_all(page, address(name), seconds=200)
                for root in page.locator(".jp-OutputArea-output .fvsr").all():
                    widget = root.get_attribute("aria-label")
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
    result = {"machine": machine, "load at the start": round(load, 1), "sliders": rows}
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
