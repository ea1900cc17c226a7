"""`workerd dead`: looking at dead letters, sending them back, dropping and exporting them."""

from __future__ import annotations

import asyncio
import base64
import datetime
import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pika
import pytest

from tests.harness import octets
from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.daemon import Daemon
from tests.harness.tables import config
from tests.harness.trixie import CHECKOUT
from tests.harness.waiting import TIMEOUT, until
from workerd.config.load import load
from workerd.core.job import UNREADABLE, Message
from workerd.deadletters.letter import DeadLetter, Filter, Irreplaceable, renewed, replayed, stamp
from workerd.deadletters.operations import browse
from workerd.deadletters.render import everything, row, sheet

NOW = 1_800_000_000.0
OWN = {"x_queue_type": "quorum", "x_delivery_limit": 1_000_000}

FACTS: dict[str, object] = {
    "x-workerd-reason": "exit-status",
    "x-workerd-exit-status": 3,
    "x-workerd-error": "one\ntwo\x1b[31m",
    "x-workerd-attempts": 5,
    "x-workerd-attempt": 4,
    "x-workerd-queue": "jobs",
    "x-workerd-host": "host",
    "x-workerd-instance": "1",
    "x-workerd-first-failure": "2026-11-24T15:00:00.000Z",
    "x-workerd-last-failure": "2026-11-24T15:01:00.000Z",
    "x-workerd-expires": 1,
    "x-workerd-replay": "old mark",
}
EXPIRED: dict[str, object] = {
    "x-death": [
        {
            "queue": "jobs",
            "reason": "expired",
            "count": 2,
            "time": datetime.datetime.fromtimestamp(NOW - 7200, datetime.UTC),
            "exchange": "",
            "routing-keys": ["jobs"],
        }
    ],
    "x-first-death-reason": "expired",
    "x-first-death-queue": "jobs",
    "x-delivery-count": 3,
}


def letter(headers: dict[str, object] | None = None, **properties: Any) -> DeadLetter:
    return DeadLetter(Message(headers=headers or {}, **properties))


# The pure parts


def test_a_letter_of_workerd_tells_its_facts() -> None:
    failed = letter(FACTS, message_id="a", type="resize", body=b"xyz")
    assert row(failed, NOW)[:5] == ("a", "resize", "exit-status", "5", "3")
    assert row(failed, NOW)[6] == "3"
    assert dict(sheet(failed, NOW).texts) == {"error": "one\ntwo\x1b[31m", "body, 3 bytes": "xyz"}


def test_a_letter_of_the_broker_is_explained_in_words() -> None:
    expired = letter(EXPIRED, message_id="a")
    assert row(expired, NOW) == ("a", "-", "expired", "-", "-", "2h", "0")
    told = dict(sheet(expired, NOW).facts)["RabbitMQ"]
    assert told.startswith(
        "expired in queue jobs, 2 times, first at 2027-01-15T06:00:00Z: its time"
    )


@pytest.mark.parametrize("reason", ["expired", "rejected", "maxlen", "delivery_limit"])
def test_every_reason_of_the_broker_has_words(reason: str) -> None:
    dead = letter({"x-death": [{"queue": "q", "reason": reason, "count": 1}]})
    assert str(dead.deaths[0]).startswith(f"{reason} in queue q, once: ")


@pytest.mark.parametrize(
    "headers",
    [
        {"x-death": "nonsense", "x-workerd-last-failure": "yesterday", "x-workerd-attempts": "x"},
        {"x-death": [3, {}], "x-workerd-reason": 7, "x-workerd-error": b"\xff"},
        {UNREADABLE: b"\0\1"},
        {b"\xff": {b"\xfe": [float("nan"), b"\xff"]}},
    ],
)
def test_a_letter_full_of_nonsense_can_be_shown(headers: dict[Any, Any]) -> None:
    odd = letter(headers, message_id=b"\xff", type=b"\xfe", body=bytes(range(256)))
    assert row(odd, NOW)[0] == r"\xff"
    assert sheet(odd, NOW).texts[-1][1].startswith("00 01 02")
    shown = json.loads(json.dumps(everything(odd), allow_nan=False))
    assert base64.b64decode(shown["body_base64"]) == odd.message.body


@pytest.mark.parametrize(
    ("wanted", "ids"),
    [
        (Filter(), "abc"),
        (Filter(ids=frozenset("ac")), "ac"),
        (Filter(type="t"), "a"),
        (Filter(reason="expired"), "b"),
        (Filter(older_than=3600.0), "ab"),
        (Filter(older_than=7201.0), "a"),
        (Filter(newer_than=7201.0), "b"),
        (Filter(newer_than=7200.0), ""),
        (Filter(older_than=3600.0, newer_than=7201.0), "b"),
        (Filter(type="t", reason="expired"), ""),
    ],
)
def test_a_filter_takes_letters_for_which_all_of_it_holds(wanted: Filter, ids: str) -> None:
    letters = [
        letter(FACTS, message_id="a", type="t"),
        letter(EXPIRED, message_id="b"),
        # Nobody knows how old this is.
        letter(message_id="c"),
    ]
    assert "".join(each.id for each in letters if wanted.takes(each, NOW)) == ids


def test_a_replayed_letter_is_the_job_as_it_was_submitted_and_a_mark() -> None:
    message = Message(
        body=b"body",
        message_id="a",
        type="t",
        timestamp=7,
        headers={**FACTS, **EXPIRED, "x-workerd-max-attempts": 9, "mine": 1.5},
    )
    copy, dropped = replayed(message, "mark")
    assert copy.headers == {"mine": 1.5, "x-workerd-max-attempts": 9, "x-workerd-replay": "mark"}
    assert (copy.body, copy.message_id, copy.type, copy.timestamp) == (b"body", "a", "t", 7)
    assert dropped == []
    assert replayed(Message(headers={"big": 2**70}), "mark")[1] == ["big"]


def test_a_replayed_letter_still_tells_who_submitted_the_job() -> None:
    owned = Message(headers={**FACTS, "x-workerd-submitter": 1000})
    headers = {"x-workerd-submitter": 1000, "x-workerd-replay": "mark"}
    assert replayed(owned, "mark")[0].headers == headers
    # What is no user is none of ours.
    forged = Message(headers={"x-workerd-submitter": "root"})
    assert replayed(forged, "mark")[0].headers == {"x-workerd-replay": "mark"}


def test_a_renewed_letter_loses_only_the_count_of_its_returns() -> None:
    copy = renewed(Message(headers={**FACTS, **EXPIRED}))
    assert {**copy.headers, "x-delivery-count": 3} == {**FACTS, **EXPIRED}
    assert "x-delivery-count" not in copy.headers


def test_a_letter_whose_headers_nobody_can_read_is_not_copied() -> None:
    unreadable = Message(headers={UNREADABLE: b"x"})
    with pytest.raises(Irreplaceable):
        replayed(unreadable, "mark")
    with pytest.raises(Irreplaceable):
        renewed(unreadable)


# At a broker


class Workerd:
    """The command `workerd dead`, as a process."""

    def __init__(self, file: Path) -> None:
        self.file = file
        pika = os.environ.get("WORKERD_TEST_PIKA")
        path = os.pathsep.join(filter(None, [pika, str(CHECKOUT)]))
        self._environ = {**os.environ, "PYTHONPATH": path}

    def command(self, *words: str) -> Sequence[str]:
        command = [sys.executable, "-m", "workerd", "dead", words[0], "--config", str(self.file)]
        return [*command, *words[1:]]

    def __call__(self, *words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        """Run it to its end; it must exit with this status."""
        result = subprocess.run(
            self.command(*words),
            env=self._environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT * 2,
            check=False,
        )
        assert result.returncode == status, result
        return result

    def start(self, *words: str, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*words),
            env=self._environ,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def listed(self, *words: str) -> list[str]:
        """The ids that `list --json` tells."""
        lines = self("list", "jobs", "--json", *words).stdout.splitlines()
        return [json.loads(line)["id"] for line in lines]


@pytest.fixture
def workerd(broker: Broker, tmp_path: Path) -> Workerd:
    file = tmp_path / "workerd.toml"
    file.write_text(config(broker.url, ["true"]))
    file.chmod(0o600)
    return Workerd(file)


def fill(client: Client, count: int, **options: Any) -> list[str]:
    """Put letters into jobs.dead, many at once; returns their ids, in order."""
    ids = [f"letter-{number:05}" for number in range(count)]
    channel = client.connection.channel()
    options.setdefault("headers", FACTS)
    body = options.pop("body", b"body")
    for each in ids:
        properties = pika.BasicProperties(message_id=each, delivery_mode=2, **options)
        channel.basic_publish("", "jobs.dead", body, properties)
    # Before the channel closes: RabbitMQ may lose what nobody has it confirm behind many others.
    client.await_ready("jobs.dead", count)
    channel.close()
    return ids


async def look(file: Path, queue: str, times: int) -> list[list[str]]:
    """The ids that are seen, as `workerd dead list` sees them, so many times in a row."""
    broker = load(file, environ={}).broker
    looks = []
    for _ in range(times):
        async with browse(broker, queue, Filter()) as box:
            looks.append([letter.id async for letter in box.letters()])
    return looks


KINDS: dict[str, dict[str, Any]] = {
    "declared by workerd": OWN,
    "quorum, without a limit": {"x_queue_type": "quorum"},
    "quorum, with a low limit": {"x_queue_type": "quorum", "x_delivery_limit": 3},
    "classic": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_letters_are_looked_at_again_and_again_and_stay_as_they_are(
    client: Client, workerd: Workerd, kind: str
) -> None:
    # More than RabbitMQ 3.10 keeps in order when they are returned in one go.
    client.declare("jobs.dead", **KINDS[kind])
    ids = fill(client, 100)
    # More than the 20 returns that RabbitMQ 4 allows by default.
    looks = asyncio.run(look(workerd.file, "jobs", 24))
    assert [number for number, seen in enumerate(looks) if seen != ids] == []
    letters = client.take("jobs.dead", len(ids))
    assert [each.id for each in letters] == ids
    own = {name: value for name, value in letters[0].headers.items() if "-count" not in name}
    assert own == FACTS
    assert letters[0].body == b"body"


def test_a_queue_that_drops_letters_at_their_first_return_is_not_looked_at(
    client: Client, workerd: Workerd
) -> None:
    client.declare("jobs.dead", x_queue_type="quorum", x_delivery_limit=0)
    fill(client, 3)
    assert "drops a message at its first return" in workerd("list", "jobs", status=75).stderr
    assert client.ready("jobs.dead") == 3


def test_a_killed_looker_leaves_the_letters_as_they_were(
    broker: Broker, client: Client, workerd: Workerd
) -> None:
    client.declare("jobs.dead", **OWN)
    ids = fill(client, 100)
    terminal, stdin = pty.openpty()
    looker = workerd.start("drop", "jobs", "--all", stdin=stdin)
    broker.await_depth("jobs.dead", unacked=100)
    looker.kill()
    looker.communicate()
    os.close(terminal)
    os.close(stdin)
    client.await_ready("jobs.dead", 100)
    assert workerd.listed() == ids


def test_of_two_lookers_the_second_is_told_so(
    broker: Broker, client: Client, workerd: Workerd
) -> None:
    client.declare("jobs.dead", **OWN)
    fill(client, 3)
    terminal, stdin = pty.openpty()
    first = workerd.start("drop", "jobs", "--all", stdin=stdin)
    broker.await_depth("jobs.dead", unacked=3)
    assert "somebody else is looking" in workerd("list", "jobs", status=75).stderr
    os.write(terminal, b"n\n")
    _, told = first.communicate(timeout=TIMEOUT)
    assert "Drop 3 dead letters of jobs for good? [y/N]" in told
    os.close(terminal)
    os.close(stdin)
    assert len(workerd.listed()) == 3


def test_tens_of_thousands_of_letters_are_listed_in_seconds(
    client: Client, workerd: Workerd
) -> None:
    client.declare("jobs.dead", **OWN)
    ids = fill(client, 10_000)
    began = time.monotonic()
    assert workerd.listed() == ids
    assert time.monotonic() - began < TIMEOUT


def test_a_table_has_a_line_for_each_letter_and_no_control_characters(
    client: Client, workerd: Workerd
) -> None:
    client.declare("jobs.dead", **OWN)
    client.publish("jobs.dead", b"x", headers=FACTS, message_id="a", type="t\x1b[31m")
    client.publish("jobs.dead", b"xyz")
    lines = workerd("list", "jobs").stdout.splitlines()
    assert lines[0].split() == ["ID", "TYPE", "REASON", "ATTEMPTS", "EXIT", "AGE", "SIZE"]
    assert lines[1].split()[:5] == ["a", r"t\x1b[31m", "exit-status", "5", "3"]
    assert lines[2].split() == ["-"] * 6 + ["3"]


def test_an_empty_queue_lists_nothing_and_a_missing_one_is_told(
    client: Client, workerd: Workerd
) -> None:
    assert "no queue 'jobs.dead'" in workerd("list", "jobs", status=73).stderr
    # Asking for it has not made it.
    assert not client.exists("jobs.dead")
    client.declare("jobs.dead", **OWN)
    assert workerd("list", "jobs").stdout == ""


def test_filters_choose_what_is_listed(client: Client, workerd: Workerd) -> None:
    client.declare("jobs.dead", **OWN)
    client.publish("jobs.dead", headers=FACTS, message_id="a", type="t")
    client.publish("jobs.dead", headers=FACTS, message_id="b", type="u")
    client.publish("jobs.dead", headers={"x-workerd-reason": "timeout"}, message_id="c", type="u")
    assert workerd.listed("--type", "u") == ["b", "c"]
    assert workerd.listed("--type", "u", "--reason", "timeout") == ["c"]
    assert workerd.listed("--id", "a", "--id", "c") == ["a", "c"]
    assert workerd.listed("--limit", "2") == ["a", "b"]
    assert workerd.listed("--type", "u", "--limit", "1") == ["b"]
    # Not even those shuffle them that want only some.
    assert workerd.listed() == ["a", "b", "c"]


def test_show_tells_everything_of_a_letter(client: Client, workerd: Workerd) -> None:
    client.declare("jobs.dead", **OWN)
    headers = {**FACTS, "customer": 17}
    client.publish("jobs.dead", b"the body", headers=headers, message_id="a", type="t")
    shown = workerd("show", "jobs", "a").stdout
    for words in (
        "exit-status",
        "customer",
        "17",
        "the body",
        r"two\x1b[31m",
        "1970-01-01T00:00:00Z",
    ):
        assert words in shown
    everything = json.loads(workerd("show", "jobs", "a", "--json").stdout)
    assert everything["body"] == "the body"
    # RabbitMQ 3.10 counts from the first delivery on.
    assert {**everything["headers"], "x-delivery-count": 0} == {**headers, "x-delivery-count": 0}
    assert everything["properties"] == {"type": "t", "message_id": "a"}
    assert workerd("show", "jobs", "a", "--body").stdout == "the body"
    assert "no dead letter of jobs has the id 'b'" in workerd("show", "jobs", "b", status=66).stderr


def test_a_letter_of_the_broker_itself_is_shown_and_sent_back(
    client: Client, workerd: Workerd
) -> None:
    client.declare("jobs.dead", **OWN)
    routing = {"x_dead_letter_exchange": "", "x_dead_letter_routing_key": "jobs.dead"}
    client.declare("jobs", **routing)
    client.publish("jobs", b"late", message_id="a", expiration="0")
    client.await_ready("jobs.dead", 1)
    assert "expired in queue jobs, once" in workerd("show", "jobs", "a").stdout
    assert workerd("requeue", "jobs", "--reason", "expired").stdout == "a\n"
    [job] = client.take("jobs")
    assert (job.id, job.body, job.properties.expiration) == ("a", b"late", None)
    assert list(job.headers) == ["x-workerd-replay"]


def test_a_job_that_is_sent_back_runs_again_although_it_is_remembered(
    broker: Broker, client: Client, daemon: Callable[..., Daemon], workerd: Workerd, tmp_path: Path
) -> None:
    marks = tmp_path / "marks"
    failing = ["sh", "-c", 'echo "$1" >> "$0"; exit 3', str(marks), "{attempt}"]
    running = daemon(config(broker.url, failing), "1")
    running.wait_event("consuming", queue="jobs")
    running.wait_event("consuming", queue="jobs.due")
    client.publish("jobs", b"x", message_id="a", headers={"mine": "kept"})
    client.await_ready("jobs.dead", 1)
    for times in (2, 3):
        assert workerd("requeue", "jobs", "--all").stdout == "a\n"
        until(lambda n=times: len(marks.read_text().split()) == n, f"run {times}")  # type: ignore[misc]
        client.await_ready("jobs.dead", 1)
    # Each was the first attempt of a new job.
    assert marks.read_text().split() == ["1"] * 3
    [dead] = client.take("jobs.dead")
    assert dead.headers["mine"] == "kept"
    assert dead.headers["x-workerd-attempts"] == 1


def test_a_full_queue_stops_sending_back_and_the_rest_stays_in_order(
    client: Client, workerd: Workerd
) -> None:
    client.declare("jobs", x_max_length=10, x_overflow="reject-publish")
    client.declare("jobs.dead", **OWN)
    ids = fill(client, 300)
    refused = workerd("requeue", "jobs", "--all", status=75)
    sent = refused.stdout.split()
    assert "jobs is full" in refused.stderr
    assert f"{len(sent)} sent back to jobs" in refused.stderr
    assert sent == [message.id for message in client.take("jobs", len(sent))]
    # The queue may take a few more than its length.
    assert 10 <= len(sent) < 300
    assert workerd.listed() == [each for each in ids if each not in sent]


def test_without_a_work_queue_nothing_is_sent_back(client: Client, workerd: Workerd) -> None:
    client.declare("jobs.dead", **OWN)
    ids = fill(client, 3)
    refused = workerd("requeue", "jobs", "--all", status=73)
    assert "no queue 'jobs'" in refused.stderr
    assert refused.stdout == ""
    assert workerd.listed() == ids


def test_an_alarm_stops_sending_back_and_nothing_is_lost(
    broker: Broker, client: Client, workerd: Workerd
) -> None:
    client.declare("jobs")
    client.declare("jobs.dead", **OWN)
    ids = fill(client, 3)
    broker.raise_memory_alarm()
    assert "the broker takes nothing" in workerd("requeue", "jobs", "--all", status=75).stderr
    broker.clear_memory_alarm()
    # What was sent before the alarm was known may still arrive: as a job too many.
    assert set(workerd.listed()) | {message.id for message in client.drain("jobs")} == set(ids)


def test_an_interrupted_sending_back_loses_nothing(
    broker: Broker, client: Client, workerd: Workerd
) -> None:
    client.declare("jobs", **OWN)
    client.declare("jobs.dead", **OWN)
    ids = fill(client, 1000)
    sending = workerd.start("requeue", "jobs", "--all")
    assert sending.stdout
    first = sending.stdout.readline()
    sending.kill()
    sending.communicate()
    until(lambda: broker.queues()["jobs.dead"].unacked == 0, "all letters are back")
    jobs = [message.id for message in client.drain("jobs")]
    left = [message.id for message in client.drain("jobs.dead")]
    assert first.strip() == ids[0]
    assert set(jobs) | set(left) == set(ids)
    # What stays, stays in order.
    assert left == sorted(str(each) for each in left)


def test_only_the_chosen_letters_are_sent_back(client: Client, workerd: Workerd) -> None:
    client.declare("jobs")
    client.declare("jobs.dead", **OWN)
    ids = fill(client, 100)
    chosen = [word for each in ids[10:90:20] for word in ("--id", each)]
    assert workerd("requeue", "jobs", *chosen, "--dry-run").stdout.split() == ids[10:90:20]
    assert client.ready("jobs") == 0
    assert workerd("requeue", "jobs", *chosen).stdout.split() == ids[10:90:20]
    assert [message.id for message in client.take("jobs", 4)] == ids[10:90:20]
    assert workerd.listed() == [each for each in ids if each not in ids[10:90:20]]


def test_the_last_hours_letters_are_sent_back_with_one_command(
    client: Client, workerd: Workerd
) -> None:
    client.declare("jobs")
    client.declare("jobs.dead", **OWN)
    minutes = {"young": 59, "old": 61, "older": 121}
    for name, ago in minutes.items():
        failed = stamp(time.time() - 60 * ago)
        client.publish("jobs.dead", headers={"x-workerd-last-failure": failed}, message_id=name)
    # It does not tell when it failed.
    client.publish("jobs.dead", message_id="ageless")
    assert workerd.listed("--newer-than", "2h", "--older-than", "1h") == ["old"]
    for bounds in (["1h", "1h"], ["1h", "2h"]):
        impossible = ["--newer-than", bounds[0], "--older-than", bounds[1]]
        refused = workerd("requeue", "jobs", *impossible, status=64)
        assert "--newer-than must be longer than --older-than" in refused.stderr
    assert workerd("requeue", "jobs", "--newer-than", "1h").stdout == "young\n"
    assert workerd.listed() == ["old", "older", "ageless"]
    assert [message.id for message in client.take("jobs")] == ["young"]


def test_a_letter_with_unreadable_headers_stays_and_the_others_are_sent_back(
    broker: Broker, client: Client, workerd: Workerd
) -> None:
    client.declare("jobs")
    client.declare("jobs.dead", **OWN)
    client.publish("jobs.dead", message_id="a")
    deep = octets.packed("t", "?", True)
    for _ in range(40):
        deep = octets.array(deep)
    properties = octets.Properties(headers=octets.field(b"deep", deep), message_id=b"b")
    client.channel.basic_publish("", "jobs.dead", b"", properties)
    client.publish("jobs.dead", message_id="c")
    partly = workerd("requeue", "jobs", "--all", status=65)
    assert partly.stdout.split() == ["a", "c"]
    assert "letter b stays: its headers cannot be decoded" in partly.stderr
    assert workerd.listed() == ["b"]


@pytest.mark.parametrize("command", ["requeue", "drop"])
def test_without_a_filter_or_all_nothing_is_touched(
    client: Client, workerd: Workerd, command: str
) -> None:
    client.declare("jobs.dead", **OWN)
    fill(client, 1)
    assert "--all" in workerd(command, "jobs", status=64).stderr
    assert "exclude" in workerd(command, "jobs", "--all", "--id", "a", status=64).stderr
    assert client.ready("jobs.dead") == 1


def test_letters_are_dropped_only_when_somebody_agrees(client: Client, workerd: Workerd) -> None:
    client.declare("jobs.dead", **OWN)
    ids = fill(client, 50)
    assert "--yes" in workerd("drop", "jobs", "--all", status=64).stderr
    assert workerd("drop", "jobs", "--all", "--dry-run").stdout.split() == ids
    assert workerd("drop", "jobs", "--limit", "2", "--yes").stdout.split() == ids[:2]
    terminal, stdin = pty.openpty()
    asked = workerd.start("drop", "jobs", "--id", ids[30], stdin=stdin)
    os.write(terminal, b"y\n")
    dropped, told = asked.communicate(timeout=TIMEOUT)
    os.close(terminal)
    os.close(stdin)
    assert dropped.split() == [ids[30]]
    assert told.endswith("1 dropped\n")
    assert workerd.listed() == ids[2:30] + ids[31:]


def test_export_prints_everything_and_removes_nothing(client: Client, workerd: Workerd) -> None:
    client.declare("jobs.dead", **OWN)
    client.publish("jobs.dead", b"\xff\0", headers=FACTS, message_id="a")
    client.publish("jobs.dead", "ä".encode(), headers={"mine": [1, "b"]}, priority=3)
    first, second = map(json.loads, workerd("export", "jobs").stdout.splitlines())
    assert base64.b64decode(first["body_base64"]) == b"\xff\0"
    assert first["headers"]["x-workerd-error"] == FACTS["x-workerd-error"]
    assert first["attempts"] == 5
    assert (second["id"], second["body"], second["headers"]["mine"]) == (None, "ä", [1, "b"])
    assert second["properties"] == {"priority": 3}
    client.await_ready("jobs.dead", 2)


def test_letters_cannot_be_read_without_the_right_to(
    broker: Broker, client: Client, workerd: Workerd
) -> None:
    client.declare("jobs.dead", **OWN)
    fill(client, 1)
    user = f"blind-{broker.vhost}"
    broker.ctl("add_user", user, "secret")
    broker.ctl("set_permissions", "-p", broker.vhost, user, "^$", ".*", "^$")
    url = broker.url.replace("guest:guest", f"{user}:secret")
    workerd.file.write_text(config(url, ["true"]))
    assert "ACCESS_REFUSED" in workerd("list", "jobs", status=77).stderr
    broker.ctl("delete_user", user)


def test_no_broker_is_told(workerd: Workerd) -> None:
    workerd.file.write_text(config("amqp://guest@127.0.0.1:1", ["true"]))
    assert "refused" in workerd("list", "jobs", status=69).stderr


def test_a_failed_job_waits_while_the_dead_letter_queue_is_missing_or_full(
    broker: Broker, client: Client, daemon: Callable[..., Daemon], workerd: Workerd
) -> None:
    client.declare("jobs.dead", x_max_length=1, x_overflow="reject-publish")
    running = daemon(config(broker.url, ["false"]))
    running.wait_event("consuming", queue="jobs.due")
    client.publish_jobs("jobs", ["a"])
    running.wait_event("dead letter", job_id="a")
    client.publish_jobs("jobs", ["b"])
    refused = running.wait_event("dead letter refused", job_id="b")
    assert "jobs.dead is full" in refused["text"]
    broker.await_depth("jobs", unacked=1)
    assert workerd("drop", "jobs", "--all", "--yes").stdout == "a\n"
    running.wait_event("dead letter", job_id="b")

    client.channel.queue_delete("jobs.dead")
    client.publish_jobs("jobs", ["c"])
    refused = running.wait_event("dead letter refused", job_id="c")
    assert "no queue 'jobs.dead'" in refused["text"]
    broker.await_depth("jobs", unacked=1)
    client.declare("jobs.dead", **OWN)
    running.wait_event("dead letter", job_id="c")
    broker.await_depth("jobs")
    assert workerd.listed() == ["c"]
