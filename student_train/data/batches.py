"""The batches of `kdtrain` for a training loop of your own: from the path of a cache to decoded targets.

In: a cache, a `TargetRequest` and how to batch. Out: a `CacheLoader`, an endless iterator that reads ahead in a thread
of its own; no worker process is needed. Costs: see `loader.py`.
"""

from __future__ import annotations

from student_train.data.loader import CacheLoader
from student_train.data.source import Cache, open_source, split_source
from student_train.data.split import count_rows
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.errors import SettingsError


def training_batches(
    cache: Cache,
    request: TargetRequest,
    *,
    batch_size: int,
    seed: int = 0,
    position: int = 0,
    epochs: float | None = None,
    valid_share: float = 0.02,
    rank: int = 0,
    world_size: int = 1,
    device: str = "cpu",
    skip_damaged: bool = False,
) -> CacheLoader:
    """Iterate over the batches that `kdtrain` trains on with the same seed, batch size and share of held-out rows.

    Each item is a `TrainingBatch`: `views` maps "plain" and "masked", as far as the request needs them, to a
    `TargetBatch` of B rows (`input_ids_BT`, `real_BT()`, `hidden[layer]` [B, T, D], `attention[layer]`, `masked`,
    `logits`), float32 on `device`; `part(start, stop)` decodes some of the rows alone. Close the iterator, or use it in
    a `with`, to end its thread.

    Args:
        cache: a store or several: paths, or what `open_caches` gave.
        request: what to read.
        batch_size: rows of a global batch, over all ranks.
        seed: of the order of the blocks, which is a new one in each epoch.
        position: rows of the stream that were trained on already: `batches.position` of an iterator that was stopped.
        epochs: passes over the training rows, counted from the start of the stream; None for no end.
        valid_share: share of the rows, the last ones of each store, that is left out; `CacheDataset` with
            `rows="valid"` reads those.
        rank: which of the `world_size` contiguous shares of each global batch to give.
        world_size: how many processes train together.
        device: where to decode.
        skip_damaged: leave out the rows of damaged blocks and count them in `left_out`, instead of ending.

    Raises:
        SettingsError: a number is out of its range, or no row would be left to train on.
        StoreError: the cache cannot be opened; or, while iterating, a block cannot be read.
        TargetsError: the cache does not hold what is asked for.
    """
    if batch_size < 1 or position < 0 or not 0 <= rank < world_size:
        raise SettingsError(
            f"batch_size {batch_size!r}, position {position!r}, rank {rank!r} of world_size {world_size!r}: there are "
            "no such batches; a batch has one row at least, a position is 0 or more, ranks count from 0 to below "
            "world_size"
        )
    source = open_source(cache)
    source.require(request)
    rows, _ = split_source(source, valid_share)
    return CacheLoader(
        source,
        request,
        rows=rows,
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        position=position,
        stop=None if epochs is None else round(epochs * count_rows(rows)),
        device=device,
        skip_damaged=skip_damaged,
    )
