"""Vocabularies cut to the ids that a text or a cache uses: tokenizer, weights and targets with fewer ids.

Begin with `kept_ids.py`, the record of which ids there still are and its file in a student's folder. `text.py` counts
ids and compares pieces, `needed.py` says what a tokenizer cannot do without, `keep.py` puts the two together,
`tokenizer.py` and `weights.py` cut, `mapping.py` and `source.py` turn what a cache gives into the student's ids.
Knows tokenizers, models and batches; nothing of settings. Importing this costs nothing; what lies in it imports torch.
"""
