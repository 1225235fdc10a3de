"""DeepSpeed and its quirks: its configuration, its ranks, its checkpoints."""
