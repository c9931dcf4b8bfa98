# SPDX-License-Identifier: Apache-2.0
"""The documentation builds without a warning, and its links hold on a git host too.

Links to other sites are not fetched.
"""

import html
import logging
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.config.defaults import MkDocsConfig

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted(
    [
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        ROOT / "examples" / "llama" / "README.md",
    ]
)
LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)]*)\)")
FENCE = re.compile(r"^```.*?^```", re.M | re.S)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """Without blocks of code."""
    text = FENCE.sub("", page.read_text())
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^ {4}.*$", "", text, flags=re.M))


def headings(page: Path) -> set[str]:
    """Anchors as git hosts give them to headings."""
    lines = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_of_a_checkout(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        assert target == target.strip() and "\n" not in target, f"a broken line in {target!r}"
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target}: there is no {file}"
        assert file.is_relative_to(ROOT), target
        if anchor:
            assert anchor in headings(file), f"{target}: {name(file)} has no such heading"


def warnings_of(config: MkDocsConfig) -> list[str]:
    """Builds the site; what mkdocs warns of, which `make docs` (--strict) takes for an error."""
    warnings: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(record.getMessage())

    collector = Collector(logging.WARNING)
    logging.getLogger("mkdocs").addHandler(collector)
    try:
        build(config)
    finally:
        logging.getLogger("mkdocs").removeHandler(collector)
    return warnings


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    assert not warnings_of(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    return folder


class _Page(HTMLParser):
    """What a built page refers to, and the text of its paragraphs."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[tuple[str, str]] = []
        self.paragraphs: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for attribute, value in attributes:
            if attribute in ("href", "src") and value:
                self.targets.append((tag, value))
        if tag == "p":
            self._inside = True
            self.paragraphs.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "p"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.paragraphs[-1] += data


def built(site: Path) -> Iterator[tuple[Path, _Page]]:
    for path in sorted(site.rglob("*.html")):
        page = _Page()
        page.feed(path.read_text())
        yield path, page


def test_the_site_has_all_pages(site: Path) -> None:
    due = {path.stem for path in (ROOT / "docs").glob("*.md")}
    due |= {"recipes", "contributing", "changelog"}
    assert due <= {path.stem for path in site.glob("*.html")}


def test_links_of_the_site(site: Path) -> None:
    """All files that a page asks for are there: nothing is loaded from elsewhere."""
    for path, page in built(site):
        for tag, target in page.targets:
            if target.startswith(("https://", "http://", "mailto:")):
                assert tag == "a", f"{path.name} loads {target}"
                continue
            file = target.partition("#")[0].partition("?")[0]
            if path.name != "404.html" and file:
                assert (path.parent / file).exists(), f"{path.name}: {target}"


def test_lists_and_tables_are_read_as_such(site: Path) -> None:
    """What mkdocs reads otherwise than a git host shows up as text."""
    for path, page in built(site):
        for paragraph in page.paragraphs:
            lines = html.unescape(paragraph).strip().splitlines()
            wrong = [line for line in lines if re.match(r"\s*([-*] |\d+\. |\||#+ |```)", line)]
            assert not wrong, f"{path.name}: {wrong[0]!r} in {paragraph[:80]!r}"


@pytest.mark.parametrize("link", ["missing.md", "#missing", "limits.md#missing", "../README.md"])
def test_a_broken_link_is_an_error(tmp_path: Path, link: str) -> None:
    """By the settings of mkdocs.yml."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Title\n\n[there]({link})\n")
    (tmp_path / "docs" / "limits.md").write_text("# Limits\n")
    folders = {"docs_dir": str(tmp_path / "docs"), "site_dir": str(tmp_path / "site")}
    config = load_config(str(ROOT / "mkdocs.yml"), nav=None, hooks=[], **folders)
    assert any("index.md" in warning for warning in warnings_of(config))
