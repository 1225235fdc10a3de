"""Loss kernels whose plain form would need memory quadratic in the row length.

Begin with `relation.py` (the formula, and which backend computes it), then `reference.py` (the formula as it stands),
`chunked.py` (tiles, on any device) and `fused.py` (GPUs). `fused.py` launches the kernels of `triton_relation.py` (the
forward pass) and `triton_gradient.py` (the backward pass), which are tested through it, in
`tests/student_train/kernels/test_fused.py`; `triton_probe.py` finds out whether Triton can compile them here.
Doors: `relation_kl`, `relation_kl_sum`, `stored_relation_kl_sum`. Importing them costs torch.
Knows tensors; no model, no cache, no layers.
"""

from student_train.kernels.relation import Backend, relation_kl, relation_kl_sum, stored_relation_kl_sum

__all__ = ["Backend", "relation_kl", "relation_kl_sum", "stored_relation_kl_sum"]
