"""What is submitted: the message, and where it goes."""

from __future__ import annotations

import pytest

from workerd.core.job import COPY, Message
from workerd.core.submission import Submission
from workerd.core.topology import MAX_DELAY, delayed
from workerd.errors import CommandError

TEMPLATE = Message(type="sleep", headers={"trace": "1"})


def submission(template: Message = TEMPLATE) -> Submission:
    return Submission("default", template, max_body=4, due=None, ttl=None)


def test_each_message_has_a_copy_id_of_its_own_and_keeps_it_however_often_it_is_published() -> None:
    wanted = submission()
    one, two = wanted.message(b"1", 5.9), wanted.message(b"1", 5.9)
    assert one.headers[COPY] != two.headers[COPY]
    assert one.message_id != two.message_id
    for now in (0.0, 1e9):
        published = wanted.publish_at(one, now).message
        assert (published.headers, published.timestamp) == (one.headers, one.timestamp)
    assert TEMPLATE.headers == {"trace": "1"}


def test_the_copy_id_and_the_time_of_a_message_that_was_sent_before_are_kept() -> None:
    message = submission().message(b"", 1_700_000_000, "mark")
    assert message.headers == {"trace": "1", COPY: "mark"}
    assert message.timestamp == 1_700_000_000


def test_a_body_that_the_handler_would_refuse_is_refused() -> None:
    assert submission().message(b"1234", 0).body == b"1234"
    with pytest.raises(CommandError, match="larger than 4 bytes"):
        submission().message(b"12345", 0)


def test_a_clock_that_is_set_back_meanwhile_delays_no_further_than_the_levels_can() -> None:
    now = 1_700_000_000.0
    wanted = Submission("default", Message(), max_body=0, due=now + MAX_DELAY, ttl=None)
    publish = wanted.publish_at(wanted.message(b"", now), now - 3600)
    assert (publish.exchange, publish.key) == delayed(wanted.queue, MAX_DELAY)
