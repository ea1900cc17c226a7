"""docs/metrics.md and docs/alerts.yml speak of the metrics that there are, and alerts come."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.harness.processes import MissingTool
from tests.harness.trixie import CHECKOUT
from tests.unit.core.test_counters import state
from workerd.cli import prometheus

ALERTS = CHECKOUT / "docs/alerts.yml"
METRICS = CHECKOUT / "docs/metrics.md"


def promtool(*arguments: str | Path, stdin: bytes = b"") -> tuple[int, str]:
    """The exit status of Prometheus' own checker, and what it says."""
    found = shutil.which("promtool") or shutil.which(CHECKOUT / ".cache/promtool")
    if found is None:
        raise MissingTool("promtool is not there: tests/install test")
    done = subprocess.run([found, *arguments], input=stdin, capture_output=True)
    return done.returncode, (done.stdout + done.stderr).decode()


def names() -> set[str]:
    """Every metric that there is, by its name in the text."""
    text = prometheus.text(lambda: [state(), everything()]).decode()
    return set(re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE))


def everything() -> dict[str, Any]:
    """An answer that leaves nothing out."""
    full = state("2")
    full["queues"][0]["dead"] = 1
    full["process"]["children"] = 2
    return full


def test_every_metric_is_explained() -> None:
    rows = re.findall(r"^\| `(workerd_\w+)` \|", METRICS.read_text(), re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == names()


@pytest.mark.parametrize("page", [ALERTS, METRICS], ids=lambda page: page.name)
def test_no_query_asks_for_a_metric_that_is_not_there(page: Path) -> None:
    used = {
        re.sub(r"_(bucket|sum|count)$", "", name)
        for name in re.findall(r"\bworkerd_\w+", page.read_text())
    }
    assert used
    assert used <= names()


def test_prometheus_finds_no_fault_in_the_text() -> None:
    text = prometheus.text(lambda: [state(), everything()])
    assert promtool("check", "metrics", stdin=text) == (0, "")


def test_prometheus_takes_the_rules() -> None:
    status, said = promtool("check", "rules", ALERTS)
    assert status == 0, said
    rules = ALERTS.read_text().count("- alert: ")
    assert f"{rules} rules found" in said


WORKER = '{job="workerd", instance="host1:15693", worker="1"}'
QUEUE = WORKER.replace("}", ', queue="q"}')
HANDLER = QUEUE.replace("}", ', handler="h", outcome="OUTCOME"}')
RUNS = WORKER.replace("}", ', handler="h"}')
UP = 'up{job="workerd", instance="host1:15693"}'

#: A host on which all is well, a value each minute for a day and a half.
WELL = {
    UP: "1x2160",
    f"workerd_up{WORKER}": "1x2160",
    f"workerd_start_time_seconds{WORKER}": "1700000000x2160",
    f"workerd_healthy{WORKER}": "1x2160",
    f"workerd_draining{WORKER}": "0x2160",
    f"workerd_queue_paused{QUEUE}": "0x2160",
    f"workerd_handler_paused{RUNS}": "0x2160",
    f"workerd_handler_degraded{RUNS}": "0x2160",
    f"workerd_jobs_total{HANDLER}".replace("OUTCOME", "done"): "0+10x2160",
    f"workerd_jobs_total{HANDLER}".replace("OUTCOME", "dead"): "0x2160",
    f"workerd_queue_dead_messages{QUEUE}": "0x2160",
    f"workerd_queue_ready_messages{QUEUE}": "5x2160",
    f"workerd_job_wait_seconds_bucket{QUEUE}".replace("}", ', le="60.0"}'): "0+10x2160",
    f"workerd_job_wait_seconds_bucket{QUEUE}".replace("}", ', le="900.0"}'): "0+10x2160",
    f"workerd_job_wait_seconds_bucket{QUEUE}".replace("}", ', le="+Inf"}'): "0+10x2160",
    f"workerd_lost_connections_total{WORKER}": "0x2160",
    f"workerd_publishing_blocked{WORKER}": "0x2160",
    f"workerd_log_records_dropped_total{WORKER}": "0x2160",
}

#: What goes wrong, as a change of these series; each must bring this alert.
TROUBLE: dict[str, dict[str, str | None]] = {
    "WorkerdMetricsMissing": {UP: "0x2160", "workerd_": None},
    "WorkerdNoWorker": {"workerd_": None},
    "WorkerdDown": {"workerd_up": "0x2160"},
    "WorkerdRestarts": {"workerd_start_time_seconds": "1700000000+60x2160"},
    "WorkerdNotConsuming": {"workerd_healthy": "0x2160"},
    "WorkerdQueuePaused": {"workerd_queue_paused": "1x2160"},
    "WorkerdHandlerPaused": {"workerd_handler_": "1x2160"},
    "WorkerdHandlerDegraded": {"workerd_handler_degraded": "1x2160"},
    "WorkerdDeadLetters": {'outcome="dead"': "0+1x2160"},
    "WorkerdDeadLettersWait": {"workerd_queue_dead_messages": "1x2160"},
    "WorkerdJobsWaitLong": {'le="60.0"': "0x2160"},
    "WorkerdStandstill": {'outcome="done"': "7x2160"},
    "WorkerdConnectionsLost": {"workerd_lost_connections": "0+1x2160"},
    "WorkerdPublishingBlocked": {"workerd_publishing_blocked": "1x2160"},
    "WorkerdLogDropped": {"workerd_log_records": "0+1x2160"},
}
#: The only worker of a host, and it is down.
TOGETHER = {"WorkerdDown": {"WorkerdNoWorker"}}


def fire(changes: dict[str, str | None], folder: Path) -> set[str]:
    """The alerts that come within a day and a half when these series are others."""
    series = dict(WELL)
    for part, values in changes.items():
        for name in [name for name in series if part in name]:
            if values is None:
                del series[name]
            else:
                series[name] = values
    alerts = re.findall(r"- alert: (\w+)", ALERTS.read_text())
    # There is no way to ask which alerts fire, only whether one expectation is met.
    file = folder / "test.json"
    expectations = [{"eval_time": "30h", "alertname": name, "exp_alerts": []} for name in alerts]
    file.write_text(
        json.dumps(
            {
                "rule_files": [str(ALERTS)],
                "evaluation_interval": "1m",
                "tests": [
                    {
                        "interval": "1m",
                        "input_series": [
                            {"series": name, "values": values} for name, values in series.items()
                        ],
                        "alert_rule_test": expectations,
                    }
                ],
            }
        )
    )
    status, said = promtool("test", "rules", file)
    found = set(re.findall(r"alertname: ?(\w+)", said))
    assert bool(status) == bool(found), said
    return found


def test_where_all_is_well_there_is_no_alert(tmp_path: Path) -> None:
    assert fire({}, tmp_path) == set()


@pytest.mark.parametrize("alert", TROUBLE)
def test_trouble_brings_its_alert_and_no_other(alert: str, tmp_path: Path) -> None:
    assert fire(TROUBLE[alert], tmp_path) == {alert, *TOGETHER.get(alert, ())}


def test_each_alert_has_its_trouble() -> None:
    assert set(re.findall(r"- alert: (\w+)", ALERTS.read_text())) == set(TROUBLE)
