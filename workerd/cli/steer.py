"""`workerd pause`, `resume` and `cancel`: their options, and what they print."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from workerd.cli.options import add_instance
from workerd.control import client, protocol
from workerd.errors import EX_OK, EX_UNAVAILABLE, CommandError

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


def add_pause(parser: argparse.ArgumentParser) -> None:
    """Add the options of `pause`."""
    parser.description, parser.epilog = PAUSE, PAUSE_EPILOG
    _add_queue(parser, "pause")


def add_resume(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resume`."""
    parser.description, parser.epilog = RESUME, RESUME_EPILOG
    _add_queue(parser, "resume")


def _add_queue(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("queue", metavar="QUEUE", nargs="?", help="the work queue (default: all)")
    add_instance(parser, "1")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(carry_out=_hold_back, what=what)


def add_cancel(parser: argparse.ArgumentParser) -> None:
    """Add the options of `cancel`."""
    parser.description, parser.epilog = CANCEL, CANCEL_EPILOG
    parser.add_argument("id", metavar="ID", help="the id of the job")
    add_instance(parser, "all of this host")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.set_defaults(carry_out=_cancel)


def _hold_back(args: argparse.Namespace) -> int:
    instance = args.instance or "1"
    request: dict[str, object] = {"request": args.what}
    if args.queue is not None:
        request["queue"] = args.queue
    try:
        answer = client.ask(client.folder_of(instance), request)
    except protocol.NoAnswer as silent:
        raise CommandError(EX_UNAVAILABLE, str(silent)) from None
    if args.json:
        from workerd.cli.output import print_json

        facts = {key: answer[key] for key in ("queues", "changed", "running")}
        print_json({"instance": instance, **facts})
        return EX_OK
    done = f"{args.what}d"
    for queue in answer["queues"]:
        already = "" if queue in answer["changed"] else "already "
        sys.stdout.write(f"{queue} {'is ' if already else ''}{already}{done}\n")
    if args.what == "pause" and answer["running"]:
        sys.stdout.write(f"{answer['running']} jobs are still running\n")
    return EX_OK


def _cancel(args: argparse.Namespace) -> int:
    found: dict[str, Path] = (
        client.folders()
        if args.instance is None
        else {args.instance: client.folder_of(args.instance)}
    )
    answers: dict[str, protocol.Reply] = {}
    refusal: CommandError | None = None
    for name, folder in found.items():
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
    _tell(args, answers)
    return EX_OK


def _tell(args: argparse.Namespace, answers: dict[str, Any]) -> None:
    from workerd.cli.output import print_json
    from workerd.log_formats import safe
    from workerd.units import age

    if args.json:
        for name, answer in answers.items():
            print_json({"instance": name, "id": args.id, "ended": answer["ended"]})
        return
    ended = [(name, job) for name, answer in answers.items() for job in answer["ended"]]
    for name, job in ended:
        pid = f", process group {job['pid']}" if job["pid"] else ""
        ran = f" for {age(job['age'])}" if job["age"] is not None else ""
        text = f"it has run{ran} in instance {name}{pid}: told to end"
        sys.stdout.write(f"{safe(args.id)}: {text}\n")
    if not ended:
        names = ", ".join(answers)
        own_only = any(answer["own_only"] for answer in answers.values())
        whose = " (if you have submitted it)" if own_only else ""
        text = f"does not run here; refused{whose} when it comes to instance {names}"
        sys.stdout.write(f"{safe(args.id)}: {text}\n")
