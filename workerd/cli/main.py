"""The command line: parses it, puts the parts together, and turns errors into exit statuses."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from workerd import __version__
from workerd.cli.check import add_check
from workerd.cli.options import Parser, add_common, seconds
from workerd.cli.run import add_run
from workerd.cli.setup import add_setup
from workerd.cli.submit import add_submit
from workerd.errors import EX_CONFIG, EX_IOERR, SettingsError, WorkerdError

MAIN_EPILOG = """\
configuration, later files override earlier ones:
  /etc/workerd/workerd.toml, conf.d/*.toml and instances/NAME.toml beside it;
  the variable WORKERD_BROKER_URL comes before the broker of all of them

'workerd COMMAND --help' shows options, exit statuses and examples.
"""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command `workerd`; ends the process."""
    _end(_carry_out(parser().parse_args(arguments)))


def submit_main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command `submit`: exactly `workerd submit`."""
    _end(_carry_out(submit_parser().parse_args(arguments)))


def parser() -> argparse.ArgumentParser:
    """What `workerd` understands: its options and commands, with their help."""
    # `submit` need not wait for these.
    from workerd.cli import health, logs, metrics, queues, status, steer
    from workerd.cli.dead import add_dead
    from workerd.cli.run_once import add_run_once

    top = Parser(
        prog="workerd",
        description="A worker daemon for RabbitMQ: runs a command for each message of its queues.",
        epilog=MAIN_EPILOG,
    )
    top.add_argument("--version", action="version", version=f"workerd {__version__}")
    commands = top.add_subparsers(
        title="commands", dest="command", required=True, metavar="COMMAND"
    )
    add_run(commands.add_parser("run", help="run the daemon"))
    add_check(commands.add_parser("check", help="check the configuration, and the broker"))
    add_submit(
        commands.add_parser("submit", help="send a job, or one for each line of a file"),
        add_common,
        seconds,
    )
    add_dead(commands.add_parser("dead", help="failed jobs: look, send back"), add_common, seconds)
    once = commands.add_parser("run-once", help="run a handler for one job, without a broker")
    add_common(once)
    add_run_once(once)
    status.add_status(
        commands.add_parser("status", help="the instances of this host, and what they run")
    )
    health.add_health(commands.add_parser("health", help="whether one really consumes"))
    metrics.add_metrics(commands.add_parser("metrics", help="figures for Prometheus"))
    queues.add_queues(commands.add_parser("queues", help="what waits, is due, is dead"), add_common)
    logs.add_logs(commands.add_parser("logs", help="the log of one job"))
    steer.add_cancel(commands.add_parser("cancel", help="end a job, or refuse it"))
    steer.add_pause(commands.add_parser("pause", help="take no more work"))
    steer.add_resume(commands.add_parser("resume", help="take work again"))
    add_setup(commands.add_parser("setup", help="declare all queues, as an administrator"))
    return top


def submit_parser() -> argparse.ArgumentParser:
    """What `submit` understands."""
    submit = Parser(prog="submit")
    add_submit(submit, add_common, seconds)
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
        from workerd.errors import exit_status

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
