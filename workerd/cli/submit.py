"""`submit`: a job sent to RabbitMQ, or one for each line of a file."""

from __future__ import annotations

import argparse
import gc
import time

from workerd.cli.options import add_common, add_url, environ, seconds
from workerd.core.jobspec import JobSpec
from workerd.errors import EX_USAGE, CommandError

SUBMIT = "Send a job to RabbitMQ; print its id once the broker has it in a queue."
SUBMIT_EPILOG = """\
TIME: 18:30, 2026-12-24 18:30, or 2026-12-24T18:30:00Z; when past, it is now.

exit status:
  0   every job was confirmed by the broker and routed to its queue
  64  usage, or no handler is named TYPE and no --queue is given
  65  the payload is too large, is not JSON, or cannot be read
  69  no broker answered, or none confirmed, within --timeout
  73  no such queue, or nothing there that delays jobs
  74  the ids could not be printed; the jobs are sent
  75  not now: the queue is full, or the broker is short of memory or disk
  77  access refused: user, password, virtual host or permission
  78  bad configuration
A job that was not confirmed (69, 75) may have arrived all the same.

examples:
  submit resize --at 02:30 --ttl 4h < a.json    tonight, or not at all
"""


def add_submit(parser: argparse.ArgumentParser) -> None:
    """Add the options of `submit`."""
    parser.description, parser.epilog = SUBMIT, SUBMIT_EPILOG
    add_common(parser)
    add = parser.add_argument
    add("type", metavar="TYPE", help="the name of the handler that is to run it")
    add("body", metavar="BODY", nargs="?", help="the payload (default: standard input)")
    add("-f", "--file", metavar="FILE", help="read the payload from FILE; - is standard input")
    add("--queue", metavar="Q", help='default: the handler\'s queue, else "default"')
    when = parser.add_mutually_exclusive_group()
    when.add_argument(
        "--in",
        dest="delay",
        type=seconds,
        metavar="T",
        help="not before this time has passed: 90s, 10m, 2d",
    )
    when.add_argument("--at", metavar="TIME", help="not before TIME, see below")
    add("--ttl", type=seconds, metavar="T", help="not later than T after it could have begun")
    add("--priority", type=int, metavar="N", help="0 to 255, for a queue with max_priority")
    add("--attempts", type=int, metavar="N", help="how often it is tried (default: the handler's)")
    add("--id", metavar="ID", help="the job id (default: a new UUID)")
    add("--header", action="append", default=[], metavar="K=V", help="a header; may be repeated")
    many = parser.add_mutually_exclusive_group()
    many.add_argument("--lines", action="store_true", help="each line of the input is a job")
    many.add_argument("--jsonl", action="store_true", help="likewise; a line must be valid JSON")
    add(
        "--timeout",
        type=seconds,
        default=30.0,
        metavar="T",
        help="for all, or each wait of many lines (default: 30s)",
    )
    add("--json", action="store_true", help="print id, queue and due time as a JSON object")
    add_url(parser)
    add("--direct", action="store_true", help="not through an instance that runs on this host")
    add("--dry-run", action="store_true", help="do everything but send")
    parser.set_defaults(carry_out=_submit, name="submit", instance=None)


def _submit(args: argparse.Namespace) -> int:
    variables = environ(args)
    spec = _spec_of(args)
    if args.lines or args.jsonl:
        from workerd.config.load import load
        from workerd.submitting.bulk import submit_lines

        return submit_lines(args, spec, load(args.config, args.instance or "1", variables))
    # One job leaves little behind; looking for cycles in what is imported for it takes longer.
    gc.disable()
    from workerd.submitting.one import submit

    return submit(args, spec, variables)


def _spec_of(args: argparse.Namespace) -> JobSpec:
    """What the options say of the job. Raises CommandError."""
    return JobSpec(
        type=args.type,
        queue=args.queue,
        id=args.id,
        due=_due(args),
        ttl=args.ttl,
        priority=args.priority,
        attempts=args.attempts,
        headers=dict(map(_header, args.header)),
        content_type="application/json" if args.jsonl else None,
    )


def _due(args: argparse.Namespace) -> float | None:
    now = time.time()
    if args.delay is not None:
        return now + float(args.delay)
    if args.at is None:
        return None
    from workerd.core import times

    try:
        return times.instant(args.at, now)  # in our zone, not in the daemon's
    except ValueError as error:
        raise CommandError(EX_USAGE, f"--at {args.at!r}: {error}") from None


def _header(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise CommandError(EX_USAGE, f"--header {text!r}: expected NAME=VALUE")
    return name, value
