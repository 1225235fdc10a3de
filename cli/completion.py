"""`--completion bash` or `zsh`: a script by which the shell completes commands, flags and what flags choose from.

    source <(kdcache --completion bash)

All words stand in the script, so that nothing of ours runs at a Tab. Where neither a flag nor one of a few values can
be, the shell completes names of files, as it does for other programs: most of what commands take are paths. The script
is for bash; zsh reads it through its own `bashcompinit`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cli.entry import COMMON_SWITCHES, describe_version
from cli.options import list_flags

COMPLETION = "--completion"
FOR_ALL = ("--config", "--help", "--version", *COMMON_SWITCHES)
FOR_ZSH = """\
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
autoload -Uz bashcompinit && bashcompinit
"""
SHELLS = {"bash": "", "zsh": FOR_ZSH}
"""What each needs before the script."""

# bash splits --flag=value at the sign, zsh does not. `words` are for a word that is no flag, right after the command,
# `flags` for one that starts as a flag does, `values` for what follows a flag with few values.
SCRIPT = """\
# {version}: {prog} {completion} {shell}
{preface}_{prog}() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" sign="" command="" start=0 i
    local words="" flags="" values=""
    COMPREPLY=()
    if [[ "$word" == "=" ]]; then
        word=""
    elif [[ "$before" == "=" ]]; then
        before="${{COMP_WORDS[COMP_CWORD-2]}}"
    elif [[ "$word" == --*=* ]]; then
        before="${{word%%=*}}" sign="${{word%%=*}}=" word="${{word#*=}}"
    fi
    for ((i = 1; i < COMP_CWORD; i++)); do
        case "${{COMP_WORDS[i]}}" in
            {switches}) start=$i ;;
{chosen}            *) break ;;
        esac
    done
    case "$command" in
{arms}
    esac
    case "$command $before" in
{choices}
    esac
    if [[ -n "$values" ]]; then
        words="$values"
    elif [[ "$word" == -* ]]; then
        words="$flags"
    elif ((COMP_CWORD != start + 1)); then
        words=""
    fi
    if [[ -n "$words" ]]; then
        COMPREPLY=($(compgen -P "$sign" -W "$words" -- "$word"))
    fi
}}
complete -o bashdefault -o default -F _{prog} {prog}
"""


CHOSEN = """\
            {commands}) start=$i; command="${{COMP_WORDS[i]}}"; break ;;
"""


def print_completion(argv: Sequence[str], prog: str, settings: Mapping[str, type[Any]]) -> bool:
    """Whether `argv` asks for the script; it is printed then. `settings` are those of each command, or of ''.

    Exits with code 2 where there is none for the shell.
    """
    flag, sign, shell = argv[0].partition("=") if argv else ("", "", "")
    if flag != COMPLETION:
        return False
    chosen = [shell, *argv[1:]] if sign else list(argv[1:])
    if len(chosen) != 1 or chosen[0] not in SHELLS:
        known = " or ".join(f"{prog} {COMPLETION} {shell}" for shell in SHELLS)
        given = f"{COMPLETION} {' '.join(chosen)!r}"
        print(f"{prog}: {given}: there are scripts for {' and '.join(SHELLS)} alone; give {known}", file=sys.stderr)
        raise SystemExit(2)
    print(completion_script(chosen[0], prog, settings), end="")
    return True


def completion_script(shell: str, prog: str, settings: Mapping[str, type[Any]]) -> str:
    """The script for `shell`, one of `SHELLS`."""
    commands = [name for name in settings if name]
    arms, choices = [], [_arm(f" {COMPLETION}", values=SHELLS)]
    if commands:
        arms.append(_arm("", flags=(COMPLETION, "--help", "--version"), words=commands))
    for name, each in settings.items():
        found = list_flags(each)
        flags = sorted([*found.choices, *FOR_ALL, *([] if name else [COMPLETION])])
        arms.append(_arm(name, flags=flags, words=() if found.positional else ("$flags",)))
        choices += [_arm(f"{name} {flag}", values=values) for flag, values in found.choices.items() if values]
    return SCRIPT.format(
        version=describe_version(prog),
        prog=prog,
        completion=COMPLETION,
        shell=shell,
        preface=SHELLS[shell],
        switches="|".join(COMMON_SWITCHES),
        chosen=CHOSEN.format(commands="|".join(commands)) if commands else "",
        arms="\n".join(arms),
        choices="\n".join(choices),
    )


def _arm(pattern: str, **variables: Iterable[str]) -> str:
    """One case of the script, in which these variables have these values."""
    given = " ".join(f'{name}="{" ".join(values)}"' for name, values in variables.items())
    return f'        "{pattern}") {given} ;;'
