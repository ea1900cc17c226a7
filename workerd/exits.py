"""Exit statuses, of sysexits.h, and which one tells of which error."""

from __future__ import annotations

from workerd.errors import (
    Kind,
    Refused,
    SettingsError,
    Trouble,
    Unencodable,
    Unroutable,
    WorkerdError,
)

EX_OK = 0
EX_USAGE = 64
EX_DATAERR = 65
EX_NOINPUT = 66
EX_UNAVAILABLE = 69
EX_SOFTWARE = 70
EX_CANTCREAT = 73
EX_IOERR = 74
EX_TEMPFAIL = 75
EX_PROTOCOL = 76
EX_NOPERM = 77
EX_CONFIG = 78


def exit_status(error: WorkerdError) -> int:
    """The exit status that tells a script what went wrong."""
    if isinstance(error, Refused):
        return error.status
    if isinstance(error, SettingsError):
        return EX_CONFIG
    if isinstance(error, Unencodable):
        return EX_DATAERR
    if isinstance(error, Unroutable):
        return EX_CANTCREAT
    if isinstance(error, Trouble):
        return {
            Kind.TOO_LARGE: EX_DATAERR,
            Kind.BUSY: EX_TEMPFAIL,
            Kind.REFUSED: EX_NOPERM,
            Kind.MISSING: EX_CANTCREAT,
        }.get(error.kind, EX_UNAVAILABLE)
    return EX_UNAVAILABLE
