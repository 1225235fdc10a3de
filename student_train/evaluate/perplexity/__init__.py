"""`kdeval perplexity`: how well a causal LM predicts text, a token and a byte.

Begin with `perplexity.py` (documents become a report), then `windows.py` (which token is predicted where) and
`scoring.py` (nats in bounded memory). `records.py` holds the report and its table, `settings.py` the flags.
Doors: `measure_perplexity`, `PerplexityReport`, `PerplexitySettings`.
Knows strings, tokenizers and causal models; no file of text, no cache.
"""
