"""Widgets in a real browser: what a hand does, and what then changes on the screen."""
import json

import browser_page as bp
import numpy as np
import pytest
from test_widgets import clip, recording

from flashvsr_nb.dit import ModelConfig
from flashvsr_nb.tile_explorer import TileExplorer
from flashvsr_nb.viewers import CacheTimeline, QuantViewer, SparsityViewer
from flashvsr_nb.widgets import CompareVideo, SeamViewer

WHY_NOT = bp.why_not()
pytestmark = [pytest.mark.browser, pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")]


@pytest.fixture(scope="module")
def chromium():
    with bp.browser() as chromium:
        yield chromium


@pytest.fixture
def page(chromium, request):
    "A page that may not log an error; its last look is kept."
    page, problems = chromium.new_page(viewport={"width": 940, "height": 1000}), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    yield page
    bp.SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=bp.SCREENSHOTS / f"{request.node.name}.png", full_page=True)
    page.close()
    assert not problems


def root(page):
    return page.locator(".fvsr")


def changed(a, b):
    "Share of the pixels that differ."
    return float((a != b).any(-1).mean()) if a.shape == b.shape else 1.0


def near(pixel, color, most=60):
    return np.abs(np.asarray(pixel[:3]) - color).max() <= most


def test_split_shows_the_one_and_the_other(page):
    red, blue = (np.full((4, 60, 80, 3), color, np.uint8) for color in ((200, 30, 30), (30, 30, 200)))
    bp.show(page, CompareVideo(red, blue))
    w = root(page)
    for split in (0.25, 0.75):
        bp.move(w, "split", split)
        row = bp.picture(w)[300]
        at = round(split * len(row))
        assert near(row[at - 20], (200, 30, 30)) and near(row[at + 20], (30, 30, 200))


def test_split_is_dragged_and_frames_are_stepped_by_keys(page):
    frames = np.stack([np.full((60, 80, 3), 40 * i, np.uint8) for i in range(5)])
    bp.show(page, CompareVideo(frames, 255 - frames))
    w, canvas = root(page), page.locator("canvas").first
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + 100, steps=4)
    page.mouse.up()
    assert page.evaluate("model.get('split')") == pytest.approx(0.9, abs=0.01)
    canvas.focus()
    for key, frame in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1)):
        page.keyboard.press(key)
        bp.settle(page)
        assert w.get_attribute("data-frame") == str(frame)
        assert near(bp.picture(w)[300, 100], (40 * frame,) * 3, 4)
    page.keyboard.press("+")
    assert page.evaluate("model.get('zoom')") == 1.25
    page.keyboard.press(" ")
    page.wait_for_function("model.get('frame') !== 1")
    page.keyboard.press(" ")


def test_zoom_shows_single_pixels(page):
    frames = clip(1, 48, 64)
    bp.show(page, CompareVideo(frames, frames))
    w = root(page)
    bp.move(w, "zoom", 16)
    shown = bp.picture(w)[60:-60, 60:-60]
    across = (shown[:, 1:] != shown[:, :-1]).any(-1).any(0).mean()
    assert across < 0.12  # constant inside of each of its few pixels


def test_seams_light_up_and_the_profile_follows(page):
    plain = np.full((3, 96, 128, 3), 90, np.uint8)
    tiled = plain.copy()
    tiled[:, :, 64:] += 10
    viewer = SeamViewer(tiled, plain, columns=[64], rows=[30], split=1.0, heat=0.0)
    bp.show(page, viewer)
    w = root(page)
    dark = bp.picture(w)
    bp.move(w, "heat", 1)
    lit = bp.picture(w)
    columns = (dark != lit).any(-1).mean(0)
    seam = 64 / 128 * lit.shape[1]
    assert columns[round(seam + 3)] > 0.9 and columns[round(seam) - 60] < 0.1 and columns[round(seam) + 60] < 0.1
    bp.move(w, "split", 0)  # the plain side: nothing to light up
    assert (bp.picture(w) != lit).any(-1).mean() > 0.01
    ratio = json.loads(w.get_attribute("data-ratio"))
    assert ratio[0] > 1000 and ratio[1] == 0 and viewer.ratios()[1] == 0
    chart = bp.picture(w, 1)
    bp.move(w, "reach", 96)
    assert changed(chart, bp.picture(w, 1)) > 0.003
    bp.move(w, "seam", 1)
    assert json.loads(w.get_attribute("data-ratio"))[0] == 0
    for name, value in (("kind", "step"), ("over_time", "mean"), ("zoom", 4), ("frame", 2)):
        bp.move(w, name, value)
    assert page.evaluate("model.get('kind') + model.get('over_time') + model.get('frame')") == "stepmean2"


def test_a_click_on_the_picture_chooses_the_nearest_seam(page):
    frames = clip(2, 96, 128)
    bp.show(page, SeamViewer(frames, frames, columns=[32, 96], split=0.5))
    box = page.locator("canvas").first.bounding_box()
    page.mouse.click(box["x"] + 0.73 * box["width"], box["y"] + 0.5 * box["height"])
    assert page.evaluate("model.get('seam')") == 1
    assert "Seam 2 of 2, x = 96" in page.locator(".fvsr-read").last.inner_text()


def sparsity(page, **state):
    w = SparsityViewer(recording(slabs=3)[0], clip(30, 64, 96), **state)
    bp.show(page, w)
    return w


def test_the_browser_counts_as_python_does(page):
    viewer = sparsity(page, local_range=3, key_blocks=4.0, tau=0.5, theta=0.2)
    w = root(page)
    for move in ({}, dict(local_range=2), dict(key_blocks=1.5), dict(tau=0.9), dict(theta=0.4), dict(tau=1.0)):
        for name, value in move.items():
            setattr(viewer, name, value)
            bp.move(w, name, value)
        table = viewer.table()
        for name in ("lcsa", "sparge", "used"):
            shown = json.loads(w.get_attribute(f"data-{name}"))
            assert (shown["density"], shown["covered"]) == pytest.approx(table[name], abs=1e-5)


def test_every_threshold_changes_the_matrix(page):
    sparsity(page, local_range=5, key_blocks=3.0, tau=0.3, theta=0.1)
    w = root(page)
    for name, value in (("local_range", 1), ("key_blocks", 1), ("tau", 0.9), ("theta", 0.99), ("policy", "lcsa")):
        before = bp.picture(w)
        bp.move(w, name, value)
        assert changed(before, bp.picture(w)) > 0.01, name
    bp.move(w, "policy", "used")  # the recorded mask of this run is full: all of it is green
    inside = bp.picture(w)[4:-4:7, 4:-4:7].reshape(-1, 4)
    assert np.mean([near(p, (0, 158, 115), 10) for p in inside]) > 0.7


def test_a_click_on_a_query_block_shows_what_it_reads(page):
    viewer = sparsity(page, chunk=1, local_range=1, key_blocks=50.0, policy="lcsa", query=0)
    w, matrix, film = root(page), *page.locator("canvas").all()
    box = film.bounding_box()
    film_at = lambda: bp.picture(w, 1)
    before = film_at()
    # window 1: a block reads its own place in every slab, and nothing else. Bottom right of the newest slab: query 5.
    scale = box["width"] / before.shape[1]
    x, y, width, height = 279, before.shape[0] // 2 + 22, 271, 271 * 2 / 3
    film.click(position={"x": (x + width * 5 / 6) * scale, "y": (y + height * 3 / 4) * scale})
    assert page.evaluate("model.get('query')") == 5 and page.evaluate("model.saved") > 0
    bp.settle(page)
    after = film_at()
    assert changed(before, after) > 0.05
    blue = (np.abs(after[..., :3] - (0, 114, 178)).max(-1) < 12)  # frames around the blocks that are read
    assert blue[24:, 180:271].mean() > 0.02 and blue[24:, :170].mean() < 0.002
    viewer.query = 5
    assert viewer.masks()["lcsa"][5].sum() == 4 and "reads" in page.locator(".fvsr-read").last.inner_text()
    matrix.click(position={"x": 100, "y": 330 * 2.5 / 6})
    assert page.evaluate("model.get('query')") == 2
    matrix.focus()
    page.keyboard.press("ArrowDown")
    assert page.evaluate("model.get('query')") == 3


def test_ring_and_sizes_follow_the_sliders(page):
    viewer = CacheTimeline(ModelConfig.wan1_3b(), chunk=2)
    bp.show(page, viewer)
    w = root(page)
    for name, value in (("chunk", 6), ("keep", 5), ("height", 1152), ("width", 640)):
        setattr(viewer, name, value)
        before = bp.picture(w, 0), bp.picture(w, 1)
        bp.move(w, name, value)
        assert changed(before[0], bp.picture(w, 0)) + changed(before[1], bp.picture(w, 1)) > 0.002, name
        assert json.loads(w.get_attribute("data-bytes")) == [*viewer.sizes().values()]
    page.locator("canvas").first.click(position={"x": 60, "y": 60})
    assert page.evaluate("model.get('chunk')") == 0


def test_block_size_moves_the_histogram(page):
    viewer = QuantViewer(np.random.default_rng(0).normal(size=(256, 32)).astype(np.float32) + 3)
    bp.show(page, viewer)
    w = root(page)
    before = bp.picture(w)
    bp.move(w, "size", 4)
    assert changed(before, bp.picture(w)) > 0.005
    assert json.loads(w.get_attribute("data-error")) == pytest.approx([e[4] for e in viewer.data["error"]])


def test_tiles_follow_the_sliders(page):
    viewer = TileExplorer(clip(1, 120, 200)[0], tile=96, overlap=16, snap="4")
    bp.show(page, viewer)
    w = root(page)
    for name, value in (("overlap", 40), ("tile", 64), ("size", 4), ("overlap", 12), ("snap", "32"), ("size", 0)):
        setattr(viewer, name, value)
        before = bp.picture(w)
        bp.move(w, name, value)
        assert changed(before, bp.picture(w)) > 0.01, name
        plan, mine = json.loads(w.get_attribute("data-plan")), viewer.layout()
        assert plan["cols"] == [[s.start, s.stop] for s in mine["cols"]]
        assert plan["redundancy"] == pytest.approx(mine["redundancy"])
        shown, told = plan["predicted"], viewer.predicted()
        assert (shown["gib"], shown["time"]) == pytest.approx((told["gib"], told["time"]))
    assert "Predicted, official size" in page.locator(".fvsr-read").last.inner_text()
    bar = bp.picture(w, 1)
    bp.move(w, "vram", 4)
    assert changed(bar, bp.picture(w, 1)) > 0.01


def test_the_weights_of_a_tile_are_those_of_the_blend(page):
    bp.show(page, TileExplorer(np.full((64, 96, 3), 128, np.uint8), tile=64, overlap=32, view="weights", snap="4", heights=()))
    w, canvas = root(page), page.locator("canvas").first
    left = bp.picture(w)
    box = canvas.bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.8, box["y"] + box["height"] / 2)
    assert page.evaluate("model.get('chosen')") == 1
    right = bp.picture(w)
    inside = slice(40, -40)
    assert left[inside, 60].mean() > left[inside, -60].mean() + 20  # viridis: bright is much
    assert right[inside, -60].mean() > right[inside, 60].mean() + 20
    bp.move(w, "blend", "average")
    middle = bp.picture(w)[200, 280:360]
    assert np.ptp(middle[:, :3], axis=0).max() < 20  # an average is flat in the overlap


def test_seams_show_first_an_idea_and_then_what_was_measured(page):
    viewer = TileExplorer(clip(1, 64, 96)[0], tile=64, overlap=16, snap="4", heights=())
    viewer.can_measure = True
    bp.show(page, viewer)
    w = root(page)
    bp.move(w, "view", "seams")
    idea = bp.picture(w)
    assert "first idea" in page.locator(".fvsr-read").last.inner_text()
    page.wait_for_function("model.get('ask') === '64 16 hann 4'")  # the kernel was asked, once the slider rested
    page.evaluate("""() => { const bytes = new Uint8Array(64 * 96).fill(255);
        model.set('measured_size', [96, 64]); model.set('measured', new DataView(bytes.buffer));
        model.set('measured_for', '64 16 hann 4'); }""")
    assert "measured" in page.locator(".fvsr-read").last.inner_text()
    assert changed(idea, bp.picture(w)) > 0.5
    bp.move(w, "overlap", 20)
    assert "first idea" in page.locator(".fvsr-read").last.inner_text()


def test_a_closed_view_leaves_nothing_behind(page):
    bp.show(page, CompareVideo(clip(3), clip(3)))
    page.evaluate("close_widget()")
    assert page.locator(".fvsr").count() == 0
    assert page.evaluate("Object.values(model.listeners).every(list => list.length === 0)")


@pytest.fixture(scope="module")
def notebook(chromium, tmp_path_factory):
    "A notebook opened and run in JupyterLab."
    folder = tmp_path_factory.mktemp("lab")
    bp.workspace(folder, "12_widgets.ipynb", "12b_viewers.ipynb", "12c_tile_explorer.ipynb")
    with bp.lab(folder) as address:
        def opened(name):
            page = chromium.new_page(viewport={"width": 1400, "height": 1000})
            bp.run_all(page, address(name), seconds=240)
            return page
        yield opened


def moves_all(page, label, expected):
    "Every slider of a widget in JupyterLab changes what its canvases show, and the Python side hears of it."
    w = page.locator(f".jp-OutputArea-output .fvsr[aria-label='{label}']").first
    w.scroll_into_view_if_needed()
    count = w.locator("canvas").count()
    for name, value in expected.items():
        before = [bp.picture(w, i) for i in range(count)]
        bp.move(w, name, value)
        page.wait_for_timeout(700)  # layer, head and chunk come from the kernel
        after = [bp.picture(w, i) for i in range(count)]
        assert max(map(changed, before, after)) > 0.0005, f"{label}: {name} changed nothing"
    bp.SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    w.screenshot(path=bp.SCREENSHOTS / f"lab_{label.replace(' ', '_')}.png")
    return w


def no_errors(page):
    assert page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    assert page.locator(".jp-RenderedText[data-mime-type*=error]").count() == 0


def test_notebook_12_in_jupyterlab(notebook):
    page = notebook("12_widgets.ipynb")
    no_errors(page)
    w = moves_all(page, "Comparison of two clips", {"split": 0.2, "frame": 9, "zoom": 4})
    slider = w.locator("input[name=frame]")
    slider.focus()
    for _ in range(3):
        page.keyboard.press("ArrowLeft")  # in command mode JupyterLab would take it
    assert slider.input_value() == "6"
    moves_all(page, "Seam viewer", {"split": 0.8, "heat": 1, "frame": 5, "seam": 0, "reach": 60, "zoom": 3})
    page.close()


def test_notebook_12b_in_jupyterlab(notebook):
    page = notebook("12b_viewers.ipynb")
    no_errors(page)
    w = moves_all(page, "Sparsity viewer", {"chunk": 1, "layer": 0, "head": 1, "local_range": 3, "key_blocks": 5, "tau": 0.3,
                                            "theta": 0.6})
    film = w.locator("canvas").nth(1)
    before = bp.picture(w, 1)
    box = film.bounding_box()
    film.click(position={"x": box["width"] * 0.95, "y": box["height"] * 0.9})  # bottom right of the newest slab
    page.wait_for_timeout(300)
    assert changed(before, bp.picture(w, 1)) > 0.02
    assert "query block 11 reads" in w.locator(".fvsr-read").last.inner_text()
    moves_all(page, "Cache timeline", {"chunk": 2, "keep": 5, "height": 1536, "width": 3072})
    moves_all(page, "Quantisation viewer", {"head": 0, "chunk": 1, "layer": 0, "size": 4})
    page.close()


def test_notebook_12c_in_jupyterlab(notebook):
    page = notebook("12c_tile_explorer.ipynb")
    no_errors(page)
    w = moves_all(page, "Tile explorer", {"overlap": 8, "tile": 64, "size": 3, "vram": 6, "view": "weights", "blend": "average"})
    bp.move(w, "size", 0)
    bp.move(w, "view", "seams")
    w.get_by_text("Seam map: measured").wait_for(timeout=60_000)  # by the model, in the kernel
    page.close()
