"""Who could change a file: made-up ownership for the rules, real files for the way to them."""

import os
import pwd
import stat
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from workerd.config import permissions
from workerd.config.permissions import (
    AclEntry,
    drop_to_service_user,
    objections,
    objections_to,
    readable_by_all,
    trusted_ids,
)

ME, MY_GROUP, SERVICE, STRANGER = 1000, 1000, 990, 4242
FILE, DIRECTORY, LINK = stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK


def verdict(
    mode: int, owner: int = 0, group: int = 0, me: int = ME, acl: Sequence[AclEntry] = ()
) -> str | None:
    status = os.stat_result((mode, 0, 0, 1, owner, group, 0, 0, 0, 0))
    users, groups = trusted_ids(me, MY_GROUP if me == ME else me, SERVICE)
    found = list(objections_to(Path("/srv/a b"), status, users, groups, acl))
    assert len(found) < 2
    return found[0] if found else None


def test_files_of_root_and_of_oneself_are_trusted() -> None:
    assert verdict(FILE | 0o644) is None
    assert verdict(FILE | 0o644, owner=ME) is None


def test_a_file_of_somebody_else_is_not_trusted_whatever_its_mode() -> None:
    reason = verdict(FILE | 0o400, owner=STRANGER)
    assert reason == "'/srv/a b' belongs to user 4242, who could change it: chown root '/srv/a b'"


def test_what_everyone_can_write_is_not_trusted() -> None:
    reason = verdict(FILE | 0o666)
    assert reason == "'/srv/a b' is writable for everyone: chmod go-w '/srv/a b'"
    assert verdict(DIRECTORY | 0o777) is not None


def test_a_sticky_directory_is_trusted_but_not_a_sticky_file() -> None:
    assert verdict(DIRECTORY | stat.S_ISVTX | 0o777) is None
    assert verdict(FILE | stat.S_ISVTX | 0o666) is not None


def test_a_group_may_write_only_if_it_is_ones_own_or_that_of_root() -> None:
    assert verdict(FILE | 0o664, owner=ME, group=MY_GROUP) is None
    assert verdict(FILE | 0o664, group=0) is None
    reason = verdict(FILE | 0o664, owner=ME, group=STRANGER)
    assert reason == "'/srv/a b' is writable for group 4242: chmod go-w '/srv/a b'"


def test_the_mode_of_a_symbolic_link_does_not_count_but_its_owner_does() -> None:
    assert verdict(LINK | 0o777) is None
    assert verdict(LINK | 0o777, owner=STRANGER) is not None


def test_the_packaged_service_does_not_trust_its_own_files() -> None:
    assert verdict(FILE | 0o600, owner=SERVICE, me=SERVICE) is not None
    assert verdict(FILE | 0o660, group=SERVICE, me=SERVICE) is not None
    assert verdict(FILE | 0o640, group=SERVICE, me=SERVICE) is None


def test_root_does_not_trust_the_files_of_users() -> None:
    assert verdict(FILE | 0o600, owner=ME, me=0) is not None


@pytest.fixture
def program(tmp_path: Path) -> Path:
    directory = tmp_path / "bin"
    directory.mkdir(mode=0o755)
    program = directory / "program"
    program.touch(mode=0o755)
    return program


def test_a_plain_file_below_tmp_is_trusted(program: Path) -> None:
    assert objections(program) == []


def test_a_directory_that_everyone_can_write_taints_the_file_in_it(program: Path) -> None:
    program.parent.chmod(0o777)
    assert str(program.parent) in "".join(objections(program))


def test_a_link_is_followed_to_its_target(program: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("bin/../bin/program")
    assert objections(link) == []
    program.chmod(0o777)
    assert str(program) in "".join(objections(link))


def test_the_directory_of_a_link_counts_even_if_its_target_is_safe(program: Path) -> None:
    open_to_all = program.parent / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    link = open_to_all / "program"
    link.symlink_to(program)
    assert str(open_to_all) in "".join(objections(link))


def test_a_link_among_the_parents_is_followed_too(program: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(program.parent)
    path = tmp_path / "current" / "program"
    assert objections(path) == []
    program.parent.chmod(0o777)
    assert objections(path) != []


def test_a_relative_path_is_followed_from_the_root(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program.parent.chmod(0o777)
    monkeypatch.chdir(program.parent)
    assert objections(Path("program")) != []


def test_what_cannot_be_examined_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert "Too many levels" in "".join(objections(tmp_path / "loop"))
    assert "No such file" in "".join(objections(tmp_path / "missing"))


def test_only_the_last_read_bit_opens_a_file_to_everyone() -> None:
    assert readable_by_all(0o100604)
    assert not readable_by_all(0o100660)


# Giving up root.


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would change the user of this process, in order."""
    made: list[str] = []
    for name in ("setgroups", "setgid", "setuid", "chdir"):
        monkeypatch.setattr(os, name, lambda value, name=name: made.append(f"{name} {value}"))
    monkeypatch.setattr(os, "getgrouplist", lambda name, group: [group, 7])
    monkeypatch.setenv("HOME", "/root")
    account = pwd.struct_passwd(("workerd", "x", 990, 991, "", "/var/lib/workerd", "/bin/false"))
    monkeypatch.setattr(permissions, "service_account", lambda: account)
    return made


def test_root_becomes_the_service_user_groups_first(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    drop_to_service_user()
    assert calls == ["setgroups [991, 7]", "setgid 991", "setuid 990", "chdir /"]


def test_the_service_user_gets_nothing_of_roots_environment(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    given = {"PATH": "/bin", "LC_ALL": "C", "HOME": "/root", "SSH_AUTH_SOCK": "/s", "TOKEN": "x"}
    monkeypatch.setattr(os, "environ", dict(given))
    drop_to_service_user()
    user = {"HOME": "/var/lib/workerd", "USER": "workerd", "LOGNAME": "workerd"}
    assert os.environ == {"PATH": "/bin", "LC_ALL": "C", **user}


def test_an_ordinary_user_stays_what_it_is(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    drop_to_service_user()
    assert calls == []


def test_root_stays_root_on_a_host_without_the_service_user(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(permissions, "service_account", lambda: None)
    drop_to_service_user()
    assert calls == []


# Access-control lists.

USER, GROUP_OBJ, GROUP, MASK = 0x02, 0x04, 0x08, 0x10


@pytest.mark.parametrize(
    ("entry", "mode", "reason"),
    [
        (AclEntry(USER, 6, STRANGER), 0o664, f"an ACL lets user {STRANGER} write '/srv/a b': "),
        (AclEntry(GROUP, 6, STRANGER), 0o664, f"an ACL lets group {STRANGER} write '/srv/a b': "),
        (AclEntry(GROUP_OBJ, 6, 0), 0o664, f"'/srv/a b' is writable for group {STRANGER}: "),
        # The mask, which shows as the bits of the group, takes it away.
        (AclEntry(USER, 6, STRANGER), 0o644, None),
        (AclEntry(USER, 4, STRANGER), 0o664, None),
        (AclEntry(USER, 6, ME), 0o664, None),
    ],
)
def test_an_acl_counts_as_far_as_its_mask_goes(
    entry: AclEntry, mode: int, reason: str | None
) -> None:
    # The owner's group, which owns nothing by itself here.
    own = AclEntry(GROUP_OBJ, 4, 0xFFFFFFFF)
    acl = [entry] if entry.tag == GROUP_OBJ else [entry, own]
    found = verdict(FILE | mode, group=STRANGER, acl=acl)
    assert (found is None) == (reason is None)
    assert found is None or found.startswith(reason or "")
    if entry.tag != GROUP_OBJ and found:
        assert found.endswith(f"setfacl -x {'u' if entry.tag == USER else 'g'}:4242 '/srv/a b'")


def test_the_acl_of_a_file_is_read(program: Path) -> None:
    entries = [(1, 7, 0xFFFFFFFF), (USER, 6, STRANGER), (GROUP_OBJ, 0, 0xFFFFFFFF)]
    entries += [(MASK, 6, 0xFFFFFFFF), (32, 0, 0xFFFFFFFF)]
    raw = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(program, "system.posix_acl_access", raw)
    except OSError as error:
        pytest.skip(f"no ACL in this file system: {error}")
    assert objections(program) == [
        f"an ACL lets user 4242 write {program}: setfacl -x u:4242 {program}"
    ]


def test_a_link_of_somebody_else_is_given_back_with_the_option_for_links() -> None:
    reason = verdict(LINK | 0o777, owner=STRANGER) or ""
    assert reason.endswith("chown -h root '/srv/a b'")


def test_all_findings_of_a_path_come_at_once(program: Path) -> None:
    program.chmod(0o777)
    program.parent.chmod(0o777)
    assert len(objections(program)) == 2


def test_trusted_users_may_own_what_an_application_brings(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = pwd.struct_passwd(("app", "x", STRANGER, STRANGER, "", "/srv", "/bin/sh"))
    known = {"app": app}
    monkeypatch.setattr(pwd, "getpwnam", known.__getitem__)
    monkeypatch.setattr(os, "geteuid", lambda: ME)
    status = program.lstat()
    if status.st_uid != 0:
        pytest.skip("only root can give a file away")
    os.chown(program, STRANGER, STRANGER)
    program.chmod(0o775)
    assert objections(program, ["nobody-known"]) != []
    assert objections(program, ["app"]) == []
