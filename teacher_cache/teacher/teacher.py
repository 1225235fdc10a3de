"""The teacher: a frozen masked or causal LM, loaded once, and what it computes for one batch.

Loading refuses by name what cannot teach: encoder-decoders, families without a language-modelling class, incomplete
checkpoints. A checkpoint without its head loads (Transformers would fill the head with random numbers and warn
at most); `has_mlm_head` is then False and logits are refused. Nothing is ever trained here, and no [B, T, V] tensor is
made: logits come from `head`, at the positions it is given.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from teacher_cache.contract.manifest import TeacherRecord
from teacher_cache.contract.streams import VECTORS
from teacher_cache.device import choose_device, resolve_dtype, to_device
from teacher_cache.errors import TeacherError, first_line
from teacher_cache.models.arithmetic import move_model
from teacher_cache.models.attention import AttentionProjections
from teacher_cache.models.attention_tap import enable_tap, record_attention
from teacher_cache.models.families import position_limit
from teacher_cache.models.heads import LMHead
from teacher_cache.models.inputs import forward_arguments
from teacher_cache.models.isolation import measure_isolation
from teacher_cache.models.placing import Placement, place_model, running_device
from teacher_cache.teacher.gguf import refuse_to_leave_packed
from teacher_cache.teacher.loading import (
    check_loaded,
    check_tokenizer,
    hash_weights,
    load_model,
    load_teacher_config,
    load_tokenizer,
    read_weights,
    teacher_kind,
)
from teacher_cache.teacher.outputs import TeacherOutputs
from teacher_cache.teacher.replay import WatchedLayer, find_replay, linear_maps, watch_inputs, watch_maps

_log = logging.getLogger(__name__)
_UNLIMITED_POSITIONS = 512
"""The longest row of a teacher that names no limit of its own."""


class Teacher:
    """A frozen model with its tokenizer, as it lies in its checkpoint; `start` makes of it what is to run."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        record: TeacherRecord,
        *,
        device: torch.device,
        dtype: str,
        placement: Placement | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.record = record
        self.device = device
        self.dtype = dtype
        self.placement = placement
        self._started = False
        self._tapped = False
        self._replays: dict[int, WatchedLayer] = {}

    @classmethod
    def load(
        cls,
        name: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        placement: Placement | None = None,
    ) -> Teacher:
        """Load a teacher by hub id, folder or GGUF file; with a `placement` it will be spread over devices by `start`.

        Raises:
            TeacherError: it cannot be found, is neither a masked nor a causal LM, its checkpoint is incomplete, or it
                cannot be spread.
            SettingsError: the device does not exist.
        """
        chosen = choose_device(device)
        if placement is not None:
            placement.refuse_unplaceable(name)
            refuse_to_leave_packed(name)
        config = load_teacher_config(name, revision)
        kind = teacher_kind(name, config)
        tokenizer = load_tokenizer(name, config, revision)
        model, missing = load_model(name, config, revision)
        has_head = check_loaded(name, model, missing)
        check_tokenizer(name, tokenizer, config, kind)
        record = TeacherRecord(
            name=name,
            revision=revision or getattr(config, "_commit_hash", None),
            weights_sha256=hash_weights(model if has_head else model.base_model),
            model_type=config.model_type,
            layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            heads=config.num_attention_heads,
            vocab_size=config.vocab_size,
            max_positions=position_limit(model) or _UNLIMITED_POSITIONS,
            has_mlm_head=has_head,
            kind=kind,
        )
        nn.Module.requires_grad_(model, False)
        nn.Module.eval(model)
        loaded = cls(model, tokenizer, record, device=chosen, dtype=resolve_dtype(dtype, chosen), placement=placement)
        _log.info("read teacher %s: %s, to run in %s on %s", name, record.model_type, loaded.dtype, loaded.device)
        return loaded

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder with weights as loaded, configuration and tokenizer. Call before `start`."""
        model = self.model if self.record.has_mlm_head else cast("PreTrainedModel", self.model.base_model)
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def start(self) -> None:
        """Move to the device, or spread over several, in the arithmetic asked for, ready to run.

        Raises:
            TeacherError: it cannot be spread over what there is.
        """
        dtype, record = getattr(torch, self.dtype), self.record
        if self.placement is None:
            move_model(self.model, device=self.device, dtype=dtype)
        elif not self._started:
            config = load_teacher_config(record.name, record.revision)
            read = partial(read_weights, record.name, config, record.revision, dtype=dtype)
            self.model, _ = place_model(record.name, read, self.placement)
            if self._tapped:
                enable_tap(self.model)
        self._started = True

    def tap(self) -> None:
        """Make attention readable; refuses families where it is not."""
        if not self._tapped:
            enable_tap(self.model)
            self._tapped = True

    @torch.inference_mode()
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
        """One forward pass of the base model, without its head; segments that begin at `starts_BT` are isolated.

        `given_layers` are some of those that `probe_replay` has found.
        """
        device = running_device(self.model)
        input_ids_BT, length_B = to_device(input_ids_BT, device), to_device(length_B, device)
        positions = torch.arange(input_ids_BT.shape[1], device=device)
        real_BT = positions[None, :] < length_B[:, None]
        starts_BT = None if starts_BT is None else to_device(starts_BT, device)
        layers = tuple(hidden_layers)
        watched = {layer: self._replays[layer].module for layer in given_layers}
        with record_attention(self.model, attention_layers) as recorded, watch_inputs(self.model, watched) as given:
            encoded = self.model.base_model(
                input_ids_BT,
                output_hidden_states=bool(layers),
                **forward_arguments(self.model, real_BT, starts_BT),
            )
        # a teacher that is spread over devices leaves each layer's outputs on its own
        return TeacherOutputs(
            hidden={layer: encoded.hidden_states[layer].to(device) for layer in layers},
            attention={layer: vectors.to(device) for layer, vectors in recorded.vectors.items()},
            final_BTD=encoded.last_hidden_state.to(device),
            given={layer: values_BTD.to(device) for layer, values_BTD in given.items()},
        )

    @torch.inference_mode()
    def probe_rows(self, seq_len: int) -> None:
        """Try rows of so many positions, a quarter of them padding.

        Raises:
            TeacherError: the family does not run on token ids and a mask, does not give one vector for every token
                after every layer, or gives other ones each time.
        """
        record = self.record
        ids_BT = torch.arange(seq_len)[None] % record.vocab_size
        length_B, layers = torch.tensor([seq_len - seq_len // 4]), range(record.layers + 1)
        try:
            first, second = (self.run(ids_BT, length_B, hidden_layers=layers) for _ in range(2))
        except Exception as error:
            # a family's own checks, and what it stumbles over: the mask does not fit Nyströmformer's landmarks
            raise self._not_readable(
                f"does not run on rows of {seq_len} token ids and a mask ({type(error).__name__}: {first_line(error)})"
            ) from error
        for layer in layers:
            shape, width = tuple(first.hidden[layer].shape), record.hidden_size
            if shape != (1, seq_len, width):
                raise self._not_readable(
                    f"gives hidden state {layer} of {record.layers} as {shape} where a row of {seq_len} tokens should "
                    f"give (1, {seq_len}, {width})"
                )
            if not torch.allclose(first.hidden[layer], second.hidden[layer], rtol=0.05, atol=0.05, equal_nan=True):
                raise self._not_readable("computes other hidden states for the same row each time")

    def probe_segments(self, seq_len: int) -> None:
        """Try that documents which share a row of so many tokens do not see each other.

        Raises:
            TeacherError: they do, or the family cannot be told where they begin.
        """
        try:
            found = measure_isolation(self.model, seq_len, with_head=self.record.has_mlm_head)
        except ValueError as error:
            why = str(error)
        else:
            if found.isolated:
                return
            why = f"packed and alone are not the same to it: {found}"
        implementation = self.model.config._attn_implementation
        raise TeacherError(
            f"teacher {self.record.name!r} of family {self.record.model_type!r} (attention {implementation!r}) cannot "
            f"keep the documents of a row apart: {why}. Its targets would be those of another text; use --segments "
            "joined, where a row is read as one text, or --rows document, or a family such as Llama, Qwen, Mistral, "
            "Gemma or GPT-2"
        )

    def _not_readable(self, why: str) -> TeacherError:
        return TeacherError(
            f"teacher {self.record.name!r} of family {self.record.model_type!r} {why}: what students learn from is one "
            "vector for every token after every layer; give --seq-len the length that the family asks for, if it names "
            "one above, or choose a family such as BERT, RoBERTa, XLM-R, DistilBERT, ELECTRA or ModernBERT"
        )

    def head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The language-modelling head: [P, D] -> [P, V]."""
        return LMHead(self.model)

    @torch.inference_mode()
    def probe_attention(self, layer: int) -> AttentionProjections | None:
        """The linear maps from hidden state `layer - 1` to the attention vectors of `layer`, if there are such maps.

        Found by watching, not by name: the modules whose input is that hidden state and whose outputs are the recorded
        vectors, bit for bit. None where another operation stands between (a norm before attention, rotary positions),
        and where the vectors are not as wide as the hidden states.

        Raises:
            TeacherError: attention cannot be recorded.
        """
        self.tap()
        ids_BT = torch.arange(16).view(2, 8) % self.record.vocab_size
        with watch_maps(self.model.base_model) as seen:
            outputs = self.run(ids_BT, torch.full((2,), 8), hidden_layers=(layer - 1,), attention_layers=(layer,))
        given_BTD, vectors = outputs.hidden[layer - 1], outputs.attention[layer]
        if any(getattr(vectors, f"{name}_BTD").shape != given_BTD.shape for name in VECTORS):
            return None
        return linear_maps(seen, given_BTD, vectors, getattr(torch, self.dtype))

    @torch.inference_mode()
    def probe_replay(self, layer: int, seq_len: int) -> AttentionProjections | None:
        """The maps from what the projections of an attention layer read to its vectors, and how positions turn these.

        For rows of up to `seq_len` tokens; see `teacher/replay.py`. None where the vectors are made in another way.
        What was found once can be asked of `run` as `given_layers`.

        Raises:
            TeacherError: attention cannot be recorded.
        """
        self.tap()
        found = find_replay(self.model, layer, seq_len, getattr(torch, self.dtype))
        if found is None or found.width != self.record.hidden_size:
            return None
        self._replays[layer] = found
        return found.projections

    @torch.inference_mode()
    def probe_widths(self, layer: int) -> tuple[int, int, int]:
        """Widths of the queries, keys and values of a layer, all heads side by side.

        Those of a decoder whose query heads share keys and values differ, and so may those of a narrower attention.

        Raises:
            TeacherError: attention cannot be recorded.
        """
        self.tap()
        ids_BT = torch.arange(8)[None] % self.record.vocab_size
        vectors = self.run(ids_BT, torch.full((1,), 8), attention_layers=(layer,)).attention[layer]
        query, key, value = (int(getattr(vectors, f"{name}_BTD").shape[-1]) for name in VECTORS)
        return query, key, value

    @torch.inference_mode()
    def probe_head(self) -> None:
        """Try the head on one position.

        Raises:
            TeacherError: the family's head needs more than final hidden states.
        """
        device = running_device(self.model)
        final_PD = torch.zeros(1, self.record.hidden_size, device=device, dtype=self.model.dtype)
        try:
            shape = tuple(self.head()(final_PD).shape)
        except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
            raise TeacherError(
                f"the language-modelling head of family {self.record.model_type!r} cannot be run on hidden states "
                f"alone ({error}): its logits are out of reach; leave logits out of --targets"
            ) from error
        if shape != (1, self.record.vocab_size):
            raise TeacherError(
                f"the language-modelling head of family {self.record.model_type!r} gives {shape} for one position of "
                f"{self.record.vocab_size} ids: its logits cannot be read; leave logits out of --targets"
            )
