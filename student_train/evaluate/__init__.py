"""`kdeval`: measure an exported student as any user would load it. Importing this package costs nothing.

A wing for each command. `fidelity/`, `finetune/`, `perplexity/`, `lm_eval/` and `latency/` measure, do not know each
other, and leave a record in the student's directory; `compare/` and `report/` read the records (`run_records.py`) and
measure nothing; `export/` makes a folder to publish of student and records, and measures its ONNX files by what the
others measure with. They share `load.py` and `causal.py` (a student from its directory), `onnx/` (ONNX files),
`random_ids.py`, `schemas.py` (what records must be), `drawing.py` (what plots have in common), `markdown.py` and
`new_folder.py`.
Doors: `measure_fidelity`, `measure_finetune`, `measure_perplexity`, `measure_latency`, `compare_runs`, `make_report`,
`export_student_folder`, each in the file named after its command; `measure_lm_eval` in `lm_eval/harness.py`.
Knows no DeepSpeed; only `fidelity/` and `export/` open a store.
"""
