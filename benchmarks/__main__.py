"""`python -m benchmarks [WORKLOAD…]`: play the workloads, and say who was how fast."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from benchmarks import report
from benchmarks.rig import Rig
from benchmarks.workloads import WORKLOADS, Choice, Contender, Sample, Workload
from tests.harness.processes import MissingTool

TRIALS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    chosen = [each for each in WORKLOADS if each.name in args.workloads or not args.workloads]
    results = report.results_file(args.type, args.rabbitmq, args.quick)
    if args.table:
        print(report.markdown(report.load(results, chosen)))
        return 0
    began = time.monotonic()
    failed = False
    # What was started must end with us, the others' children as well.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    report.FOLDER.mkdir(parents=True, exist_ok=True)
    try:
        rig = Rig(args.type, args.rabbitmq, quick=args.quick)
    except MissingTool as missing:
        sys.exit(f"benchmarks: {missing}")
    with rig:
        facts = report.facts(rig)
        say(report.describe(facts))
        for workload in chosen:
            outcome = play(rig, workload, args.rounds, profile=args.profile)
            say(report.show(outcome))
            if not args.profile:  # which costs workerd speed
                report.save(results, outcome, facts)
            failed = failed or bool(outcome.failures)
    if args.profile and report.PROFILE.exists():
        say(f"{report.PROFILE}:\n{report.top_functions(report.PROFILE)}")
    say(f"{time.monotonic() - began:.0f} s in all; {results}")
    return 1 if failed else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="workerd beside Celery, Dramatiq, pika and amqp-consume.",
        epilog="workloads: "
        + "; ".join(f"{workload.name}: {workload.title}" for workload in WORKLOADS),
    )
    names = [workload.name for workload in WORKLOADS]
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help="default: all of them")
    parser.add_argument("--rounds", type=int, help="default: 5, or 2 with --quick")
    parser.add_argument("--quick", action="store_true", help="a fifth of the jobs")
    parser.add_argument("--type", choices=["quorum", "classic"], default="quorum")
    parser.add_argument("--rabbitmq", choices=["3.10", "4.0"], default="3.10")
    parser.add_argument(
        "--profile", action="store_true", help="say where workerd spends its time (py-spy)"
    )
    parser.add_argument(
        "--table", action="store_true", help="print the newest results as Markdown and do nothing"
    )
    args = parser.parse_args(arguments)
    for name in args.workloads:
        if name not in names:
            parser.error(f"no workload is named {name!r}; there are {', '.join(names)}")
    if args.rounds is None:
        args.rounds = 2 if args.quick else 5
    if args.rounds < 1:
        parser.error("--rounds: at least 1")
    return args


def play(rig: Rig, workload: Workload, rounds: int, *, profile: bool) -> report.Outcome:
    """All rounds of a workload; a turn that fails is told, and the others go on."""
    rig.profile = None
    outcome = report.Outcome(workload, os.getloadavg()[0])
    say(f"{workload.name}: {workload.title}   (load {outcome.load:.2f})")
    contenders = [
        best(rig, workload, each, outcome) if isinstance(each, Choice) else each
        for each in workload.contenders
    ]
    for contender in contenders:
        outcome.settings[contender.name] = contender.setting
    rig.profile = report.PROFILE if profile else None
    for _ in range(min(rounds, workload.rounds_at_most)):
        for contender in contenders:
            sample = turn(rig, contender, outcome)
            outcome.samples.setdefault(contender.name, []).append(sample)
    return outcome


def best(rig: Rig, workload: Workload, choice: Choice, outcome: report.Outcome) -> Contender:
    """The candidate with the best figure in some quick turns before the rounds begin."""
    metric = workload.metrics[0]
    trials: dict[str, list[float]] = {each.setting: [] for each in choice.candidates}
    quick, rig.quick = rig.quick, True
    for _ in range(TRIALS):
        for candidate in choice.candidates:
            sample = turn(rig, candidate, outcome)
            if sample is not None:
                trials[candidate.setting].append(sample[metric.name])
    rig.quick = quick
    for setting, values in trials.items():
        shown = report.spread(metric, values) if values else "failed"
        print(f"    {choice.name}, {setting}: {shown}", flush=True)
    outcome.trials[choice.name] = trials
    sign = 1 if metric.more_is_better else -1
    return max(
        choice.candidates,
        key=lambda each: max((sign * value for value in trials[each.setting]), default=-1e9),
    )


def turn(rig: Rig, contender: Contender, outcome: report.Outcome) -> Sample | None:
    """One turn of one contender; None when it failed."""
    try:
        rig.begin_turn()
        return contender.play(rig)
    except MissingTool as missing:
        outcome.left_out[contender.name] = str(missing)
        return None
    except (AssertionError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        outcome.failures.append(f"{contender.name} ({contender.setting}): {error}")
        return None
    finally:
        rig.end_turn()


def say(text: str) -> None:
    print(f"\n{text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
