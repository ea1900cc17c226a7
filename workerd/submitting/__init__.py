"""Sending jobs, for `submit`.

Start at `one.submit`. What takes long to import is imported where it is needed.

    one     one job: through an instance of this host, or at the broker itself
    direct  at the broker itself: a connection for one job
    bulk    one job for each line: thousands a second, and exact about those that did not arrive
"""
