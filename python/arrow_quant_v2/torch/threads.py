"""The library's loops run on torch's own threads, which spin between torch's operators: threads of ours would have to wait for a processor.

torch's CPU library and our loops share the OpenMP library that torch came with. Where there is none to be found, the library starts threads for each call.
A child of fork() always does, since no OpenMP survives a fork.
"""

from __future__ import annotations

import ctypes
import glob
import os

import torch

from .. import _core


def _symbols():
    """Addresses of what _lend_team takes, as torch's CPU library sees them; None without."""
    for path in glob.glob(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.*")):
        try:
            library = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)  # loaded already; its dependencies are searched too
            return [ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in ("GOMP_parallel", "omp_get_max_threads", "omp_get_thread_num")]
        except (OSError, AttributeError):
            continue
    return None


def lend():
    """Lends torch's threads; False where its OpenMP cannot be found."""
    found = _symbols()
    if found is None:
        return False
    _core._lend_team(*found)
    return True
