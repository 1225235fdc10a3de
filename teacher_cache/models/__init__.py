"""What is read out of a Hugging Face model, teacher or student alike.

Begin with `families.py`: which models are encoders, and what differs from family to family. `attention_tap.py` records
queries, keys and values inside a model, `attention.py` is their arithmetic, `heads.py` runs a head alone,
`placing.py` spreads models larger than one device.
Doors: `record_attention`, `LMHead`, `AttentionProjections`, `encoder_of`. All of them import torch, and importing
`attention_tap.py` registers the tap with Transformers, so this face imports nothing.
Knows nothing of stores, rows of text or losses.
"""
