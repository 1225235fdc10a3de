"""DeepSpeed and its quirks: its configuration, its ranks, its checkpoints.

Begin with `engine.py` (a configuration becomes an engine), then `config.py` (flags become a configuration),
`ranks.py` (what processes tell each other) and `checkpoint.py` (whole or not there). `universal.py` converts
checkpoints for another number of processes, `memory.py` explains a GPU that is full.
Doors: `running_engine`, `make_config`, `Ranks` and `join_ranks`, `save_checkpoint` and `load_checkpoint`.
Knows settings and any `nn.Module`; no cache, no method, no student. What two processes do together is tested in
`test_ranks.py`.
"""
