"""`kdeval latency`: how long a forward pass takes, or an answer, and how much faster than the teacher's that is.

Begin with `latency.py` (settings become a report), then `schedule.py` (what fits into the given time), `benches.py`
(how a pass is run) and `turns.py` (models one after the other). `generation.py` is the same for causal students, with
`generation_records.py`. `models.py` loads encoders, `records.py` holds the report and its tables, `settings.py` the
flags; `../onnx/` writes and runs their export.
Doors: `measure_latency`, `LatencyReport`, `LatencySettings`.
Knows encoders, causal models and random ids; no cache, no tokenizer, no head of an encoder.
"""
