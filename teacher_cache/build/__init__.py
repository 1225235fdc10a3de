"""`kdcache build` and `kdcache plan`: the teacher runs once over a corpus and a store comes to be."""
