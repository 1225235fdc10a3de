"""Losses as pure functions of what the student computed and what the cache holds: no settings, no state.

Begin with `sums.py`: every loss is a sum over what it counts, and the count. Doors, each with its formula and paper:
`relations.py` (`mha`, `direct`), `hidden.py` (`hs` in all its forms), `distributions.py` (`od` and `mlm` on given
logits), `vocabulary.py` (the same where all logits would not fit into memory). Weighs nothing and reads nothing; knows
no layers, stores or trainings. Costs torch to import, so nothing is imported here.
"""
