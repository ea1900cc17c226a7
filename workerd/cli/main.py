"""The command line: parses it, runs a command, and turns errors into exit statuses."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import NoReturn

from workerd import __version__, output
from workerd.cli.check import add_check
from workerd.cli.options import Parser
from workerd.cli.run import add_run
from workerd.cli.setup import add_setup
from workerd.cli.submit import add_submit
from workerd.errors import EX_CONFIG, CommandError, SettingsError, WorkerdError, exit_status

MAIN_EPILOG = """\
configuration, later files override earlier ones:
  /etc/workerd/workerd.toml, conf.d/*.toml and instances/NAME.toml beside it;
  the variable WORKERD_BROKER_URL comes before the broker of all of them

'workerd COMMAND --help' shows options, exit statuses and examples.
"""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command `workerd`; ends the process."""
    _end(_run(parser, arguments))


def submit_main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command `submit`: exactly `workerd submit`."""
    _end(_run(submit_parser, arguments))


def parser() -> argparse.ArgumentParser:
    """The options and commands of `workerd`, with their help."""
    # `submit` need not wait for these.
    from workerd.cli.cancel import add_cancel
    from workerd.cli.dead import add_dead
    from workerd.cli.health import add_health
    from workerd.cli.logs import add_logs
    from workerd.cli.metrics import add_metrics
    from workerd.cli.pause import add_pause, add_resume
    from workerd.cli.queues import add_queues
    from workerd.cli.run_once import add_run_once
    from workerd.cli.status import add_status

    top = Parser(
        prog="workerd",
        description="A worker daemon for RabbitMQ: runs a command for each message of its queues.",
        epilog=MAIN_EPILOG,
    )
    top.add_argument("--version", action="version", version=f"workerd {__version__}")
    commands = top.add_subparsers(
        title="commands", dest="command", required=True, metavar="COMMAND"
    )
    for name, add, brief in (
        ("run", add_run, "run the daemon"),
        ("check", add_check, "check the configuration, and the broker"),
        ("submit", add_submit, "send a job, or one for each line of a file"),
        ("dead", add_dead, "failed jobs: look, send back"),
        ("run-once", add_run_once, "run a handler for one job, without a broker"),
        ("status", add_status, "the instances of this host, and what they run"),
        ("health", add_health, "whether one really consumes"),
        ("metrics", add_metrics, "metrics for Prometheus"),
        ("queues", add_queues, "what waits, is due, is dead"),
        ("logs", add_logs, "the log of one job"),
        ("cancel", add_cancel, "end a job, or refuse it"),
        ("pause", add_pause, "take no more work"),
        ("resume", add_resume, "take work again"),
        ("setup", add_setup, "declare all queues, as an administrator"),
    ):
        add(commands.add_parser(name, help=brief))
    return top


def submit_parser() -> argparse.ArgumentParser:
    """The options of `submit`."""
    submit = Parser(prog="submit")
    add_submit(submit)
    return submit


def _run(make_parser: Callable[[], argparse.ArgumentParser], words: Sequence[str] | None) -> int:
    """Run the command that a command line names; returns the exit status."""
    output.open_streams()
    try:
        args = make_parser().parse_args(words)
    except SystemExit as ended:  # after --help, or an error of usage
        return _flush(int(ended.code or 0), "workerd", quiet=True)
    try:
        status: int = args.carry_out(args)
    except SettingsError as error:
        for problem in error.problems:
            output.warn(problem)
        status = EX_CONFIG
    except WorkerdError as error:
        output.warn(str(error), args.name)
        status = exit_status(error)
    except KeyboardInterrupt:
        status = 130
    return _flush(status, args.name)


def _flush(status: int, name: str, quiet: bool = False) -> int:
    """Have everything printed; returns the exit status. ``quiet``: a pipe to `head` is fine."""
    try:
        output.flush()
    except CommandError as error:
        if quiet and isinstance(error, output.ReaderGone):
            return status
        output.warn(str(error), name)
        return status or error.status
    return status


def _end(status: int) -> NoReturn:
    """End now, whatever hangs in a thread, such as a resolver."""
    os._exit(status)
