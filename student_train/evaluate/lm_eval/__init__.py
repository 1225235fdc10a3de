"""`kdeval lm-eval`: a causal student on tasks of EleutherAI's lm-evaluation-harness.

Begin with `harness.py`, which hands the student over and takes the results. `records.py` holds the report and its
table, `settings.py` the flags.
Doors: `measure_lm_eval`, `LmEvalReport`, `LmEvalSettings`.
Knows the harness (an extra, imported late) and causal models; no task and no cache.
"""
