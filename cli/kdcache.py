"""`kdcache`: build or import a cache of teacher outputs, and look after it.

Standard output carries results, standard error carries progress. Modules that need torch are imported by the command
that uses them, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from cli.cache_build import BuildFlags, build
from cli.cache_derive import DeriveFlags, derive
from cli.cache_drop import DropFlags, drop
from cli.cache_import import ImportFlags, import_targets
from cli.cache_info import InfoSettings, info
from cli.cache_plan import PlanSettings, plan
from cli.cache_verify import VerifySettings, verify
from cli.completion import print_completion
from cli.entry import run_command
from cli.options import Command, run_chosen

PROG = "kdcache"
COMMANDS = {
    "build": Command(
        run=build,
        settings=BuildFlags,
        line="run the teacher once over a corpus and write what students learn from",
    ),
    "plan": Command(
        run=plan,
        settings=PlanSettings,
        line="say what a build would write and how long it would take, and write nothing",
    ),
    "import": Command(
        run=import_targets,
        settings=ImportFlags,
        line="make a cache of targets that something else computed, such as an inference engine",
    ),
    "derive": Command(
        run=derive,
        settings=DeriveFlags,
        line="make a smaller cache from a larger one, without the teacher",
    ),
    "drop": Command(
        run=drop,
        settings=DropFlags,
        line="give up targets of a finished cache, and free what they take",
    ),
    "verify": Command(
        run=verify,
        settings=VerifySettings,
        line="check every byte of caches, and on request what the teacher gives for some rows",
    ),
    "info": Command(
        run=info,
        settings=InfoSettings,
        line="say what is in a cache: targets, sizes, bytes per token, missing blocks",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    return run_command(_main, PROG, argv)


def _main(argv: list[str]) -> int:
    if print_completion(argv, PROG, {name: command.settings for name, command in COMMANDS.items()}):
        return 0
    return run_chosen(argv, COMMANDS, PROG)


if __name__ == "__main__":
    raise SystemExit(main())
