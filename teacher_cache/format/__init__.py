"""What a store is made of, format version 1: shards, commits, seals, groups."""
