"""What stands around the code agrees with it: versions, workflows, hooks, forms, links, the changelog; what an import costs."""

from __future__ import annotations

import datetime
import json
import re
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import import_time
import pytest
import yaml

import aikd_losses

ROOT = Path(__file__).parent.parent
FORMS = sorted(ROOT.glob(".github/ISSUE_TEMPLATE/*.yml"))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob(".github/*.md")])


def text(name: str) -> str:
    return (ROOT / name).read_text()


def read(name: str):
    return yaml.safe_load(text(name))


def steps(workflow) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


# ------------------------------------------------------------------------------------------------------ continuous integration


def test_the_workflows_and_the_hooks_run_targets_that_the_makefile_has():
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))
    ci, release = (
        [step["run"] for step in steps(read(f".github/workflows/{name}.yml")) if "run" in step]
        for name in ("ci", "release")
    )
    hooks = [hook["entry"] for repo in read(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    used = {line: line.split()[1] for line in ci + release + hooks if line.startswith("make ")}
    assert set(used.values()) <= targets
    assert (
        {used[line] for line in ci}
        == {"test", "check"}
        == set(re.findall(r"^make (\w+)", text(".ci/run"), re.MULTILINE))
    )
    assert [used.get(line) for line in release] == [None, "test", "dist"]
    lint_types_dist = re.search(r"^check: (.+)$", text("Makefile"), re.MULTILINE)[1].split()
    assert {used[line] for line in hooks} == {*lint_types_dist, "test"} - {"dist"}


def test_the_hooks_fetch_nothing():
    for repo in read(".pre-commit-config.yaml")["repos"]:
        assert repo["repo"] == "local"
        assert {hook["language"] for hook in repo["hooks"]} == {"system"}


def test_the_pythons_that_are_tested_are_those_that_are_claimed():
    tested = read(".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    project = text("pyproject.toml")
    assert re.findall(r"Python :: (3\.\d+)\"", project) == tested
    assert re.search(r'requires-python = ">=(.+)"', project)[1] == tested[0]
    assert re.search(r'python_version = "(.+)"', project)[1] == tested[0]  # of mypy
    assert f'target-version = "py{tested[0].replace(".", "")}"' in project
    assert f"Python {tested[0]} or newer" in text("README.md")


def test_only_publishing_may_do_more_than_read():
    for name in ("ci", "release"):
        workflow = read(f".github/workflows/{name}.yml")
        assert workflow["permissions"] == {"contents": "read"}
        wider = {name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job}
        assert wider == ({} if name == "ci" else {"publish": {"id-token": "write"}})


# ------------------------------------------------------------------------------------------------------------------ papers


def test_the_citation_names_this_version_and_the_paper():
    citation = read("CITATION.cff")
    assert citation["version"] == aikd_losses.__version__
    (paper,) = citation["references"]
    listed = ", ".join(author["family-names"] for author in paper["authors"])
    said = " ".join(text("README.md").split())
    assert f"{listed}, *{paper['title']}*, {paper['journal']} {paper['volume']}, {paper['year']}" in said
    assert paper["identifiers"][0]["value"] in said
    assert "preferred-citation" not in citation  # tools would cite the paper in place of the software


def test_the_changelog_is_one():
    """The format of Keep a Changelog 1.1.0: versions newest first, each with its date; the kinds of change that it knows."""
    kinds = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
    head, *versions = re.split(r"^## ", text("CHANGELOG.md"), flags=re.MULTILINE)
    assert head.startswith("# Changelog\n")
    assert "keepachangelog.com/en/1.1.0" in head
    assert versions[0].startswith("[Unreleased]\n")
    found = []
    for version in versions[1:]:
        number, date = re.match(r"\[(\d+\.\d+\.\d+)\] - (\S+)\n", version).groups()
        found.append((datetime.date.fromisoformat(date), tuple(map(int, number.split(".")))))
    assert all(newer > older for newer, older in pairwise(found))
    for version in versions:
        sections = re.findall(r"^### (.+)$", version, re.MULTILINE)
        assert set(sections) <= set(kinds)
        assert len(set(sections)) == len(sections)


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_the_forms_can_be_filled_in(path):
    form = yaml.safe_load(path.read_text())
    if path.name == "config.yml":
        assert set(form) == {"blank_issues_enabled"}
        return
    assert {"name", "description", "body"} <= set(form)
    asked = [field for field in form["body"] if field["type"] != "markdown"]
    ids = [field["id"] for field in asked]
    assert len(set(ids)) == len(ids)
    assert all(field["attributes"]["label"] for field in asked)
    assert any(field.get("validations", {}).get("required") for field in asked)


def test_there_is_a_form_for_a_bug_a_wrong_number_and_a_feature():
    assert [path.stem for path in FORMS] == ["bug", "config", "feature", "wrong-number"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file(page):
    links = re.findall(r"\]\(([^)#\s]+)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_the_files_and_targets_that_contributing_names_are_there():
    said = text("CONTRIBUTING.md")
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", said)) <= targets
    table = [row.split("|")[1] for row in said.splitlines() if row.startswith("| `")]
    places = [place for cell in table for place in re.findall(r"`([^`]+)`", cell)]
    package = ROOT / "src" / "aikd_losses"
    assert {place for place in places if not ((package / place).exists() or (ROOT / place).exists())} == set()
    assert {path.name for path in package.glob("*.py")} - {"__init__.py"} <= set(places)


# ------------------------------------------------------------------------------------------------- what the library weighs

SNIPPET = '''"""Two lines
of a docstring."""

import math  # code, whatever stands behind it


def area(r):
    """Not code."""
    # nor this
    text = """code,

    also where it is empty"""
    return (
        math.pi * r**2
    )
'''


def weighed(folder: Path) -> tuple[int, list[str]]:
    command = [sys.executable, ROOT / "tools" / "weight.py", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def test_lines_of_code_are_neither_docstring_nor_comment_nor_blank(tmp_path):
    (tmp_path / "snippet.py").write_text(SNIPPET)
    code, said = weighed(tmp_path)
    assert [line.split() for line in said[1:3]] == [["snippet.py", "15", "8", "260"], ["all", "15", "8", "3,430"]]
    assert (code, said[3:]) == (0, ["within the budget"])


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"long.py": "#\n" * 261}, ["long.py has 261 lines, 1 too many"]),
        ({"schedules.py": "#\n" * 100}, ["schedules.py has 100 lines, 25 too many"]),
        ({f"{i}.py": "#\n" * 250 for i in range(14)}, ["all have 3,500 lines, 70 too many"]),
        ({f"{i}.py": "x = 1\n" * 200 for i in range(12)}, ["all have 2,400 lines of code, 130 too many"]),
    ],
    ids=["any file", "a file with a budget", "lines", "code"],
)
def test_what_is_over_its_budget_is_named_and_fails(files, said, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    code, printed = weighed(tmp_path)
    assert (code, printed[2 + len(files) :]) == (1, said)


def test_every_budget_is_of_a_file_that_is_there():
    names = re.findall(r'^    "(\w+\.py)": \d+,$', text("tools/weight.py"), re.MULTILINE)
    assert sorted(names) == sorted(path.name for path in (ROOT / "src" / "aikd_losses").glob("*.py"))


# ------------------------------------------------------------------------------------------------ what an import costs


@pytest.mark.slow
def test_importing_takes_less_than_50_ms_beyond_torch_and_einops(tmp_path):
    """The best of some runs: a busy machine makes a process slower, never faster."""
    path = import_time.installed(tmp_path)
    assert any(import_time.beyond_torch(path) < 50 for _ in range(6))


def test_the_measured_import_is_of_the_copy_and_read_as_python_prints_it(tmp_path):
    report = (
        "import time: self [us] | cumulative | imported package\n"
        "import time:       900 |       1500 |   aikd_losses.data\n"
        "import time:       700 |      12345 | aikd_losses\n"
    )
    assert import_time.cumulative(report, "aikd_losses") == 12.345
    path = import_time.installed(tmp_path)
    (path / "aikd_losses" / "__init__.py").write_text("import sys; sys.stderr.write('the copy')")
    assert "the copy" in import_time.run("import aikd_losses", path)[1]
    assert list(path.rglob("*.pyc"))


def test_the_import_that_contributing_speaks_of_is_the_one_that_was_measured():
    rows = [row["aikd_losses"] for row in json.loads(text("benchmarks/results/import_time.json"))["rows"]]
    said = f"{min(rows):.0f} ms at best and {statistics.median(rows):.0f} ms in the median ({len(rows)} runs"
    assert said in " ".join(text("CONTRIBUTING.md").split())
