"""Objects by key in a folder or a bucket, each there whole or not at all.

Begin with `base.py`, what every storage can do. `local.py` is a folder, `remote.py` a bucket, with `bucket.py`
(requests, tried again for a while), `failures.py` (what the server means) and `lease.py` (the lock). `overlay.py` is a
storage whose writes stay in memory, `local_cache.py` keeps copies of a bucket's objects on a disk.
Doors: `open_storage`, `Storage`. obstore is imported only once an address such as s3://bucket/name is opened.
Does not know what objects mean: to a storage a manifest is bytes under a key.
"""
