"""A page read back: sections by id, what they say, the pictures in them."""

from __future__ import annotations

import base64
from html.parser import HTMLParser


class Page(HTMLParser):
    """Sections by id, their text, and every address that the page names; elements must be closed in order."""

    VOID = frozenset({"meta", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: dict[str, str] = {}
        self.addresses: list[str] = []
        self.section = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.addresses += [value for name in ("src", "href") if (value := found.get(name))]
        if tag == "section":
            self.section = found["id"] or ""
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text[self.section] = self.text.get(self.section, "") + data

    def pictures(self) -> list[str]:
        """The SVG documents."""
        found = [address for address in self.addresses if address.startswith("data:image/svg+xml;base64,")]
        return [base64.b64decode(address.partition(",")[2]).decode() for address in found]
