"""What those who write a store and those who read it agree on: names and records, no bytes and no models.

Begin with `targets.py` (what can be kept of a teacher), then `manifest.py` (what a store says of itself) and `batch.py`
(what comes out when it is read). `streams.py` says which arrays of vectors the targets need, `layers.py` which teacher
layers a student of some depth learns from. Doors: `Manifest`, `TargetSpecs`, `VectorStream`, `TargetRequest`,
`TargetBatch`. Standard library only, torch for type checkers alone: importing it costs nothing.
First tested by what reads and writes them: `manifest.py` in `test_schema.py`, `targets.py` in `test_fixed.py`,
`streams.py` in `test_layout.py`, `batch.py` in `test_decode.py`.
"""
