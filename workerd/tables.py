"""What commands print: tables for people, JSON lines for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from workerd.log import safe


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


def age(seconds: float | None) -> str:
    """Two digits or so: 45s, 12m, 3h, 20d; "" when nobody knows."""
    if seconds is None:
        return ""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f}{unit}"
    return f"{seconds:.0f}s"
