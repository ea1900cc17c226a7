"""The screen of `workerd status --watch`: from what the instances say to lines of text. Pure.

Columns have the same places from one moment to the next, and so have the sections: how much room
each of them gets follows from the size of the terminal and from what is configured, not from what
happens to run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from workerd.cli.watch.layout import (
    BARS,
    FAINT,
    GAP,
    Column,
    Row,
    Section,
    Table,
    filled,
    more,
    shared,
    some,
    wrapped,
)
from workerd.log_formats import safe
from workerd.units import age

#: What the instances say of themselves: docs/control.md has the keys.
States = Sequence[Mapping[str, Any]]

#: From this height on there is a blank line between sections.
_ROOMY = 30
#: Below it there is no chart.
_LOW = 16
#: From this width on there is room for what is nice to have.
_WIDE = 100
#: The length of an id that `submit` makes.
_ID = 36

_TITLE = "bold reverse"
_GOOD = "green"
_ODD = "yellow"
_BAD = "bold red"
_STATES = {
    "running": _GOOD,
    "draining": _ODD,
    "silent": _ODD,
    "stopped": FAINT,
    "unknown": FAINT,
}


def screen(states: States, host: str, now: float, width: int, height: int) -> list[Text]:
    """The lines of a screen of this size; ``now`` is in seconds since 1970."""
    well = [state for state in states if "queues" in state]
    several = len(states) > 1
    sections = [_instances(states, width, height)]
    if well:
        sections += [_pace(well, width)] if height >= _LOW else []
        sections += [
            _queues(well, width),
            _running(well, width, several),
            _failures(well, now, width),
        ]
    lines = [_title(states, host, now, width)]
    blanks = len(sections) if height >= _ROOMY else 0
    rooms = shared([(each.least, each.most) for each in sections], height - 1 - blanks)
    for section, room in zip(sections, rooms, strict=True):
        lines += [Text()] * bool(blanks)
        lines += section.lines(room)[:room]
    lines += [Text()] * (height - len(lines))
    for line in lines:
        line.truncate(width)
    return lines[:height]


def _title(states: States, host: str, now: float, width: int) -> Text:
    healthy = sum(bool(state["healthy"]) for state in states)
    number = f"{len(states)} instance" + ("" if len(states) == 1 else "s")
    left = f" workerd on {safe(host)}: {healthy} of {number} healthy"
    right = time.strftime("%H:%M:%S", time.localtime(now)) + "  q quits "
    if len(left) + 1 + len(right) > width:
        left = f" {healthy} of {len(states)} healthy"
    line = Text(left)
    line.truncate(max(0, width - len(right)), overflow="ellipsis", pad=True)
    line.append(right)
    line.stylize(_TITLE)
    return line


def _instances(states: States, width: int, height: int) -> Section:
    name = min(32, max([8, *(len(state["instance"]) for state in states)]))
    table = Table(
        [
            Column("INSTANCE", name),
            Column("STATE", 8),
            Column("RUNNING", 7, right=True),
            Column("DONE", 8, needs=52, right=True),
            Column("RETRIED", 7, needs=64, right=True),
            Column("FAILED", 7, right=True),
            Column("UP", 4, needs=64, right=True),
            Column("BROKER", needs=72),
        ],
        width,
    )
    if not states:
        text = Text("no instance of workerd runs or has run on this host", FAINT)
        return Section(1, 1, lambda _: [text])
    blocks = [[table.row(_instance(state)), *_why(state, width)] for state in states]
    # What is wrong comes first where not all of it can be shown.
    urgent = sorted(
        range(len(states)),
        key=lambda n: (_is_well(states[n]), states[n]["state"] == "stopped"),
    )
    most = 1 + sum(map(len, blocks))

    def lines(room: int) -> list[Text]:
        if most <= room:
            return [table.heading(), *(line for block in blocks for line in block)]
        rows = room - 1
        kept = urgent[: rows if len(blocks) <= rows else max(1, rows - 1)]
        rest = len(blocks) - len(kept)
        # First a line for each, then its words.
        spare = rows - len(kept) - bool(rest)
        words: dict[int, list[Text]] = {}
        for n in kept:
            words[n] = blocks[n][1 : 1 + max(0, spare)]
            spare -= len(words[n])
        shown = (line for n in sorted(kept) for line in (blocks[n][0], *words[n]))
        return [table.heading(), *shown, *([more(rest)] if rest else [])]

    # Its words say why something does not run: up to a third of the screen is theirs.
    return Section(min(most, max(2, height // 3)), most, lines)


def _is_well(state: Mapping[str, Any]) -> bool:
    return state["healthy"] and not state.get("degraded")


def _instance(state: Mapping[str, Any]) -> Row:
    word = state["state"]
    style = _STATES.get(word, _BAD)
    if word == "running" and not _is_well(state):
        style = _ODD
        if state["healthy"]:
            word = "degraded"
    cells: list[str | Text] = [state["instance"], Text(word, style)]
    if "queues" not in state:
        return [*cells, "", "", "", "", "", ""]
    slots = sum(queue["slots"] for queue in state["queues"])
    broker = f"{state['broker']}, {state['rabbitmq']}" if state["broker"] else Text("none", _BAD)
    return [
        *cells,
        f"{state['running']}/{slots}",
        str(state["done"]),
        str(state["retried"]),
        Text(str(state["failed"]), _BAD if state["failed"] else ""),
        age(state["uptime"]),
        broker,
    ]


def _why(state: Mapping[str, Any], width: int) -> list[Text]:
    """What is wrong with an instance, in as many lines as that takes."""
    notes = list(state.get("notes", ()))
    if state["why"] and state["why"] not in notes:
        notes.append(state["why"])
    style = _BAD if _STATES.get(state["state"]) is None else _ODD
    lines: list[Text] = []
    for note in notes:
        for text in note.splitlines():
            shown = Text(safe(text), style)
            lines += wrapped(shown, width - 2)
    return [Text("  ") + line for line in lines]


def _pace(states: States, width: int) -> Section:
    seconds, done, failed = _summed(states)
    per_minute = round(60 / seconds)
    # Whole minutes, as many as a daemon remembers at most.
    room = width - 8 - 7 - 7 - 3 * len(GAP)
    bars = max(0, min(10 * per_minute, room) // per_minute * per_minute)
    table = Table(
        [
            Column("JOBS/S", 8),
            Column("NOW", 7, right=True),
            Column("PEAK", 7, needs=30, right=True),
            Column(f"LAST {bars // per_minute} MIN" if bars else "", needs=30),
        ],
        width,
    )

    def row(name: str, counts: list[int], style: str) -> Text:
        rates = [count / seconds for count in counts]
        now, peak = (rates[-1], max(rates[-bars:])) if rates else (0.0, 0.0)
        # What was before the start stays blank.
        chart = Text(_chart(counts[-bars:]).rjust(bars) if bars else "", style)
        return table.row([name, _rate(now), _rate(peak), chart])

    lines = [
        table.heading(),
        row("done", done, _GOOD),
        row("failed", failed, _BAD if any(failed) else FAINT),
    ]
    return Section(3, 3, lambda _: lines)


def _summed(states: States) -> tuple[float, list[int], list[int]]:
    """The seconds of a step; how many attempts were done, and failed, in each of the last."""
    paces = [state["pace"] for state in states]
    seconds: float = paces[0]["seconds"]
    latest = max(pace["until"] for pace in paces)
    # Each was asked at another moment.
    late = [round((latest - pace["until"]) / seconds) for pace in paces]
    length = max(len(pace["done"]) + by for pace, by in zip(paces, late, strict=True))
    sums: tuple[list[int], list[int]] = ([0] * length, [0] * length)
    for pace, by in zip(paces, late, strict=True):
        for name, total in zip(("done", "failed"), sums, strict=True):
            for back, count in enumerate(reversed(pace[name]), 1 + by):
                total[-back] += count
    return seconds, *sums


def _chart(counts: Sequence[int]) -> str:
    """A bar for each; the lowest one is for nothing at all."""
    peak = max(counts, default=0)
    levels = len(BARS) - 1
    return "".join(BARS[-(-count * levels // peak) if peak else 0] for count in counts)


def _rate(rate: float) -> str:
    return f"{rate:.1f}" if rate < 1000 else f"{rate:.0f}"


def _queues(states: States, width: int) -> Section:
    longest = max(len(queue["queue"]) for state in states for queue in state["queues"])
    table = Table(
        [
            Column("QUEUE", least=min(max(5, longest), 19), share=0 if width >= _WIDE else 1),
            Column("RUNNING", 7, right=True),
            Column("WAITING", 7, needs=64, right=True),
            Column("READY", 8, right=True),
            Column("DUE", 7, needs=52, right=True),
            Column("DEAD", 7, right=True),
            Column("", least=13, needs=72),
        ],
        width,
    )
    queues: dict[str, list[Mapping[str, Any]]] = {}
    for state in states:
        for queue in state["queues"]:
            queues.setdefault(queue["queue"], []).append(queue)
    rows = [table.row(_queue(name, parts)) for name, parts in sorted(queues.items())]
    return Section(
        1 + min(2, len(rows)), 1 + len(rows), lambda room: [table.heading(), *some(rows, room - 1)]
    )


def _queue(name: str, parts: States) -> Row:
    """A queue as all instances together have it."""
    running, slots = (sum(part[key] for part in parts) for key in ("running", "slots"))
    dead = _depth(parts, "dead")
    consuming = sum(part["consuming"] for part in parts)
    if consuming:
        word = "" if consuming == len(parts) else f"{consuming}/{len(parts)} consume"
    else:
        word = "paused" if any(part["paused"] for part in parts) else "not consuming"
    return [
        name,
        f"{running}/{slots}",
        str(sum(part["waiting"] + part["held"] for part in parts)),
        _depth(parts, "ready"),
        _depth(parts, "due"),
        Text(dead, "" if dead in ("0", "-") else _BAD),
        Text(word, _ODD),
    ]


def _depth(parts: States, key: str) -> str:
    known = [part[key] for part in parts if part.get(key) is not None]
    return str(max(known)) if known else "-"


def _running(states: States, width: int, several: bool) -> Section:
    jobs = [(job, state["instance"]) for state in states for job in state["jobs"]]
    jobs.sort(key=lambda pair: -(pair[0]["age"] or 0.0))
    names = [queue["queue"] for state in states for queue in state["queues"]]
    instance = max(len(state["instance"]) for state in states)
    wide = width >= _WIDE
    table = Table(
        [
            _id_column("RUNNING JOB", width),
            Column("HANDLER", 24) if wide else Column("HANDLER", least=6, needs=56),
            Column("QUEUE", min(24 if wide else 10, max(5, *map(len, names))), needs=64),
            Column("IN", min(24 if wide else 8, max(2, instance)), needs=72 if several else 1000),
            Column("PID", 7, needs=_WIDE, right=True),
            Column("TRY", 3, needs=52, right=True),
            Column("AGE", 6, right=True),
            Column("", needs=_WIDE),
        ],
        width,
    )
    rows = [
        table.row(
            [
                job["id"],
                job["type"] or "-",
                job["queue"],
                where,
                str(job["pid"] or "-"),
                Text(str(job["attempt"]), _ODD if job["attempt"] > 1 else ""),
                Text("ending", _ODD) if job["ending"] else age(job["age"]) or "-",
                "",
            ]
        )
        for job, where in jobs
    ]
    unseen = sum(state["running"] - len(state["jobs"]) for state in states)
    slots = sum(queue["slots"] for state in states for queue in state["queues"])

    def lines(room: int) -> list[Text]:
        if not rows:
            return filled([table.heading(), Text("nothing runs", FAINT)], room)
        return filled([table.heading(), *some(rows, room - 1, unseen)], room)

    return Section(2, 1 + max(1, slots), lines)


def _failures(states: States, now: float, width: int) -> Section:
    failures = [failure for state in states for failure in state["failures"]]
    failures.sort(key=lambda failure: -failure["when"])
    table = Table(
        [
            Column("FAILED", 8),
            _id_column("JOB", width),
            Column("HANDLER", 16) if width >= _WIDE else Column("HANDLER", least=6, needs=72),
            Column("REASON", 14 if width >= _WIDE else 11),
            Column("TRY", 3, needs=120, right=True),
            Column("THEN", 5, needs=52),
            Column("ERROR", needs=_WIDE),
        ],
        width,
    )
    rows = [
        table.row(
            [
                _clock(failure["when"], now),
                failure["id"],
                failure["type"] or "-",
                failure["reason"],
                str(failure["attempt"]),
                Text("dead", _BAD) if failure["last"] else Text("retry", _ODD),
                Text(safe(failure["error"]), FAINT),
            ]
        )
        for failure in failures
    ]

    def lines(room: int) -> list[Text]:
        # The last ones are enough: the log and the dead letters have them all.
        shown = rows[: room - 1] or [Text("nothing has failed since the start", FAINT)]
        return [table.heading(), *shown]

    return Section(2, 1 + 20, lines)


def _id_column(heading: str, width: int) -> Column:
    return Column(heading, _ID) if width >= 72 else Column(heading, least=8, share=2)


def _clock(when: float, now: float) -> str:
    """The time of day, or the day when that was not today."""
    then, today = time.localtime(when), time.localtime(now)
    return time.strftime("%H:%M:%S" if then[:3] == today[:3] else "%b %d", then)
