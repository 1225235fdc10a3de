"""Rows of a cache for training: which ones, in an order that one number describes, read ahead of the step.

Begin with `loader.py` (`CacheLoader`, what `kdtrain` iterates over), then `order.py`, the arithmetic behind it. Doors:
`training_batches` and `CacheDataset` for other people's loops (`batches.py`, `dataset.py`), `CacheLoader`,
`split_source` (training and held-out rows), `FirstRows` (the sample that is read before a training). Reads stores;
knows no student, no loss and no method. Costs torch to import, so nothing is imported here.
"""
