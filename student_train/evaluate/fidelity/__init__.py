"""`kdeval fidelity`: how closely a student follows its teacher on held-out rows."""
