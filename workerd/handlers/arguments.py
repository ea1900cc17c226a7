"""What a command gets of its job: arguments, and what stands in for placeholders."""

from __future__ import annotations

import json
from collections.abc import Mapping

from workerd.config.template import Placeholder
from workerd.core.job import BadJob, Job

HEADER_VALUE_LIMIT = 4096
HEADERS_LIMIT = 32 * 1024


def text_of(value: object) -> bytes:
    """A value as programs get it: text and bytes as they are, anything else as JSON."""
    if isinstance(value, bytes):
        return value
    # A name in a header's table that is not UTF-8 is bytes, which JSON cannot have.
    text = value if isinstance(value, str) else json.dumps(value, default=str, skipkeys=True)
    return text.encode()


class JobValues:
    """The values of placeholders for one job; its body is parsed as JSON at most once."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._object: dict[str, object] | None = None

    def of(self, placeholder: Placeholder) -> bytes:
        job = self._job
        match placeholder.kind:
            case "body":
                return job.body
            case "body.key":
                return _found(self._json(), placeholder.name, "bad-body", "the body has no key")
            case "header":
                headers = job.message.headers
                return _found(headers, placeholder.name, "bad-header", "there is no header")
            case "id":
                return job.id.encode()
            case "type":
                return (job.type or "").encode()
            case "queue":
                return job.queue.encode()
            case "attempt":
                return str(job.attempt).encode()

    def _json(self) -> dict[str, object]:
        if self._object is None:
            try:
                value = json.loads(self._job.body)
            except (ValueError, RecursionError) as error:
                raise BadJob("bad-body", f"the body is not JSON: {error}") from None
            if not isinstance(value, dict):
                raise BadJob("bad-body", "the body is not a JSON object")
            self._object = value
        return self._object


def _found(values: Mapping[str, object], name: str, reason: str, missing: str) -> bytes:
    if name not in values:
        raise BadJob(reason, f"{missing} {name!r}")
    try:
        return text_of(values[name])
    except UnicodeEncodeError:
        raise BadJob(reason, f"the value of {name!r} is half a surrogate pair") from None
