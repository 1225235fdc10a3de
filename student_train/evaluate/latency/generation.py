"""How fast a causal student answers, and how much faster than its teacher: the part of `kdeval latency` for decoders.

What is timed is greedy generation of a fixed number of tokens after prompts of random ids, with the keys and values of
all tokens before kept: the time until all prompts have their first token (one pass over the prompts, and the head at
their last place), and the tokens a second from there on, over all answers. An end of text ends nothing. Serving
engines, with batches that change, are another matter.

Student and teacher take turns, answer by answer, as encoders do pass by pass. Costs about `seconds` per device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from student_train.evaluate.causal import CausalModel, load_causal
from student_train.evaluate.latency.generation_records import Generation, GenerationSetup, GenerationTiming
from student_train.evaluate.latency.models import size_of
from student_train.evaluate.latency.records import LatencyReport
from student_train.evaluate.latency.schedule import Size, plan_sizes
from student_train.evaluate.latency.settings import LatencySettings
from student_train.evaluate.latency.turns import Show, alternate, name_hardware, now, threads_restored
from student_train.evaluate.random_ids import random_ids
from teacher_cache.device import resolve_dtype
from teacher_cache.errors import SettingsError, StudentError
from teacher_cache.models.arithmetic import move_model
from teacher_cache.models.families import encoder_of
from teacher_cache.wording import format_duration

DEFAULT_PROMPTS = (32, 128, 512)
DEFAULT_NEW_TOKENS = 32
_TRIAL_TOKENS = 4
_INSTEAD = "it generates nothing that the other could be compared with; give two causal models, or two encoders"
Seconds = tuple[float, float]
"""To the first token, and to the last."""


def measure_generation(settings: LatencySettings, *, devices: Sequence[str], show: Show) -> LatencyReport:
    """Time the answers of a causal student, and of the teacher if one is given, on each device (`cpu`, `cuda`).

    Raises:
        StudentError: a model cannot be loaded, is no causal LM, keeps no keys and values, or cannot read that much.
        SettingsError: ONNX Runtime was asked for.
    """
    if settings.needs_onnx:
        raise SettingsError(
            f"student {settings.student!r} is a causal language model, whose answers are timed in PyTorch alone: leave "
            "--onnx-out out, and onnxruntime out of --backends"
        )
    show("loading the models")
    models = [load_causal(settings.student, "student", instead=_INSTEAD)]
    if settings.teacher is not None:
        models.append(load_causal(settings.teacher, "teacher", instead=_INSTEAD))
    for model in models:
        _try_out(model)
    notes: list[str] = []
    new_tokens = DEFAULT_NEW_TOKENS if settings.new_tokens is None else settings.new_tokens
    prompts = _choose_prompts(settings, models, new_tokens, notes)
    # sizes are of prompt and answer together, which is what the time goes with
    sizes = [Size.of(count, prompt + new_tokens) for count in settings.chosen_batch_sizes() for prompt in prompts]
    measured: list[Generation] = []
    with threads_restored():
        # the GPU last: models are moved there for good
        for device in sorted(devices):
            measured += _measure(device, models, sizes, new_tokens, settings, notes, show)
    found = [size_of(encoder_of(model.model), model.folder) for model in models]
    return LatencyReport(
        student=settings.student,
        teacher=settings.teacher,
        student_size=found[0],
        teacher_size=found[1] if len(found) > 1 else None,
        measurements=(),
        generation=tuple(measured),
        onnx_max_error=None,
        hardware=name_hardware(devices),
        fingerprints={model.role: model.fingerprint for model in models},
        notes=tuple(notes),
    )


@torch.inference_mode()
def generate(model: PreTrainedModel, prompt_BT: Tensor, new_tokens: int) -> tuple[Tensor, Seconds]:
    """The greedy answers to prompts of one length, and how long they took.

    Args:
        model: a causal LM on the device of the prompts.
        prompt_BT: [B, T] token ids.
        new_tokens: how many each answer has, 2 or more.

    Returns:
        [B, new_tokens] ids, and the seconds to the first column and to the last.
    """
    options: dict[str, object] = {"use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    started = now()
    out = model(input_ids=prompt_BT, **options)
    found = [out.logits[:, -1:].argmax(-1)]
    _finish(prompt_BT)
    first = now() - started
    for _ in range(new_tokens - 1):
        out = model(input_ids=found[-1], past_key_values=out.past_key_values, **options)
        found.append(out.logits[:, -1:].argmax(-1))
    _finish(prompt_BT)
    return torch.cat(found, dim=1), (first, now() - started)


def _finish(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize()


def _try_out(model: CausalModel) -> None:
    """A model without a cache would read the prompt's last token alone, and quickly."""
    prompt_BT = random_ids(model.config, 1, 4)
    try:
        answer_BT, _ = generate(model.model, prompt_BT, 2)
        with torch.inference_mode():
            whole = model.model(input_ids=torch.cat([prompt_BT, answer_BT[:, :1]], dim=1), use_cache=False).logits
            cached = _after_cache(model.model, prompt_BT, answer_BT[:, :1])
    except Exception as error:
        # a family's own checks
        raise StudentError(
            f"{model.role} {model.name!r} of family {model.config.model_type!r} does not generate token by token with "
            f"the keys and values before them kept ({type(error).__name__}: {error}): there is nothing to time; choose "
            "another model"
        ) from error
    difference = (whole[:, -1] - cached).norm() / whole[:, -1].norm().clamp(min=1e-9)
    if difference > 1e-2:
        raise StudentError(
            f"{model.role} {model.name!r} of family {model.config.model_type!r} answers otherwise when tokens "
            f"before are kept than when it reads them again (logits differ by {difference:.0%}): what would be "
            "timed is no generation; choose another model"
        )


def _after_cache(model: PreTrainedModel, prompt_BT: Tensor, next_B1: Tensor) -> Tensor:
    """[B, V] logits after the next token, which alone is read after the prompt."""
    out = model(input_ids=prompt_BT, use_cache=True)
    logits_BV: Tensor = model(input_ids=next_B1, past_key_values=out.past_key_values, use_cache=True).logits[:, -1]
    return logits_BV


def _choose_prompts(
    settings: LatencySettings, models: Sequence[CausalModel], new_tokens: int, notes: list[str]
) -> Sequence[int]:
    limits = [(model.positions, model) for model in models if model.positions is not None]
    limit, shortest = min(limits, key=lambda pair: pair[0], default=(None, None))
    asked = settings.chosen_lengths()
    lengths = DEFAULT_PROMPTS if asked is None else asked
    if limit is None or shortest is None or max(lengths) + new_tokens <= limit:
        return lengths
    longest = limit - new_tokens
    if asked is not None or longest < 1:
        advice = f"give --lengths up to {longest}, or fewer --new-tokens" if longest > 0 else "give fewer --new-tokens"
        raise StudentError(
            f"{shortest.role} {shortest.name!r} reads at most {limit} positions, and a prompt of {max(lengths)} tokens "
            f"with --new-tokens {new_tokens} needs {max(lengths) + new_tokens}: {advice}"
        )
    notes.append(f"prompts end at {longest} tokens: {shortest.role} {shortest.name!r} reads {limit} positions")
    return sorted({min(length, longest) for length in lengths})


def _measure(
    device: str,
    models: Sequence[CausalModel],
    sizes: Sequence[Size],
    new_tokens: int,
    settings: LatencySettings,
    notes: list[str],
    show: Show,
) -> Iterator[Generation]:
    dtype = resolve_dtype(settings.dtype, torch.device(device))
    for model in models:
        move_model(model.model, device=device, dtype=getattr(torch, dtype))
    threads = settings.chosen_threads() if device == "cpu" else (1,)
    torch.set_num_threads(max(threads))
    show(f"trying out the sizes on the {device}")
    plan = plan_sizes(
        sizes,
        threads,
        seconds=settings.seconds,
        time_pair=lambda size: _predict(models, size, new_tokens, device),
        # by the number of tokens many answers at once seem far slower than they are, and a trial takes but a part
        trial_share=0.5,
    )
    if plan.left_out:
        notes.append(
            f"left out on the {device} to stay within --seconds {settings.seconds:g} (tokens of prompt and answer): "
            f"{', '.join(map(str, plan.left_out))}; about {format_duration(sum(plan.left_out.values()))} more"
        )
    for count in threads:
        torch.set_num_threads(count)
        for size, seconds in plan.seconds.items():
            show(f"generating on the {device}, threads: {count}, {size}")
            calls = _answers(models, size, new_tokens, device)
            setup = GenerationSetup(
                backend="pytorch",
                device=device,
                dtype=dtype,
                threads=count,
                batch_size=size.batch_size,
                prompt_tokens=size.seq_len - new_tokens,
                new_tokens=new_tokens,
            )
            yield setup, _summarise(setup, alternate(calls, settings.runs, seconds[count]))


def _answers(models: Sequence[CausalModel], size: Size, new_tokens: int, device: str) -> list[Callable[[], Seconds]]:
    """A call for each model that generates and says how long it took."""
    prompts = [random_ids(model.config, size.batch_size, size.seq_len - new_tokens).to(device) for model in models]
    return [
        partial(_seconds, model.model, prompt_BT, new_tokens) for model, prompt_BT in zip(models, prompts, strict=True)
    ]


def _predict(models: Sequence[CausalModel], size: Size, new_tokens: int, device: str) -> float:
    """Seconds of an answer of each model, from its first few tokens: the best of two after a warm-up."""
    few = min(new_tokens, _TRIAL_TOKENS)
    seconds = 0.0
    for model in models:
        prompt_BT = random_ids(model.config, size.batch_size, size.seq_len - new_tokens).to(device)
        times = [_seconds(model.model, prompt_BT, few) for _ in range(3)][1:]
        seconds += min(first + (last - first) * (new_tokens - 1) / (few - 1) for first, last in times)
    return seconds


def _seconds(model: PreTrainedModel, prompt_BT: Tensor, new_tokens: int) -> Seconds:
    return generate(model, prompt_BT, new_tokens)[1]


def _summarise(setup: GenerationSetup, times: Sequence[Sequence[Seconds]]) -> GenerationTiming:
    after = setup.batch_size * (setup.new_tokens - 1)
    firsts = [1000 * np.asarray([first for first, _ in each]) for each in times]
    rates = [after / float(np.median([last - first for first, last in each])) for each in times]
    return GenerationTiming(
        first_token_ms=round(float(np.median(firsts[0])), 4),
        first_token_p90_ms=round(float(np.percentile(firsts[0], 90)), 4),
        tokens_per_second=round(rates[0], 3),
        runs=len(times[0]),
        teacher_first_token_ms=round(float(np.median(firsts[1])), 4) if len(times) > 1 else None,
        teacher_tokens_per_second=round(rates[1], 3) if len(times) > 1 else None,
    )
