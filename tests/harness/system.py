"""A Debian that boots: real systemd, real journald, real RabbitMQ, and nothing of this machine.

`python -m tests.harness.system` makes the images, about 25 s and 250 MB each, from the archive
that this machine's apt uses. A container has no network but its own loopback. Needs root.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from . import processes
from .processes import MissingTool
from .trixie import CHECKOUT
from .trixie import OPTIONS as NO_DOCUMENTATION
from .waiting import TIMEOUT, until

#: The Debian that has a release of RabbitMQ.
RELEASES = {"3.10": "bookworm", "4.0": "trixie"}

BOOT_TIMEOUT = 3 * TIMEOUT

Entry = dict[str, str]

# Each has cgroups of its own: with those of the test run, two would kill each other's services.
ENTER_CGROUPS = """
for cgroup in $1; do mkdir -p "$cgroup" && echo $$ > "$cgroup/cgroup.procs"; done
shift && exec "$@"
"""

_numbers = itertools.count(1)


def image(release: str) -> Path:
    """Where the image of a Debian is, or is to be. Other contents have another name."""
    folder = os.environ.get("WORKERD_TEST_IMAGES", CHECKOUT / ".cache")
    contents = hashlib.sha256("\0".join(OPTIONS).encode()).hexdigest()[:8]
    return Path(folder, f"system-{release}-{contents}.tar")


def make(release: str) -> None:
    """Make an image unless it is there. It appears complete or not at all."""
    path = image(release)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.tar")
    try:
        subprocess.run(["mmdebstrap", "--quiet", *OPTIONS, release, str(unfinished)], check=True)
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)


# What the package depends on is in it, or suggested, so that installing needs no network.
PACKAGES = """
    curl dbus procps python3 python3-daemon python3-pika python3-prometheus-client python3-sdnotify
    python3-tomli python3-venv rabbitmq-server systemd systemd-sysv
"""
OPTIONS = [
    "--variant=minbase",
    f"--include={','.join(PACKAGES.split())}",
    *(option for option in NO_DOCUMENTATION if option.startswith("--dpkgopt")),
    # As Debian's installer leaves it.
    '--customize-hook=echo 127.0.0.1 localhost debian > "$1/etc/hosts"',
    '--customize-hook=echo debian > "$1/etc/hostname"',
    '--customize-hook=mkdir -p "$1/var/log/journal"',
    # They would start in the middle of a test.
    '--customize-hook=rm -r "$1"/etc/systemd/system/timers.target.wants',
    '--customize-hook=rm -r "$1"/etc/systemd/system/getty.target.wants',
]


def build(folder: Path) -> Path:
    """Build the Debian package into a folder, unless it is there. Raises MissingTool."""
    if shutil.which("dh") is None:
        raise MissingTool("debhelper is not installed")
    folder.mkdir(exist_ok=True)
    folder_lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(folder_lock, fcntl.LOCK_EX)
        if not any(folder.iterdir()):
            subprocess.run([CHECKOUT / "packaging/deb/build", folder], check=True)
    finally:
        os.close(folder_lock)
    (package,) = folder.iterdir()
    return package


class Machine:
    """One booted Debian; `run` commands in it, `wait` for entries of its journal."""

    def __init__(self, folder: Path, release: str) -> None:
        """Unpack and boot it. Raises MissingTool."""
        for tool in ("systemd-nspawn", "nsenter"):
            processes.need(tool)
        if os.geteuid() != 0:
            raise MissingTool("booting a Debian needs root")
        if not image(release).exists():
            raise MissingTool(f"no image of {release}: python -m tests.harness.system")
        self.release = release
        self.root = folder / release
        self.root.mkdir(parents=True)
        subprocess.run(["tar", "-xf", image(release), "-C", self.root], check=True)
        # Everything in the journal so far. It only grows; `_came` guards it and is notified.
        self.entries: list[Entry] = []
        self._came = threading.Condition()
        self._cgroups = _cgroups(f"workerd-{os.getpid()}-{next(_numbers)}")
        self._console = folder / f"{release}.console"
        self._init = 0
        self._follower: subprocess.Popen[bytes] | None = None
        self._nspawn = self._boot()
        self._settle()

    # Its life

    def _boot(self) -> subprocess.Popen[bytes]:
        # Whatever is in a process namespace dies with the first process in it.
        nspawn = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        nspawn += ["systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit"]
        nspawn += ["--private-network", "--machine=debian", f"--directory={self.root}"]
        groups = " ".join(map(str, self._cgroups))
        with self._console.open("ab") as console:
            return processes.spawn(
                ["sh", "-ec", ENTER_CGROUPS, "sh", groups, *nspawn],
                env={"PATH": os.environ["PATH"]},
                stdout=console,
                stderr=console,
            )

    def _settle(self) -> None:
        """Wait until everything that starts at boot has started."""
        self._init = until(self._find_init, "the container's init", BOOT_TIMEOUT)
        until(
            lambda: self.run("systemctl", "is-system-running", check=False).stdout in STARTED,
            "booted",
            BOOT_TIMEOUT,
        )
        self._follow()

    def _find_init(self) -> int:
        """The only child of systemd-nspawn, which is in the container once it is systemd."""
        assert self._nspawn.poll() is None, self.console
        for pid in processes.descendants(self._nspawn.pid):
            if processes.command_line(pid).split(" ")[0].endswith("/systemd"):
                return pid
        return 0

    def reboot(self) -> None:
        """Restart all of it, as an administrator does, and wait until it has booted."""
        self._unfollow()
        self.run("systemctl", "reboot", "--no-block")
        # It leaves the new start to whoever has started it.
        self._nspawn.wait(BOOT_TIMEOUT)
        self._nspawn = self._boot()
        self._settle()

    def close(self) -> None:
        """Switch it off and forget it."""
        self._unfollow()
        processes.end(self._nspawn)
        until(lambda: not any(map(_populated, self._cgroups)), "the container is gone")
        for cgroup in self._cgroups:
            for folder, _, _ in os.walk(cgroup, topdown=False):
                os.rmdir(folder)
        shutil.rmtree(self.root)

    @property
    def console(self) -> str:
        return self._console.read_text(errors="replace")

    # Commands

    def run(
        self,
        *command: str,
        check: bool = True,
        user: str | None = None,
        stdin: str = "",
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in it; raises AssertionError unless it succeeds, or `check` is false."""
        done = subprocess.run(
            self._enter(command, user),
            input=stdin,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=3 * TIMEOUT,
        )
        if check and done.returncode:
            text = f"{shlex.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}"
            raise AssertionError(text)
        return done

    def sh(self, script: str, check: bool = True) -> str:
        """The standard output of a shell script that runs in it."""
        return self.run("sh", "-euc", script, check=check).stdout.strip()

    def _enter(self, command: Sequence[str], user: str | None = None) -> list[str]:
        spaces = ["-m", "-u", "-i", "-n", "-p", "-C", "-r", "-w"]
        enter = ["nsenter", "-t", str(self._init), *spaces]
        return [*enter, *(["runuser", "-u", user, "--"] if user else []), *command]

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file in it, with its folders."""
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)

    def show(self, unit: str, prop: str) -> str:
        """A property of a unit."""
        return self.sh(f"systemctl show --property={prop} --value {shlex.quote(unit)}")

    @contextlib.contextmanager
    def frozen_init(self) -> Iterator[None]:
        """Its systemd does nothing meanwhile; other processes go on."""
        # From outside its process namespace, or the signal would be ignored.
        os.kill(self._init, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self._init, signal.SIGCONT)

    # workerd

    def install(self, package: Path) -> str:
        """Install a package from this machine; returns what was said."""
        self.copy(package)
        done = self.run("dpkg", "--install", f"/root/{package.name}")
        return done.stdout + done.stderr

    def copy(self, file: Path) -> None:
        """Put a file into its /root."""
        shutil.copy(file, self.root / "root" / file.name)

    def configure(self, text: str, instance: str | None = None) -> None:
        """Write a file of /etc/workerd: for all instances, or for one of them."""
        name = f"instances/{instance}" if instance else "conf.d/test"
        self.write(f"/etc/workerd/{name}.toml", text)

    def drop_in(self, unit: str, text: str) -> None:
        """What `systemctl edit UNIT` does."""
        self.write(f"/etc/systemd/system/{unit}.d/test.conf", text)
        self.run("systemctl", "daemon-reload")

    def submit(self, *arguments: str, stdin: str = "") -> str:
        """What `submit` prints."""
        return self.run("submit", *arguments, stdin=stdin).stdout.strip()

    def depth(self, queue: str) -> int:
        """How many messages are ready in a queue."""
        return int(self.run("python3", "-c", DEPTH, queue).stdout)

    def tidy(self) -> None:
        """Forget all that a test has done to workerd; the package may stay."""
        self.write("/srv/go", "")
        self.sh(TIDY)

    # The journal

    def transcript(self, since: int) -> str:
        """The journal as text, for a test that fails."""
        with self._came:
            entries = self.entries[since:]
        return "\n".join(
            f"{entry.get('_SYSTEMD_UNIT', '')}: {entry.get('MESSAGE')}" for entry in entries[-200:]
        )

    def mark(self) -> int:
        """This moment, for `wait` and `find`: what comes later counts."""
        # journald has several sockets, and the journal is read by somebody else: once journald has
        # written what was sent to it, a line of our own shows how far that is.
        number = f"mark-{next(_numbers)}"
        self.run("journalctl", "--sync")
        self.run("logger", "--tag=test", number)
        self._wait(lambda entry: entry.get("MESSAGE") == number, number, 0)
        with self._came:
            return len(self.entries)

    def find(self, event: str, since: int = 0, **fields: str) -> list[Entry]:
        """The entries of workerd with this event name and these fields, of all until now."""
        self.mark()
        wanted = _wanted(event, fields)
        with self._came:
            return [entry for entry in self.entries[since:] if wanted.items() <= entry.items()]

    def wait(self, event: str, since: int = 0, **fields: str) -> Entry:
        """Wait for the first such entry."""
        wanted = _wanted(event, fields)
        return self._wait(lambda entry: wanted.items() <= entry.items(), str(wanted), since)

    def _wait(self, matches: Callable[[Entry], bool], what: str, looked_at: int) -> Entry:
        deadline = time.monotonic() + TIMEOUT
        with self._came:
            while True:
                for entry in itertools.islice(self.entries, looked_at, None):
                    if matches(entry):
                        return entry
                looked_at = len(self.entries)
                if not self._came.wait(deadline - time.monotonic()):
                    raise AssertionError(f"no {what} in the journal in {TIMEOUT:g} s")

    def _unfollow(self) -> None:
        if self._follower is not None:
            processes.end(self._follower)
            self._follower = None
            # nsenter has a child of its own. It is ours to reap, or the machine waits for it.
            until(lambda: not processes.strays(), "nothing follows the journal")

    def _follow(self) -> None:
        follow = ["journalctl", "--follow", "--output=json", "--boot", "--lines=all"]
        self._follower = processes.spawn(
            self._enter(follow), env=ENVIRONMENT, stdout=subprocess.PIPE
        )
        threading.Thread(target=self._read, args=[self._follower], daemon=True).start()

    def _read(self, follower: subprocess.Popen[bytes]) -> None:
        assert follower.stdout is not None
        for line in follower.stdout:
            with self._came:
                self.entries.append(json.loads(line))
                self._came.notify_all()


DEPTH = """
import pika, sys
channel = pika.BlockingConnection().channel()
print(channel.queue_declare(sys.argv[1], passive=True).method.message_count)
"""
# What is killed here is a test's that has failed.
TIDY = """
systemctl disable --now workerd-metrics.socket 2>/dev/null || true
systemctl stop workerd.target 'workerd@*.service' 2>/dev/null ||
    systemctl kill --signal=KILL 'workerd@*.service'
systemctl reset-failed
rm -f /srv/go
rm -rf /etc/workerd/conf.d/* /etc/workerd/instances/* /etc/systemd/system/workerd*
rm -rf /usr/sbin/policy-rc.d
if [ -e /etc/systemd/journald.conf.d ]; then
    rm -r /etc/systemd/journald.conf.d
    systemctl restart systemd-journald
fi
systemctl daemon-reload
systemctl is-active --quiet rabbitmq-server || systemctl start rabbitmq-server
python3 - <<END
import pika
connection = pika.BlockingConnection()
for queue in "default", "default.due", "default.dead":
    try:
        connection.channel().queue_purge(queue)
    except pika.exceptions.ChannelClosedByBroker:
        pass
END
"""
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
    # As on a terminal that nobody sits at.
    "SYSTEMD_PAGER": "",
}
STARTED = {"running\n", "degraded\n"}


def _wanted(event: str, fields: Mapping[str, str]) -> Entry:
    named = {f"WORKERD_{name.upper()}": value for name, value in fields.items()}
    return {"WORKERD_EVENT": event, **named}


def _cgroups(name: str) -> list[Path]:
    """A cgroup below that of this process, in each hierarchy that systemd uses."""
    found = []
    mounts = re.findall(
        r"^\S+ (\S+) (cgroup2?) (\S+)", Path("/proc/self/mounts").read_text(), re.MULTILINE
    )
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controller, path = line.split(":", 2)
        for folder, kind, options in mounts:
            systemd = controller == "name=systemd" and controller in options.split(",")
            if systemd or (not controller and kind == "cgroup2"):
                found.append(Path(folder + path) / name)
                break
    return found


def _populated(cgroup: Path) -> bool:
    return any((Path(folder) / "cgroup.procs").read_text() for folder, _, _ in os.walk(cgroup))


if __name__ == "__main__":
    for name in RELEASES.values():
        make(name)
