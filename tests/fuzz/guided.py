"""The process that atheris runs in: one target, so many inputs, then one JSON object on stdout. Started by scripts/fuzz.

Its memory holds the fuzzer's own corpus too; what the parser keeps is measured by replay.py, in a process without a fuzzer.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import atheris

# Atheris 3.0 keeps the result of every comparison of arrays that it watches: 160 bytes each, measured. int8.py has four a call.
with atheris.instrument_imports(include=["securesplit"], exclude=["securesplit.protocol.int8"]):
    from tests.fuzz.targets import TARGETS


def resident() -> int:
    """Bytes of this process in memory, now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Run:
    """Counts inputs and ends the process when there were enough."""

    def __init__(self, name: str, inputs: int) -> None:
        self.name, self.inputs, self.done, self.early = name, inputs, 0, 0
        self.target = TARGETS[name]
        self.started = time.monotonic()

    def __call__(self, data: bytes) -> None:
        """One input."""
        self.target(data)
        self.done += 1
        if self.done == max(1, self.inputs // 10):
            self.early = resident()
        if self.done == self.inputs:
            self.report()

    def report(self) -> None:
        """Print what was found and end; atheris itself never returns."""
        seconds = time.monotonic() - self.started
        result = {
            "target": self.name, "inputs": self.done, "seconds": round(seconds, 1), "per_second": round(self.done / seconds),
            "rss_at_a_tenth": self.early, "rss_at_the_end": resident(),
        }  # fmt: skip
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
        os._exit(0)


def main() -> None:
    """``guided.py TARGET INPUTS CORPUS ARTIFACTS SEED``."""
    name, inputs, corpus, artifacts, seed = sys.argv[1:]
    run = Run(name, int(inputs))
    for number, sample in enumerate(run.target.seeds()):
        Path(corpus, f"seed-{number}").write_bytes(sample)
    options = [
        sys.argv[0], corpus, f"-artifact_prefix={artifacts}/", f"-max_len={run.target.largest}", f"-seed={seed}",
        "-timeout=20", "-rss_limit_mb=2048", "-print_final_stats=0", "-verbosity=0",
    ]  # fmt: skip
    atheris.Setup(options, run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
