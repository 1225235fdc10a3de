"""The three console scripts: `kdcache`, `kdtrain` and `kdeval`.

Of sweeps, `sweep_work.py` and `sweep_evaluations.py` are tested in `test_sweep_shared.py`, `sweep_plan.py` and
`sweep_process.py` in `test_sweep.py`. `train_flags.py` is tested with both, `train_plan.py` in `test_kdtrain.py`, too.
"""

import os

if os.environ.get("NO_COLOR"):
    # read when tyro is imported, which does not know https://no-color.org; rich does
    os.environ.setdefault("PYTHON_TYRO_ANSI_CODES", "False")
