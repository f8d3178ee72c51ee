"""`Run`: one training, read from its folder, while it runs or after."""

from __future__ import annotations

import functools
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from . import frames
from .answers import Answers
from .derive import POOLED, columns_of, drift_frame, histogram_frame, needed, stats_frame
from .description import describe
from .frames import Overview
from .labels import LABELS, with_labels
from .process import alive
from .ranks import with_others, world_of
from .reader import LogReader
from .roll_call import CHECKSUM, noise, told_of_ranks, told_of_replicas
from .scan import Between, Where
from .schema import KINDS, ROLLUPS
from .store import Store, store_of

if TYPE_CHECKING:
    from .findings import Finding
    from .normal import Normal

#: A run whose writer cannot be asked counts as live for so long after its last row (seconds).
LIVE_SECONDS = 60.0
KEPT_BYTES = 64 * 2**20  # of answers

Result = TypeVar("Result")
Names = str | Sequence[str] | None


def _cached(method: Callable[..., Result]) -> Callable[..., Result]:
    """Keep a method's answer until `refresh` finds news. Answers are shared: copy before changing them."""

    @functools.wraps(method)
    def answer(self: Run, *args: Any, **named: Any) -> Result:
        given = [(None, a) for a in args] + sorted(named.items())
        key = (method.__name__, *((name, tuple(a) if isinstance(a, list) else a) for name, a in given))
        with self._lock:
            return self._answers.get(key, lambda: method(self, *args, **named))

    return answer


def _kept_as(baselines: Sequence[Run] | Normal) -> tuple[Run, ...] | Normal:
    """As `_cached` can keep it."""
    return tuple(baselines) if isinstance(baselines, Sequence) else baselines


class Run:
    """One training's log.

    Args:
        path: the run folder, as given to `watch(run=...)`, or its URL in an object store; or its store.
        session: show the log as it was when this session (see `sessions`) was the latest.

    Raises:
        RunError: the path is no run, the run holds nothing yet, or a newer layerwatch wrote it.

    Every table is read when asked for and kept until `refresh`, which picks up what a running training has
    added.
    """

    def __init__(self, path: str | Path | Store, session: int | None = None) -> None:
        store = store_of(path)
        self.path = store.path or Path(store.url)
        self.url, self.name = store.url, store.name
        self._lock = threading.RLock()
        self._answers = Answers(KEPT_BYTES)
        self.info, self._damage = self._describe(store)
        self._log = LogReader(store, session)
        self._seen = self._log.generation

    @staticmethod
    def _describe(store: Store) -> tuple[dict[str, Any], dict[str, str]]:
        """What is told of the run, and the files that are damaged: what is wrong with each."""
        info, wrong = describe(store)
        info, unlabelled = with_labels(with_others(info, store), store)
        return info, {name: what for name, what in (("run.json", wrong), (LABELS, unlabelled)) if what}

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, last_step={self.last_step}, live={self.live})"

    @property
    def live(self) -> bool:
        """A process is still writing."""
        if self.info.get("closed"):
            return False
        if self.info.get("host") == socket.gethostname():
            return alive(self.info.get("pid"), self.info.get("process_started"))
        store = self._log.store
        if store.path is None:  # the uploader writes it every 30 s
            return time.time() - (store.modified("alive") or 0.0) < 2 * LIVE_SECONDS
        newest = max((store.modified(f"wal/{name}") or 0.0 for name in store.list("wal")), default=0.0)
        return time.time() - newest < LIVE_SECONDS

    @property
    def problems(self) -> dict[str, str]:
        """Damaged files of this run, by name: what is wrong with each. What is whole in them is read."""
        return {**self._damage, **self._log.problems}

    def refresh(self) -> bool:
        """Look at the disk again; True when something new arrived."""
        info, damage = self._describe(self._log.store)
        with self._lock:
            self._log.refresh()
            news = self._log.generation != self._seen or (info, damage) != (self.info, self._damage)
            if news:
                self.info, self._damage, self._seen = info, damage, self._log.generation
                self._answers.clear()
        return news

    def fingerprint(self) -> str:
        """Changes when the log has grown: a key for caches."""
        return f"{self.info.get('created')}:{self.info.get('closed')}:{self._log.fingerprint()}"

    @property
    def last_step(self) -> int:
        """The last step with a row, -1 when there is none."""
        return self._last_step()

    @_cached
    def _last_step(self) -> int:
        return max(self._log.latest(name) for name in ("stats", "scalars"))

    @_cached
    def kinds(self) -> list[str]:
        """The kinds of rows this run holds."""
        present = self._present("kind")
        return [kind for kind in KINDS if kind in present]

    @_cached
    def names(self, kind: str) -> list[str]:
        """The tensors or modules that have rows of this kind, in order of definition."""
        return frames.in_order(self._present("tensor", {"kind": [kind]}), self._names())

    def _present(self, column: str, where: Where | None = None) -> set[str]:
        return set().union(*(self._log.distinct(table, column, where) for table in ("stats", *ROLLUPS)))

    @_cached
    def scalar_names(self) -> list[str]:
        """Names of the logged scalars, sorted."""
        return sorted(self._log.distinct("scalars", "name"))

    @_cached
    def scalars(self, name: str, *, steps: tuple[int | None, int | None] | None = None) -> pd.DataFrame:
        """One scalar: step, time (unix seconds), value; by step. Empty when it was never logged.

        Args:
            steps: only those from the first to the last of these; None is open.
        """
        where: dict[str, Sequence[str] | Between] = {"name": [name]}
        if steps is not None:
            where["step"] = Between(*steps)
        rows = self._log.table("scalars", ["step", "time", "value"], where, coded=True)
        return rows.to_pandas().sort_values(["step", "time"], kind="stable", ignore_index=True)

    @_cached
    def tensors(self) -> pd.DataFrame:
        """The parameters in order of definition: tensor, names (aliases), role, shape, elements, dtype,
        module, module_type, depth, trainable, state (the latest recorded)."""
        columns = [
            "tensor", "names", "role", "shape", "elements", "dtype", "module", "module_type", "depth",
            "trainable", "state",
        ]  # fmt: skip
        entries = self.info.get("tensors", []) if self.info else frames.found_tensors(self._log)
        frame = pd.DataFrame([{**e, "depth": depth} for depth, e in enumerate(entries)], columns=columns)
        states = frames.latest_states(self._log, list(frame["tensor"]))
        frame["state"] = [states.get(t, s) for t, s in zip(frame["tensor"], frame["state"], strict=True)]
        return frame

    @_cached
    def modules(self) -> pd.DataFrame:
        """The leaf modules, in order of definition: module (the `tensor` of activation rows), type, depth."""
        rows = [{**entry, "depth": depth} for depth, entry in enumerate(self.info.get("modules", []))]
        return pd.DataFrame(rows, columns=["module", "type", "depth"])

    @_cached
    def stats(
        self,
        kind: str,
        tensor: Names = None,
        columns: Sequence[str] | None = None,
        *,
        steps: tuple[int | None, int | None] | None = None,
        max_points: int | None = None,
    ) -> pd.DataFrame:
        """Statistics by tensor (in order of definition), then step.

        Args:
            kind: weight, initial_weight, gradient, update or activation; an unknown kind gives an empty
                frame.
            tensor: one name, several, or None for all.
            columns: only these, in this order. Without quantiles no histogram is read: much faster over many
                tensors.
            steps: only rows with a capture from the first to the last of these; None is open.
            max_points: at most about so many rows of each tensor: rows then hold several captures each, so
                that a long run is shown at once. Sums and counts are those of all captures of a row, `norm`
                the root mean square; nothing that happened in one capture is lost in `norm_max`, `ratio_max`,
                `min`, `max` and the counts.

        Returns:
            step, time, tensor, count, mean, std, norm, rms, min, max, p01 .. p99, zeros, subnormals, nans,
            infs, skipped, state. Quantiles come from the histogram: exact to its bucket, a factor of at most
            1.25. And by kind:
            gradient: stage, units, active_units; underflow and overflow, the shares of the elements that a
            conversion to float16 would make zero (0 < |x| < 2^-25) and infinite (|x| >= 2^16), exact but for
            elements on the last step before these edges.
            update: lost (elements), lost_share; ratio = |update| / |weight before the step|; along, the
            cosine between the two, and with it the update's part along the weight, `parallel` (signed: decay
            is negative), and the length of the rest, `perpendicular`.
            activation: samples, units, active_units.
            second_moment: rms_ratio = sqrt(mean g^2 / v), the size of the gradient against what the optimizer
            divides it by; below_epsilon, the share of the elements with sqrt(v) < eps.
            When asked for: captures, how many a row holds (more than one with `max_points`, and of old steps
            in a log that was written with keep="rollup"); last_step, of its last capture; norm_min, norm_max,
            ratio_max, the extremes of a single capture.
        """
        wanted = list(columns or columns_of(kind))
        known = columns_of(kind) + POOLED
        if unknown := set(wanted) - set(known):
            raise ValueError(f"expected columns of {kind} rows, got {sorted(unknown)}: choose among {known}")
        table = self._rows(kind, tensor, needed(wanted), steps, max_points)
        return stats_frame(table, kind, wanted).iloc[self._order(table)].reset_index(drop=True)

    def sums(
        self, kind: str, columns: Sequence[str], since: int | None = None, until: int | None = None
    ) -> pa.Table:
        """Stored columns of a kind (or "drift"), from step `since` to `until`: rows in no order, strings as
        Arrow dictionaries. What `stats` derives from, for who reads millions of rows."""
        return self._rows(kind, None, columns, None if since is until is None else (since, until))

    @_cached
    def overview(self, kind: str, number: str = "norm", max_points: int = 512) -> Overview:
        """One number of all tensors over the whole run, in at most about `max_points` columns.

        Args:
            number: one of `frames.OVERVIEW`: norm, ratio, rms, mean, std, min, max, zeros, nans, infs.

        Returns:
            steps and last_steps (n,), tensors (in order of definition), values (tensors, n) and highest
            (tensors, n), the highest value of a single capture: see `frames.Overview`.
        """
        return frames.overview(self._log, kind, number, max_points, self._names())

    @_cached
    def sessions(self) -> pd.DataFrame:
        """The starts of this training: session, first_step, time (unix seconds), superseded_from: the first
        of its steps that a later session has done again (null: none). Those rows are in the log, and shown
        by `Run(path, session=...)` only."""
        return frames.sessions(self._log)

    @_cached
    def drift(
        self,
        tensor: Names = None,
        *,
        steps: tuple[int | None, int | None] | None = None,
        max_points: int | None = None,
    ) -> pd.DataFrame:
        """Distance from the reference (`info["reference"]`), by tensor, then step.

        Args:
            steps, max_points: as for `stats`; of several captures the distances are root mean squares.

        Returns:
            step, time, tensor, relative_l2 = |w - r| / |r|, cosine, sign_flips, count, distance = |w - r|,
            reference_norm = |r|. Of a reference that is all zeros relative_l2 and cosine are NaN.
            `info["references"]` states the error of each tensor; of a sketch sign_flips is NaN.
        """
        columns = [
            "step", "time", "tensor", "captures", "count", "sum_sq", "ref_sum_sq", "dot", "residual_sq",
            "sign_flips",
        ]  # fmt: skip
        table = self._rows("drift", tensor, columns, steps, max_points)
        return drift_frame(table).iloc[self._order(table)].reset_index(drop=True)

    @_cached
    def anchors(self) -> list[int]:
        """The steps whose weights, as they were after the step, `drift_between` can compare."""
        rows = self._log.table("values", ["step"], {"kind": ["sketch"]})
        return sorted(rows["step"].unique().to_pylist())

    def drift_between(self, step_a: int | str, step_b: int | str, other: Run | None = None) -> pd.DataFrame:
        """How far every tensor moved from one anchor to another, or lies from its counterpart in `other`.

        Args:
            step_a: one of this run's `anchors`, or "initial" for the weights before the first step.
            step_b: the same, of `other` if that is given: a run of the same architecture.

        Returns:
            tensor, relative_l2 = |b - a| / |a|, distance = |b - a|, cosine, error, in order of definition:
            the tensors that both hold in one size. `distance` comes from sketches: in 95 of 100 cases it is
            off by at most error x distance. Tensors of up to 4,096 elements are exact, their error is 0.

        Raises:
            ValueError: a step is no anchor.
        """
        from .sketch import anchor, between

        second = other or self
        here, there = anchor(self, self._log, step_a), anchor(second, second._log, step_b)
        sizes = {
            t["tensor"]: t["elements"] * (2 if str(t["dtype"]).startswith("complex") else 1)
            for t in self.info.get("tensors", [])
        }
        return between(here, there, sizes)

    def histogram(self, kind: str, tensor: str, step: int | None = None) -> pd.DataFrame:
        """One histogram: low, high, count per non-empty bucket, ascending; zeros are (0, 0), subnormals one
        row too.

        Args:
            step: the last captured step at or before it is taken; None means the latest.
        """
        rows = self.stats(kind, tensor, ["step"], steps=None if step is None else (None, step))
        at = int(rows["step"].iloc[-1]) if len(rows) else -1
        frame = self.histograms(kind, tensor, steps=(at, at))
        return frame.loc[frame["step"] == at, ["low", "high", "count"]].reset_index(drop=True)

    @_cached
    def histograms(
        self,
        kind: str,
        tensor: str,
        max_steps: int | None = None,
        *,
        steps: tuple[int | None, int | None] | None = None,
        max_points: int | None = None,
    ) -> pd.DataFrame:
        """All histograms of a tensor, long form: step, low, high, count.

        Args:
            max_steps: thin evenly to so many steps; the first and the last are kept.
            steps, max_points: as for `stats`. A histogram of several captures holds the elements of all.
        """
        columns = ["step", "zeros", "subnormals", "buckets", "counts"]
        table = self._rows(kind, tensor, columns, steps, max_points)
        return frames.thinned(histogram_frame(table.sort_by("step")), max_steps)

    @_cached
    def values(self, tensor: str, kind: str = "weight") -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Stored values of a small tensor: steps (n,), values (n, elements). May be thinner than `stats`.

        Args:
            kind: what else is stored of a module, per unit or head: dead_share, saturated_share,
                attention_entropy, attention_logit; of an adapted weight adapter_stable_rank.
        """
        return frames.stored_values(
            self._log, tensor, ["weight", "initial_weight"] if kind == "weight" else [kind]
        )

    @_cached
    def stored_kinds(self) -> set[str]:
        """The kinds of values that are stored: see `values`."""
        return self._log.distinct("values", "kind") - {CHECKSUM}

    @_cached
    def unit_means(self, kind: str) -> pd.DataFrame:
        """What `values` holds of modules, the mean over units at each capture: tensor, step, value."""
        return frames.unit_means(self._log, kind, self._names())

    @_cached
    def activity(
        self, kind: str, tensor: str, *, max_points: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Which units were active: steps (n,), bool (n, units); with `max_points` in any of several captures.

        A unit of an activation is active when its output was not zero for some sample; a unit of a gradient
        when some element of its row of the weight received a nonzero gradient.
        """
        columns = ["step", "units", "active"]
        return frames.active_units(self._rows(kind, tensor, columns, None, max_points).select(columns))

    @_cached
    def events(self) -> pd.DataFrame:
        """What happened to the run itself: step, time, event, message."""
        return (
            self._log.table("events", ["step", "time", "event", "message"])
            .to_pandas()
            .sort_values(["time", "step"], kind="stable", ignore_index=True)
        )

    @_cached
    def ranks(self) -> pd.DataFrame:
        """The processes that wrote this run: rank, host, pid, closed, last_step (the last with anything of
        it), missing_since (null: it is not missing).

        A rank is missing since the step after its last one when it ended without closing its log, was never
        heard of, or is 250 steps behind the others.
        """
        return told_of_ranks(self._log, self.info, alive)

    @_cached
    def checksums(self) -> pd.DataFrame:
        """Of tensors that several ranks hold: step, tensor, part (of a sharded one), rank, checksum.

        The sum of a tensor's bits after the step, as integers modulo 2^52: equal on all ranks that hold the
        same. Empty unless several ranks wrote the run.
        """
        return told_of_replicas(self._log, several=world_of(self.info) > 1)

    @_cached
    def noise_scale(self, smoothing: float = 0.9) -> pd.DataFrame:
        """How much the gradients of single ranks differ from their mean: needs `watch(local_gradients=True)`.

        Unbiased estimates from the norms of the ranks' own gradients and of their mean (McCandlish et al., An
        Empirical Model of Large-Batch Training, 2018, appendix A.1), in units of what one rank computes in a
        step: noise_scale = 4 says that four ranks' batches hold as much noise as signal.

        Args:
            smoothing: of the running means whose quotient is the scale, in [0, 1); single steps are noisy.

        Returns:
            step; signal, |G|^2 of the true gradient; noise, the trace of the covariance of a rank's gradient;
            noise_scale = noise / signal of their running means, NaN where the signal is not above 0.
        """
        return noise(self._log, smoothing)

    def findings(self, baselines: Sequence[Run] | Normal = ()) -> list[Finding]:
        """What is wrong, in which layer, since which step and what to do; root cause first.

        Args:
            baselines: earlier good runs to compare with, or what `normal.learn_runs` learnt of them.
        """
        return self._find(_kept_as(baselines))[0]

    def notes(self, baselines: Sequence[Run] | Normal = ()) -> list[str]:
        """What the detectors could not judge, and why; damaged files."""
        return [
            *self._find(_kept_as(baselines))[1],
            *self._missing_ranks(),
            *(f"{name}: {what}" for name, what in self.problems.items()),
        ]

    def _missing_ranks(self) -> list[str]:
        if world_of(self.info) < 2:
            return []
        ranks, gone = self.ranks(), self.missing_ranks()
        sharded = len(self._log.joint.sharded) if self._log.joint is not None else 0
        more = f": without its parts nothing can be said of {sharded} sharded tensors" if sharded else ""
        return [
            f"rank {r.rank} of {len(ranks)} is missing since step {r.missing_since}{more}"
            for r in gone.itertuples()
        ]

    def missing_ranks(self) -> pd.DataFrame:
        """The rows of `ranks` of those that ended before the others without closing their log."""
        ranks = self.ranks()
        return ranks[ranks["missing_since"].notna() & (ranks["last_step"] < ranks["last_step"].max())]

    @_cached
    def _find(self, baselines: tuple[Run, ...] | Normal) -> tuple[list[Finding], list[str]]:
        from .findings import find

        return find(self, baselines)

    def _rows(
        self,
        kind: str,
        tensor: Names,
        columns: Sequence[str],
        steps: tuple[int | None, int | None] | None = None,
        max_points: int | None = None,
    ) -> pa.Table:
        where: dict[str, Sequence[str]] = {"kind": [kind]}
        if tensor is not None:
            where["tensor"] = [tensor] if isinstance(tensor, str) else list(tensor)
        return frames.finest_table(self._log, columns, where, Between(*steps) if steps else None, max_points)

    def _names(self) -> list[str]:
        """Tensors and modules in order of definition."""
        tensors = [t["tensor"] for t in self.info.get("tensors", [])]
        return tensors + [m["module"] for m in self.info.get("modules", [])]

    def _order(self, table: pa.Table) -> NDArray[np.int64]:
        return frames.by_tensor(table, self._names())
