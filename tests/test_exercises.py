"""The notebooks end with exercises; each has a start that runs and fails, a folded solution, and a check that knows.

Running the notebooks runs the hidden cells: there the checks themselves are tried. Here: that nothing of it is missing.
"""
import ast
import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "nbs").glob("[0-9]*.ipynb"))
LEAST = 3
FEWER = {}  # notebooks with fewer sound exercises, and how many they have: a list that may only shrink


def read(path):
    "(kind, source, printed) of each cell; kind is markdown, code or hide."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [("hide" if c["source"][:1] == ["#| hide\n"] else c["cell_type"], "".join(c["source"]),
             "".join(t for output in c.get("outputs", ()) for t in output.get("text", ()))) for c in cells]


def calls(tree, name):
    "The calls of a function anywhere in a piece of code."
    return [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", None) == name]


def answers(hidden, check):
    "What a hidden cell asserts that a check says: a set of True and False."
    said = set()
    for node in ast.walk(hidden):
        if isinstance(node, ast.Assert):
            denials = [n for n in ast.walk(node) if isinstance(n, ast.UnaryOp) and isinstance(n.op, ast.Not)]
            denied = sum(len(calls(n, check)) for n in denials)
            said |= {False} if denied else set()
            said |= {True} if len(calls(node, check)) > denied else set()
    for call in calls(hidden, "test_eq"):
        if calls(call, check) and isinstance(call.args[-1], ast.Constant):
            said.add(call.args[-1].value)
    return said


def defined(source):
    "The first function of a cell whose name begins with check."
    functions = [n.name for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)]
    return next((name for name in functions if name.startswith("check")), None)


def fault(cells, at):
    "What is wrong with the exercise whose solution is cell `at`; None if nothing is."
    work = max((i for i in range(at) if cells[i][0] == "code"), default=None)
    check = defined(cells[work][1]) if work is not None else None
    if check is None:
        return "no check in the cell before the solution"
    starts = {a.id for call in calls(ast.parse(cells[work][1]), check) for a in call.args if isinstance(a, ast.Name)}
    if not starts:
        return f"{check} is not called with the reader's answer"
    if re.search("solved|right", cells[work][2]):
        return f"{check} is content with the start"
    hidden = []
    for kind, source, _ in cells[work + 1:]:
        if kind == "code" and re.search(rf"^def {check}\(", source, re.M):
            break
        hidden += [source] * (kind == "hide")
    tree = ast.parse("\n".join(hidden))
    if answers(tree, check) != {True, False}:
        return f"a hidden cell must assert {check} of the solution, and `not {check}` of the start"
    if not starts & {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}:
        return f"no hidden cell tries {check} on the start: {', '.join(sorted(starts))}"


def exercises(cells):
    "The cells with folded solutions, and what is wrong with each exercise."
    folded = [i for i, (kind, source, _) in enumerate(cells)
              if kind == "markdown" and re.search("<summary>[^<]*olution", source)]
    return {i: fault(cells, i) for i in folded}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_has_sound_exercises(path):
    found = exercises(read(path))
    if path.stem not in FEWER:
        assert {i: said for i, said in found.items() if said} == {}
    assert list(found.values()).count(None) >= FEWER.get(path.stem, LEAST)


def test_the_list_of_exceptions_is_true():
    assert {*FEWER} <= {path.stem for path in NOTEBOOKS}
    assert max(FEWER.values(), default=0) < LEAST


WORK = 'def two():\n    return 1\n\ndef check_two(f): return f() == 2\nprint("solved" if check_two(two) else "not yet")'
SOLUTION = "<details><summary>Solution</summary>\n\nreturn 2\n</details>"
HIDE = "#| hide\nassert check_two(lambda: 2)\nfor wrong in (two, lambda: 3): assert not check_two(wrong)"


@pytest.mark.parametrize("said, work, printed, hide", [
    (None, WORK, "not yet\n", HIDE),
    (None, WORK, "not yet\n", "#| hide\ntest_eq(check_two(lambda: 2), True)\ntest_eq(check_two(two), False)"),
    ("no check", WORK.replace("check", "test"), "", HIDE),
    ("is not called", WORK.replace("check_two(two)", "True"), "", HIDE),
    ("content with the start", WORK, "solved\n", HIDE),
    ("must assert", WORK, "not yet\n", HIDE.replace("assert not", "assert")),
    ("must assert", WORK, "not yet\n", HIDE.replace("assert check", "assert not check")),
    ("must assert", WORK, "not yet\n", HIDE.replace("assert ", "")),
    ("must assert", WORK, "not yet\n", ""),
    ("on the start", WORK, "not yet\n", HIDE.replace("(two, lambda: 3)", "(lambda: 3, lambda: 4)")),
])
def test_what_is_found(said, work, printed, hide):
    cells = [("code", work, printed), ("markdown", SOLUTION, ""), ("hide" if hide else "code", hide, "")]
    found = exercises(cells)
    assert [*found] == [1]
    assert found[1] is None if said is None else said in found[1]


def test_a_later_check_of_the_same_name_does_not_count():
    solution, again = ("markdown", SOLUTION, ""), ("code", WORK, "not yet\n")
    found = exercises([again, solution, again, solution, ("hide", HIDE, "")])
    assert "must assert" in found[1] and found[3] is None
