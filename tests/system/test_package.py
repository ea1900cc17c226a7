"""The life of the package on a booted Debian: installed, upgraded, removed, purged."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.harness import system
from tests.harness.processes import need
from tests.harness.system import Machine
from tests.harness.trixie import CHECKOUT
from tests.harness.waiting import SCALE, until

HOLD = """
[worker]
ready_wait = "1s"

[handlers.hold]
command = ["sh", "-c", "until [ -e /srv/go ]; do sleep 0.05; done"]
"""
SCRAPE = ("--silent", "--show-error", "--fail", "http://127.0.0.1:15693/metrics")
# All files, but for those that are no package's, and those that dpkg and others keep.
OF_OTHERS = "proc sys dev run tmp root var/cache var/log var/lib/dpkg var/lib/rabbitmq"
FIND = (
    f"cd / && find . -regextype egrep -regex './({'|'.join(OF_OTHERS.split())})' -prune -o -print"
)


@pytest.fixture
def bare(machine: Machine) -> Machine:
    """A machine that has never heard of workerd."""
    machine.sh("dpkg --purge workerd 2>/dev/null")
    return machine


@pytest.fixture
def previous(package: Path, tmp_path: Path) -> Path:
    """The package as it was before this version."""
    return rebuilt(package, tmp_path, "0.1.0~previous")


def rebuilt(package: Path, folder: Path, version: str) -> Path:
    """The same package under another version."""
    tree, result = folder / version, folder / f"workerd_{version}_all.deb"
    subprocess.run(["dpkg-deb", "--raw-extract", package, tree], check=True)
    control = tree / "DEBIAN/control"
    control.write_text(re.sub(r"(?m)^Version: .*", f"Version: {version}", control.read_text()))
    subprocess.run(
        ["dpkg-deb", "--build", "--root-owner-group", tree, result],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return result


@pytest.fixture
def root(machine: Machine, tmp_path: Path) -> Path:
    """The image of the machine as a folder, in which nothing runs."""
    folder = tmp_path / "root"
    folder.mkdir()
    subprocess.run(["tar", "-xf", system.image(machine.release), "-C", folder], check=True)
    return folder


def apart(*command: str | Path) -> str:
    """What a command says that is to succeed without a network and without mounts that stay."""
    done = subprocess.run(
        ["unshare", "--mount", "--net", *command],
        env=system.ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def files(machine: Machine) -> set[str]:
    return set(machine.sh(FIND).split("\n"))


def main_pids(machine: Machine) -> list[str]:
    return [machine.show(f"workerd@{each}", "MainPID") for each in "12"]


def test_what_the_readme_says_about_a_server_is_so(bare: Machine, package: Path) -> None:
    bare.copy(package)
    bare.run("useradd", "alice")
    section = (CHECKOUT / "README.md").read_text().partition("\n## On a server\n")[2]
    section = section.partition("\n## ")[0]
    blocks = re.findall(r"```console\n(.*?)```", section, re.DOTALL)
    shown_id = re.search(r"\$ submit sleep 1\n(\S+)\n", section)
    assert shown_id
    job = ""
    began = time.monotonic()
    for prompt, command in re.findall(r"^([#$]) (.*)", "".join(blocks), re.MULTILINE):
        line = command.replace(shown_id[1], job)
        if prompt == "$":
            said = bare.run("sh", "-ec", line, user="alice").stdout
        else:
            said = bare.sh(f"cd /root; {line}")
        if command == "submit sleep 1":
            job = said.strip()
            bare.wait("done", job_id=job)
            assert time.monotonic() - began < 10 * SCALE
    assert "start" in said
    assert "done" in said


def test_the_test_that_the_package_brings_succeeds(bare: Machine, package: Path) -> None:
    bare.install(package)
    bare.copy(CHECKOUT / "packaging/deb/tests/first-job")
    bare.run("/root/first-job")


def test_an_installation_starts_nothing(bare: Machine, package: Path) -> None:
    bare.install(package)
    assert not bare.sh("systemctl list-units --no-legend 'workerd@*'")
    assert bare.run("workerd", "check", "--connect").stdout == "configuration is fine\n"
    assert bare.sh("stat --format '%U:%G %a' /etc/workerd/workerd.toml") == (
        "root:workerd-submit 640"
    )


def test_an_upgrade_under_load_loses_no_job_and_reruns_none(
    bare: Machine, package: Path, previous: Path
) -> None:
    bare.install(previous)
    bare.configure(HOLD)
    bare.run("systemctl", "start", "workerd@1", "workerd@2")
    held = bare.submit("hold")
    bare.wait("start", job_id=held)
    jobs = bare.submit("sleep", "--lines", stdin="0.2\n" * 50).split()
    bare.wait("done", job_id=jobs[5])
    before = main_pids(bare)
    since = bare.mark()
    began = time.monotonic()
    said = bare.install(package)
    # It does not wait for the job that is held.
    assert time.monotonic() - began < 10 * SCALE
    assert "Restarting workerd@1.service in the background" in said
    bare.wait("draining", since)
    assert not bare.find("done", job_id=held)
    bare.write("/srv/go", "")
    for job in [held, *jobs]:
        bare.wait("done", job_id=job)
    assert [len(bare.find("start", job_id=job)) for job in [held, *jobs]] == [1] * 51
    for instance in "12":
        bare.wait("starting", since, instance=instance)
    until(lambda: "0" not in main_pids(bare), "both run")
    assert not set(before) & set(main_pids(bare))
    assert not bare.find("bug")
    assert bare.depth("default.dead") == 0


def test_an_upgrade_leaves_alone_what_policy_or_the_administrator_forbids(
    bare: Machine, package: Path, previous: Path
) -> None:
    bare.install(previous)
    bare.run("systemctl", "enable", "workerd@2")
    bare.run("systemctl", "start", "workerd@1")
    bare.write("/usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n", mode=0o755)
    before = main_pids(bare)
    assert before[1] == "0"
    bare.install(package)
    assert bare.show("workerd@1", "ActiveState") == "active"
    assert main_pids(bare) == before


def test_a_removal_stops_first_and_a_new_installation_goes_on(bare: Machine, package: Path) -> None:
    bare.install(package)
    bare.configure(HOLD)
    bare.run("systemctl", "enable", "--now", "workerd@1")
    job = bare.submit("sleep", "0.5")
    bare.wait("start", job_id=job)
    bare.run("dpkg", "--remove", "workerd")
    # The job had its time, and the daemon its files to the end.
    bare.wait("done", job_id=job)
    assert not bare.find("bug")
    assert bare.show("workerd@1", "ActiveState") == "inactive"
    assert (bare.root / "etc/workerd/workerd.toml").exists()
    bare.install(package)
    until(lambda: bare.show("workerd@1", "ActiveState") == "active", "it runs again")


def test_a_purge_leaves_only_what_the_administrator_wrote(
    bare: Machine, package: Path, previous: Path
) -> None:
    before = files(bare)
    bare.install(previous)
    bare.install(package)
    bare.run("systemctl", "enable", "--now", "workerd@1", "workerd-metrics.socket")
    bare.wait("done", job_id=bare.submit("sleep", "0"))
    assert "workerd_up" in bare.run("curl", *SCRAPE).stdout
    bare.configure("[log]\n", instance="1")
    bare.drop_in("workerd@1.service", "[Service]\nMemoryMax=1G\n")
    job = bare.submit("sleep", "0.5")
    bare.wait("start", job_id=job)
    bare.run("dpkg", "--purge", "workerd")
    bare.wait("done", job_id=job)
    assert not bare.find("bug")
    assert files(bare) - before == {
        "./etc/systemd/system/workerd@1.service.d",
        "./etc/systemd/system/workerd@1.service.d/test.conf",
        "./etc/workerd",
        "./etc/workerd/instances",
        "./etc/workerd/instances/1.toml",
    }
    assert not bare.sh("find /run -name '*workerd*'")
    assert not bare.sh("pgrep --exact workerd", check=False)


def test_without_systemd_it_installs_and_goes_as_well(root: Path, package: Path) -> None:
    (root / "root" / package.name).write_bytes(package.read_bytes())
    script = f"""
        mount -t proc proc /proc
        {FIND} > /tmp/before
        dpkg --install /root/{package.name}
        workerd check
        dpkg --remove workerd
        dpkg --purge workerd
        {FIND} > /tmp/after
        diff /tmp/before /tmp/after
    """
    said = apart("--pid", "--fork", "chroot", root, "sh", "-euc", script)
    assert "configuration is fine" in said


def test_piuparts_finds_nothing(machine: Machine, root: Path, package: Path) -> None:
    """Installed, purged, installed, removed, installed twice, purged: Debian's own test.

    It compares names, owners, modes and contents of all files, and looks for dangling links,
    diversions and processes.
    """
    for tool in ("piuparts", "adequate"):
        need(tool)
    # What the package depends on is there already. And an image lacks documentation: it has links
    # that dangle, and our own has to be let in.
    (root / "etc/apt/sources.list").write_text("")
    dangling = "find /etc /usr /var -xtype l -lname [^/]* -delete"
    apart("chroot", root, *dangling.split())
    (root / "etc/dpkg/dpkg.cfg.d/docs").write_text("path-include=/usr/share/doc/workerd/*\n")
    said = apart(
        "piuparts",
        f"--existing-chroot={root}",
        f"--distribution={machine.release}",
        f"--tmpdir={root.parent}",
        "--keep-sources-list",
        "--no-upgrade-test",
        "--install-purge-install",
        "--install-remove-install",
        "--pedantic-purge-test",
        "--fail-on-broken-symlinks",
        "--fail-if-inadequate",
        # apt of Debian 13 makes it.
        "--ignore=/var/cache/debconf/tmp.ci/",
        package,
    )
    assert "PASS: All tests." in said
    assert "Running adequate" in said


def test_enabled_instances_are_there_after_a_reboot_before_their_broker(
    bare: Machine, package: Path
) -> None:
    bare.install(package)
    bare.configure(HOLD)
    bare.run("systemctl", "enable", "workerd@1", "workerd@2")
    bare.run("systemctl", "start", "workerd@1")
    bare.wait("consuming")
    bare.run("systemctl", "stop", "workerd@1")
    job = bare.submit("sleep", "0")
    bare.run("systemctl", "disable", "rabbitmq-server")
    bare.reboot()
    for instance in "12":
        assert bare.show(f"workerd@{instance}", "ActiveState") == "active"
    assert "broker localhost" in bare.show("workerd@1", "StatusText")
    bare.run("systemctl", "enable", "--now", "rabbitmq-server")
    bare.wait("done", job_id=job)
    assert len(bare.find("start", job_id=job)) == 1


# Metrics


def test_an_installation_answers_no_scrape_before_it_is_asked_to(
    bare: Machine, package: Path, previous: Path
) -> None:
    bare.install(previous)
    assert bare.run("curl", *SCRAPE, check=False).returncode == CONNECTION_REFUSED
    # Nor does an upgrade.
    bare.install(package)
    assert bare.run("curl", *SCRAPE, check=False).returncode == CONNECTION_REFUSED
    assert bare.show("workerd-metrics.socket", "UnitFileState") == "disabled"


def test_a_scrape_starts_what_answers_it(bare: Machine, package: Path) -> None:
    bare.install(package)
    bare.run("systemctl", "enable", "--now", "workerd-metrics.socket")
    assert bare.show("workerd-metrics.service", "ActiveState") == "inactive"
    # No instance, no series.
    assert bare.run("curl", *SCRAPE).stdout == ""
    assert bare.show("workerd-metrics.service", "ActiveState") == "active"
    bare.run("systemctl", "start", "workerd@1", "workerd@2")
    for instance in "12":
        bare.wait("consuming", instance=instance)
    bare.wait("done", job_id=bare.submit("sleep", "0"))
    until(lambda: 'outcome="done"' in counted(bare), "the job is counted")
    text = bare.run("curl", *SCRAPE).stdout
    assert 'workerd_up{worker="1"} 1.0' in text
    assert 'workerd_up{worker="2"} 1.0' in text
    # When it has ended, the next scrape starts it again.
    bare.run("systemctl", "stop", "workerd-metrics.service")
    assert 'workerd_up{worker="1"} 1.0' in bare.run("curl", *SCRAPE).stdout
    # One that was stopped is forgotten, one that was killed is missed.
    bare.run("systemctl", "stop", "workerd@1")
    bare.run("systemctl", "mask", "--runtime", "workerd@2")
    bare.run("systemctl", "kill", "--signal=KILL", "workerd@2")
    until(lambda: bare.show("workerd@2", "MainPID") == "0", "the second one is gone")
    until(lambda: bare.run("curl", *SCRAPE).stdout.splitlines()[2:] == DOWN, "only the dead one")
    bare.run("systemctl", "unmask", "--runtime", "workerd@2")


def test_members_of_the_group_look_and_submit_through_an_instance(
    bare: Machine, package: Path
) -> None:
    bare.install(package)
    bare.run("useradd", "--groups", "workerd-submit", "mary")
    bare.run("systemctl", "start", "workerd@1")
    bare.wait("consuming", instance="1")
    assert "consuming default" in bare.run("workerd", "status", user="mary").stdout
    assert 'workerd_up{worker="1"} 1.0' in bare.run("workerd", "metrics", user="mary").stdout
    job = bare.run("submit", "sleep", "0", user="mary").stdout.strip()
    # The instance knows who it was.
    assert bare.wait("submitted", job_id=job)["WORKERD_UID"] == bare.sh("id -u mary")
    bare.run("systemctl", "stop", "workerd@1")
    bare.configure("[worker]\nqueue = 1\n", instance="1")
    bare.run("systemctl", "start", "workerd@1", check=False)
    # Why it failed is for those who can read the configuration anyway.
    assert "unknown key" in bare.run("workerd", "status", user="mary").stdout
    assert 'workerd_up{worker="1"} 0.0' in bare.run("workerd", "metrics", user="mary").stdout
    bare.run("useradd", "eve")
    assert "unknown key" not in bare.run("workerd", "status", user="eve", check=False).stdout


def test_another_port_is_a_drop_in(bare: Machine, package: Path) -> None:
    bare.install(package)
    bare.drop_in("workerd-metrics.socket", "[Socket]\nListenStream=\nListenStream=127.0.0.1:9999\n")
    bare.run("systemctl", "start", "workerd-metrics.socket")
    assert bare.run("curl", "--fail", "http://127.0.0.1:9999/metrics").returncode == 0
    assert bare.run("curl", *SCRAPE, check=False).returncode == CONNECTION_REFUSED


def test_an_upgrade_brings_the_new_version_of_what_answers(
    bare: Machine, package: Path, previous: Path
) -> None:
    bare.install(previous)
    bare.run("systemctl", "enable", "--now", "workerd-metrics.socket")
    bare.run("curl", *SCRAPE)
    before = bare.show("workerd-metrics.service", "MainPID")
    assert before != "0"
    bare.install(package)
    bare.run("curl", *SCRAPE)
    assert bare.show("workerd-metrics.service", "MainPID") not in (before, "0")
    bare.run("dpkg", "--remove", "workerd")
    assert bare.run("curl", *SCRAPE, check=False).returncode == CONNECTION_REFUSED
    assert bare.show("workerd-metrics.service", "ActiveState") == "inactive"


def test_what_answers_is_as_confined_as_the_daemon(bare: Machine, package: Path) -> None:
    bare.install(package)
    said = bare.sh("systemd-analyze security workerd-metrics.service | tail -n 1")
    level = re.search(r"exposure level for workerd-metrics.service: ([\d.]+)", said, re.IGNORECASE)
    assert level
    assert float(level[1]) <= 2.0
    units = ("workerd-metrics.socket", "workerd-metrics.service")
    assert bare.run("systemd-analyze", "verify", "--man=no", *units).stderr == ""


def test_clients_that_are_stuck_hold_up_no_scrape_of_the_service(
    bare: Machine, package: Path
) -> None:
    bare.install(package)
    bare.run("systemctl", "start", "workerd-metrics.socket", "workerd@1")
    bare.wait("consuming", instance="1")
    said = bare.run("python3", "-c", STUCK).stdout
    assert "workerd_up" in said


DOWN = ['workerd_up{worker="2"} 0.0']
#: The exit status of curl.
CONNECTION_REFUSED = 7
STUCK = """
import socket, urllib.request
stuck = [socket.create_connection(("127.0.0.1", 15693)) for _ in range(50)]
print(urllib.request.urlopen("http://127.0.0.1:15693/metrics", timeout=20).read().decode())
"""


def counted(machine: Machine) -> str:
    """The lines of jobs that are not 0."""
    text = machine.run("curl", *SCRAPE).stdout
    return "\n".join(re.findall(r"(?m)^workerd_jobs_total.* [1-9].*$", text))
