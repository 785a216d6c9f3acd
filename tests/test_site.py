"""The documentation site: built strictly, whole, readable offline, every public name in it, its pictures up to date."""

from __future__ import annotations

import html
import importlib
import inspect
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
import torch

import aikd_losses
from aikd_losses import functional

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


class Page(HTMLParser):
    """Anchors of a page, where its links go, and what it fetches when it is opened."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.text = path.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if attributes.get("id"):
            self.anchors.add(attributes["id"])
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        elif tag == "link" and attributes.get("rel") not in ("canonical", "next", "prev"):
            self.fetched.append(attributes["href"])
        self.fetched += [attributes[name] for name in ("src", "srcset", "poster", "data") if attributes.get(name)]


@pytest.fixture(scope="module")
def site() -> Path:
    pytest.importorskip("zensical")
    done = subprocess.run([sys.executable, ROOT / "tools" / "site.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / "build" / "site"


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html")}


def test_every_page_of_docs_is_in_the_navigation_and_built(site):
    listed = set(re.findall(r'"([\w/-]+\.md)"', (ROOT / "zensical.toml").read_text()))
    assert listed == {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    for name in listed:
        assert (site / name).with_suffix(".html").exists()


def test_nothing_is_fetched_from_elsewhere(site, pages):
    for path, page in pages.items():
        for source in page.fetched:
            assert not re.match(r"(\w+:)?//", source), f"{path}: {source}"
        assert not re.search(r"(@import|url\()\s*['\"]?(\w+:)?//", page.text), path
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import\s*|url\()\s*['\"]?(https?:)?//", sheet.read_text()), sheet
    # With these the theme asks a host for stars, diagrams or a shim.
    assert not re.search("repo_url|mermaid|plugins.offline", (ROOT / "zensical.toml").read_text())


def test_every_link_and_resource_within_the_site_is_there(site, pages):
    for path, page in pages.items():
        if path.name == "404.html":  # whose links start at the root of a server
            continue
        for link in page.links + page.fetched:
            if re.match(r"\w+:", link):
                continue
            address, anchor = urldefrag(unquote(link))
            target = (path.parent / address).resolve() if address else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_relative_to(site), f"{path}: {link}"
            assert target.exists(), f"{path}: {link}"
            if anchor and target.suffix == ".html":
                assert anchor in pages[target].anchors, f"{path}: {link}"


def test_formulas_are_set_by_a_copy_of_katex_with_its_licence_and_fonts(site, pages):
    katex = site / "assets" / "katex"
    assert "Khan Academy" in (katex / "LICENSE").read_text()
    wanted = set(re.findall(r"url\((fonts/[\w-]+\.woff2)\)", (katex / "katex.min.css").read_text()))
    assert len(wanted) == 20
    assert all((katex / font).exists() for font in wanted)
    for name in ("deterministic", "progressive", "adversarial", "stack"):
        page = pages[site / "terms" / f"{name}.html"]
        assert 'class="arithmatex"' in page.text
        assert "../assets/katex/katex.min.js" in page.fetched
    for path, page in pages.items():  # none was left as it was written
        prose = re.sub(r"<(pre|code|script|style)\b.*?</\1>", "", page.text, flags=re.DOTALL)
        assert "$" not in prose.replace("$(", ""), path
        assert "--8&lt;--" not in prose, path


def test_every_public_name_and_method_is_in_the_reference_and_examples_are_code(site, pages):
    """Inherited methods too. `AIKDLoss` shows `__call__`, which names its tensors, in place of `forward(**tensors)`."""
    reference = pages[site / "reference.html"]
    names = [f"aikd_losses.{name}" for name in aikd_losses.__all__ if name != "functional"]
    names += [f"aikd_losses.functional.{name}" for name in functional.__all__]
    for name in list(names):
        thing = getattr(aikd_losses, name.split(".")[1])
        methods = inspect.getmembers(thing, inspect.isfunction) if inspect.isclass(thing) else ()
        ours = {x for x, y in methods if y.__module__.startswith("aikd_losses.") and not x.startswith("_")}
        names += [
            f"{name}.{method}"
            for method in ours - {"extra_repr", "train", "state_dict", "load_state_dict", "check_whole"}
        ]
    names[names.index("aikd_losses.AIKDLoss.forward")] = "aikd_losses.AIKDLoss.__call__"
    assert set(names) - reference.anchors == set()
    _, call, *_ = re.split(r'id="aikd_losses\.AIKDLoss\.(?:__call__|update)"', reference.text)
    terms = aikd_losses.AIKDLoss(4, 3, 2).terms.values()
    tensors = {name for term in terms for name in inspect.signature(term.forward).parameters}
    assert tensors <= set(re.findall(r"\w+", re.sub(r"<.*?>", "", call)))
    prose = re.sub(r"<(pre|code)\b.*?</\1>", "", reference.text, flags=re.DOTALL)
    assert ">>>" not in html.unescape(prose)
    assert "<blockquote>" not in prose


PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_that_people_copy_is_at_most_88_columns_wide(page):
    blocks = re.findall(r"^```(?:python|diff)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert [line for block in blocks for line in block.splitlines() if len(line) > 88] == []


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) < 90


def test_the_cheat_sheet_has_every_name_with_its_arguments_and_their_defaults():
    rows = re.findall(
        r"^\| (`\w+`(?:, `\w+`)*) \| (.*?) \|", (ROOT / "docs" / "cheatsheet.md").read_text(), re.MULTILINE
    )
    said = {}
    for names, arguments in rows:
        for name, given in zip(re.findall(r"\w+", names), arguments.split("; "), strict=True):
            said[name] = re.match(r"`([^`]*)`|", given)[1] or ""
    assert set(said) == set(aikd_losses.__all__)
    for name in set(said) - {"TargetStore", "functional"}:
        parameters = inspect.signature(getattr(aikd_losses, name)).parameters
        for parameter, default in re.findall(r"(\w+)(?:=(\([^)]*\)|[^,]+))?", said[name].replace("**", "")):
            value = eval(default, {"torch": torch}) if default else inspect.Parameter.empty
            assert parameters[parameter].default == value, (name, parameter)


def test_pictures_are_what_the_script_draws(tmp_path, monkeypatch):
    """The same text and shapes; numbers to a hundredth of the picture's width, as processors round differently."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    subprocess.run([sys.executable, ROOT / "tools" / "figures.py", "--out", tmp_path], check=True)
    figures = importlib.import_module("figures").FIGURES
    assert {path.name for path in tmp_path.iterdir()} == set(figures)
    for figure in figures:
        committed, now = (IMAGES / figure).read_text(), (tmp_path / figure).read_text()
        assert len(committed) < 60_000
        strip = [
            re.sub(r"#[\w-]+|id=\"\w+\"", "", text) for text in (committed, now)
        ]  # names are hashes of coordinates
        assert NUMBER.sub("", strip[0]) == NUMBER.sub("", strip[1]), figure
        for old, new in zip(*(NUMBER.findall(text) for text in strip), strict=True):
            assert float(old) == pytest.approx(float(new), abs=5), figure


def test_every_picture_is_shown_on_a_page():
    text = "".join(path.read_text() for path in (ROOT / "docs").rglob("*.md"))
    for picture in IMAGES.iterdir():
        assert f"images/{picture.name}" in text
