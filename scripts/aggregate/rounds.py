"""Rounds of both sides in turns, each in a process of its own, and what they say together."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["compare", "table"]

HERE = Path(__file__).resolve().parent
# One thread on both sides; the CPU seconds would count idle spinning threads too.
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1")


def compare(
    flower_python: str | None, *, clients: int, dim: int, threshold: int, repeats: int, seed: int, sparse: bool
) -> dict[str, Any]:
    """Run ours, theirs, ours, theirs, ... and put the figures together; without ``flower_python`` ours alone.

    Raises:
        RuntimeError: a run failed or its result was wrong.
    """
    sides = {"ours": sys.executable} | ({"flower": flower_python} if flower_python else {})
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    loads = []
    for turn in range(repeats):
        for name, python in sides.items():
            loads.append(os.getloadavg()[0])
            case = [clients, dim, threshold, seed + turn, int(sparse)]
            run = _run(python, HERE / f"{name}.py", [str(n) for n in case])
            runs[name].append(run)
            print(f"{turn + 1}/{repeats} {name}: {run['cpu_seconds']:.2f} CPU s", file=sys.stderr, flush=True)
    ours = [run["cpu_seconds"] for run in runs["ours"]]
    theirs = [run["cpu_seconds"] for run in runs.get("flower", [])]
    ratios = [b / a for a, b in zip(ours, theirs, strict=False)]
    return {
        "clients": clients,
        "dim": dim,
        "threshold": threshold,
        "graph": "sparse" if sparse else "complete",
        "ratio": {"min": min(ratios), "median": statistics.median(ratios)} if ratios else None,
        **{name: _summary(found) for name, found in runs.items()},
        "cpu": _cpu(),
        "load": [round(load, 2) for load in loads],
    }


def _run(python: str, script: Path, arguments: list[str]) -> dict[str, Any]:
    done = subprocess.run(
        [python, str(script), *arguments], env=os.environ | THREADS, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{script.name} failed:\n{done.stderr[-2000:]}")
    run: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if not run["correct"]:
        raise RuntimeError(f"{script.name}: the mean is wrong by {run['max_abs_error']:g}")
    return run


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    varying = {"cpu_seconds", "wall_seconds", "max_abs_error"}
    same = {key: value for key, value in runs[-1].items() if key not in varying}
    return {
        "cpu_seconds": [round(run["cpu_seconds"], 4) for run in runs],
        "wall_seconds": [round(run["wall_seconds"], 4) for run in runs],
        "max_abs_error": max(run["max_abs_error"] for run in runs),
        **same,
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def table(results: list[dict[str, Any]]) -> str:
    """A markdown table, one row per result, and under what it was measured."""
    lines = [
        "| clients x d | graph | ours, CPU s | Flower, CPU s | ratio, least (median) | ours, B/param up | Flower | ours, error | Flower |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        ours, theirs, ratio = result["ours"], result.get("flower"), result["ratio"]
        cells = [
            f"{result['clients']} x {result['dim']:,}",
            f"{result['graph']}, shares to {ours['holders']}",
            _range(ours["cpu_seconds"]),
            _range(theirs["cpu_seconds"]) if theirs else "not run",
            f"**{ratio['min']:.1f}** ({ratio['median']:.1f})" if ratio else "",
            f"{ours['bytes_per_param_up']:.3f}",
            f"{theirs['bytes_per_param_up']:.3f}" if theirs else "",
            f"{ours['max_abs_error']:.1e}",
            f"{theirs['max_abs_error']:.1e}" if theirs else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    sides = [result[name]["versions"] for result in results for name in ("ours", "flower") if name in result]
    versions = sorted({f"{name} {version}" for side in sides for name, version in side.items()})
    loads = [load for result in results for load in result["load"]]
    cpus = sorted({result["cpu"] for result in results})
    lines += ["", f"Measured on {', '.join(cpus)}, load {min(loads)} to {max(loads)}; {', '.join(versions)}."]
    return "\n".join(lines)


def _range(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.2f}" if len(values) == 1 else f"{low:.2f} to {high:.2f} ({len(values)} rounds)"
