"""`workerd check`: every problem of the configuration, one line each."""

from __future__ import annotations

import argparse

from workerd.cli.options import add_common
from workerd.errors import EX_CONFIG, EX_OK
from workerd.output import print_line, warn

CHECK = "Find everything that is wrong with the configuration, one line for each problem."

CHECK_EPILOG = """\
--connect takes the steps of a starting daemon at every broker: it declares the
queues that are missing, where it may, and neither takes nor leaves a message.

exit status:
  0   nothing is wrong
  64  usage
  78  the problems on stderr

examples:
  workerd check                     before every start and restart
  workerd check --connect           after a change of user, password or queues
  workerd check --show              which file sets what
"""


def add_check(parser: argparse.ArgumentParser) -> None:
    """Add the options of `check`."""
    parser.description, parser.epilog = CHECK, CHECK_EPILOG
    add_common(parser)
    parser.add_argument(
        "--connect",
        action="store_true",
        help="also try login, permissions and queues at the broker",
    )
    parser.add_argument(
        "--show",
        action="store_true",
        help="print every value in force, and the file it comes from",
    )
    parser.set_defaults(carry_out=_check)


def _check(args: argparse.Namespace) -> int:
    from workerd.check import offline
    from workerd.config import dump, load
    from workerd.config.permissions import drop_to_service_user

    loaded, problems = load.load_with_problems(args.config, args.instance)
    sound = not problems
    if args.show and sound:
        for line in dump.show(loaded).splitlines():
            print_line(line)
    if args.connect and sound:
        from workerd.check.broker import check_broker

        problems += check_broker(loaded)
    # Last, for it gives up the right to read root's files: the application's code is
    # imported with the rights that its jobs will have.
    drop_to_service_user()
    # All at once; but nothing is run for the sake of files that somebody else may have written.
    problems += offline.check(loaded, run=sound)
    for problem in problems:
        warn(problem)
    if not problems and not args.show:
        print_line("configuration is fine")
    return EX_CONFIG if problems else EX_OK
