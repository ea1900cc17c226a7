"""Errors of pika, of RabbitMQ and of the network, as `BrokerError`."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Mapping

import pika.exceptions

from workerd.errors import BrokerError, ErrorKind

_KINDS = {
    200: ErrorKind.AWAY,
    320: ErrorKind.AWAY,
    403: ErrorKind.REFUSED,
    404: ErrorKind.MISSING,
    405: ErrorKind.LOCKED,
    530: ErrorKind.REFUSED,
}

#: How RabbitMQ (3.10 to 4.3) refuses one published message; then it closes the channel.
_MAX_SIZE = re.compile(r"larger than configured max size (\d+)")
_BAD_PROPERTY = re.compile(r"invalid expiration|invalid message|user_id property set to")

_CLOSED_BY_US = (pika.exceptions.ConnectionClosedByClient, pika.exceptions.ChannelClosedByClient)


def diagnose(error: BaseException) -> BrokerError:
    """What an error of pika, of the broker or of the network means. The one place that knows."""
    if isinstance(error, BrokerError):
        return error
    code = getattr(error, "reply_code", None)
    if isinstance(error, _CLOSED_BY_US):
        return BrokerError(ErrorKind.CLOSED, "closed by workerd")
    if code is not None:
        return _by_code(code, str(error.reply_text))  # type: ignore[attr-defined]
    inner = _inner(error)
    if inner is not None:
        return diagnose(inner)
    text = str(error) or type(error).__name__
    # pika turns a refused login or virtual host into an error that holds only the repr of
    # the broker's close: "ConnectionClosedByBroker: (403) 'ACCESS_REFUSED - …'".
    quoted = re.search(r"ConnectionClosedByBroker: \((\d+)\) ['\"](.*)['\"]", text)
    if quoted:
        return _by_code(int(quoted[1]), quoted[2])
    if isinstance(error, ssl.SSLCertVerificationError):
        return BrokerError(ErrorKind.REFUSED, f"TLS: {error.verify_message}")
    # The peer's opinion of our certificate comes when the handshake is over for us, and pika
    # keeps only the repr: "SSLError(1, '[SSL: TLSV1_ALERT_UNKNOWN_CA] tlsv1 alert unknown ca (…".
    alert = re.search(r"SSLError\(\d+, '\[SSL: \w+\] \w+ alert (.*?) \(_ssl", text)
    if alert:
        return BrokerError(ErrorKind.REFUSED, f"TLS: the broker says: {alert[1]}")
    if isinstance(error, ssl.SSLError) and error.reason:
        return BrokerError(ErrorKind.AWAY, f"TLS: {error.reason.replace('_', ' ').lower()}")
    if isinstance(error, pika.exceptions.AuthenticationError):
        # Its text is the bare name of the mechanism that is not offered.
        text = "the broker takes no password: add PLAIN to its auth_mechanisms (rabbitmq.conf)"
        return BrokerError(ErrorKind.REFUSED, text)
    if isinstance(error, pika.exceptions.NoFreeChannels):
        text = "the broker allows no more channels on a connection: raise its channel_max"
        return BrokerError(ErrorKind.AWAY, text)
    if isinstance(error, pika.exceptions.ProbableAuthenticationError):
        return BrokerError(ErrorKind.AWAY, "the broker hung up during the login")
    if isinstance(error, socket.gaierror):
        return BrokerError(ErrorKind.AWAY, f"host name: {error.strerror}")
    if isinstance(error, TimeoutError) and not error.errno:
        return BrokerError(ErrorKind.AWAY, "no answer to an attempt to connect")
    if isinstance(error, OSError) and error.strerror:
        return BrokerError(ErrorKind.AWAY, error.strerror.lower())
    return BrokerError(ErrorKind.AWAY, _plain(error, text))


def for_message(error: BrokerError, size: int, alone: bool) -> BrokerError:
    """What the error that ended a channel means for one of its messages, ``size`` bytes large.

    RabbitMQ does not say which message it refused. Where that cannot be told, as for one that
    was not ``alone`` in having no confirm, nobody knows what became of it: publish it again.
    """
    limit = _MAX_SIZE.search(str(error))
    refused = alone if limit is None else size > int(limit[1])
    if refused or not error.kind.of_one_message:
        return error
    return BrokerError(ErrorKind.AWAY, f"lost with another message: {error}", error.code)


def with_addresses(error: BrokerError, attempts: Mapping[str, BaseException | None]) -> BrokerError:
    """The error that ended an attempt to connect, with what became of each address, if several.

    An address whose error is None is the one at which the attempt ended.
    """
    if len(attempts) < 2:
        return error
    texts = (
        f"{address}: {error if failure is None else diagnose(failure)}"
        for address, failure in attempts.items()
    )
    return BrokerError(error.kind, "; ".join(texts), error.code)


def is_noise(error: BaseException | None) -> bool:
    """Whether an error in a callback is pika's own, and of no consequence.

    When a connection is given up while it opens, pika (1.2.0 to 1.4.4) hands a class instead
    of an exception to itself, and fails an assertion after all is done.
    """
    return isinstance(error, AssertionError) and "from workflow, but got" in str(error)


def _by_code(code: int, text: str) -> BrokerError:
    kind = _KINDS.get(code, ErrorKind.AWAY)
    if code == 406 and "inequivalent arg" in text:
        kind = ErrorKind.CONFLICT
    elif code == 406 and _MAX_SIZE.search(text):
        kind = ErrorKind.TOO_LARGE
    elif code == 406 and _BAD_PROPERTY.search(text):
        kind = ErrorKind.UNACCEPTABLE
    elif code == 406 and "delivery acknowledgement" in text and "timed out" in text:
        kind = ErrorKind.ACK_TIMEOUT
    return BrokerError(kind, text, code)


def _inner(error: BaseException) -> BaseException | None:
    """The cause that pika has wrapped, or None."""
    wrapped = getattr(error, "exceptions", None) or error.args
    candidates: list[object] = [getattr(error, "exception", None), *reversed(tuple(wrapped))]
    return next((c for c in candidates if isinstance(c, BaseException)), None)


def _plain(error: BaseException, text: str) -> str:
    if isinstance(error, pika.exceptions.AMQPHeartbeatTimeout):
        return "no heartbeat from the broker"
    if "StackTimeout" in repr(error):
        return f"no AMQP answer within {CONNECT_TIMEOUT:.0f} s"
    # pika keeps the repr of an error in the text of another.
    system = re.search(r"\w+Error\(\d+, ['\"](.+?)['\"]\)", text)
    if system:
        return f"connection lost: {system[1].lower()}"
    if isinstance(error, pika.exceptions.StreamLostError):
        return "connection lost: " + text.removeprefix("Stream connection lost: ")
    if isinstance(error, pika.exceptions.IncompatibleProtocolError):
        return "the connection ended before AMQP 0-9-1 was agreed on: is this RabbitMQ's AMQP port?"
    if text == type(error).__name__:
        return f"the connection ended ({text})"
    return text


#: The text in which RabbitMQ (up to 4.2) tells its ack timeout when it closes a channel.
_ACK_TIMEOUT_TEXT = re.compile(r"Timeout value used: (\d+) ms")


def ack_timeout_in(error: BrokerError) -> float | None:
    """The broker's acknowledgement timeout in seconds, where the error's text names it."""
    found = _ACK_TIMEOUT_TEXT.search(str(error))
    return int(found[1]) / 1000 if found else None


#: For the look-up of a name, TCP, TLS, login and opening, all together.
CONNECT_TIMEOUT = 10.0
#: For TCP alone, to all addresses of a name together: what does not answer is told as that.
TCP_TIMEOUT = 0.9 * CONNECT_TIMEOUT
#: For the answer to one request; then the connection counts as dead.
ANSWER_TIMEOUT = 15.0
#: For a publish to be confirmed while the broker is not blocking us.
CONFIRM_TIMEOUT = 60.0
