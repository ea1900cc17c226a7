"""`workerd cancel`: ends a job that runs on this host, refuses one that is still to come."""

from __future__ import annotations

import argparse
from typing import Any

from workerd.cli.options import add_instance
from workerd.control import client, protocol
from workerd.errors import EX_OK, EX_UNAVAILABLE, CommandError
from workerd.output import print_json, print_line
from workerd.units import age

CANCEL = """\
Cancel a job. Where it runs on this host, its process group gets SIGTERM, and
SIGKILL after the handler's kill_grace, and it becomes a dead letter with the
reason "cancelled". Where it waits, instances of this host refuse it when it
comes, for a day or until they end; other hosts do not know of it."""
CANCEL_EPILOG = """\
exit status:
  0   the instances that answer know of it
  64  usage
  69  no instance of this host answers
  77  only root, the daemon's user, [control] operators, and whoever submitted
      the job through an instance of this host, may do that

examples:
  workerd cancel 01a20efd-a206-7203-9cf6-df5f24093667
"""


def add_cancel(parser: argparse.ArgumentParser) -> None:
    """Add the options of `cancel`."""
    parser.description, parser.epilog = CANCEL, CANCEL_EPILOG
    parser.add_argument("id", metavar="ID", help="the id of the job")
    add_instance(parser, "all of this host")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.set_defaults(carry_out=_cancel)


def _cancel(args: argparse.Namespace) -> int:
    folders = (
        client.folders()
        if args.instance is None
        else {args.instance: client.folder_of(args.instance)}
    )
    answers: dict[str, protocol.Reply] = {}
    refusal: CommandError | None = None
    for name, folder in folders.items():
        try:
            answers[name] = client.ask(folder, {"request": "cancel", "id": args.id})
        except protocol.NoAnswer:
            continue
        except CommandError as refused:
            refusal = refused
    if refusal:
        raise refusal
    if not answers:
        raise CommandError(EX_UNAVAILABLE, "no instance of this host answers")
    if args.json:
        for name, answer in answers.items():
            print_json({"instance": name, "id": args.id, "ended": answer["ended"]})
    else:
        _print_answers(args.id, answers)
    return EX_OK


def _print_answers(job_id: str, answers: dict[str, Any]) -> None:
    ended = [(name, job) for name, answer in answers.items() for job in answer["ended"]]
    for name, job in ended:
        group = f", process group {job['pid']}" if job["pid"] else ""
        ran = f" for {age(job['age'])}" if job["age"] is not None else ""
        print_line(f"{job_id}: has run{ran} in instance {name}{group}: is being ended")
    if not ended:
        own_only = any(answer["own_only"] for answer in answers.values())
        whose = " (if you have submitted it)" if own_only else ""
        names = ", ".join(answers)
        print_line(f"{job_id}: does not run here; refused{whose} when it comes to instance {names}")
