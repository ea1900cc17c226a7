"""The package on a booted Debian: real systemd, real journal, real RabbitMQ."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.harness.system import Machine
from tests.harness.trixie import CHECKOUT
from tests.harness.waiting import until

# `hold` lasts until the test writes /srv/go; `say` prints.
HANDLERS = """
[worker]
drain_timeout = "10s"

[handlers.hold]
command = ["sh", "-c", "until [ -e /srv/go ]; do sleep 0.05; done"]

[handlers.say]
command = ["sh", "-c", "echo hello from the job"]
"""


@pytest.fixture
def server(machine: Machine, package: Path) -> Machine:
    """A machine with workerd and the handlers above; no instance runs."""
    if not (machine.root / "usr/bin/workerd").exists():
        machine.install(package)
        machine.run("useradd", "--groups", "workerd-submit", "alice")
    machine.configure(HANDLERS)
    return machine


def start(server: Machine, *instances: str) -> None:
    server.run("systemctl", "start", *(f"workerd@{each}" for each in instances))


def starts(server: Machine, jobs: Iterable[str]) -> list[int]:
    """How often each of these jobs was started."""
    return [len(server.find("start", job_id=job)) for job in jobs]


def left(server: Machine) -> int:
    """Stop all instances; returns how many messages are in the queue then."""
    server.run("systemctl", "stop", "workerd@*.service")
    return server.depth("default")


def test_the_whole_life_of_a_members_job_is_in_the_journal(server: Machine) -> None:
    start(server, "1", "2")
    job = server.run("submit", "say", user="alice").stdout.strip()
    server.wait("done", job_id=job)
    server.wait("submitted", job_id=job)
    text = server.sh(f"journalctl --output=json WORKERD_JOB_ID={job}")
    entries = [json.loads(line) for line in text.splitlines()]
    # One of the two has submitted it, perhaps not the one that has run it, nor before it began.
    (submitted,) = (entry for entry in entries if entry["WORKERD_EVENT"] == "submitted")
    assert submitted["WORKERD_UID"] == server.sh("id --user alice")
    entries.remove(submitted)
    assert [entry["WORKERD_EVENT"] for entry in entries] == ["start", "output", "done"]
    assert entries[1]["WORKERD_TEXT"] == "hello from the job"
    (unit,) = {entry["_SYSTEMD_UNIT"] for entry in entries}
    assert unit == f"workerd@{entries[0]['WORKERD_INSTANCE']}.service"


def test_the_journal_explains_what_has_happened_to_a_job(server: Machine) -> None:
    start(server, "1")
    job = server.submit("sleep", "soon", "--attempts", "1")
    server.wait("dead letter", job_id=job)
    explained = server.sh(f"journalctl --catalog WORKERD_JOB_ID={job}")
    assert f"Subject: Job {job} has failed" in explained
    assert f"workerd dead show default {job}" in " ".join(explained.replace("░░", "").split())
    assert "invalid time interval" in server.run("workerd", "dead", "show", "default", job).stdout


def test_others_can_neither_read_the_configuration_nor_submit(server: Machine) -> None:
    refused = server.run("submit", "sleep", "0", user="nobody", check=False)
    assert refused.returncode == 78
    assert "/etc/workerd/workerd.toml: Permission denied" in refused.stderr
    assert "ask an administrator: adduser nobody workerd-submit" in refused.stderr


def test_the_sandbox_is_as_tight_as_was_promised(server: Machine) -> None:
    verdict = server.sh("systemd-analyze security workerd@1 | tail -1")
    assert float(verdict.split(": ")[1].split()[0]) <= 2.0


def test_a_slow_job_across_a_restart_of_the_broker_starts_once(server: Machine) -> None:
    start(server, "1", "2")
    jobs = [server.submit("hold") for _ in range(4)]
    for job in jobs:
        server.wait("start", job_id=job)
    since = server.mark()
    server.run("systemctl", "restart", "rabbitmq-server")
    for instance in "12":
        server.wait("consuming", since, instance=instance)
    server.write("/srv/go", "")
    for job in jobs:
        server.wait("done", job_id=job)
    assert left(server) == 0
    assert starts(server, jobs) == [1, 1, 1, 1]


def test_a_reload_takes_a_good_configuration_and_refuses_a_bad_one(server: Machine) -> None:
    start(server, "1")
    pid = server.show("workerd@1", "MainPID")
    server.configure(HANDLERS + '[handlers.more]\ncommand = ["true"]\n')
    since = server.mark()
    server.run("systemctl", "reload", "workerd@1")
    # systemctl does not wait for the daemon, through which the next job is submitted.
    server.wait("reloaded", since)
    server.wait("done", job_id=server.submit("more"))

    server.configure("[handlers.more]\ncomand = 5\n")
    since = server.mark()
    refused = server.run("systemctl", "reload", "workerd@1", check=False)
    assert refused.returncode != 0
    assert 'did you mean "command"?' in server.sh("journalctl --unit=workerd@1 --lines=20")
    # Who goes past the check is refused by the daemon.
    server.run("systemctl", "kill", "--kill-who=main", "--signal=HUP", "workerd@1")
    server.wait("reload refused", since)
    until(lambda: "reload refused" in server.show("workerd@1", "StatusText"), "it says so")
    server.configure(HANDLERS)
    since = server.mark()
    server.run("systemctl", "reload", "workerd@1")
    server.wait("reloaded", since)
    server.wait("done", job_id=server.submit("say"))
    assert server.show("workerd@1", "MainPID") == pid


def test_a_wrong_configuration_fails_at_once_and_is_not_tried_again(server: Machine) -> None:
    server.configure("[worker]\ndrain = 5\n", instance="2")
    since = server.mark()
    failed = server.run("systemctl", "start", "workerd@2", check=False)
    assert failed.returncode != 0
    assert server.show("workerd@2", "ActiveState") == "failed"
    assert server.show("workerd@2", "ExecMainStatus") == "78"
    assert server.show("workerd@2", "NRestarts") == "0"
    problem = server.wait("bad configuration", since, instance="2")
    assert "/etc/workerd/instances/2.toml: worker.drain" in problem["WORKERD_PROBLEM"]
    # The others are none the worse for it.
    start(server, "1")


def test_a_frozen_daemon_is_restarted_and_loses_nothing(server: Machine) -> None:
    server.drop_in("workerd@1.service", "[Service]\nWatchdogSec=2s\n")
    start(server, "1")
    job = server.submit("hold")
    server.wait("start", job_id=job)
    since = server.mark()
    server.run("systemctl", "kill", "--kill-who=main", "--signal=STOP", "workerd@1")
    server.wait("start", since, job_id=job)
    server.write("/srv/go", "")
    server.wait("done", job_id=job)
    assert server.show("workerd@1", "NRestarts") == "1"
    assert left(server) == 0


def test_a_daemon_that_stood_still_for_a_moment_goes_on(server: Machine) -> None:
    start(server, "1")
    job = server.submit("hold")
    server.wait("start", job_id=job)
    freeze = "systemctl kill --kill-who=main --signal={} workerd@1".format
    server.sh(freeze("STOP"))
    # The local socket would wait for the daemon.
    meanwhile = server.submit("say", "--direct")
    assert not server.find("start", job_id=meanwhile)
    server.sh(freeze("CONT"))
    server.wait("done", job_id=meanwhile)
    server.write("/srv/go", "")
    server.wait("done", job_id=job)
    assert starts(server, [job, meanwhile]) == [1, 1]
    assert server.show("workerd@1", "NRestarts") == "0"


def test_a_killed_daemon_takes_its_jobs_with_it_and_comes_back(server: Machine) -> None:
    start(server, "1")
    job = server.submit("hold")
    server.wait("start", job_id=job)
    since = server.mark()
    server.run("systemctl", "kill", "--kill-who=main", "--signal=KILL", "workerd@1")
    server.wait("start", since, job_id=job)
    assert len(server.run("pgrep", "--full", "sh -c until").stdout.split()) == 1
    server.write("/srv/go", "")
    server.wait("done", job_id=job)


def test_a_job_that_is_killed_has_failed_and_its_neighbour_goes_on(server: Machine) -> None:
    start(server, "1")
    killed = server.submit("sleep", "600", "--attempts", "1")
    neighbour = server.submit("hold")
    for job in (killed, neighbour):
        server.wait("start", job_id=job)
    server.run("pkill", "--signal", "KILL", "--full", "sleep 600")
    failed = server.wait("failed", job_id=killed)
    assert failed["WORKERD_SIGNAL"] == "SIGKILL"
    server.wait("dead letter", job_id=killed)
    server.write("/srv/go", "")
    server.wait("done", job_id=neighbour)
    assert server.show("workerd@1", "NRestarts") == "0"


def test_a_stop_lets_a_running_job_end(server: Machine) -> None:
    start(server, "1")
    job = server.submit("hold")
    server.wait("start", job_id=job)
    since = server.mark()
    server.run("systemctl", "stop", "--no-block", "workerd@1")
    server.wait("draining", since)
    server.write("/srv/go", "")
    server.wait("done", job_id=job)
    server.wait("drained", since)
    until(lambda: server.show("workerd@1", "ActiveState") == "inactive", "stopped")
    assert server.show("workerd@1", "Result") == "success"
    assert left(server) == 0
    # Nothing was there that systemd would have had to kill, or would have told so.
    server.mark()
    assert "SIGKILL" not in server.transcript(since)


def test_a_drain_that_takes_longer_than_the_stop_may_asks_for_its_time(server: Machine) -> None:
    server.configure('[worker]\ndrain_timeout = "6s"\n', instance="1")
    server.drop_in("workerd@1.service", "[Service]\nTimeoutStopSec=2s\n")
    start(server, "1")
    job = server.submit("hold")
    server.wait("start", job_id=job)
    since = server.mark()
    server.run("systemctl", "stop", "workerd@1")
    assert server.show("workerd@1", "Result") == "success"
    server.wait("interrupted", since, job_id=job)
    # It is back in its queue, and the next instance has it.
    server.write("/srv/go", "")
    start(server, "2")
    server.wait("done", job_id=job)


@pytest.mark.parametrize("signal", ["TERM", "INT", "QUIT"])
def test_a_second_signal_cuts_a_stop_short(server: Machine, signal: str) -> None:
    server.configure('[worker]\ndrain_timeout = "1h"\n', instance="1")
    start(server, "1")
    job = server.submit("hold")
    server.wait("start", job_id=job)
    since = server.mark()
    server.run("systemctl", "stop", "--no-block", "workerd@1")
    server.wait("draining", since)
    server.run("systemctl", "kill", "--kill-who=main", f"--signal={signal}", "workerd@1")
    server.wait("interrupted", since, job_id=job)
    until(lambda: server.show("workerd@1", "ActiveState") == "inactive", "stopped")
    assert server.show("workerd@1", "Result") == "success"
    server.write("/srv/go", "")
    start(server, "2")
    server.wait("done", job_id=job)
    assert left(server) == 0


def test_a_stranger_who_ends_the_daemon_costs_no_job_and_it_comes_back(server: Machine) -> None:
    start(server, "1")
    job = server.submit("hold")
    server.wait("start", job_id=job)
    since = server.mark()
    server.run("systemctl", "kill", "--kill-who=main", "--signal=INT", "workerd@1")
    server.wait("draining", since)
    server.write("/srv/go", "")
    server.wait("done", job_id=job)
    server.wait("consuming", since)
    assert starts(server, [job]) == [1]
    assert server.show("workerd@1", "NRestarts") == "1"


def test_a_busy_instance_is_logged_without_a_gap(server: Machine) -> None:
    server.configure(HANDLERS + '[handlers.count]\ncommand = ["seq", "1000"]\n')
    # Far less than it takes by default, which depends on the disk.
    server.write("/etc/systemd/journald.conf.d/test.conf", "[Journal]\nRateLimitBurst=10\n")
    server.run("systemctl", "restart", "systemd-journald")
    start(server, "1")
    job = server.submit("count")
    server.wait("done", job_id=job)
    assert len(server.find("output", job_id=job)) == 1000


def test_an_instance_that_stops_leaves_the_others_what_is_theirs(server: Machine) -> None:
    start(server, "1", "2")
    server.run("systemctl", "stop", "workerd@1")
    assert server.sh("ls /run/workerd/2").split() == ["control.sock", "lock"]
    again = server.run("workerd", "run", "--instance", "2", user="workerd", check=False)
    assert again.returncode == 78
    assert "already running" in again.stderr


def test_the_target_stops_and_starts_all_of_them(server: Machine) -> None:
    server.run("systemctl", "enable", "--now", "workerd@1")
    start(server, "2")
    server.run("systemctl", "stop", "workerd.target")

    def states() -> list[str]:
        return [server.show(f"workerd@{each}", "ActiveState") for each in "12"]

    until(lambda: states() == ["inactive", "inactive"], "both have stopped")
    server.run("systemctl", "start", "workerd.target")
    until(lambda: states() == ["active", "inactive"], "the one that is enabled runs")


def test_a_journal_that_is_frozen_and_restarted_holds_up_nothing(server: Machine) -> None:
    start(server, "1")
    frozen = "systemctl kill --kill-who=main --signal={} systemd-journald".format
    server.sh(frozen("STOP"))
    while_frozen = server.submit("say")
    until(lambda: server.depth("default") == 0, "the job was taken")
    server.sh(frozen("CONT"))
    server.wait("done", job_id=while_frozen)
    server.run("systemctl", "restart", "systemd-journald")
    server.wait("done", job_id=server.submit("say"))
    assert server.show("workerd@1", "NRestarts") == "0"


def test_a_journal_that_is_away_holds_up_nothing(server: Machine) -> None:
    start(server, "1")
    journal = "systemd-journald.service systemd-journald.socket systemd-journald-dev-log.socket"
    server.sh(f"systemctl stop {journal} systemd-journald-audit.socket 2>/dev/null")
    assert not (server.root / "run/systemd/journal/socket").exists()
    server.submit("say")
    until(lambda: server.depth("default") == 0, "the job was taken")
    status = "consuming default: 0/4 running, 1 done, 0 failed; localhost"
    until(lambda: server.show("workerd@1", "StatusText") == status, "it is done")
    server.sh(f"systemctl start {journal}")
    server.wait("done", job_id=server.submit("say"))
    assert server.show("workerd@1", "NRestarts") == "0"


# A sender may have so much under way and no more; it takes several to fill the queue.
FILL = """
import contextlib, itertools, socket
for sender in itertools.count():
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.setblocking(False)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while notify.sendto(b"X_NOTHING=1", "/run/systemd/notify"):
            sent += 1
    if not sent:
        break
"""


def test_a_systemd_that_reads_no_notification_holds_up_nothing(server: Machine) -> None:
    # So that what is lost comes again within 10 s.
    server.drop_in("workerd@1.service", "[Service]\nWatchdogSec=30s\n")
    start(server, "1")
    with server.frozen_init():
        server.run("python3", "-c", FILL)
        # Longer than the status line takes to be renewed.
        for _ in range(2):
            server.wait("done", job_id=server.submit("sleep", "1.5"))
    status = "consuming default: 0/4 running, 2 done, 0 failed; localhost"
    until(lambda: server.show("workerd@1", "StatusText") == status, "it is told again")
    assert server.show("workerd@1", "NRestarts") == "0"


def test_a_service_that_is_not_to_notify_works_as_well(server: Machine) -> None:
    without = "[Service]\nType=exec\nNotifyAccess=none\nWatchdogSec=0\n"
    server.drop_in("workerd@1.service", without)
    start(server, "1")
    server.wait("done", job_id=server.submit("say"))
    pid = server.show("workerd@1", "MainPID")
    assert "NOTIFY_SOCKET" not in server.sh(f"tr '\\0' '\\n' < /proc/{pid}/environ")
    server.run("systemctl", "stop", "workerd@1")
    assert server.show("workerd@1", "Result") == "success"


LEAST = """
[broker]
urls = ["amqp://worker@localhost/jobs"]
password_file = "/etc/workerd/password"
"""


def test_users_of_the_broker_need_no_more_than_the_documentation_gives_them(
    server: Machine,
) -> None:
    page = (CHECKOUT / "docs/server.md").read_text()
    (commands,) = re.findall(r"```sh\n(rabbitmqctl add_vhost.*?)```", page, re.DOTALL)
    server.sh(commands)
    assert server.sh("stat --format '%U:%G %a' /etc/workerd/password") == "root:workerd 640"
    server.configure(HANDLERS + LEAST)
    # Root could read it, but it is not root who will.
    server.run("chmod", "600", "/etc/workerd/password")
    checked = server.run("workerd", "check", check=False)
    assert checked.returncode == 78
    assert "/etc/workerd/password: Permission denied; workerd has to read it" in checked.stderr
    server.run("chmod", "640", "/etc/workerd/password")
    server.run("workerd", "check")
    start(server, "1")
    by_url = ("submit", "--url", "@/etc/workerd/submit-url", "say")
    server.wait("done", job_id=server.run(*by_url, user="alice").stdout.strip())
    # Through the instance nobody needs a password.
    server.wait("done", job_id=server.run("submit", "say", user="alice").stdout.strip())
    # The worker's is not for those who submit.
    server.run("systemctl", "stop", "workerd@1")
    refused = server.run("submit", "say", user="alice", check=False)
    assert refused.returncode == 77
    assert "/etc/workerd/password: Permission denied" in refused.stderr


SANDBOXED = """
[handlers.app]
command = ["/srv/app/venv/bin/python", "app.py"]
working_directory = "/srv/app"

[handlers.function]
python = "app:function"
interpreter = "/srv/app/venv/bin/python"
working_directory = "/srv/app"

[handlers.stray]
command = ["touch", "/srv/app/here"]
"""
# What programs do: write where they may, talk to a server by its name, compile into memory (Node,
# Java), share work among processes, copy with owner and time, be nice, give up rights (ping).
APP = """
import http.server, mmap, multiprocessing, os, pathlib, subprocess, sys, threading, urllib.request

def function(job):
    assert sys.prefix == "/srv/app/venv"
    pathlib.Path("/srv/photos/three").write_bytes(job.body)

if __name__ == "__main__":
    assert sys.prefix == "/srv/app/venv"
    pathlib.Path("/srv/photos/one").write_text("1")

    server = http.server.HTTPServer(("", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    urllib.request.urlopen(f"http://debian:{server.server_port}/app.py")

    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    with multiprocessing.Pool(2) as pool:
        assert pool.map(abs, [-1, 1]) == [1, 1]
    subprocess.run('''
        cp -p /srv/photos/one /tmp/two
        nice -n 5 tar -C /tmp -cf /tmp/t two
        tar -C /srv/photos -xpf /tmp/t
        setpriv --inh-caps=-all true
    ''', shell=True, check=True)
    os.sched_setaffinity(0, os.sched_getaffinity(0))
    os.setuid(os.getuid())
"""


def test_ordinary_programs_work_in_the_sandbox(server: Machine) -> None:
    server.sh(
        "mkdir -p /srv/app /srv/photos; chown workerd: /srv/photos;"
        "[ -d /srv/app/venv ] || python3 -m venv --without-pip /srv/app/venv"
    )
    server.write("/srv/app/app.py", APP)
    server.configure(SANDBOXED)
    server.drop_in("workerd@1.service", "[Service]\nReadWritePaths=/srv/photos\n")
    start(server, "1")
    jobs = [server.submit(handler, "3") for handler in ("app", "function")]
    stray = server.submit("stray")
    for job in jobs:
        server.wait("done", job_id=job)
    assert server.sh("stat --format '%U %a' /srv/photos/two") == "workerd 640"
    assert server.sh("cat /srv/photos/three") == "3"
    failed = server.wait("failed", job_id=stray)
    assert "Read-only file system" in failed["WORKERD_ERROR"]
