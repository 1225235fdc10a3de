"""A student of the asked shape with its first weights, and the plain Hugging Face folder it ends in."""
