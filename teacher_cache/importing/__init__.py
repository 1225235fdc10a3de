"""`kdcache import`: targets that something else computed, from local files into a store like any other.

    files (hashed) -> rows (checked, all of them) -> the same coded blocks, commits and seal as a build's

Begin with `importing.py`, the one loop; `source.py` says what a source gives, and each shape of files has a room:
`logprobs.py` (vLLM's prompt log-probabilities, and plain columns), `completions.py` (OpenAI-like servers),
`distillkit.py`, `hidden_folders.py`. `files.py` reads lines and tables, `values.py` ids and entries of their records,
`checks.py` makes of a row's log-probabilities what a store keeps, `rows.py` puts rows in order, `block.py` codes them,
`known.py` is what is known of a teacher without weights. (`block.py`, `source.py` and `values.py` are tested with the
shapes that use them, first in the test of `importing.py`.) Doors: `import_store`, `ImportSettings`. Importing this
face, or `settings.py`, costs nothing; the rest imports torch. Stands on `build/`, whose blocks, calibration and
resuming it uses; no model runs here.
"""
