"""docs/reliability.md and the planted bugs agree, and name code and tests that exist."""

import re
from pathlib import Path

import pytest

from tests.harness.trixie import CHECKOUT
from tests.mutants.catalogue import Mutant, load, table

# The faults that the catalogue of docs/reliability.md must show.
ROWS = {
    *range(1, 68),
    *range(69, 73),
    79,
    80,
    87,
    88,
    89,
    92,
    98,
    99,
}
# A fault that no test shows: 68.


def test_every_fault_has_a_test_and_a_bug_that_it_catches() -> None:
    assert ROWS - {mutant.row for mutant in load()} == set()


@pytest.mark.parametrize("mutant", load(), ids=lambda mutant: mutant.fault[:50])
def test_a_planted_bug_can_still_be_planted(mutant: Mutant) -> None:
    assert (CHECKOUT / mutant.file).read_text().count(mutant.find) == 1, mutant.find
    assert mutant.find != mutant.replace
    path, _, name = mutant.test.partition("::")
    name = re.sub(r"\[.*", "", name)
    assert re.search(rf"^def {name}\(", (CHECKOUT / path).read_text(), re.MULTILINE), mutant.test


def test_the_table_is_current() -> None:
    text = Path(CHECKOUT, "docs", "reliability.md").read_text()
    assert table() in text, "python -m tests.mutants table"
