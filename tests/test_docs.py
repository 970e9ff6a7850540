"""The pages in packages/*/docs: code runs, pictures are what the script draws now, and what a table names is there."""

import ast
import functools
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DATA_DOCS = ROOT / "packages" / "helios-data" / "docs"
PAGE = (DATA_DOCS / "how-it-works.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
PICTURES = runpy.run_path(str(DATA_DOCS / "draw.py"))["PICTURES"]


def test_there_is_something_to_test():
    assert len(BLOCKS) == 3
    assert set(re.findall(r"\(pictures/(\w+)\.svg\)", PAGE)) == set(PICTURES)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_code_runs(block):
    exec(block, {"__name__": "page"})


@pytest.mark.parametrize("name", PICTURES)
def test_the_pictures_show_what_is(name):
    assert (DATA_DOCS / "pictures" / f"{name}.svg").read_text(encoding="utf-8") == PICTURES[name]()


REFERENCE = ROOT / "packages" / "helios-trainer" / "docs" / "quick-reference.md"


@functools.cache
def names_in(path):
    """Names of classes, functions, attributes and constants that a module defines, as `Class.method`."""
    names = set()

    def look(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                names.add(prefix + child.name)
                if isinstance(child, ast.ClassDef):
                    look(child, f"{prefix}{child.name}.")
                elif prefix:  # a method, which gives its object attributes
                    look(child, prefix)
            elif isinstance(child, ast.Assign | ast.AnnAssign):
                for target in child.targets if isinstance(child, ast.Assign) else [child.target]:
                    for part in target.elts if isinstance(target, ast.Tuple) else [target]:
                        if isinstance(part, ast.Name) and not isinstance(node, ast.FunctionDef):
                            names.add(prefix + part.id)
                        elif isinstance(part, ast.Attribute) and getattr(part.value, "id", None) == "self":
                            names.add(prefix + part.attr)

    look(ast.parse(path.read_text(encoding="utf-8")), "")
    return names


@functools.cache
def test_files():
    """The test modules of the repository by name, which is unique."""
    paths = [*ROOT.glob("packages/*/tests/test_*.py"), *ROOT.glob("tests/test_*.py")]
    by_name = {path.name: path for path in paths}
    assert len(by_name) == len(paths)
    return by_name


test_files.__test__ = False


def problems_of(page):
    """What is wrong with a page of tables (number, statement, links to code, tests)."""
    problems, number = [], 0
    for line in page.splitlines():
        if line.startswith("## "):
            number = 0
        if not re.match(r"\| \d", line):
            continue
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) != 4:
            problems.append(f"not four cells: {line}")
            continue
        number += 1
        if cells[0] != str(number):
            problems.append(f"number {cells[0]} instead of {number}")
        links = re.findall(r"\[`([\w.]+)`\]\(([^)]+)\)", cells[2])
        tests = re.findall(r"`(test_\w+\.py)::(test_\w+)`", cells[3])
        if not (links and tests):
            problems.append(f"{number}: no code or no test")
        if len(links) != cells[2].count("[") or len(tests) != cells[3].count("::"):
            problems.append(f"{number}: cannot be read")
        for name, target in links:
            path = (REFERENCE.parent / target).resolve()
            if not path.is_file() or name not in names_in(path):
                problems.append(f"{number}: {name} is not in {target}")
        for file, test in tests:
            if file not in test_files() or test not in names_in(test_files()[file]):
                problems.append(f"{number}: there is no {file}::{test}")
    return problems


def test_the_quick_reference_names_what_is_there():
    page = REFERENCE.read_text(encoding="utf-8")
    assert problems_of(page) == []
    assert len(re.findall(r"^\| \d+ \|", page, re.MULTILINE)) > 150


@pytest.mark.parametrize(
    ("right", "wrong", "problem"),
    [
        ("[`FitRun.run`](", "[`FitRun.ran`](", "1: FitRun.ran is not in "),
        ("/_fit.py)", "/_fitted.py)", "1: FitRun.run is not in ../src/helios/trainer/_fitted.py"),
        ("::test_start_up_seeds_", "::test_start_up_seeded_", "1: there is no test_trainer_reference.py::"),
        ("test_trainer_reference.py::", "test_trainer_references.py::", "1: there is no test_trainer_ref"),
        ("| 2 |", "| 3 |", "number 3 instead of 2"),
        ("[`DEFAULT_SEED`](", "[DEFAULT_SEED](", "3: cannot be read"),
        (
            "| `test_trainer_reference.py::test_start_up_seeds_every_generator` |",
            "| - |",
            "1: no code or no test",
        ),
    ],
)
def test_control_a_table_that_is_wrong(right, wrong, problem):
    page = REFERENCE.read_text(encoding="utf-8")
    assert right in page
    assert any(problem in found for found in problems_of(page.replace(right, wrong, 1)))
