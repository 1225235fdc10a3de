"""What a store is made of, format version 1: shards of arrays, commits that make blocks exist, seals that end groups.

Begin with `layout.py` (what lies where), then `protocol.py` (commits, seals), `groups.py`, `writer.py`, `verified.py`.

Doors: `StoreLayout.of` says what a manifest implies, `GroupWriter` writes blocks and seals, `VerifiedObjects` reads
bytes that a seal or commit vouches for, `read_groups` says what a store holds and `groups_to_build` what is left to do.

Knows storages, codecs and manifests; no model is run here, no text read, nothing trained. Importing a file of this wing
costs torch and zarr; importing the wing itself costs nothing.
`arrays.py` is tested in `test_layout.py`.
"""
