"""A hook of mkdocs: links from the documentation to files of the repository, which are not part of the site.

    TRANSFUSE_REPOSITORY=https://github.com/OWNER/transfuse mkdocs build

makes them links to that repository. Without the address they become plain text, so that the site has no broken link.
"""

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page's text with links that the site can follow."""
    return outward(markdown, Path(page.file.abs_src_path), os.environ.get("TRANSFUSE_REPOSITORY") or None)


def outward(markdown: str, page: Path, repository: str | None) -> str:
    """Return a page's text with its links to files outside docs/ led to `repository`; None: as plain text."""

    def link(match: re.Match[str]) -> str:
        file = (page.parent / match["target"]).resolve()
        if "://" in match["target"] or file.is_relative_to(ROOT / "docs") or not file.exists():
            return match[0]
        if repository is None:
            return match["text"]
        kind = "tree" if file.is_dir() else "blob"
        address = f"{repository.rstrip('/')}/{kind}/main/{file.relative_to(ROOT).as_posix()}"
        return f"[{match['text']}]({address}{match['anchor'] or ''})"

    return LINK.sub(link, markdown)
