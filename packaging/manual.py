"""The manual pages and the completion of the shells: `python3 packaging/manual.py FOLDER`.

Each has one source, which is read anyway: the commands' own --help, docs/configuration.md,
docs/server.md and docs/metrics.md, the comments of the units.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

from workerd import __version__  # noqa: E402
from workerd.cli import main as commands  # noqa: E402

PAGES = (
    *("workerd.8", "submit.1", "workerd.toml.5"),
    *("workerd@.service.8", "workerd-metrics.service.8"),
)


def main(folder: Path) -> None:
    daemon, submit = commands.parser(), commands.submit_parser()
    docs, units = CHECKOUT / "docs", CHECKOUT / "packaging/systemd"
    for page, about, body in (
        ("workerd.8", "a worker daemon for RabbitMQ", of_commands(daemon)),
        ("submit.1", "send a job to a worker daemon", of_command(submit, "")),
        (
            "workerd.toml.5",
            "the configuration of workerd",
            of_markdown((docs / "configuration.md").read_text()),
        ),
        (
            "workerd@.service.8",
            "instances of workerd under systemd",
            [
                *of_markdown((docs / "server.md").read_text()),
                *of_unit((units / "workerd@.service").read_text()),
            ],
        ),
        (
            "workerd-metrics.service.8",
            "metrics of the instances of workerd, for Prometheus",
            [
                *of_markdown((docs / "metrics.md").read_text()),
                *of_unit((units / "workerd-metrics.socket").read_text()),
            ],
        ),
    ):
        (folder / page).write_text("\n".join(framed(page, about, body)) + "\n")
    for parser in (daemon, submit):
        for shell, name, script in (
            ("bash", parser.prog, BASH),
            ("zsh", f"_{parser.prog}", ZSH),
        ):
            (folder / shell).mkdir(exist_ok=True)
            (folder / shell / name).write_text(completion(parser, script))


def framed(page: str, about: str, body: Iterable[str]) -> Iterator[str]:
    """A page, from its name and sections."""
    name, _, section = page.rpartition(".")
    yield f'.TH "{name.upper()}" {section} "" "workerd {__version__}"'
    yield '.SH "NAME"'
    yield f"{text(name)} \\- {about}"
    yield from body
    yield '.SH "SEE ALSO"'
    others = (each.rpartition(".") for each in PAGES if each != page)
    yield ", ".join(f"\\fB{text(other)}\\fR({number})" for other, _, number in others)


# For the shells. Debian 12's shtab offers the first of all commands only.

BASH = """\
_{name}() {{
    local command={name} word offered
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case "$command $word" in
        {commands}) command="$command $word" ;;
        esac
    done
    case "$command" in
{words}
    esac
    COMPREPLY=($(compgen -W "$offered" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
# Where nothing fits, names of files.
complete -o default -F _{name} {name}
"""
ZSH = """\
#compdef {name}
local command={name} word offered
for word in ${{words[2,CURRENT-1]}}; do
    case "$command $word" in
    ({commands}) command="$command $word" ;;
    esac
done
case "$command" in
{words}
esac
compadd -- ${{=offered}}
_files
"""


def completion(parser: argparse.ArgumentParser, script: str) -> str:
    """A shell's script that offers the commands and options of a command."""
    opening = "(" if script is ZSH else ""
    table = dict(offered(parser))
    return script.format(
        name=parser.prog,
        commands=" | ".join(f'"{command}"' for command in table if " " in command) or '""',
        words="\n".join(
            f'    {opening}"{command}") offered="{" ".join(words)}" ;;'
            for command, words in table.items()
        ),
    )


def offered(parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[str]]]:
    """Each command below a parser, and the commands and options that may follow it."""
    below = [command for command, _ in subcommands(parser)]
    names = [command.prog.rpartition(" ")[2] for command in below]
    long = [each for action in parser._actions for each in action.option_strings if each[1] == "-"]
    yield parser.prog, names + long
    for command in below:
        yield from offered(command)


# From a parser


def of_commands(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield from of_command(parser, "")
    for command, _ in subcommands(parser):
        yield from of_command(command, command.prog)
        for below, _ in subcommands(command):
            yield from of_command(below, below.prog)


def subcommands(
    parser: argparse.ArgumentParser,
) -> list[tuple[argparse.ArgumentParser, str]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            about = {each.dest: each.help or "" for each in action._choices_actions}
            return [(command, about.get(name, "")) for name, command in action.choices.items()]
    return []


def of_command(parser: argparse.ArgumentParser, title: str) -> Iterator[str]:
    """The page of a command, or its section in the page of the whole."""

    def heading(words: str) -> str:
        return f'.SS "{words}"' if title else f'.SH "{words.upper()}"'

    yield f'.SH "{text(title)}"' if title else heading("synopsis")
    usage = parser.format_usage().removeprefix("usage: ")
    yield f".B {text(' '.join(usage.split()))}"
    if not title:
        yield heading("description")
    yield ".PP"
    yield text(parser.description or "")
    commands = [(command.prog, about) for command, about in subcommands(parser)]
    described = [*commands, *(options(parser))]
    if described:
        yield heading("commands and options" if commands else "options")
    for name, about in described:
        yield from (".TP", f".B {text(name)}", text(about))
    for line in (parser.epilog or "").splitlines():
        if re.fullmatch(r"\S.*:", line):
            yield from (".fi", heading(line.partition(":")[0].partition(",")[0]), ".nf")
        else:
            yield text(line) if line else ""
    yield ".fi"


def options(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction | argparse._HelpAction):
            continue
        value = f" {action.metavar}" if action.metavar and action.option_strings else ""
        names = ", ".join(name + value for name in action.option_strings)
        yield names or str(action.metavar or action.dest), action.help or ""


# From the comments of a unit


def of_unit(unit: str) -> Iterator[str]:
    comment = unit.partition("\n[Unit]")[0].partition("# HOW TO\n")[2]
    yield '.SH "HOW TO"'
    yield ".nf"
    yield from (text(line.removeprefix("#").removeprefix(" ")) for line in comment.splitlines())
    yield ".fi"


# From Markdown, as far as our pages use it


def of_markdown(page: str) -> Iterator[str]:
    lines = iter(page.splitlines())
    next(lines)  # the title
    yield '.SH "DESCRIPTION"'
    for line in lines:
        if line.lstrip().startswith("```"):
            yield from (".PP", ".RS 4", ".nf")
            for inner in lines:
                if inner.lstrip().startswith("```"):
                    break
                yield text(inner)
            yield from (".fi", ".RE", ".PP")
        elif line.startswith("    "):
            yield from (".PP", ".RS 4", text(line.strip()), ".RE", ".PP")
        elif heading := re.fullmatch(r"(##+) (.*)", line):
            title = inline(heading[2])
            yield f'.SS "{title}"' if len(heading[1]) > 2 else f'.SH "{capitals(title)}"'
        elif line.startswith("|"):
            yield from of_row(line)
        elif item := re.fullmatch(r"(?:-|\d+\.) (.*)", line):
            yield from (r".IP \(bu 3", inline(item[1]))
        else:
            yield inline(line.strip()) or ".PP"


def of_row(row: str) -> Iterator[str]:
    first, *cells = (cell.strip() for cell in row.strip("|").split(" | "))
    if first in ("", "key") or set(first) <= set("-|"):
        return
    if len(cells) == 3:
        kind, default, meaning = cells
        standard = f"; default {default}" if default != "–" else ""
        cells = [f"({kind}{standard})", meaning[:1].upper() + meaning[1:]]
    yield from (".TP", inline(first), inline(" ".join(cells)))


def inline(line: str) -> str:
    """A line with code, emphasis and links."""
    line = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", line)
    parts = re.split(r"(`[^`]*`|\*\*[^*]*\*\*|(?<!\w)\*[^*]*\*)", line)
    shown = (
        f"\\fB{text(part.strip('`*'))}\\fR" if part[:1] in ("`", "*") and part[1:] else text(part)
        for part in parts
    )
    return "".join(shown)


def capitals(title: str) -> str:
    """A title as manual pages have it, unless it is something to be typed."""
    return title if "\\f" in title else title.upper()


def text(line: str) -> str:
    """A line as it is: nothing in it is an instruction to the formatter."""
    escaped = line.replace("\\", r"\e").replace("-", r"\-")
    return rf"\&{escaped}" if escaped[:1] in (".", "'") else escaped


if __name__ == "__main__":
    main(Path(sys.argv[1]))
