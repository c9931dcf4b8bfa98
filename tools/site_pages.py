# SPDX-License-Identifier: Apache-2.0
"""A hook of mkdocs: pages that stand outside docs/, and links that hold in both places.

On a git host a link is a path from the file that it stands in, so a page in docs/ names a recipe as
`../examples/llama/README.md`, and that page names a page of docs/ as `../../docs/NAME.md`. mkdocs
knows docs/ alone. So the pages of `OUTSIDE` become pages of the site, and links between them and
docs/ are rewritten. Links to any other file outside docs/ stay as they are, which mkdocs reports.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).resolve().parent.parent
_DOCS = "docs/"

#: Path in the repository → path in the site, of pages that are not in docs/.
OUTSIDE = {
    "examples/llama/README.md": "recipes.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
_HOME = {site: source for source, site in OUTSIDE.items()}
_LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#])")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages from outside docs/."""
    for source, site in OUTSIDE.items():
        text = (_ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, site, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrites the links of one page from paths in the repository to paths in the site."""
    source = _HOME.get(page.file.src_uri, _DOCS + page.file.src_uri)
    folder = posixpath.dirname(source)

    def rewritten(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        if target in OUTSIDE:
            return OUTSIDE[target]
        return target.removeprefix(_DOCS) if target.startswith(_DOCS) else match[1]

    return _LINK.sub(rewritten, markdown)
