"""`kdeval`: measure students.

Standard output carries results, standard error carries progress. Modules that need torch are imported by the command
that uses them, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from cli.entry import run_command
from cli.eval_compare import compare
from cli.eval_fidelity import fidelity
from cli.eval_finetune import finetune
from cli.eval_latency import latency
from cli.eval_report import report
from cli.options import run_chosen

COMMANDS = {
    "fidelity": (fidelity, "how close a student comes to its teacher, on rows of a cache that it was not trained on"),
    "finetune": (finetune, "how well a student does when it is fine-tuned on a task: GLUE, XNLI, token classification"),
    "latency": (latency, "how long a forward pass of a student takes, and how much faster that is than its teacher"),
    "compare": (compare, "runs side by side: fidelity, scores with significance, latency, in tables and plots"),
    "report": (report, "one run as an HTML page: curves, fidelity, attention relations, tasks, latency, provenance"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    return run_command(lambda own: run_chosen(own, COMMANDS, "kdeval"), "kdeval", argv)


if __name__ == "__main__":
    raise SystemExit(main())
