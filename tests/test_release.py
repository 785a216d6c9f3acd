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
from weight import BUDGETS, CODE, LINES

import aikd_losses

ROOT = Path(__file__).parent.parent
WORKFLOW = ".github/workflows/%s.yml"
FORMS = sorted(ROOT.glob(".github/ISSUE_TEMPLATE/*.yml"))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob(".github/*.md")])


def text(name: str) -> str:
    return (ROOT / name).read_text()


def read(name: str):
    return yaml.safe_load(text(name))


def read_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))


def steps(workflow) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


# ------------------------------------------------------------------------------------------------------ continuous integration


def test_the_workflows_and_the_hooks_run_targets_that_the_makefile_has_and_hooks_fetch_nothing():
    def made(lines):
        return [line.split()[1] if line.startswith("make ") else None for line in lines]

    repos = read(".pre-commit-config.yaml")["repos"]
    hooks = [hook for repo in repos for hook in repo["hooks"]]
    assert {repo["repo"] for repo in repos} | {hook["language"] for hook in hooks} == {"local", "system"}
    ci, release = ([x["run"] for x in steps(read(WORKFLOW % name)) if "run" in x] for name in ("ci", "release"))
    of_ci = set(re.findall(r"^make ([\w-]+)", text(".ci/run"), re.MULTILINE))
    assert set(made(ci)) == {"test", "gpu-rehearsal", "check"} == of_ci
    assert made(release) == [None, "test", "dist"]
    lint_types_dist = re.search(r"^check: ([^#]+)", text("Makefile"), re.MULTILINE)[1].split()
    assert set(made(hook["entry"] for hook in hooks)) - {None} == {*lint_types_dist, "test"} - {"dist"}
    assert {*lint_types_dist, "test", "dist"} <= read_targets()


def test_bare_make_lists_every_target_with_what_it_does():
    done = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [re.fullmatch(r"make ([a-z-]+) +(\S.*)", line) for line in done.stdout.splitlines()]
    assert None not in rows
    assert [row[1] for row in rows] == list(dict.fromkeys(row[1] for row in rows))
    phony = {name for line in re.findall(r"^\.PHONY: (.+)$", text("Makefile"), re.MULTILINE) for name in line.split()}
    assert {row[1] for row in rows} == read_targets() == phony


def test_the_pythons_that_are_tested_are_those_that_are_claimed():
    tested = read(WORKFLOW % "ci")["jobs"]["test"]["strategy"]["matrix"]["python"]
    project = text("pyproject.toml")
    assert re.findall(r"Python :: (3\.\d+)\"", project) == tested
    assert re.search(r'requires-python = ">=(.+)"', project)[1] == tested[0]
    assert re.search(r'python_version = "(.+)"', project)[1] == tested[0]  # of mypy
    assert f'target-version = "py{tested[0].replace(".", "")}"' in project
    assert f"Python {tested[0]} or newer" in text("README.md")


def test_the_lowest_versions_that_are_declared_are_those_that_make_oldest_ran_with():
    extras = re.compile(r"^(?:dependencies|examples|suite) = \[(.*?)\]$", re.MULTILINE | re.DOTALL)
    declared = re.findall(r'"([a-z-]+)>=([\d.]+)"', "".join(extras.findall(text("pyproject.toml"))))
    ran = text("benchmarks/results/oldest.txt")  # which is not whole yet where this runs in `make oldest`
    installed = re.findall(r"^([a-z-]+)>=([\d.]+): ([\d.]+)", ran, re.MULTILINE)
    assert sorted(declared) == sorted((name, bound) for name, bound, _ in installed)
    assert [x for x in installed if not re.fullmatch(rf"{re.escape(x[1])}(\.\d+)*", x[2])] == []
    assert re.search(r"^\d+ failed", ran, re.MULTILINE) is None
    lowest = dict(declared)["torch"]
    assert f"torch>={lowest}" in text("README.md")
    assert f"torch {lowest} or newer" in text("CHANGELOG.md")


def test_only_publishing_may_do_more_than_read():
    for name, expected in (("ci", {}), ("release", {"publish": {"id-token": "write"}})):
        workflow = read(WORKFLOW % name)
        assert workflow["permissions"] == {"contents": "read"}
        assert {job: x["permissions"] for job, x in workflow["jobs"].items() if "permissions" in x} == expected


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


def test_there_is_a_form_for_a_bug_a_wrong_number_and_a_feature_which_can_be_filled_in():
    forms = {path.stem: yaml.safe_load(path.read_text()) for path in FORMS}
    assert set(forms.pop("config")) == {"blank_issues_enabled"}
    assert list(forms) == ["bug", "feature", "wrong-number"]
    for form in forms.values():
        assert {"name", "description", "body"} <= set(form)
        asked = [field for field in form["body"] if field["type"] != "markdown"]
        assert len({field["id"] for field in asked}) == len(asked)
        assert all(field["attributes"]["label"] for field in asked)
        assert any(field.get("validations", {}).get("required") for field in asked)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file(page):
    links = re.findall(r"\]\(([^)#\s]+)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_the_files_and_targets_that_contributing_names_are_there():
    said = text("CONTRIBUTING.md")
    assert set(re.findall(r"`make ([a-z-]+)", said)) <= read_targets()
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


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"snippet.py": SNIPPET}, ["within the budget"]),
        ({"long.py": "#\n" * 261}, ["long.py has 261 lines, 1 too many"]),
        ({"schedules.py": "#\n" * 150}, [f"schedules.py has 150 lines, {150 - BUDGETS['schedules.py']} too many"]),
        ({f"{i}.py": "#\n" * 250 for i in range(14)}, [f"all have 3,500 lines, {3500 - LINES:,} too many"]),
        ({f"{i}.py": "x = 1\n" * 200 for i in range(12)}, [f"all have 2,400 lines of code, {2400 - CODE:,} too many"]),
    ],
    ids=["nothing", "any file", "a file with a budget", "lines", "code"],
)
def test_what_is_over_its_budget_is_named_and_fails(files, said, tmp_path):
    """Lines of code are neither docstring nor comment nor blank."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    command = [sys.executable, ROOT / "tools" / "weight.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    printed = done.stdout.splitlines()
    assert (done.stderr, printed[2 + len(files) :], done.returncode) == ("", said, said != ["within the budget"])
    if "snippet.py" in files:
        assert [" ".join(line.split()) for line in printed[1:3]] == ["snippet.py 15 8 260", f"all 15 8 {LINES:,}"]


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
