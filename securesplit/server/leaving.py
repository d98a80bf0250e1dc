"""What a server leaves when it ends: B's adapters as they are, and each former state that clients' checkpoints name.

    OUT/adapter-middle.safetensors  OUT/former/NAME/adapter-middle.safetensors

With a client's two files any of them joins to one plain PEFT adapter (``securesplit model export-adapter``); a file says in its
facts which state it is, so that A and C of one moment are not joined with B of another.
"""

from __future__ import annotations

from pathlib import Path

from securesplit.learning import table_of
from securesplit.model.export import collect_adapters, save_part_adapters
from securesplit.server.core import ServerCore
from securesplit.server.former import name_of

__all__ = ["leave_middle"]

_FILE = "adapter-middle.safetensors"


def leave_middle(core: ServerCore, model: str, out: Path) -> None:
    """Write them.

    Args:
        core: after its last step.
        model: digest of the model directory's manifest.
        out: made if needed; older files are replaced.

    Raises:
        InputError: SS-1804 when the disk does not take them, SS-1413 for a B without adapters.
    """
    fleet, job = core.engine.fleet, core.job
    states = {name_of(fleet.common.values()).hex(): out}
    states |= {name: out / "former" / name for name in core.former.names if name not in states}
    for name, folder in states.items():
        values = fleet.common.values() if folder == out else core.former.find(bytes.fromhex(name))
        if values is None:
            continue  # Damaged on the disk: the log says so.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with fleet.common.lent(values):
            part = collect_adapters(
                core.engine.middle, model=model, table=table_of(job), lengths=job.adapters.any_dora, middle=name
            )
        save_part_adapters(part, folder / _FILE)
