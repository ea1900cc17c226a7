"""The judge: jobs write a journal of their starts and finishes, and it says what went wrong.

A program of its own, which knows nothing of workerd:

    python3 -I -S oracle.py job FOLDER ID [SECONDS [STATUS]]
    python3 oracle.py judge FOLDER --confirmed FILE [--dead FILE] [--allowed-duplicates N]

`job` is a handler's command. It appends to FOLDER/journal, each line in one write:

    start ID PID TIME
    finish ID PID TIME STATUS
    overlap ID PID TIME           before the start, when another run of this id is alive

TIME counts seconds since the boot. FOLDER/running-ID holds the pid of the run, so ids must be file
names. `job.sh` does the same faster, without fsync: what a killed process has written is not lost.
Before its finish it also waits until nobody holds the lock on FOLDER/gate-ID: see `Oracle.hold`.

`judge` reads files of one id per line: the confirmed ids were taken by the broker, the dead ones
lie in a dead letter queue. It prints what it found and exits 1 if that is not as it must be.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time

# Imports that only `judge` needs are made there: a job must start fast.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable


class Run:
    """One start of a job, and how it ended. `status` is None if it never came to its end."""

    def __init__(self, job: str, pid: str) -> None:
        self.job = job
        self.pid = pid
        self.status: int | None = None


class Report:
    """What a journal shows. Empty collections are the good news.

    lost        confirmed, but neither finished well nor dead
    duplicates  id -> runs that began although no earlier one had failed
    overlaps    ids that ran twice at the same time
    repeated    ids that finished well more than once (each is also a duplicate)
    cut_off     ids with a run that never came to its end
    orphans     ids that finished without a start
    strangers   ids that ran although nobody published them
    undead      ids that finished well and became dead letters too
    malformed   lines that are none
    """

    def __init__(self) -> None:
        self.lost: set[str] = set()
        self.duplicates: dict[str, int] = {}
        self.overlaps: set[str] = set()
        self.repeated: set[str] = set()
        self.cut_off: set[str] = set()
        self.orphans: set[str] = set()
        self.strangers: set[str] = set()
        self.undead: set[str] = set()
        self.malformed: list[str] = []
        self.finished: set[str] = set()
        self.starts: dict[str, int] = {}

    def problems(self, allowed_duplicates: int = 0) -> list[str]:
        """One sentence for each rule that was broken."""
        found = [
            f"{what}: {len(ids)} ({', '.join(sorted(ids)[:10])})"
            for what, ids in (
                ("lost", self.lost),
                ("ran twice at the same time", self.overlaps),
                ("finished without a start", self.orphans),
                ("ran without being published", self.strangers),
                ("finished well and dead as well", self.undead),
                ("malformed lines", self.malformed),
            )
            if ids
        ]
        extra = sum(self.duplicates.values())
        if extra > allowed_duplicates:
            some = ", ".join(sorted(self.duplicates)[:10])
            found.append(f"duplicate runs: {extra}, allowed {allowed_duplicates} ({some})")
        return found

    def __str__(self) -> str:
        return (
            f"{sum(self.starts.values())} runs of {len(self.starts)} jobs: "
            f"{len(self.finished)} finished well, {len(self.lost)} lost, "
            f"{sum(self.duplicates.values())} duplicate runs, {len(self.overlaps)} overlapping, "
            f"{len(self.cut_off)} cut off"
        )


def judge(journal: str, confirmed: Iterable[str], dead: Collection[str] = ()) -> Report:
    """Read a journal's text against the ids that were published and those that became dead."""
    published = set(confirmed)
    report = Report()
    runs: dict[str, list[Run]] = {}
    # The order of the lines is the order of the events: each was one appending write.
    for line in journal.splitlines(keepends=True):
        words = line.split()
        if not line.endswith("\n") or len(words) != {"finish": 5}.get((words or [""])[0], 4):
            report.malformed.append(line.rstrip("\n"))
            continue
        word, job, pid = words[:3]
        earlier = runs.setdefault(job, [])
        if word == "start":
            if earlier and (earlier[-1].status is None or earlier[-1].status == 0):
                report.duplicates[job] = report.duplicates.get(job, 0) + 1
            earlier.append(Run(job, pid))
        elif word == "finish":
            _finish(report, earlier, job, pid, int(words[4]))
        elif word == "overlap":
            report.overlaps.add(job)
        else:
            report.malformed.append(line.rstrip("\n"))
    for job, of_job in runs.items():
        report.starts[job] = len(of_job)
        well = sum(run.status == 0 for run in of_job)
        if well:
            report.finished.add(job)
        if well > 1:
            report.repeated.add(job)
        if any(run.status is None for run in of_job):
            report.cut_off.add(job)
    report.lost = published - report.finished - set(dead)
    report.strangers = set(runs) - published
    report.undead = report.finished & set(dead)
    return report


def _finish(report: Report, runs: list[Run], job: str, pid: str, status: int) -> None:
    for index, run in enumerate(runs):
        if run.pid == pid and run.status is None:
            run.status = status
            # Another run of this job began while this one was still going on.
            if index + 1 < len(runs):
                report.overlaps.add(job)
            return
    report.orphans.add(job)


def perform(folder: str, job: str, seconds: float = 0.0, status: int = 0) -> int:
    """Be a job: write the start, sleep, write the finish, return the exit status."""
    running = f"{folder}/running-{job}"
    pid = os.getpid()
    try:
        descriptor = os.open(running, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        with open(running) as file:
            other = file.read().strip()
        if other and _lives(other):
            _write(folder, f"overlap {job} {pid} {_now()}")
        descriptor = os.open(running, os.O_WRONLY | os.O_TRUNC)
    os.write(descriptor, f"{pid}\n".encode())
    os.close(descriptor)
    _write(folder, f"start {job} {pid} {_now()}")
    time.sleep(seconds)
    _write(folder, f"finish {job} {pid} {_now()} {status}")
    if os.path.exists(running):
        os.unlink(running)
    return status


def _now() -> str:
    return f"{time.clock_gettime(time.CLOCK_BOOTTIME):.3f}"


def _lives(pid: str) -> bool:
    """Whether a process is there and is not a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _write(folder: str, line: str) -> None:
    descriptor = os.open(f"{folder}/journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.write(descriptor, f"{line}\n".encode())
    os.fsync(descriptor)
    os.close(descriptor)


class Oracle:
    """The judge and its journal in a folder, as tests use it."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._here = os.path.dirname(os.path.abspath(__file__))
        self._held: dict[str, int] = {}

    def command(self, job: str = "{id}", seconds: float = 0, status: int = 0) -> list[str]:
        """A handler's command that writes the journal; workerd replaces `{id}`."""
        return [f"{self._here}/job.sh", self.folder, job, f"{seconds:g}", str(status)]

    def python_command(self, job: str = "{id}", seconds: float = 0, status: int = 0) -> list[str]:
        """The same as a Python program, which forces its lines to disk."""
        program = [sys.executable, "-I", "-S", os.path.abspath(__file__), "job"]
        return [*program, self.folder, job, f"{seconds:g}", str(status)]

    def hold(self, *jobs: str) -> None:
        """Keep these jobs from finishing, once they run as `command`, until `release`."""
        for job in jobs:
            gate = os.open(f"{self.folder}/gate-{job}", os.O_RDWR | os.O_CREAT)
            fcntl.flock(gate, fcntl.LOCK_EX)
            self._held[job] = gate

    def release(self, *jobs: str) -> None:
        """Let these jobs finish; without a name, all that are held."""
        for job in jobs or tuple(self._held):
            os.close(self._held.pop(job))

    @property
    def journal(self) -> str:
        return _read(f"{self.folder}/journal")

    def report(self, confirmed: Iterable[str], dead: Collection[str] = ()) -> Report:
        return judge(self.journal, confirmed, dead)

    def check(
        self,
        confirmed: Iterable[str],
        *,
        dead: Collection[str] = (),
        allowed_duplicates: int = 0,
    ) -> Report:
        """Judge, and raise `AssertionError` with the journal if a rule was broken."""
        report = self.report(confirmed, dead)
        problems = report.problems(allowed_duplicates)
        assert not problems, "\n".join([str(report), *problems, self.journal])
        return report


def main() -> int:
    if sys.argv[1:2] == ["job"]:
        folder, job, *rest = sys.argv[2:]
        seconds = float(rest[0]) if rest else 0.0
        return perform(folder, job, seconds, int(rest[1]) if rest[1:] else 0)
    import argparse

    parser = argparse.ArgumentParser(prog="oracle.py")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("judge")
    command.add_argument("folder")
    command.add_argument("--confirmed", required=True)
    command.add_argument("--dead")
    command.add_argument("--allowed-duplicates", type=int, default=0)
    arguments = parser.parse_args()
    dead = _read(arguments.dead).split() if arguments.dead else []
    journal = _read(f"{arguments.folder}/journal")
    report = judge(journal, _read(arguments.confirmed).split(), dead)
    problems = report.problems(arguments.allowed_duplicates)
    print(report, *problems, sep="\n")
    return 1 if problems else 0


def _read(path: str) -> str:
    """A file's text; a journal to which nothing was written does not exist."""
    if not os.path.exists(path):
        return ""
    with open(path) as file:
        return file.read()


if __name__ == "__main__":
    sys.exit(main())
