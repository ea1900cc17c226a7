"""What the answer of a process, or its end, means for its job. Pure."""

from __future__ import annotations

from workerd import log_formats
from workerd.core.job import Outcome, Report
from workerd.handlers.process import ending
from workerd.handlers.warm.protocol import Answer

#: The longest text that is kept of an answer, in characters.
_LONGEST_TEXT = 16 * 1024

#: The result of most jobs.
_DONE = Report(Outcome.DONE)

#: What becomes of the job of a process that was ended for this reason.
_CAUSES = {
    "drain": (Outcome.INTERRUPTED, "drain"),
    "timeout": (Outcome.FAILED, "timeout"),
}


def answered(answer: Answer, cause: str) -> Report:
    """The report on a job that has this answer. One that was to end, for this ``cause``, and is
    done all the same, is done.
    """
    if answer.outcome is Outcome.DONE and not (answer.output or answer.error or answer.note):
        return _DONE
    if answer.outcome is not Outcome.DONE and cause in _CAUSES:
        outcome, reason = _CAUSES[cause]
    elif answer.outcome is Outcome.FAILED:
        outcome, reason = answer.outcome, "error" if answer.retry_after is None else "retry"
    else:
        outcome = answer.outcome
        reason = "rejected" if outcome is Outcome.REJECTED else ""
    return Report(
        outcome,
        reason,
        error=safe(answer.error),
        output=answer.output,
        retry_after=answer.retry_after,
        note=safe(answer.note),
    )


def unanswered(status: int, cause: str, error: str) -> Report:
    """The report on a job whose process has ended in the middle of it."""
    outcome, reason = _CAUSES.get(cause, (Outcome.FAILED, "crashed"))
    exit_status, killed_by = ending(status)
    return Report(outcome, reason, exit_status=exit_status, signal=killed_by, error=error)


def safe(text: str) -> str:
    """The text without what could forge or hide something; its lines stay, and its end."""
    return "\n".join(map(log_formats.safe, text[-_LONGEST_TEXT:].split("\n"))) if text else ""
