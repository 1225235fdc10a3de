"""Text to rows of token ids in their final order, and the masked views of rows.

Begin with `corpus.py` (documents -> rows). It stands on `documents.py` (files, folders and hub names -> documents),
which reads each kind of file in a room of its own: `plain_text.py`, `json_files.py`, `tables.py`, over `text_files.py`,
`columns.py` and `folders.py`. `conversations.py` finds conversations in tables, `chat.py` writes them by a template.
Then come `sources.py`, `pieces.py` and `tokens.py` (-> ids in a temporary file), `frame.py` and `packing.py` (what
stands around text, where rows begin), `rows.py` (reads them) and `mixing.py` (shares of several sources). `masking.py`
hides positions of a row, `next_tokens.py` finds those whose next token a causal model guesses.
Doors: `pack_corpus`, `Rows`, `mask_rows`, `next_token_places`. `documents.py` imports datasets, which takes a second.
Knows tokenizers; nothing of models, targets or stores.
"""
