"""`kdcache build` and `kdcache plan`: the teacher reads a corpus once, and a store comes to be.

Begin with `build.py`, the one loop; then `inputs.py` (what it starts from), `resolve.py` (settings -> what is kept),
`passes.py` (rows -> what the teacher gives), `encode.py` and `block.py` (-> the arrays of a block), `blocks.py` (-> the
disk; its tests are those of `build.py`, and of `importing/`, which ends in it too). `plan.py` and `trial.py` run the
same code on a few rows. Several processes share the blocks (`workers.py`), or the teacher (`together.py`).
Doors: `build_cache`, `plan_build`, `BuildSettings`. Importing this face, or `settings.py`, costs nothing; the rest
imports torch. Knows every material below it; nothing of deriving, verifying or training.
That builds survive being killed, extended and sent to a bucket is tested in `tests/teacher_cache/`, one folder up.
"""
