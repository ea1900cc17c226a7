"""The command line: parses it, puts the parts together, and turns errors into exit statuses."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from workerd import __version__
from workerd.errors import SettingsError, WorkerdError

EX_USAGE = 64
EX_SOFTWARE = 70
EX_IOERR = 74
EX_CONFIG = 78


class _Parser(argparse.ArgumentParser):
    """argparse, with the usage error of sysexits.h."""

    def error(self, message: str) -> object:  # type: ignore[override]
        self.print_usage(sys.stderr)
        self.exit(EX_USAGE, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command `workerd`; ends the process."""
    parser = _Parser(
        prog="workerd", description="A worker daemon for RabbitMQ, managed by systemd."
    )
    parser.add_argument("--version", action="version", version=f"workerd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run(commands.add_parser("run", help="run the daemon (what workerd@.service starts)"))
    _add_check(commands.add_parser("check", help="check the configuration"))
    _add_submit(commands.add_parser("submit", help="submit a job, or many"))
    _end(_carry_out(parser.parse_args(arguments)))


def submit_main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command `submit`: exactly `workerd submit`."""
    parser = _Parser(prog="submit", description=SUBMIT)
    _add_submit(parser)
    _end(_carry_out(parser.parse_args(arguments)))


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
        from workerd.submit import exit_status

        sys.stderr.write(f"submit: {error}\n")
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
    parser.add_argument("--config", type=Path, metavar="FILE", help="read this file and no other")
    parser.add_argument("--instance", default="1", metavar="NAME", help="instance (default: 1)")


def _add_run(parser: argparse.ArgumentParser) -> None:
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
    _add_common(parser)
    parser.add_argument(
        "--connect",
        action="store_true",
        help="also try login, permissions and queues at the broker",
    )
    parser.add_argument(
        "--show", action="store_true", help="print the merged configuration, with each value's file"
    )
    parser.set_defaults(carry_out=_check)


def _check(args: argparse.Namespace) -> int:
    from workerd import check, settings, show

    loaded = settings.load(args.config, args.instance)
    if args.show:
        sys.stdout.write(show.show(loaded))
    problems: list[str] = []
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


SUBMIT = "Send a job to RabbitMQ; exits 0 only when the broker has confirmed and routed it."


def _seconds(text: str) -> float:
    from workerd.units import parse_duration

    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_submit(parser: argparse.ArgumentParser) -> None:
    parser.description = SUBMIT
    _add_common(parser)
    parser.add_argument("type", metavar="TYPE", help="the handler's name")
    parser.add_argument(
        "body", metavar="BODY", nargs="?", help="the payload; default: standard input"
    )
    parser.add_argument(
        "-f", "--file", metavar="FILE", help="read the payload from a file; - is stdin"
    )
    parser.add_argument("--queue", metavar="Q", help="default: the handler's queue")
    parser.add_argument("--priority", type=int, metavar="N")
    parser.add_argument("--id", metavar="ID", help="the job id; default: a new UUID")
    parser.add_argument(
        "--header", action="append", default=[], metavar="K=V", help="may be repeated"
    )
    many = parser.add_mutually_exclusive_group()
    many.add_argument("--lines", action="store_true", help="each line of the input is a job")
    many.add_argument("--jsonl", action="store_true", help="likewise, and each must be valid JSON")
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=30.0,
        metavar="T",
        help="bounds the whole command; for many lines, each wait (default: 30s)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print an object for each job, not its id"
    )
    parser.add_argument("--url", metavar="URL", help="the broker, without password; @FILE reads it")
    parser.add_argument("--dry-run", action="store_true", help="do everything but send")
    parser.set_defaults(carry_out=_submit)


def _submit(args: argparse.Namespace) -> int:
    from workerd.settings import load
    from workerd.submit import submit

    environ = dict(os.environ)
    if args.url:
        environ["WORKERD_BROKER_URL"] = _url(args.url)
    settings = load(args.config, args.instance, environ)
    if args.lines or args.jsonl:
        from workerd.bulk import submit_lines

        return submit_lines(args, settings)
    return submit(args, settings)


def _url(text: str) -> str:
    from workerd.submit import EX_USAGE, Refused
    from workerd.url import BrokerURL

    if text.startswith("@"):
        try:
            return Path(text[1:]).read_text(errors="replace").strip()
        except OSError as error:
            raise Refused(EX_USAGE, f"--url {text}: {error.strerror}") from None
    try:
        url = BrokerURL.parse(text)
    except ValueError as error:
        raise Refused(EX_USAGE, f"--url: {error}") from None
    if url.password is not None:
        raise Refused(
            EX_USAGE,
            "--url: a password shows in ps; use --url @FILE or the variable WORKERD_BROKER_URL",
        )
    return text
