"""What the tests stand on: no server in the way of another's, and nothing that was said missed."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable

import pytest

from tests.harness import processes
from tests.harness.broker import SharedBroker
from tests.harness.daemon import Daemon
from tests.harness.ports import Port
from tests.harness.terminal import Terminal
from tests.harness.wire import Wire


def draws(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    left = iter(numbers)
    monkeypatch.setattr(random, "randrange", lambda *_: next(left))


def test_two_servers_that_start_at_once_have_ports_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = Port(), Port()
    second.close()
    draws(monkeypatch, first.number, first.number, second.number)
    # The first one's server does not listen yet: the kernel would give its port to anybody.
    third = Port()
    assert third.number == second.number
    first.close()
    third.close()


def test_a_port_that_a_stranger_listens_on_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    free = Port()
    free.close()
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        draws(monkeypatch, stranger.getsockname()[1], free.number)
        port = Port()
        assert port.number == free.number
        port.close()


def test_a_wire_that_is_cut_keeps_its_port(monkeypatch: pytest.MonkeyPatch) -> None:
    free = Port()
    free.close()
    wire = Wire("amqp://nobody@127.0.0.1:1/")
    wire.cut()
    draws(monkeypatch, int(wire.url.rpartition(":")[2].partition("/")[0]), free.number)
    port = Port()
    assert port.number == free.number
    port.close()
    wire.mend()
    wire.close()


def test_all_that_a_program_said_is_there_once_it_has_ended_although_a_stray_holds_its_log_open(
    daemon: Callable[..., Daemon],
) -> None:
    lines = """seq --format='{"event": "line", "number": %.0f}' 20000 >&2"""
    worker = daemon("", command=["sh", "-c", f"{lines}; sleep 600 & exit 3"])
    assert worker.wait_exit() == 3
    assert [entry["number"] for entry in worker.events("line")] == list(range(1, 20_001))
    processes.kill_trees(processes.strays())


def test_all_that_was_written_to_a_terminal_is_there_once_its_program_has_ended() -> None:
    terminal = Terminal(["seq", "20000"])
    try:
        assert terminal.wait_exit() == 0
        assert terminal.output.split() == [str(number) for number in range(1, 20_001)]
    finally:
        terminal.close()


def test_a_broker_that_died_between_two_tests_fails_one_and_not_all_that_follow(
    shared_broker: SharedBroker,
) -> None:
    shared_broker.ready().kill()
    with pytest.raises(AssertionError):
        shared_broker.ready()
    assert shared_broker.ready().queues() == {}
