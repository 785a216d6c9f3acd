"""Build the documentation into build/site, readable offline: `make docs`.

Zensical builds the pages (zensical.toml) and fails on a broken link. KaTeX, which sets the formulas in the reader's browser, is
copied from a package that carries its distribution; nothing else of that package is used. A link that leaves docs/ gets a copy
of what it points to.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).parent.parent
SITE = ROOT / "build" / "site"
CARRIER = "djangocms-katex"
KATEX = ("LICENSE", "katex.min.css", "katex.min.js", ".woff2")
LINK = re.compile(r'<a href="([^":#]+)">(.*?)</a>', re.DOTALL)


def main() -> None:
    shutil.rmtree(SITE, ignore_errors=True)
    done = subprocess.run([sys.executable, "-m", "zensical", "build", "--strict", "--clean"], cwd=ROOT)
    if done.returncode or not (SITE / "index.html").exists():
        sys.exit(done.returncode or "zensical built nothing.")
    copy_katex(SITE / "assets" / "katex")
    for page in SITE.rglob("*.html"):
        text = page.read_text()
        own = LINK.sub(lambda link, page=page: inside(page, link), text)
        if own != text:
            page.write_text(own)


def copy_katex(to: Path) -> None:
    try:
        files = importlib.metadata.files(CARRIER)
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"KaTeX is not there. Run `pip install --no-deps -c constraints.txt {CARRIER}`, or `make docs`.")
    for file in files or ():
        _, found, name = str(file).partition("/vendor/katex/")
        if found and name.removeprefix("fonts/").endswith(KATEX):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(str(file.locate()), to / name)


def inside(page: Path, link: re.Match[str]) -> str:
    """A link to a file of the repository becomes one to a copy of it, one to a folder becomes its text."""
    href, text = link.groups()
    target = (page.parent / unquote(href)).resolve()
    if target.is_relative_to(SITE):
        return link.group()
    source = (ROOT / "docs" / page.relative_to(SITE).parent / unquote(href)).resolve()
    if not source.is_relative_to(ROOT) or not source.exists():
        sys.exit(f"{page.relative_to(SITE)} links to {href}, which is not there.")
    if source.is_dir():
        return text
    copy = SITE / "files" / source.relative_to(ROOT)
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, copy)
    up = "../" * len(page.relative_to(SITE).parent.parts)
    return f'<a href="{up}files/{source.relative_to(ROOT)}">{text}</a>'


if __name__ == "__main__":
    main()
