"""Models larger than one device: weights spread over GPUs, the CPU's memory and the disk.

Accelerate decides what lies where and brings the weights of a layer to the device that computes when their turn comes.
What has no room stays in the files it came in, or is written to a temporary folder where these are no safetensors or
hold their weights in another form (those of mixtures of experts do).
"""

from __future__ import annotations

import logging
import os
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from teacher_cache.contract.memory_limits import parse_max_memory
from teacher_cache.errors import TeacherError, first_line
from teacher_cache.models.families import quiet_transformers

_FOR_WEIGHTS = 0.9
"""Share of what is free that weights may take; the rest is for what is computed."""
_Report = TypeVar("_Report")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where weights may lie: every GPU (unless `cpu_only`), then the CPU's memory, then the disk.

    `most_bytes` limits what those of this process take, by GPU number or "cpu"; without it nine tenths of what is free,
    of which every worker on this machine has its part.
    """

    most_bytes: Mapping[int | str, int] = field(default_factory=dict)
    cpu_only: bool = False

    @classmethod
    def chosen(cls, device_map: str | None, max_memory: str | None, device: str) -> Placement | None:
        """What the flags of these names ask for; None where a model is to lie on one device."""
        if device_map is None:
            return None
        return cls(most_bytes=parse_max_memory(max_memory), cpu_only=device == "cpu")

    def refuse_unplaceable(self, name: str) -> None:
        """Before anything is loaded.

        Raises:
            TeacherError: accelerate is not installed.
        """
        if find_spec("accelerate") is None:
            raise TeacherError(
                f"--device-map auto spreads teacher {name!r} over devices with the package 'accelerate', which is not "
                "installed: pip install 'kdcache[offload]'"
            )

    def budget(self) -> dict[int | str, int]:
        """What each device may hold, in the order in which they are filled; the disk takes the rest.

        Raises:
            TeacherError: a limit is for a GPU that is not there.
        """
        from accelerate.utils import get_max_memory

        free = {name: size for name, size in get_max_memory().items() if name == "cpu" or not self.cpu_only}
        if absent := [name for name in self.most_bytes if name not in free]:
            raise TeacherError(
                f"--max-memory names device {absent[0]!r}, which is not there: its share of the weights would have no "
                f"place; there are {', '.join(map(str, free))}"
            )
        # what is passed on is taken as it is: room to compute in has to be left here, and for other workers
        share = _FOR_WEIGHTS / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return {name: self.most_bytes.get(name, int(share * size)) for name, size in free.items()}


def place_model(
    name: str, read: Callable[..., tuple[PreTrainedModel, _Report]], placement: Placement
) -> tuple[PreTrainedModel, _Report]:
    """A model spread over devices, in evaluation mode, and what is reported of its loading.

    `read` gives both for further options of `from_pretrained`. Weights that are written anew go when the model goes.

    Raises:
        TeacherError: it cannot be spread over what there is.
    """
    budget = placement.budget()
    folder = tempfile.TemporaryDirectory(prefix="kdcache-offload-")
    try:
        # both say that weights are on the disk, which was asked for
        logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
        with quiet_transformers():
            model, report = read(device_map="auto", max_memory=budget, offload_folder=folder.name)
    except (ValueError, RuntimeError, OSError) as error:
        folder.cleanup()
        raise TeacherError(
            f"teacher {name!r} cannot be spread over {_told(budget)} and the disk ({first_line(error)}): it would "
            "not run; give --max-memory as much as its largest layer takes, or leave --device-map out"
        ) from error
    weakref.finalize(model, folder.cleanup)
    nn.Module.requires_grad_(model, False)
    nn.Module.eval(model)
    return model, report


def running_device(model: PreTrainedModel) -> torch.device:
    """Where ids go in: the device of the embeddings, or the one that they are brought to."""
    embeddings: Any = model.get_input_embeddings()
    hook = getattr(embeddings, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return model.device if device is None else torch.device(device)


def _told(budget: Mapping[int | str, int]) -> str:
    return ", ".join(f"{size / 1e9:.2g} GB of {'GPU ' if name != 'cpu' else ''}{name}" for name, size in budget.items())
