"""The documentation builds as a site, without network, without warnings and without a dead link."""

import html
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("site_links", ROOT / "tools" / "site_links.py")
assert spec is not None
assert spec.loader is not None
site_links = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site_links)


def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert "layout_document" in (tmp_path / "api" / "sequence.html").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert (tmp_path / f"{page.stem}.html").is_file(), f"{page.name} is missing in the navigation of mkdocs.yml"
    dead = []
    for path in [*tmp_path.glob("*.html"), *tmp_path.glob("api/*.html")]:
        for target in re.findall(r'(?:href|src)="([^"#]+)', path.read_text(encoding="utf-8")):
            local = "://" not in target and not target.startswith(("data:", "mailto:", "/", "javascript:"))
            if local and not (path.parent / unquote(html.unescape(target)).partition("?")[0]).exists():
                dead.append(f"{path.name}: {target}")
    assert not dead


def test_links_to_the_repository() -> None:
    """A file, a folder, one with an anchor; what is in the site or elsewhere stays."""
    page = ROOT / "docs" / "api" / "model.md"
    text = "[a](../../LICENSE) [b](../../tests/unit#x) [c](../index.md) [d](https://e.org/f) [g](#h) [i](missing.md)"
    kept = "[c](../index.md) [d](https://e.org/f) [g](#h) [i](missing.md)"
    assert site_links.outward(text, page, None) == f"a b {kept}"
    led = "[a](https://x.org/o/t/blob/main/LICENSE) [b](https://x.org/o/t/tree/main/tests/unit#x)"
    assert site_links.outward(text, page, "https://x.org/o/t/") == f"{led} {kept}"
