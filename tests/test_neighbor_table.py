"""`NeighborTable` and `TableRefresher`: what is in a table, and what is refused."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastsel
from fastsel import NeighborTable, TableRefresher
from fastsel.data.optional import MissingPackageError
from fastsel.neighbors.refresh import layer_features
from fastsel.neighbors.table import fingerprint


def features(rows: int = 200, dims: int = 5, seed: int = 0) -> Tensor:
    """Seeded normal features."""
    return torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed))


def brute(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Squared distances to all the other rows, and the nearest of them."""
    distances = (x[:, None].double() - x.double()).square().sum(-1).float()
    distances.fill_diagonal_(float("inf"))
    order = distances.argsort(dim=1, stable=True)[:, :k]
    return distances.gather(1, order), order


@pytest.mark.parametrize("dims", [1, 5, 40])
@pytest.mark.parametrize("block", [7, 10_000])
def test_the_neighbours_of_every_other_sample(dims: int, block: int) -> None:
    x = features(dims=dims)
    table = NeighborTable.build(x, 6, block=block)
    distances, ids = brute(x, 6)
    assert torch.equal(table.ids.long(), ids)
    assert torch.equal(table.distances, distances)
    assert (len(table), table.k, table.ids.dtype, table.method) == (200, 6, torch.int32, "exact")
    assert repr(table) == "NeighborTable(200 x 6, euclidean, exact)"


def test_equal_samples_are_not_their_own_neighbours() -> None:
    table = NeighborTable.build(torch.zeros(50, 3), 4)
    assert not (table.ids == torch.arange(50)[:, None]).any()
    assert (table.distances == 0).all()


def test_cosine() -> None:
    x = features()
    unit = x.double() / x.double().norm(dim=1, keepdim=True)
    table = NeighborTable.build(x * torch.rand(200, 1).add(0.1), 5, metric="cosine")
    similar = unit @ unit.t()
    similar.fill_diagonal_(-2)
    assert (table.ids.long() == similar.argsort(1, descending=True)[:, :5]).float().mean() > 0.99
    nearest = similar.gather(1, table.ids.long())
    torch.testing.assert_close(table.distances.double(), 2 - 2 * nearest, rtol=0, atol=1e-6)


@pytest.mark.parametrize("more", [1, 3, 70])
def test_adding_samples_is_building_anew(more: int) -> None:
    whole = features(200 + more).round(decimals=1)  # with ties
    table = NeighborTable.build(whole[:200], 6)
    before = table.ids.clone()
    longer, anew = table.add(whole[:200], whole[200:]), NeighborTable.build(whole, 6)
    assert torch.equal(longer.ids, anew.ids)
    assert torch.equal(longer.distances, anew.distances)
    assert longer.fingerprint == anew.fingerprint
    assert torch.equal(table.ids, before)
    with pytest.raises(ValueError, match="the table is of other features than these"):
        table.add(whole[:200] + 1, whole[200:])
    with pytest.raises(ValueError, match="more must have 5 features, got 3"):
        table.add(whole[:200], whole[200:, :3])


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    NeighborTable.build(features(), 3, block=64, progress=True)
    shown = capsys.readouterr().err
    assert re.findall(r"([\d,]+)/200", shown) == ["64", "128", "192", "200"]
    assert shown.endswith("[##############################] 200/200\n")
    NeighborTable.build(features(), 3)
    assert capsys.readouterr().err == ""


# ---- files ----


@pytest.mark.parametrize("mmap", [False, True])
def test_saving_and_loading(tmp_path: Path, mmap: bool) -> None:
    x = features()
    table = NeighborTable.build(x, 6, metric="cosine")
    path = table.save(tmp_path / "table.bin")
    loaded = NeighborTable.load(path, features=x, mmap=mmap)
    assert torch.equal(loaded.ids, table.ids)
    assert torch.equal(loaded.distances, table.distances)
    assert (loaded.metric, loaded.method, loaded.fingerprint) == (
        "cosine",
        "exact",
        table.fingerprint,
    )
    seed = torch.tensor([0])
    drawn = fastsel.neighbor_sample(loaded.ids, torch.arange(9), torch.ones(9), 5, seed)
    assert (drawn.probs > 0).all()
    assert [one.name for one in tmp_path.iterdir()] == ["table.bin"]
    with pytest.raises(ValueError, match="of other features than these"):
        NeighborTable.load(path, features=x + 1, mmap=mmap)
    with pytest.raises(ValueError, match="of 200 samples, the features are of 100"):
        NeighborTable.load(path, features=x[:100], mmap=mmap)


@pytest.mark.parametrize("mmap", [False, True])
def test_damaged_files_are_refused(tmp_path: Path, mmap: bool) -> None:
    path = NeighborTable.build(features(), 6).save(tmp_path / "table.bin")
    whole = path.read_bytes()
    other = tmp_path / "damaged.bin"
    for place in [*range(36, 900, 29), *range(1000, len(whole), 997)]:
        other.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        if whole[place] == 0 and _is_padding(whole, place):
            continue
        with pytest.raises(ValueError, match="is damaged"):
            NeighborTable.load(other, mmap=mmap)
    for size in (0, 10, 35, 100, 700, len(whole) // 2, len(whole) - 65):
        other.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"is not a table|cut short"):
            NeighborTable.load(other, mmap=mmap)
    other.write_bytes(whole[:8] + (9).to_bytes(4, "little") + whole[12:])
    with pytest.raises(ValueError, match="has version 9, and version 1 can be read"):
        NeighborTable.load(other, mmap=mmap)
    with pytest.raises(FileNotFoundError):
        NeighborTable.load(tmp_path / "none.bin")


def _is_padding(whole: bytes, place: int) -> bool:
    """Whether a byte is between the header and the arrays, or after one of them."""
    header = int.from_bytes(whole[12:20], "little")
    begin = 36 + header
    return begin <= place < (begin + 63) // 64 * 64


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = NeighborTable.build(features(), 6)
    path = table.save(tmp_path / "table.bin")
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr("fastsel.neighbors.storage.os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        NeighborTable.build(features(seed=1), 6).save(path)
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["table.bin"]


def test_fingerprints() -> None:
    x = features()
    same = {fingerprint(one) for one in (x, x.clone(), x.t().contiguous().t())}
    other = {fingerprint(one) for one in (x + 1, x[:-1], x.double(), x.view(100, 10), x.half())}
    assert len(same) == 1
    assert len(same | other) == 6


# ---- Faiss ----


def test_faiss_indices() -> None:
    pytest.importorskip("faiss")
    x = features(2000, 16)
    exact = NeighborTable.build(x, 8, method="exact")
    for factory, recall in (("Flat", 0.999), ("HNSW32", 0.95), ("IVF8,Flat", 0.3)):
        table = NeighborTable.build(x, 8, method=factory)
        hits = (table.ids[:, :, None] == exact.ids[:, None]).any(-1).float().mean()
        assert table.method == factory
        assert hits > recall
        assert not (table.ids == torch.arange(2000)[:, None]).any()
    with pytest.raises(ValueError, match="only an exact table can be extended, this one is 'IVF8"):
        table.add(x, x[:3])
    with pytest.raises(ValueError, match="which does not know 'Nonsense'"):
        NeighborTable.build(x, 8, method="Nonsense")
    with pytest.raises(ValueError, match="could not build 'IVF9999,Flat' of 2000 points"):
        NeighborTable.build(x, 8, method="IVF9999,Flat")
    wide = features(300, 300)
    assert NeighborTable.build(wide, 3).method == "Flat"
    with pytest.raises(ValueError, match="found fewer than 250 neighbours of row"):
        NeighborTable.build(wide, 250, method="IVF4,Flat")


def test_faiss_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingPackageError, match=r"HNSW32' needs faiss.*'fastsel\[faiss\]'"):
        NeighborTable.build(features(), 3, method="HNSW32")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert NeighborTable.build(features(40, 300), 3).method == "exact"


def test_arguments() -> None:
    x = features()
    wrong, zero = x.clone(), x.clone()
    wrong[7, 2], wrong[9, 0], zero[4] = float("nan"), float("inf"), 0
    for value, options, error, match in (
        (x.tolist(), {}, TypeError, "features must be a tensor, got list"),
        (x.int(), {}, TypeError, "features must be floating, got int32"),
        (x[0], {}, ValueError, r"features must be \[N, D\], got \[5\]"),
        (wrong, {}, ValueError, "got 2 rows with NaN or infinities, the first is row 7"),
        (zero, {"metric": "cosine"}, ValueError, "row 4 of features is zero"),
        (x, {"metric": "manhattan"}, ValueError, "metric must be one of .*, got 'manhattan'"),
        (x, {"k": 0}, ValueError, "k must be between 1 and 199 .*, got 0"),
        (x, {"k": 200}, ValueError, "k must be between 1 and 199 .*, got 200"),
        (x, {"k": 2.0}, TypeError, "k must be an int, got float"),
        (x, {"block": 0}, ValueError, "block must be positive, got 0"),
    ):
        with pytest.raises(error, match=f"NeighborTable: .*{match}"):
            NeighborTable.build(value, **{"k": 3, **options})  # type: ignore[arg-type]


# ---- features of a model ----


def make_model() -> nn.Sequential:
    """A body, whose features are wanted, and a head."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))


def test_features_of_a_layer() -> None:
    model, x = make_model(), features()
    model[1].eval()
    found = layer_features(model, x.split(33), "1")
    hidden: Tensor = model[0](x)
    assert torch.equal(found, model[1](hidden).detach())
    assert [one.training for one in model] == [True, False, True, True]
    assert not model[1]._forward_hooks
    assert layer_features(model, [(x,)]).shape == (200, 2)
    with pytest.raises(RuntimeError, match="layer '1' did not run"):
        layer_features(model, [], "1")


def test_tables_follow_the_model() -> None:
    model, x = make_model(), features()
    refresher = TableRefresher(model, lambda: x.split(50), layer="0", every=3, k=4)
    first = refresher.table
    assert refresher.built_at == 0
    assert torch.equal(first.ids, NeighborTable.build(model[0](x).detach(), 4).ids)
    renewed = []
    for step in range(1, 8):
        with torch.no_grad():
            next(model.parameters()).mul_(-1).add_(torch.randn(8, 5) * 0.3)
        snapshot = model[0](x).detach()
        renewed.append(refresher.step())
        if step == 3:
            expected = NeighborTable.build(snapshot, 4).ids
            assert refresher.wait()
            assert refresher.built_at == 3
            assert torch.equal(refresher.table.ids, expected)
            assert not torch.equal(refresher.table.ids, first.ids)
    assert not any(renewed[:3])
    assert refresher.wait() or refresher.built_at == 6


def test_a_rebuilding_that_fails_is_told() -> None:
    model, x = make_model(), features()
    refresher = TableRefresher(model, lambda: x.split(50), every=1, k=4)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    refresher.step()
    with pytest.raises(RuntimeError, match="could not be rebuilt") as raised:
        refresher.wait()
    assert "NaN" in str(raised.value.__cause__)
    with pytest.raises(ValueError, match="the model has no layer 'body'"):
        TableRefresher(model, lambda: x.split(50), layer="body", every=1)
    with pytest.raises(ValueError, match="every must be positive, got 0"):
        TableRefresher(model, lambda: x.split(50), every=0)
