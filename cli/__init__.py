"""The three console scripts: `kdcache`, `kdtrain` and `kdeval`.

Of sweeps, `sweep_work.py` and `sweep_evaluations.py` are tested in `test_sweep_shared.py`, `sweep_plan.py` and
`sweep_process.py` in `test_sweep.py`. `train_flags.py` is tested with both, `train_plan.py` in `test_kdtrain.py`, too.
"""
