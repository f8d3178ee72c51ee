"""TensorBoard's logs as runs: scalars and histograms of event files, written by `LogWriter`."""

from __future__ import annotations

import heapq
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from .errors import RunError, RunExistsError
from .event_files import EventFile, event_folders
from .log import LogWriter
from .rebin import of_proto, of_table
from .schema import GIVEN
from .spans import spans
from .summary import Summary
from .tags import TRAIN, VALIDATION, Names, kind_named, rules

#: Rows that are written at once.
BATCH = 512
#: What a reader of the run has to know about its numbers.
PRECISION = (
    "imported from TensorBoard: histograms were counted in its bins and are spread evenly over ours, so that "
    "quantiles are approximate; what it counted between 0 and 1e-12 is taken as exactly 0"
)
#: SessionLog.START of the event files.
START = 1
_SUMMED = [f.name for f in fields(Summary)]


@dataclass
class Imported:
    """What became of one training."""

    path: Path
    scalars: int = 0
    histograms: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass
class _Part:
    """The event files of one folder: the training's own ("") or one below it, by its name."""

    name: str
    files: list[EventFile]


def import_tensorboard(
    logdir: str | Path,
    out: str | Path,
    *,
    histograms: Sequence[tuple[str, str]] = (),
    scalars: Sequence[tuple[str, str]] = (),
) -> list[Imported]:
    """Make a run of every training below `logdir`, all or none. Needs the package `tensorboard`.

    A folder with event files is a training; so are Keras' `train` and `validation` together. A folder
    directly below that of a training (torch's `add_scalars`) belongs to it. One training becomes the run
    `out`, several become runs below `out` by their folders' names.

    Args:
        logdir: a folder, at any depth above the event files, or one event file. out: must not exist.
        histograms: (regex, kind) of tags; kind is one of `tags.IMPORTED`, and a group `tensor` of the regex
            names the tensor. The first regex that is found in a tag counts; without any, tags that name
            gradients or activations are taken as these, the rest as weights.
        scalars: (regex, name): a scalar's name; \\1 stands for the regex's first group.

    Where an event file begins again at a step that an earlier one of the same folder had passed, the later
    file counts, tag by tag.

    Raises:
        RunError: no event files, a wrong regex or kind, the package is missing. RunExistsError: `out` exists.
    """
    source, target = Path(logdir), Path(out)
    names = (
        rules([(regex, kind_named(kind)) for regex, kind in histograms], "histograms"),
        rules(scalars, "scalars"),
    )
    trainings = _trainings(source)
    if target.exists():
        raise RunExistsError(
            f"expected a run that does not exist yet, but {out} does: choose another name for it"
        )
    if not target.resolve().parent.is_dir():
        raise RunError(f"expected an existing folder for the run, but {target.parent} is none: make it first")
    hidden = target.resolve().with_name(f".{target.name}.{os.getpid()}.tmp")
    results: list[Imported] = []
    try:
        for folder, parts in trainings.items():
            place = Path() if len(trainings) == 1 else folder
            log = _Writer(hidden / place, (target / place).resolve().name, source / folder, Names(*names))
            made = log.write(parts)
            if made.scalars or made.histograms:
                results.append(replace(made, path=target / place))
            else:  # what lies below comes later
                shutil.rmtree(hidden / place)
        if not results:
            raise RunError(f"{logdir} holds neither scalars nor histograms: there is nothing to import")
        os.rename(hidden, target)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return results


def _trainings(logdir: Path) -> dict[Path, list[_Part]]:
    """Folders relative to `logdir`, each with the parts of one training."""
    if logdir.is_file():
        return {Path(): [_Part("", [EventFile(logdir)])]}
    folders = event_folders(logdir)
    if not folders:
        what = "holds none" if logdir.is_dir() else "does not exist"
        raise RunError(
            f"expected a folder with event files (*tfevents*), but {logdir} {what}: give what you give to "
            "tensorboard --logdir"
        )
    found: dict[Path, list[_Part]] = {}
    for folder, files in folders.items():
        pair = folder.name in (*TRAIN, *VALIDATION) and any(folder.parent / t in folders for t in TRAIN)
        inside = folder != logdir and (pair or folder.parent in folders)
        training = (folder.parent if inside else folder).relative_to(logdir)
        found.setdefault(training, []).append(_Part(folder.name if inside else "", files))
    return found


def _cuts(files: Sequence[EventFile]) -> Iterator[tuple[EventFile, dict[str, float]]]:
    """Each file of a folder, and from which step on later ones count instead: by tag, "" means all tags."""
    cut: dict[str, float] = {"": math.inf}
    for file in reversed(files):
        yield file, dict(cut)
        for event in file if file is not files[0] else ():
            if event.session_log.status == START:  # a restart that says so itself
                cut[""] = min(cut[""], event.step)
            for value in event.summary.value:
                cut[value.tag] = min(cut.get(value.tag, math.inf), event.step)


def _events(source: tuple[EventFile, str, dict[str, float]]) -> Iterator[tuple[Any, str, dict[str, float]]]:
    file, part, cut = source
    for event in file:
        yield event, part, cut


class _Writer:
    """Writes one training."""

    def __init__(self, path: Path, name: str, source: Path, names: Names) -> None:
        path.mkdir(parents=True)
        info = {"name": name, "imported_from": str(source), "tensors": [], "modules": []}
        self._log = LogWriter(path, info)
        self._names = names
        self._result = Imported(path)
        self._rows: list[dict[str, Any]] = []
        self._elements: dict[tuple[str, str], int] = {}  # tensor, kind -> elements, in order of appearance
        self._reached: dict[tuple[str, str], int] = {}  # tensor, kind -> last step
        self._plugins: dict[tuple[str, str], str] = {}  # part, tag -> plugin: only a tag's first value tells
        self._notes: Counter[str] = Counter()

    def write(self, parts: Sequence[_Part]) -> Imported:
        """All events of all files, in the order in which they happened."""
        files = [(file, part.name, cut) for part in parts for file, cut in _cuts(part.files)]
        times: list[float] = []
        for event, part, cut in heapq.merge(*map(_events, files), key=lambda item: item[0].wall_time):
            for value in event.summary.value:
                if not times:
                    self._log.begin(event.step)
                times = [times[0] if times else event.wall_time, event.wall_time]
                if event.step < min(cut[""], cut.get(value.tag, math.inf)):
                    self._take(event, part, value)
                else:
                    self._notes[
                        "values were left out, as a later event file has written these steps again"
                    ] += 1
        self._flush()
        notes = [PRECISION] if self._result.histograms else []
        notes += [f"{count:,} {what}" for what, count in self._notes.items()]
        notes += [problem for file, *_ in files for problem in file.problems]
        self._result.notes = notes
        self._log.update_info(tensors=described(self._elements), modules=self._modules(), notes=notes)
        self._log.close()
        self._verify()
        self._log.update_info(created=times[0], ended=times[1]) if times else None
        return self._result

    def _take(self, event: Any, part: str, value: Any) -> None:
        """One value of an event: a scalar, a histogram, or something that runs do not hold."""
        what = value.WhichOneof("value")
        if what == "simple_value":
            self._scalar(event, part, value.tag, value.simple_value)
        elif what == "histo":
            self._histogram(event, part, value.tag, of_proto(value.histo))
        elif what == "tensor":
            told = value.metadata.plugin_data.plugin_name
            plugin = self._plugins.setdefault((part, value.tag), told)
            if plugin == "scalars":
                self._scalar(event, part, value.tag, float(_array(value.tensor).item()))
            elif plugin == "histograms":
                self._notes["TensorFlow 2 histograms hold no sums: their means and norms are estimates"] += 1
                self._histogram(event, part, value.tag, of_table(_array(value.tensor)))
            else:
                self._notes[f"values of the plugin {plugin or 'unknown'} were left out"] += 1
        else:
            self._notes[f"values of type {what} were left out"] += 1

    def _scalar(self, event: Any, part: str, tag: str, value: float) -> None:
        self._log.scalars(event.step, event.wall_time, {self._names.scalar(part, tag): value})
        self._result.scalars += 1

    def _histogram(self, event: Any, part: str, tag: str, summary: Summary) -> None:
        place = tensor, kind = self._names.histogram(part, tag)
        if kind == "skip":
            return
        if event.step <= self._reached.get(place, -1):
            self._notes["histograms were left out, as their tag had reached this step before"] += 1
            return
        self._reached[place] = event.step
        self._elements.setdefault(place, summary.count)
        row = {name: getattr(summary, name) for name in _SUMMED}
        if not summary.finite:
            row["min"] = row["max"] = None
        given = {
            "step": event.step,
            "time": event.wall_time,
            "tensor": tensor,
            "kind": kind,
            "skipped": False,
        }
        self._rows.append({**row, **given})
        self._result.histograms += 1
        if len(self._rows) == BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._log.stats(pa.RecordBatch.from_pylist(self._rows, GIVEN["stats"]))
            self._rows = []

    def _verify(self) -> None:
        """The writer never raises because of the disk, which is right beside a training only."""
        for table, written in (("stats", self._result.histograms), ("scalars", self._result.scalars)):
            parts = spans(self._result.path / table, ".parquet").values()
            if sum(pq.read_metadata(part).num_rows for part in parts) != written:
                raise RunError(
                    "expected room for the run, but it could not be written whole: make room on the disk, "
                    "then try again"
                )

    def _modules(self) -> list[dict[str, str]]:
        return [{"module": t, "type": ""} for t, kind in self._elements if kind == "activation"]


def _array(tensor: Any) -> NDArray:
    from tensorboard.util.tensor_util import make_ndarray

    return make_ndarray(tensor)


def described(elements: dict[tuple[str, str], int]) -> list[dict[str, Any]]:
    """The parameters for run.json; what event files do not tell is inferred from names and sizes.

    A matrix with a bias of n elements has n rows, and a weight as large as its bias is a norm's gain. Without
    a bias the shape is flat.
    """
    sizes = {tensor: n for (tensor, kind), n in reversed(elements.items()) if kind != "activation"}
    found = []
    for tensor, n in reversed(sizes.items()):
        module, _, leaf = tensor.replace("/", ".").rpartition(".")
        bias = sizes.get(tensor[: len(tensor) - len(leaf)] + "bias", 0)
        shape, role = [n], "other"
        if leaf.endswith("bias"):
            role = "bias"
        elif "embed" in tensor.lower():
            role = "embedding"
        elif bias == n:
            role = "norm_gain"
        elif leaf in ("weight", "kernel"):
            role = "matrix"
            shape = [bias, n // bias] if bias and n % bias == 0 else [n]
        found.append(
            {
                "tensor": tensor, "names": [tensor], "role": role, "shape": shape, "elements": n,
                "dtype": "unknown", "module": module, "module_type": "", "trainable": True,
                "state": "trainable",
            }
        )  # fmt: skip
    return found
