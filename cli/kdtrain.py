"""`kdtrain`: train a student from a teacher cache. Flags are the fields of `TrainFlags`.

Standard output gets the result, as a line or as JSON; everything else goes to standard error. A run that SIGTERM or
Ctrl-C stopped has saved a checkpoint and exits with 143 or 130. A `--config` file with `runs:` or `grid:` in it is a
sweep (`cli/sweep.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cli.completion import print_completion
from cli.display import is_quiet, tell_loading
from cli.entry import run_command
from cli.options import SWEEP_KEYS, parse, read_config, split_config
from cli.train_flags import TrainFlags

if TYPE_CHECKING:
    from student_train.settings import TrainSettings
    from student_train.train.train import TrainResult

PROG = "kdtrain"
_SIGNALLED = 128


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(_main, prog=PROG, argv=argv)


def _main(argv: list[str]) -> int:
    if print_completion(argv, PROG, {"": TrainFlags}):
        return 0
    path, own = split_config(argv, PROG)
    content = {} if path is None else read_config(path)
    if path is not None and SWEEP_KEYS & content.keys():
        from cli.sweep import run_sweep  # what it checks records with takes a while, too

        return run_sweep(path, content, own)
    flags = parse(TrainFlags, argv, prog=PROG, content=content)
    settings = flags.training()
    tell_loading("PyTorch and DeepSpeed")
    from student_train.engine.ranks import first_process  # torch and deepspeed, which --help does not need
    from student_train.train.train import train

    if settings.dry_run:
        return _try_out(settings, flags)
    result = train(settings, quiet=is_quiet())
    if first_process():
        print(json.dumps(result.to_json(), allow_nan=False) if settings.json else _result_in_words(result))
    return 0 if result.stopped_by is None else _SIGNALLED + result.stopped_by


def _try_out(settings: TrainSettings, flags: TrainFlags) -> int:
    from cli.train_plan import describe_plan, plan_of
    from student_train.engine.ranks import first_process

    plan = plan_of(settings, flags)
    if first_process():
        print(json.dumps(plan.to_json()) if settings.json else f"{describe_plan(plan)}. Nothing was written")
    return 0


def _result_in_words(result: TrainResult) -> str:
    parts = ", ".join(f"{name.removeprefix('valid_')} {value:.4g}" for name, value in result.valid.items())
    trained = f"{result.steps:,} steps, {result.tokens:,} tokens, {result.seconds:,.0f} s"
    if result.stopped_by is not None and result.steps == 0:
        return "stopped before the first step: nothing is saved, the same command starts again"
    if result.stopped_by is not None:
        return f"stopped after {trained}; the checkpoint is in {result.out}/checkpoints, --resume auto goes on from it"
    return f"student in {result.out} ({trained}){': validation ' + parts if parts else ''}"


if __name__ == "__main__":
    raise SystemExit(main())
