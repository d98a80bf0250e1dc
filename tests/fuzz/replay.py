"""What a guided run has found, damaged and played again without the fuzzer: does a parser keep memory? Started by scripts/fuzz.

``replay.py TARGET INPUTS CORPUS SEED`` prints one JSON object with the process's memory after a tenth of the inputs and after
all of them. Caches are filled in the first tenth; what grows after that is kept for every input.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import time
from pathlib import Path

from tests.fuzz.targets import TARGETS


def resident() -> int:
    """Bytes of this process in memory, now."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def damaged(chance: random.Random, data: bytes) -> bytes:
    """None, one or two changes: a byte put in, taken out or exchanged."""
    out = bytearray(data)
    for _ in range(chance.randrange(3)):
        at = chance.randrange(len(out) + 1)
        out[at : at + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
    return bytes(out)


def main() -> None:
    """Play and measure."""
    name, inputs, corpus, seed = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    target, chance = TARGETS[name], random.Random(seed)
    known = [path.read_bytes() for path in sorted(corpus.iterdir())]
    early, started = 0, time.monotonic()
    for number in range(1, inputs + 1):
        target(damaged(chance, known[number % len(known)]))
        if number == max(1, inputs // 10):
            early = resident()
    seconds = time.monotonic() - started
    result = {
        "replayed": inputs, "corpus": len(known), "replay_seconds": round(seconds, 1), "replay_rss_at_a_tenth": early,
        "replay_rss_at_the_end": resident(),
    }  # fmt: skip
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
