"""The tests are a mirror of the code: whoever knows a module finds its tests, and the other way."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.harness.trixie import CHECKOUT

UNIT = CHECKOUT / "tests/unit"
LINES = 500


def modules_of(test: Path) -> list[Path]:
    """The modules that a test may be named for: test_ledger_siblings for ledger."""
    words = test.stem.removeprefix("test_").split("_")
    names = ["_".join(words[:count]) for count in range(1, len(words) + 1)]
    folder = CHECKOUT / "workerd" / test.parent.relative_to(UNIT)
    return [path for name in names if (path := folder / f"{name}.py").exists()]


def test_a_unit_test_is_named_for_the_module_that_it_tests() -> None:
    """`test_MODULE.py`, or `test_MODULE_SUBJECT.py` where a module needs several."""
    strangers = [path for path in UNIT.rglob("test_*.py") if not modules_of(path)]
    assert strangers == []


@pytest.mark.parametrize("folder", ["broker", "system", "campaign", "project"])
def test_nothing_but_scenarios_stands_beside_the_unit_tests(folder: str) -> None:
    inside = [path for path in (CHECKOUT / "tests" / folder).iterdir() if path.suffix == ".py"]
    assert [path.name for path in inside if not path.name.startswith("test_")] == []


def test_no_test_file_is_long() -> None:
    tests = (CHECKOUT / "tests").rglob("test_*.py")
    assert {str(path.relative_to(CHECKOUT)) for path in tests if long(path)} == set()


def long(path: Path) -> bool:
    return len(path.read_text().splitlines()) > LINES


PACKAGES = [
    *sorted(path.parent for path in (CHECKOUT / "workerd").rglob("__init__.py")),
    CHECKOUT / "tests/harness",
]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_a_package_says_what_each_of_its_modules_is(package: Path) -> None:
    """Indented lines of its docstring: a module or a package, two spaces or more, what it is."""
    tree = ast.parse((package / "__init__.py").read_text())
    text = ast.get_docstring(tree, clean=False) or ""
    listed = re.findall(r"^ {4}(\w+) {2,}\S", text, re.MULTILINE)
    there = {path.stem for path in package.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert len(listed) == len(set(listed))
    assert set(listed) == there - {"__init__", "__main__", "__pycache__"}
