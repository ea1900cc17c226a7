"""A message, and what a run of it may come to, for the tests of jobs and their copies."""

from __future__ import annotations

from workerd.core.job import Message, Outcome, Report
from workerd.core.republish import Origin

MESSAGE = Message(
    b"body",
    type="resize",
    message_id="id",
    content_type="text/plain",
    content_encoding="identity",
    correlation_id="call-1",
    reply_to="workerd.reply.x",
    timestamp=1_700_000_000,
    priority=3,
    headers={"traceparent": "00-1"},
)
FAILED = Report(Outcome.FAILED, "exit-status", exit_status=3, error="no such photo")
PLACE = Origin("host1", "2")
# 2026-01-02 03:04:05.678 UTC
NOW = 1767323045.678
