"""`python -m benchmarks.ring.busy CORE SHARE`: take a share of a core from all other programs, a millisecond at a time.

What is left behaves as a slower core does. Ends with SIGTERM.
"""

from __future__ import annotations

import os
import sys
import time

_PERIOD_S = 0.001


def main() -> None:
    core, share = int(sys.argv[1]), float(sys.argv[2])
    os.sched_setaffinity(0, {core})
    # Before all programs that are not of this class.
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    begin = time.perf_counter()
    while True:
        while time.perf_counter() - begin < share * _PERIOD_S:
            pass
        begin += _PERIOD_S
        time.sleep(max(0.0, begin - time.perf_counter()))
        # What was slept too long is not made up for.
        begin = max(begin, time.perf_counter() - _PERIOD_S)


if __name__ == "__main__":
    main()
