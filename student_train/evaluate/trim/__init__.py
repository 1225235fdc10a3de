"""`kdeval trim`: a finished student with the ids alone that a text uses.

Begin with `trim.py`; the cutting itself is done in `students/vocabulary/`. `settings.py` has the flags,
`records.py` the report and its table. Doors: `TrimSettings`, `trim_student`.
Knows models, tokenizers and text as strings; nothing of stores and training.
"""
