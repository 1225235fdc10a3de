"""Completion scripts, asked in a real shell as the shell asks them at a Tab."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cli import kdcache, kdeval, kdtrain
from cli.options import parse
from cli.train_flags import TrainFlags

MAINS = {"kdcache": kdcache.main, "kdtrain": kdtrain.main, "kdeval": kdeval.main}
COMMANDS = {
    **{f"kdcache {name}": command.settings for name, command in kdcache.COMMANDS.items()},
    **{f"kdeval {name}": command.settings for name, command in kdeval.COMMANDS.items()},
    "kdtrain": TrainFlags,
}
Complete = Callable[[str], list[str]]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("completion")


@pytest.fixture
def complete(scripts: Path, capsys: pytest.CaptureFixture[str]) -> Complete:
    """`complete("kdcache bu")`: what bash is given for the last word of a line; what is empty, it fills with files."""

    def ask(line: str) -> list[str]:
        program = line.split()[0]
        script = scripts / f"{program}.bash"
        if not script.exists():
            assert MAINS[program](["--completion", "bash"]) == 0
            script.write_text(capsys.readouterr().out)
        words = [*re.findall(r"=|[^\s=]+", line), *([""] if line.endswith(" ") else [])]  # as bash splits a line
        code = f"""
set -u
source {shlex.quote(str(script))}
[[ $(complete -p {program}) == "complete -o bashdefault -o default -F _{program} {program}" ]] || exit 3
COMP_WORDS=({shlex.join(words)}) COMP_CWORD={len(words) - 1}
_{program}
(( ${{#COMPREPLY[@]}} == 0 )) || printf '%s\\n' "${{COMPREPLY[@]}}"
"""
        result = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=False)
        assert (result.returncode, result.stderr) == (0, "")
        return result.stdout.split()

    return ask


@pytest.mark.parametrize(
    "line, candidates",
    [
        ("kdcache ", "build plan import derive drop verify info"),
        ("kdcache bu", "build"),
        ("kdcache --v", "--version"),
        ("kdcache --completion ", "bash zsh"),
        ("kdcache build --mix", "--mix-alpha"),
        ("kdcache -v --debug build --seq", "--seq-len"),
        ("kdcache build --rows ", "packed document"),
        ("kdcache build --rows d", "document"),
        ("kdcache build --rows=", "packed document"),
        ("kdcache build --rows=d", "document"),
        ("kdcache build --corpus a.txt b.txt --dt", "--dtype"),
        ("kdcache info --j", "--json"),
        ("kdtrain --on-bad-block ", "stop skip"),
        ("kdtrain --resume auto --act", "--activation-checkpointing"),
        ("kdtrain --completion ", "bash zsh"),
        ("kdeval finetune --task s", "sst2 stsb"),
        ("kdeval compare a b --base", "--baseline"),
    ],
)
def test_words(complete: Complete, line: str, candidates: str) -> None:
    assert complete(line) == candidates.split()


@pytest.mark.parametrize(
    "line",
    ["kdcache info ", "kdcache derive ca", "kdcache build --teacher ", "kdcache build --teacher x",
     "kdtrain --cache a ", "kdcache build --corpus=", "kdeval compare ", "kdeval report --out=re",
     "kdcache build --json pack"],
)  # fmt: skip
def test_everything_else_is_left_to_the_shell(complete: Complete, line: str) -> None:
    assert complete(line) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_that_help_lists_is_completed(
    complete: Complete, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(COMMANDS[command], ["--help"], command)
    listed = re.findall(r"^[│ ]*(?:-\w, )?(--[a-z][\w-]*)", capsys.readouterr().out, re.MULTILINE)
    completed = complete(f"{command} --")
    assert {"--help", "--config", "--debug", "--verbose", "--version"} <= set(completed)
    assert set(listed) <= set(completed)
    assert len(listed) > 1
    assert len(completed) == len(set(completed))


def test_flags_are_offered_first_where_every_argument_is_one(complete: Complete) -> None:
    assert complete("kdtrain ") == [*complete("kdtrain --"), "-q", "-v"]
    assert "--teacher" in complete("kdcache build ")


@pytest.mark.parametrize("flags", [["--completion"], ["--completion", "fish"], ["--completion=fish"],
                                   ["--completion", "bash", "zsh"]])  # fmt: skip
def test_other_shells_are_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        kdcache.main(flags)
    assert left.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("kdcache: --completion '")
    assert captured.err.endswith("give kdcache --completion bash or kdcache --completion zsh\n")


def test_the_flag_may_hold_its_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert kdcache.main(["--completion", "zsh"]) == 0
    apart = capsys.readouterr().out.splitlines()
    assert kdcache.main(["--completion=zsh"]) == 0
    assert capsys.readouterr().out.splitlines() == apart
    assert "bashcompinit" in "".join(apart)


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh here")
@pytest.mark.parametrize(
    "line, completed",
    [("kdcache bu", "kdcache build"), ("kdcache build --rows d", "kdcache build --rows document"),
     ("kdcache build --rows=d", "kdcache build --rows=document"),
     ("kdcache info some", "kdcache info some-store.zarr")],
)  # fmt: skip
def test_zsh(line: str, completed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An interactive zsh, on a terminal of zsh's own making, completes a line at a Tab; ^X^L prints what it holds."""
    assert kdcache.main(["--completion", "zsh"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "some-store.zarr").touch()
    setting_up = """
PS1=
source ./script
show() { print -r -- "<<$BUFFER>>" }
zle -N show
bindkey '^X^L' show
print ready
"""
    (tmp_path / ".zshrc").write_text(setting_up)
    code = f"""
zmodload zsh/zpty
zpty shell 'HOME=$PWD ZDOTDIR=$PWD TERM=dumb zsh -i'
zpty -r shell output '*ready*'
zpty -w -n shell {shlex.quote(line)}$'\\t\\C-x\\C-l'
zpty -r shell output '*<<*>>*'
print -r -- "$output"
zpty -d shell
"""
    result = subprocess.run(
        ["zsh", "-f", "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60, check=True
    )
    assert f"<<{completed}" in result.stdout
