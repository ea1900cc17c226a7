"""What an error of pika, of RabbitMQ or of the network means."""

from __future__ import annotations

import socket

import pika.exceptions
import pytest

from workerd.broker.errors import ack_timeout_in, diagnose, is_noise
from workerd.errors import BrokerError, ErrorKind

TOO_LATE = (
    "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out. "
    "Timeout value used: 1800000 ms. This timeout value can be configured"
)
INEQUIVALENT = "PRECONDITION_FAILED - inequivalent arg 'x-queue-type' for queue 'q'"
TOO_LARGE = "PRECONDITION_FAILED - message size 9 is larger than configured max size 8"


@pytest.mark.parametrize(
    ("code", "text", "kind"),
    [
        (200, "Goodbye", ErrorKind.AWAY),
        (320, "CONNECTION_FORCED - broker forced connection closure", ErrorKind.AWAY),
        (403, "ACCESS_REFUSED - access to queue 'q' refused", ErrorKind.REFUSED),
        (404, "NOT_FOUND - no queue 'q' in vhost '/'", ErrorKind.MISSING),
        (405, "RESOURCE_LOCKED - cannot obtain exclusive access", ErrorKind.LOCKED),
        (406, INEQUIVALENT, ErrorKind.CONFLICT),
        (406, TOO_LARGE, ErrorKind.TOO_LARGE),
        (406, TOO_LATE, ErrorKind.ACK_TIMEOUT),
        (406, "PRECONDITION_FAILED - invalid expiration 'soon'", ErrorKind.UNACCEPTABLE),
        (406, "PRECONDITION_FAILED - something else", ErrorKind.AWAY),
        (530, "NOT_ALLOWED - vhost v not found", ErrorKind.REFUSED),
        (541, "INTERNAL_ERROR", ErrorKind.AWAY),
    ],
)
def test_what_the_broker_closes_with_is_known_by_code_and_text(
    code: int, text: str, kind: ErrorKind
) -> None:
    for error in (
        pika.exceptions.ChannelClosedByBroker(code, text),
        pika.exceptions.ConnectionClosedByBroker(code, text),
        # As pika wraps a close while it connects.
        pika.exceptions.AMQPConnectionError(f"ConnectionClosedByBroker: ({code}) {text!r}"),
    ):
        found = diagnose(error)
        assert (found.kind, found.code, str(found)) == (kind, code, text)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (pika.exceptions.ChannelClosedByClient(0, "x"), ErrorKind.CLOSED, "closed by workerd"),
        (ConnectionRefusedError(111, "Connection refused"), ErrorKind.AWAY, "connection refused"),
        (
            socket.gaierror(-2, "Name or service not known"),
            ErrorKind.AWAY,
            "host name: Name or service not known",
        ),
        (
            pika.exceptions.StreamLostError("Stream connection lost: reset"),
            ErrorKind.AWAY,
            "connection lost: reset",
        ),
        (
            pika.exceptions.AMQPHeartbeatTimeout(),
            ErrorKind.AWAY,
            "no heartbeat from the broker",
        ),
        (
            pika.exceptions.AMQPConnectionError(
                "SSLError(1, '[SSL: TLSV1_ALERT_UNKNOWN_CA] tlsv1 alert unknown ca (_ssl.c:2580)')"
            ),
            ErrorKind.REFUSED,
            "TLS: the broker says: unknown ca",
        ),
    ],
)
def test_other_ends_are_told_in_plain_words(error: Exception, kind: ErrorKind, text: str) -> None:
    found = diagnose(error)
    assert (found.kind, str(found)) == (kind, text)
    # Wrapped as pika wraps it, the cause is found.
    assert str(diagnose(pika.exceptions.AMQPConnectionError(error))) == text


def test_what_is_known_already_stays() -> None:
    error = BrokerError(ErrorKind.BUSY, "full")
    assert diagnose(error) is error


def test_the_acknowledgement_timeout_is_read_out_of_the_error() -> None:
    assert ack_timeout_in(BrokerError(ErrorKind.ACK_TIMEOUT, TOO_LATE)) == 1800.0
    assert ack_timeout_in(BrokerError(ErrorKind.ACK_TIMEOUT, "in other words")) is None


def test_only_pikas_own_assertion_is_noise() -> None:
    assert is_noise(AssertionError("expected exception from workflow, but got <class 'X'>"))
    assert not is_noise(AssertionError("something else"))
    assert not is_noise(None)
