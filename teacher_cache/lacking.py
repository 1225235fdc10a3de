"""What a cache lacks of what is asked for, and the command that adds it. Nothing is read here.

In: a request, the manifest, and where the cache lies. Out: nothing, or a refusal that names every target that is not
there. A finished store takes more targets from the command that built it, so only what it lacks has to be named.
"""

from __future__ import annotations

from teacher_cache.batch import TargetRequest
from teacher_cache.contract import Manifest
from teacher_cache.errors import TargetsError
from teacher_cache.specs import TargetSpecs, describe_targets


def check_request(request: TargetRequest, manifest: Manifest, where: str, *, several: bool = False) -> None:
    """Check that the store at `where`, or each of several that hold the same targets, holds what is asked for.

    Raises:
        TargetsError: it does not.
    """
    targets = manifest.targets
    lacking = _lacking(request, targets)
    names = [f"hidden {layer}" for layer in lacking.hidden_layers]
    names += [f"attention {layer}" for layer in lacking.attention_layers]
    names += ["logits"] if lacking.logits else []
    if not names:
        return
    commands = ", then ".join(f"`{flags}`" for flags in _flags(lacking))
    advice = (
        f"repeat the command that built {'each of them' if several else 'it'} with {commands}, which adds what is "
        "lacking and keeps what is there, or ask for what is there"
    )
    if lacking.logits and not manifest.teacher.has_mlm_head:
        advice = (
            f"no store of the teacher {manifest.teacher.name!r} can have logits, because its checkpoint has no "
            "masked-LM head: leave them out, or build a store of a teacher that has one"
        )
    raise TargetsError(
        f"{where!r} {'lack' if several else 'lacks'} {', '.join(names)}: the student would have nothing to learn from. "
        f"{'They have' if several else 'It has'} {', '.join(describe_targets(targets)) or 'no targets'}; {advice}"
    )


def _lacking(request: TargetRequest, targets: TargetSpecs) -> TargetRequest:
    return TargetRequest(
        hidden_layers=tuple(sorted(set(request.hidden_layers) - set(targets.hidden_layers()))),
        attention_layers=tuple(sorted(set(request.attention_layers) - set(targets.attention_layers()))),
        logits=request.logits and targets.logits is None,
    )


def _flags(lacking: TargetRequest) -> list[str]:
    """The flags of each build that it takes: one keeps the attention of one layer."""
    first, *others = lacking.attention_layers or (None,)
    wanted = {"logits": lacking.logits, "hidden": lacking.hidden_layers, "attention": lacking.attention_layers}
    flags = ["--targets " + ",".join(name for name, value in wanted.items() if value)]
    if lacking.hidden_layers:
        flags.append("--layers " + ",".join(map(str, lacking.hidden_layers)))
    if first is not None:
        flags.append(f"--attention-layer {first}")
    return [" ".join(flags), *(f"--targets attention --attention-layer {layer}" for layer in others)]
