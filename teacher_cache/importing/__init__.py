"""`kdcache import`: targets that something else computed, from local files into a store like any other.

    files (hashed) -> rows (checked, all of them) -> the same coded blocks, commits and seal as a build's

Begin with `importing.py`, the one loop; `source.py` says what a source gives, and each shape of files has a room:
`logprobs.py` (vLLM's prompt log-probabilities, and plain columns). `files.py` reads lines and tables, `checks.py` makes
of a row's log-probabilities what a store keeps, `rows.py` puts rows in order, `known.py` is what is known of a teacher
without weights. Doors: `import_store`, `ImportSettings`. Importing this face, or `settings.py`, costs nothing; the rest
imports torch. Stands on `build/`, whose blocks, calibration and resuming it uses; no model runs here.
"""
