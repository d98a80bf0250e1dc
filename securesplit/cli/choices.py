"""Options that several commands share to choose a task and a template."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

TaskName = Annotated[str | None, typer.Option("--task", help="Format and measures of the data; see `tasks list`.")]
TemplateName = Annotated[str, typer.Option("--template", help="Preset of prompts: plain, fl-glm or fedsea-llama.")]
Ids = Annotated[Path | None, typer.Option("--ids", help="For task xsum: the file of ids.")]
Split = Annotated[str | None, typer.Option("--split", help="For task xsum: train, validation or test.")]
