"""`python -m benchmarks.ring.kept DIRECTORY FILE`: keep a profile as if it had been measured on this machine.

A model is then planned by it without being measured again.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipeload.measuring import profile_store


def main() -> None:
    directory, file = map(Path, sys.argv[1:])
    if profile_store.keep(directory, profile_store.read(file)) is None:
        sys.exit("the cache cannot be written")


if __name__ == "__main__":
    main()
