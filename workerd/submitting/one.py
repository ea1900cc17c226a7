"""Sends one job: confirmed by the broker, or an error that says exactly why not.

Through a running instance of this host, where there is one; otherwise, or when that goes away
in between, at the broker itself (`direct`). The first way must stay cheap: nothing that takes
long to import is imported at the top.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from workerd.control import client, protocol
from workerd.core.jobspec import JobSpec
from workerd.errors import (
    EX_CONFIG,
    EX_DATAERR,
    EX_NOPERM,
    EX_OK,
    EX_UNAVAILABLE,
    EX_USAGE,
    CommandError,
    WorkerdError,
    exit_status,
)
from workerd.ids import new_id
from workerd.output import print_json, print_line, warn

#: Seconds by which the daemon is to give up earlier than we would.
_MARGIN = 0.2


def submit(args: argparse.Namespace, spec: JobSpec, environ: Mapping[str, str]) -> int:
    """Carry out a `submit` command line for one job, ``spec``; returns the exit status.

    ``environ`` includes the broker's URL, where one was given. Raises CommandError, SettingsError,
    and BrokerError.
    """
    deadline = time.monotonic() + args.timeout
    if args.body is not None and args.file is not None:
        raise CommandError(EX_USAGE, "BODY and --file exclude each other")
    head = b""
    # A job that is sent once more must be the same one, whichever way it goes.
    job_id, copy_id = new_id() if spec.id is None else spec.id, new_id()
    timestamp = int(time.time())
    spec = spec._replace(id=job_id)
    by_itself = args.direct or args.dry_run or bool(environ.get("WORKERD_BROKER_URL"))
    folders = [] if by_itself else _folders(args)
    if folders:
        head = read_body(args, protocol.MAX_BODY)
        if len(head) <= protocol.MAX_BODY:
            config = None if args.config is None else os.path.realpath(args.config)
            request = _request(spec, copy_id, timestamp, config)
            answer = _ask_any(folders, request, head, deadline)
            if answer:
                print_id(args.json, job_id, str(answer["queue"]), answer["due"])
                return EX_OK
    try:
        return _directly(args, spec, environ, head, copy_id, timestamp, deadline)
    except WorkerdError as error:
        # Who may not read the configuration, or has no password, need not have one.
        if not by_itself and exit_status(error) in (EX_NOPERM, EX_CONFIG) and _is_barred():
            warn(client.not_yours(), "submit")
        raise


def _folders(args: argparse.Namespace) -> list[Path]:
    """The runtime folders of the instances that may be asked, in this order."""
    found = client.folders()
    wanted = [args.instance] if args.instance else sorted(found, key=lambda name: name != "1")
    return [found[name] for name in wanted if name in found and _is_open(found[name])]


def _is_open(folder: Path) -> bool:
    return os.access(folder / protocol.SOCKET, os.W_OK)


def _is_barred() -> bool:
    """Whether an instance could be asked, but not by us."""
    sockets = [folder / protocol.SOCKET for folder in client.folders().values()]
    return any(os.path.lexists(each) and not os.access(each, os.W_OK) for each in sockets)


def _request(spec: JobSpec, copy_id: str, timestamp: int, config: str | None) -> dict[str, object]:
    """What the daemon is asked."""
    facts = {
        "type": spec.type,
        "queue": spec.queue,
        "id": spec.id,
        "due": spec.due,
        "ttl": spec.ttl,
        "priority": spec.priority,
        "attempts": spec.attempts,
        "headers": spec.headers or None,
        "copy_id": copy_id,
        "timestamp": timestamp,
        "config": config,
    }
    given = {name: value for name, value in facts.items() if value is not None}
    return {"request": "submit", **given}


def _ask_any(
    folders: list[Path], request: dict[str, object], body: bytes, deadline: float
) -> protocol.Reply | None:
    """The answer of the first instance that can do it, None when none can.

    Raises CommandError: then another way would lead nowhere either.
    """
    for folder in folders:
        left = max(deadline - time.monotonic(), 0.0)
        timed = {**request, "timeout": max(left - _MARGIN, left / 2)}
        try:
            return client.ask(folder, timed, body, left)
        except protocol.NotServedHere:
            continue
        except protocol.NoAnswer as silent:
            if time.monotonic() >= deadline:
                raise CommandError(EX_UNAVAILABLE, f"the daemon: {silent}") from None
            # It may have published the job, so no other instance does: the copy id is the same.
            continue
    return None


def _directly(
    args: argparse.Namespace,
    spec: JobSpec,
    environ: Mapping[str, str],
    head: bytes,
    copy_id: str,
    timestamp: int,
    deadline: float,
) -> int:
    from workerd.config.load import load
    from workerd.core.submission import prepare

    settings = load(args.config, args.instance or "1", environ)
    wanted = prepare(spec, settings, time.time())
    body = read_body(args, wanted.max_body, head)
    message = wanted.message(body, timestamp, copy_id)
    if not args.dry_run:
        from workerd.aio import complete
        from workerd.submitting.direct import submit_one

        complete(submit_one(settings.broker, wanted, message, deadline))
    print_id(args.json, str(message.message_id), wanted.queue, wanted.due)
    return EX_OK


def print_id(as_json: bool, job_id: str, queue: str, due: float | str | None) -> None:
    """Print the id of a job that was sent; ``due`` is an instant, or the text for one.

    Raises CommandError.
    """
    if as_json:
        if isinstance(due, float):
            from workerd.core import times

            due = times.utc(due)
        print_json({"id": job_id, "queue": queue, **({} if due is None else {"due": due})})
    else:
        print_line(job_id)


def read_body(args: argparse.Namespace, limit: int, head: bytes = b"") -> bytes:
    """The body, or just enough of it to see that it is larger than ``limit``.

    ``head`` is what has been read before. Raises CommandError.
    """
    if args.body is not None:
        return os.fsencode(args.body)
    if args.file is None and (sys.stdin is None or sys.stdin.isatty()):
        return b""
    if args.file not in (None, "-"):
        head = b""  # it is opened anew
    if len(head) > limit:
        return head
    with _time_limit(args.timeout):
        file = open_input(args.file)  # closed with the process: standard input may be read on
        try:
            return head + file.read(limit + 1 - len(head))
        except OSError as error:
            raise CommandError(EX_DATAERR, f"cannot read the input: {error.strerror}") from None


def open_input(name: str | None) -> BinaryIO:
    """The input that --file names; ``-`` and None stand for standard input. Raises CommandError."""
    try:
        if name is not None and name != "-":
            return open(name, "rb")
        # Where somebody else made it non-blocking, a pause would pass for its end.
        os.set_blocking(0, True)
        return sys.stdin.buffer
    except OSError as error:
        raise CommandError(EX_DATAERR, f"{name or 'standard input'}: {error.strerror}") from None


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Whoever forgot to close our input must not make us hang for ever."""

    def expired(_number: int, _frame: FrameType | None) -> None:
        raise CommandError(EX_UNAVAILABLE, f"the input did not end within {seconds:g} s")

    signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
