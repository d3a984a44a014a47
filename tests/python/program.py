"""Runs the program as the tests of exports do, and measures what came out."""

import json
import os
import pathlib
import shutil
import subprocess

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("ARROWQUANT_PROGRAM") or shutil.which("arrowquant") or str(ROOT / "build" / "release" / "arrowquant")


def arrowquant(*args, code=0):
    """One command; its report, or with another exit code its error."""
    done = subprocess.run([PROGRAM, *map(str, args), "--json"], capture_output=True, text=True)
    assert done.returncode == code, done.stderr + done.stdout
    return json.loads(done.stdout)


def sqnr_db(wanted, got):
    noise = np.square(wanted.astype(np.float64) - got).sum()
    return 10 * np.log10(np.square(wanted.astype(np.float64)).sum() / noise) if noise else np.inf
