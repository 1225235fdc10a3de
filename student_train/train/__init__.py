"""`kdtrain`: prepare a run, take its steps, record them, keep the best student."""
