"""Keys of finished jobs, in little memory."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workerd.core.keyset import SIZE, KeySet

pytestmark = pytest.mark.pure

#: Parts that repeat themselves: such keys are often found where one ends and the next begins.
KEYS = st.lists(st.sampled_from([0, 1]), min_size=4, max_size=4).map(lambda part: bytes(part * 4))


@given(st.lists(st.tuples(st.booleans(), KEYS)))
def test_a_key_can_be_taken_out_as_often_as_it_was_put_in(steps: list[tuple[bool, bytes]]) -> None:
    keys = KeySet()
    expected: Counter[bytes] = Counter()
    for put, key in steps:
        if put:
            keys.add(key)
        else:
            assert keys.remove(key) == (expected[key] > 0)
        expected[key] = max(0, expected[key] + (1 if put else -1))
        assert len(keys) == expected.total()


@given(st.lists(st.tuples(st.booleans(), KEYS, st.binary(min_size=3, max_size=3))))
def test_what_is_beside_a_key_is_found_in_order(steps: list[tuple[bool, bytes, bytes]]) -> None:
    keys = KeySet(beside=3)
    expected: list[tuple[bytes, bytes]] = []
    for put, key, beside in steps:
        if put:
            keys.add(key, beside)
            expected.append((key, beside))
        else:
            there = (key, beside) in expected
            assert keys.remove(key, beside) == there
            if there:
                expected.remove((key, beside))
        assert keys.find(key) == [what for each, what in expected if each == key]
    assert sorted(keys) == sorted(expected)
    assert len(keys) == len(expected)


def test_a_key_is_not_found_across_two_others() -> None:
    keys = KeySet()
    first, second = bytes(9) + b"1" * 7, bytes(8) + b"2" * 8
    keys.add(first)
    keys.add(second)
    across = (first + second)[8 : 8 + SIZE]
    assert not keys.remove(across)
    keys.add(across)
    assert [keys.remove(across), keys.remove(across)] == [True, False]
    assert [keys.remove(second), keys.remove(first)] == [True, True]


def test_a_hundred_thousand_keys_take_less_than_three_megabytes() -> None:
    draw = random.Random(1).randbytes
    keys = KeySet()
    tracemalloc.start()
    try:
        for _ in range(100_000):
            keys.add(draw(SIZE))
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < 3_000_000
