"""What came out: for a terminal as it comes, as JSON, and as the table of docs/benchmarks.md."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.rig import Rig
from benchmarks.workloads import Aim, Metric, Sample, Workload
from tests.harness.trixie import CHECKOUT

FOLDER = CHECKOUT / ".cache" / "benchmarks"
PROFILE = FOLDER / "profile.txt"


@dataclass
class Outcome:
    """What one workload gave."""

    workload: Workload
    load: float
    #: The setting that was used, and the samples of all rounds; in a round that failed, None.
    settings: dict[str, str] = field(default_factory=dict)
    samples: dict[str, list[Sample | None]] = field(default_factory=dict)
    #: The figures that the other settings reached when the best one was looked for.
    trials: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    #: Who cannot take part on this machine, and why.
    left_out: dict[str, str] = field(default_factory=dict)

    def values(self, name: str, metric: str) -> list[float]:
        return [each[metric] for each in self.samples.get(name, ()) if each is not None]


@dataclass(frozen=True)
class Verdict:
    """An aim, and what was reached: the median of the rounds' ratios, and their range."""

    aim: Aim
    reached: float
    lowest: float
    highest: float
    met: bool


def verdicts(outcome: Outcome) -> list[Verdict]:
    """Ratios are taken within a round, so that what slows the machine down slows down both."""
    found = []
    for aim in outcome.workload.aims:
        metric = _metric(outcome.workload, aim.metric)
        mine = outcome.samples.get(aim.who, [])
        theirs = outcome.samples.get(aim.against, []) if aim.against else [{metric.name: 1.0}] * 99
        ratios = [
            one[metric.name] / other[metric.name]
            for one, other in zip(mine, theirs, strict=False)
            if one is not None and other is not None
        ]
        if ratios:
            middle = statistics.median(ratios)
            met = middle >= aim.factor if metric.more_is_better else middle <= aim.factor
            found.append(Verdict(aim, middle, min(ratios), max(ratios), met))
    return found


# For a terminal


def show(outcome: Outcome) -> str:
    """A workload's contenders, then workerd's ratios beside its aims."""
    workload = outcome.workload
    lines = []
    for name, setting in outcome.settings.items():
        cells = [
            f"{spread(metric, outcome.values(name, metric.name)):<36}"
            for metric in workload.metrics
            if outcome.values(name, metric.name)
        ] or [outcome.left_out.get(name, "failed")]
        lines.append(f"  {name:<23}{' '.join(cells)}   {setting}".rstrip())
    lines += [f"    {sentence(workload, verdict)}" for verdict in verdicts(outcome)]
    lines += [f"  FAILED: {failure}" for failure in outcome.failures]
    return "\n".join(lines)


def spread(metric: Metric, values: Sequence[float]) -> str:
    """`12,345 (11,000 to 13,000) jobs/s`: the median and the range."""
    shown = [f"{value:,.{metric.digits}f}" for value in (min(values), max(values))]
    middle = f"{statistics.median(values):,.{metric.digits}f}"
    between = f" ({shown[0]} to {shown[1]})" if len(values) > 1 else ""
    return f"{middle}{between} {metric.unit}"


def sentence(workload: Workload, verdict: Verdict) -> str:
    aim = verdict.aim
    metric = _metric(workload, aim.metric)
    bound = "at least" if metric.more_is_better else "at most"
    judgement = "met" if verdict.met else "MISSED"
    if aim.against is None:
        reached = f"{aim.who}: {metric.name} {verdict.reached:.2f}"
        return f"{reached}; aim {bound} {aim.factor:g}: {judgement}"
    better = (verdict.reached > 1) == metric.more_is_better
    return (
        f"{aim.who} : {aim.against}, {metric.name}: {verdict.reached:.2f} "
        f"({verdict.lowest:.2f} to {verdict.highest:.2f}), {aim.who if better else aim.against} "
        f"is ahead; aim {bound} {aim.factor:g}: {judgement}"
    )


# As JSON


def results_file(queue_type: str, rabbitmq: str, quick: bool) -> Path:
    """Where the newest results of each workload are, of runs with these options."""
    return FOLDER / f"{queue_type}-{rabbitmq}{'-quick' if quick else ''}.json"


def save(file: Path, outcome: Outcome, facts: dict[str, Any]) -> None:
    """Keep the newest results of each workload."""
    results = json.loads(file.read_text()) if file.exists() else {}
    results[outcome.workload.name] = {
        "facts": facts,
        "load": outcome.load,
        "settings": outcome.settings,
        "samples": outcome.samples,
        "trials": outcome.trials,
        "failures": outcome.failures,
        "left_out": outcome.left_out,
    }
    new = file.with_suffix(".new")
    new.write_text(json.dumps(results, indent=1))
    new.replace(file)


def load(file: Path, workloads: Iterable[Workload]) -> list[tuple[Outcome, dict[str, Any]]]:
    """The newest results, and the facts about the machine of each."""
    results = json.loads(file.read_text()) if file.exists() else {}
    loaded = []
    for workload in workloads:
        if saved := results.get(workload.name):
            facts = saved.pop("facts")
            loaded.append((Outcome(workload, **saved), facts))
    return loaded


# As a table


def markdown(results: Sequence[tuple[Outcome, dict[str, Any]]]) -> str:
    """The table of docs/benchmarks.md."""
    lines = []
    told: list[dict[str, Any]] = []
    for _outcome, facts in results:
        stable = {key: value for key, value in facts.items() if key not in ("when", "fsync")}
        if stable not in told:
            told.append(stable)
            lines += [f"{describe(facts)}.", ""]
    for outcome, _facts in results:
        workload = outcome.workload
        rounds = max((len(samples) for samples in outcome.samples.values()), default=0)
        lines += [f"**{workload.name}**: {workload.title} (rounds: {rounds}).", ""]
        header = [f"{metric.name}, {metric.unit}" for metric in workload.metrics]
        lines += [f"| | {' | '.join(header)} | setting |", f"|---|{'---:|' * len(header)}---|"]
        for name, setting in outcome.settings.items():
            cells = []
            for metric in workload.metrics:
                values = outcome.values(name, metric.name)
                shown = spread(metric, values) if values else "–"
                cells.append(shown.removesuffix(f" {metric.unit}"))
            lines.append(f"| {name} | {' | '.join(cells)} | {setting} |")
        lines.append("")
        lines += [f"- {sentence(workload, verdict)}" for verdict in verdicts(outcome)]
        lines += [f"- failed: {failure.splitlines()[0]}" for failure in outcome.failures]
        lines += [f"- {name} is left out: {why}" for name, why in outcome.left_out.items()]
        lines.append("")
    return "\n".join(lines)


# The machine


def facts(rig: Rig) -> dict[str, Any]:
    """Machine, versions and settings, for whoever compares."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    packages = ("workerd", "pika", "celery", "kombu", "dramatiq")
    return {
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "machine": f"{os.cpu_count()} × {model}, {memory / 1e9:.0f} GB, Linux {platform.release()}",
        "fsync": f"{_fsync(rig.folder) * 1000:.2f} ms",
        "rabbitmq": rig.broker.eval('io:format("~s", [rabbit_misc:version()])'),
        "queue": rig.queue_type,
        "quick": rig.quick,
        "commit": _printed("git", "describe", "--always", "--dirty"),
        "versions": {
            "Python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
            "amqp-tools": _printed("dpkg-query", "-W", "-f", "${Version}", "amqp-tools"),
        },
    }


def describe(facts: dict[str, Any]) -> str:
    """The facts in one paragraph."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    said = (
        f"{facts['machine']}; fdatasync {facts['fsync']}; RabbitMQ {facts['rabbitmq']}, "
        f"{facts['queue']} queues; {versions}; commit {facts['commit']}; {facts['when']}"
    )
    if facts["quick"]:
        said += "; a quick run with a fifth of the jobs"
    return said


def _fsync(folder: Path) -> float:
    """The median of what the disk takes to sync 4 KiB: confirms and quorum queues wait for it."""
    seconds = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(100):
            began = time.monotonic()
            os.write(file.fileno(), b"x" * 4096)
            os.fdatasync(file.fileno())
            seconds.append(time.monotonic() - began)
    return statistics.median(seconds)


def _printed(*command: str) -> str:
    """What a program prints; "unknown" when it cannot."""
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, cwd=CHECKOUT, timeout=10, check=False
        )
    except FileNotFoundError:
        return "unknown"
    return result.stdout.strip() if result.returncode == 0 else "unknown"


def _metric(workload: Workload, name: str) -> Metric:
    return next(metric for metric in workload.metrics if metric.name == name)


def top_functions(profile: Path, count: int = 20) -> str:
    """Where the samples of a profile were: in a function itself, not in what it calls."""
    itself: dict[str, int] = {}
    for line in profile.read_text().splitlines():
        stack, _, samples = line.rpartition(" ")
        function = stack.rpartition(";")[2]
        itself[function] = itself.get(function, 0) + int(samples)
    total = sum(itself.values())
    ranked = sorted(itself.items(), key=lambda pair: pair[1], reverse=True)[:count]
    return "\n".join(f"    {samples / total:6.1%}  {function}" for function, samples in ranked)
