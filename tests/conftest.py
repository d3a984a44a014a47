"""Torch's threads sleep while they wait: by default they wait actively, which takes many times as long where others use the processors too."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
