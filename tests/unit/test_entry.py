# SPDX-License-Identifier: Apache-2.0
"""`python -m megatron.mapl`: what it makes of its arguments before Megatron is imported."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.mapl import __main__ as entry


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: python -m megatron.mapl SCRIPT"),
        (["--mapl-rank", "8"], "--mapl-rank is no file; name the training script first"),
        (["missing.py"], "missing.py is no file; name the training script first"),
    ],
)
def test_without_a_script(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        entry.main(arguments)
    assert stopped.value.code
    printed = capsys.readouterr()
    assert message in printed.out + printed.err + str(stopped.value.code)


def test_the_script_runs_as_python_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name, its arguments, its neighbours."""
    (tmp_path / "neighbour_of_a_script.py").write_text("FOUND = 'neighbour'")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from neighbour_of_a_script import FOUND\n"
        "assert __name__ == '__main__' and sys.modules['__main__'].__dict__ is globals()\n"
        "Path(__file__).with_suffix('.out').write_text(' '.join([FOUND, *sys.argv]))\n"
    )
    scripts: list[Callable[[], object]] = []
    monkeypatch.setattr(entry.session, "run", scripts.append)
    monkeypatch.setattr(sys, "argv", ["python -m megatron.mapl"])
    monkeypatch.setattr(sys, "path", ["/where/python/was/started", *sys.path[1:]])
    entry.main([str(script), "--mapl-rank", "8"])
    assert sys.path[0] == str(tmp_path)
    scripts[0]()
    assert (tmp_path / "script.out").read_text() == f"neighbour {script} --mapl-rank 8"


def test_without_an_install_our_own_modules_stay_to_be_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started in a checkout of this project, whose directory the script's takes the place of."""
    script = tmp_path / "script.py"
    script.touch()
    monkeypatch.setattr(entry.session, "run", lambda script: None)
    monkeypatch.setattr(entry, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["python -m megatron.mapl"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    entry.main([str(script)])
    assert (Path(sys.path[-1]) / "mapl" / "boundary.py").exists()
    assert sys.path[0] == str(tmp_path)
