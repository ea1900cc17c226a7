"""The application's own virtual environment, also of another Python than the daemon's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import pythons
from tests.harness.pools import do, do_all, job, python
from workerd.check.offline import check
from workerd.config.model import Settings
from workerd.core.job import Outcome

CODE = """
import asyncio, logging, sys
import dependency
from elsewhere import linked
from workerd import Reject, Retry

def f(job):
    print("printed")
    logging.warning("logged")
    if job.body == b"reject":
        raise Reject("no")
    if job.body == b"end":
        raise SystemExit(1)
    return [list(sys.version_info[:2]), dependency.name, linked, sys.prefix]

async def g(job):
    asyncio.ensure_future(asyncio.sleep(600))
    await asyncio.sleep(0.01)
    return "awaited"
"""


@pytest.fixture(params=[sys.executable, *pythons.others()], ids=lambda name: Path(name).name)
def interpreter(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """That of a virtual environment, with a dependency, a .pth file, and no workerd."""
    found = pythons.environment(request.param, tmp_path / "venv")
    (packages,) = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    (packages / "dependency.py").write_text("name = 'installed'")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "elsewhere.py").write_text("linked = 'by a .pth file'")
    (packages / "link.pth").write_text(f"{tmp_path / 'elsewhere'}\n")
    return found


def test_a_function_runs_in_its_own_virtual_environment(interpreter: Path, tmp_path: Path) -> None:
    settings = python(tmp_path, CODE, interpreter=interpreter)
    asked = "import sys; print(list(sys.version_info[:2]))"
    version = subprocess.run([interpreter, "-c", asked], capture_output=True, check=True).stdout

    ran = do_all(settings, job())
    assert ran.report.outcome is Outcome.DONE, ran.report.error
    prefix = str(tmp_path / "venv")
    expected = [json.loads(version), "installed", "by a .pth file", prefix]
    assert json.loads(ran.report.output) == expected
    assert (ran.lines(), ran.lines("log")) == (["printed"], ["logged"])

    assert do(settings, job(b"reject")).reason == "rejected"
    ended = do_all(settings, job(b"end"), job()).report
    assert ended.outcome is Outcome.DONE
    assert do(python(tmp_path, CODE, "g", interpreter=interpreter), job()).output == b"awaited"


def test_check_imports_with_the_same_interpreter(
    interpreter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whoever owns the folders that lead to it.
    monkeypatch.setattr("workerd.check.programs.objections", lambda *_: [])
    well = python(tmp_path, CODE, interpreter=interpreter)
    assert check(Settings(handlers={"test": well})) == []
    (problem,) = check(
        Settings(handlers={"test": python(tmp_path, CODE, "h", interpreter=interpreter)})
    )
    assert problem.endswith("AttributeError: module 'app' has no attribute 'h'")
