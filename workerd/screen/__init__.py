"""The screen of `workerd status --watch`: from what the instances say to bytes for a terminal.

It alone imports rich.
"""

from workerd.screen.layout import Paint, shared
from workerd.screen.sections import screen

__all__ = ["Paint", "screen", "shared"]
