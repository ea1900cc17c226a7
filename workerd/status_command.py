"""`workerd status` and `workerd health`: their options, and what they print."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from workerd import ask
from workerd.errors import Refused, WorkerdError
from workerd.exits import EX_NOPERM, EX_OK, EX_UNAVAILABLE

STATUS = """\
Show every instance of this host, also those that have stopped or failed:
broker, queues, and the jobs that run. Asks the instances, not the broker."""
STATUS_EPILOG = f"""\
exit status:
  0   told
  64  usage; --watch without a terminal
  69  nothing is known of the instance that --instance names; --watch without
      the Python package rich
  77  only members of {ask.GROUP} may ask the instances

examples:
  workerd status
  workerd status --watch            live: also what waits and fails
  workerd status --json | jq '.jobs[]? | select(.age > 600)'
"""
HEALTH = """\
Tell whether an instance really consumes: a live consumer on an open channel, a
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
  77  only members of {ask.GROUP} may ask the instance

examples:
  workerd health --instance 2 || systemctl status workerd@2
"""

#: Seconds for an instance to answer; one that is well takes a thousandth of it.
_HEALTH_TIMEOUT = 2.0

Add = Callable[[argparse.ArgumentParser], None]


def add_instance(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the options that every command has. These commands read no configuration."""
    parser.add_argument(
        "--config", metavar="FILE", help="of no effect: what is asked is the running instance"
    )
    parser.add_argument(
        "--instance", metavar="NAME", help=f"the instance's name (default: {default})"
    )
    parser.set_defaults(name="workerd")


def add_status(parser: argparse.ArgumentParser) -> None:
    """Add the options of `status`."""
    parser.description, parser.epilog = STATUS, STATUS_EPILOG
    add_instance(parser, "all of this host")
    parser.add_argument(
        "--watch", action="store_true", help="show it live; with --json: every second"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.set_defaults(carry_out=_status)


def add_health(parser: argparse.ArgumentParser) -> None:
    """Add the options of `health`."""
    parser.description, parser.epilog = HEALTH, HEALTH_EPILOG
    add_instance(parser, "1")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(carry_out=_health)


def _health(args: argparse.Namespace) -> int:
    instance = args.instance or "1"
    try:
        answer = ask.ask(ask.folder_of(instance), {"request": "health"}, timeout=_HEALTH_TIMEOUT)
    except ask.NoAnswer as silent:
        answer = {"healthy": False, "why": str(silent), "degraded": []}
    healthy = bool(answer["healthy"])
    lines = [f"degraded: {text}" for text in answer["degraded"]] if healthy else [answer["why"]]
    if args.json:
        from workerd.tables import print_json

        print_json({"instance": instance, **_told(answer)})
    elif lines:
        from workerd.log import safe

        sys.stdout.writelines(safe(line) + "\n" for line in lines)
    return EX_OK if healthy else 1


def _status(args: argparse.Namespace) -> int:
    from workerd.instances import states
    from workerd.tables import print_json

    if args.watch:
        return _watch(args)
    try:
        found = list(states(args.instance))
    except WorkerdError as error:
        raise Refused(EX_UNAVAILABLE, str(error)) from None
    if args.json:
        for state in found:
            print_json(_told(state))
    elif not found:
        sys.stdout.write("no instance of workerd runs or has run on this host\n")
    else:
        for number, state in enumerate(found):
            sys.stdout.write("\n" if number else "")
            _show(state)
    unknown = [state for state in found if state["state"] == "unknown"]
    if unknown and len(unknown) == len(found):
        raise Refused(EX_NOPERM, str(unknown[0]["why"]))
    return EX_OK


def _watch(args: argparse.Namespace) -> int:
    from workerd.tables import print_json
    from workerd.watch import stream, watch

    if not args.json:
        return watch(args.instance)
    for state in stream(args.instance):
        print_json(_told(state))
        sys.stdout.flush()
    raise AssertionError("a stream never ends")


def _told(state: dict[str, Any]) -> dict[str, Any]:
    """An answer without what says nothing of the instance."""
    return {name: value for name, value in state.items() if name not in ("version", "ok")}


def _show(state: dict[str, Any]) -> None:
    from workerd.log import safe
    from workerd.tables import age, print_table

    name = f"{state['instance']}: "
    if "queues" not in state:
        why = f": {state['why']}" if state["why"] else ""
        for number, line in enumerate(f"{state['state']}{why}".splitlines()):
            sys.stdout.write((" " * len(name) if number else name) + safe(line) + "\n")
        return
    sys.stdout.write(name + safe(state["status"]) + "\n")
    rabbitmq = f"RabbitMQ {state['rabbitmq']} at {state['broker']}" if state["broker"] else ""
    facts = [f"workerd {state['release']}", f"pid {state['pid']}", f"up {age(state['uptime'])}"]
    sys.stdout.write("   " + safe(", ".join(filter(None, [*facts, rabbitmq]))) + "\n")
    if not state["healthy"] and state["why"] != state["status"]:
        sys.stdout.write(f"   not consuming: {safe(state['why'])}\n")
    rows = [("QUEUE", "RUNNING", "WAITING", "HELD", "")]
    for queue in state["queues"]:
        note = f"paused {queue['paused']}" if queue["paused"] else ""
        if not note and not queue["consuming"]:
            note = "not consuming"
        slots = f"{queue['running']}/{queue['slots']}"
        rows.append((queue["queue"], slots, str(queue["waiting"]), str(queue["held"]), note))
    print_table(rows, "   ")
    if not state["jobs"]:
        return
    jobs = [("JOB", "TYPE", "QUEUE", "AGE", "ATTEMPT", "PID"), *map(_row, state["jobs"])]
    print_table(jobs, "   ")
    if state["running"] > len(state["jobs"]):
        sys.stdout.write(f"   and {state['running'] - len(state['jobs'])} more\n")


def _row(job: dict[str, Any]) -> tuple[str, ...]:
    from workerd.tables import age

    return (
        job["id"],
        job["type"] or "-",
        job["queue"],
        (age(job["age"]) or "-") + (" ending" if job["ending"] else ""),
        str(job["attempt"]),
        str(job["pid"] or "-"),
    )
