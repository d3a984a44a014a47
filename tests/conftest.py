"""What all tests run by pytest share.

Torch's threads sleep while they wait: by default they wait actively, which takes many times as long where others use the processors too.
Ctrl-C reaches the programs under test: a shell starts background jobs with SIGINT ignored, and children inherit that.
"""

import os
import signal

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
