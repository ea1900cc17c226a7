"""The message contract: any AMQP message runs as a job or becomes a dead letter, unchanged."""

from __future__ import annotations

import gzip
import re
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.harness.amqp import Client, Message
from tests.harness.broker import Broker
from tests.harness.daemon import Daemon
from tests.harness.octets import (
    Properties,
    array,
    field,
    headers_of,
    long_string,
    packed,
    raw_headers,
    table,
)
from tests.harness.waiting import until

Start = Callable[..., Daemon]

CONFIG = r"""
[broker]
urls = ["{url}"]

[worker]
drain_timeout = "1s"

[queues.default]
concurrency = 1
{queue}

[handlers.echo]
command = ["sh", "-c", "cat; echo", "sh", "{{body}}"]

[handlers.fail]
command = ["sh", "-c", "echo first line >&2; echo {{type}} is no use >&2; exit 3"]
retry.attempts = 1

[handlers.verbose]
command = ["sh", "-c", "seq 1 99999 >&2; printf 'the end' >&2; exit 1"]
retry.attempts = 1

[handlers.crash]
command = ["sh", "-c", "kill -SEGV $$"]
retry.attempts = 1

[handlers.key]
command = ["printf", "%s|", "{{body.key}}"]

[handlers.header]
command = ["sh", "-c", "printf '%s|' \"$WORKERD_HEADER_H\" \"$1\"", "--", "{{header.h}}"]

[handlers.large]
command = ["wc", "-c"]
max_body = "20MiB"
"""


def config(broker: Broker, queue: str = "") -> str:
    return CONFIG.format(url=broker.url, queue=queue)


def reason(letter: Message) -> str:
    text: str = letter.headers["x-workerd-reason"]
    return text


def outputs(daemon: Daemon, job_id: str) -> list[str]:
    return [entry["text"] for entry in daemon.events("output", job_id=job_id)]


# The type, row 46


def test_a_message_of_unknown_type_becomes_a_dead_letter_and_is_never_requeued(
    broker: Broker, client: Client, daemon: Start
) -> None:
    workerd = daemon(config(broker))
    workerd.wait_ready()
    client.publish("default", b"for nobody", type="nobody", message_id="unknown")
    client.publish("default", b"for no one", message_id="typeless")
    unknown, typeless = client.take("default.dead", 2)
    assert (unknown.id, reason(unknown), unknown.body) == ("unknown", "unknown-type", b"for nobody")
    assert unknown.headers["x-workerd-error"] == "no handler is named 'nobody'"
    assert (typeless.id, reason(typeless)) == ("typeless", "unknown-type")
    assert "no default_handler" in typeless.headers["x-workerd-error"]
    # Nothing is behind them in the queue, and neither came a second time.
    client.publish("default", b"", type="echo", message_id="next")
    workerd.wait_event("done", job_id="next")
    assert [entry["job_id"] for entry in workerd.events("start")] == ["next"]


def test_a_message_without_a_type_goes_to_the_default_handler_of_its_queue(
    broker: Broker, client: Client, daemon: Start
) -> None:
    workerd = daemon(config(broker, 'default_handler = "echo"'))
    workerd.wait_ready()
    client.publish("default", b"hello", message_id="typeless")
    workerd.wait_event("done", job_id="typeless")
    assert outputs(workerd, "typeless") == ["hello"]


# The body, rows 47 and 48


def test_an_empty_body_is_a_body(broker: Broker, client: Client, daemon: Start) -> None:
    workerd = daemon(config(broker))
    workerd.wait_ready()
    client.publish("default", b"", type="large", message_id="empty")
    workerd.wait_event("done", job_id="empty")
    assert outputs(workerd, "empty") == ["0"]


def test_a_huge_body_runs_or_becomes_a_dead_letter_as_max_body_says(
    broker: Broker, client: Client, daemon: Start
) -> None:
    workerd = daemon(config(broker))
    workerd.wait_ready()
    body = bytes(16 << 20)
    client.publish("default", body, type="large", message_id="delivered")
    client.publish("default", body, type="echo", message_id="refused")
    workerd.wait_event("done", job_id="delivered")
    assert outputs(workerd, "delivered") == [str(len(body))]
    (letter,) = client.take("default.dead")
    assert (letter.id, reason(letter)) == ("refused", "too-large")
    assert letter.headers["x-workerd-error"] == "the body has 16777216 bytes; max_body is 1048576"
    assert letter.body == body


DEEP = b'{"key": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        pytest.param(b"\xff\xfe\xfd", "bad-body", id="not UTF-8"),
        pytest.param(b'{"key": ', "bad-body", id="not JSON"),
        pytest.param(b"[1, 2]", "bad-body", id="no object"),
        pytest.param(b'{"other": 1}', "bad-body", id="no such key"),
        pytest.param(DEEP, "bad-body", id="100,000 arrays deep"),
        pytest.param(b'{"key": "\\u0000"}', "bad-argument", id="NUL"),
        pytest.param(b'{"key": "\\ud800"}', "bad-body", id="half a surrogate pair"),
    ],
)
def test_a_body_without_the_key_that_a_command_needs_is_a_dead_letter_at_once(
    broker: Broker, client: Client, daemon: Start, body: bytes, expected: str
) -> None:
    workerd = daemon(config(broker))
    workerd.wait_ready()
    client.publish("default", body, type="key", message_id="bad")
    (letter,) = client.take("default.dead")
    assert reason(letter) == expected
    assert letter.body == body
    assert letter.headers["x-workerd-attempts"] == 0
    workerd.wait_event("dead letter", job_id="bad")
    assert not workerd.events("start")


# The headers, row 49


def nested(wrap: Callable[[bytes], bytes], depth: int) -> bytes:
    inside = b""
    for _ in range(depth):
        inside = wrap(inside)
    return inside


MILLISECONDS = packed("T", "Q", 1_700_000_000_000)
DEEP_TABLE = nested(lambda inside: table(field(b"t", inside or b"V")), 1000)
DEEP_ARRAY = nested(array, 1000)


@pytest.mark.pika
@pytest.mark.parametrize(
    ("value", "shown"),
    [
        pytest.param(MILLISECONDS, "1700000000000", id="a timestamp in milliseconds"),
        pytest.param(packed("d", "d", 1.5), "1.5", id="a float"),
        pytest.param(packed("l", "q", -5), "-5", id="a negative number"),
        pytest.param(table(field(b"\xff", b"V")), "{}", id="a name that is not UTF-8"),
        pytest.param(long_string(b"\xff"), "\\xff", id="text that is not UTF-8"),
    ],
)
def test_a_strange_header_reaches_the_handler(
    broker: Broker, client: Client, daemon: Start, value: bytes, shown: str
) -> None:
    workerd = daemon(config(broker))
    workerd.wait_ready()
    strange = Properties(headers=field(b"h", value), type=b"header", message_id=b"strange")
    client.channel.basic_publish("", "default", b"", strange, mandatory=True)
    workerd.wait_event("done", job_id="strange")
    assert outputs(workerd, "strange") == [f"{shown}|{shown}|"]
    assert len(workerd.events("connected")) == 1


@pytest.mark.pika
@pytest.mark.parametrize(
    "properties",
    [
        pytest.param({"headers": field(b"h", DEEP_TABLE)}, id="a thousand nested tables"),
        pytest.param({"headers": field(b"h", DEEP_ARRAY)}, id="a thousand nested arrays"),
        pytest.param({"type": b"\xff\xfe"}, id="a type that is not UTF-8"),
        pytest.param({"correlation_id": b"\xff"}, id="a correlation id that is not UTF-8"),
    ],
)
def test_a_message_that_no_handler_could_be_given_is_moved_untouched(
    broker: Broker, client: Client, daemon: Start, properties: dict[str, Any]
) -> None:
    workerd = daemon(config(broker))
    workerd.wait_ready()
    poison = Properties(**{"type": b"echo", "message_id": b"poison", **properties})
    client.channel.basic_publish("", "default", b"body", poison, mandatory=True)
    client.publish("default", b"", type="echo", message_id="next")
    workerd.wait_event("done", job_id="next")
    with raw_headers():
        (letter,) = client.take("default.dead")
    assert letter.body == b"body"
    assert letter.id == "poison"
    if "headers" in properties:
        assert headers_of(letter.properties)[b"h"] == properties["headers"][2:]
    for name in properties.keys() - {"headers"}:
        assert getattr(letter.properties, name) == properties[name]
    assert len(workerd.events("connected")) == 1


@pytest.mark.pika
def test_a_broker_that_does_not_move_rejected_messages_gets_a_copy_of_what_can_be_sent(
    broker: Broker, client: Client, daemon: Start
) -> None:
    workerd = daemon(config(broker, 'declare = "plain"'))
    workerd.wait_ready()
    poison = Properties(headers=field(b"h", DEEP_ARRAY), type=b"\xff", message_id=b"poison")
    client.channel.basic_publish("", "default", b"body", poison, mandatory=True)
    (letter,) = client.take("default.dead")
    assert (letter.id, letter.body, letter.properties.type) == ("poison", b"body", b"\xff")
    assert reason(letter) == "bad-headers"
    assert "h" not in letter.headers
    assert workerd.wait_event("headers dropped", job_id="poison")["names"] == "all of them"


@pytest.mark.pika
def test_a_hundred_kilobytes_of_headers_run_and_fail_like_any_job(
    broker: Broker, client: Client, daemon: Start
) -> None:
    workerd = daemon(config(broker))
    workerd.wait_ready()
    headers = {f"header-{number}": "x" * 1000 for number in range(100)}
    client.publish("default", b"", type="large", message_id="good", headers=headers)
    client.publish("default", b"", type="fail", message_id="bad", headers=headers)
    workerd.wait_event("done", job_id="good")
    (letter,) = client.take("default.dead")
    kept = {name for name in letter.headers if name.startswith("header-")}
    dropped = set(workerd.wait_event("headers dropped", job_id="bad")["names"].split(", "))
    assert kept | dropped == headers.keys()
    assert kept.isdisjoint(dropped)
    assert len(kept) > 60


FORGED: list[tuple[str, object]] = [
    ("x-death", 7),
    ("x-death", [{"count": "many", "queue": ["default"]}]),
    ("x-first-death-reason", "expired"),
    ("x-last-death-queue", "default"),
    ("x-delivery-count", 10**9),
    ("x-delivery-count", "many"),
    ("x-acquired-count", -1),
    ("x-workerd-attempt", -1),
    ("x-workerd-attempt", 2**63 - 1),
    ("x-workerd-attempt", "7"),
    ("x-workerd-attempt", True),
    ("x-workerd-attempt", [1]),
    ("x-workerd-expires", "soon"),
    ("x-workerd-expires", -1),
    ("x-workerd-replay", {"a": {"b": 1}}),
]


@pytest.mark.pika
def test_forged_bookkeeping_counts_for_nothing_and_goes_no_further(
    broker: Broker, client: Client, daemon: Start
) -> None:
    workerd = daemon(config(broker))
    workerd.wait_ready()
    for number, (name, value) in enumerate(FORGED):
        forged = {name: value, "mine": number}
        client.publish("default", b"", type="echo", message_id=f"good-{number}", headers=forged)
        client.publish("default", b"", type="fail", message_id=f"bad-{number}", headers=forged)
    letters = client.take("default.dead", len(FORGED))
    for number, letter in enumerate(letters):
        assert (letter.id, letter.headers.pop("mine")) == (f"bad-{number}", number)
        assert letter.headers["x-workerd-attempts"] == 1
        # A quorum queue counts deliveries in every message that it hands out.
        foreign = {name for name in letter.headers if not name.startswith("x-workerd-")}
        assert foreign <= {"x-delivery-count"}
        assert letter.headers.get("x-delivery-count", 0) == 0
        assert letter.headers.keys().isdisjoint({"x-workerd-attempt", "x-workerd-replay"})
    for number in range(len(FORGED)):
        workerd.wait_event("done", job_id=f"good-{number}", attempt=1)


# Twins and redeliveries, rows 51 and 53


def test_messages_of_one_id_all_run_unless_one_is_a_redelivery(
    broker: Broker, client: Client, daemon: Start
) -> None:
    workerd = daemon(config(broker))
    workerd.wait_ready()
    for body in (b"one", b"two", b"two"):
        client.publish("default", body, type="echo", message_id="same")
        workerd.wait_event("done", job_id="same", count=len(workerd.events("start")) or 1)
    workerd.wait_event("done", job_id="same", count=3)
    assert outputs(workerd, "same") == ["one", "two", "two"]
    assert not workerd.events("settled again")


def test_a_redelivery_of_a_job_that_is_unknown_here_runs(
    broker: Broker, client: Client, daemon: Start
) -> None:
    client.declare("default", x_queue_type="quorum", x_delivery_limit=1_000_000)
    client.publish("default", b"hello", type="echo", message_id="elsewhere")
    # Another worker has it and goes away.
    client.look("default")
    workerd = daemon(config(broker))
    workerd.wait_ready()
    start = workerd.wait_event("start", job_id="elsewhere")
    assert (start["redelivered"], start["attempt"]) == (True, 1)
    workerd.wait_event("done", job_id="elsewhere")
    assert outputs(workerd, "elsewhere") == ["hello"]


# Encodings, row 54


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "no-such-encoding"])
def test_an_encoded_body_is_passed_through_as_it_is(
    broker: Broker, client: Client, daemon: Start, encoding: str
) -> None:
    # Ten megabytes when it is decoded.
    body = gzip.compress(bytes(10 << 20))
    workerd = daemon(config(broker))
    workerd.wait_ready()
    client.publish("default", body, type="large", message_id="bomb", content_encoding=encoding)
    workerd.wait_event("done", job_id="bomb")
    assert outputs(workerd, "bomb") == [str(len(body))]


# The dead letter


def test_a_dead_letter_says_what_happened_and_leaves_the_rest_as_it_was(
    broker: Broker, client: Client, daemon: Start
) -> None:
    workerd = daemon(config(broker), instance="two")
    workerd.wait_ready()
    body = bytes(range(256))
    sent: dict[str, Any] = {
        "content_type": "image/png",
        "content_encoding": "gzip",
        "correlation_id": "c",
        "reply_to": "r",
        "priority": 3,
        "timestamp": int(time.time()),
        "type": "fail",
        "message_id": "failed",
    }
    headers = {"text": "é", "number": 7, "list": [1, {"deep": None}], "flag": True}
    client.publish("default", body, headers=headers, expiration="600000", **sent)
    (letter,) = client.take("default.dead")
    assert letter.body == body
    assert {name: getattr(letter.properties, name) for name in sent} == sent
    assert letter.properties.delivery_mode == 2
    # The sender's TTL would make the broker drop the letter; it stands in a header instead.
    assert letter.properties.expiration is None
    facts = {
        name.removeprefix("x-workerd-"): letter.headers.pop(name)
        for name in list(letter.headers)
        if name.startswith("x-workerd-")
    }
    letter.headers.pop("x-delivery-count", None)
    assert letter.headers == headers
    assert facts.pop("first-failure") == facts["last-failure"]
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", facts.pop("last-failure"))
    # A timestamp has whole seconds.
    assert 600_000 <= facts.pop("expires") - sent["timestamp"] * 1000 < 601_000
    assert facts == {
        "reason": "exit-status",
        "exit-status": 3,
        "error": "first line\nfail is no use",
        "attempts": 1,
        "queue": "default",
        "host": socket.gethostname(),
        "instance": "two",
    }


def test_a_dead_letter_names_the_signal_and_keeps_the_end_of_a_long_stderr(
    broker: Broker, client: Client, daemon: Start
) -> None:
    workerd = daemon(config(broker))
    workerd.wait_ready()
    client.publish("default", b"", type="crash", message_id="crashed")
    client.publish("default", b"", type="verbose", message_id="verbose")
    crashed, verbose = client.take("default.dead", 2)
    assert (reason(crashed), crashed.headers["x-workerd-signal"]) == ("signal", "SIGSEGV")
    assert "x-workerd-exit-status" not in crashed.headers
    error = verbose.headers["x-workerd-error"]
    assert error.endswith("99999\nthe end")
    assert 8000 < len(error) <= 8192


@pytest.mark.parametrize("full", [False, True], ids=["missing", "full"])
def test_a_job_stays_unacknowledged_until_its_dead_letter_can_be_published(
    broker: Broker, client: Client, daemon: Start, full: bool
) -> None:
    if full:
        # An administrator's own, which takes one letter and then refuses.
        client.declare("default.dead", x_max_length=1, x_overflow="reject-publish")
        client.publish("default.dead", b"in the way")
    workerd = daemon(config(broker))
    workerd.wait_ready()
    if not full:
        client.channel.queue_delete("default.dead")
    client.publish("default", b"precious", type="fail", message_id="failed")
    workerd.wait_event("dead letter refused", job_id="failed")
    assert broker.queues()["default"].unacked == 1
    if full:
        client.take("default.dead")
    else:
        client.declare("default.dead", x_queue_type="quorum")
    (letter,) = client.take("default.dead")
    assert (letter.id, letter.body, reason(letter)) == ("failed", b"precious", "exit-status")
    until(lambda: broker.queues()["default"].unacked == 0, "it is acknowledged")
    workerd.wait_event("dead letter", job_id="failed")
    assert len(workerd.events("start")) == 1


@pytest.mark.parametrize("kind", ["quorum", "classic"])
@pytest.mark.parametrize("full", [False, True], ids=["missing", "full"])
def test_a_message_that_no_handler_could_be_given_is_not_lost_where_dead_letters_cannot_go(
    broker: Broker, client: Client, daemon: Start, full: bool, kind: str
) -> None:
    if full:
        client.declare("default.dead", x_max_length=1, x_overflow="reject-publish")
        client.publish("default.dead", b"in the way")
    workerd = daemon(config(broker, f'type = "{kind}"'))
    workerd.wait_ready()
    if not full:
        client.channel.queue_delete("default.dead")
    poison = Properties(type=b"\xff", message_id=b"poison")
    client.channel.basic_publish("", "default", b"precious", poison, mandatory=True)
    workerd.wait_event("rejected", job_id="poison")
    workerd.stop()
    assert client.ready("default.dead") == (1 if full else 0)
    depth = broker.queues()["default"]
    assert depth.ready + depth.unacked == 1
