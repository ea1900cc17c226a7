"""`workerd pause` and `workerd resume`: whether an instance takes jobs of a queue."""

from __future__ import annotations

import argparse

from workerd.cli.options import add_instance
from workerd.control import client, protocol
from workerd.errors import EX_OK, EX_UNAVAILABLE, CommandError
from workerd.output import print_json, print_line

STATUSES = """\
exit status:
  0   done
  64  usage, or no such queue there
  69  no such instance runs on this host
  77  only root, the daemon's user and [control] operators may do that
"""
PAUSE = """\
Let an instance start nothing of QUEUE, or of all its queues, until it is
resumed or started again. Running jobs go on; what waits there goes back to the
broker, for other instances."""
PAUSE_EPILOG = f"""\
{STATUSES}
examples:
  workerd pause                  instance 1 takes no more work
  workerd pause images --instance 2
"""
RESUME = "Let an instance consume QUEUE, or all its queues, again."
RESUME_EPILOG = f"""\
{STATUSES}
examples:
  workerd resume
"""


def add_pause(parser: argparse.ArgumentParser) -> None:
    """Add the options of `pause`."""
    parser.description, parser.epilog = PAUSE, PAUSE_EPILOG
    _add_queue(parser, "pause")


def add_resume(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resume`."""
    parser.description, parser.epilog = RESUME, RESUME_EPILOG
    _add_queue(parser, "resume")


def _add_queue(parser: argparse.ArgumentParser, request: str) -> None:
    parser.add_argument("queue", metavar="QUEUE", nargs="?", help="the work queue (default: all)")
    add_instance(parser, "1")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(carry_out=_pause_or_resume, request=request)


def _pause_or_resume(args: argparse.Namespace) -> int:
    instance = args.instance or "1"
    request: dict[str, object] = {"request": args.request}
    if args.queue is not None:
        request["queue"] = args.queue
    try:
        answer = client.ask(client.folder_of(instance), request)
    except protocol.NoAnswer as silent:
        raise CommandError(EX_UNAVAILABLE, str(silent)) from None
    if args.json:
        facts = {key: answer[key] for key in ("queues", "changed", "running")}
        print_json({"instance": instance, **facts})
        return EX_OK
    done = f"{args.request}d"
    for queue in answer["queues"]:
        print_line(f"{queue} {'' if queue in answer['changed'] else 'is already '}{done}")
    if args.request == "pause" and answer["running"]:
        print_line(f"{answer['running']} jobs are still running")
    return EX_OK
