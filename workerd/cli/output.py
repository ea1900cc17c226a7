"""What commands print: tables for people, JSON lines for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from workerd.log_formats import safe


def print_table(rows: Sequence[Sequence[str]], indent: str = "") -> None:
    """The first row has the headings; every column is as wide as it must be."""
    cells = [[safe(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        sys.stdout.write(indent + "  ".join(padded).rstrip() + "\n")


def print_json(value: object) -> None:
    # ASCII, so that no locale and no lone surrogate can be in the way.
    sys.stdout.write(json.dumps(value) + "\n")
