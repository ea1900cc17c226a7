"""`workerd status`: the instances of this host, and what they run."""

from __future__ import annotations

import argparse
from typing import Any

from workerd import output
from workerd.cli.options import add_instance
from workerd.control import protocol
from workerd.errors import EX_NOPERM, EX_OK, EX_UNAVAILABLE, CommandError, WorkerdError
from workerd.output import print_json, print_line, print_table
from workerd.units import age

STATUS = """\
Show every instance of this host, also those that have stopped or failed:
broker, queues, and the jobs that run. Asks the instances, not the broker."""
STATUS_EPILOG = f"""\
exit status:
  0   shown
  64  usage; --watch without a terminal
  69  nothing is known of the instance that --instance names; --watch without
      the Python package rich
  77  only members of {protocol.GROUP} may ask the instances

examples:
  workerd status
  workerd status --watch            live: also what waits and fails
  workerd status --json | jq '.jobs[]? | select(.age > 600)'
"""


def add_status(parser: argparse.ArgumentParser) -> None:
    """Add the options of `status`."""
    parser.description, parser.epilog = STATUS, STATUS_EPILOG
    add_instance(parser, "all of this host")
    parser.add_argument(
        "--watch", action="store_true", help="show it live; with --json: every second"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.set_defaults(carry_out=_status)


def _status(args: argparse.Namespace) -> int:
    from workerd.control.instances import states

    if args.watch:
        return _watch(args)
    try:
        found = list(states(args.instance))
    except WorkerdError as error:
        raise CommandError(EX_UNAVAILABLE, str(error)) from None
    if args.json:
        for state in found:
            print_json(state)
    elif not found:
        print_line("no instance of workerd runs or has run on this host")
    else:
        for number, state in enumerate(found):
            if number:
                print_line("")
            _show(state)
    unknown = [state for state in found if state["state"] == "unknown"]
    if unknown and len(unknown) == len(found):
        raise CommandError(EX_NOPERM, str(unknown[0]["why"]))
    return EX_OK


def _watch(args: argparse.Namespace) -> int:
    from workerd.cli.watch.terminal import stream, watch

    if not args.json:
        return watch(args.instance)
    for state in stream(args.instance):
        print_json(state)
        output.flush()
    raise AssertionError("a stream never ends")


def _show(state: dict[str, Any]) -> None:
    name = f"{state['instance']}: "
    if "queues" not in state:
        why = f": {state['why']}" if state["why"] else ""
        for number, line in enumerate(f"{state['state']}{why}".splitlines()):
            print_line((" " * len(name) if number else name) + line)
        return
    print_line(name + state["status"])
    rabbitmq = f"RabbitMQ {state['rabbitmq']} at {state['broker']}" if state["broker"] else ""
    facts = [f"workerd {state['release']}", f"pid {state['pid']}", f"up {age(state['uptime'])}"]
    print_line("   " + ", ".join(filter(None, [*facts, rabbitmq])))
    if not state["healthy"] and state["why"] != state["status"]:
        print_line(f"   not consuming: {state['why']}")
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
        print_line(f"   and {state['running'] - len(state['jobs'])} more")


def _row(job: dict[str, Any]) -> tuple[str, ...]:
    return (
        job["id"],
        job["type"] or "-",
        job["queue"],
        (age(job["age"]) or "-") + (" ending" if job["ending"] else ""),
        str(job["attempt"]),
        str(job["pid"] or "-"),
    )
