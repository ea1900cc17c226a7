"""`workerd dead`: dead letters listed, shown, sent back, dropped."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from workerd import output
from workerd.cli.options import add_common, seconds
from workerd.errors import EX_DATAERR, EX_NOINPUT, EX_OK, EX_USAGE, CommandError
from workerd.output import print_bytes, print_json, print_line, print_table, safe, warn

if TYPE_CHECKING:
    from workerd.config.model import Settings
    from workerd.deadletters.letter import DeadLetter, Filter
    from workerd.deadletters.render import Details

STATUSES = """\
exit status:
  0   done, or nothing was to be done
  64  usage
  65  some letters cannot be sent (requeue)
  66  no such letter (show)
  69  no broker answered, or the connection was lost
  73  no such queue
  75  not now: the queue is full, somebody else is looking, or an alarm
  77  access refused: user, password, virtual host or permission
  78  bad configuration
"""
DEAD = """\
Look at the jobs of QUEUE that have failed, send them back, or throw them away.
QUEUE is the work queue; its dead letters lie in QUEUE.dead."""
DEAD_EPILOG = f"""\
{STATUSES}
examples:
  workerd dead list default
  workerd dead list default --reason timeout --json
  workerd dead show default ID
  workerd dead requeue default --newer-than 1h --dry-run
  workerd dead export default > letters.jsonl && workerd dead drop default --all
"""
LIST = "List dead letters, the oldest first. This neither changes nor shuffles them."
SHOW = "Show a dead letter. An empty ID ('') shows those that have none."
REQUEUE = """\
Send dead letters back to QUEUE as new jobs: body, properties and headers as
they were, all attempts to come, no time limit for the start. A letter goes when
the broker has confirmed its job. The ids of those that were sent are printed."""
DROP = "Throw dead letters away, after a question. Prints the ids of those dropped."
EXPORT = """\
Print dead letters, one JSON object a line, body and all; a body that is not
UTF-8 is in body_base64. They stay where they are."""


def add_dead(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of `dead`, and their options."""
    parser.description, parser.epilog = DEAD, DEAD_EPILOG
    commands = parser.add_subparsers(
        title="commands", dest="dead_command", required=True, metavar="COMMAND"
    )

    def add(name: str, brief: str, text: str, carry_out: object) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=brief, description=text, epilog=STATUSES)
        command.add_argument("queue", metavar="QUEUE", help="the work queue, such as default")
        add_common(command)
        command.set_defaults(carry_out=carry_out)
        return command

    listing = add("list", "list letters", LIST, _list)
    _add_filters(listing)
    listing.add_argument("--json", action="store_true", help="print one JSON object a line")

    showing = add("show", "show one letter", SHOW, _show)
    showing.add_argument("id", metavar="ID", help="the id of the job")
    how = showing.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print it as one JSON object")
    how.add_argument("--body", action="store_true", help="write its body as it is")

    requeueing = add("requeue", "send letters back", REQUEUE, _requeue)
    dropping = add("drop", "throw letters away", DROP, _drop)
    for command in (requeueing, dropping):
        _add_filters(command)
        command.add_argument("--all", action="store_true", help="all letters of the queue")
        command.add_argument(
            "--dry-run", action="store_true", help="only print the ids of those that are meant"
        )
    dropping.add_argument("--yes", action="store_true", help="do not ask")

    _add_filters(add("export", "print letters as JSON", EXPORT, _export))


def _add_filters(parser: argparse.ArgumentParser) -> None:
    filters = parser.add_argument_group("filters, all of which must hold")
    filters.add_argument(
        "--id", action="append", metavar="ID", help="the id of the job; may be repeated"
    )
    filters.add_argument("--type", metavar="TYPE", help="the type of the job")
    filters.add_argument("--reason", metavar="REASON", help="such as exit-status, timeout")
    filters.add_argument(
        "--older-than", type=seconds, metavar="T", help="failed longer ago than this: 30m, 2d"
    )
    filters.add_argument(
        "--newer-than", type=seconds, metavar="T", help="failed within this time: 1h"
    )
    filters.add_argument("--limit", type=_positive, metavar="N", help="the first N at most")


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError("expected a number from 1 on")
    return int(text)


def _filter(args: argparse.Namespace) -> Filter:
    """The filter of a command line. Raises CommandError for one that no letter can pass."""
    from workerd.deadletters.letter import Filter

    older, newer = args.older_than, args.newer_than
    if newer is not None and newer <= (older or 0.0):
        bound = "0s" if older is None else "--older-than"
        raise CommandError(
            EX_USAGE, f"--newer-than must be longer than {bound}, or no letter is meant"
        )
    return Filter(
        ids=frozenset(args.id or ()),
        type=args.type,
        reason=args.reason,
        older_than=args.older_than,
        newer_than=args.newer_than,
        limit=args.limit,
    )


def _chosen(args: argparse.Namespace) -> Filter:
    """The filter of a command that changes something. Raises CommandError without any."""
    from workerd.deadletters.letter import Filter

    wanted = _filter(args)
    if wanted == Filter() and not args.all:
        raise CommandError(EX_USAGE, "name the letters: give a filter, such as --id ID, or --all")
    if not wanted.takes_every and args.all:
        raise CommandError(EX_USAGE, "--all and a filter exclude each other")
    return wanted


def _settings(args: argparse.Namespace) -> Settings:
    from workerd.config.load import load

    return load(args.config, args.instance)


def _list(args: argparse.Namespace) -> int:
    from workerd.deadletters.render import HEADINGS, row, summary

    now = time.time()
    if args.json:
        _look(args, _filter(args), lambda letter: print_json(summary(letter)))
        return EX_OK
    rows: list[tuple[str, ...]] = []
    _look(args, _filter(args), lambda letter: rows.append(row(letter, now)))
    if rows:
        print_table([HEADINGS, *rows])
    return EX_OK


def _look(args: argparse.Namespace, wanted: Filter, found: Callable[[DeadLetter], None]) -> None:
    """Call ``found`` with each wanted letter. Raises BrokerError, CommandError."""
    import asyncio

    from workerd.deadletters import operations

    settings = _settings(args)

    async def look() -> None:
        async with operations.browse(settings.broker, args.queue, wanted) as browser:
            async for letter in browser.letters():
                found(letter)

    asyncio.run(look())


def _show(args: argparse.Namespace) -> int:
    from workerd.deadletters.letter import Filter
    from workerd.deadletters.render import details, export

    found: list[DeadLetter] = []
    _look(args, Filter(ids=frozenset({args.id})), found.append)
    if not found:
        raise CommandError(EX_NOINPUT, f"no dead letter of {args.queue} has the id {args.id!r}")
    if args.body:
        if len(found) > 1:
            warn(f"{len(found)} letters have this id: this is the last")
        print_bytes(found[-1].message.body)
        return EX_OK
    now = time.time()
    for number, letter in enumerate(found):
        if args.json:
            print_json(export(letter))
        else:
            if number:
                print_line("")
            _print_details(details(letter, now))
    return EX_OK


def _print_details(shown: Details) -> None:
    width = max(len(name) for name, _ in shown.facts) + 2
    for name, value in shown.facts:
        print_line(f"{name + ':':<{width}} {value}")
    for name, text in shown.texts:
        print_line(f"{name}:")
        for line in text.rstrip("\n").split("\n"):
            print_line(f"    {line}")


def _print_id(letter: DeadLetter) -> None:
    print_line(letter.id or "-")


def _requeue(args: argparse.Namespace) -> int:
    import asyncio

    from workerd.deadletters import operations

    wanted = _chosen(args)
    if args.dry_run:
        _look(args, wanted, _print_id)
        return EX_OK
    sent: list[DeadLetter] = []

    def moved(letter: DeadLetter) -> None:
        _print_id(letter)
        sent.append(letter)

    settings = _settings(args)
    try:
        stuck = asyncio.run(operations.requeue(settings.broker, args.queue, wanted, moved))
    finally:
        output.flush()
        warn(f"{len(sent)} sent back to {args.queue}; all others stay where they are")
    return EX_DATAERR if stuck else EX_OK


def _drop(args: argparse.Namespace) -> int:
    import asyncio

    from workerd.deadletters import operations

    wanted = _chosen(args)
    if args.dry_run:
        _look(args, wanted, _print_id)
        return EX_OK
    if not args.yes and not sys.stdin.isatty():
        raise CommandError(
            EX_USAGE, "nobody is there to be asked; to drop them all the same: --yes"
        )

    def agreed(count: int) -> bool:
        if args.yes:
            return True
        sys.stderr.write(f"Drop {count} dead letters of {safe(args.queue)} for good? [y/N] ")
        sys.stderr.flush()
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    settings = _settings(args)
    dropped = asyncio.run(operations.drop(settings.broker, args.queue, wanted, agreed))
    for letter in dropped:
        _print_id(letter)
    output.flush()
    warn(f"{len(dropped)} dropped")
    return EX_OK


def _export(args: argparse.Namespace) -> int:
    from workerd.deadletters.render import export

    _look(args, _filter(args), lambda letter: print_json(export(letter)))
    return EX_OK
