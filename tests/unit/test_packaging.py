# SPDX-License-Identifier: Apache-2.0
"""The distribution: one namespace `megatron` shared with megatron-core, and one arrow of imports.

Imports are tried in fresh interpreters, since what pytest itself has imported proves nothing.
"""

import ast
import importlib.metadata
import os
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PACKAGES = ("mapl", "megatron/mapl")

IMPORT_TOGETHER = """
import megatron.core, megatron.training, megatron.mapl, mapl
import megatron
assert getattr(megatron, "__file__", None) is None, f"megatron is no namespace: {megatron}"
print("FOUND", megatron.mapl.__file__)
print("FOUND", mapl.__file__)
"""

IMPORT_MAPL_ALONE = """
import importlib, pkgutil, sys
import mapl
for module in pkgutil.walk_packages(mapl.__path__, "mapl."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print("LEAKED", sorted(name for name in sys.modules if name.split(".")[0] == "megatron"))
"""


def python(code: str, *, cwd: Path, path: Path | None) -> list[str]:
    """Run `code` with no path but `path` and the environment's own; return what it printed."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def import_together(*, cwd: Path, path: Path | None) -> list[Path]:
    lines = python(IMPORT_TOGETHER, cwd=cwd, path=path)
    return [Path(line.removeprefix("FOUND ")) for line in lines if line.startswith("FOUND ")]


def sources(root: Path) -> set[Path]:
    return {
        file.relative_to(root) for package in PACKAGES for file in (root / package).rglob("*.py")
    }


def imported_names(file: Path) -> set[str]:
    """Every module that `file` names in an import statement or in a call of import_module.

    Of `from a import b` both a and a.b, which may be one.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), filename=str(file))):
        match node:
            case ast.Import():
                names.update(alias.name for alias in node.names)
            case ast.ImportFrom(module=str(module), level=0):
                names.update([module, *(f"{module}.{alias.name}" for alias in node.names)])
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                names.add(module)
    return names


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as a regular install, built from a copy: a build writes beside its sources."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (REPO / name).exists():
            shutil.copy(REPO / name, copy)
    for package in PACKAGES:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPO / package, copy / package, ignore=ignore)
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*pip, "--no-index", "--quiet", "--target", str(target), str(copy)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return target


def test_installed_beside_megatron_core(installed: Path, tmp_path: Path) -> None:
    assert import_together(cwd=tmp_path, path=installed) == [
        installed / "megatron/mapl/__init__.py",
        installed / "mapl/__init__.py",
    ]


def test_source_tree_beside_megatron_core() -> None:
    assert import_together(cwd=REPO, path=REPO) == [
        REPO / "megatron/mapl/__init__.py",
        REPO / "mapl/__init__.py",
    ]


def test_editable_install_beside_megatron_core(tmp_path: Path) -> None:
    try:
        importlib.metadata.distribution("mapl-megatron")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("mapl-megatron is not installed in this environment; `make setup` does it")
    assert import_together(cwd=tmp_path, path=None) == [
        REPO / "megatron/mapl/__init__.py",
        REPO / "mapl/__init__.py",
    ]


def test_every_module_is_installed(installed: Path) -> None:
    assert sources(installed) == sources(REPO)
    top_level = {entry.name for entry in installed.iterdir() if not entry.name.endswith("-info")}
    assert top_level == {"mapl", "megatron"}


def test_megatron_stays_a_namespace() -> None:
    assert not (REPO / "megatron/__init__.py").exists()
    assert [entry.name for entry in (REPO / "megatron").iterdir() if entry.is_dir()] == ["mapl"]
    assert not [path for path in (REPO / "tests").rglob("megatron*") if path.is_dir()]


def test_mapl_names_no_megatron_module() -> None:
    names = {file: imported_names(file) for file in (REPO / "mapl").rglob("*.py")}
    assert names
    offenders = {
        f"{file.relative_to(REPO)}: {name}"
        for file, found in names.items()
        for name in found
        if name.split(".")[0] == "megatron"
    }
    assert not offenders


def test_no_module_of_mapl_imports_what_imports_it() -> None:
    """Not in a function either. A package that a module stands in does not count."""
    files = {
        ".".join(file.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__"): file
        for file in (REPO / "mapl").rglob("*.py")
    }
    graph = {
        name: {n for n in imported_names(file) & files.keys() if not name.startswith(f"{n}.")}
        for name, file in files.items()
    }
    assert graph["mapl.ops.scatter"] > {"mapl.ops.dispatch", "mapl.ops.kernels.scatter"}
    TopologicalSorter(graph).prepare()  # raises a CycleError that names the circle


@pytest.mark.parametrize(
    "statement",
    [
        "import megatron.core as core",
        "from megatron.core.utils import log",
        "from megatron import mapl",
        "import importlib; importlib.import_module('megatron.core')",
        "def f():\n    from importlib import import_module\n    import_module('megatron.mapl')",
    ],
)
def test_the_walk_sees_each_form_of_import(statement: str, tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(statement, encoding="utf-8")
    assert "megatron" in {name.split(".")[0] for name in imported_names(file)}


def test_mapl_alone_loads_no_megatron() -> None:
    assert python(IMPORT_MAPL_ALONE, cwd=REPO, path=REPO)[-1] == "LEAKED []"
