"""Tags, owner and note of a run: given to `watch`, edited later in a file of their own.

A live training rewrites run.json; what people say of a run must not be lost by that, so edits lie in
`labels.json` beside it. It holds what was edited and nothing else; each entry counts before that of run.json.
"""

from __future__ import annotations

import getpass
import json
import os
import unicodedata
from collections.abc import Iterable
from typing import Any

from .errors import RunError, StoreError
from .store import Store

LABELS = "labels.json"
#: Characters that a tag, an owner's name and a note may have.
TAG, OWNER, NOTE = 64, 100, 10_000


def given_labels(
    tags: str | Iterable[str] | None = None, owner: str | None = None, note: str | None = None
) -> dict[str, Any]:
    """Those that are not None, checked: tags (each once, in order), owner, note.

    Args:
        tags: one, or several. A tag is a word: it has neither spaces nor commas, so that `tag:word` finds it.

    Raises:
        TypeError, ValueError: one is not as described.
    """
    found: dict[str, Any] = {}
    if tags is not None:
        several = [tags] if isinstance(tags, str) else list(tags)
        found["tags"] = list(dict.fromkeys(_tag(tag) for tag in several))
    if owner is not None:
        found["owner"] = _text("owner", owner, OWNER)
    if note is not None:
        found["note"] = _text("note", note, NOTE, lines=True)
    return found


def default_owner() -> str:
    """LAYERWATCH_OWNER if it is set (empty: nobody), else the login name; "" where there is none."""
    name = os.environ.get("LAYERWATCH_OWNER")
    if name is None:
        try:
            name = getpass.getuser()
        except (OSError, KeyError, ImportError):  # a container's user without an entry
            return ""
    return _printable(name).strip()[:OWNER]


def with_labels(info: dict[str, Any], store: Store) -> tuple[dict[str, Any], str | None]:
    """run.json with what was edited since, and what is wrong with labels.json (None: nothing).

    Raises:
        StoreError: the store cannot be read.
    """
    if not info or LABELS not in store.list():
        return info, None
    edited, wrong = _read(store)
    return {**info, **edited}, wrong


def _read(store: Store) -> tuple[dict[str, Any], str | None]:
    """What of labels.json is sound, and what is not."""
    try:
        edited = json.loads(store.read(LABELS))
    except FileNotFoundError:
        return {}, None
    except StoreError:
        raise
    except OSError as error:
        return {}, f"cannot be read ({error.strerror or error}): labels are those of run.json"
    except (ValueError, RecursionError):  # somebody edited it by hand
        return {}, "is damaged: labels are those of run.json; mend it, or remove it to label the run anew"
    if not isinstance(edited, dict):
        return {}, "is damaged: it holds no JSON object; mend it, or remove it to label the run anew"
    found = {k: _printable(v) for k in ("owner", "note") if isinstance(v := edited.get(k), str)}
    tags = edited.get("tags")
    if isinstance(tags, list) and all(isinstance(tag, str) for tag in tags):
        found["tags"] = [_printable(tag) for tag in tags]
    lost = [key for key in ("tags", "owner", "note") if key in edited and key not in found]
    return found, f"is damaged: {', '.join(lost)} cannot be read; mend it, or remove it" if lost else None


def edit_labels(
    store: Store,
    info: dict[str, Any],
    *,
    add: Iterable[str] = (),
    remove: Iterable[str] = (),
    owner: str | None = None,
    note: str | None = None,
) -> dict[str, Any]:
    """Change labels of a run, which may be live; returns them all: tags, owner, note.

    Args:
        store: the run's. info: `Run.info`.
        add, remove: tags. owner, note: new ones; "" empties, None leaves it.

    Raises:
        TypeError, ValueError: a label is not as `given_labels` takes it.
        RunError: run.json cannot be read, or labels.json is damaged: nothing is written; or the folder
            cannot be written. StoreError: the object store cannot be used.
    """
    added = given_labels(add, owner, note)
    more, gone = added.pop("tags"), set(remove)
    edited, wrong = _read(store)
    if not info:
        raise RunError(
            f"expected a run whose run.json can be read, {store.url} has none: labels belong to it"
        )
    if wrong:
        raise RunError(f"expected to add to {store.url}/{LABELS}, but it {wrong}")
    labels = {"tags": [], "owner": "", "note": ""} | {
        key: value for key in ("tags", "owner", "note") if (value := {**info, **edited}.get(key))
    }
    tags = [tag for tag in labels["tags"] if tag not in gone]
    tags += [tag for tag in more if tag not in tags]
    changes = added | ({"tags": tags} if tags != labels["tags"] else {})
    if changes:
        _write(store, edited | changes)
    return labels | changes


def _write(store: Store, edited: dict[str, Any]) -> None:
    try:
        store.put(LABELS, json.dumps(edited, indent=1).encode() + b"\n")
    except StoreError:
        raise
    except OSError as error:
        raise RunError(
            f"expected a run that can be labelled, but {store.url} cannot be written "
            f"({error.strerror or error}): nothing was changed, ask who owns the folder"
        ) from None


def _tag(tag: str) -> str:
    text = _text("a tag", tag, TAG)
    if not text or any(c.isspace() or c == "," for c in text):
        raise ValueError(f'expected tags as words without spaces and commas, such as "lr-sweep", got {tag!r}')
    return text


def _text(what: str, text: str, most: int, *, lines: bool = False) -> str:
    if not isinstance(text, str):
        raise TypeError(f"expected {what} as text, got {type(text).__name__}")
    text = text.strip()
    if len(text) > most:
        raise ValueError(f"expected {what} of at most {most:,} characters, got {len(text):,}")
    if text != _printable(text) or (not lines and "\n" in text):
        kind = "without control characters" if lines else "as one line without control characters"
        raise ValueError(f"expected {what} {kind}, got {text[:80]!r}")
    return text


def _printable(text: str) -> str:
    """Without control characters and what UTF-8 cannot hold; lines and tabs stay."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))
