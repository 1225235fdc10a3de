"""`kdcache verify`: is every byte what was written, and, with --deep, is it what the teacher says?

Begin with `verify.py`. `survey.py` reads one group and collects what is to be hashed, `unfinished.py` judges what no
seal vouches for yet, `evict.py` takes damage out so that a build can fill it again. `deep/` asks the teacher once more.
Doors: `verify_store`, `evict_damage`, `deep_check` in `deep/deep.py`; the last alone runs a model.
Knows how stores are made and read; nothing of how they are built or derived.
"""
