"""The Debian package as it is built. What it does on a host is in `tests/system`."""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import tomli

import workerd
from tests.harness.processes import need
from tests.harness.trixie import CHECKOUT

PACKAGING = CHECKOUT / "packaging"


def contents(package: Path) -> dict[str, str]:
    """The mode and owner of each file."""
    listing = subprocess.run(
        ["dpkg-deb", "--contents", package], check=True, capture_output=True, text=True
    )
    rows = (line.split(None, 5) for line in listing.stdout.splitlines())
    return {path.removeprefix("."): f"{mode} {owner}" for mode, owner, _, _, _, path in rows}


def test_the_version_is_the_same_everywhere() -> None:
    changelog = (PACKAGING / "deb/changelog").read_text()
    assert re.match(r"workerd \((.*)\) ", changelog)[1] == workerd.__version__  # type: ignore[index]
    news = (CHECKOUT / "CHANGELOG.md").read_text()
    assert re.findall(r"(?m)^## (\S+)", news)[0] == workerd.__version__
    project = tomli.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    assert "version" in project["dynamic"]


def test_the_maintainers_have_one_address() -> None:
    control = (PACKAGING / "deb/control").read_text()
    changelog = (PACKAGING / "deb/changelog").read_text()
    [author] = tomli.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["authors"]
    address = f"{author['name']} <{author['email']}>"
    assert re.findall(r"(?m)^Maintainer: (.*)$", control) == [address]
    assert set(re.findall(r"(?m)^ -- (.*?)  ", changelog)) == {address}
    # Nowhere else, so that it can be changed.
    pages = [CHECKOUT / "README.md", *(CHECKOUT / "docs").glob("*.md")]
    assert [page.name for page in pages if author["email"] in page.read_text()] == []


def test_a_build_leaves_one_package_and_nothing_else(package: Path, tmp_path: Path) -> None:
    assert [package] == list(package.parent.iterdir())
    assert package.name == f"workerd_{workerd.__version__}_all.deb"
    assert not (CHECKOUT / "debian").exists()


def test_two_builds_are_identical(package: Path, tmp_path: Path) -> None:
    """Whenever, wherever and by whomever it is built."""
    need("faketime")
    elsewhere = tmp_path / "else where"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "dist", "tests")
    shutil.copytree(CHECKOUT, elsewhere, ignore=ignored)
    build = ["faketime", "2031-05-05 05:05:05", f"{elsewhere}/packaging/deb/build", str(tmp_path)]
    subprocess.run(
        ["sh", "-c", 'umask 077 && exec "$@"', "sh", *build],
        env={"PATH": "/usr/bin:/bin", "TZ": "Asia/Kathmandu", "LC_ALL": "C", "HOME": "/"},
        check=True,
    )
    assert (tmp_path / package.name).read_bytes() == package.read_bytes()


def test_lintian_finds_nothing(package: Path) -> None:
    need("lintian")
    found = subprocess.run(
        ["lintian", "--fail-on=error,warning", package], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout


def test_nothing_in_it_belongs_to_anybody_but_root(package: Path) -> None:
    files = contents(package)
    assert "/usr/bin/submit" in files
    assert "/usr/lib/python3/dist-packages/workerd/py.typed" in files
    assert set(files.values()) <= {
        "-rw-r--r-- root/root",
        "-rwxr-xr-x root/root",
        "drwxr-xr-x root/root",
    }


def test_what_it_depends_on_is_in_debian(package: Path) -> None:
    fields = subprocess.run(
        ["dpkg-deb", "--field", package, "Depends"], check=True, capture_output=True, text=True
    )
    depends = {part.split()[0].removesuffix(":any") for part in fields.stdout.split(",")}
    libraries = {"python3-daemon", "python3-pika", "python3-sdnotify", "python3-tomli"}
    assert depends == {"python3", "systemd", *libraries}


@pytest.fixture(scope="session")
def unpacked(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the package brings."""
    folder = tmp_path_factory.mktemp("unpacked")
    subprocess.run(["dpkg-deb", "--extract", package, folder], check=True)
    return folder


def manual(unpacked: Path, page: str) -> str:
    """The source of a manual page."""
    packed = unpacked / f"usr/share/man/man{page[-1]}/{page}.gz"
    return gzip.decompress(packed.read_bytes()).decode()


@pytest.mark.parametrize(
    "page",
    [
        *("submit.1", "workerd.8", "workerd.toml.5"),
        *("workerd@.service.8", "workerd-metrics.service.8"),
    ],
)
def test_a_manual_page_is_shown_without_a_complaint(unpacked: Path, page: str) -> None:
    need("groff")
    source = manual(unpacked, page)
    shown = subprocess.run(
        ["groff", "-man", "-ww", "-Kutf8", "-Tutf8"], input=source, capture_output=True, text=True
    )
    assert shown.stderr == ""
    assert len(shown.stdout.splitlines()) > 50


def test_every_key_has_its_paragraph_in_the_manual(unpacked: Path) -> None:
    page = manual(unpacked, "workerd.toml.5")
    paragraphs = set(re.findall(r"\n\.TP\n\\fB(\w+)\\fR\n", page))
    listed = re.findall(r"(?m)^\| `(\w+)` \|", (CHECKOUT / "docs/configuration.md").read_text())
    assert "ack_timeout" in listed
    assert paragraphs == set(listed)


TYPED = pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("workerd ch", "check"),
        ("workerd dead re", "requeue"),
        ("workerd run --det", "--detach"),
        ("submit --dry", "--dry-run"),
    ],
)


@TYPED
def test_bash_completes_commands_and_options(unpacked: Path, typed: str, offered: str) -> None:
    name = typed.split()[0]
    script = f"""
        source {unpacked}/usr/share/bash-completion/completions/{name}
        COMP_WORDS=({typed}) COMP_CWORD={typed.count(" ")}
        _{name}
        echo "${{COMPREPLY[@]}}"
    """
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert said.stdout.split() == [offered], said.stderr


@TYPED
def test_zsh_completes_commands_and_options(unpacked: Path, typed: str, offered: str) -> None:
    need("zsh")
    name = typed.split()[0]
    # What the line editor would do: keep the words that fit.
    script = f"""
        compadd() {{ shift; print -l -- ${{(M)@:#${{words[CURRENT]}}*}}; }}
        _files() {{ }}
        complete() {{ source {unpacked}/usr/share/zsh/vendor-completions/_{name}; }}
        words=({typed}) CURRENT={typed.count(" ") + 1}
        complete
    """
    said = subprocess.run(["zsh", "-fc", script], capture_output=True, text=True)
    assert said.stdout.split() == [offered], said.stderr


@pytest.mark.parametrize("unit", ["workerd@.service", "workerd.target", "workerd.slice"])
def test_a_line_of_a_unit_can_be_read_on_a_terminal(unit: str) -> None:
    lines = (PACKAGING / "systemd" / unit).read_text().splitlines()
    assert max(map(len, lines)) <= 100
