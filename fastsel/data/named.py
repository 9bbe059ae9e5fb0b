"""The named public sets: where each lives, how its files are read, how it is split honestly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastsel.data import download
from fastsel.data.dataset import Array, DataError, Dataset, make_dataset, split_dataset
from fastsel.data.download import Remote
from fastsel.data.formats import (
    open_member,
    read_cifar10,
    read_idx,
    read_npz,
    read_numbers,
    reading,
    require_arrays,
)
from fastsel.data.optional import require

_UCI = "https://archive.ics.uci.edu"
_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist"
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
_IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
# MD5 sums as the authors' pages and the common loaders publish them: they guard against damage.
_MNIST_MD5 = (
    "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "d53e105ee54ea40749a09fcbcd1e9432",
    "9fb629c4189551a2d022fa330f9573f3",
    "ec29112dd5afa0611ce80d1b7f02629c",
)
_FASHION_MD5 = (
    "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "25c81989df183df01b3e8a0aad5dffbe",
    "bef4ecab320f06d8554ea6380940ec79",
    "bb300cfdad3c16e7a12a480ee83cd310",
)
_FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip
_CIFAR_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
_COVER_TYPES = (
    "Spruce/Fir", "Lodgepole Pine", "Ponderosa Pine", "Cottonwood/Willow", "Aspen", "Douglas-fir",
    "Krummholz",
)  # fmt: skip

# casual and registered sum to the target; instant is the row number and dteday the date.
BIKE_DROPPED = ("instant", "dteday", "casual", "registered")
COVTYPE_ROWS = 581_012
# The whole set is 11 million rows in 2.6 GB; this many come with the first 160 MB.
HIGGS_ROWS = 500_000
_HIGGS_FIRST_BYTES = 160_000_000


@dataclass(frozen=True)
class Split:
    """How `load` was asked to split: the held-out share and the seed."""

    test_fraction: float
    seed: int


@dataclass(frozen=True)
class Recipe:
    """One named set.

    Attributes:
        local: Groups of files, relative to a data folder; the first group found whole is read.
        remote: What to download when no folder has any group; lands in the cache.
        build: Turns the paths of a group (or of the downloads) into a `Dataset`.
    """

    local: tuple[tuple[str, ...], ...]
    remote: tuple[Remote, ...]
    build: Callable[[list[Path], Split], Dataset]


def load_named(name: str, data_dir: str | Path | None, split: Split) -> Dataset:
    """Load a named set: from the data folders if one holds it, else by downloading it.

    Raises:
        DataError: The files cannot be found, fetched or read.
    """
    if name == "digits":
        return _digits(split)
    recipe = RECIPES[name]
    for folder in download.folders(data_dir):
        for group in recipe.local:
            paths = [folder / file for file in group]
            if all(path.is_file() for path in paths):
                return recipe.build(paths, split)
    return recipe.build([download.fetch(remote) for remote in recipe.remote], split)


def _channels_first(images: Array, path: Path) -> Array:
    """Give uint8 images `[N, H, W]` or `[N, H, W, C]` as float32 `[N, C, H, W]` in 0..1."""
    if images.ndim not in (3, 4):
        raise DataError(
            f"{path}: expected images [N, H, W] or [N, H, W, C], got {list(images.shape)}"
        )
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return images.astype(np.float32) / 255


def _digits(split: Split) -> Dataset:
    bunch = require("sklearn.datasets", "the digits data set").load_digits()
    images = (bunch.images / 16).astype(np.float32)[:, None]  # [N, 1, 8, 8]
    return split_dataset(
        "digits", images, bunch.target, task="classification",
        classes=tuple(str(digit) for digit in range(10)),
        note="Optical recognition of handwritten digits (UCI), 8x8 pixels, as scikit-learn ships "
        "it. CC BY 4.0.",
        test_fraction=split.test_fraction, seed=split.seed,
    )  # fmt: skip


def _skin(paths: list[Path], split: Split) -> Dataset:
    if paths[0].suffix == ".npz":
        arrays = read_npz(paths[0], "bgr", "label")
        inputs, label = arrays["bgr"].astype(np.float32), arrays["label"]
    else:
        table = reading(
            paths[0], lambda p: read_numbers(p, "Skin_NonSkin.txt", columns=4, separator=r"\s+")
        )
        inputs, label = table[:, :3], table[:, 3]
    distinct = len(np.unique(inputs, axis=0))
    return split_dataset(
        "skin", inputs, label.astype(np.int64) - 1, task="classification",
        features=("B", "G", "R"), classes=("skin", "not skin"),
        note="Skin Segmentation (UCI 229), CC BY 4.0. The file is sorted by class and only "
        f"{distinct:,} of its {len(inputs):,} colours are distinct: split by colour.",
        test_fraction=split.test_fraction, seed=split.seed,
    )  # fmt: skip


def _bike(paths: list[Path], split: Split) -> Dataset:
    pandas = require("pandas", "reading tables")

    def read(path: Path) -> Any:
        with open_member(path, "hour.csv") as stream:
            return pandas.read_csv(stream)

    frame = reading(paths[0], read)
    absent = [column for column in (*BIKE_DROPPED, "cnt") if column not in frame.columns]
    if absent:
        raise DataError(f"{paths[0]}: no column {', '.join(absent)}: not hour.csv of Bike Sharing")
    target = frame.pop("cnt").to_numpy(np.float64)
    frame = frame.drop(columns=list(BIKE_DROPPED))
    return split_dataset(
        "bike", frame.to_numpy(np.float32), target, task="regression",
        features=tuple(map(str, frame.columns)),
        note="Bike Sharing, hourly (UCI 275), CC BY 4.0; target: rentals in the hour. Left out: "
        f"{', '.join(BIKE_DROPPED)} (casual + registered is the target). Rows are hours in a "
        "row, so a random split asks for interpolation, not for a forecast.",
        test_fraction=split.test_fraction, seed=split.seed,
    )  # fmt: skip


def _covtype(paths: list[Path], split: Split) -> Dataset:
    if paths[0].suffix == ".npz":
        arrays = read_npz(paths[0], "x", "y", "columns")
        inputs, label = arrays["x"].astype(np.float32), arrays["y"]
        features = tuple(map(str, arrays["columns"]))
    else:
        table = reading(paths[0], lambda p: read_numbers(p, "covtype.data", columns=55))
        inputs, label = table[:, :54], table[:, 54]
        features = tuple(f"attribute {i}" for i in range(1, 55))
    return split_dataset(
        "covtype", inputs, label.astype(np.int64) - 1, task="classification",
        features=features, classes=_COVER_TYPES,
        note=f"CoverType (UCI 31), CC BY 4.0, {len(inputs):,} of {COVTYPE_ROWS:,} rows.",
        test_fraction=split.test_fraction, seed=split.seed,
    )  # fmt: skip


def _higgs(paths: list[Path], split: Split) -> Dataset:
    if paths[0].suffix == ".npz":
        arrays = read_npz(paths[0], "x", "y", "columns")
        inputs, label = arrays["x"], arrays["y"]
        features = tuple(map(str, arrays["columns"]))
    else:
        table = reading(
            paths[0], lambda p: read_numbers(p, "HIGGS.csv", columns=29, max_rows=HIGGS_ROWS)
        )
        label, inputs = table[:, 0], table[:, 1:]
        features = tuple(f"attribute {i}" for i in range(1, 29))
    return split_dataset(
        "higgs", inputs.astype(np.float32), label.astype(np.int64), task="classification",
        features=features, classes=("background", "signal"),
        note=f"HIGGS (UCI 280), CC BY 4.0, {len(inputs):,} of 11,000,000 rows.",
        test_fraction=split.test_fraction, seed=split.seed,
    )  # fmt: skip


def _images(
    name: str, source: str, classes: tuple[str, ...], paths: list[Path], split: Split
) -> Dataset:
    """Image sets: IDX files, CIFAR's archive, or an NPZ with a published split or without one."""
    if len(paths) == 4:
        x_train, y_train, x_test, y_test = (reading(path, read_idx) for path in paths)
        arrays = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
    elif paths[0].suffix == ".npz":
        arrays = read_npz(paths[0])
        whole = ("x_train", "y_train", "x_test", "y_test") if "x_train" in arrays else ("x", "y")
        require_arrays(paths[0], arrays, *whole)
    else:
        arrays = {
            key: value.transpose(0, 2, 3, 1) if value.ndim == 4 else value
            for key, value in reading(paths[0], read_cifar10).items()
        }
    if "x_train" not in arrays:
        return split_dataset(
            name, _channels_first(arrays["x"], paths[0]), arrays["y"].astype(np.int64),
            task="classification", classes=classes, note=f"{source} {paths[0].name}: a subset.",
            test_fraction=split.test_fraction, seed=split.seed,
        )  # fmt: skip
    train, test = (
        (_channels_first(arrays[f"x_{part}"], paths[0]), arrays[f"y_{part}"].astype(np.int64))
        for part in ("train", "test")
    )
    return make_dataset(
        name, train, test, task="classification", classes=classes,
        note=f"{source} {len(train[0]):,} train and {len(test[0]):,} test images, split as "
        f"published ({paths[0].name}).",
    )  # fmt: skip


def _idx_remotes(home: str, folder: str, sums: tuple[str, ...]) -> tuple[Remote, ...]:
    return tuple(
        Remote(f"{home}/{file}", f"{folder}/{file}", f"md5:{md5}")
        for file, md5 in zip(_IDX_FILES, sums, strict=True)
    )


def _mnist(paths: list[Path], split: Split) -> Dataset:
    classes = tuple(str(digit) for digit in range(10))
    source = "MNIST (LeCun, Cortes, Burges), CC BY-SA 3.0."
    return _images("mnist", source, classes, paths, split)


def _fashion(paths: list[Path], split: Split) -> Dataset:
    source = "Fashion-MNIST (Zalando Research), MIT licence."
    return _images("fashion-mnist", source, _FASHION_CLASSES, paths, split)


def _cifar10(paths: list[Path], split: Split) -> Dataset:
    source = "CIFAR-10 (Krizhevsky 2009), no licence stated."
    return _images("cifar10", source, _CIFAR_CLASSES, paths, split)


RECIPES: dict[str, Recipe] = {
    "skin": Recipe(
        (("skin/skin.zip",), ("skin/Skin_NonSkin.txt",), ("skin/skin_nonskin.npz",)),
        (
            Remote(
                f"{_UCI}/static/public/229/skin+segmentation.zip",
                "skin/skin.zip",
                rows=245_057,
                member="Skin_NonSkin.txt",
            ),
        ),
        _skin,
    ),
    "bike": Recipe(
        (("bike/bike.zip",), ("bike/hour.csv",), ("bike/hour.csv.gz",)),
        (
            Remote(
                f"{_UCI}/static/public/275/bike+sharing+dataset.zip",
                "bike/bike.zip",
                "sha256:b70182d0d0508e9abbb79306ce5c0cec34869000f8220175ac83d11dbe845401",
            ),
        ),
        _bike,
    ),
    "covtype": Recipe(
        (
            ("covtype/covertype.zip",),
            ("covtype/covtype.data.gz",),
            ("covtype/covtype_kaggle15k.npz",),
        ),
        (
            Remote(
                f"{_UCI}/static/public/31/covertype.zip",
                "covtype/covertype.zip",
                rows=COVTYPE_ROWS,
                member="covtype.data",
            ),
        ),
        _covtype,
    ),
    "higgs": Recipe(
        (("higgs/HIGGS.csv.gz",), ("higgs/HIGGS-first.csv.gz",), ("higgs/higgs_sas11k.npz",)),
        (
            Remote(
                f"{_UCI}/ml/machine-learning-databases/00280/HIGGS.csv.gz",
                "higgs/HIGGS-first.csv.gz",
                first_bytes=_HIGGS_FIRST_BYTES,
                rows=HIGGS_ROWS,
            ),
        ),
        _higgs,
    ),
    "mnist": Recipe(
        (
            tuple(f"mnist/{file}" for file in _IDX_FILES),
            ("mnist/mnist.npz",),
            ("mnist/mnist_small.npz",),
        ),
        _idx_remotes(_MNIST, "mnist", _MNIST_MD5),
        _mnist,
    ),
    "fashion-mnist": Recipe(
        (
            tuple(f"fashion_mnist/{file}" for file in _IDX_FILES),
            ("fashion_mnist/fashion_mnist_sprite900.npz",),
        ),
        _idx_remotes(_FASHION, "fashion_mnist", _FASHION_MD5),
        _fashion,
    ),
    "cifar10": Recipe(
        (("cifar10/cifar-10-binary.tar.gz",), ("cifar10/cifar10_small.npz",)),
        (
            Remote(
                "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                "cifar10/cifar-10-binary.tar.gz",
                "sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            ),
        ),
        _cifar10,
    ),
}
