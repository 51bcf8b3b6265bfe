"Packaging: every setting lives in settings.ini; edit there, not here."
import runpy
import shutil
from configparser import ConfigParser
from pathlib import Path

import setuptools
from setuptools.command.build_py import build_py

parser = ConfigParser(delimiters=["="])
parser.read("settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
package = cfg["lib_path"]
suffix = "_requirements"
extras = {key.removesuffix(suffix): cfg[key].split() for key in cfg if key.endswith(suffix)}
extras["all"] = sorted({need for name, needs in extras.items() if name not in ("dev", "site") for need in needs})


class BuildWithCourse(build_py):
    "Puts the notebooks and what they read into a wheel; an editable install reads them where they are."

    def run(self):
        super().run()
        if self.editable_mode or not Path("nbs").is_dir():
            return
        files = runpy.run_path(f"{package}/lab.py")["course_files"](Path.cwd())
        for name, path in files.items():
            target = Path(self.build_lib, package, "course", name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


setuptools.setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license={"apache2": "Apache-2.0"}[cfg["license"]],
    url=cfg["git_url"],
    keywords=cfg["keywords"].split(),
    python_requires=">=" + cfg["min_python"],
    packages=setuptools.find_packages(include=[package, package + ".*"]),
    package_data={package: cfg["package_data"].split()},
    cmdclass={"build_py": BuildWithCourse},
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{package}={package}._modidx:d"],
    },
)
