"""Flags, files and their precedence, on settings records as the commands have them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from cli.options import choose_command, parse, read_config
from student_train.evaluate.fidelity.settings import FidelitySettings
from student_train.settings import TrainSettings
from teacher_cache.build.settings import BuildSettings
from teacher_cache.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Do something."""

    cache: Annotated[str, tyro.conf.Positional] = "cache.zarr"
    """A path."""
    corpus: tuple[str, ...] = ("default",)
    """Several values."""
    layers: str = "all"
    """One value, often with commas."""
    seq_len: int = 512
    lr: float | None = None
    json: bool = False
    mode: Literal["a", "b"] = "a"
    tone: Literal["high", "low"] | None = None


def read(*argv: str) -> Settings:
    return parse(Settings, argv, "kd test")


@pytest.fixture
def config(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_defaults_and_flags() -> None:
    assert read() == Settings()
    settings = read("x.zarr", "--corpus", "a", "b", "--seq-len", "7", "--lr", "5e-4", "--json", "--mode", "b")
    assert settings == Settings(cache="x.zarr", corpus=("a", "b"), seq_len=7, lr=5e-4, json=True, mode="b")


def test_file_sets_every_kind_of_value(config) -> None:
    path = config("corpus: [a, b]\nlayers: [2, 4, 6]\nseq_len: 7\nlr: 1e-4\njson: true\nmode: b\n")
    assert read("--config", path) == Settings(
        corpus=("a", "b"), layers="2,4,6", seq_len=7, lr=1e-4, json=True, mode="b"
    )


def test_file_may_spell_keys_as_flags_and_single_values_for_lists(config) -> None:
    assert read("--config", config("seq-len: 9\ncorpus: one.txt\n")) == Settings(seq_len=9, corpus=("one.txt",))


def test_values_are_taken_as_written(config) -> None:
    """YAML 1.1 alone would read 64, True and 10 here."""
    assert read("--config", config("layers: 1:4\n")).layers == "1:4"
    assert read("--config", config("layers: on\n")).layers == "on"
    assert read("--config", config("layers: 0o12\n")).layers == "0o12"


def test_flags_win_over_the_file_wherever_they_stand(config) -> None:
    path = config("corpus: [a, b]\nseq_len: 7\njson: true\nlr: 0.1\n")
    expected = Settings(corpus=("c",), seq_len=8, json=False, lr=0.1)
    flags = ["--corpus", "c", "--seq-len", "8", "--no-json"]
    assert read(*flags, "--config", path) == expected
    assert read("--config", path, *flags) == expected
    assert read(f"--config={path}", *flags) == expected


def test_empty_values_and_empty_files_leave_the_default(config) -> None:
    assert read("--config", config("seq_len:\nlr: null\njson: ~\ncorpus:\n")) == Settings()
    assert read("--config", config("# nothing\n")) == Settings()


def test_one_key_in_two_spellings_is_refused(config) -> None:
    with pytest.raises(SettingsError, match="'seq_len' is given twice, with - and with _: one of them would be lost"):
        read("--config", config("seq-len: 7\nseq_len: 8\n"))


def test_unknown_key_names_itself_and_the_nearest(config, capsys) -> None:
    with pytest.raises(SystemExit) as raised:
        read("--config", config("seq_length: 7\n"))
    assert raised.value.code == 2
    captured = capsys.readouterr()
    assert "'seq_length'" in captured.err and "'seq_len'" in captured.err and captured.err.startswith("kd test: ")
    assert captured.out == ""


def test_a_positional_is_no_key(config, capsys) -> None:
    with pytest.raises(SystemExit) as raised:
        read("--config", config("cache: x.zarr\n"))
    assert raised.value.code == 2
    assert "'cache'" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--seq-len", "many"], ["--seq-length", "7"], ["--mode", "c"]])
def test_wrong_flags_are_usage_errors(flags: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as raised:
        read(*flags)
    assert raised.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "--seq-len" in captured.err or "--mode" in captured.err


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--seq-len", "7.5"], "'7.5' is not a whole number"),
        (["--lr", "fast"], "'fast' is not a number"),
        (["--tone", "c"], "Expected one of ('high', 'low')"),
    ],
)
def test_a_value_is_refused_in_words(flags: list[str], told: str, capsys) -> None:
    """Not in those of types, and without the None that stands for leaving a flag out."""
    with pytest.raises(SystemExit):
        read(*flags)
    text = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert told in text
    assert not any(word in text for word in ("None", "literal", "class", "convert"))


def test_none_takes_back_what_a_file_says(config) -> None:
    path = config("lr: 0.1\n")
    assert read("--config", path).lr == 0.1
    assert read("--config", path, "--lr", "None").lr is None


def test_wrong_value_in_the_file_is_a_usage_error(config, capsys) -> None:
    with pytest.raises(SystemExit) as raised:
        read("--config", config("seq_len: many\n"))
    assert raised.value.code == 2
    assert "many" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, needle",
    [("- a\n- b\n", "holds no settings"), ("a: [\n", "cannot be read"), ("layers: {a: 1}\n", "nests"),
     ("layers: [[a]]\n", "nests"), ("json: maybe\n", "'maybe'")],
)  # fmt: skip
def test_malformed_files_are_settings_errors(text: str, needle: str, config) -> None:
    with pytest.raises(SettingsError, match=needle):
        read("--config", config(text))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nothing\.yaml"):
        read("--config", str(tmp_path / "nothing.yaml"))


def test_repeating_a_flag_of_several_values_is_refused(capsys) -> None:
    """It would drop the first values without a word."""
    with pytest.raises(SystemExit) as raised:
        read("--corpus", "a", "--corpus=b")
    assert raised.value.code == 2
    assert "--corpus is given 2 times" in capsys.readouterr().err
    with pytest.raises(SystemExit) as raised:
        read("--config", "a.yaml", "--config=b.yaml")
    assert raised.value.code == 2
    assert "--config is given 2 times" in capsys.readouterr().err


def test_help_shows_docstrings_and_common_flags(capsys) -> None:
    with pytest.raises(SystemExit) as raised:
        read("--help")
    assert raised.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in ("Do something.", "Several values.", "--seq-len INT", "--config FILE", "--debug", "(default: 512)"):
        assert words in text


def test_settings_of_the_commands_can_be_parsed() -> None:
    assert parse(BuildSettings, ["--teacher", "t"], "kdcache build") == BuildSettings(teacher="t")
    assert parse(TrainSettings, ["--method", "mha"], "kdtrain") == TrainSettings(method="mha")
    assert parse(TrainSettings, ["--cache", "a", "b", "--method", "mha"], "kdtrain").cache == ("a", "b")
    assert parse(FidelitySettings, ["--cache", "parts/*.zarr"], "kdeval fidelity").cache == ("parts/*.zarr",)


def test_help_does_not_import_torch() -> None:
    code = """
import contextlib, io, sys
from cli.options import parse
from student_train.settings import TrainSettings
from teacher_cache.build.settings import BuildSettings
for settings in (BuildSettings, TrainSettings):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        parse(settings, ["--help"], "prog")
print(sorted({"torch", "transformers", "datasets", "zarr", "deepspeed"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_choose_command(capsys) -> None:
    commands = {"build": "make a store", "info": "describe a store"}
    assert choose_command(["info", "--json"], commands, "kdcache") == ("info", ["--json"])
    for argv, code in (["--help"], 0), ([], 2), (["biuld"], 2):
        with pytest.raises(SystemExit) as raised:
            choose_command(argv, commands, "kdcache")
        assert raised.value.code == code
    captured = capsys.readouterr()
    assert "make a store" in captured.out
    assert "did you mean 'build'" in captured.err


BOMB = "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))])
FILES = {
    "aliases of aliases": (BOMB, "values once every alias is filled in"),
    "an alias of itself": ("seed: &a [*a]", "recursive"),
    "brackets without end": ("seed: " + "[" * 100_000, "nested too deeply"),
    "a mapping as a key": ("? {a: b}\n: c", "cannot be read"),
    "bytes that are no text": ("\udcff", "cannot be read"),
    "too much of it": ("# nothing\n" * 200_000, "more than 1048576 bytes"),
    "a key of many twice": ("".join(f"k{n}: 1\n" for n in range(60_000)) + "k7: 1\n", "'k7' is given twice"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_settings_is_a_message(tmp_path: Path, name: str) -> None:
    text, what = FILES[name]
    path = tmp_path / "settings.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SettingsError, match=what) as caught:
        read_config(path)
    assert len(str(caught.value)) < 1000


def test_aliases_that_save_typing_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("runs:\n  a: &a {method: mha}\n  b: *a\n")
    assert read_config(path) == {"runs": {"a": {"method": "mha"}, "b": {"method": "mha"}}}
