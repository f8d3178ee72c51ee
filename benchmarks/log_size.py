"""How large the log is: bytes per histogram row after compaction, and the share of the stored values.

    python benchmarks/log_size.py [--captures 150]

Real trainings, every step captured. Compressed bytes of the columns of the compacted Parquet parts: a row in
all, its histogram alone, and a row in the write-ahead file ("live").
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from layerwatch import watch

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


def train(path: Path, build: Build, data: Data, captures: int) -> int:
    """Teach a student to agree with a fixed teacher; the bytes written ahead before the log was compacted."""
    torch.manual_seed(0)
    teacher, student = build(), build()
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
    with watch(student, optimizer, run=path, every=1) as watcher:
        for _ in range(captures):
            x = data()
            loss = nn.functional.cross_entropy(student(x), teacher(x).argmax(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            watcher.log(train_loss=loss)
        return sum(p.stat().st_size for p in path.rglob("*.wal"))


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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--captures", type=int, default=150, help="captured steps (default: %(default)s)")
    captures = parser.parse_args().captures
    torch.set_num_threads(1)
    print(f"{'model':6} {'rows':>8} {'bytes/row':>10} {'histogram':>10} {'live':>10} {'values':>8} largest")
    for name, (build, data) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            live = train(run, build, data, captures)
            rows, stats = columns(run, "stats")
            values = sum(columns(run, "values")[1].values())
        total = sum(stats.values())
        histogram = stats["buckets"] + stats["counts"]
        largest = sorted(stats, key=lambda c: -stats[c])[:5]
        print(
            f"{name:6} {rows:8,} {total / rows:10.0f} {histogram / rows:10.0f} {live / rows:10.0f} "
            f"{values / (values + total):8.1%} " + ", ".join(f"{c} {stats[c] / rows:.0f}" for c in largest),
            flush=True,
        )


if __name__ == "__main__":
    main()
