"""The three console scripts: `kdcache`, `kdtrain` and `kdeval`."""

import os

if os.environ.get("NO_COLOR"):
    # read when tyro is imported, which does not know https://no-color.org; rich does
    os.environ.setdefault("PYTHON_TYRO_ANSI_CODES", "False")
