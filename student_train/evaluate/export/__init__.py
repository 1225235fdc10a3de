"""`kdeval export`: from a student to a folder that can be published and served.

Begin with `export.py` (settings become a folder, and a report of it), then `source.py` (what kind of model the student
is). `folder.py` writes the model's own files, `embedding.py` those of sentence-transformers, `onnx_files.py` the ONNX
files, which `measure.py` measures, on rows of `cache_rows.py` and with `task_score.py`; `card.py` writes the model card
from the run's records (`facts.py`), with `card_data.py` (its metadata), `card_text.py` (its tables) and `commands.py`
(how it was made). `push.py` hands the folder to the hub, `settings.py` holds the flags.
Doors: `export_student_folder`, `ExportReport`, `ExportSettings`.
Stands on the other measures of `kdeval`; no teacher is run but one that embeds sentences.
"""
