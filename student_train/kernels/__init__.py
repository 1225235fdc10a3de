"""Loss kernels whose plain form would need memory quadratic in the row length."""

from student_train.kernels.relation import Backend, relation_kl, relation_kl_sum, stored_relation_kl_sum

__all__ = ["Backend", "relation_kl", "relation_kl_sum", "stored_relation_kl_sum"]
