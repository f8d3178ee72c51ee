"""Trainings of several ranks: their log is that of one process, whatever is sharded, copied or split."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from ranks import Net, batch, launch

from layerwatch import Run
from layerwatch.hooks.distributed import checksums
from layerwatch.hooks.tensors import Tensors

STEPS = 7
PARAMETER_KINDS = ("initial_weight", "weight", "gradient", "update", "second_moment", "momentum")
#: By ranks: with these every operation on an element is that of one process.
EXACT = {2: ("ddp", "fsdp", "fsdp1", "manual"), 4: ("fsdp", "fsdp1", "hsdp")}
#: With these sums over a matrix are made in another order.
ROUNDED = {2: ("tensor",), 4: ("fsdp+tensor",)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """All trainings that go well: name -> run; "plain", "tensor" and "clipped" are those of one process."""
    folder = tmp_path_factory.mktemp("ranks")

    def job(kind: str, name: str, **options: object) -> dict[str, object]:
        return {"kind": kind, "run": folder / name, "steps": STEPS, **options}

    launch(1, job("plain", "plain"), job("tensor", "tensor"), job("plain", "clipped", clip=0.1))
    for ranks in (2, 4):
        jobs = [job(kind, f"{kind}-{ranks}") for kind in (*EXACT[ranks], *ROUNDED[ranks])]
        if ranks == 2:
            jobs += [
                {"pipeline": True, "run": folder / "pipeline", "steps": STEPS},
                job("fsdp+checkpoint", "fsdp+checkpoint"),
                job("fsdp+compile", "fsdp+compile"),
                job("fsdp", "clipped-2", clip=0.1, late=True),
                job("fsdp", "resumed"),
                job("fsdp", "resumed", resume=True, steps=STEPS + 4),
                job("fsdp", "regrouped"),
                job("ddp", "parted-0", at={"part": [1, 0]}),
                job("fsdp", "rolled", keep="rollup"),
                job("ddp", "noise", own=True, every=1, local_gradients=True),
                job("ddp", "parted-3", at={"part": [1, 3]}),
            ]
        else:
            jobs.append(job("fsdp", "regrouped", resume=True, steps=STEPS + 4))
        launch(ranks, *jobs)
    return {path.name: Run(path) for path in folder.iterdir()}


def of(kinds: dict[int, tuple[str, ...]]) -> list[tuple[str, int]]:
    return [(kind, ranks) for ranks, names in kinds.items() for kind in names]


def differences(one: pd.DataFrame, two: pd.DataFrame, tolerance: float) -> list[str]:
    """The columns that are not the same."""
    found = []
    for name in one.columns.drop("time"):
        if one[name].dtype.kind in "fi":
            a, b = one[name].to_numpy(float), two[name].to_numpy(float)
            scale = np.abs(a[np.isfinite(a)]).max(initial=1e-12)
            same = np.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
        else:
            same = one[name].fillna("").equals(two[name].fillna(""))
        found += [] if same else [str(name)]
    return found


def sound(run: Run) -> None:
    assert run.problems == {}
    assert not (run.path / "errors.log").exists()
    assert "error" not in set(run.events()["event"])
    assert run.info["closed"]
    assert run.ranks()["missing_since"].isna().all()


@pytest.mark.parametrize(("kind", "ranks"), of(EXACT))
def test_the_log_is_that_of_one_process(runs: dict[str, Run], kind: str, ranks: int) -> None:
    one, run = runs["plain"], runs[f"{kind}-{ranks}"]
    sound(run)
    assert list(run.ranks()["rank"]) == list(range(ranks))
    for rows in (*PARAMETER_KINDS, "activation"):
        a, b = one.stats(rows), run.stats(rows)
        assert len(a) == len(b) > 0, rows
        unknown = ["units", "active_units"] if (kind, rows) == ("fsdp1", "gradient") else []
        assert differences(a, b, 1e-12) == unknown, rows  # FSDP1 cuts across the rows of a matrix
        for tensor in one.names(rows):
            pd.testing.assert_frame_equal(one.histograms(rows, tensor), run.histograms(rows, tensor))
    assert differences(one.drift(), run.drift(), 1e-12) == []
    for tensor in one.names("weight"):
        for kept, again in zip(one.values(tensor), run.values(tensor), strict=True):
            np.testing.assert_array_equal(kept, again)
        if kind == "fsdp1":
            continue
        both = zip(one.activity("gradient", tensor), run.activity("gradient", tensor), strict=True)
        for kept, again in both:
            np.testing.assert_array_equal(kept, again)
    for name in ("train_loss", "grad_norm", "lr"):
        a, b = one.scalars(name), run.scalars(name)
        assert list(a["step"]) == list(b["step"]), name
        np.testing.assert_allclose(a["value"], b["value"], rtol=1e-12)
    assert list(run.tensors()["tensor"]) == list(one.tensors()["tensor"])
    assert list(run.tensors()["state"]) == list(one.tensors()["state"])


@pytest.mark.parametrize(("kind", "ranks"), of(ROUNDED))
def test_tensor_parallel(runs: dict[str, Run], kind: str, ranks: int) -> None:
    one, run = runs["tensor"], runs[f"{kind}-{ranks}"]
    sound(run)
    columns = ["step", "time", "tensor", "count", "norm", "state", "zeros", "nans"]
    for rows in PARAMETER_KINDS:
        a, b = one.stats(rows, columns=columns), run.stats(rows, columns=columns)
        assert len(a) == len(b) > 0, rows
        assert differences(a, b, 1e-5) == [], rows
    np.testing.assert_allclose(
        one.scalars("grad_norm")["value"], run.scalars("grad_norm")["value"], rtol=1e-6
    )


@pytest.mark.parametrize("kind", ["fsdp+checkpoint", "fsdp+compile"])
def test_what_people_do_to_sharded_networks(runs: dict[str, Run], kind: str) -> None:
    one, run = runs["plain"], runs[kind]
    sound(run)
    for rows in PARAMETER_KINDS:
        assert differences(one.stats(rows), run.stats(rows), 1e-12) == [], rows
    seen = [] if kind == "fsdp+compile" else list(one.stats("activation")["norm"])
    assert list(run.stats("activation")["norm"]) == seen
    assert any("cannot be seen" in note for note in run.info["notes"]) == (kind == "fsdp+compile")


def test_a_pipeline_is_the_union_of_its_stages(runs: dict[str, Run]) -> None:
    one, run = runs["plain"], runs["pipeline"]
    sound(run)
    assert list(run.tensors()["tensor"]) == list(one.tensors()["tensor"])
    assert list(run.modules()["module"]) == list(one.modules()["module"])
    for rows in (*PARAMETER_KINDS, "activation"):
        assert differences(one.stats(rows), run.stats(rows), 1e-6) == [], rows
    for name in ("train_loss", "grad_norm"):
        np.testing.assert_allclose(one.scalars(name)["value"], run.scalars(name)["value"], rtol=1e-6)


def test_clipping_and_an_optimizer_that_is_found_later(runs: dict[str, Run]) -> None:
    """The norm that `clip_grad_norm_` returns is a sum over ranks: nobody asks for it on our account."""
    one, run = runs["clipped"], runs["clipped-2"]
    sound(run)
    assert set(run.stats("gradient")["stage"]) == {"before_clip"}
    for name in ("grad_norm", "clip_ratio"):
        assert (run.scalars(name)["value"] < 1e9).all()
        np.testing.assert_allclose(one.scalars(name)["value"], run.scalars(name)["value"], rtol=1e-5)


def test_a_rank_that_dies_is_named(tmp_path: Path) -> None:
    job = {"kind": "fsdp", "run": tmp_path / "run", "steps": 9, "at": {"die": [1, 5]}}
    done = launch(2, job, check=False)
    assert done.returncode != 0
    run = Run(tmp_path / "run")
    ranks = run.ranks().set_index("rank")
    assert ranks.loc[1, "missing_since"] == 5
    assert any(note.startswith("rank 1 of 2 is missing since step 5") for note in run.notes())
    weights = run.stats("weight")  # of the steps that are whole
    assert set(weights["step"]) == {0, 2, 4}
    assert set(weights.loc[weights["tensor"] == "inp.weight", "count"]) == {91}


@pytest.mark.parametrize("step", [0, 3])
def test_replicas_that_part(runs: dict[str, Run], step: int) -> None:
    (finding,) = [f for f in runs[f"parted-{step}"].findings() if f.problem == "replica_desync"]
    assert finding.severity == "warning"
    assert "out.bias" in finding.layers
    assert finding.first_step == (0 if step == 0 else STEPS - 1)
    for sound_one in ("ddp-2", "hsdp-4", "fsdp-4", "fsdp+tensor-4"):
        assert not [f for f in runs[sound_one].findings() if f.problem == "replica_desync"]


def test_gradients_of_single_ranks(runs: dict[str, Run]) -> None:
    """By definition: the first step again, in one process."""
    run = runs["noise"]
    sound(run)
    torch.manual_seed(0)
    net, (x, y) = Net(), batch(0)
    own, summed = [], [torch.zeros_like(p) for p in net.parameters()]
    for rank in (0, 1):
        loss = torch.nn.functional.cross_entropy(net(x[rank::2]), y[rank::2])
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        own.append(sum(float(g.double().square().sum()) for g in gradients))
        summed = [s + g / 2 for s, g in zip(summed, gradients, strict=True)]
    both = sum(float(g.double().square().sum()) for g in summed)
    first = run.noise_scale().iloc[0]
    assert len(run.noise_scale()) == STEPS
    assert first["signal"] == pytest.approx(2 * both - sum(own) / 2, rel=1e-5)
    assert first["noise"] == pytest.approx(2 * (sum(own) / 2 - both), rel=1e-5)
    assert first["noise_scale"] == pytest.approx(first["noise"] / first["signal"])
    assert len(run.scalars("grad_norm")) == STEPS
    assert runs["ddp-2"].noise_scale().empty


def test_a_training_goes_on_with_all_ranks(runs: dict[str, Run]) -> None:
    run = runs["resumed"]
    sound(run)
    assert list(run.sessions()["first_step"]) == [0, STEPS]
    assert list(run.stats("weight", "inp.bias")["step"]) == [0, 2, 4, 6, 8, 10]


def test_no_capture_of_several_ranks_is_merged_away(runs: dict[str, Run]) -> None:
    assert runs["rolled"].info["keep"] == "full"
    assert any("every capture is kept" in note for note in runs["rolled"].info["notes"])


def test_a_training_goes_on_with_more_ranks(runs: dict[str, Run]) -> None:
    """Parts are others from then on."""
    run, one = runs["regrouped"], runs["resumed"]
    sound(run)
    assert list(run.ranks()["rank"]) == [0, 1, 2, 3]
    for rows in ("weight", "gradient"):
        assert differences(one.stats(rows), run.stats(rows), 1e-12) == [], rows
    for tensor in run.names("weight"):
        for kept, again in zip(one.values(tensor), run.values(tensor), strict=True):
            np.testing.assert_array_equal(kept, again)
        both = zip(one.activity("gradient", tensor), run.activity("gradient", tensor), strict=True)
        for kept, again in both:
            np.testing.assert_array_equal(kept, again)
    assert list(run.scalars("grad_norm")["step"]) == list(one.scalars("grad_norm")["step"])


def test_ranks_without_a_name_find_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = {"kind": "ddp", "run": None, "steps": 3}
    launch(2, job, job)
    one, other = sorted((tmp_path / "runs").iterdir())
    for path in (one, other):
        assert list(Run(path).ranks()["last_step"]) == [2, 2]
        assert len(list(path.rglob("run.json"))) == 1


@pytest.mark.parametrize("kind", ["fsdp", "tensor"])
def test_nothing_is_ever_sent_on_our_account(kind: str, tmp_path: Path) -> None:
    """Not even when one rank alone has an accident to explain."""
    job = {
        "kind": kind, "steps": 6, "clip": 0.1, "late": True, "counted": True, "at": {"broken": [0, 3]},
    }  # fmt: skip
    watching = {"every": 1, "step_norms": True, "run": tmp_path / "run"}
    launch(2, {**job, **watching}, {**job, "watched": False, "run": tmp_path / "none"})
    watched, alone = (tmp_path / "sent.json").read_text().splitlines()
    assert watched == alone
    assert sum(json.loads(alone).values()) > 6
    run = Run(tmp_path / "run")
    assert "error" not in set(run.events()["event"])
    assert any("accident" in str(event) for event in run.events()["event"])


def test_replicas_write_next_to_nothing(runs: dict[str, Run]) -> None:
    path = runs["ddp-2"].path
    rows = {p.name[:2]: len(pd.read_parquet(p)) for p in (path / "stats").iterdir()}
    assert rows["r0"] > 50
    assert rows.get("r1", 0) <= 3  # outputs of the first step's modules
    assert json.loads((path / "ranks" / "r1.json").read_text())["shards"] == {"0": {}}


def test_a_single_bit_changes_a_checksum() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.complex64):
        model = torch.nn.Linear(5, 3, dtype=dtype)
        before = checksums(Tensors([model]))
        assert [name for name, _ in before] == ["weight", "bias"]
        assert checksums(Tensors([model])) == before
        with torch.no_grad():
            flat = torch.view_as_real(model.bias) if dtype.is_complex else model.bias
            flat.view(torch.uint8).view(-1)[0] ^= 1
        after = checksums(Tensors([model]))
        assert after[0] == before[0]
        assert abs(after[1][1][0] - before[1][1][0]) == 1
