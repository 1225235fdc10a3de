"""A student of the asked shape with its first weights, and the plain Hugging Face folder that it ends in.

Begin with `student.py` (from `--student` and `--init` to a model), then `shape.py` (sizes) and `initialise.py` (weights
copied from the teacher). `layer_importance.py` finds the layers that would be missed most, `narrowing/` slices a
narrower student from the teacher, `pretrained.py` loads folders, `export.py` writes one.
Doors: `build_student`, `export_student`, `load_model`.
Knows Transformers and rows of token ids; no method, no engine, no training.
"""
