"""The pictures of a report: what is drawn, that it is the same every time, and that it stays small."""

from __future__ import annotations

import base64
from xml.etree import ElementTree

import numpy as np

from student_train.evaluate.fidelity.heat_maps import RelationMaps
from student_train.evaluate.report.plots import plot_relation_maps
from teacher_cache.contract.streams import VECTORS


def test_tokens_of_any_script_are_words_of_the_picture() -> None:
    tokens = ("東京", "<&>", "$x$", "##ing")
    values = dict.fromkeys(VECTORS, np.full((4, 4), 0.25, np.float32))
    maps = RelationMaps(
        tokens=tokens, row=0, held_out=True, view="plain", student_layer=1, teacher_layer=2, heads=2, teacher=values,
        student=values, kl=dict.fromkeys(VECTORS, 0.0),
    )  # fmt: skip
    address = plot_relation_maps(maps)
    assert plot_relation_maps(maps) == address
    picture = base64.b64decode(address.partition(",")[2]).decode()
    words = {element.text for element in ElementTree.fromstring(picture).iter() if element.text}
    assert set(tokens) <= words
