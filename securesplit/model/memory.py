"""How much memory this process holds, for reports of what a client needs."""

from __future__ import annotations

import psutil

__all__ = ["resident_bytes"]


def resident_bytes() -> int:
    """Resident set size of this process, in bytes.

    Pages of memory-mapped weights count as soon as they were read, although processes on one machine share them.
    """
    return int(psutil.Process().memory_info().rss)
