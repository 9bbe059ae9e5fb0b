"""Data sets: downloads, the named sets, honest splits, and clear errors."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import http.client
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import idx_bytes, write_cifar
from hypothesis import given
from hypothesis import strategies as st

from fastsel import data
from fastsel.data import DataError
from fastsel.data.dataset import row_groups, split_rows
from fastsel.data.download import Remote, fetch
from fastsel.data.named import RECIPES, Split


@pytest.fixture(autouse=True)
def _no_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test reads the user's data folder or writes into the user's cache."""
    monkeypatch.delenv("FASTSEL_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_digits_is_split_and_standardised() -> None:
    digits = data.load("digits")
    assert digits.task == "classification" and digits.num_outputs == 10 and digits.is_image
    assert len(digits.train_inputs) + len(digits.test_inputs) == 1797
    # float32 rounding of 92,000 values.
    assert abs(digits.train_inputs.mean().item()) < 1e-4
    assert abs(digits.train_inputs.std().item() - 1) < 1e-3
    assert digits.fingerprint() == data.load("digits").fingerprint()
    assert digits.fingerprint() != data.load("digits", seed=1).fingerprint()


# ---- downloading -------------------------------------------------------------------------------


def remote(source: Path, checksum: str = "", first_bytes: int = 0) -> Remote:
    return Remote(source.as_uri(), "set/file.bin", checksum, first_bytes)


def test_fetch_downloads_once(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"content")
    checksum = "sha256:" + hashlib.sha256(b"content").hexdigest()
    path = fetch(remote(source, checksum))
    assert path.read_bytes() == b"content"
    source.unlink()
    assert fetch(remote(source, checksum)) == path  # from the cache


def test_fetch_reads_only_the_first_bytes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(range(100)))
    assert fetch(remote(source, first_bytes=10)).read_bytes() == bytes(range(10))


def test_fetch_keeps_nothing_of_a_wrong_file(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"damaged")
    with pytest.raises(DataError, match="expected 0000"):
        fetch(remote(source, "md5:" + "0" * 32))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_fetch_keeps_nothing_of_a_short_table(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(500, 3)).tolist()
    whole = gzip.compress("\n".join(map(str, rows)).encode() + b"\n\n")
    for raw, held, message in (
        (whole, 500, "500 rows, expected 501"),
        (whole[:-300], 450, "ended"),
    ):
        (tmp_path / "source").write_bytes(raw)
        table = Remote((tmp_path / "source").as_uri(), "set/file.csv.gz", rows=501)
        with pytest.raises(DataError, match=message):
            fetch(table)
        assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
        fetch(dataclasses.replace(table, rows=held)).unlink()


@pytest.mark.parametrize(("name", "rows"), [("skin", 245_057), ("covtype", 581_012),
                                            ("higgs", 500_000)])  # fmt: skip
def test_a_short_original_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, rows: int
) -> None:
    recipe = RECIPES[name]
    source = tmp_path / "short"
    if recipe.remote[0].member:
        with zipfile.ZipFile(source, "w") as archive:
            archive.writestr(recipe.remote[0].member, "1 2 3 1\n" * 70)
    else:
        source.write_bytes(gzip.compress(b"1,2\n" * 70))
    short = dataclasses.replace(recipe.remote[0], url=source.as_uri())
    monkeypatch.setitem(RECIPES, name, dataclasses.replace(recipe, remote=(short,)))
    with pytest.raises(DataError, match=f"70 rows, expected {rows:,}"):
        data.load(name)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize("error", [http.client.IncompleteRead(b"ab", 3),
                                   http.client.BadStatusLine("nonsense")])  # fmt: skip
def test_fetch_names_a_broken_connection(
    monkeypatch: pytest.MonkeyPatch, error: http.client.HTTPException
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("urllib.request.urlopen", broken)
    with pytest.raises(DataError, match="could not download http://host/file"):
        fetch(Remote("http://host/file", "set/file"))


def test_fetch_offline_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        fetch(remote(tmp_path / "absent"))
    for part in ("absent", "FASTSEL_DATA_DIR", "set/file.bin", str(tmp_path / "cache")):
        assert part in str(caught.value)


def test_mnist_is_downloaded_parsed_and_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, 256, (40, 28, 28), dtype=np.uint8), np.arange(40, dtype=np.uint8) % 10,
        rng.integers(0, 256, (20, 28, 28), dtype=np.uint8), np.arange(20, dtype=np.uint8) % 10,
    ]  # fmt: skip
    recipe = RECIPES["mnist"]
    remotes = []
    for entry, array in zip(recipe.remote, arrays, strict=True):
        source = tmp_path / Path(entry.file).name
        source.write_bytes(gzip.compress(idx_bytes(array)))
        remotes.append(Remote(source.as_uri(), entry.file))
    local = type(recipe)(recipe.local, tuple(remotes), recipe.build)
    monkeypatch.setitem(RECIPES, "mnist", local)
    mnist = data.load("mnist")
    assert mnist.train_inputs.shape == (40, 1, 28, 28) and mnist.test_target.tolist()[:3] == [
        0,
        1,
        2,
    ]
    for entry in remotes:
        Path(entry.url.removeprefix("file://")).unlink()
    assert data.load("mnist").fingerprint() == mnist.fingerprint()


# ---- named sets in their original formats ------------------------------------------------------


def test_skin_split_shares_no_colour(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (60, 3))
    rows = colours[np.sort(rng.integers(0, 60, 500))]  # sorted, many duplicates
    label = (rows.sum(1) > 380) + 1
    (tmp_path / "skin").mkdir()
    text = "\n".join("\t".join(map(str, row)) for row in np.column_stack([rows, label]))
    with zipfile.ZipFile(tmp_path / "skin" / "skin.zip", "w") as archive:
        archive.writestr("Skin_NonSkin.txt", text)
    skin = data.load("skin", data_dir=tmp_path)
    train = {tuple(row) for row in skin.train_inputs.tolist()}
    test = {tuple(row) for row in skin.test_inputs.tolist()}
    assert train and test and not train & test
    assert len(skin.train_target) + len(skin.test_target) == 500  # multiplicity is kept
    assert skin.classes == ("skin", "not skin")


BIKE_HEADER = (
    "instant,dteday,season,yr,mnth,hr,holiday,weekday,workingday,weathersit,temp,atemp,hum,"
    "windspeed,casual,registered,cnt"
)


def test_bike_drops_what_gives_the_target_away(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = [BIKE_HEADER]
    for i in range(30):
        casual, registered = rng.integers(0, 100, 2)
        lines.append(
            f"{i},2011-01-01,1,0,1,{i % 24},0,6,0,1,0.{i:02},0.2,0.8,0.1,{casual},{registered},"
            f"{casual + registered}"
        )
    (tmp_path / "bike").mkdir()
    with zipfile.ZipFile(tmp_path / "bike" / "bike.zip", "w") as archive:
        archive.writestr("hour.csv", "\n".join(lines))
        archive.writestr("day.csv", "other")
    bike = data.load("bike", data_dir=tmp_path)
    assert bike.task == "regression" and bike.num_outputs == 1
    assert not {"casual", "registered", "instant", "dteday", "cnt"} & set(bike.features)
    cnt = torch.tensor([float(line.rsplit(",", 1)[1]) for line in lines[1:]]).sort().values
    both = torch.cat([bike.train_target, bike.test_target]) * bike.target_std + bike.target_mean
    # The target was standardised in float32: 7 digits of values up to 200.
    torch.testing.assert_close(both.sort().values, cnt, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("name", "file", "columns", "label"), [("covtype", "covtype/covtype.data.gz", 55, -1),
                                           ("higgs", "higgs/HIGGS.csv.gz", 29, 0)],
)  # fmt: skip
def test_uci_number_tables(tmp_path: Path, name: str, file: str, columns: int, label: int) -> None:
    rng = np.random.default_rng(0)
    table = rng.normal(size=(60, columns)).round(3)
    table[:, label] = np.arange(60) % 2 + (1 if name == "covtype" else 0)
    path = tmp_path / file
    path.parent.mkdir()
    path.write_bytes(gzip.compress("\n".join(",".join(map(str, r)) for r in table).encode()))
    loaded = data.load(name, data_dir=tmp_path)
    assert loaded.train_inputs.shape == (48, columns - 1)
    assert sorted(set(loaded.train_target.tolist())) == [0, 1]


def test_cifar10_archive(tmp_path: Path) -> None:
    (tmp_path / "cifar10").mkdir()
    records = write_cifar(tmp_path / "cifar10" / "cifar-10-binary.tar.gz", np.random.default_rng(0))
    cifar = data.load("cifar10", data_dir=tmp_path)
    assert cifar.train_inputs.shape == (40, 3, 32, 32) and cifar.test_inputs.shape[0] == 8
    pixels = records["test_batch.bin"][:, 1:].reshape(8, 3, 32, 32)
    train = np.concatenate([records[f"data_batch_{i}.bin"][:, 1:] for i in range(1, 6)])
    train = train.reshape(40, 3, -1) / 255
    mean, std = train.mean((0, 2)), train.std((0, 2))
    expected = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
    # float32 pixels against float64 ones.
    np.testing.assert_allclose(cifar.test_inputs.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["skin", "bike", "covtype", "higgs", "mnist", "cifar10"])
def test_a_damaged_local_file_is_named(tmp_path: Path, name: str) -> None:
    file = tmp_path / RECIPES[name].local[0][0]
    for other in RECIPES[name].local[0]:
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_bytes(b"\x1f\x8bnot a real archive")
    with pytest.raises(DataError, match=file.name):
        data.load(name, data_dir=tmp_path)


def test_a_damaged_zip_member_is_named(tmp_path: Path) -> None:
    (tmp_path / "bike").mkdir()
    path = tmp_path / "bike" / "bike.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("hour.csv", np.random.default_rng(0).bytes(900).hex())
    raw = path.read_bytes()
    path.write_bytes(raw[:300] + b"\xff" * 40 + raw[340:])
    with pytest.raises(DataError, match=r"cannot read .*bike\.zip"):
        data.load("bike", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"z": np.ones(3)}, "no array x, y in it, only z"),
        ({"x_train": np.ones((40, 8, 8))}, "no array y_train, x_test, y_test in it"),
        ({"x": np.ones((40, 8)), "y": np.arange(40) % 10}, r"expected images .* got \[40, 8\]"),
        ({"x": np.ones((40, 8, 8)), "y": np.arange(39) % 10}, "40 inputs but 39 targets"),
    ],
)
def test_a_subset_of_other_arrays_is_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    (tmp_path / "mnist").mkdir()
    np.savez(tmp_path / "mnist" / "mnist.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message):
        data.load("mnist", data_dir=tmp_path)


# ---- splitting ---------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 12), min_size=30, max_size=120), st.integers(0, 5))
def test_split_never_shares_a_row(values: list[int], seed: int) -> None:
    inputs = np.array(values, np.float32)[:, None]
    if len(set(values)) < 2:
        return
    target = np.arange(len(values)) % 2
    train, test = split_rows(inputs, target, task="regression", test_fraction=0.2, seed=seed)
    assert sorted([*train, *test]) == list(range(len(values)))
    assert not set(inputs[train, 0]) & set(inputs[test, 0])


def test_row_groups_take_minus_zero_for_zero() -> None:
    groups = row_groups(np.array([[0.0, 1.0], [-0.0, 1.0], [0.0, 2.0]], np.float32))
    assert groups[0] == groups[1] != groups[2]


def test_split_is_stratified() -> None:
    inputs = np.arange(200, dtype=np.float32)[:, None]
    target = (np.arange(200) >= 190).astype(np.int64)  # ten of the rare class
    _, test = split_rows(inputs, target, task="classification", test_fraction=0.2, seed=0)
    assert target[test].sum() == 2 and len(test) == 40


def test_split_of_equal_rows_is_refused() -> None:
    with pytest.raises(DataError, match="only 1 of 20 rows are distinct"):
        split_rows(np.ones((20, 2)), np.arange(20), task="regression", test_fraction=0.2, seed=0)


# ---- names ---------------------------------------------------------------------------------------


def test_bad_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Did you mean covtype"):
        data.load("covtyp")
    with pytest.raises(DataError, match="Known: digits, skin"):
        data.load("something")
    with pytest.raises(DataError, match="no such file"):
        data.load(tmp_path / "absent.csv")
    with pytest.raises(DataError, match="its own target"):
        data.load("digits", target="x")
    with pytest.raises(DataError, match="is a classification set"):
        data.load("digits", task="regression")
    with pytest.raises(DataError, match="not a folder"):
        data.load("skin", data_dir=tmp_path / "absent")
    with pytest.raises(DataError, match="test_fraction must be between 0 and 1"):
        data.load("digits", test_fraction=1.0)


def test_a_subset_without_a_split_is_split(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "fashion_mnist").mkdir()
    np.savez(
        tmp_path / "fashion_mnist" / "fashion_mnist_sprite900.npz",
        x=rng.integers(0, 256, (50, 28, 28), dtype=np.uint8), y=np.arange(50) % 10,
    )  # fmt: skip
    recipe = RECIPES["fashion-mnist"]
    paths = [tmp_path / recipe.local[1][0]]
    loaded = recipe.build(paths, Split(0.2, 0))
    assert len(loaded.test_target) == 10 and "subset" in loaded.note
