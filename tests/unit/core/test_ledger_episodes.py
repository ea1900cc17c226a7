"""The ledger in whatever may happen, in random order."""

from __future__ import annotations

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from tests.harness.episodes import STEPS, Episode
from tests.harness.waiting import examples

EXAMPLES = examples(1500, 200)


@pytest.mark.campaign
@pytest.mark.timeout(1800)  # a campaign computes for a minute; on a busy machine that takes a while
@settings(max_examples=EXAMPLES, report_multiple_bugs=False)
@given(st.binary(min_size=60, max_size=60))
@pytest.mark.parametrize("capacity", [0, 5])
def test_no_job_is_lost_and_none_is_run_twice_for_nothing(capacity: int, steps: bytes) -> None:
    episode = Episode(capacity)
    try:
        for step in steps:
            STEPS[step % len(STEPS)](episode)
        episode.conclude()
    finally:
        note("\n".join(episode.story))
