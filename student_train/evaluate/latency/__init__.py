"""`kdeval latency`: how long a forward pass takes, and how much faster than the teacher's that is.

Begin with `latency.py` (settings become a report), then `schedule.py` (what fits into the given time) and
`benches.py` (how a pass is run). `models.py` loads encoders, `onnx_export.py` writes and checks their export,
`records.py` holds the report and its tables, `settings.py` the flags.
Doors: `measure_latency`, `LatencyReport`, `LatencySettings`.
Knows encoders and random ids; no cache, no tokenizer, no head.
"""
