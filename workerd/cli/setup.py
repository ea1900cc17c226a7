"""`workerd setup`: every queue and exchange declared by an administrator."""

from __future__ import annotations

import argparse

from workerd.cli.options import add_common, add_url, environ

SETUP = """\
Declare all queues and exchanges of the configuration, as an administrator: then
the workers need no right to configure. Messages are neither read nor sent."""

SETUP_EPILOG = """\
What exists with other arguments is named, and used as it is.

exit status:
  0   all of it is there
  64  usage
  69  no broker answered
  77  some of it may not be declared, or the login was refused
  78  bad configuration

examples:
  workerd setup --url @admin-url       a file with the administrator's URL
"""


def add_setup(parser: argparse.ArgumentParser) -> None:
    """Add the options of `setup`."""
    parser.description, parser.epilog = SETUP, SETUP_EPILOG
    add_common(parser)
    add_url(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.set_defaults(carry_out=_setup)


def _setup(args: argparse.Namespace) -> int:
    from workerd.check.declare import setup
    from workerd.config.load import load

    variables = environ(args)
    return setup(load(args.config, args.instance, variables), variables, args.json)
