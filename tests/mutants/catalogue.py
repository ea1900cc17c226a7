"""The planted bugs as they stand in the TOML files, and as the table of docs/reliability.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tomli

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Mutant:
    """A bug: in `file`, the text `find`, which is there once, becomes `replace`.

    `test` (a pytest node id) then fails. `row` is the number of the fault in
    docs/reliability.md, 0 where the bug stands for a rule and not for a fault.
    """

    row: int
    fault: str
    test: str
    file: str
    find: str
    replace: str


def load() -> list[Mutant]:
    """All of them, by row."""
    mutants = [
        Mutant(**{"row": 0, **entry})
        for path in sorted(FOLDER.glob("*.toml"))
        for entry in tomli.loads(path.read_text())["mutant"]
    ]
    return sorted(mutants, key=lambda mutant: mutant.row or 1000)


def table() -> str:
    """Markdown: fault, test, and the change that turns the test red."""
    lines = ["| # | fault | test | turned red by |", "|---|---|---|---|"]
    for mutant in load():
        test = mutant.test.removeprefix("tests/").replace("::", " › ")
        change = f"`{mutant.file}`: {_code(mutant.find)} → {_code(mutant.replace)}"
        lines.append(f"| {mutant.row or ''} | {mutant.fault} | {test} | {change} |")
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    """A piece of code on one line of a table."""
    flat = " ".join(text.split()).replace("|", "\\|")
    return f"`{flat}`" if flat else "nothing"
