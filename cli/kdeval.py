"""`kdeval`: measure students.

Standard output carries results, standard error carries progress. Modules that need torch are imported by the command
that uses them, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from cli.completion import print_completion
from cli.entry import run_command
from cli.eval_compare import CompareSettings, compare
from cli.eval_export import ExportFlags, export
from cli.eval_fidelity import fidelity
from cli.eval_finetune import finetune
from cli.eval_latency import latency
from cli.eval_lm_eval import lm_eval
from cli.eval_perplexity import perplexity
from cli.eval_report import ReportSettings, report
from cli.eval_trim import trim
from cli.options import Command, run_chosen
from student_train.evaluate.fidelity.settings import FidelitySettings
from student_train.evaluate.finetune.settings import FinetuneSettings
from student_train.evaluate.latency.settings import LatencySettings
from student_train.evaluate.lm_eval.settings import LmEvalSettings
from student_train.evaluate.perplexity.settings import PerplexitySettings
from student_train.evaluate.trim.settings import TrimSettings

PROG = "kdeval"
COMMANDS = {
    "fidelity": Command(
        run=fidelity,
        settings=FidelitySettings,
        line="how close a student comes to its teacher, on rows of a cache that it was not trained on",
    ),
    "finetune": Command(
        run=finetune,
        settings=FinetuneSettings,
        line="how well a student does when it is fine-tuned on a task: GLUE, XNLI, token classification",
    ),
    "perplexity": Command(
        run=perplexity,
        settings=PerplexitySettings,
        line="how well a causal student predicts text: perplexity, and bits per byte, which compare over tokenizers",
    ),
    "lm-eval": Command(
        run=lm_eval,
        settings=LmEvalSettings,
        line="how well a causal student does on tasks of lm-evaluation-harness",
    ),
    "latency": Command(
        run=latency,
        settings=LatencySettings,
        line="how long a student takes for a forward pass, or for its answer if it is causal, and its teacher",
    ),
    "trim": Command(
        run=trim,
        settings=TrimSettings,
        line="a student with the ids alone that a text uses: embedding, head and tokenizer lose the others",
    ),
    "export": Command(
        run=export,
        settings=ExportFlags,
        line="a student as a folder to publish and to serve: model card, ONNX and int8 files, measured",
    ),
    "compare": Command(
        run=compare,
        settings=CompareSettings,
        line="runs side by side: fidelity, scores with significance, latency, in tables and plots",
    ),
    "report": Command(
        run=report,
        settings=ReportSettings,
        line="one run as an HTML page: curves, fidelity, attention relations, tasks, latency, provenance",
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
