"""What is submitted, and where it goes at which moment."""

from __future__ import annotations

import time

from workerd.core.job import Message
from workerd.core.submission import Submission
from workerd.core.topology import MAX_DELAY, delayed


def test_a_clock_that_is_set_back_meanwhile_delays_no_further_than_the_levels_can() -> None:
    now = time.time()
    submission = Submission("default", Message(), max_body=0, due=now + MAX_DELAY, ttl=None)
    publish = submission.publish_at(submission.message(b"", now), now - 3600)
    assert (publish.exchange, publish.key) == delayed(submission.queue, MAX_DELAY)
