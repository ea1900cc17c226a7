"""Who else could change a file: whoever can, decides what the daemon runs.

A file is as safe as the weakest place on the way to it, so every directory and every symbolic
link that the path goes through is looked at, not only the file.
"""

import contextlib
import errno
import grp
import os
import pwd
import re
import shlex
import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

SERVICE_USER = "workerd"

#: Tags of entries of an ACL, and a permission, of <linux/posix_acl.h>.
_ACL_USER, _ACL_GROUP_OBJ, _ACL_GROUP = 0x02, 0x04, 0x08
_WRITE = 0o2


class AclEntry(NamedTuple):
    """An entry of an access-control list: what a user or a group may do."""

    tag: int
    permissions: int
    id: int


# What a service would have in its environment as well.
_HARMLESS = re.compile("PATH|LANG|LC_[A-Z]+|TZ")

# Linux follows at most this many links in one path (path_resolution(7)).
_MOST_LINKS = 40


def objections(path: Path, trust_users: Iterable[str] = ()) -> list[str]:
    """Every reason why somebody else than root and this process's user could change `path`.

    The packaged service runs as a user of its own, and then that user counts as somebody else
    too: a job must not be able to rewrite what the next job runs. `trust_users` may change the
    file as well. A path that cannot be examined is not trusted either.
    """
    service = service_account()
    users, groups = trusted_ids(os.geteuid(), os.getegid(), service.pw_uid if service else None)
    for name in trust_users:
        with contextlib.suppress(KeyError):  # `check` finds who does not exist
            account = pwd.getpwnam(name)
            users |= {account.pw_uid}
            groups |= {account.pw_gid}
    reasons: list[str] = []
    try:
        for step, status in _steps(path):
            reasons += objections_to(step, status, users, groups, _acl(step))
    except OSError as error:
        reasons.append(f"{error.filename or path}: nobody knows who can write it: {error.strerror}")
    return reasons


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


def objections_to(
    step: Path,
    status: os.stat_result,
    users: frozenset[int],
    groups: frozenset[int],
    acl: Sequence[AclEntry] = (),
) -> Iterator[str]:
    """Why somebody else than these users and groups could change one step, with remedies."""
    name = shlex.quote(str(step))
    is_link = stat.S_ISLNK(status.st_mode)
    if status.st_uid not in users:
        remedy = f"chown {'-h ' if is_link else ''}root {name}"
        yield f"{name} belongs to {_user(status.st_uid)}, who could change it: {remedy}"
    if is_link:
        return  # Its permission bits mean nothing; the directory that holds it decides.
    if stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX:
        return  # In a sticky directory such as /tmp only its owner can replace an entry.
    if status.st_mode & stat.S_IWOTH:
        yield f"{name} is writable for everyone: chmod go-w {name}"
    # Where there is an ACL, the bits of the group are the mask of all its entries.
    group_may_write = status.st_mode & stat.S_IWGRP
    for entry in acl:
        writes = entry.permissions & status.st_mode >> 3 & _WRITE
        if entry.tag == _ACL_GROUP_OBJ:
            group_may_write = writes
        elif writes and entry.tag == _ACL_USER and entry.id not in users:
            yield f"an ACL lets {_user(entry.id)} write {name}: setfacl -x u:{entry.id} {name}"
        elif writes and entry.tag == _ACL_GROUP and entry.id not in groups:
            yield f"an ACL lets {_group(entry.id)} write {name}: setfacl -x g:{entry.id} {name}"
    if group_may_write and status.st_gid not in groups and not status.st_mode & stat.S_IWOTH:
        yield f"{name} is writable for {_group(status.st_gid)}: chmod go-w {name}"


def _acl(step: Path) -> list[AclEntry]:
    """The access-control list of a file, beyond its mode; empty where there is none."""
    try:
        raw = os.getxattr(step, "system.posix_acl_access", follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP):
            return []
        raise
    # posix_acl_xattr.h: a version of 4 bytes, then the entries.
    return [AclEntry(*entry) for entry in struct.iter_unpack("<HHI", raw[4:])]


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
