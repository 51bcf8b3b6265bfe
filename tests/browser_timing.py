"""How fast widgets answer: `python tests/browser_timing.py` runs notebooks in JupyterLab, moves sliders, writes JSON."""
import json
import os
import statistics
import tempfile
from pathlib import Path

import browser_page as bp

EVENTS = 12  # of each slider


def sliders(root):
    "Moves every slider of a widget from one end to the other; {name: [(drawn, on screen) in ms]}."
    limits = root.evaluate("""root => Object.fromEntries([...root.querySelectorAll('input[type=range]')].map(
        i => [i.name, [Number(i.min), Number(i.max), Number(i.step)]]))""")
    out = {}
    for name, (low, high, step) in limits.items():
        places = [low + round((high - low) * i / (EVENTS - 1) / step) * step for i in range(EVENTS)]
        out[name] = [bp.move(root, name, place) for place in places]
    return out


def main():
    names = [p.name for p in sorted((bp.ROOT / "nbs").glob("12*.ipynb")) if p.name != "12a_clips.ipynb"]
    rows = {}
    with tempfile.TemporaryDirectory() as folder, bp.browser() as chromium:
        folder = Path(folder)
        bp.workspace(folder, *names)
        with bp.lab(folder) as address:
            for name in names:
                page = chromium.new_page(viewport={"width": 1400, "height": 1000})
                bp.run_all(page, address(name), seconds=200)
                for root in page.locator(".jp-OutputArea-output .fvsr").all():
                    widget = root.get_attribute("aria-label")
                    for slider, times in sliders(root).items():
                        drawn, shown = ([t[i] for t in times] for i in (0, 1))
                        rows[f"{widget}: {slider}"] = {
                            "draw_ms": statistics.median(drawn), "draw_worst_ms": max(drawn),
                            "frame_ms": statistics.median(shown), "frame_worst_ms": max(shown), "events": len(times)}
                page.close()
                store(chromium.version, rows)
    for name, row in rows.items():
        print(f"{name:36} drawn {row['draw_ms']:6.1f} ms (worst {row['draw_worst_ms']:.1f}), shown {row['frame_ms']:6.1f}")


def store(version, rows):
    machine = f"JupyterLab in Chromium {version.split('.')[0]}, headless, software rendering, {os.cpu_count()} CPU cores"
    path = bp.ROOT / "data" / "results" / "widgets.json"
    result = {"machine": machine, "load": round(os.getloadavg()[0], 1), "sliders": rows}
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
