"""Export every notebook into an empty copy of the project and compare: finds hand-edited, missing and stale modules."""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "flashvsr_nb"


def modules(root):
    "The package's modules, all generated but `__init__.py`: file name to text."
    return {path.name: path.read_text(encoding="utf-8") for path in (root / PACKAGE).glob("*.py")}


def fresh_modules():
    "What `nbdev_export` makes of the notebooks alone."
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copy(ROOT / "settings.ini", copy)
        shutil.copytree(ROOT / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints", "images"))
        (copy / PACKAGE).mkdir()
        shutil.copy(ROOT / PACKAGE / "__init__.py", copy / PACKAGE)
        environment = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
        subprocess.run([sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"],
                       cwd=copy, check=True, env=environment)
        return modules(copy)


def differences():
    "One line for each module that the notebooks do not explain."
    stored, fresh = modules(ROOT), fresh_modules()
    problems = [f"{name}: no notebook exports it any more; delete it" for name in sorted({*stored} - {*fresh})]
    problems += [f"{name}: missing; run nbdev_export" for name in sorted({*fresh} - {*stored})]
    changed = sorted(name for name in {*stored} & {*fresh} if stored[name] != fresh[name])
    return problems + [f"{name}: differs from its notebook; run nbdev_export" for name in changed]


if __name__ == "__main__":
    found = differences()
    print("\n".join(found) or "modules and notebooks agree")
    sys.exit(bool(found))
