"""Ways to learn from the cache: layers, weights and trainable maps around the losses."""
