"""The command line: parses it, puts the parts together, and turns errors into exit statuses."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from workerd import __version__
from workerd.errors import SettingsError, WorkerdError
from workerd.exits import EX_CONFIG, EX_IOERR, EX_USAGE
from workerd.submit_command import add_submit, add_url, environ

MAIN_EPILOG = """\
configuration, later files override earlier ones:
  /etc/workerd/workerd.toml, conf.d/*.toml and instances/NAME.toml beside it;
  the variable WORKERD_BROKER_URL comes before the broker of all of them

'workerd COMMAND --help' shows options, exit statuses and examples.
"""

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
SETUP = """\
Declare all queues and exchanges of the configuration, as an administrator: then
the workers need no right to configure. Messages are neither read nor sent."""
SETUP_EPILOG = """\
What exists with other arguments is told, and used as it is.

exit status:
  0   all of it is there
  64  usage
  69  no broker answered
  77  some of it may not be declared, or the login was refused
  78  bad configuration

examples:
  workerd setup --url @admin-url       a file with the administrator's URL
"""


def _unmeasured(prog: str) -> argparse.HelpFormatter:
    """A formatter that does not import shutil to learn how wide the terminal is."""
    return argparse.HelpFormatter(prog, width=80)


class _Parser(argparse.ArgumentParser):
    """argparse, with the usage error of sysexits.h and an epilog that stays as it is."""

    def __init__(self, **options: Any) -> None:
        # argparse makes a formatter for each option that is added, to see if it could be shown.
        super().__init__(formatter_class=_unmeasured, **options)

    def format_help(self) -> str:
        self.formatter_class = argparse.RawDescriptionHelpFormatter
        return super().format_help()

    def format_usage(self) -> str:
        self.formatter_class = argparse.RawDescriptionHelpFormatter
        return super().format_usage()

    def error(self, message: str) -> object:  # type: ignore[override]
        self.print_usage(sys.stderr)
        self.exit(EX_USAGE, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command `workerd`; ends the process."""
    _end(_carry_out(parser().parse_args(arguments)))


def submit_main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command `submit`: exactly `workerd submit`."""
    _end(_carry_out(submit_parser().parse_args(arguments)))


def parser() -> argparse.ArgumentParser:
    """What `workerd` understands: its options and commands, with their help."""
    # `submit` need not wait for these.
    from workerd import (
        logs_command,
        metrics_command,
        queues_command,
        status_command,
        steer_command,
    )
    from workerd.dead_command import add_dead
    from workerd.run_once_command import add_run_once

    top = _Parser(
        prog="workerd",
        description="A worker daemon for RabbitMQ: runs a command for each message of its queues.",
        epilog=MAIN_EPILOG,
    )
    top.add_argument("--version", action="version", version=f"workerd {__version__}")
    commands = top.add_subparsers(
        title="commands", dest="command", required=True, metavar="COMMAND"
    )
    _add_run(commands.add_parser("run", help="run the daemon"))
    _add_check(commands.add_parser("check", help="check the configuration, and the broker"))
    add_submit(
        commands.add_parser("submit", help="send a job, or one for each line of a file"),
        _add_common,
        _seconds,
    )
    add_dead(
        commands.add_parser("dead", help="failed jobs: look, send back"), _add_common, _seconds
    )
    once = commands.add_parser("run-once", help="run a handler for one job, without a broker")
    _add_common(once)
    add_run_once(once)
    status_command.add_status(
        commands.add_parser("status", help="the instances of this host, and what they run")
    )
    status_command.add_health(commands.add_parser("health", help="whether one really consumes"))
    metrics_command.add_metrics(commands.add_parser("metrics", help="figures for Prometheus"))
    queues_command.add_queues(
        commands.add_parser("queues", help="what waits, is due, is dead"), _add_common
    )
    logs_command.add_logs(commands.add_parser("logs", help="the log of one job"))
    steer_command.add_cancel(commands.add_parser("cancel", help="end a job, or refuse it"))
    steer_command.add_pause(commands.add_parser("pause", help="take no more work"))
    steer_command.add_resume(commands.add_parser("resume", help="take work again"))
    _add_setup(commands.add_parser("setup", help="declare all queues, as an administrator"))
    return top


def submit_parser() -> argparse.ArgumentParser:
    """What `submit` understands."""
    submit = _Parser(prog="submit")
    add_submit(submit, _add_common, _seconds)
    return submit


def _carry_out(args: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit status."""
    try:
        status: int = args.carry_out(args)
        return status
    except SettingsError as error:
        for problem in error.problems:
            sys.stderr.write(f"workerd: {problem}\n")
        return EX_CONFIG
    except WorkerdError as error:
        from workerd.exits import exit_status

        sys.stderr.write(f"{args.name}: {error}\n")
        return exit_status(error)
    except BrokenPipeError:
        return EX_IOERR
    except KeyboardInterrupt:
        return 130


def _end(status: int) -> NoReturn:
    """End now, whatever hangs in a thread, such as a resolver."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has gone; there is nobody to tell.
        status = status or EX_IOERR
    except OSError as error:
        sys.stderr.write(f"workerd: standard output: {error.strerror}\n")
        status = status or EX_IOERR
    os._exit(status)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="read this file instead of those in /etc/workerd",
    )
    parser.add_argument(
        "--instance", default="1", metavar="NAME", help="the instance's name (default: 1)"
    )
    # Who speaks in its errors.
    parser.set_defaults(name="workerd")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = RUN, RUN_EPILOG
    _add_common(parser)
    parser.add_argument(
        "--detach", action="store_true", help="go to the background (without systemd)"
    )
    parser.add_argument("--pidfile", metavar="P", help="with --detach: write the process id here")
    parser.add_argument(
        "--log-file", metavar="F", help="with --detach: append the log to this file"
    )
    parser.set_defaults(carry_out=_run)


def _run(args: argparse.Namespace) -> int:
    from workerd.daemon import run

    if not args.detach and (args.pidfile or args.log_file):
        raise SettingsError("--pidfile and --log-file go with --detach")
    return run(args.config, args.instance, args.detach, args.pidfile, args.log_file)


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = CHECK, CHECK_EPILOG
    _add_common(parser)
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
    from workerd import check, settings, show

    loaded = settings.load(args.config, args.instance)
    if args.show:
        sys.stdout.write(show.show(loaded))
    problems = []
    if args.connect:
        from workerd.connect import check_broker

        problems += check_broker(loaded)
    # Last, for it gives up the right to read root's files: the application's code is
    # imported with the rights that its jobs will have.
    check.drop_to_service_user()
    problems += check.check(loaded)
    for problem in problems:
        sys.stderr.write(f"workerd: {problem}\n")
    if not problems and not args.show:
        sys.stdout.write("configuration is fine\n")
    return EX_CONFIG if problems else 0


def _seconds(text: str) -> float:
    from workerd.units import parse_duration

    try:
        # A bare number counts seconds, here as in the configuration.
        return parse_duration(text if text[-1:].isalpha() else f"{text}s")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_setup(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = SETUP, SETUP_EPILOG
    _add_common(parser)
    add_url(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.set_defaults(carry_out=_setup)


def _setup(args: argparse.Namespace) -> int:
    from workerd.settings import load
    from workerd.setup import setup

    variables = environ(args)
    return setup(load(args.config, args.instance, variables), variables, args.json)
