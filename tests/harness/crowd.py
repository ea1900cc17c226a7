"""A crowd at the daemon's socket, half of it hostile: `python -m tests.harness.crowd FOLDER COUNT`.

A process of its own, so that it does not hold up the test. Prints a line for each hundred answers
that the well-behaved half got, and ends with its standard input.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from tests.harness.control import Caller

#: Seconds between two misdeeds of one client: it is the daemon that is tested, not the machine.
PAUSE = 0.2

STATUS = b'{"version": 1, "request": "status"}\n'
HALF = b'{"version": 1, "request": "sub'
HUGE = b"x" * (1 << 20)

ended = threading.Event()
answers = itertools.count(1)


def garbage(caller: Caller) -> None:
    caller.send(os.urandom(1000) + b"\n")
    caller.await_end()


def half_a_line(caller: Caller) -> None:
    caller.send(HALF)
    ended.wait(10 * PAUSE)


def never_reading(caller: Caller) -> None:
    while not ended.is_set() and caller.send_some(STATUS * 100):
        pass
    ended.wait(10 * PAUSE)


def a_hundred_megabytes(caller: Caller) -> None:
    for _ in range(100):
        if ended.is_set() or not caller.send_some(HUGE):
            break


def well_behaved(caller: Caller) -> None:
    while not ended.is_set() and caller.ask("status").get("ok"):
        number = next(answers)
        if number % 100 == 0:
            print(number, flush=True)
        ended.wait(PAUSE)


def come_again(folder: Path, visit: Callable[[Caller], None]) -> None:
    while not ended.wait(PAUSE):
        with contextlib.suppress(OSError, AssertionError), Caller(folder) as caller:
            visit(caller)


def main() -> None:
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    hostile = itertools.cycle([garbage, half_a_line, never_reading, a_hundred_megabytes])
    for number in range(count):
        visit = well_behaved if number % 2 else next(hostile)
        threading.Thread(target=come_again, args=(folder, visit), daemon=True).start()
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
