"""Numbers to small arrays and back, with a declared error.

Begin with `base.py`, what every codec of vectors gives, and `fixed.py` (float16, int8, int4), the plain ones. `nmse.py`
rotates and rounds to an error that was asked for; `packing.py` puts its small whole numbers into bytes. Distributions:
`sparse_logits.py` takes the largest entries or draws, `logits.py` codes them.
Doors: `make_codec`, `Quantiser`, `Transform`, `TopkCodec`, `SampleCodec`. All of them import torch.
Knows nothing of blocks, files, models or text: arrays go in, arrays come out.
"""
