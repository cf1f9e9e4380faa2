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


def said(videos: str) -> str:
    code = WATCH.format(videos=videos)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    return done.stderr


def test_a_rank_that_hangs_in_a_video_reports_before_those_that_wait_for_it() -> None:
    assert re.search(
        r"rank 1 ends: no progress for \d+ s \(faults.timeout_seconds\), while decoding a.mp4;", said("['a.mp4']")
    )
    waited = re.search(r"rank 1 ends: no progress for (\d+) s .*, with no video being decoded;", said("[]"))
    assert waited
    assert int(waited[1]) >= 3
