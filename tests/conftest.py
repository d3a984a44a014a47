"""What all Python-run tests share: Ctrl-C reaches the programs under test.

A shell starts background jobs with SIGINT ignored, and children inherit that; the tests of interruption need the signal to work wherever they run.
"""

import signal

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
