"""Text to rows of token ids in their final order, and the masked views of rows.

Begin with `corpus.py` (documents -> rows); it stands on `documents.py` (files and hub names -> documents), `tokens.py`
(-> ids in a temporary file) and `mixing.py` (shares of several sources). `masking.py` hides positions of a row.
Doors: `pack_corpus`, `Rows`, `mask_rows`. `documents.py` imports datasets, which takes a second.
Knows tokenizers; nothing of models, targets or stores.
"""
