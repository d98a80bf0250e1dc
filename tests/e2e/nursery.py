"""Lives of one site that all end by kill -9: a script, because it forks, and because a child must die without pytest's help.

    python -m tests.e2e.nursery FOLDER LIVES REGIME SEED

Each life is a fork that opens the same ledger and trains a tiny client from the start. A proxy on its wire appends every
message to ``FOLDER/wire`` before the server gets it. The parent kills the child after a random part of the time that a
whole life takes, which one undisturbed life beside the site has shown, and goes on.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from securesplit.audit.builtin import builtin_policy
from securesplit.audit.cohort import Cohort, Tap
from securesplit.audit.tiny import TinySite
from securesplit.policy.schema import Channel, Policy, Updates
from securesplit.privacy.ledger import Ledger

_FIRST = -1


def policy_of(regime: str) -> Policy:
    """Enough releases for a hundred lives; regimes without gradients have none."""
    base = builtin_policy()
    many = {
        name: (Updates if name == "updates" else Channel)(clip=1.0, share=0.2, releases=20_000)
        for name in ("activations", "gradients", "updates", "generation")
    }
    if regime == "frozen":
        many.update(gradients=None, updates=None)
    privacy = base.privacy.model_copy(update={**many, "regime": regime})
    return Policy.model_validate(base.model_copy(update={"privacy": privacy}).model_dump(mode="json"), strict=False)


def _record(wire: int) -> None:
    send = Tap.send

    def recorded(self: Tap, data: bytes) -> None:
        os.write(wire, len(data).to_bytes(4, "little") + data)
        send(self, data)

    Tap.send = recorded  # type: ignore[method-assign]


def _live(folder: Path, number: int, policy: Policy, born: int) -> None:
    _record(os.open(folder / "wire", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
    Cohort.ledger = lambda self: Ledger(folder / "ledger", anchors=folder / "anchors")  # type: ignore[method-assign]
    site = TinySite(policy, folder / f"life-{number}")
    os.write(born, b"!")
    site.train()
    site.client.generate("a made-up prompt"[: policy.limits.buckets[-1]], max_new_tokens=4)


def main(folder: Path, lives: int, regime: str, seed: int) -> None:
    """Breed and kill."""
    policy, chance = policy_of(regime), random.Random(seed)
    killed, whole = 0, 0.0
    aside = folder / "aside"
    aside.mkdir()
    for number in range(_FIRST, lives):
        ready, born = os.pipe()
        if (child := os.fork()) == 0:
            os.close(ready)
            try:
                _live(aside if number == _FIRST else folder, number, policy, born)
            except BaseException as error:  # noqa: BLE001  # A child must not return into the parent's loop.
                sys.stderr.write(f"life {number}: {type(error).__name__}: {error}\n")
                os._exit(1)
            os._exit(0)
        os.close(born)
        os.read(ready, 1)  # Also returns when the child died before.
        os.close(ready)
        start = time.monotonic()
        if number != _FIRST:
            time.sleep(chance.random() * whole)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        whole = whole or time.monotonic() - start
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
            raise SystemExit(1)
        killed += os.WIFSIGNALED(status)
    sys.stdout.write(f"{killed}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
