"""What the answer of a warm process, or its end, means for its job."""

from __future__ import annotations

import signal

import pytest

from workerd.core.job import Outcome, Report
from workerd.handlers.warm.protocol import Answer
from workerd.handlers.warm.results import answered, safe, unanswered


@pytest.mark.parametrize(
    ("answer", "cause", "outcome", "reason"),
    [
        (Answer(1, Outcome.DONE), "", Outcome.DONE, ""),
        (Answer(1, Outcome.DONE, b"x"), "drain", Outcome.DONE, ""),
        (Answer(1, Outcome.FAILED), "", Outcome.FAILED, "error"),
        (Answer(1, Outcome.FAILED, retry_after=0.0), "", Outcome.FAILED, "retry"),
        (Answer(1, Outcome.REJECTED), "", Outcome.REJECTED, "rejected"),
        (Answer(1, Outcome.FAILED), "drain", Outcome.INTERRUPTED, "drain"),
        (Answer(1, Outcome.REJECTED), "timeout", Outcome.FAILED, "timeout"),
        (Answer(1, Outcome.FAILED), "protocol", Outcome.FAILED, "error"),
    ],
)
def test_an_answer_counts_unless_the_job_had_to_end(
    answer: Answer, cause: str, outcome: Outcome, reason: str
) -> None:
    report = answered(answer, cause)
    assert (report.outcome, report.reason) == (outcome, reason)
    assert report.output == answer.output


@pytest.mark.parametrize(
    ("status", "cause", "report"),
    [
        (3, "", Report(Outcome.FAILED, "crashed", exit_status=3, error="e")),
        (-signal.SIGKILL, "", Report(Outcome.FAILED, "crashed", signal="SIGKILL", error="e")),
        (0, "drain", Report(Outcome.INTERRUPTED, "drain", exit_status=0, error="e")),
        (-15, "timeout", Report(Outcome.FAILED, "timeout", signal="SIGTERM", error="e")),
    ],
)
def test_without_an_answer_the_end_of_the_process_counts(
    status: int, cause: str, report: Report
) -> None:
    assert unanswered(status, cause, "e") == report


def test_a_text_keeps_its_lines_and_its_end_and_nothing_that_could_deceive() -> None:
    assert safe("a\x1b[31m\nb\r") == "a\\x1b[31m\nb\\r"
    assert safe("x" * 100_000 + "end").endswith("end")
    assert len(safe("x" * 100_000)) < 20_000
