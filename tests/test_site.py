"""The site's reference says what the code's comments say; every link leads somewhere, every picture is described."""
import json
import re
from pathlib import Path

import build_site
import lint
import pytest

pytestmark = pytest.mark.filterwarnings("ignore:'myst_parser")  # what it will have to change for Sphinx 11
ROOT = Path(__file__).resolve().parent.parent
SMALL = ["03_attention", "11e_lab"]  # one with pictures, one with a short module
MODULE = '''"""Small things."""

__all__ = ["LIMIT", "Box", "turn"]

LIMIT = 3  # boxes, at most


class _Base:
    def opened(self):  # the same box
        "Without its lid."
        return self


@dataclass(frozen=True)
class Box(_Base):
    "A box_with|signs."

    side: int = 1  # cm

    def __call__(
        self,
        x: Tensor,  # (B,)
    ):  # twice `x`
        "Doubled."
        return 2 * x

    def _hidden(self): pass


def turn(
    x: Tensor,  # (B,N), in -1…1
    *rest,  # more of them
    by: int | None = None,  # degrees
    **options,  # handed on
) -> Tensor:  # (B,N) turned
    "Turn `x`."
    return x


def _own(): pass
'''


@pytest.fixture
def page():
    nb = lint.read(ROOT / "nbs/11e_lab.ipynb")
    return build_site.Module("things", MODULE, nb).page()


def test_reference_has_each_comment_in_its_row(page):
    assert "| `x` | `Tensor` |  | (B,N), in -1…1 |" in page
    assert "| `*rest` |  |  | more of them |" in page
    assert r"| `by` | `int \| None` | `None` | degrees |" in page
    assert "| `**options` |  |  | handed on |" in page
    assert "| returns | `Tensor` |  | (B,N) turned |" in page
    assert "| `side` | `int` | `1` | cm |" in page
    assert "| returns |  |  | twice `x` |" in page and "## LIMIT" in page and "boxes, at most" in page
    assert r"A box\_with\|signs." in page and "turn(x, *rest, by=None, **options) -> Tensor" in page
    assert "### Box.opened" in page and "Without its lid." in page and "| returns |  |  | the same box |" in page
    assert "hidden" not in page and "own" not in re.sub("known|shown", "", page)


def test_reference_covers_every_public_name_without_importing():
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        nb = lint.read(path)
        name = build_site.module_of(nb)
        made = build_site.Module(name, (ROOT / f"flashvsr_nb/{name}.py").read_text(encoding="utf-8"), nb)
        page = made.page()
        labels = [build_site.label(name, public).lower() for public in made.public]
        assert len({*labels}) == len(labels)
        for cell in filter(lint.is_export, nb["cells"]):
            for node in lint.public_definitions(cell["source"]):
                assert f"({build_site.label(name, node.name)})=" in page and node.name in made.public
                if hasattr(node, "args"):
                    rows = made.parameters(made.public[node.name])
                    assert len(rows) >= len(node.args.args)
                    assert all(build_site.table(row, []).splitlines()[0] in page for row in rows)


def test_every_picture_gets_a_description():
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        nb = lint.read(path)
        stored = sum(kind in ("image/png", "image/jpeg") for cell in nb["cells"] for output in cell.get("outputs", [])
                     for kind in output.get("data", {}))
        texts = build_site.alt_texts(nb)
        assert bool(texts) == bool(stored) and all(len(text) > 3 for text in texts.values())


def test_a_figure_is_described_by_its_titles_and_axes():
    code = 'ax.set_title(f"Seams of {n} px")\nax.set(xlabel="px", ylabel="levels")\nplt.title("Seams of … px")'
    assert build_site.figure_text(code, "Costs") == "Seams of … px (axes: px; levels)"
    curve = 'plt.plot(x, label=f"tile {n}"); plt.ylabel("ms")'
    assert build_site.figure_text(curve, "Costs") == "Figure of the section “Costs” (axes: ms. curves: tile …)"
    assert build_site.figure_text("plt.show()", "Costs") == "Figure of the section “Costs”"


def test_the_map_knows_the_time_to_run():
    said = {path.stem: build_site.seconds_of(lint.read(path)) for path in (ROOT / "nbs").glob("[0-9]*.ipynb")}
    assert [name for name, text in said.items() if not text] == [] and said["11e_lab"] == "3 s"


def test_links_to_what_is_left_out_become_text():
    links = "[one](01_one.ipynb#x), [two](02_two.ipynb), ![p](images/p.png)"
    nb = {"metadata": {}, "cells": [
        {"cell_type": "markdown", "id": "a", "metadata": {}, "source": links},
        {"cell_type": "code", "id": "b", "metadata": {}, "outputs": [], "source": "#| hide\nsecret = 1"},
        {"cell_type": "code", "id": "c", "metadata": {}, "outputs": [], "source": "#| slow\nwork()"}]}
    text, work = build_site.page_of(nb, {"02_two.ipynb"})["cells"]
    assert text["source"] == "one, [two](02_two.ipynb), ![p](images/p.png)"
    assert work["source"] == "work()"


def test_check_site_finds_what_is_wrong(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/index.html").write_text('<p id="here"><a href="../a.html#there">x</a></p>')
    (tmp_path / "p.png").touch()
    good = '<b id="there"></b><a href="sub/#here">1</a><a href="https://x.y/z">2</a><a href="#there">3</a>' \
           '<img src="p.png" alt="A plot">'
    (tmp_path / "a.html").write_text(good)
    assert build_site.check_site(tmp_path) == []
    for bad, said in [('<a href="b.html">', "dead link b.html"), ('<a href="sub/#no">', "sub/#no leads to no place"),
                      ('<a href="#no">', "#no leads to no place"), ('<img src="p.png">', "no description of p.png"),
                      ('<img src="p.png" alt="p.png">', "no description"),
                      ('<img src="q.png" alt="q">', "dead link q.png")]:
        (tmp_path / "a.html").write_text(good + bad)
        problem, = build_site.check_site(tmp_path)
        assert problem.startswith("a.html: ") and said in problem


def test_refusals(tmp_path):
    for name in ("furo", "latex2mathml", "myst_nb", "sphinx"):
        pytest.importorskip(name)
    with pytest.raises(ValueError, match="no_such: no such notebook; there are 00_video"):
        build_site.build(tmp_path / "site", ["no_such"])
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="is there and is not a site"):
        build_site.build(tmp_path, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for name in ("furo", "latex2mathml", "myst_nb", "sphinx"):
        pytest.importorskip(name)
    out = tmp_path_factory.mktemp("out") / "site"
    assert build_site.build(out, SMALL) == []
    return out


def test_site_is_whole(site):
    assert build_site.check_site(site) == []
    pages = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    assert {"index.html", "search.html", "nbs/03_attention.html", "api/attention.html", "data/README.html"} <= pages
    assert (site / ".nojekyll").exists()


def test_site_shows_outputs_and_descriptions(site):
    nb = lint.read(ROOT / "nbs/03_attention.ipynb")
    page = build_site.Page(site / "nbs/03_attention.html")
    shown = {Path(src).stem: alt for src, alt in page.pictures}
    assert build_site.alt_texts(nb).items() <= shown.items() and len(shown) > 1
    text = (site / "nbs/03_attention.html").read_text(encoding="utf-8")
    assert "<math" in text and "$$" not in text and "#|" not in text
    assert "built-attention-locality-mask" in page.ids


def test_site_reads_without_a_network(site):
    for path in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', path.read_text(encoding="utf-8"))
        assert loaded == [], path.name


def test_site_can_be_searched(site):
    text = (site / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(text.removeprefix("Search.setIndex(").removesuffix(")"))
    assert {"nbs/03_attention", "api/lab", "index"} <= {*index["docnames"]}
    found = index["terms"]["checkout"]
    assert index["docnames"].index("nbs/11e_lab") in (found if isinstance(found, list) else [found])


def test_site_replaces_an_earlier_one_and_fails_on_a_dead_link(site, monkeypatch, capfd):
    real = build_site.course_map
    monkeypatch.setattr(build_site, "course_map", lambda notebooks: real(notebooks) + "\n\n[gone](nbs/99_gone.md)")
    before = (site / "index.html").read_bytes()
    assert build_site.build(site, ["11e_lab"]) == ["Sphinx warned, see above"]
    assert "99_gone" in capfd.readouterr().err and (site / "index.html").read_bytes() == before
    monkeypatch.undo()
    assert build_site.build(site, ["11e_lab"]) == [] and not (site / "nbs/03_attention.html").exists()
