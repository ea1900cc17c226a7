"""Who else could change a file: whoever can, decides what the daemon runs.

A file is as safe as the weakest place on the way to it, so every directory and every symbolic
link that the path goes through is looked at, not only the file.
"""

import errno
import grp
import os
import pwd
import re
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path

SERVICE_USER = "workerd"

# What a service would have in its environment as well.
_HARMLESS = re.compile("PATH|LANG|LC_[A-Z]+|TZ")

# Linux follows at most this many links in one path (path_resolution(7)).
_MOST_LINKS = 40


def writable_by_others(path: Path) -> str | None:
    """Why somebody other than root and this process's user could change `path`, or None.

    The packaged service runs as a user of its own, and then that user counts as somebody else
    too: a job must not be able to rewrite what the next job runs. A path that cannot be
    examined is not trusted either.
    """
    service = service_account()
    users, groups = trusted_ids(os.geteuid(), os.getegid(), service.pw_uid if service else None)
    try:
        for step, status in _steps(path):
            reason = objection(step, status, users, groups)
            if reason:
                return reason
    except OSError as error:
        return f"{error.filename or path}: cannot tell who could write it: {error.strerror}"
    return None


def readable_by_all(mode: int) -> bool:
    """Whether a file of this `st_mode` shows its contents to every user of the host."""
    return bool(mode & stat.S_IROTH)


def service_account() -> pwd.struct_passwd | None:
    """The account of the packaged service, or None on a host that does not have it."""
    try:
        return pwd.getpwnam(SERVICE_USER)
    except KeyError:
        return None


def _steps(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Everything that resolving `path` passes, from the root down, links included."""
    here = Path("/")
    yield here, here.lstat()
    ahead = list(reversed(path.absolute().parts[1:]))
    links = 0
    while ahead:
        name = ahead.pop()
        if name == "..":
            here = here.parent
            continue
        step = here / name
        status = step.lstat()
        yield step, status
        if not stat.S_ISLNK(status.st_mode):
            here = step
            continue
        links += 1
        if links > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        target = step.readlink()
        if target.is_absolute():
            here = Path("/")
        ahead.extend(reversed(target.parts[1:] if target.is_absolute() else target.parts))


def trusted_ids(
    user: int, group: int, service: int | None
) -> tuple[frozenset[int], frozenset[int]]:
    """The users and the groups that may change what a process of `user` and `group` runs.

    A group of one's own is the habit on Debian, so what is writable for it is writable for
    oneself alone. `service` is the packaged service's user, which trusts only root.
    """
    if user == service:
        return frozenset({0}), frozenset({0})
    return frozenset({0, user}), frozenset({0, group})


def objection(
    step: Path, status: os.stat_result, users: frozenset[int], groups: frozenset[int]
) -> str | None:
    """Why somebody else than these users and groups could change one step, with a remedy."""
    name = shlex.quote(str(step))
    if status.st_uid not in users:
        return f"{name} belongs to {_user(status.st_uid)}, who could change it: chown root {name}"
    if stat.S_ISLNK(status.st_mode):
        return None  # Its permission bits mean nothing; the directory that holds it decides.
    if stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX:
        return None  # In a sticky directory such as /tmp only its owner can replace an entry.
    if status.st_mode & stat.S_IWOTH:
        return f"{name} is writable for everyone: chmod go-w {name}"
    if status.st_mode & stat.S_IWGRP and status.st_gid not in groups:
        return f"{name} is writable for {_group(status.st_gid)}: chmod go-w {name}"
    return None


def _user(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"


def _group(gid: int) -> str:
    try:
        return f"group {grp.getgrgid(gid).gr_name}"
    except KeyError:
        return f"group {gid}"


def drop_to_service_user() -> None:
    """Become the service's user for good, if this is root and the host has such a user.

    Checking runs application code, which must get neither more rights nor more secrets than a
    job would: the environment becomes that of a service.
    """
    account = service_account()
    if account is None or os.geteuid() != 0:
        return
    os.setgroups(os.getgrouplist(account.pw_name, account.pw_gid))
    os.setgid(account.pw_gid)
    os.setuid(account.pw_uid)
    # Root's home and directory are closed to this user; a service starts in "/".
    os.chdir("/")
    # What root has in its environment is none of the application's business.
    kept = {name: value for name, value in os.environ.items() if _HARMLESS.fullmatch(name)}
    os.environ.clear()
    os.environ.update(kept, HOME=account.pw_dir, USER=account.pw_name, LOGNAME=account.pw_name)


def group_id(name: str) -> int | None:
    """The number of a group; None where there is none of this name."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None
