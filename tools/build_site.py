"""Build the site from the notebooks as they are stored, without running them: `python tools/build_site.py OUT`.

Needs the extra `site`. OUT is made, or replaced if it holds an earlier site. A dead link, a picture without description
or any other warning fails the build. `--only NAME ...` builds a part; links to what is left out become text.
"""
import argparse
import ast
import hashlib
import html.parser
import inspect
import io
import json
import re
import shutil
import sys
import tempfile
import tokenize
import urllib.parse
from base64 import b64decode
from pathlib import Path

from lint import PACKAGE, ROOT, directives, is_export, public_definitions, read

PARTS = [  # title, numbers of its notebooks
    ("Video in, video out", range(0, 1)), ("How video goes bad", range(1, 2)), ("The network", range(2, 5)),
    ("A memory of the past", range(5, 6)), ("Pixels and weights", range(6, 7)), ("Large frames", range(7, 8)),
    ("Faster attention", range(8, 10)), ("Measuring, and files", range(10, 11)), ("The tool", range(11, 12)),
    ("Things to move, and training", range(12, 14)), ("Performance", range(14, 100)),
]
LANGUAGE = {"name": "python", "pygments_lexer": "python"}
_DIRECTIVES = re.compile(r"^#\|.*\n?", re.M)
_LOCAL = re.compile(r"!?\[([^]]*)\]\((?!https?:|#)[^)]*\)")
_TITLES = {"title", "suptitle", "set_title"}
_LABELS = {"xlabel", "ylabel", "set_xlabel", "set_ylabel"}


# Notebooks

def label(module, name, *, prefix=""):
    "A name for links to a public name; it differs for `Plan` and `plan`, which Sphinx takes for the same."
    return f"{prefix}{module}.{name if name == name.lower() else f'cased.{name}'}"


def title_of(nb):
    "Title and subtitle of a notebook, from its first cell."
    return re.match(r"# (.+)\n+> (.+)", nb["cells"][0]["source"]).groups()


def module_of(nb):
    "Name of the module that a notebook exports, or None."
    names = [d.split()[1] for cell in nb["cells"] for d in directives(cell) if d.startswith("default_exp ")]
    return names[0] if names else None


def seconds_of(nb):
    "What the where-we-are line says about the time to run, or an empty text."
    found = re.search(r"about\s+([\d–-]+ (?:s|min))\b", "\n".join(cell["source"] for cell in nb["cells"][:3]))
    return found[1] if found else ""


def words(node):
    "The text of a string or f-string in code, … for each value; empty for anything else."
    if isinstance(node, ast.JoinedStr):
        return "".join(words(part) or "…" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def figure_text(source, section):
    "A description of a figure without one: titles, axes and curves as the code names them, or the section it is in."
    titles, labels, curves = [], [], []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        named = [(name, call.args[0])] if call.args else []
        for key, value in [*named, *((k.arg, k.value) for k in call.keywords)]:
            into = titles if key in _TITLES else labels if key in _LABELS else curves if key == "label" else []
            into.append(words(value))
    titles, labels, curves = ([*dict.fromkeys(filter(None, found))] for found in (titles, labels, curves))
    more = [f"{what}: {'; '.join(found)}" for what, found in (("axes", labels), ("curves", curves)) if found]
    return ("; ".join(titles) or f"Figure of the section “{section}”") + (f" ({'. '.join(more)})" if more else "")


def alt_texts(nb):
    "SHA-256 of every stored picture: what it shows, by its own words, by `#| fig-alt:` of its cell, or by its code."
    found, section = {}, title_of(nb)[0]
    for cell in nb["cells"]:
        if cell["cell_type"] == "markdown":
            section = (re.findall(r"^#+ (.+)", cell["source"], re.M) or [section])[-1]
        told = next((d.removeprefix("fig-alt:").strip() for d in directives(cell) if d.startswith("fig-alt:")), None)
        for output in cell.get("outputs", []):
            for kind, data in output.get("data", {}).items():
                if kind in ("image/png", "image/jpeg"):
                    own = output["metadata"].get(kind, {}).get("alt")
                    name = hashlib.sha256(b64decode("".join(data))).hexdigest()
                    found[name] = own or told or figure_text(cell["source"], section)
    return found


def page_of(nb, kept):
    "A notebook as a page: hidden cells left out, exported ones marked, links to pages not in `kept` as text."
    cells, module = [], module_of(nb)
    for cell in nb["cells"]:
        marks = directives(cell)
        if any(mark.split()[0] in ("hide", "default_exp") for mark in marks):
            continue
        cell = dict(cell, source=_DIRECTIVES.sub("", cell["source"]) if marks else cell["source"], metadata={})
        if cell["cell_type"] == "markdown":
            cell["source"] = re.sub(r"(?<!!)\[([^]]+)\]\(([\w./]+\.(?:ipynb|md))(?:#[^)]*)?\)",
                                    lambda m: m[0] if m[2] in kept else m[1], cell["source"])
        elif is_export({"cell_type": "code", "source": "".join(f"#| {mark}\n" for mark in marks)}):
            cell["metadata"] = {"tags": ["export"]}
            if names := [node.name for node in public_definitions(cell["source"])]:
                targets = "\n".join(f"({label(module, name, prefix='built.')})=" for name in names)
                cells.append({"cell_type": "markdown", "id": f"to-{cell['id']}", "metadata": {}, "source": targets})
        for output in cell.get("outputs", []):  # Markdown made by a run links to files of that run, which are gone
            data = output.get("data", {})
            if "text/markdown" in data:
                data["text/markdown"] = _LOCAL.sub(r"\1", "".join(data["text/markdown"]))
        cells.append(cell)
    return dict(nb, cells=cells, metadata=dict(nb["metadata"], language_info=LANGUAGE))


# Reference

def plain(text):
    "Text as Markdown that shows it unchanged; `code` stays code."
    pieces = re.split(r"(`[^`\n]+`)", text)
    return "".join(p if i % 2 else re.sub(r"([\\*_$<>\[\]|{}#~^])", r"\\\1", p) for i, p in enumerate(pieces))


def code(text):
    return f"`{text}`" if text else ""


def table(head, rows):
    "A Markdown table."
    def cell(text):
        return text.replace("\\|", "|").replace("|", "\\|")

    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in [head, ["---"] * len(head), *rows])


def arguments(function):
    "Parameters in order, without self and cls: node, default, name with its stars."
    args = function.args
    positional = [*args.posonlyargs, *args.args]
    found = [*zip(positional, [None] * (len(positional) - len(args.defaults)) + args.defaults, [""] * len(positional))]
    found += [(args.vararg, None, "*")] if args.vararg else []
    found += zip(args.kwonlyargs, args.kw_defaults, [""] * len(args.kwonlyargs))
    found += [(args.kwarg, None, "**")] if args.kwarg else []
    return [(arg, default, stars + arg.arg) for arg, default, stars in found if arg.arg not in ("self", "cls")]


class Module:
    "The public names of a module, read from its text: nothing is imported."

    def __init__(self, name, text, notebook):
        self.name, self.notebook = name, notebook
        self.tree = ast.parse(text)
        self.comments = {t.start[0]: t.string.lstrip("# ") for t in tokenize.generate_tokens(io.StringIO(text).readline)
                         if t.type == tokenize.COMMENT}
        assigned = {n.targets[0].id: n for n in self.tree.body
                    if isinstance(n, ast.Assign) and hasattr(n.targets[0], "id")}
        self.defined = {n.name: n for n in self.tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        self.public = {name: node for name in ast.literal_eval(assigned["__all__"].value)
                       if (node := self.defined.get(name) or assigned.get(name))}

    def comment(self, first, last):
        return " ".join(self.comments[line] for line in range(first, last + 1) if line in self.comments)

    def parameters(self, function):
        "Rows of parameters and the return: name, type, default, what the comment says."
        entries, rows, end = arguments(function), [], function.lineno
        for arg, default, name in entries:
            end = (default or arg).end_lineno
            alone = sum(other.lineno == arg.lineno for other, _, _ in entries) == 1
            rows.append([code(name), code(arg.annotation and ast.unparse(arg.annotation)),
                         code(default and ast.unparse(default)),
                         plain(self.comment(arg.lineno, end)) if alone else ""])
        gives = function.returns and ast.unparse(function.returns)
        says = self.comment(end + bool(entries), function.body[0].lineno - 1)
        return rows + ([["returns", code(gives), "", plain(says)]] if says or gives not in (None, "None") else [])

    def function(self, node, name, level):
        "Heading, signature, docstring and table of a function or method."
        parts = []
        for arg, default, shown in arguments(node):
            if arg in node.args.kwonlyargs and not node.args.vararg and "*" not in parts:
                parts.append("*")
            parts.append(shown + (f"={ast.unparse(default)}" if default else ""))
        gives = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        signature = f"{name}({', '.join(parts)}){gives}"
        if len(signature) > 80:
            signature = f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){gives}"
        rows = self.parameters(node)
        return [f"{'#' * level} {plain(name)}", f"```python\n{signature}\n```", *self.said(node),
                *([table(["parameter", "type", "default", "what it is"], rows)] if rows else [])]

    def methods(self, node):
        "Name to method of a class, with those of private classes of the module that it builds on."
        found = {m.name: m for m in node.body if isinstance(m, ast.FunctionDef)}
        for base in (self.defined.get(getattr(base, "id", None)) for base in node.bases):
            if base is not None and base.name[0] == "_":
                found = self.methods(base) | found
        return found

    def said(self, node):
        return [plain(text)] if (text := inspect.cleandoc(ast.get_docstring(node) or "")) else []

    def describe(self, name, node):
        "Blocks of Markdown about one public name."
        where = f"[Built in {plain(title_of(self.notebook)[0])}](#{label(self.name, name, prefix='built.')})"
        if isinstance(node, ast.FunctionDef):
            return [*self.function(node, name, 2), where]
        if isinstance(node, ast.Assign):
            value = ast.unparse(node.value)
            kind, shown = ("python", value) if len(value) <= 300 else ("text", value[:300] + " …")
            return [f"## {plain(name)}", f"```{kind}\n{name} = {shown}\n```",
                    plain(self.comment(node.lineno, node.end_lineno))]
        fields = [[code(f.target.id), code(ast.unparse(f.annotation)), code(f.value and ast.unparse(f.value)),
                   plain(self.comment(f.lineno, f.end_lineno))] for f in node.body if isinstance(f, ast.AnnAssign)]
        blocks = [f"## {plain(name)}", f"```python\n{ast.unparse(ast.ClassDef(node.name, node.bases, [], [], []))}\n```"
                  .replace(":\n", "\n"), *self.said(node)]
        methods = self.methods(node)
        first = self.parameters(methods["__init__"]) if "__init__" in methods else []
        if fields or first:
            blocks.append(table(["parameter", "type", "default", "what it is"], fields + first))
        blocks.append(where)
        for key, method in methods.items():
            if key[0] != "_" or key == "__call__":
                blocks += self.function(method, f"{name}.{key}", 3)
        return blocks

    def page(self):
        "The module's page of the reference."
        intro = inspect.cleandoc(ast.get_docstring(self.tree) or "")
        blocks = [f"# {PACKAGE}.{self.name}".replace("_", "\\_"), plain(intro)]
        for name, node in self.public.items():
            blocks += [f"({label(self.name, name)})=", *self.describe(name, node)]
        return "\n\n".join(block for block in blocks if block) + "\n"


# Pages

def toctree(caption, names):
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *names, "```"])


def course_map(notebooks):
    "The parts of the course, their notebooks, and what each builds (Markdown)."
    blocks, menus = [], []
    for part, numbers in PARTS:
        inside = {n: nb for n, nb in notebooks.items() if n[:2].isdigit() and int(n[:2]) in numbers}
        if not inside:
            continue
        rows = [[f"[{name.split('_')[0]} {title_of(nb)[0]}](nbs/{name}.ipynb)", title_of(nb)[1], seconds_of(nb),
                 f"[{module}](api/{module}.md)" if (module := module_of(nb)) else ""] for name, nb in inside.items()]
        blocks += [f"### {part}", table(["notebook", "what it is about", "runs in", "module"], rows)]
        menus.append(toctree(part, [f"{n.split('_')[0]} {title_of(nb)[0]} <nbs/{n}>" for n, nb in inside.items()]))
    first = ["Overview <nbs/index>"] * ("index" in notebooks) + ["The clips <data/README>"]
    return "\n\n".join([*blocks, toctree("The project", first), *menus, toctree("Reference", ["api/index"])])


def lay_out(source, names=None):
    "Write what Sphinx reads into the folder `source`: all notebooks, or those in `names`."
    stored = {path.stem: path for path in sorted((ROOT / "nbs").glob("*.ipynb"))}
    if unknown := sorted({*(names or [])} - {*stored}):
        raise ValueError(f"{', '.join(unknown)}: no such notebook; there are {', '.join(stored)}")
    notebooks = {name: read(path) for name, path in stored.items() if not names or name in names}
    shutil.copytree(ROOT / "docs", source, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "settings.ini", source)
    kept = {f"{name}.ipynb" for name in notebooks}
    for folder in ("nbs", "api", "data"):
        (source / folder).mkdir()
    shutil.copytree(ROOT / "nbs/images", source / "nbs/images")
    linked = re.sub(r"\[([^]]+)\]\(\.\./nbs/([^)]+)\)", lambda m: m[0] if m[2] in kept else m[1],
                    (ROOT / "data/README.md").read_text(encoding="utf-8"))
    (source / "data/README.md").write_text(linked, encoding="utf-8")
    alt, rows, modules = {}, [], []
    for name, nb in notebooks.items():
        alt |= alt_texts(nb)
        page = json.dumps(page_of(nb, kept | {"../data/README.md"}), ensure_ascii=False)
        (source / f"nbs/{name}.ipynb").write_text(page, encoding="utf-8")
        if not (module := module_of(nb)):
            continue
        made = Module(module, (ROOT / PACKAGE / f"{module}.py").read_text(encoding="utf-8"), nb)
        (source / f"api/{module}.md").write_text(made.page(), encoding="utf-8")
        modules.append(module)
        rows.append([f"[{module}]({module}.md)", ", ".join(f"[{plain(n)}](#{label(module, n)})" for n in made.public)])
    (source / "alt.json").write_text(json.dumps(alt, ensure_ascii=False), encoding="utf-8")
    intro = f"# Reference\n\nEvery public name of `{PACKAGE}`, by module, in the order of the course.\n\n"
    menu = "\n".join(["```{toctree}", ":hidden:", "", *modules, "```"])
    listed = table(["module", "public names"], rows)
    (source / "api/index.md").write_text(f"{intro}{listed}\n\n{menu}\n", encoding="utf-8")
    front = (ROOT / "docs/index.md").read_text(encoding="utf-8").replace("<!-- map -->", course_map(notebooks))
    if "index" not in notebooks:
        front = front.replace("[The overview](nbs/index.ipynb)", "The overview")
    (source / "index.md").write_text(front, encoding="utf-8")


# What came out

class Page(html.parser.HTMLParser):
    "Ids, links and pictures of an HTML file."

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.pictures = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids |= {values[key] for key in ("id", "name") if values.get(key)}
        self.links += [values[key] for key in ("href", "src") if values.get(key)]
        if tag == "img":
            self.pictures.append((values.get("src"), (values.get("alt") or "").strip()))


def check_site(folder):
    "Problems of a built site: links to files or places that are not there, pictures without a description."
    folder = Path(folder).resolve()
    pages, problems = {path: Page(path) for path in sorted(folder.rglob("*.html"))}, []
    for path, page in pages.items():
        name = path.relative_to(folder)
        for link in dict.fromkeys(page.links):
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            anchor = urllib.parse.unquote(parts.fragment)
            if not target.is_file():
                problems.append(f"{name}: dead link {link}")
            elif anchor and target in pages and anchor not in pages[target].ids:
                problems.append(f"{name}: {link} leads to no place on that page")
        problems += [f"{name}: no description of {src}" for src, alt in page.pictures
                     if not alt or Path(alt).name == Path(src).name]
    return problems


def build(out, names=None):
    "Build the site into the folder `out`; its problems, and nothing written if there are any."
    try:
        from sphinx.cmd.build import main as sphinx
        import furo, latex2mathml, myst_nb  # noqa: E401, F401
    except ImportError as error:
        raise ValueError(f"{error.name} missing; pip install -e '.[site]'") from None
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir()) and not (out / ".buildinfo").exists()):
        raise ValueError(f"{out}: is there and is not a site; name a new folder")
    with tempfile.TemporaryDirectory() as scratch:
        source, site = Path(scratch, "source"), Path(scratch, "site")
        source.mkdir()
        lay_out(source, names)
        if sphinx(["-q", "-W", "--keep-going", "-j", "auto", "-d", f"{scratch}/doctrees", str(source), str(site)]):
            return ["Sphinx warned, see above"]
        if problems := check_site(site):
            return problems
        if out.exists():
            shutil.rmtree(out)
        shutil.copytree(site, out)
    return []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the site")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="notebooks to build, like 03_attention")
    args = parser.parse_args()
    try:
        problems = build(args.out, args.only)
    except ValueError as error:
        problems = [str(error)]
    if problems:
        print(*problems, sep="\n", file=sys.stderr)
        return 1
    pages = [*args.out.rglob("*.html")]
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: {len(pages)} pages, {size / 1e6:.0f} MB; open {args.out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
