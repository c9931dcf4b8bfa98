# SPDX-License-Identifier: Apache-2.0
"""Which Megatron is refused, and that what is looked for is all that is used."""

import ast
import sys
import types
from pathlib import Path

import pytest

from megatron.mapl import versions
from megatron.mapl.patching import replace

PACKAGE = Path(versions.__file__).parent
#: The modules that are the training script of pretrain_gpt.py.
OWN_SCRIPT = {"gpt.py"}


@pytest.fixture
def megatron(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A stand-in for the installed one, which takes seconds to import."""
    core = types.ModuleType("megatron.core")
    core.__file__ = "/somewhere/megatron/core/__init__.py"
    core.there = types.SimpleNamespace(inner=1)  # type: ignore[attr-defined]
    info = types.ModuleType("megatron.core.package_info")
    info.__version__ = "0.19.2+deadbeef"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron.core", core)
    monkeypatch.setitem(sys.modules, "megatron.core.package_info", info)
    return info


HERE = {"megatron.core": ("there", "there.inner")}


@pytest.mark.parametrize("version", ["0.18.2", "0.18.9", "0.19.0rc0", "0.19.2+4ed2c71", "0.19.9"])
def test_a_version_of_the_tested_range(megatron: types.ModuleType, version: str) -> None:
    megatron.__version__ = version  # type: ignore[attr-defined]
    versions.check(HERE)


@pytest.mark.parametrize("version", ["0.17.1", "0.18.1", "0.20.0", "0.20.0rc0+4ed2c71", "1.0.0"])
def test_another_version(megatron: types.ModuleType, version: str) -> None:
    megatron.__version__ = version  # type: ignore[attr-defined]
    with pytest.raises(versions.UnsupportedMegatronError) as refused:
        versions.check(HERE)
    public = version.split("+")[0]
    assert f"Megatron {public} in /somewhere/megatron is outside of the tested" in str(
        refused.value
    )
    assert "use an unchanged release of that range" in str(refused.value)


def test_all_that_has_moved_is_named(megatron: types.ModuleType) -> None:
    moved = {
        "megatron.core": ("there.gone", "there", "away"),
        "megatron.nowhere.at_all": ("name",),
    }
    with pytest.raises(
        versions.UnsupportedMegatronError,
        match=r"Megatron 0\.19\.2 in /somewhere/megatron does not have "
        r"megatron\.core\.there\.gone, megatron\.core\.away, megatron\.nowhere\.at_all, "
        "which MAPL needs; use an unchanged",
    ):
        versions.check(moved)


def test_what_fails_while_it_is_imported_says_why(
    megatron: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs_another.py").write_text("import a_package_that_is_not_there\n")
    (tmp_path / "needs_a_name.py").write_text("from json import a_name_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        versions.UnsupportedMegatronError,
        match=r"does not have needs_another \(No module named 'a_package_that_is_not_there'\), "
        r"needs_a_name \(cannot import name 'a_name_that_is_not_there' from 'json' .*\), "
        "not_there, ",
    ):
        versions.check({"needs_another": ("it",), "needs_a_name": ("it",), "not_there": ("it",)})


def test_another_version_and_what_has_moved(megatron: types.ModuleType) -> None:
    megatron.__version__ = "0.21.0"  # type: ignore[attr-defined]
    with pytest.raises(
        versions.UnsupportedMegatronError,
        match=r"is outside of the tested range .* and does not have megatron\.core\.away",
    ):
        versions.check({"megatron.core": ("away",)})


def test_no_megatron_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core", None)  # importing it then fails
    with pytest.raises(
        versions.UnsupportedMegatronError, match=r"no Megatron .*; install megatron"
    ):
        versions.check(HERE)


def _used(file: Path) -> set[tuple[str, str]]:
    """(module, name) for all that a file imports from Megatron."""
    return {
        (str(node.module), alias.name)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        and str(node.module).startswith(("megatron.core", "megatron.training"))
        for alias in node.names
    }


def test_all_that_is_imported_is_looked_for() -> None:
    def listed(used: tuple[str, str], *tables: versions.Symbols) -> bool:
        module, name = used
        return any(
            f"{module}.{name}" in table  # a module
            or any(symbol.split(".")[0] == name for symbol in table.get(module, ()))
            for table in tables
        )

    files = [file for file in PACKAGE.glob("*.py") if file.name not in OWN_SCRIPT]
    used = {entry for file in files for entry in _used(file)}
    assert len(used) > 20
    assert not {entry for entry in used if not listed(entry, versions.SYMBOLS)}
    own = {entry for name in OWN_SCRIPT for entry in _used(PACKAGE / name)}
    both = versions.SYMBOLS, versions.SYMBOLS_OF_OWN_SCRIPT
    assert not {entry for entry in own if not listed(entry, *both)}


def test_what_is_replaced_is_looked_for() -> None:
    module = types.ModuleType("megatron.training.training")
    module.train = module.other = 1  # type: ignore[attr-defined]
    replace(module, "train", 2)
    assert module.train == 2
    with pytest.raises(AssertionError, match=r"does not list megatron\.training\.training: other"):
        replace(module, "other", 2)
