"""The screen of `workerd status --watch`: from what the instances say to bytes for a terminal.

`layout` and `sections` alone import rich.
"""
