"""Models as ONNX files: written, made smaller, checked against PyTorch, run: what `latency/` and `export/` share.

Begin with `graph.py` (a model becomes a file that computes the same). `quantise.py` makes int8 files of it,
`session.py` runs files, `records.py` holds what was measured of them (`schemas.py` checks it when it is read back),
`packages.py` says what has to be installed.
Doors: `export_onnx`, `quantise_dynamic`, `quantise_static`, `open_session`, `OnnxReport`.
Knows models and token ids; no cache, no tokenizer, no task.
"""
