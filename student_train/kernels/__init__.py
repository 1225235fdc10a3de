"""Loss kernels whose plain form would need memory quadratic in the row length."""
