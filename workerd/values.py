"""Values: small classes whose instances are never changed."""

from __future__ import annotations

import dataclasses
from typing import TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def value(cls: type[T]) -> type[T]:
    """A frozen dataclass with slots, as far as the type checker is concerned.

    Having it checked at run time as well makes each instance take three times as long to create,
    and several are made of every job.
    """
    return dataclasses.dataclass(slots=True, unsafe_hash=True)(cls)
