"""`kdcache build`: the teacher runs once over a corpus and a store is written. `kdcache plan`: what it would take."""
