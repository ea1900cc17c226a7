"""What a submission asks for, before it is known whether that can be: from a command line, or
from the local socket. `submission` judges it.
"""

from collections.abc import Mapping
from typing import NamedTuple


# No dataclass: `submit` starts faster without what that imports. Nor annotations that are strings
# (`from __future__`): each would be compiled.
class JobSpec(NamedTuple):
    """A job, or what many have in common; None: not said.

    ``due`` is in seconds since 1970: not before; ``ttl`` in seconds after it could have begun:
    not later. Nothing of it has been checked.
    """

    type: str
    headers: Mapping[str, str]
    queue: str | None = None
    id: str | None = None
    due: float | None = None
    ttl: float | None = None
    priority: int | None = None
    attempts: int | None = None
    content_type: str | None = None
