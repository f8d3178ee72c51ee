"""run.json: who, when, where, which tensors. Checked, and done without where it is damaged."""

from __future__ import annotations

import json
import os
import re
import threading
import zlib
from pathlib import Path
from typing import Any

from .errors import RunError, StoreError
from .schema import SCHEMA_VERSION, SCHEMAS
from .store import Store

_CHECKSUM = re.compile(rb'^ "checksum": "([0-9a-f]{8})",\n', re.MULTILINE)
_NUMBER = (int, float, type(None))
#: What readers rely on, where it is there; format version 1 had no checksum.
_TYPES: dict[str, tuple[type, ...]] = {
    "created": _NUMBER,
    "ended": _NUMBER,
    "notes": (list,),
    "tensors": (list,),
    "modules": (list,),
    "optimizers": (list, type(None)),
    "references": (dict, type(None)),
    "versions": (dict, type(None)),
}
_ENTRIES: dict[str, dict[str, tuple[type, ...]]] = {
    "tensors": {
        "tensor": (str,),
        "names": (list,),
        "role": (str,),
        "shape": (list,),
        "elements": (int,),
        "dtype": (str,),
        "module": (str,),
        "module_type": (str,),
        "state": (str, type(None)),
    },
    "modules": {"module": (str,), "type": (str,)},
}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write whole, then rename: a reader sees the old file or the new one.

    The second line is `"checksum"`: the CRC-32, 8 hexadecimal digits, of the text without that line.
    """
    text = json.dumps(content, indent=1, default=str)
    checksum = f' "checksum": "{zlib.crc32(text.encode()):08x}",\n'
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    temporary.write_text(text.replace("{\n", "{\n" + checksum, 1))
    os.replace(temporary, path)


def describe(store: Store) -> tuple[dict[str, Any], str | None]:
    """The content of a run's run.json, and what is wrong with it (None: nothing).

    Of a damaged one nothing is taken: the run is read from its tables alone.

    Raises:
        RunError: the folder holds no run, or a newer layerwatch wrote it.
        StoreError: the store cannot be read.
    """
    info: Any = None
    content = b""
    try:
        content = store.read("run.json")
        info = json.loads(content)
        wrong = "is damaged"
    except FileNotFoundError:
        wrong = "is missing"
        content, info = _of_a_rank(store)
    except StoreError:
        raise
    except OSError as error:
        wrong = f"cannot be read ({error.strerror or error})"
    except (ValueError, RecursionError):
        wrong = "is damaged"
    if not isinstance(info, dict) or not _is_sound(info, content):
        if any(store.list(folder) for folder in ("wal", *SCHEMAS)):
            return {}, f"{wrong}: the run is read from its tables alone"
        raise _no_run(store, wrong)
    if info["schema_version"] > SCHEMA_VERSION:
        raise RunError(
            f"{store.url} has log format {info['schema_version']}, this layerwatch reads up to "
            f"{SCHEMA_VERSION}: upgrade layerwatch"
        )
    info.pop("checksum", None)
    return info, None


def _of_a_rank(store: Store) -> tuple[bytes, Any]:
    """What another rank tells of a run that the first one never wrote: content and what is in it."""
    for name in sorted(store.list("ranks")):
        try:
            content = store.read(f"ranks/{name}")
            return content, json.loads(content)
        except (OSError, ValueError):
            continue
    return b"", None


def _no_run(store: Store, wrong: str) -> RunError:
    if store.path is not None and not store.path.exists():
        return RunError(
            f"expected a run folder, but {store.url} does not exist: "
            "check the path, or list runs with `layerwatch runs`"
        )
    if wrong == "is missing" or (store.path is not None and not store.path.is_dir()):
        return RunError(
            f"expected a run folder with a run.json, but {store.url} has none: "
            "give the folder passed to watch(run=...)"
        )
    return RunError(f"{store.url}/run.json {wrong}, and there are no tables: restore the run from a copy")


def _is_sound(info: dict[str, Any], content: bytes) -> bool:
    version = info.get("schema_version")
    if type(version) is not int:
        return False
    agrees = checksum_agrees(content)
    if agrees is not None:
        return agrees
    return version > SCHEMA_VERSION or (version == 1 and _is_well_formed(info))


def checksum_agrees(content: bytes) -> bool | None:
    """Whether what `write_json` wrote is as it was; None: it holds no checksum."""
    found = _CHECKSUM.search(content)
    if found is None:
        return None
    return zlib.crc32(content[: found.start()] + content[found.end() :]) == int(found[1], 16)


def _is_well_formed(info: dict[str, Any]) -> bool:
    if not all(isinstance(info[name], types) for name, types in _TYPES.items() if name in info):
        return False
    return all(
        isinstance(entry, dict) and all(isinstance(entry.get(name), types) for name, types in fields.items())
        for table, fields in _ENTRIES.items()
        for entry in info.get(table, [])
    )
