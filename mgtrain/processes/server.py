"""Keep the process from which loader processes are forked out of the run's process group; only that process acts on it.

A signal to the group, as by `timeout` or `kill %1`, then reaches the run alone, which still needs its loader to save.
"""

import os
import signal
import sys
from contextlib import suppress

if any("multiprocessing.forkserver" in word for word in sys.orig_argv):
    with suppress(OSError):  # it leads a group already
        os.setsid()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
