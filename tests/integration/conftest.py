"""Runs the program as a person or script does. ARROWQUANT_PROGRAM names it; the default is the release build."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("ARROWQUANT_PROGRAM", str(ROOT / "build/release/arrowquant"))


def clean_environment(**changes):
    """The environment without what would change the program's behaviour, in a UTF-8 locale."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ARROW", "LC_", "LANG", "NO_COLOR", "CLICOLOR", "TERM"))}
    return {**kept, "LANG": "C.UTF-8", **changes}


class Result:
    def __init__(self, process):
        self.code, self.out, self.err = process.returncode, process.stdout, process.stderr

    @property
    def json(self):
        """The one JSON object on stdout; anything beside it fails the test."""
        return json.loads(self.out)


@pytest.fixture
def cli(tmp_path):
    """cli("version", "--json", env={...}) runs in a fresh folder, where nothing may be left behind but what the test names."""

    def run(*args, env=None, cwd=None, timeout=60, **options):
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **options}
        command = [PROGRAM, *(os.fspath(a) for a in args)]
        return Result(subprocess.run(command, env=clean_environment(**(env or {})), cwd=cwd or tmp_path, text=True, timeout=timeout, check=False, **options))

    return run
