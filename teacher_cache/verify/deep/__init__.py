"""The teacher runs again on some rows of a store: is what is decoded what it gives?

Begin with `deep.py`, the loop over rows. `rows.py` is one row as three sides see it; `vectors.py` and `logits.py`
compare each kind of target, and `tolerance.py` says how far off is still right.
Door: `deep_check`. Takes the bytes of a store as they are: whether they are what was written is for `verify.py`.
"""
