"""Tables, sections and colours, with rich: what a screen is made of. Pure."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from workerd.log_formats import safe

#: Between two columns.
GAP = "  "
#: For charts; never as high as the line, lest two of them touch.
BARS = "▁▂▃▄▅▆▇"
#: For a terminal that knows ASCII alone.
_PLAIN = str.maketrans({"…": "~", **dict(zip(BARS, "_.:-=+#", strict=True))})

FAINT = "dim"
_HEADING = "bold cyan underline"


@dataclass(frozen=True, slots=True)
class Column:
    """A column: ``width`` cells, or with 0 a part of what is left, as its ``share`` says.

    It is left out where the screen has fewer than ``needs`` cells in a line.
    """

    heading: str
    width: int = 0
    needs: int = 0
    right: bool = False
    share: int = 1
    least: int = 0


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the screen that has at least ``least`` lines, and is complete with ``most``.

    ``lines`` makes the lines that fit into a number of them.
    """

    least: int
    most: int
    lines: Callable[[int], list[Text]]


Row = Sequence[str | Text]


class Table:
    """Rows under headings, in columns that depend on the width of the screen alone."""

    def __init__(self, columns: Sequence[Column], width: int) -> None:
        self._width = width
        self._shown = [number for number, each in enumerate(columns) if width >= each.needs]
        self._columns = [columns[number] for number in self._shown]
        fixed = sum(each.width or each.least for each in self._columns)
        left = max(0, width - fixed - len(GAP) * (len(self._columns) - 1))
        shares = sum(each.share for each in self._columns if not each.width)
        self._widths = []
        for each in self._columns:
            part = 0 if each.width else left * each.share // shares
            self._widths.append(each.width or each.least + part)

    def heading(self) -> Text:
        line = self.row([each.heading for each in self._columns], every=True)
        line.pad_right(self._width - line.cell_len)
        line.stylize(_HEADING)
        return line

    def row(self, cells: Row, every: bool = False) -> Text:
        """A line; of ``cells`` there are as many as columns, shown or not."""
        line = Text()
        chosen = cells if every else [cells[number] for number in self._shown]
        for cell, column, width in zip(chosen, self._columns, self._widths, strict=True):
            text = cell.copy() if isinstance(cell, Text) else Text(safe(cell))
            text.truncate(width, overflow="ellipsis")
            room = " " * (width - text.cell_len)
            line.append(GAP if line else "")
            line.append_text(Text.assemble(room, text) if column.right else text + Text(room))
        return line


def shared(wants: Sequence[tuple[int, int]], room: int) -> list[int]:
    """How many lines each gets, given the least and the most that each wants.

    All get what they need; what is left goes to those that have the fewest.
    """
    given = [least for least, _ in wants]
    for _ in range(room - sum(given)):
        wanting = [n for n, (_, most) in enumerate(wants) if given[n] < most]
        if not wanting:
            break
        given[min(wanting, key=given.__getitem__)] += 1
    return given


def some(rows: Sequence[Text], room: int, unseen: int = 0) -> list[Text]:
    """As many of them as there is room for, and how many more there are."""
    if len(rows) + bool(unseen) <= room:
        return [*rows, *([more(unseen)] if unseen else [])]
    kept = max(0, room - 1)
    return [*rows[:kept], more(len(rows) - kept + unseen)]


def more(count: int) -> Text:
    return Text(f"and {count} more", FAINT)


def filled(lines: list[Text], room: int) -> list[Text]:
    """With blank lines, so that it fills its room."""
    return [*lines, *[Text()] * (room - len(lines))]


#: For what rich can only do with a console.
_MEASURE = Console(file=io.StringIO(), width=80)


def wrapped(text: Text, width: int) -> list[Text]:
    """The text on as many lines as it takes."""
    return [*text.wrap(_MEASURE, max(1, width))]


class Paint:
    """Lines with the colours of a terminal, as bytes for it.

    ``encoding`` is that of the terminal; NO_COLOR and TERM are heeded.
    """

    def __init__(self, encoding: str) -> None:
        self._encoding = encoding
        self._plain = not encoding.lower().replace("-", "").startswith("utf8")
        self._console = Console(
            file=io.StringIO(), force_terminal=True, highlight=False, width=10_000
        )

    def __call__(self, lines: Iterable[Text], width: int) -> bytes:
        """A screen that is ``width`` wide, from its upper left corner on."""
        text = "\x1b[H" + "\r\n".join(self._painted(line, width) for line in lines)
        if self._plain:
            text = text.translate(_PLAIN)
        return text.encode(self._encoding, "replace")

    def _painted(self, line: Text, width: int) -> str:
        if not line.plain.isprintable():
            # What an instance says of itself comes from whoever listens at its socket.
            line = Text(safe(line.plain), line.style)
        with self._console.capture() as capture:
            self._console.print(line, end="", no_wrap=True, overflow="ignore", crop=False)
        # Behind the last column it would erase what stands there.
        return capture.get() + ("\x1b[K" if line.cell_len < width else "")
