"""`workerd logs`: the lines of one job, from systemd's journal."""

from __future__ import annotations

import argparse
import os
import shutil

from workerd.cli.options import add_instance
from workerd.control import client
from workerd.errors import EX_UNAVAILABLE, EX_USAGE, CommandError

LOGS = """\
Show everything that happened to a job on this host, its own output included:
its lines in systemd's journal, of the units workerd@NAME.service."""
LOGS_EPILOG = """\
Who may not read the journal sees nothing: be root, or in the group
systemd-journal or adm.

exit status:
  64  usage
  69  there is no journalctl
  otherwise that of journalctl

examples:
  workerd logs 01a20efd-a206-7203-9cf6-df5f24093667
  workerd logs order-17 -f
"""


def add_logs(parser: argparse.ArgumentParser) -> None:
    """Add the options of `logs`."""
    parser.description, parser.epilog = LOGS, LOGS_EPILOG
    parser.add_argument("id", metavar="ID", help="the id of the job")
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what comes")
    add_instance(parser, "all of this host")
    parser.set_defaults(carry_out=_logs)


def _logs(args: argparse.Namespace) -> int:
    if not args.id or not args.id.isprintable():
        raise CommandError(EX_USAGE, "ID must be printable text")
    program = shutil.which("journalctl")
    if program is None:
        raise CommandError(
            EX_UNAVAILABLE,
            "there is no journalctl here: look for the id in the file that the daemon logs to",
        )
    os.execv(program, ["journalctl", *_arguments(args)])  # noqa: S606 - no shell is wanted


def _arguments(args: argparse.Namespace) -> list[str]:
    instances = [args.instance] if args.instance else ([*client.folders()] or ["1"])
    # Matches of one field are alternatives. Anybody may log a job's id, and nobody a unit.
    units = [f"_SYSTEMD_UNIT=workerd@{name}.service" for name in instances]
    follow = ["--follow", "--lines=all"] if args.follow else []
    return [*follow, f"WORKERD_JOB_ID={args.id}", *units]
