"""A Debian 13 root folder with RabbitMQ 4.0 in it: `python -m tests.harness.trixie [FOLDER]`.

About 15 s and 240 MB. The archive is the one that this machine's apt uses. Needs root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


def root() -> Path:
    """Where the root folder is, or is to be."""
    return Path(os.environ.get("WORKERD_TEST_TRIXIE", CHECKOUT / ".cache" / "trixie"))


def make(folder: Path) -> None:
    """Make the root folder unless it is there. It appears complete or not at all."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside its final place, so that the rename stays on one file system.
    workshop = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        subprocess.run(["mmdebstrap", *OPTIONS, "trixie", str(workshop / "root")], check=True)
        (workshop / "root").rename(folder)
    finally:
        shutil.rmtree(workshop)


OPTIONS = [
    "--variant=minbase",
    "--include=rabbitmq-server",
    # Nothing reads these; they are a third of the size.
    "--dpkgopt=path-exclude=/usr/share/doc/*",
    "--dpkgopt=path-exclude=/usr/share/locale/*",
    "--dpkgopt=path-exclude=/usr/share/man/*",
]


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else root())
