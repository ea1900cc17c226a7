"""`run [WORD…]` plants the bugs whose fault, file or test contains a word; `table` prints them.

A bug is planted in a copy of the checkout, so that nothing here changes. Exits 1 if a bug was not
caught.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.harness.system import image
from tests.harness.trixie import CHECKOUT, root
from tests.mutants.catalogue import Mutant, load, table

# What the tests, and the build of the package, need of a checkout.
PARTS = [
    *("workerd", "tests", "etc", "docs", "packaging"),
    *("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"),
]
# Each starts a RabbitMQ of its own.
SIDE_BY_SIDE = 2


def survives(mutant: Mutant) -> str | None:
    """None when the test catches the bug; otherwise what happened."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder)
        for name in PARTS:
            source = CHECKOUT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists():
                shutil.copy(source, copy / name)
        path = copy / mutant.file
        path.write_text(path.read_text().replace(mutant.find, mutant.replace))
        places = {
            "WORKERD_TEST_TRIXIE": str(root()),
            "WORKERD_TEST_IMAGES": str(image("bookworm").parent),
        }
        result = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", mutant.test],
            cwd=copy,
            env={**os.environ, "CI": "true", **places},
            capture_output=True,
            text=True,
            check=False,
        )
    if result.returncode == 1:
        return None
    return f"pytest exited {result.returncode}\n{result.stdout[-2000:]}{result.stderr[-2000:]}"


def run(words: list[str]) -> int:
    mutants = [
        mutant
        for mutant in load()
        if not words or any(word in f"{mutant.fault} {mutant.file} {mutant.test}" for word in words)
    ]
    survivors = 0
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        for mutant, outcome in zip(mutants, pool.map(survives, mutants), strict=True):
            survivors += outcome is not None
            print("caught " if outcome is None else "MISSED ", mutant.test, "|", mutant.fault)
            if outcome:
                print(outcome)
    print(f"{len(mutants) - survivors} passed, {survivors} failed")
    return 1 if survivors else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["table"]:
        print(table(), end="")
    elif sys.argv[1:2] == ["run"]:
        sys.exit(run(sys.argv[2:]))
    else:
        sys.exit(__doc__)
