"""The part of the packaging that needs the repository's address: a package page has no files for README's links.

TRANSFUSE_REPOSITORY=https://github.com/OWNER/transfuse python -m build

makes them links to that repository at this version. Without the address they become plain text, and images are left
out, so that a package page never has a broken link. Everything else is in pyproject.toml.
"""

import os
import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
PAPER = "https://arxiv.org/abs/2408.11039"


def package_page(readme: str, repository: str | None, version: str) -> str:
    """Return README with absolute links only."""

    def link(match: re.Match[str]) -> str:
        target = match["target"]
        image = match[0].startswith(("!", "<img"))
        if "://" in target:
            return match[0]
        if repository is None:
            return "" if image else match["text"]
        kind = "raw" if image else "blob"
        page = "" if target.startswith("#") else f"/{kind}/v{version}/"
        start, end = (place - match.start() for place in match.span("target"))
        return f"{match[0][:start]}{repository.rstrip('/')}{page}{target}{match[0][end:]}"

    for pattern in (
        r"!?\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)",
        r'<a href="(?P<target>[^"]+)">(?P<text>.*?)</a>',
        r'<img [^>]*src="(?P<target>[^"]+)"[^>]*>',
    ):
        readme = re.sub(pattern, link, readme)
    return readme


def main() -> None:
    """Build with README and links for `TRANSFUSE_REPOSITORY`."""
    repository = os.environ.get("TRANSFUSE_REPOSITORY") or None
    (version,) = re.findall(r'__version__ = "(.*)"', (ROOT / "src/transfuse/version.py").read_text(encoding="utf-8"))
    links = {"Paper": PAPER}
    if repository:
        pages = {"Source": "", "Issues": "/issues", "Documentation": "/tree/main/docs"}
        pages["Changelog"] = "/blob/main/CHANGELOG.md"
        links |= {name: repository.rstrip("/") + page for name, page in pages.items()}
    setup(
        long_description=package_page((ROOT / "README.md").read_text(encoding="utf-8"), repository, version),
        long_description_content_type="text/markdown",
        project_urls=links,
    )


if __name__ == "__main__":
    main()
