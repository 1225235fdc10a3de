"""`kdcache derive` and `kdcache drop`: a smaller store from a larger one, or in its place, without the teacher.

Begin with `derive.py`, the loop over blocks; `origins.py` says what each stream is made from, `recalibrate.py` finds
the new steps, `recode.py` makes the blocks. `rounding.py` is the arithmetic of rounding twice. `drop.py` gives up
targets of a store in place.
Doors: `derive_store`, `DeriveSettings`, `drop_targets`, `DropSettings`. Importing this face, `settings.py` or
`drop_settings.py`, costs nothing.
Knows how stores are read and written; nothing of building, and nothing of models beyond projections.
"""
