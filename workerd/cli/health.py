"""`workerd health`: whether an instance really consumes."""

from __future__ import annotations

import argparse

from workerd.cli.options import add_instance
from workerd.control import client, protocol
from workerd.errors import EX_OK
from workerd.output import print_json, print_line

HEALTH = """\
Say whether an instance really consumes: a live consumer on an open channel, a
broker that answers, no queue that the broker keeps from it, no drain. One that
does, but whose handlers cannot all run, is "degraded": which, and why, is
printed. For monitoring; asks the instance alone, and takes less than a tenth of
a second."""

HEALTH_EPILOG = f"""\
exit status:
  0   it does; each handler that cannot run as it should is one line on standard
      output
  1   it does not, or does not run; why not is one line on standard output
  64  usage
  77  only members of {protocol.GROUP} may ask the instance

examples:
  workerd health --instance 2 || systemctl status workerd@2
"""

#: Seconds for an instance to answer; one that is well takes a thousandth of it.
_HEALTH_TIMEOUT = 2.0


def add_health(parser: argparse.ArgumentParser) -> None:
    """Add the options of `health`."""
    parser.description, parser.epilog = HEALTH, HEALTH_EPILOG
    add_instance(parser, "1")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(carry_out=_health)


def _health(args: argparse.Namespace) -> int:
    instance = args.instance or "1"
    try:
        answer = client.ask(
            client.folder_of(instance), {"request": "health"}, timeout=_HEALTH_TIMEOUT
        )
    except protocol.NoAnswer as silent:
        answer = {"healthy": False, "why": str(silent), "degraded": []}
    healthy = bool(answer["healthy"])
    lines = [f"degraded: {text}" for text in answer["degraded"]] if healthy else [answer["why"]]
    if args.json:
        print_json({"instance": instance, **answer})
    else:
        for line in lines:
            print_line(line)
    return EX_OK if healthy else 1
