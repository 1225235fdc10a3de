"""Narrower students that start from the teacher: its layers sliced to another width and fitted to what it computes.

Begin with `narrow.py` (the order of the steps), then `basis.py` (which components are kept) and `layer.py` (one
layer, part by part). Below them: `attention_heads.py`, `regression.py`, `mlm_head.py`, `parts.py` (where a family
keeps its parts), `replay.py` (layers run one at a time) and `sample.py` (the rows to fit on).
Decoders: `decoder.py` in place of `narrow.py`; `decoder_layer.py`, `decoder_heads.py` and `decoder_parts.py` in place
of theirs, all tried by the test of `decoder.py`.
Doors: `find_obstacle` and `slice_student` (`slicing.py`, which tells encoders and decoders apart), `read_sample`.
Knows the two models by their parts, and token ids; nothing of settings, targets or files.
"""
