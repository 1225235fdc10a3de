"""`kdeval compare`: runs side by side, from the records that they left.

Begin with `compare.py` (records become a `Comparison`), then `rows.py` (trainings that differ in their seed are one
row) and `significance.py` (what a difference is worth). For people: `table.py`, `plots.py`, and `notes.py` (what is
missing or not alike). `causal.py` and `int8.py` are what is said of causal students and of int8 files alone.
Doors: `compare_runs`, `comparison_grids`, `markdown`, `plot_comparison`.
Knows records alone: no model is loaded and nothing is measured.
"""
