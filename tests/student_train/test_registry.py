"""What other packages add: names, entry points, and what is said of packages that cannot be used."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from student_train import TrainSettings
from student_train.layer_map import parse_mapping, register_mapping
from student_train.registry import ADDED_MAPPINGS, ADDED_METHODS, Addition
from teacher_cache.errors import SettingsError

if TYPE_CHECKING:
    from tests.student_train.conftest import Site

EVERY_OTHER = """
from student_train import register_mapping

@register_mapping("every-other")
def every_other(teacher_layers, student_layers):
    return [(i, min(2 * i, teacher_layers)) for i in range(1, student_layers + 1)]
"""


def test_a_mapping_is_what_the_function_gives_and_adds_up_with_others(site: Site) -> None:
    site.install("other_maps", EVERY_OTHER, package="other-maps", version="1.2", mappings="every-other = other_maps")
    found = parse_mapping("every-other", 6, 3)
    assert (found.form, found.pairs, found.text) == ("pairs", ((1, 2), (2, 4), (3, 6)), "every-other")
    assert parse_mapping("last1 + every-other+1:1", 5, 2).pairs == ((1, 1), (1, 2), (2, 4), (2, 5))
    assert ADDED_MAPPINGS.origin("every-other") == {"module": "other_maps", "package": "other-maps", "version": "1.2"}


def test_a_name_is_looked_for_only_when_it_is_none_of_ours(site: Site) -> None:
    site.install(
        "broken", "raise ImportError('no such library')", package="broken", version="0.1", methods="x = broken"
    )
    TrainSettings(method="hs+mha")
    parse_mapping("uniform+last", 6, 3)
    assert "broken" not in sys.modules
    assert "x" in ADDED_METHODS.names()


@pytest.mark.parametrize(
    "code, told",
    [
        (
            "import a_library_that_is_not_there",
            r"'mine' comes from the package their-package 0.3 \(theirs\), which .*: No module named 'a_lib.*uninstall",
        ),
        ("def mine(context): ...", r"registers no method of that name.*@student_train.register_method\('mine'\)"),
        (
            "from student_train import register_method\n@register_method('hs')\ndef mine(context): ...",
            r"which cannot be used: theirs.mine cannot be registered as method 'hs'.*belongs to this package",
        ),
    ],
)
def test_a_broken_package_is_named(site: Site, code: str, told: str) -> None:
    site.install("theirs", code, package="their-package", version="0.3", methods="mine = theirs")
    with pytest.raises(SettingsError, match=told):
        TrainSettings(method="mha+mine")


def test_two_packages_with_one_name_are_told_apart_by_nobody(site: Site) -> None:
    for name in ("one", "two"):
        site.install(name, "", package=f"package-{name}", version="1", methods=f"mine = {name}")
    with pytest.raises(SettingsError, match=r"from the package package-\w+ 1 \(\w+\) and from the package package-"):
        TrainSettings(method="mine")


def test_the_message_for_an_unknown_name_lists_what_packages_add(site: Site) -> None:
    site.install("other_maps", EVERY_OTHER, package="other-maps", version="1.2", mappings="every-other = other_maps",
                 methods="contrast = other_maps")  # fmt: skip
    with pytest.raises(
        SettingsError,
        match="at 'contrasts': did you mean contrast.* each of mha, direct, hs, od, mlm, lm, contrast at most",
    ):
        TrainSettings(method="contrasts")
    with pytest.raises(SettingsError, match="did you mean every-other"):
        parse_mapping("every-othr", 6, 3)


@pytest.mark.parametrize("name", ["uniform", "uniform+last", "emd"])
def test_names_of_ours_are_taken(site: Site, name: str) -> None:
    with pytest.raises(SettingsError, match="already|cannot be called"):
        register_mapping(name)(lambda teacher, student: [(student, teacher)])


@pytest.mark.parametrize("name", ["", "a+b", "1:4", "with space", "2nd"])
def test_names_that_no_flag_could_give_are_refused(site: Site, name: str) -> None:
    with pytest.raises(SettingsError, match="cannot be called"):
        register_mapping(name)(lambda teacher, student: [(student, teacher)])


def test_a_name_belongs_to_one_place_which_may_be_run_again(site: Site) -> None:
    def define(layer: int) -> None:
        @register_mapping("mine")
        def mine(teacher_layers: int, student_layers: int) -> list[tuple[int, int]]:
            return [(student_layers, layer)]

    define(1)
    define(2)  # a cell of a notebook, edited
    assert parse_mapping("mine", 6, 3).pairs == ((3, 2),)
    with pytest.raises(SettingsError, match=r"already: --mapping mine would mean two things"):
        ADDED_MAPPINGS.add(Addition(name="mine", make=print), ())


@pytest.mark.parametrize("given", [None, [], [(1, 2, 3)], [("1", 2)], [1, 2], [(1.0, 2)]])
def test_what_are_no_pairs_of_layers_is_refused(site: Site, given: object) -> None:
    register_mapping("mine")(lambda teacher, student: given)  # type: ignore[arg-type,return-value]
    with pytest.raises(SettingsError, match="gave .* for a teacher of 6 layers and a student of 3"):
        parse_mapping("mine", 6, 3)


def test_layers_that_do_not_exist_are_refused_as_in_any_mapping(site: Site) -> None:
    register_mapping("mine")(lambda teacher, student: [(student, teacher + 1)])
    with pytest.raises(SettingsError, match="--mapping 'mine' names layer 7 of the teacher"):
        parse_mapping("mine", 6, 3)


def test_a_module_without_a_package_is_known_by_its_version(site: Site) -> None:
    (site.folder / "loose.py").write_text(f"__version__ = '7'\n{EVERY_OTHER}")
    __import__("loose")
    assert ADDED_MAPPINGS.origin("every-other") == {"module": "loose", "package": None, "version": "7"}


def test_registering_a_mapping_costs_no_torch() -> None:
    code = "import sys; from student_train import register_mapping; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
