"""What there is to learn from a cache: one file for each `--method`, and what makes a trainable module of them.

Begin with `base.py` (what a method is), then `mha.py`, the shortest one, and `objective.py`, which makes the methods
that a training asks for. `hs.py`, `direct.py` and `od.py` (with `mlm`) are the others; `additions.py` takes those of
other packages. `projections.py` and `map_starts.py` hold the linear maps that train along, `transport.py` the problem
that `emd` solves. Doors: `make_objective`, `DistillationModel` (student and objective in one module, `model.py`),
`register_method`. Knows what a student computes, not how it was made, and nothing of engines and training loops. Costs
torch to import, so nothing is imported here.
"""
