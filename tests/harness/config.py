"""The configuration of a daemon under test, as TOML."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

# A test does not wait longer than it must for a broker that is back.
IMPATIENT = {"reconnect_max": "500ms"}

Table = Mapping[str, Any]


def config(
    urls: str | Sequence[str],
    command: Sequence[str],
    *,
    queues: Mapping[str, Table] | None = None,
    broker: Table | None = None,
    worker: Table | None = None,
) -> str:
    """A configuration whose jobs, of all queues (one, "jobs", by default), run `command`.

    `urls` is one broker or several. Every event is logged.
    """
    tables: dict[str, Table] = {
        "broker": {
            "urls": [urls] if isinstance(urls, str) else urls,
            **IMPATIENT,
            **(broker or {}),
        },
        "worker": worker or {},
        "handlers.job": {"command": command, "queue": next(iter(queues or {"jobs": {}}))},
        "log": {"level": "debug", "format": "json"},
    }
    for name, queue in (queues or {"jobs": {}}).items():
        tables[f"queues.{name}"] = {"default_handler": "job", **queue}
    return "\n".join(
        "\n".join([f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())])
        for name, table in tables.items()
    )
