"""`kdeval fidelity`: how closely a student follows its teacher on held-out rows.

Begin with `fidelity.py` (a student and a cache become a report), then `plan.py` (which layers, heads and rows are
compared) and `sums.py` (the measures). `own_record.py` reads what the student says of its training, `records.py`
holds the report and its table, `heat_maps.py` shows the relations of one sentence, `settings.py` the flags.
Doors: `measure_fidelity`, `relation_maps`, `FidelityReport`, `FidelitySettings`.
Knows stores and losses; the teacher itself is not needed, and nothing of a training but its record.
"""
