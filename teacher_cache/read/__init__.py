"""Finished stores to decoded rows: every byte is compared with its hash before anything is made of it.

Begin with `pool.py` (`open_caches`, and `CacheSource`, what training and evaluation read), then `reader.py` (a single
store). `load.py` reads and decompresses a block in any thread, `decode.py` turns some of its rows into tensors on any
device; `merge.py` says which stores go together, `missing.py` what one lacks and how to add it, `info.py` what is in
one. Doors: `open_caches`, `CacheSource`, `describe_store`. Writes nothing, and knows neither teachers nor students.
Costs torch to import, so nothing is imported here.
`load.py` is tested in `test_reader.py`, `merge.py` in `test_pool.py`, `info.py` in `test_cache_info.py`.
"""
