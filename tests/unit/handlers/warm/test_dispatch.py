"""Which process gets which job. No process here is a real one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from tests.harness.dispatches import EVENTS, Episode
from tests.harness.waiting import SEEDS
from workerd.handlers.warm.dispatch import (
    LOOK_AHEAD,
    MOST_AHEAD,
    Dismiss,
    Dispatch,
    Give,
    GiveUp,
    Pace,
    Start,
    TakeBack,
    TurnAway,
)

EXAMPLES = max(1500, 200 * SEEDS)


@dataclass(eq=False)
class Job:
    """A job that may begin, or not, whatever else there is."""

    arrival: int
    ready: bool = True
    behind: bool = True
    queue: str = "work"
    stopped: bool = False

    def may_begin(self, behind: str | None = None, /) -> bool:
        return self.ready if behind is None else self.behind and behind == self.queue


@dataclass(eq=False)
class Child:
    """A process that is ready, with the room that ``depth`` gives."""

    assignments: list[Job] = field(default_factory=list)
    is_starting: bool = False
    most: int = 1000

    def room(self, depth: int, /) -> int:
        return 0 if self.is_starting else min(depth, self.most) - len(self.assignments)


def dispatch(
    *children: Child, asks: bool = True, depth: int = 4, limit: int = 0
) -> Dispatch[Job, Child]:
    """A dispatch that knows that jobs are short, with these processes."""
    made: Dispatch[Job, Child] = Dispatch(limit or len(children), depth, asks)
    made.pace.learn(0.0)
    for child in children:
        made.added(child)
    return made


def carried_out(made: Dispatch[Job, Child]) -> list[Any]:
    """The steps of one round, each done as the pool would."""
    steps: list[Any] = []
    for step in made.round():
        steps.append(step)
        match step:
            case Give(job, child):
                child.assignments.append(job)
            case TakeBack(child):
                back, child.assignments = child.assignments[1:], child.assignments[:1]
                made.returned(back)
            case Start():
                made.added(Child(is_starting=True))
            case Dismiss(child):
                made.removed(child)
    return steps


def arrive(made: Dispatch[Job, Child], *jobs: Job) -> None:
    for job in jobs:
        made.arrived(job)


def test_a_job_goes_to_a_process_that_has_nothing_to_do_before_any_other() -> None:
    busy, idle = Child([Job(0)]), Child(most=1)
    made = dispatch(busy, idle)
    job = Job(1)
    arrive(made, job)
    assert carried_out(made) == [Give(job, idle)]


def test_the_process_with_the_most_room_gets_the_next_job() -> None:
    full, emptier = Child([Job(0), Job(1)]), Child([Job(2)])
    made = dispatch(full, emptier)
    job = Job(3, ready=False)
    arrive(made, job)
    assert carried_out(made) == [Give(job, emptier)]


def test_of_the_jobs_that_wait_the_first_that_may_begin_is_taken() -> None:
    child = Child()
    made = dispatch(child)
    jobs = [Job(0, ready=False, queue="full"), Job(1), Job(2)]
    arrive(made, *jobs)
    assert carried_out(made) == [Give(jobs[1], child), Give(jobs[2], child)]
    assert list(made.waiting) == jobs[:1]


def test_without_a_slot_a_job_goes_only_behind_one_of_its_queue() -> None:
    one, other = Child([Job(0, queue="one")]), Child([Job(1, queue="other")])
    made = dispatch(one, other)
    job = Job(2, ready=False, queue="other")
    arrive(made, job)
    assert carried_out(made) == [Give(job, other)]


def test_a_process_that_does_not_ask_gets_only_what_may_begin_now() -> None:
    child = Child([Job(0)])
    made = dispatch(child, asks=False)
    jobs = [Job(1, ready=False), Job(2)]
    arrive(made, *jobs)
    assert carried_out(made) == [Give(jobs[1], child)]


def test_jobs_behind_another_are_shared_out_again_when_a_process_has_nothing_to_do() -> None:
    jobs = [Job(n) for n in range(4)]
    long, idle = Child(list(jobs)), Child()
    made = dispatch(long, idle)
    steps = carried_out(made)
    assert steps[:2] == [TakeBack(long), Give(jobs[1], idle)]
    assert (long.assignments, idle.assignments) == ([jobs[0], jobs[2]], [jobs[1], jobs[3]])


def test_jobs_are_shared_out_though_one_waits_that_may_not_begin() -> None:
    held_up = Job(9, ready=False, behind=False)
    long, idle = Child([Job(0), Job(1)]), Child()
    made = dispatch(long, idle)
    arrive(made, held_up)
    carried_out(made)
    assert [job.arrival for job in idle.assignments] == [1]


def test_jobs_are_shared_out_of_the_pipe_where_one_could_begin() -> None:
    longest = Child([Job(0), Job(1, ready=False), Job(2, ready=False)])
    shorter, idle = Child([Job(3), Job(4)]), Child()
    made = dispatch(longest, shorter, idle)
    carried_out(made)
    assert [job.arrival for job in idle.assignments] == [4]


def test_as_many_processes_start_as_jobs_could_begin_up_to_the_limit() -> None:
    made = dispatch(limit=3)
    arrive(made, Job(0), Job(1, ready=False))
    assert carried_out(made) == [Start()]
    assert carried_out(made) == []
    arrive(made, *map(Job, range(2, 6)))
    assert carried_out(made) == [Start(), Start()]


def test_a_process_that_is_gone_is_replaced_before_a_job_comes() -> None:
    one, other = Child(), Child()
    made = dispatch(one, other)
    made.removed(one)
    assert carried_out(made) == [Start()]


def test_after_a_start_that_failed_one_at_a_time_is_tried() -> None:
    children = [Child(is_starting=True) for _ in range(4)]
    made = dispatch(*children)
    for child in children:
        made.removed(child)
        made.start_failed()
    assert carried_out(made) == [Start()]


def test_a_job_is_given_up_when_there_is_no_process_and_none_can_be_started() -> None:
    made: Dispatch[Job, Child] = Dispatch(1, 1, True, lambda: False)
    job, other = Job(0), Job(1, ready=False)
    arrive(made, job, other)
    assert carried_out(made) == [GiveUp(job)]
    assert list(made.waiting) == [other]


def test_nothing_begins_and_nothing_starts_while_it_is_held() -> None:
    made = dispatch(Child(), limit=2)
    made.held = True
    arrive(made, Job(0))
    assert carried_out(made) == []
    assert made.capacity == 0


def test_in_a_drain_what_waits_is_turned_away_in_order_and_every_process_leaves() -> None:
    child = Child([Job(0)])
    made = dispatch(child)
    made.held = True
    jobs = [Job(1), Job(2)]
    arrive(made, *jobs)
    made.draining = made.retired = True
    assert carried_out(made) == [*map(TurnAway, jobs), Dismiss(child)]


def test_a_replaced_handler_keeps_its_processes_while_a_job_waits() -> None:
    child, job = Child(), Job(0, ready=False)
    made = dispatch(child)
    made.retired = True
    arrive(made, job)
    assert carried_out(made) == []
    made.withdrawn(job)
    assert carried_out(made) == [TurnAway(job), Dismiss(child)]


def test_a_job_that_nobody_wants_any_more_is_turned_away_when_it_comes_back() -> None:
    made = dispatch(Child(is_starting=True))
    stopped, other = Job(0, stopped=True), Job(1)
    made.returned([stopped, other])
    assert carried_out(made) == [TurnAway(stopped)]
    assert list(made.waiting) == [other]


def test_what_comes_back_waits_where_it_was() -> None:
    made = dispatch(Child(is_starting=True))
    jobs = [Job(n) for n in range(4)]
    arrive(made, jobs[0], jobs[3])
    made.returned(jobs[1:3])
    assert list(made.waiting) == jobs


def test_the_depth_follows_the_pace_of_the_jobs() -> None:
    pace = Pace(1000, asks=True)
    assert pace.depth == 1
    for _ in range(100):
        pace.learn(LOOK_AHEAD / 10)
    assert pace.depth == 10
    for _ in range(100):
        pace.learn(0.0)
    assert pace.depth == MOST_AHEAD
    pace.learn(2 * LOOK_AHEAD)
    assert pace.depth == 1


def test_where_jobs_cannot_be_taken_back_the_depth_is_as_configured() -> None:
    pace = Pace(3, asks=False)
    pace.learn(60.0)
    assert pace.depth == 3


ASKS_AND_DEPTH = [(True, 1), (True, 6), (False, 1), (False, 3)]


@settings(max_examples=50, report_multiple_bugs=False, deadline=None)
@given(st.binary(min_size=50, max_size=50), st.sampled_from(ASKS_AND_DEPTH))
def test_whatever_happens_each_job_has_one_process_at_most_and_comes_to_its_end(
    steps: bytes, kind: tuple[bool, int]
) -> None:
    play(steps, *kind)


@pytest.mark.campaign
@pytest.mark.timeout(1800)  # a campaign computes for a minute; on a busy machine that takes a while
@settings(max_examples=EXAMPLES, report_multiple_bugs=False, deadline=None)
@given(st.binary(min_size=50, max_size=50))
@pytest.mark.parametrize(("asks", "depth"), ASKS_AND_DEPTH)
def test_whatever_happens_many_times(asks: bool, depth: int, steps: bytes) -> None:
    play(steps, asks, depth)


def play(steps: bytes, asks: bool, depth: int) -> None:
    episode = Episode(asks, depth)
    try:
        for step in steps:
            EVENTS[step % len(EVENTS)](episode)
        episode.conclude()
    finally:
        note("\n".join(episode.story))
