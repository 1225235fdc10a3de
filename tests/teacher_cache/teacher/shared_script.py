"""What two processes do together for `test_shared.py`, one thing after another: a start of torch takes seconds.

    torchrun --nproc-per-node 2 shared_script.py FOLDER

FOLDER/orders.pt has the teachers and builds; FOLDER/NUMBER.pt is what process NUMBER found.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed import PrefixStore

from teacher_cache.build.build import build_cache
from teacher_cache.build.inputs import Silent, load_teacher
from teacher_cache.build.plan import plan_build
from teacher_cache.build.settings import BuildSettings
from teacher_cache.build.together import work_together
from teacher_cache.build.workers import Workers
from teacher_cache.errors import DistillationError, SpaceError
from teacher_cache.teacher.processes import Processes
from tests.teacher_cache.teacher.test_placing import STARTS, everything

WORKERS = Workers.from_environment()
FOLDER = Path(sys.argv[1])


def meet(name: str) -> Workers:
    """The same processes; what they met for before is forgotten."""
    assert WORKERS.meeting is not None
    return Workers(WORKERS.rank, WORKERS.count, PrefixStore(name, WORKERS.meeting))


def settings_of(folder: str, **changes: Any) -> BuildSettings:
    return BuildSettings(teacher=folder, device="cpu", tensor_parallel=True, **changes)


def refusal(name: str, work: Callable[[Workers], object]) -> str:
    """What stops this process."""
    try:
        work(meet(name))
    except DistillationError as error:
        torch.distributed.destroy_process_group()
        return f"{type(error).__name__}: {error}"
    return "nothing"


def outputs_of(folder: str, attention: bool) -> Callable[[Processes], dict[str, torch.Tensor]]:
    def lead(processes: Processes) -> dict[str, torch.Tensor]:
        teacher = load_teacher(settings_of(folder), processes)
        if attention:
            teacher.tap()
        teacher.start()
        shares = sum(each.to_local().numel() if hasattr(each, "to_local") else each.numel()  # type: ignore[operator]
                     for each in teacher.model.parameters())  # fmt: skip
        found = everything(teacher, None, attention)
        found |= {f"isolated {name}": values for name, values in everything(teacher, STARTS, attention).items()}
        return {**found, "shares": torch.tensor(shares)}

    return lead


class NoRoom(Silent):
    """Ends the build once a block is safe."""

    def committed(self, rows: int, total: int, written_bytes: int) -> None:
        if written_bytes:
            raise SpaceError("no room")


def side_by_side_the_wrong_way(processes: Processes, values_BTD: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(values_BTD) for _ in range(processes.count)]
    torch.distributed.all_gather(parts, values_BTD.contiguous())
    return torch.cat(parts[::-1], dim=-1)


def main() -> None:
    orders = torch.load(FOLDER / "orders.pt", weights_only=False)
    found: dict[str, Any] = {}
    for family, (folder, attention) in orders["teachers"].items():
        found[family] = work_together(settings_of(folder), meet(family), outputs_of(folder, attention))
    for name, folder in orders["refused"].items():
        found[name] = refusal(name, lambda workers, folder=folder: work_together(  # type: ignore[misc]
            settings_of(folder), workers, outputs_of(folder, False)))  # fmt: skip
    build = BuildSettings(**orders["build"], tensor_parallel=True)
    found["plan"] = plan_build(build, workers=meet("plan"))
    found["no room"] = refusal("no room", lambda workers: build_cache(build, NoRoom(), workers))
    found["build"] = build_cache(build, workers=meet("build"))
    mixed = orders["mixed"][WORKERS.rank]
    found["mixed"] = refusal(
        "mixed", lambda workers: work_together(settings_of(mixed), workers, outputs_of(mixed, False))
    )
    Processes.side_by_side = side_by_side_the_wrong_way  # type: ignore[method-assign]
    llama = orders["teachers"]["llama"][0]
    found["disorder"] = refusal(
        "disorder", lambda workers: work_together(settings_of(llama), workers, outputs_of(llama, True))
    )
    torch.save(found, FOLDER / f"{WORKERS.rank}.pt")


if __name__ == "__main__":
    main()
