"""A fidelity report with numbers that are easy to compare."""

from __future__ import annotations

from student_train.evaluate.fidelity.records import (
    DistributionFidelity,
    FidelityReport,
    HiddenFidelity,
    RelationFidelity,
)


def make_report(scale: float = 1.0) -> FidelityReport:
    relation = RelationFidelity(
        student_layer=3, teacher_layer=5, heads=24, view="plain", query=0.8 * scale, key=0.7 * scale, value=0.5 * scale
    )
    hidden = tuple(
        HiddenFidelity(student_layer=i, teacher_layer=j, view="plain", nmse=nmse * scale, ridge=0.1)
        for i, j, nmse in ((1, 2, 0.25), (3, 6, 0.75))
    )
    return FidelityReport(
        student="student",
        cache="cache.zarr",
        first_row=980,
        last_row=999,
        held_out=True,
        tokens=2560,
        relations=(relation,),
        hidden=hidden,
        distribution=DistributionFidelity(kl=4 * scale, top1_agreement=0.5 / scale, positions=380, temperature=1.0),
    )
