"""How well does the order in which a store is read mix documents, compared with a true shuffle of its rows?"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from student_train.data.order import RowOrder
from teacher_cache.read.reader import CacheReader

EPOCHS = 4


def measure_mixing(reader: CacheReader, batch_size: int) -> dict[str, Any]:
    """What is in a batch of either order, over a few epochs."""
    bounds = reader.block_bounds
    document_R = np.concatenate(
        [reader.load_array("document", block)[: last - first] for block, (first, last) in enumerate(pairwise(bounds))]
    )
    order = RowOrder(rows=(range(reader.rows),), bounds=bounds, seed=0)
    generator = np.random.default_rng(0)
    ours = [rows_of_epoch(order, reader.rows, epoch) for epoch in range(EPOCHS)]
    shuffled = [generator.permutation(reader.rows) for _ in range(EPOCHS)]
    return {
        "rows": reader.rows,
        "documents": len(np.unique(document_R)),
        "batch_size": batch_size,
        "epochs": EPOCHS,
        "store": describe(ours, document_R, batch_size),
        "true shuffle": describe(shuffled, document_R, batch_size),
    }


def rows_of_epoch(order: RowOrder, rows: int, epoch: int) -> NDArray[np.int64]:
    first = order.bounds
    segments = order.segments(epoch * rows, (epoch + 1) * rows)
    return np.concatenate([np.arange(part.start, part.stop) + first[part.block] for part in segments])


def describe(epochs: list[NDArray[np.int64]], document_R: NDArray[np.int64], batch_size: int) -> dict[str, float]:
    """Means over all whole batches of all epochs, and the standard error of the first."""
    distinct, same = [], []
    for rows in epochs:
        for batch in whole_batches(rows, batch_size):
            counts = np.unique(document_R[batch], return_counts=True)[1]
            distinct.append(len(counts))
            same.append(share_of_pairs(counts, batch_size))
    meet_again: list[float] = []
    for rows, following in pairwise(epochs):
        batch_of_R = np.empty(len(rows), dtype=np.int64)
        batch_of_R[following] = np.arange(len(rows)) // batch_size
        again = (np.unique(batch_of_R[batch], return_counts=True)[1] for batch in whole_batches(rows, batch_size))
        meet_again += [share_of_pairs(counts, batch_size) for counts in again]
    return {
        "documents_per_batch": round(float(np.mean(distinct)), 3),
        "standard_error": round(float(np.std(distinct, ddof=1) / len(distinct) ** 0.5), 3),
        "pairs_of_one_document": float(f"{np.mean(same):.4g}"),
        "pairs_that_meet_again": float(f"{np.mean(meet_again):.4g}"),
    }


def whole_batches(rows: NDArray[np.int64], batch_size: int) -> NDArray[np.int64]:
    batches = len(rows) // batch_size
    return rows[: batches * batch_size].reshape(batches, batch_size)


def share_of_pairs(counts: NDArray[np.int64], batch_size: int) -> float:
    """Share of the pairs of a batch whose two rows are in the same one of groups of these sizes."""
    return float((counts * (counts - 1)).sum() / (batch_size * (batch_size - 1)))


def report_mixing(console: Console, measured: dict[str, Any]) -> None:
    table = Table(
        title=f"batches of {measured['batch_size']} of {measured['rows']:,} rows, which begin in "
        f"{measured['documents']:,} documents; {measured['epochs']} epochs"
    )
    for name in ("", "documents in a batch", "pairs of one document", "pairs that meet again"):
        table.add_column(name, justify="right")
    for name in ("store", "true shuffle"):
        one = measured[name]
        table.add_row(
            name,
            f"{one['documents_per_batch']:.2f} ± {one['standard_error']:.2f}",
            f"{one['pairs_of_one_document']:.3%}",
            f"{one['pairs_that_meet_again']:.2%}",
        )
    console.print(table)
