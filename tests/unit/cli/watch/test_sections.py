"""The screen of `status --watch`, drawn without a terminal."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workerd.cli.watch.layout import Paint, shared
from workerd.cli.watch.sections import screen

NOW = 1_800_000_000.0
UUID = "01a2229d-491e-7ef0-810d-2d1a95ce15{:02x}"


def job(number: int, **facts: Any) -> dict[str, Any]:
    return {
        "id": UUID.format(number),
        "type": "resize-image",
        "handler": "resize-image",
        "queue": "images",
        "attempt": 1,
        "age": 100.0 - number,
        "pid": 1000 + number,
        "ending": False,
        "submitter": None,
        **facts,
    }


def failure(number: int, **facts: Any) -> dict[str, Any]:
    return {
        "id": UUID.format(0x80 + number),
        "type": "mail-newsletter",
        "queue": "default",
        "attempt": 2,
        "reason": "exit-status",
        "error": f"cannot reach {number}",
        "last": number % 2 == 0,
        "when": NOW - number,
        **facts,
    }


def queue(name: str, **facts: Any) -> dict[str, Any]:
    return {
        "queue": name,
        "slots": 4,
        "running": 0,
        "waiting": 0,
        "held": 0,
        "consuming": True,
        "paused": None,
        "ready": 0,
        "due": 0,
        "dead": 0,
        **facts,
    }


def pace(*done: int, failed: int = 0, until: float = 500.0) -> dict[str, Any]:
    return {"seconds": 5.0, "until": until, "done": [*done], "failed": [failed] * len(done)}


def running(name: str = "1", **facts: Any) -> dict[str, Any]:
    jobs = facts.get("jobs", [])
    return {
        "instance": name,
        "state": "running",
        "healthy": True,
        "why": None,
        "degraded": [],
        "notes": [],
        "uptime": 3 * 3600.0,
        "broker": "rabbit1",
        "rabbitmq": "3.10.8",
        "done": 1204,
        "retried": 7,
        "failed": 2,
        "pace": pace(10, 20, 61),
        "failures": [],
        "queues": [queue("default"), queue("images")],
        "running": len(jobs),
        "jobs": jobs,
        **facts,
    }


def silent(name: str, state: str, why: str | None = None) -> dict[str, Any]:
    return {"instance": name, "state": state, "healthy": False, "why": why}


def drawn(states: list[dict[str, Any]], width: int = 80, height: int = 24) -> list[str]:
    lines = screen(states, "host", NOW, width, height)
    assert len(lines) == height
    assert max(line.cell_len for line in lines) <= width
    return [line.plain.rstrip() for line in lines]


def row(lines: list[str], start: str) -> list[str]:
    """The words of the one line that begins so."""
    (found,) = [line for line in lines if line.startswith(start)]
    return found.split()


def test_everything_that_matters_is_on_a_screen_of_80_by_24() -> None:
    why = (
        "/etc/workerd/conf.d/newsletter.toml: handlers.mail-newsletter.retri: unknown key, "
        'did you mean "retry"?'
    )
    states = [
        running(
            "1",
            jobs=[job(1), job(2, attempt=3, ending=True)],
            queues=[
                queue("default", running=2, waiting=1, held=2, ready=31204, due=5, dead=17),
                queue("images", paused="by an operator", consuming=False),
            ],
            notes=["images paused by an operator"],
            failures=[failure(n) for n in range(20)],
        ),
        running("2", failed=0, jobs=[job(3, age=None)]),
        silent("3", "failed", why),
        silent("nightly", "stopped"),
    ]
    lines = drawn(states)
    text = "\n".join(lines)
    assert lines[0].startswith(" workerd on host: 2 of 4 instances healthy")
    assert lines[0].endswith("q quits")
    assert row(lines, "1 ") == ["1", "running", "2/8", "1204", "7", "2", "3h", "rabbit1,", "3.10.8"]
    assert row(lines, "3 ") == ["3", "failed"]
    assert row(lines, "nightly ") == ["nightly", "stopped"]
    assert "  images paused by an operator" in lines
    # All of it, on as many lines as it takes.
    assert why.split() == " ".join(lines[6:8]).split()
    assert row(lines, "done ")[:3] == ["done", "24.4", "24.4"]
    assert row(lines, "default ") == ["default", "2/8", "3", "31204", "5", "17"]
    assert row(lines, "images ") == ["images", "0/8", "0", "0", "0", "0", "1/2", "consume"]
    oldest = next(line for line in lines if UUID.format(1) in line)
    assert oldest.split() == [UUID.format(1), "resize-image", "images", "1", "1", "99s"]
    assert row(lines, UUID.format(2))[2:] == ["images", "1", "3", "ending"]
    assert row(lines, UUID.format(3))[2:] == ["images", "2", "1", "-"]
    latest = next(line for line in lines if UUID.format(0x80) in line)
    assert latest.split()[1:] == [UUID.format(0x80), "mail-newsle…", "exit-status", "dead"]
    assert re.match(r"\d\d:\d\d:\d\d  ", latest)
    assert text.count("retry") == 2  # of the hint, and of a failure


def test_an_instance_whose_handler_cannot_run_is_degraded_and_says_why() -> None:
    why = "handler resize paused: not ready within 30 s"
    lines = drawn([running("1", degraded=[why], notes=[why])])
    assert row(lines, "1 ")[1] == "degraded"
    assert f"  {why}" in lines


def test_a_job_that_has_been_told_to_end_and_one_that_has_not_begun_say_so() -> None:
    lines = drawn([running(jobs=[job(1, ending=True), job(2, age=None, attempt=2)])])
    assert row(lines, UUID.format(1))[-2:] == ["1", "ending"]
    assert row(lines, UUID.format(2))[-2:] == ["2", "-"]


def test_a_larger_terminal_shows_more() -> None:
    states = [running(jobs=[job(n) for n in range(8)], failures=[failure(n) for n in range(20)])]
    small, large = drawn(states), drawn(states, 140, 50)
    assert "and 1 more" not in large
    for number in range(8):
        assert row(large, UUID.format(number))[3] == str(1000 + number)
    for number in range(20):
        (shown,) = [line for line in large if UUID.format(0x80 + number) in line]
        assert shown.endswith(f"cannot reach {number}")
    assert sum(UUID[:20] in line for line in small) < 28
    assert large[1] == ""
    assert "" not in small[:20]


def test_nothing_moves_when_numbers_grow_and_jobs_come_and_go() -> None:
    empty = drawn([running(pace=pace(), failures=[])])
    busy = drawn(
        [
            running(
                done=99_999_999,
                retried=12345,
                failed=9999,
                uptime=86_400.0 * 300,
                queues=[queue("default", ready=1_234_567, dead=99_999), queue("images", due=7)],
                jobs=[job(n) for n in range(8)],
                failures=[failure(n) for n in range(20)],
                pace=pace(*range(100, 220), failed=3),
            )
        ]
    )
    headings = ("INSTANCE", "JOBS/S", "QUEUE", "RUNNING JOB", "FAILED")
    for heading in headings:
        places = [
            [(n, line) for n, line in enumerate(lines) if line.startswith(heading)]
            for lines in (empty, busy)
        ]
        assert places[0] == places[1]
        assert len(places[0]) == 1
    assert "99999999" in busy[2]
    assert "1234567" in row(busy, "default")


@pytest.mark.parametrize(("width", "height"), [(1, 1), (2, 3), (20, 6), (44, 12), (300, 100)])
def test_every_size_has_its_screen(width: int, height: int) -> None:
    states = [
        running(jobs=[job(n) for n in range(9)], failures=[failure(n) for n in range(20)]),
        *(silent(f"instance-{n}", "failed", "why\nnot " * 20) for n in range(30)),
    ]
    drawn(states, width, height)
    drawn(states[1:], width, height)
    drawn([], width, height)


def test_of_more_instances_than_there_is_room_for_those_in_trouble_are_shown() -> None:
    states = [running(f"{n:02}") for n in range(30)]
    states[20] = silent("20", "died", "it was killed")
    lines = drawn(states)
    assert row(lines, "20 ") == ["20", "died"]
    assert any(re.fullmatch(r"and \d+ more", line) for line in lines)
    # What runs is not crowded out by that.
    assert row(lines, "RUNNING JOB")[:2] == ["RUNNING", "JOB"]


def test_a_narrow_terminal_keeps_what_matters_most() -> None:
    lines = drawn([running(jobs=[job(1)], failures=[failure(1)])], 44, 20)
    assert row(lines, "1 ") == ["1", "running", "1/8", "2"]
    assert row(lines, UUID.format(1)) == [UUID.format(1), "99s"]
    assert row(lines, "default ") == ["default", "0/4", "0", "0"]
    assert any(line.endswith("exit-status") for line in lines)


def test_the_paces_of_instances_are_added_step_by_step() -> None:
    # The second was asked after one more step was over, and has run for longer.
    states = [running("1", pace=pace(0, 5)), running("2", pace=pace(35, 10, 20, until=505.0))]
    lines = drawn(states)
    name, now, peak, chart = row(lines, "done ")
    # Steps: 35, 10 + 0... each of five seconds.
    assert (name, now, peak) == ("done", "4.0", "7.0")
    assert chart == "▇▄▅"


def test_a_chart_is_blank_before_the_start_and_low_where_nothing_happened() -> None:
    lines = drawn([running(pace=pace(0, 0, 7))])
    (line,) = [line for line in lines if line.startswith("done ")]
    assert line.endswith("   ▁▁▇")
    assert "LAST 4 MIN" in next(line for line in lines if line.startswith("JOBS/S"))


def test_without_any_instance_it_says_so() -> None:
    assert "no instance of workerd runs or has run on this host" in drawn([])[1]


def test_what_others_have_written_is_only_text() -> None:
    evil = "\x1b[2J[red]x[/red]\r\n"
    states = [
        running(
            evil,
            notes=[evil],
            jobs=[job(1, id=evil, type=evil)],
            failures=[failure(1, error=evil, id=evil)],
        )
    ]
    text = "\n".join(drawn(states, 140))
    assert r"\x1b[2J[red]x[/red]\r\n" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)


def test_colours_are_left_out_where_nobody_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = screen([running()], "host", NOW, 80, 24)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    green = re.compile(rb"\x1b\[(?:[0-9;]*;)?3[0-9][;m]")
    assert green.search(Paint("utf-8")(lines, 80))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not green.search(Paint("utf-8")(lines, 80))


def test_a_terminal_that_knows_ascii_alone_gets_ascii() -> None:
    lines = screen([running("ä", jobs=[job(1, type="x" * 50)])], "host", NOW, 80, 24)
    painted = Paint("ascii")(lines, 80)
    assert max(painted) < 128
    assert b"x~" in painted


def test_a_line_that_is_full_is_not_erased_at_its_end() -> None:
    lines = screen([running()], "host", NOW, 80, 24)
    first, second, *_ = Paint("utf-8")(lines, 80).split(b"\r\n")
    assert lines[0].cell_len == 80
    assert not first.endswith(b"\x1b[K")
    assert screen([], "host", NOW, 80, 24)[1].cell_len < 80
    assert Paint("utf-8")(screen([], "host", NOW, 80, 24), 80).split(b"\r\n")[1].endswith(b"\x1b[K")
    assert second


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30)), max_size=6),
    st.integers(0, 99),
)
def test_room_is_shared_so_that_none_is_wasted(pairs: list[tuple[int, int]], room: int) -> None:
    wants = [(least, least + more) for least, more in pairs]
    given = shared(wants, room)
    for (least, most), lines in zip(wants, given, strict=True):
        assert least <= lines <= most
    spent, all_of_it = sum(given), sum(most for _, most in wants)
    assert spent == min(all_of_it, max(room, sum(least for least, _ in wants)))
