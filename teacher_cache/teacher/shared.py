"""A teacher that several processes hold together, by the tensor-parallel plan that Transformers has for its family.

Each process keeps a share of every large matrix, cut by whole attention heads, and all of them run every pass:
Megatron-LM (arXiv 1909.08053), section 3. Hidden states come out whole in all processes; queries, keys and values of
the heads are put side by side again, and the head gathers its logits over the vocabulary. Sums over the shares are
added in another order than in one process, which changes last bits.

As with other teachers it is first loaded as it lies in its checkpoint, in every process, to be hashed, tried and copied
into the store; on a CPU weights in safetensors files take no memory then. `start` loads the shares. It then compares
what they compute with what the whole model computes for two short rows, layer by layer: plans are data of another
project, and a wrong one would not fail but give other numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.distributed import DistributedConfig

from teacher_cache.contract.batch import AttentionVectors
from teacher_cache.contract.streams import VECTORS
from teacher_cache.errors import TeacherError, first_line
from teacher_cache.models.attention_tap import enable_tap
from teacher_cache.models.families import quiet_transformers
from teacher_cache.models.placing import running_device
from teacher_cache.teacher.gguf import refuse_to_leave_packed
from teacher_cache.teacher.loading import load_teacher_config, read_weights
from teacher_cache.teacher.outputs import TeacherOutputs
from teacher_cache.teacher.processes import END, Processes
from teacher_cache.teacher.teacher import Teacher

_START, _RUN, _HEAD = "start", "run", "head"
_DIFFERENCE, _HALF_DIFFERENCE = 0.01, 0.2
"""Difference of vectors from those of the whole model, as a share of their length: the largest in float32, where
rounding makes 1e-6, and the median where one of the two computes in half precision, which may send a token to another
expert. Heads in a wrong order make more than 1 of all of them."""
_INSTEAD = "--device-map auto spreads teachers of every family over GPUs, memory and disk"
Widths = dict[int, tuple[int, ...]]
"""Of the queries, keys and values of each layer, all heads side by side."""


def refuse_unshared(name: str, revision: str | None, processes: int) -> None:
    """Refuse teachers that so many processes cannot hold together; before anything is loaded.

    Raises:
        TeacherError: the family has no plan, or its heads cannot be dealt out evenly.
    """
    refuse_to_leave_packed(name)
    config = load_teacher_config(name, revision)
    plan = getattr(config, "base_model_tp_plan", None)
    family = f"teacher {name!r} of family {config.model_type!r}"
    if not plan:
        raise TeacherError(
            f"{family} has no tensor-parallel plan in Transformers {transformers.__version__}: it is not known how to "
            f"share it among processes; leave --tensor-parallel out ({_INSTEAD}), or choose a family such as Llama, "
            "Qwen, Mistral, Mixtral, Gemma or GPT-NeoX"
        )
    for what, count in _dealt_out(plan, config).items():
        if count % processes:
            raise TeacherError(
                f"{family} has {count} {what}, which {processes} processes cannot share evenly: heads stay whole; "
                f"start a number of processes that divides {count}, or leave --tensor-parallel out ({_INSTEAD})"
            )


def _dealt_out(plan: dict[str, str], config: PreTrainedConfig) -> dict[str, int]:
    """The heads that the processes share; none where every process computes all of attention."""
    shared = {path.rpartition(".")[2] for path, style in plan.items() if style == "colwise"}
    heads = {}
    if shared & {"q_proj", "query_key_value", "qkv_proj"}:
        heads["attention heads"] = config.num_attention_heads
    if shared & {"k_proj", "v_proj"}:
        heads["heads of keys and values"] = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads


class SharedTeacher(Teacher):
    """A teacher of which every process has its share once it is started. The first process uses it as any other."""

    def __init__(self, whole: Teacher, processes: Processes) -> None:
        super().__init__(whole.model, whole.tokenizer, whole.record, device=whole.device, dtype=whole.dtype)
        self._processes = processes
        self._widths: Widths | None = None

    def start(self) -> None:
        """Load the shares in all processes.

        Raises:
            TeacherError: they compute something else than the whole model, another process has another teacher, or
                it is gone.
        """
        if self._widths is not None:
            return
        want = self._sample()
        widths = {
            layer: tuple(int(getattr(vectors, f"{name}_BTD").shape[-1]) for name in VECTORS)
            for layer, vectors in want[0].attention.items()
        }
        exact = {self.model.dtype, getattr(torch, self.dtype)} == {torch.float32}
        with self._processes.order(_START, self.dtype, self._tapped, widths):
            self._load_share(widths)
        try:
            have = self._sample()
        except (ValueError, RuntimeError) as error:
            raise self._unlike(f"its shares do not run ({first_line(error)})") from error
        for what, distance_N in _distances(want, have).items():
            distance = float(distance_N.max() if exact else distance_N.median())
            if not distance <= (_DIFFERENCE if exact else _HALF_DIFFERENCE):
                raise self._unlike(f"{what} of its shares are off by {distance:.2g} of their length")

    def follow(self) -> Any:
        """In all processes but the first: run what that one runs until it ends; what it has come to.

        Raises:
            TeacherError: it has failed or is gone, or this process cannot go on.
        """
        while True:
            kind, *given = self._processes.hear()
            if kind == END:
                return given[0]
            try:
                with self._processes.noticing_loss():
                    self._carry_out(kind, *given)
            except (ValueError, RuntimeError) as error:
                raise TeacherError(
                    f"process {self._processes.rank} of {self._processes.count} cannot run its share of teacher "
                    f"{self.record.name!r} ({type(error).__name__}: {first_line(error)}): the others cannot go on "
                    "without it; give each process a device with room for its share and a batch, or a smaller "
                    "--batch-size"
                ) from error

    @torch.inference_mode()
    def _carry_out(self, kind: str, *given: Any) -> None:
        if kind == _START:
            self.dtype, tapped, widths = given
            if tapped:
                self.tap()
            self._load_share(widths)
        elif kind == _RUN:
            ids_BT, length_B, layers, starts_BT = given
            self._run_share(ids_BT, length_B, layers, starts_BT)
        else:
            shape, dtype = given
            final_PD = torch.empty(shape, dtype=dtype, device=running_device(self.model))
            super().head()(self._processes.spread(final_PD))

    def run(
        self,
        input_ids_BT: torch.Tensor,
        length_B: torch.Tensor,
        *,
        hidden_layers: Iterable[int] = (),
        attention_layers: Iterable[int] = (),
        given_layers: Iterable[int] = (),
        starts_BT: torch.Tensor | None = None,
    ) -> TeacherOutputs:
        """As `Teacher.run`; once it is started, by all processes."""
        whole = {"hidden_layers": tuple(hidden_layers), "given_layers": tuple(given_layers)}
        layers = tuple(attention_layers)
        if self._widths is None:
            return super().run(input_ids_BT, length_B, attention_layers=layers, starts_BT=starts_BT, **whole)
        ids_BT, length_B = input_ids_BT.cpu(), length_B.cpu()
        starts_BT = None if starts_BT is None else starts_BT.cpu()
        with self._processes.order(_RUN, ids_BT, length_B, layers, starts_BT):
            return self._run_share(ids_BT, length_B, layers, starts_BT, **whole)

    def head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """As `Teacher.head`; once it is started, by all processes."""
        head = super().head()
        return head if self._widths is None else lambda final_PD: self._run_head(head, final_PD)

    @torch.inference_mode()
    def _run_head(self, head: Callable[[torch.Tensor], torch.Tensor], final_PD: torch.Tensor) -> torch.Tensor:
        with self._processes.order(_HEAD, final_PD.shape, final_PD.dtype):
            return head(self._processes.spread(final_PD))

    @torch.inference_mode()
    def _run_share(
        self,
        ids_BT: torch.Tensor,
        length_B: torch.Tensor,
        attention_layers: tuple[int, ...],
        starts_BT: torch.Tensor | None,
        **whole: tuple[int, ...],
    ) -> TeacherOutputs:
        """A pass; of layers in `whole`, arguments of `Teacher.run`, every process has all without asking the others."""
        outputs = super().run(ids_BT, length_B, attention_layers=attention_layers, starts_BT=starts_BT, **whole)
        return replace(
            outputs, attention={layer: self._gather(layer, vectors) for layer, vectors in outputs.attention.items()}
        )

    def _gather(self, layer: int, vectors: AttentionVectors) -> AttentionVectors:
        """All heads of a layer; some families compute all of attention in every process."""
        assert self._widths is not None
        whole = {}
        for name, width in zip(VECTORS, self._widths[layer], strict=True):
            values_BTD = getattr(vectors, f"{name}_BTD")
            shared = values_BTD.shape[-1] < width
            whole[f"{name}_BTD"] = self._processes.side_by_side(values_BTD) if shared else values_BTD
        return AttentionVectors(**whole)

    def _load_share(self, widths: Widths) -> None:
        self._processes.compare((self.record.weights_sha256, transformers.__version__))
        config = load_teacher_config(self.record.name, self.record.revision)
        plan = DistributedConfig(tp_size=self._processes.count)
        options = {"dtype": getattr(torch, self.dtype), "distributed_config": plan}
        try:
            with quiet_transformers():
                self.model, _ = read_weights(self.record.name, config, self.record.revision, **options)
        except (ValueError, OSError) as error:
            raise self._unlike(f"its shares cannot be loaded ({first_line(error)})") from error
        nn.Module.requires_grad_(self.model, False)
        nn.Module.eval(self.model)
        if self._tapped:
            enable_tap(self.model)
        self._widths = widths

    @torch.inference_mode()
    def _sample(self) -> tuple[TeacherOutputs, torch.Tensor | None]:
        """All that a build could take of two short rows, and the logits at their positions."""
        ids_BT = torch.arange(32).view(2, 16) * 7919 % self.record.vocab_size
        layers = range(1, self.record.layers + 1)
        outputs = self.run(
            ids_BT,
            torch.tensor([16, 12]),
            hidden_layers=(0, *layers),
            attention_layers=layers if self._tapped else (),
            given_layers=self._replays,
        )
        return outputs, self.head()(outputs.final_BTD.flatten(0, 1)) if self.record.has_mlm_head else None

    def _unlike(self, why: str) -> TeacherError:
        return TeacherError(
            f"teacher {self.record.name!r} of family {self.record.model_type!r} cannot be shared among "
            f"{self._processes.count} processes by the plan of Transformers {transformers.__version__}: {why}. Its "
            f"targets would be those of another model; leave --tensor-parallel out ({_INSTEAD}), start another number "
            "of processes, or leave out the --targets in question"
        )


def _distances(
    want: tuple[TeacherOutputs, torch.Tensor | None], have: tuple[TeacherOutputs, torch.Tensor | None]
) -> dict[str, torch.Tensor]:
    """[N]: the distance of each vector from the one that is wanted, as a share of its length."""
    pairs = {f"hidden states {layer}": (states, have[0].hidden[layer]) for layer, states in want[0].hidden.items()}
    for layer, given_BTD in want[0].given.items():
        pairs[f"what attention {layer} reads"] = given_BTD, have[0].given[layer]
    for layer, vectors in want[0].attention.items():
        for name in VECTORS:
            wanted_BTD, given_BTD = (getattr(each, f"{name}_BTD") for each in (vectors, have[0].attention[layer]))
            pairs[f"attention {layer} ({name})"] = wanted_BTD, given_BTD
    if want[1] is not None and have[1] is not None:
        pairs["logits"] = want[1], have[1]
    return {what: _distance(*(values.float().cpu() for values in pair)) for what, pair in pairs.items()}


def _distance(want_ND: torch.Tensor, have_ND: torch.Tensor) -> torch.Tensor:
    if want_ND.shape != have_ND.shape:
        return torch.tensor([torch.inf])
    distance_N: torch.Tensor = (have_ND - want_ND).norm(dim=-1) / want_ND.norm(dim=-1).clamp_min(1e-30)
    return distance_N.nan_to_num(nan=torch.inf)
