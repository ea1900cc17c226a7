"""Configuration files in a folder of their own."""

from collections.abc import Callable
from pathlib import Path

import pytest

Write = Callable[..., Path]


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    directory = tmp_path / "etc"
    for name in ("conf.d", "instances"):
        (directory / name).mkdir(parents=True)
    return directory


@pytest.fixture
def write(etc: Path) -> Write:
    """Write a configuration file below `etc` that only its owner can read."""

    def write(content: str, name: str = "workerd.toml", mode: int = 0o600) -> Path:
        file = etc / name
        file.write_text(content)
        file.chmod(mode)
        return file

    return write
