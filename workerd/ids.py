"""Ids of jobs, of copies and of replays."""

from __future__ import annotations

import os
import time


def new_id() -> str:
    """A UUIDv7 (RFC 9562 §5.7): unique, and sorted by the millisecond it was made in."""
    value = int.from_bytes(os.urandom(16), "big")
    value = (time.time_ns() // 1_000_000) << 80 | value & (1 << 80) - 1
    value = value & ~(0xF << 76) | 7 << 76
    value = value & ~(0x3 << 62) | 2 << 62
    text = f"{value:032x}"
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def made_at(text: str) -> float | None:
    """When `new_id` made this id, in seconds since 1970; None for an id of another sort."""
    digits = text.replace("-", "")
    if len(digits) != 32 or digits[12] != "7":
        return None
    try:
        return int(digits[:12], 16) / 1000
    except ValueError:
        return None
