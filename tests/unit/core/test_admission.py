"""Which jobs may start, and which are dead letters at once."""

from __future__ import annotations

import pytest

from workerd.config.model import Handler, Queue, Retry, Settings
from workerd.core.admission import admit
from workerd.core.decode import decode
from workerd.core.job import ATTEMPT, DELIVERY_COUNT, EXPIRES, MAX_ATTEMPTS, BadJob, Job, Message

NOW = 1_800_000_000.0
RESIZE = Handler("resize", ("true",), max_body=4, retry=Retry(attempts=3, max_attempts=6))
SETTINGS = Settings(queues={"q": Queue("q", max_deliveries=3)}, handlers={"resize": RESIZE})


def job(
    body: bytes = b"", kind: str | None = "resize", redelivered: bool = False, **headers: object
) -> Job:
    names = {
        "attempt": ATTEMPT,
        "most": MAX_ATTEMPTS,
        "returns": DELIVERY_COUNT,
        "expires": EXPIRES,
    }
    given = {names[name]: value for name, value in headers.items()}
    return decode(Message(body, type=kind, headers=given), "q", redelivered)


def refusal(of: Job) -> str:
    """The reason why a job may not start."""
    with pytest.raises(BadJob) as caught:
        admit(of, SETTINGS, NOW)
    return caught.value.reason


@pytest.mark.parametrize(
    "good",
    [
        job(),
        job(b"four"),
        job(attempt=2),
        job(attempt=5, most=6),
        job(expires=int(NOW * 1000)),
        job(redelivered=True, returns=2),
        # It has not come back: the count is a sender's, or that of an earlier queue.
        job(returns=3),
        job(attempt=1).after_lost_starts(1),
    ],
)
def test_a_job_that_keeps_to_the_limits_may_start(good: Job) -> None:
    assert admit(good, SETTINGS, NOW) is RESIZE


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (job(b"fives"), "too-large"),
        (job(kind=None), "unknown-type"),
        (job(kind="resise"), "unknown-type"),
        (job(expires=int(NOW * 1000) - 1), "expired"),
        (job(attempt=3), "attempts-spent"),
        (job(attempt=1, most=1), "attempts-spent"),
        (job(attempt=6, most=1000), "attempts-spent"),
        (job().after_lost_starts(3), "worker-lost"),
        (job(attempt=2).after_lost_starts(1), "worker-lost"),
        (job(redelivered=True, returns=3), "max-deliveries"),
    ],
)
def test_a_job_beyond_a_limit_is_a_dead_letter_with_the_reason(bad: Job, reason: str) -> None:
    assert refusal(bad) == reason


def test_what_is_wrong_with_the_message_comes_first() -> None:
    message = Message(b"fives", type=b"\xff", headers={EXPIRES: 1})
    assert refusal(decode(message, "q")) == "bad-property"


def test_a_dead_letter_says_how_many_attempts_ended_with_their_daemon() -> None:
    with pytest.raises(BadJob, match="could settle 1 of its 3 attempts"):
        admit(job(attempt=2).after_lost_starts(1), SETTINGS, NOW)


def test_a_queue_that_a_reload_took_away_has_no_limit_of_returns() -> None:
    settings = Settings(handlers={"resize": RESIZE})
    assert admit(job(redelivered=True, returns=1000), settings, NOW) is RESIZE
