"""`kdeval`: measure an exported student as any user would load it. Importing this package costs nothing.

A wing for each command. `fidelity/`, `finetune/`, `perplexity/`, `lm_eval/` and `latency/` measure, do not know each
other, and leave a record in the student's directory; `compare/` and `report/` read the records (`run_records.py`) and
measure nothing. They share `load.py` and `causal.py` (a student from its directory), `schemas.py` (what records must
be) and `drawing.py` (what plots have in common).
Doors: `measure_fidelity`, `measure_finetune`, `measure_perplexity`, `measure_latency`, `compare_runs`, `make_report`,
each in the file named after its command; `measure_lm_eval` in `lm_eval/harness.py`.
Knows no DeepSpeed; only `fidelity/` opens a store.
"""
