"""Draw the way of the data, from text to measured students, as the SVG at the top of the README.

    python benchmarks/draw_data_way.py    # writes benchmarks/results/data-way.svg

Nothing is measured here. Names come from the code: folders of the packages, subcommands, targets, methods. Each folder
belongs to one station of the picture; a folder that has no station, or a station whose folder is gone, ends the script,
and `tests/test_readme.py` compares the committed picture with what is drawn. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from cli import kdcache, kdeval
from student_train.settings import METHODS
from teacher_cache.contract.targets import TARGETS

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "benchmarks" / "results" / "data-way.svg"

WIDTH, MARGIN, GAP = 400, 12, 62
MIDDLE = WIDTH // 2
# boxes carry their own light ground and dark text, all else is a grey in between: readable on white and on black
INK, FAINT, LINE = "#1b1f24", "#4b535d", "#868e99"
DESCRIBED = (
    "Text is read by the teacher once, what students learn from is kept in a store, any number of students are trained "
    "from it and measured."
)
SANS, MONO = "system-ui, sans-serif", "ui-monospace, Menlo, Consolas, monospace"


@dataclass(frozen=True, kw_only=True)
class Station:
    """A box: what the data is there, in a few words, and the folders whose code makes it that."""

    name: str
    lines: tuple[str, ...]
    folders: tuple[str, ...]
    fill: str
    boxes: tuple[str, ...] = ()
    """Small boxes in a row, in place of one large one."""

    @property
    def height(self) -> int:
        """In pixels of the picture."""
        return 36 + 18 * (len(self.lines) + len(self.folders)) + (42 if self.boxes else 0)


def stations() -> tuple[Station, ...]:
    """The boxes from top to bottom."""
    measures = list(kdeval.COMMANDS)
    caretakers = [name for name in kdcache.COMMANDS if name not in ("build", "import")]
    return (
        Station(
            name="text",
            lines=("documents, cut into rows of tokens",),
            folders=("teacher_cache: corpus",),
            fill="#dbeafe",
        ),
        Station(
            name="teacher",
            lines=("reads every row once", "or did so elsewhere: kdcache import"),
            folders=("teacher_cache: teacher models build importing",),
            fill="#fde8d0",
        ),
        Station(
            name="store",
            lines=(" · ".join(TARGETS), f"kdcache {' · '.join(caretakers)}"),
            folders=("teacher_cache: contract codecs format", "teacher_cache: storage read derive verify"),
            fill="#fdf3c4",
        ),
        Station(
            name="students",
            lines=("any number, without the teacher",),
            folders=("student_train: data losses kernels methods", "student_train: students engine train"),
            fill="#d5f2dc",
            boxes=METHODS,
        ),
        Station(
            name="measures",
            lines=tuple(map(" · ".join, (measures[:4], measures[4:]))),
            folders=("student_train: evaluate",),
            fill="#eadcf8",
        ),
    )


def commands() -> tuple[str, ...]:
    """What leads from each station to the next."""
    return ("kdcache build", "", "kdtrain --method …", "kdeval …")


def draw() -> str:
    """The picture as SVG."""
    found = stations()
    refuse_other_folders(found)
    parts, top = [], MARGIN
    for station, command in zip(found, (*commands(), None), strict=True):
        parts += draw_station(station, top)
        top += station.height
        if command is not None:
            length = GAP if command else GAP // 2
            parts += draw_arrow(top, length, command)
            top += length
    height = top + MARGIN
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{DESCRIBED}">'
    )
    return "\n".join([head, *parts, "</svg>"]) + "\n"


def draw_station(station: Station, top: int) -> list[str]:
    """A box with its name, its lines and its folders."""
    ground = (
        f'<rect x="{MARGIN}" y="{top}" width="{WIDTH - 2 * MARGIN}" height="{station.height}" rx="12" '
        f'fill="{station.fill}" stroke="{LINE}"/>'
    )
    parts = [
        ground,
        text(MIDDLE, top + 24, station.name, size=17, weight=600),
    ]
    y = top + 44
    for line in station.lines:
        parts.append(text(MIDDLE, y, line, size=13))
        y += 18
    if station.boxes:
        parts += draw_small_boxes(station.boxes, y - 6)
        y += 42
    for line in station.folders:
        package, _, names = line.partition(": ")
        paths = " ".join(f"{name}/" for name in names.split())
        parts.append(text(MIDDLE, y, f"{package}: {paths}", size=11, color=FAINT, family=MONO))
        y += 18
    return parts


def draw_small_boxes(names: tuple[str, ...], top: int) -> list[str]:
    """A student for each method, side by side."""
    room = (WIDTH - 4 * MARGIN) / len(names)
    parts = []
    for number, name in enumerate(names):
        left = 2 * MARGIN + number * room
        parts.append(
            f'<rect x="{left + 4:g}" y="{top}" width="{room - 8:g}" height="28" rx="6" fill="#ffffff" stroke="{LINE}"/>'
        )
        parts.append(text(left + room / 2, top + 19, name, size=13, family=MONO))
    return parts


def draw_arrow(top: int, length: int, command: str) -> list[str]:
    """An arrow down, with the command that does it in the middle."""
    tip = top + length - 3
    arrow = (
        f'<path d="M{MIDDLE} {top + 3}V{tip}M{MIDDLE - 6} {tip - 7}L{MIDDLE} {tip}L{MIDDLE + 6} {tip - 7}" '
        f'fill="none" stroke="{LINE}" stroke-width="2"/>'
    )
    parts = [arrow]
    if command:
        width, middle = 9 * len(command) + 20, top + length // 2 - 3
        parts.append(
            f'<rect x="{MIDDLE - width / 2:g}" y="{middle - 14}" width="{width}" height="28" rx="14" fill="#24292f" '
            f'stroke="{LINE}"/>'
        )
        parts.append(text(MIDDLE, middle + 5, command, size=14, color="#ffffff", family=MONO))
    return parts


def text(x: float, y: int, content: str, *, size: int, color: str = INK, family: str = SANS, weight: int = 400) -> str:
    """A line of text around x."""
    return (
        f'<text x="{x:g}" y="{y}" text-anchor="middle" font-family="{family}" font-size="{size}" '
        f'font-weight="{weight}" fill="{color}">{escape(content)}</text>'
    )


def refuse_other_folders(found: tuple[Station, ...]) -> None:
    """End where the packages have other folders than the picture."""
    lines = [line.partition(": ") for station in found for line in station.folders]
    drawn = sorted(f"{package}/{name}" for package, _, names in lines for name in names.split())
    there = sorted(
        str(path.parent.relative_to(ROOT))
        for package in ("teacher_cache", "student_train")
        for path in (ROOT / package).glob("*/__init__.py")
    )
    if drawn != there:
        raise SystemExit(
            f"the picture and the packages differ in {sorted(set(drawn) ^ set(there))}: give each folder one place in "
            "stations()"
        )


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
    print(f"written to {PICTURE.relative_to(ROOT)}")
