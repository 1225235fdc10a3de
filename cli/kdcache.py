"""`kdcache`: build a cache of teacher outputs, and look after it.

Standard output carries results, standard error carries progress. Modules that need torch are imported by the command
that uses them, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from cli.cache_build import build
from cli.cache_derive import derive
from cli.cache_info import info
from cli.cache_plan import plan
from cli.cache_verify import verify
from cli.entry import run_command
from cli.options import run_chosen

COMMANDS = {
    "build": (build, "run the teacher once over a corpus and write what students learn from"),
    "plan": (plan, "say what a build would write and how long it would take, and write nothing"),
    "derive": (derive, "make a smaller cache from a larger one, without the teacher"),
    "verify": (verify, "check every byte of caches, and on request what the teacher gives for some rows"),
    "info": (info, "say what is in a cache: targets, sizes, bytes per token, missing blocks"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    return run_command(lambda own: run_chosen(own, COMMANDS, "kdcache"), "kdcache", argv)


if __name__ == "__main__":
    raise SystemExit(main())
