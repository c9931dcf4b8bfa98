# SPDX-License-Identifier: Apache-2.0
"""Replacing names in other people's code: loud when a name has moved, and only where it is due."""

import types
from typing import ClassVar

import pytest
from packaging.specifiers import SpecifierSet

from megatron.mapl import upstream
from megatron.mapl.patching import replace


def test_replace() -> None:
    owner = types.ModuleType("somebody.elses")
    owner.name = 1  # type: ignore[attr-defined]
    replace(owner, "name", 2)
    assert owner.name == 2


def test_a_missing_name_in_a_module_is_named() -> None:
    owner = types.ModuleType("somebody.elses")
    with pytest.raises(RuntimeError, match=r"somebody\.elses\.moved is not there .*requirements"):
        replace(owner, "moved", 2)
    assert not hasattr(owner, "moved")


def test_a_missing_name_in_a_class_is_named() -> None:
    class Owner: ...

    with pytest.raises(RuntimeError, match=r"Owner\.moved is not there"):
        replace(Owner, "moved", 2)


@pytest.mark.parametrize("mend", upstream.MENDS, ids=lambda mend: mend.apply.__name__)
def test_every_mend_names_its_fault_and_its_versions(mend: upstream.Mend) -> None:
    assert len(mend.fault) > 20
    versions = SpecifierSet(mend.versions)
    assert "0.19.2" in versions
    operators = {version.operator for version in versions}
    assert ">=" in operators and "<" in operators, "a range has both ends"


@pytest.mark.parametrize(
    ("version", "applied"),
    [("0.19.2", True), ("0.17.0", True), ("0.16.1", False), ("0.20.0", False)],
)
def test_mends_apply_to_their_versions_alone(
    monkeypatch: pytest.MonkeyPatch, version: str, applied: bool
) -> None:
    done = []
    mend = upstream.Mend("a fault", ">=0.17,<0.20", lambda: done.append(True))
    monkeypatch.setattr(upstream, "MENDS", (mend,))
    monkeypatch.setattr(upstream.versions, "installed", lambda: version)
    upstream.install()
    assert done == [True] * applied


def test_a_mend_whose_symbol_has_moved_refuses_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    mend = upstream.Mend("a fault", ">=0", lambda: replace(types.ModuleType("core"), "gone", 1))
    monkeypatch.setattr(upstream, "MENDS", (mend,))
    with pytest.raises(RuntimeError, match=r"core\.gone is not there"):
        upstream.install()


def test_groups_without_parameters_keep_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron copies group by group; a checkpoint has no list where a stage has no parameter."""

    class Optimizer:
        fp32_from_float16_groups: ClassVar[list[list[str]]] = [[], ["a"], [], ["b", "c"]]

        def sharded_state_dict(self) -> dict[str, list[list[str]]]:
            return {"fp32_from_fp16_params": self.fp32_from_float16_groups, "optimizer": []}

        def load_state_dict(self, state: dict[str, list[list[str]]]) -> None:
            self.loaded = state.get("fp32_from_fp16_params")

    from megatron.core.optimizer import optimizer as module

    monkeypatch.setattr(module, "Float16OptimizerWithFloat16Params", Optimizer)
    monkeypatch.setattr(upstream, "replace", setattr)
    upstream._resume_beside_empty_groups()
    ours = Optimizer()
    saved = ours.sharded_state_dict()
    assert saved == {"fp32_from_fp16_params": [["a"], ["b", "c"]], "optimizer": []}
    for saved in ([["A"], ["B", "C"]], [[], ["A"], [], ["B", "C"]]):
        ours.load_state_dict({"fp32_from_fp16_params": saved})
        assert ours.loaded == [[], ["A"], [], ["B", "C"]]
    for other in ({}, {"fp32_from_fp16": []}):  # not of this version
        ours.load_state_dict(other)
        assert ours.loaded is None
    ours.fp32_from_float16_groups = [[], []]
    saved = ours.sharded_state_dict()
    assert saved == {"optimizer": []}
    ours.load_state_dict(saved)
    assert ours.loaded == [[], []]
