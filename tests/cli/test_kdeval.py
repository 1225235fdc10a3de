"""`kdeval` without a command that it knows."""

from __future__ import annotations

import pytest

from cli.kdeval import main

COMMANDS = ("fidelity", "finetune", "perplexity", "lm-eval", "latency", "trim", "export", "compare", "report")


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["nonsense"], *([command, "--nonsense"] for command in COMMANDS)):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 2
    assert "fidelity" in capsys.readouterr().err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[:2] == "  " != line[1:3]]
    assert listed == list(COMMANDS)
