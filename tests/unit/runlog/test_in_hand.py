"""What an instance has in hand, each delivery with a number of its own."""

from __future__ import annotations

from workerd.core.dedup import NEVER_SENT
from workerd.runlog.in_hand import InHand
from workerd.runlog.records import RECORD, START, TAKE, WAIT, decode

KEY, OTHER = b"k" * 16, b"o" * 16


def told(in_hand: InHand) -> list[tuple[bytes, int, int]]:
    """Kind, number and channel of each record."""
    data = b"".join([*in_hand.runs(), *in_hand.waits()])
    assert len(data) % RECORD == 0
    return [(kind, number, channel) for kind, _, number, channel, _, _ in decode(data)]


def test_what_waited_keeps_its_number_when_it_starts_and_the_first_starts_first() -> None:
    in_hand = InHand()
    first, second = in_hand.wait(KEY), in_hand.wait(KEY)
    assert in_hand.start(KEY, 1, begun=True) == first
    assert told(in_hand) == [(START, first, 1), (WAIT, second, NEVER_SENT)]
    assert in_hand.end_run(KEY) == first
    assert in_hand.end_wait(KEY) == second
    assert told(in_hand) == []


def test_what_starts_at_once_has_a_number_that_no_other_has() -> None:
    in_hand = InHand()
    numbers = {in_hand.wait(KEY), in_hand.start(OTHER, 1, begun=True), in_hand.wait(OTHER)}
    assert len(numbers) == 3
    assert 0 not in numbers


def test_what_has_not_begun_is_known_to_have_not() -> None:
    in_hand = InHand()
    number = in_hand.start(KEY, 1, begun=False)
    assert told(in_hand) == [(TAKE, number, 1)]
    in_hand.begin(KEY)
    assert told(in_hand) == [(START, number, 1)]


def test_a_run_outlives_its_channel() -> None:
    in_hand = InHand()
    lost, kept = in_hand.start(KEY, 1, begun=True), in_hand.start(OTHER, 2, begun=True)
    in_hand.lost(1)
    assert told(in_hand) == [(START, lost, NEVER_SENT), (START, kept, 2)]


def test_of_what_is_not_in_hand_nothing_ends() -> None:
    in_hand = InHand()
    assert (in_hand.end_run(KEY), in_hand.end_wait(KEY)) == (0, 0)


def test_numbers_begin_anew_and_are_never_0() -> None:
    in_hand = InHand()
    numbers = [in_hand.wait(KEY) for _ in range(0x10001)]
    assert (min(numbers), max(numbers), numbers[-1]) == (1, 0xFFFF, 2)
