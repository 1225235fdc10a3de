"""One process's part in a sweep that any number of them share: claim a run, train it, measure it, go on with the next.

In: the runs to take part in. Out: what came of each, in `states`. A run is complete once its student is in its folder
and everything that the sweep measures of it is done. Where only runs are left that others hold, the process waits for
them, if it is to: a holder that is gone (`sweep_claims.py`) leaves its run to whoever looks first, and its training
goes on from its newest checkpoint. A run that failed somewhere after this process began is not tried again by it.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cli.display import StatusLine, is_quiet
from cli.entry import is_verbose
from cli.sweep_claims import RENEWALS, Claim, Claims, Seen
from cli.sweep_evaluations import Evaluation, note_done, to_measure
from cli.sweep_file import SweepRun
from cli.sweep_process import failure, python, run_process
from cli.sweep_summary import completed
from student_train.out_folder import RUN_LOCK, is_held

COMPLETE, STOPPED = "complete", "stopped"
_LONGEST_PAUSE = 2.0


class SweepWork:
    """Takes part in `runs`; `all_runs` are those of the sweep, by which a user counts them.

    `tell` is called with the states whenever they have changed.
    """

    def __init__(
        self,
        runs: Sequence[SweepRun],
        all_runs: Sequence[SweepRun],
        evaluations: Sequence[Evaluation],
        *,
        launcher: Sequence[str],
        claims: Claims,
        received: list[signal.Signals],
        tell: Callable[[Mapping[str, str]], object],
    ) -> None:
        self.states: dict[str, str] = {}
        self._runs = runs
        self._all = [run.name for run in all_runs]
        self._evaluations = evaluations
        self._launcher = launcher
        self._claims = claims
        self._received = received
        self._tell = tell
        self._told_of: dict[str, str] = {}
        self._before = {run.name: seen.number for run in runs if (seen := claims.look(run.name)) is not None}
        for run in runs:
            if self.is_complete(run):
                self._say(run, COMPLETE)
                self.states[run.name] = COMPLETE

    def is_complete(self, run: SweepRun) -> bool:
        """Whether the student is there and measured.

        Raises:
            SettingsError: a student there was trained with other settings or from another cache.
        """
        return bool(completed({run.name: run.settings})) and not to_measure(self._evaluations, run.settings)

    def work(self, *, wait: bool) -> None:
        """Until every run has come to an end, here or elsewhere, or a signal is received."""
        while True:
            for run in self._left():
                if self._received:
                    return
                self._take(run)
            if self._received or not self._left() or not wait:
                return
            time.sleep(min(_LONGEST_PAUSE, self._claims.seconds / RENEWALS))

    def _left(self) -> list[SweepRun]:
        return [run for run in self._runs if run.name not in self.states]

    def _take(self, run: SweepRun) -> None:
        seen = self._claims.look(run.name)
        if seen is not None and seen.number > self._before.get(run.name, 0) and self._came_to_an_end(run, seen):
            return
        claim = self._claims.take(run.name)
        if claim is None:
            if seen is not None and seen.outcome is None and self._told_of.get(run.name) != seen.holder:
                self._told_of[run.name] = seen.holder
                self._say(run, f"training in {seen.holder}")
            return
        with claim:
            # the one before may have completed it just now
            state = COMPLETE if self.is_complete(run) else self._train_and_measure(run, claim)
            claim.release(state)
        if state == STOPPED and not self._received:
            self._say(run, "lost to another process, which goes on with it")
            return
        self._end(run, state)

    def _came_to_an_end(self, run: SweepRun, seen: Seen) -> bool:
        """Whether somebody else has ended this run while this process was there."""
        if seen.outcome in (None, STOPPED) or (seen.outcome == COMPLETE and not self.is_complete(run)):
            return False
        self._say(run, f"{seen.outcome} in {seen.holder}")
        self._end(run, str(seen.outcome))
        return True

    def _end(self, run: SweepRun, state: str) -> None:
        self.states[run.name] = state
        self._tell(self.states)

    def _train_and_measure(self, run: SweepRun, claim: Claim) -> str:
        if not completed({run.name: run.settings}):
            self._say(run, "training")
            self._wait_for_its_folder(run, claim)
            resume = ["--resume", "auto"] if run.settings.resume == "never" else []
            code = self._run(["cli.kdtrain", *run.flags, *resume], claim, self._launcher)
            if code != 0 or claim.lost:
                return STOPPED if self._received or claim.lost else failure(code)
        for evaluation in to_measure(self._evaluations, run.settings):
            self._say(run, f"measuring {evaluation.label}")
            code = self._run(["cli.kdeval", *evaluation.arguments(run.settings)], claim, python())
            if code != 0 or claim.lost:
                return STOPPED if self._received or claim.lost else f"{evaluation.label} {failure(code)}"
            note_done(evaluation, run.settings)
        return COMPLETE

    def _run(self, command: Sequence[str], claim: Claim, launcher: Sequence[str]) -> int:
        loudness = ["-v"] if is_verbose() else ["-q"] if is_quiet() else []
        return run_process([*launcher, "-m", *command, *loudness], self._received, lambda: claim.lost)

    def _wait_for_its_folder(self, run: SweepRun, claim: Claim) -> None:
        """A sweep that was killed has taken its training with it, which still may be saving itself."""
        started = time.monotonic()
        while is_held(Path(run.settings.out), RUN_LOCK) and time.monotonic() - started < self._claims.seconds:
            if self._received or claim.lost:
                return
            time.sleep(_LONGEST_PAUSE / 10)

    def _say(self, run: SweepRun, what: str) -> None:
        number = self._all.index(run.name) + 1
        StatusLine().note(f"[{number}/{len(self._all)}] {run.name}: {what}")
