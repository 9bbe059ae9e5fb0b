"""Data sets for `fastsel compare`: named public sets and your own CSV, Parquet and NPZ files.

`load` returns a `Dataset`: inputs and targets as tensors, already split into train and test and
standardised with the statistics of the train part alone. A published split is taken as it is;
where `load` splits, rows that are equal in every feature never end up on both sides.

Example:
    >>> from fastsel import data
    >>> digits = data.load("digits")
    >>> tuple(digits.train_inputs.shape[1:]), digits.task, digits.num_outputs
    ((1, 8, 8), 'classification', 10)
"""

from __future__ import annotations

from fastsel.data.dataset import DataError, Dataset, Task
from fastsel.data.load import NAMES, load

__all__ = ["NAMES", "DataError", "Dataset", "Task", "load"]
