"""Read every notebook as JSON and say what breaks the house rules: `python tools/lint.py [NOTEBOOK ...]`."""
import ast
import io
import json
import re
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "flashvsr_nb"
MAX_BYTES, MAX_CELL_LINES, MAX_COLUMNS = 2_000_000, 60, 120
VAGUE = ("Tensor", "ndarray", "tuple", "list", "dict")  # return types that need a comment: which shape, which unit?
WIDGET = "application/vnd.jupyter.widget-view+json"

_NUMBERED = re.compile(r"(\d+)[a-z]?_(\w+)")
_DIRECTIVE = re.compile(r"^#\|\s*(.+?)\s*$", re.M)
_LINK = re.compile(r"\]\(\s*([^)\s]+)[^)]*\)|(?:src|href)=[\"']([^\"']+)[\"']")
_FENCE = re.compile(r"^(```|~~~).*?^\1|`[^`\n]+`", re.M | re.S)
_BASE64 = re.compile(r"base64,[A-Za-z0-9+/=\\\s]+")
_WARNING = re.compile(r"\w*Warning:|\bwarning:|warnings\.warn\(")
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:root|home|tmp|work|Users)/|\b[A-Z]:\\Users\b")
_MAGIC = re.compile(r"^\s*(?:%%?time(?:it)?\b|!|%pip\b|%conda\b)", re.M)


def read(path):
    "The notebook at `path` with every cell's source as one string."
    nb = json.loads(Path(path).read_text(encoding="utf-8"))
    for cell in nb["cells"]:
        cell["source"] = "".join(cell["source"])
    return nb


def directives(cell):
    "The `#|` directives of a code cell, without the marker: `['export']`, `['eval: false']`."
    return _DIRECTIVE.findall(cell["source"]) if cell["cell_type"] == "code" else []


def is_export(cell):
    return any(d.split()[0] in ("export", "exports", "exporti") for d in directives(cell))


def output_texts(output):
    "What an output stores as text, without embedded pictures."
    parts = [output.get("text", ""), *output.get("traceback", [])]
    parts += [v for k, v in output.get("data", {}).items() if k.startswith("text/") or k == "image/svg+xml"]
    return [_BASE64.sub("", "".join(p)) for p in parts]


def check_outputs(nb):
    "Problems of stored outputs: errors, warnings, machine paths, widget state."
    problems = ["widget state in the notebook's metadata"] if "widgets" in nb["metadata"] else []
    for i, cell in enumerate(nb["cells"]):
        for output in cell.get("outputs", []):
            if output["output_type"] == "error":
                problems.append(f"cell {i}: error output {output['ename']}: {output['evalue']}")
                continue
            if WIDGET in output.get("data", {}):
                problems.append(f"cell {i}: a widget view is stored; give the widget a poster (image/png)")
            texts = output_texts(output)
            if output.get("name") == "stderr":
                problems.append(f"cell {i}: stderr output (warning, log or progress bar): {texts[0].strip()[:200]!r}")
            for text in texts:
                if found := _WARNING.search(text):
                    problems.append(f"cell {i}: a warning is stored: {text[max(0, found.start() - 40):][:160]!r}")
                if found := MACHINE_PATH.search(text):
                    problems.append(f"cell {i}: a machine's path is stored: {text[found.start():][:80]!r}")
    return problems


def check_cells(nb, path):
    "Problems any notebook can have: size, ids, cell length, machine paths and timing magics in code, dead links."
    problems = []
    if (size := Path(path).stat().st_size) > MAX_BYTES:
        problems.append(f"{size / 1e6:.1f} MB, allowed {MAX_BYTES / 1e6:.1f}")
    ids = [cell.get("id") for cell in nb["cells"]]
    if None in ids or len({*ids}) < len(ids):
        problems.append("cell ids are missing or not unique")
    for i, cell in enumerate(nb["cells"]):
        source = cell["source"]
        if found := MACHINE_PATH.search(source):
            problems.append(f"cell {i}: a machine's path in the source: {source[found.start():][:60]!r}")
        if cell["cell_type"] == "markdown":
            for link in (a or b for a, b in _LINK.findall(_FENCE.sub("", source))):
                target = link.split("#")[0]
                if target and not re.match(r"\w+:", target) and not (Path(path).parent / target).exists():
                    problems.append(f"cell {i}: dead link {link}")
        elif cell["cell_type"] == "code":
            lines = source.splitlines()
            if len(lines) > MAX_CELL_LINES:
                problems.append(f"cell {i}: {len(lines)} lines of code, allowed {MAX_CELL_LINES}")
            if long := [line for line in lines if len(line) > MAX_COLUMNS]:
                problems.append(f"cell {i}: {len(long[0])} columns, allowed {MAX_COLUMNS}: {long[0].strip()[:60]!r}")
            if found := _MAGIC.search(source):
                problems.append(f"cell {i}: {found.group().strip()!r} gives another output at every run")
    return problems


def check_leaks(nb):
    "nbdev_test runs one notebook after another in a process: what the next would miss must be put back."
    code = "\n".join(c["source"] for c in nb["cells"] if c["cell_type"] == "code")
    if re.findall(r"\bset_grad_enabled\((\w+)\)", code)[-1:] == ["False"]:
        return ["gradients stay off: end the last code cell with torch.set_grad_enabled(True)"]
    return []


def neighbours(path):
    "The numbered notebooks before and after this one in its folder (None at the ends)."
    names = sorted(p.name for p in Path(path).parent.glob("[0-9]*.ipynb"))
    at = names.index(Path(path).name)
    return names[at - 1] if at else None, names[at + 1] if at + 1 < len(names) else None


def check_lesson(nb, path):
    "Problems of a numbered notebook's form: title and subtitle, where-we-are line, `default_exp`, import cells."
    problems, cells = [], nb["cells"]
    if not cells or cells[0]["cell_type"] != "markdown" or not re.match(r"# \S.*\n+> \S", cells[0]["source"]):
        problems.append("the first cell must be '# Title' followed by '> one-line subtitle'")
    opening = "\n".join(c["source"] for c in cells[:3] if c["cell_type"] == "markdown")
    for name, arrow in zip(neighbours(path), "←→"):
        if name and not (f"({name})" in opening and arrow in opening):
            problems.append(f"the where-we-are line must link to {name} with a {arrow}")
    homes = [d.split()[1:] for c in cells for d in directives(c) if d.split()[0] == "default_exp"]
    module = _NUMBERED.fullmatch(Path(path).stem)
    if homes != [[module and module[2]]]:
        problems.append(f"needs exactly one '#| default_exp' naming the notebook's own module, found {homes}")
    for i, cell in enumerate(cells):
        if not is_export(cell):
            continue
        if any(len(d.split()) > 1 and d.startswith("export") for d in directives(cell)):
            problems.append(f"cell {i}: export to another module repeats its code at every export; use a notebook each")
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(cell["source"]).body}
        if kinds == {True, False}:
            problems.append(f"cell {i}: an export cell mixes imports and other code")
    return problems


def undocumented(source):
    "Public functions, classes and methods in `source` without a docstring or a comment for a parameter or the return."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}

    def check_function(node, name):
        args = node.args
        positional = [*args.posonlyargs, *args.args]
        defaults = [None] * (len(positional) - len(args.defaults)) + args.defaults + args.kw_defaults
        pairs = [(a, d) for a, d in zip(positional + args.kwonlyargs, defaults) if a.arg not in ("self", "cls")]
        pairs += [(a, None) for a in (args.vararg, args.kwarg) if a]
        for arg, default in pairs:
            lines = range(arg.lineno, (default or arg).end_lineno + 1)
            alone = sum(other.lineno == arg.lineno for other, _ in pairs) == 1
            if not (alone and comments.intersection(lines)):
                yield f"{name}: parameter {arg.arg} has no comment of its own"
        gives = any(getattr(n, "value", None) for n in ast.walk(node) if isinstance(n, (ast.Return, ast.Yield)))
        ends = max([node.lineno] + [(default or arg).end_lineno + 1 for arg, default in pairs])
        named = isinstance(node.returns, ast.Name) and node.returns.id not in VAGUE
        if gives and not named and not comments.intersection(range(ends, node.body[0].lineno)):
            yield f"{name}: the return has no comment"

    def check_class(node):
        is_data = any("dataclass" in ast.unparse(d) for d in node.decorator_list)
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and (item.name == "__init__" or item.name[0] != "_"):
                name = f"{node.name}.{item.name}"
                if item.name != "__init__" and not ast.get_docstring(item):
                    yield f"{name}: no docstring"
                yield from check_function(item, name)
            elif is_data and isinstance(item, ast.AnnAssign) and item.end_lineno not in comments:
                yield f"{node.name}: field {item.target.id} has no comment"

    for node in public_definitions(source):
        if not ast.get_docstring(node):
            yield f"{node.name}: no docstring"
        yield from check_class(node) if isinstance(node, ast.ClassDef) else check_function(node, node.name)


def public_definitions(source):
    kinds = ast.FunctionDef, ast.ClassDef
    return [n for n in ast.parse(source).body if isinstance(n, kinds) and n.name[0] != "_"]


def check_names(nb, tests):
    "Problems of exported names: documented, shown in the notebook, tested there or in the text `tests`."
    code = [c for c in nb["cells"] if c["cell_type"] == "code"]
    others = [_DIRECTIVE.sub("", c["source"]) for c in code if not is_export(c)]
    shown = "\n".join(others)
    tested = "\n".join([tests, *(source for source in others if re.search(r"\btest_|\bassert\b", source))])
    problems = []
    for cell in filter(is_export, code):
        problems += undocumented(cell["source"])
        if "exporti" in directives(cell):
            continue
        for name in (node.name for node in public_definitions(cell["source"])):
            for what, where in ("shown in the notebook", shown), ("tested in the notebook or in tests/", tested):
                if not re.search(rf"\b{name}\b", where):
                    problems.append(f"{name}: exported but not {what}")
    return problems


def check_order(paths):
    "Modules that import, when loaded, a module of a higher notebook number (inside a function it is allowed)."
    number = {m[2]: int(m[1]) for p in paths if (m := _NUMBERED.fullmatch(Path(p).stem))}
    pattern = re.compile(rf"^(?:from {PACKAGE}(?:\.| import )|from \.|import {PACKAGE}\.)\s*(?:import )?(\w+)", re.M)
    problems = []
    for path in paths:
        if not (own := _NUMBERED.fullmatch(Path(path).stem)):
            continue
        for cell in filter(is_export, read(path)["cells"]):
            for other in pattern.findall(cell["source"]):
                if number.get(other, -1) > int(own[1]):
                    problems.append(f"{Path(path).name}: imports {other} of notebook {number[other]:02}")
    return problems


def lint(path, tests=""):
    "All problems of the notebook at `path`; `tests` is the text of the test suite."
    path = Path(path)
    nb = read(path)
    problems = check_outputs(nb) + check_cells(nb, path) + check_leaks(nb)
    if path.stem != "index":
        problems += check_lesson(nb, path) + check_names(nb, tests)
    return [f"{path.name}: {p}" for p in problems]


def suite_text():
    "The text of the project's test suite."
    return "\n".join(p.read_text(encoding="utf-8") for p in sorted((ROOT / "tests").glob("test_*.py")))


def main(arguments):
    paths = [Path(a) for a in arguments] or sorted((ROOT / "nbs").glob("*.ipynb"))
    problems = [p for path in paths for p in lint(path, suite_text())]
    problems += check_order(sorted({*paths, *(ROOT / "nbs").glob("*.ipynb")})) if not arguments else []
    print("\n".join(problems) or f"{len(paths)} notebook(s) in order")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
