"""A configuration as a test writes it: tables of Python values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Table = Mapping[str, Any]

#: A handler whose jobs are started again when their daemon has died.
AGAIN: Table = {"retry": {"attempts": 5}}


def config(
    urls: str | Sequence[str],
    command: Sequence[str | Path],
    *,
    queues: Mapping[str, Table] | None = None,
    handler: Table | None = None,
    **tables: Table,
) -> str:
    """A daemon for which every job, of all `queues` (one, "jobs", by default), runs `command`.

    `urls` is one broker or several. Further tables, such as `worker={"drain_timeout": "1s"}`, are
    written as they are. Every event is logged. A job has one attempt unless the `handler` says
    otherwise.
    """
    queues = queues or {"jobs": {}}
    written: dict[str, Table] = {
        "broker": {
            "urls": [urls] if isinstance(urls, str) else urls,
            # A test does not wait longer than it must for a broker that is back.
            "reconnect_max": "500ms",
            **tables.pop("broker", {}),
        },
        "handlers.job": {
            "command": [str(word) for word in command],
            "queue": next(iter(queues)),
            "retry": {"attempts": 1},
            **(handler or {}),
        },
        **{f"queues.{name}": {"default_handler": "job", **queues[name]} for name in queues},
        "log": {"level": "debug", "format": "json"},
        **tables,
    }
    return toml(written)


def toml(tables: Mapping[str, Table]) -> str:
    """These tables, by name, as a configuration."""
    return "\n\n".join(
        "\n".join([f"[{name}]", *(f"{key} = {_value(value)}" for key, value in table.items())])
        for name, table in tables.items()
    )


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_value(each)}" for key, each in value.items()) + " }"
    # JSON's strings, numbers, lists and booleans are TOML's as well.
    return json.dumps(value)


def private(folder: Path, text: str) -> Path:
    """Write a configuration that nobody else can read, for it may hold a password."""
    file = folder / "workerd.toml"
    file.write_text(text)
    file.chmod(0o600)
    return file


def gated(gate: Path, command: Sequence[str]) -> list[str]:
    """`command`, but not before the file `gate` is there: a job that takes as long as a test."""
    return ["sh", "-c", 'until [ -e "$0" ]; do sleep 0.02; done; exec "$@"', str(gate), *command]
