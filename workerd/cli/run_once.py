"""`workerd run-once`: a handler run for one job, without a broker."""

from __future__ import annotations

import argparse

from workerd.cli.options import add_common

DESCRIPTION = """\
Run a handler here for one job, its body on standard input, as the daemon would,
but without a broker. The result goes to standard output, the log to standard
error."""
EPILOG = """\
exit status:
  0    done
  1    failed; or the command's own exit status
  64   usage, or no such handler
  65   rejected: the job itself is wrong
  69   the handler cannot run: a program is missing, an import fails
  75   failed, and the job asks for another attempt later
  78   bad configuration
  124  timed out
  128+n  killed by signal n; 130: interrupted

examples:
  workerd run-once resize < photo.json
  workerd run-once --attempt 3 --header trace=abc resize < photo.json
"""


def add_run_once(parser: argparse.ArgumentParser) -> None:
    """Add the options of `run-once`."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add_common(parser)
    parser.add_argument("handler", metavar="HANDLER", help="its name, which is the job's type")
    parser.add_argument(
        "--header", action="append", default=[], metavar="K=V", help="a header; may be repeated"
    )
    parser.add_argument("--id", metavar="ID", help="the job's id (default: a new UUID)")
    parser.add_argument(
        "--attempt", type=int, default=1, metavar="N", help="which attempt it is (default: 1)"
    )
    parser.set_defaults(carry_out=_run_once)


def _run_once(args: argparse.Namespace) -> int:
    from workerd.daemon.run_once import run_once

    return run_once(args)
