"""How fast `layerwatch drift` reads weight files, and how much memory it takes.

    python benchmarks/drift.py --gigabytes 3 --dtype bfloat16

Makes two checkpoints of a decoder-like network of that size each, sharded, reads one with nothing but
`readinto` for the disk's own sequential speed, then compares both in a process of its own; both from the
disk (the page cache emptied, where that is allowed) and from the page cache. Prints the peak resident memory
beside what is promised: the two largest tensors and 200 MB. Starting (imports, loading compiled loops) is
timed apart.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

DTYPES = {"float32": ("F32", np.float32), "bfloat16": ("BF16", np.uint16), "float16": ("F16", np.float16)}
WIDTH, VOCABULARY = 2048, 32_000
CHILD = """
import json, resource, sys, time
import numpy, layerwatch
start = time.perf_counter()
layerwatch.drift({{"w": numpy.ones(1, "f4")}}, {{"w": numpy.ones(1, "f4")}})
loaded = time.perf_counter()
compared = layerwatch.drift({a!r}, {b!r})
end = time.perf_counter()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({{"seconds": end - loaded, "start": loaded - start, "peak": peak}}))
"""


def shapes(gigabytes: float, itemsize: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a decoder of about this size."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    left = gigabytes * 1e9 / itemsize - 2 * VOCABULARY * WIDTH
    layer = 0
    while left > 0:
        parts = {
            **{f"self_attn.{x}_proj.weight": (WIDTH, WIDTH) for x in "qkvo"},
            **{f"mlp.{x}_proj.weight": (4 * WIDTH, WIDTH) for x in ("gate", "up")},
            "mlp.down_proj.weight": (WIDTH, 4 * WIDTH),
            "input_layernorm.weight": (WIDTH,),
        }
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
        left -= sum(int(np.prod(shape)) for shape in parts.values())
        layer += 1
    return found | {"lm_head.weight": (VOCABULARY, WIDTH)}


def write(folder: Path, gigabytes: float, dtype: str, seed: int) -> int:
    """A checkpoint in shards of about 1 GB; returns its bytes. Another seed is a little noise on the same."""
    code, kind = DTYPES[dtype]
    folder.mkdir()
    base, noise = np.random.default_rng(0), np.random.default_rng(seed)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes(gigabytes, np.dtype(kind).itemsize).items():
        if size > 1e9:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += int(np.prod(shape)) * np.dtype(kind).itemsize
    places, total = {}, 0
    pool = (base.standard_normal(1 << 22) * 0.02).astype(np.float32)
    moved = pool + (noise.standard_normal(1 << 22) * 1e-4 if seed else 0).astype(np.float32) if seed else pool  # type: ignore[union-attr]
    stored = (moved.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else moved.astype(kind)
    for place, names in enumerate(shards, 1):
        file = f"model-{place:05}-of-{len(shards):05}.safetensors"
        header, at = {}, 0
        for name, shape in names.items():
            end = at + int(np.prod(shape)) * stored.itemsize
            header[name] = {"dtype": code, "shape": shape, "data_offsets": [at, end]}
            places[name], at = file, end
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            left = at // stored.itemsize
            while left:
                out.write(memoryview(stored[: min(left, len(stored))]))
                left -= min(left, len(stored))
            out.flush()
            os.fsync(out.fileno())
        total += at
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return total


def empty_cache() -> bool:
    """Empty the page cache; False where that is not allowed."""
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def read_all(folders: list[Path]) -> float:
    """Seconds to read every file once, in turn, in pieces of 4 MiB."""
    buffer = bytearray(1 << 22)
    start = time.perf_counter()
    for folder in folders:
        for file in sorted(folder.glob("*.safetensors")):
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gigabytes", type=float, default=3.0, help="of each of the two (default: %(default)g)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="where the files go (default: the temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as scratch:
        a, b = Path(scratch) / "a", Path(scratch) / "b"
        size = write(a, options.gigabytes, options.dtype, 0) + write(b, options.gigabytes, options.dtype, 1)
        largest = VOCABULARY * WIDTH * np.dtype(DTYPES[options.dtype][1]).itemsize
        print(
            f"two checkpoints of {options.dtype}, {size / 1e9:.2f} GB together; "
            f"largest tensor {largest / 1e6:.0f} MB"
        )
        for cold in (True, False):
            for _ in range(options.rounds):
                emptied = cold and empty_cache()
                reading = read_all([a, b])
                if cold and empty_cache() != emptied:
                    raise RuntimeError("the page cache could be emptied only once")
                out = subprocess.run(
                    [sys.executable, "-c", CHILD.format(a=str(a), b=str(b))],
                    check=True, capture_output=True, text=True,
                )  # fmt: skip
                found = json.loads(out.stdout)
                where = (
                    "disk"
                    if emptied
                    else ("page cache" if not cold else "page cache (it could not be emptied)")
                )
                speed, share = size / found["seconds"] / 1e9, reading / found["seconds"]
                print(
                    f"{where}: read {size / reading / 1e9:.2f} GB/s; drift {speed:.2f} GB/s, {share:.0%}, "
                    f"after {found['start']:.1f} s to start; peak {found['peak'] / 1e6:.0f} MB, "
                    f"promised {2 * largest / 1e6 + 200:.0f} MB"
                )


if __name__ == "__main__":
    main()
