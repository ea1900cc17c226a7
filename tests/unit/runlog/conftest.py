"""Run logs of several instances in one state folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.run_logs import HOUR
from workerd.runlog.writer import RunLog


@pytest.fixture
def failures() -> list[str]:
    """Why the disk could not be written, "" when it could be again."""
    return []


@pytest.fixture
def remember(tmp_path: Path, failures: list[str]) -> Callable[..., RunLog]:
    """Make the run log of an instance: `remember("1")`. It is alive until `dies`."""

    def make(instance: str = "1", seconds: float = HOUR, size: int = 100_000) -> RunLog:
        return RunLog(tmp_path, instance, seconds, failures.append, size)

    return make
