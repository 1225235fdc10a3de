"""`kdcache derive`: a smaller store from a larger one, without the teacher.

Begin with `derive.py`, the loop over blocks; `origins.py` says what each stream is made from, `recalibrate.py` finds
the new steps, `recode.py` makes the blocks. `rounding.py` is the arithmetic of rounding twice.
Doors: `derive_store`, `DeriveSettings`. Importing this face, or `settings.py`, costs nothing.
Knows how stores are read and written; nothing of building, and nothing of models beyond projections.
"""
