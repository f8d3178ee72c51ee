"""How large the log is: bytes per row, beside TensorBoard's event file and wandb's offline file.

    python benchmarks/log_size.py [--captures 100] [--no-peers]

Real trainings, every step captured. The first table is our log with all that `watch` captures: compressed
bytes of the columns of a row of `stats` after compaction, of its histogram alone, and the share of the stored
values of small tensors.

The second table compares. One training, in each step of which all three log the same tensors: every weight
and every gradient. Bytes of the files on disk per histogram:
- layerwatch: the Parquet files of `stats`, footers and checksums included. A row holds, besides the
  histogram, 20 numbers and four texts. The weights before the first step and, at every tenth capture, the
  optimizer's state are rows as well. `folder` is all that the run has on disk: roll-ups, losses, run.json and
  the values of small tensors, too.
- TensorBoard: `SummaryWriter.add_histogram(name, tensor, step)`, its default bins; torch leaves out empty
  bins at both ends.
- wandb: `wandb.watch(model, log="all", log_freq=1)`, 64 bins, offline. It writes each histogram twice, into
  the history and into the summary.

Last, the price of writing ahead: how long the training waits for `LogWriter.stats` of 1,000 real rows, and
their bytes until they are compacted; and the same rows in an Arrow IPC stream, which has no checksums.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from layerwatch import watch
from layerwatch.monitor import LogWriter
from layerwatch.monitor.schema import GIVEN

Build = Callable[[], nn.Module]
Data = Callable[[], Tensor]


def mlp() -> nn.Module:
    layers = [m for _ in range(30) for m in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def cnn() -> nn.Module:
    def block(channels: int, out: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]

    return nn.Sequential(*block(3, 32), *block(32, 64), *block(64, 128), nn.Flatten(), nn.Linear(2048, 10))


CASES: dict[str, tuple[Build, Data]] = {
    "mlp": (mlp, lambda: torch.randn(64, 64)),
    "cnn": (cnn, lambda: torch.randn(16, 3, 32, 32)),
}


class Training:
    """A student that is taught to agree with a fixed teacher."""

    def __init__(self, build: Build, data: Data) -> None:
        torch.manual_seed(0)
        self._teacher, self.student, self._data = build(), build(), data
        self.optimizer = torch.optim.AdamW(self.student.parameters(), 1e-3)

    def step(self) -> Tensor:
        """One step; gradients are left in place."""
        self.optimizer.zero_grad()
        x = self._data()
        loss = nn.functional.cross_entropy(self.student(x), self._teacher(x).argmax(1))
        loss.backward()
        self.optimizer.step()
        return loss


def size(folder: Path, pattern: str = "*") -> int:
    """Bytes of the files below a folder."""
    return sum(p.stat().st_size for p in folder.rglob(pattern) if p.is_file())


def columns(run: Path, table: str) -> tuple[int, dict[str, int]]:
    """Rows and compressed bytes by column of a compacted table."""
    rows, sizes = 0, {}
    for part in (run / table).glob("*.parquet"):
        meta = pq.read_metadata(part)
        rows += meta.num_rows
        for group in range(meta.num_row_groups):
            for place in range(meta.num_columns):
                column = meta.row_group(group).column(place)
                name = column.path_in_schema.partition(".")[0]
                sizes[name] = sizes.get(name, 0) + column.total_compressed_size
    return rows, sizes


def own(build: Build, data: Data, captures: int, run: Path) -> str:
    """Our whole log: a line of the first table."""
    training = Training(build, data)
    with watch(training.student, training.optimizer, run=run, every=1) as watcher:
        for _ in range(captures):
            watcher.log(train_loss=training.step())
    rows, stats = columns(run, "stats")
    values = sum(columns(run, "values")[1].values())
    total, histogram = sum(stats.values()), stats["buckets"] + stats["counts"]
    largest = ", ".join(f"{c} {stats[c] / rows:.1f}" for c in sorted(stats, key=lambda c: -stats[c])[:6])
    return (
        f"{rows:8,} {total / rows:10.0f} {histogram / rows:10.0f} {values / (values + total):8.1%} {largest}"
    )


def compared(build: Build, data: Data, captures: int, folder: Path) -> str:
    """All three logs of one training: a line of the second table."""
    import wandb
    from torch.utils.tensorboard.writer import SummaryWriter

    training = Training(build, data)
    model, names = training.student, [name for name, _ in training.student.named_parameters()]
    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, x_disable_meta=True)
    theirs = wandb.init(project="size", mode="offline", dir=folder, settings=settings)
    theirs.watch(model, log="all", log_freq=1)
    with (
        watch(
            model, training.optimizer, run=folder / "run", every=1,
            activations=False, updates=False, reference=None,
        ) as watcher,
        SummaryWriter(str(folder / "tensorboard")) as writer,
    ):  # fmt: skip
        for step in range(captures):
            loss = training.step()
            watcher.log(train_loss=loss)
            for name, parameter in model.named_parameters():
                writer.add_histogram(name, parameter, step)
                writer.add_histogram(f"{name}.grad", parameter.grad, step)
            writer.add_scalar("train_loss", loss, step)
            theirs.log({"train_loss": loss.item()})
    theirs.finish()
    rows = columns(folder / "run", "stats")[0]
    logged = 2 * len(names) * captures
    assert rows >= logged, (rows, logged)
    mine = size(folder / "run" / "stats") / rows
    peers = [size(folder / "tensorboard") / logged, size(folder, "*.wandb") / logged]
    return (
        f"{logged:10,} {mine:11.0f} {size(folder / 'run') / rows:7.0f} {peers[0]:12,.0f} {peers[1]:7,.0f}"
        f" {peers[0] / mine:12.0f} {peers[1] / mine:7.0f}"
    )


def writing_ahead(run: Path, folder: Path, rounds: int = 60) -> str:
    """What 1,000 rows of this run cost before they are compacted: milliseconds and bytes per row."""
    (part,) = (run / "stats").glob("*.parquet")
    found = pq.read_table(part).slice(0, 1000).select(GIVEN["stats"].names).cast(GIVEN["stats"])
    batch = found.combine_chunks().to_batches()[0]
    batches = [
        batch.set_column(0, GIVEN["stats"].field("step"), pa.array([step] * 1000, pa.int64()))
        for step in range(rounds)
    ]
    log = LogWriter(folder / "ahead", {"name": "ahead"})
    mine = statistics.median(timed(log.stats, b) for b in batches)
    ours = size(folder / "ahead" / "wal") / rounds / 1000
    log.close()
    with pa.OSFile(str(folder / "stream"), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as stream:
        plain = statistics.median(timed(stream.write_batch, b) for b in batches)
    theirs = size(folder, "stream") / rounds / 1000
    return f"layerwatch {mine:.2f} ms, {ours:.0f} bytes/row; Arrow IPC stream {plain:.2f} ms, {theirs:.0f}"


def timed(call: Callable[[pa.RecordBatch], object], batch: pa.RecordBatch) -> float:
    start = time.perf_counter()
    call(batch)
    return (time.perf_counter() - start) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--captures", type=int, default=100, help="captured steps (default: %(default)s)")
    parser.add_argument("--no-peers", action="store_true", help="without TensorBoard and wandb")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        print(f"{'model':6} {'rows':>8} {'bytes/row':>10} {'histogram':>10} {'values':>8} largest columns")
        for name, case in CASES.items():
            print(f"{name:6} {own(*case, options.captures, folder / name / 'own')}", flush=True)
        if not options.no_peers:
            print(
                f"\n{'model':6} {'histograms':>10} {'bytes: ours':>11} {'folder':>7} {'TensorBoard':>12}"
                f" {'wandb':>7} {'TensorBoard/':>12} {'wandb/':>7}"
            )
            for name, case in CASES.items():
                print(f"{name:6} {compared(*case, options.captures, folder / name)}", flush=True)
        print(f"\n1,000 rows written ahead: {writing_ahead(folder / 'mlp' / 'own', folder)}")


if __name__ == "__main__":
    main()
