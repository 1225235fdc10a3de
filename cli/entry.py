"""Runs a command: an error becomes one message, an interrupt becomes an exit code, and logging is set up.

`--version` is answered here, wherever it stands, before anything else is read.

Exit codes: 0 done, 1 something the user can fix, 2 wrong usage, 130 interrupted, 143 terminated, 141 where nobody reads
standard output any more (`kdcache info | head`). An error that is not a `DistillationError` is a defect of this program
and keeps its traceback.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from types import FrameType

from cli.display import set_quiet
from cli.streams import discard, prepare_streams
from teacher_cache.errors import DistillationError

DISTRIBUTION = "kdcache"
COMMON_SWITCHES = ("--debug", "-q", "--quiet", "-v", "--verbose")
"""Of every command: show the traceback of an error; no progress; say what is read and chosen."""
_OURS = ("cli", "student_train", "teacher_cache")
_log = logging.getLogger(__name__)
INTERRUPTED = 130
BROKEN_PIPE = 141
TERMINATED = 143
GPU_NODES = ("nvidia[0-9]*", "kfd", "dxg", "accel/*", "davinci*", "dri/render*")
"""Files below /dev that drivers of accelerators make."""


def run_command(main: Callable[[list[str]], int | None], prog: str, argv: Sequence[str] | None = None) -> int:
    """Run `main` on the arguments without `COMMON_SWITCHES`, or answer `--version`, and return the exit code.

    `main` returns its exit code, or None for 0. A console script is `return run_command(_main, prog="kdtrain")`.
    """
    prepare_streams()
    finder = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    debug, *loudness = COMMON_SWITCHES
    finder.add_argument(debug, action="store_true")
    how_loud = finder.add_mutually_exclusive_group()
    how_loud.add_argument(*loudness[:2], action="store_true")
    how_loud.add_argument(*loudness[2:], action="store_true")
    finder.add_argument("--version", action="store_true")
    options, own = finder.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    _set_up_logging(options.verbose)
    set_quiet(options.quiet)
    # read when torch is imported: threads that wait by spinning slow everything down on cores that others use too
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _tell_deepspeed()
    try:
        try:
            if options.version:
                print(describe_version(prog))
                return 0
            code = main(own) or 0
            _log.info("done, exit code %d", code)
            return code
        finally:
            sys.stdout.flush()  # while a closed pipe can still be told from a defect
    except BrokenPipeError:
        discard(sys.stdout.fileno())  # the flush when the process ends has nothing to complain about
        return BROKEN_PIPE
    except DistillationError as error:
        if options.debug:
            raise
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return INTERRUPTED


def describe_version(prog: str) -> str:
    """`kdtrain 0.1.0`: all commands have the version of the package that they came in."""
    return f"{prog} {metadata.version(DISTRIBUTION)}"


def _tell_deepspeed() -> None:
    """Where there is no GPU, say so before DeepSpeed is imported: it would print that it found none among the results.

    Transformers imports it wherever Accelerate is installed, too.
    """
    if not any(node for pattern in GPU_NODES for node in Path("/dev").glob(pattern)):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def follows() -> bool:
    """Whether a launcher has started this process, and it is not the first."""
    return int(os.environ.get("RANK", "0")) > 0


class Stopping:
    """What a command that writes blocks does about SIGTERM, and while it loads about Ctrl-C.

    While it loads, nothing is written yet and the process ends at once: code of libraries that runs then (imports,
    callbacks) can swallow an exception, and the command would go on. Afterwards SIGTERM leaves the loop that writes
    blocks: those in hand are finished, all others start anew next time.
    """

    def __init__(self, prog: str) -> None:
        self._prog = prog
        self._loading, self._stopped = True, False
        self._before = {
            signal.SIGTERM: signal.signal(signal.SIGTERM, self._stop),
            signal.SIGINT: signal.getsignal(signal.SIGINT),
        }
        if self._before[signal.SIGINT] is signal.default_int_handler:  # not where a shell has it ignored
            signal.signal(signal.SIGINT, self._interrupt)

    def go_on(self) -> None:
        """Loading is over; stops where a signal was swallowed since. Called now and then."""
        if self._loading:
            self._loading = False
            signal.signal(signal.SIGINT, self._before[signal.SIGINT])
        if self._stopped:
            raise SystemExit(TERMINATED)

    def restore(self) -> None:
        """Signals do again what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        if not self._stopped:
            _tell(f"{self._prog}: stopped; committed blocks are safe, run the same command to continue")
        self._stopped = True
        if self._loading:
            os._exit(TERMINATED)
        raise SystemExit(TERMINATED)

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        _tell(f"{self._prog}: interrupted")
        os._exit(INTERRUPTED)


@contextmanager
def stops_on_sigterm(prog: str) -> Iterator[Stopping]:
    """A command that writes blocks, which calls `go_on` once it has loaded what it needs."""
    stopping = Stopping(prog)
    try:
        yield stopping
        stopping.go_on()
    finally:
        stopping.restore()


def _tell(text: str) -> None:
    """One line on standard error, from a signal handler: what is being printed may be interrupted by it."""
    with suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), f"{text}\n".encode(errors="backslashreplace"))


def is_verbose() -> bool:
    """Whether -v was given."""
    return logging.getLogger(_OURS[0]).isEnabledFor(logging.INFO)


def _set_up_logging(verbose: bool) -> None:
    """Warnings of everybody, with -v also what we tell, each with the seconds since the start."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Told())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for name in _OURS:
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.NOTSET)
    if not verbose:
        # read when transformers is imported; its report of unused weights is about what we do on purpose
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


class _Told(logging.Formatter):
    """`  1.3 s  message` of what -v tells; of warnings their level, and where they come from."""

    def format(self, record: logging.LogRecord) -> str:
        told = super().format(record)
        if record.levelno == logging.INFO:
            return f"{record.relativeCreated / 1e3:6.1f} s  {told}"
        return f"{record.levelname} {record.name}: {told}"
