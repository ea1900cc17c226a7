"""What a dead letter says, which are chosen, and how one becomes a job again."""

from __future__ import annotations

import pytest

from tests.harness.letters import EXPIRED, FACTS, NOW, letter
from workerd.core.job import UNREADABLE, Message
from workerd.deadletters.letter import Filter, Irreplaceable, renewed, replayed


@pytest.mark.parametrize("reason", ["expired", "rejected", "maxlen", "delivery_limit"])
def test_every_reason_of_the_broker_has_words(reason: str) -> None:
    dead = letter({"x-death": [{"queue": "q", "reason": reason, "count": 1}]})
    assert str(dead.deaths[0]).startswith(f"{reason} in queue q, once: ")


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
