"""What a command prints: lines, tables and JSON on standard output, errors on standard error.

Texts of publishers, jobs, brokers and peers are made `safe` here, so no command forgets to. An
output that cannot be written is a CommandError with EX_IOERR, once: what is printed after that
goes nowhere, and one line on standard error is all.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Sequence

from workerd.errors import EX_IOERR, CommandError


class ReaderGone(CommandError):
    """Nobody reads standard output any more, as behind a pipe to `head`."""


def open_streams() -> None:
    """Make the descriptors 0 to 2 usable, whatever is closed of them: call this first.

    Else what is opened next gets their numbers. A closed standard output cannot be written.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Opened for reading, which is what writing to it will fail of.
            os.open(os.devnull, os.O_WRONLY if number == 2 else os.O_RDONLY)
            os.set_inheritable(number, True)
    # None is what Python makes of a closed one.
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What the locale cannot write must not raise.
        sys.stdout.reconfigure(errors="backslashreplace")


def print_line(text: str) -> None:
    """Print one line, whatever is in the text. Raises CommandError."""
    _write(safe(text) + "\n")


def print_table(rows: Sequence[Sequence[str]], indent: str = "") -> None:
    """Print columns as wide as they must be; the first row has the headings."""
    cells = [[safe(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        _write(indent + "  ".join(padded).rstrip() + "\n")


def print_json(value: object) -> None:
    """Print a value on one line, in ASCII: no locale and no lone surrogate can be in the way."""
    _write(json.dumps(value) + "\n")


def print_bytes(data: bytes) -> None:
    """Write bytes as they are for programs, as safe lines for a terminal. Raises CommandError."""
    if sys.stdout.isatty():
        for line in data.decode("utf-8", "backslashreplace").splitlines():
            print_line(line)
        return
    flush()
    try:
        sys.stdout.buffer.write(data)
    except OSError as error:
        raise _lost(error) from None


def flush() -> None:
    """Have what was printed leave the process now. Raises CommandError."""
    try:
        sys.stdout.flush()
    except OSError as error:
        raise _lost(error) from None


def warn(text: str, name: str = "workerd") -> None:
    """Print one line on standard error, if there is one; ``name`` is the command's."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{name}: {safe(text)}\n")


def safe(text: str) -> str:
    """The text on one line, with control characters as ``\\x1b``: see `log_formats.safe`."""
    if text.isprintable():
        return text
    from workerd import log_formats  # `submit` seldom needs it

    return log_formats.safe(text)


def _write(text: str) -> None:
    try:
        sys.stdout.write(text)
    except OSError as error:
        raise _lost(error) from None


def _lost(error: OSError) -> CommandError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    kind = ReaderGone if isinstance(error, BrokenPipeError) else CommandError
    return kind(EX_IOERR, f"standard output: {error.strerror}")
