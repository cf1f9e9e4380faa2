"""The watchdog: which of several silent ranks reports first."""

from __future__ import annotations

import re
import subprocess
import sys

WATCH = """
import time
import mgtrain.processes.watchdog as watchdog
watchdog.WAITS_LONGER = 3.0
dog = watchdog.Watchdog(1.0, rank=1)
with dog.looking_at(lambda: {videos}), dog.on_watch():
    dog.beat()
    time.sleep(60)
"""


def test_a_rank_that_hangs_in_a_video_reports_before_those_that_wait_for_it() -> None:
    commands = [[sys.executable, "-c", WATCH.format(videos=videos)] for videos in ("['a.mp4']", "[]")]
    watched = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    hangs, waits = (process.communicate(timeout=60)[1] for process in watched)
    assert [process.returncode for process in watched] == [1, 1]
    assert re.search(r"rank 1 ends: no progress for \d+ s \(faults.timeout_seconds\), while decoding a.mp4;", hangs)
    waited = re.search(r"rank 1 ends: no progress for (\d+) s .*, with no video being decoded;", waits)
    assert waited
    assert int(waited[1]) >= 3
