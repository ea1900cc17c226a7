"""`workerd run`: the daemon."""

from __future__ import annotations

import argparse

from workerd.cli.options import add_common
from workerd.errors import SettingsError

RUN = "Consume the configured queues and run their jobs; the log goes to stderr."

RUN_EPILOG = """\
signals:
  TERM, INT, QUIT  drain: start nothing more, give running jobs drain_timeout to
                   end, then interrupt them and give them back; once more: now
  USR1             log all that is in hand
  HUP              reload the configuration, if all of it is right

exit status:
  0   drained
  64  usage
  70  a bug, with its traceback in the log
  78  bad configuration, or an instance of this name runs on this host already

examples:
  workerd run --config workerd.toml
  workerd run --instance 2 --detach --pidfile 2.pid --log-file 2.log
"""


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the options of `run`."""
    parser.description, parser.epilog = RUN, RUN_EPILOG
    add_common(parser)
    parser.add_argument(
        "--detach", action="store_true", help="go to the background (without systemd)"
    )
    parser.add_argument("--pidfile", metavar="P", help="with --detach: write the process id here")
    parser.add_argument(
        "--log-file",
        metavar="F",
        help="with --detach: append the log to this file; opened anew on SIGHUP",
    )
    parser.set_defaults(carry_out=_run)


def _run(args: argparse.Namespace) -> int:
    from workerd.daemon.main import run

    if not args.detach and (args.pidfile or args.log_file):
        raise SettingsError("--pidfile and --log-file go with --detach")
    return run(args.config, args.instance, args.detach, args.pidfile, args.log_file)
