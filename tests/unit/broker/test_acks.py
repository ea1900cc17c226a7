"""Acknowledgements: every one that is due reaches the broker, and none that is not."""

from __future__ import annotations

import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from workerd.broker.acks import Acks


class Sent:
    """What a broker has sent on a channel and holds until it is settled, as RabbitMQ does it."""

    def __init__(self, count: int) -> None:
        self.unsettled = list(range(1, count + 1))

    def settle(self, tag: int, multiple: bool = False) -> list[int]:
        """The tags that this settles; an unknown one would end the channel."""
        assert tag in self.unsettled
        settled = [each for each in self.unsettled if each == tag or (multiple and each < tag)]
        self.unsettled = [each for each in self.unsettled if each not in settled]
        return settled


#: Tags in the order in which they are settled, and what is done with each; "send" in between.
ENDS = st.permutations(range(1, 13)).flatmap(
    lambda tags: st.lists(
        st.sampled_from(["ack", "ack", "return", "ack, send", "return, send", "nothing"]),
        min_size=len(tags),
        max_size=len(tags),
    ).map(lambda actions: list(zip(tags, actions, strict=True)))
)


def having_got(count: int) -> Acks:
    acks = Acks()
    for tag in range(1, count + 1):
        acks.came(tag)
    return acks


@given(ENDS)
def test_exactly_what_is_to_be_acknowledged_is(ends: list[tuple[int, str]]) -> None:
    sent, acks = Sent(len(ends)), having_got(len(ends))
    due: set[int] = set()

    def send() -> None:
        assert bool(acks) == bool(due)
        acknowledged = [each for ack in acks.take() for each in sent.settle(*ack)]
        assert sorted(acknowledged) == sorted(due)
        due.clear()

    for tag, action in ends:
        if action.startswith("ack"):
            acks.add(tag)
            due.add(tag)
        elif action.startswith("return"):
            assert sent.settle(tag) == [tag]
            acks.settled(tag)
        if action.endswith("send"):
            send()
    send()


def test_what_ends_together_is_acknowledged_in_one_frame() -> None:
    acks = having_got(8)
    for tag in (2, 1, 3, 5, 7):
        acks.add(tag)
    assert acks.take() == [(3, True), (5, False), (7, False)]
    for tag in (6, 4):
        acks.add(tag)
    assert acks.take() == [(6, True)]
    assert acks.take() == []


def test_what_ends_beside_a_long_job_takes_no_memory() -> None:
    acks = having_got(1)
    tracemalloc.start()
    try:
        for tag in range(2, 20_000):
            acks.came(tag)
            acks.add(tag)
            assert acks.take() == [(tag, False)]
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size < 10_000
    acks.add(1)
    assert acks.take() == [(1, False)]
