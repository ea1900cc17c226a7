"""Options that commands share, and how their values are read."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from workerd.errors import EX_USAGE, CommandError
from workerd.output import warn


def unmeasured(prog: str) -> argparse.HelpFormatter:
    """A formatter that does not import shutil to learn how wide the terminal is."""
    return argparse.HelpFormatter(prog, width=80)


class Parser(argparse.ArgumentParser):
    """argparse, with the usage error of sysexits.h and an epilog that stays as it is."""

    def __init__(self, **options: Any) -> None:
        # argparse makes a formatter for each option that is added, to see if it could be shown.
        super().__init__(formatter_class=unmeasured, **options)

    def format_help(self) -> str:
        self.formatter_class = argparse.RawDescriptionHelpFormatter
        return super().format_help()

    def format_usage(self) -> str:
        self.formatter_class = argparse.RawDescriptionHelpFormatter
        return super().format_usage()

    def error(self, message: str) -> object:  # type: ignore[override]
        with contextlib.suppress(OSError):
            self.print_usage(sys.stderr)
        warn(message, self.prog)
        sys.exit(EX_USAGE)


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that read the configuration."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="read this file instead of those in /etc/workerd",
    )
    parser.add_argument(
        "--instance", default="1", metavar="NAME", help="the instance's name (default: 1)"
    )
    # The name that its errors begin with.
    parser.set_defaults(name="workerd")


def seconds(text: str) -> float:
    """Read a duration; a bare number counts seconds, here as in the configuration."""
    from workerd.units import parse_duration

    try:
        return parse_duration(text if text[-1:].isalpha() else f"{text}s")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_instance(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the same options for commands that ask instances, and read no configuration."""
    parser.add_argument(
        "--config", metavar="FILE", help="of no effect: what is asked is the running instance"
    )
    parser.add_argument(
        "--instance", metavar="NAME", help=f"the instance's name (default: {default})"
    )
    parser.set_defaults(name="workerd")


def add_url(parser: argparse.ArgumentParser) -> None:
    """Add --url, which `environ` reads."""
    parser.add_argument(
        "--url", metavar="URL", help="the broker, without a password; @FILE: what is in FILE"
    )


def environ(args: argparse.Namespace) -> dict[str, str]:
    """The environment, with --url in it. Raises CommandError."""
    variables = dict(os.environ)
    if args.url:
        variables["WORKERD_BROKER_URL"] = _url(args.url)
    return variables


def _url(text: str) -> str:
    from workerd.config.url import BrokerURL

    if text.startswith("@"):
        try:
            return Path(text[1:]).read_text(errors="replace").strip()
        except OSError as error:
            raise CommandError(EX_USAGE, f"--url {text}: {error.strerror}") from None
    try:
        url = BrokerURL.parse(text)
    except ValueError as error:
        raise CommandError(EX_USAGE, f"--url: {error}") from None
    if url.password is not None:
        raise CommandError(
            EX_USAGE,
            "--url: a password shows in ps; use --url @FILE or the variable WORKERD_BROKER_URL",
        )
    return text
