"""Settings of the site. `tools/build_site.py` lays out the pages (notebooks, reference, map) and runs Sphinx."""
import html
import json
import sys
from configparser import ConfigParser
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert

HERE = Path(__file__).resolve().parent
_settings = ConfigParser(delimiters=["="])
_settings.read(HERE / "settings.ini", encoding="utf-8")
_settings = _settings["DEFAULT"]
ALT = json.loads((HERE / "alt.json").read_text(encoding="utf-8"))  # SHA-256 of a picture: what it shows

project = _settings["title"]
author = _settings["author"]
copyright = _settings["copyright"]
version = release = _settings["version"]
language = "en"

extensions = ["myst_nb", "sphinx.ext.githubpages"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # the stored outputs are the site's pictures
nb_merge_streams = True
exclude_patterns = ["settings.ini", "_static"]

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_math_renderer = "mathml"  # formulas as MathML: no script, no network, read aloud by screen readers
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"


def _mathml(tex, display):
    "A formula as MathML; `\\lVert` is the one command of the notebooks that the converter does not know."
    try:
        return convert(tex.replace(r"\lVert", r"\|").replace(r"\rVert", r"\|"), display=display)
    except Exception as error:  # of many kinds; the reader gets the source, the author this line
        print(f"note: shown as text, not a formula ({type(error).__name__}): {tex!r}", file=sys.stderr)
        return f"<code>{html.escape(tex)}</code>"


def _write_inline(self, node):
    self.body.append(_mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def _write_block(self, node):
    self.body.append(f'<div class="math">{_mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def _describe(app, doctree):
    "Give the notebooks' pictures their alt text; myst-nb names a stored picture by its hash."
    for image in doctree.findall(nodes.image):
        if text := ALT.get(Path(image["uri"]).stem):
            image["alt"] = text


def setup(app):
    app.add_html_math_renderer("mathml", (_write_inline, None), (_write_block, None))
    app.connect("doctree-read", _describe)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
