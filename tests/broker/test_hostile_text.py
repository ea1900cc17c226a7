"""Texts of publishers, jobs, brokers and peers reach a terminal only escaped, by any command."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pika
import pytest

from tests.harness.hostile import EVIL, HostileInstance
from tests.harness.peer import DeadLetter, Peer
from tests.harness.programs import SUBMIT, WORKERD
from tests.harness.tables import private
from tests.harness.terminal import Terminal

CONFIG = """
[broker]
urls = ["{url}"]
[queues.jobs]
[handlers.sleep]
command = ["printf", "{{body}}"]
queue = "jobs"
"""

Show = Callable[..., str]


@pytest.fixture
def show(tmp_path: Path) -> Show:
    """What a command writes to its terminal until it ends; ``keys`` are typed at its screen."""

    def show(*words: str, keys: str = "", url: str = "amqp://127.0.0.1:1", **env: str) -> str:
        command = SUBMIT if words[0] == "submit" else WORKERD
        config = private(tmp_path, CONFIG.format(url=url))
        words = tuple(str(config) if word == "CONFIG" else word for word in words)
        terminal = Terminal(
            [*command, *(words[1:] if words[0] == "submit" else words)],
            env={"RUNTIME_DIRECTORY": str(tmp_path / "run"), "LANG": "C.UTF-8", **env},
            columns=120,
        )
        try:
            if words[0] == "run-once":
                terminal.type("\x04")  # the end of the body
            elif keys:
                terminal.wait(re.compile("RUNNING JOB|unknown").search, "what the instance says")
                terminal.type(keys)
            terminal.wait_exit()
        finally:
            terminal.close()
        return terminal.output

    return show


def raw(output: str) -> list[str]:
    """The characters of an output that steer a terminal."""
    return [each for each in output if not each.isprintable() and each not in "\r\n"]


@pytest.fixture(params=[False, True], ids=["answers", "refuses"])
def instance(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    """Three instances: one that answers or refuses, one that has failed, one with such a name."""
    run = tmp_path / "run"
    hostile = HostileInstance(run / "1", refuses=request.param)
    for name in ("2", EVIL):
        (run / name).mkdir()
        (run / name / "lock").touch()
        (run / name / "failure").write_text(EVIL)
    yield
    hostile.close()


@pytest.mark.parametrize(
    "words",
    [
        ("status",),
        ("health",),
        ("metrics",),
        ("pause",),
        ("pause", "jobs"),
        ("resume",),
        ("cancel", EVIL),
        ("submit", "sleep", "4"),
        ("status", "--json"),
        ("queues", "--config", "CONFIG"),
    ],
    ids=" ".join,
)
def test_what_an_instance_says_is_only_text(
    instance: None, show: Show, words: tuple[str, ...]
) -> None:
    output = show(*words)
    # Some print nothing that the instance has said.
    assert r"\x1b" in output or "u001b" in output or words[0] in ("metrics", "submit", "queues")
    assert raw(output) == []


def test_what_an_instance_says_is_only_text_on_the_screen(instance: None, show: Show) -> None:
    output = show("status", "--watch", keys="q")
    for text in ("\x1b]", "\x07", "\x9b", "\u202e", "\x7f", "\u2028"):
        assert text not in output


@pytest.mark.parametrize(
    "words",
    [
        ("run-once", "--config", "CONFIG", EVIL),
        ("run-once", "--config", EVIL, "sleep"),
        ("submit", "--config", "CONFIG", EVIL, "4"),
        ("submit", "--config", "CONFIG", "--header", EVIL, "sleep", "4"),
        ("submit", "--config", "CONFIG", "--at", EVIL, "sleep", "4"),
        ("check", "--config", EVIL),
        ("dead", "list", EVIL, "--newer-than", EVIL),
        (EVIL,),
    ],
    ids=repr,
)
def test_a_command_line_that_is_wrong_is_only_text(show: Show, words: tuple[str, ...]) -> None:
    output = show(*words)
    assert output
    assert raw(output) == []


@pytest.fixture
def letters() -> Iterator[Peer]:
    peer = Peer()
    headers: dict[str, Any] = {
        "x-workerd-reason": EVIL,
        "x-workerd-error": EVIL,
        "x-workerd-queue": EVIL,
        "x-workerd-host": EVIL,
        EVIL: {EVIL: EVIL},
        "x-death": [{"queue": EVIL, "reason": EVIL, "count": 1}],
    }
    properties = {"type": EVIL, "content_type": EVIL, "headers": headers}
    peer.ready["jobs.dead"].append(DeadLetter(EVIL, EVIL.encode(), properties=properties))
    yield peer
    peer.close()


@pytest.mark.parametrize(
    "words",
    [
        ("list",),
        ("show", EVIL),
        ("show", EVIL, "--body"),
        ("export",),
        ("requeue", "--all"),
        ("drop", "--all", "--yes"),
    ],
    ids=" ".join,
)
def test_what_a_dead_letter_says_is_only_text(
    letters: Peer, show: Show, words: tuple[str, ...]
) -> None:
    command, *rest = words
    output = show("dead", command, "jobs", *rest, "--config", "CONFIG", url=letters.url)
    assert r"\x1b]0;b" in output or r"\u001b]0;b" in output
    assert raw(output) == []


class Refusing(Peer):
    """Refuses everybody, with a text for terminals."""

    def handle(self, connection: Any, number: int, method: Any) -> None:
        if isinstance(method, pika.spec.Connection.Open):
            connection.send(0, pika.spec.Connection.Close(530, EVIL, 10, 40))
        else:
            super().handle(connection, number, method)


@pytest.fixture
def refusing() -> Iterator[Peer]:
    peer = Refusing()
    yield peer
    peer.close()


@pytest.mark.parametrize(
    "words",
    [
        ("check", "--connect"),
        ("dead", "list", "jobs"),
        ("queues",),
        ("setup",),
        ("submit", "--direct", "--timeout", "3", "sleep", "4"),
    ],
    ids=" ".join,
)
def test_what_a_broker_says_is_only_text(
    refusing: Peer, show: Show, words: tuple[str, ...]
) -> None:
    output = show(*words, "--config", "CONFIG", url=refusing.url)
    assert r"\x1b]0;b" in output
    assert raw(output) == []


def test_what_a_job_prints_is_only_text(show: Show, tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    script = tmp_path / "job.sh"
    script.write_text("printf '\\033]0;b\\007\\n'; printf '\\033[31m\\n' >&2; exit 1\n")
    file.write_text(f'[handlers.print]\ncommand = ["sh", "{script}"]\n[log]\nformat = "console"\n')
    file.chmod(0o600)
    output = show("run-once", "--config", str(file), "print")
    assert output.count(r"\x1b") > 2
    # The terminal echoes the end of the input, and takes it back.
    assert [each for each in raw(output) if each != "\b"] == []
