"""A page as a browser would take it apart, and what every page of ours keeps, whatever text was put into it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c63f8ffffff7f0009fb03fd05434555"
    "0000000049454e44ae426082"
)
KNOWN = (
    "html head meta title style body header nav h1 h2 h3 h4 p bdi main section div table thead tbody tr th td small sub "
    "figure img figcaption strong ul li form label input select option output article span br script a details summary"
)


class Reading(HTMLParser):
    """Tags with attributes and visible text, as a browser would take them."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.comments: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


def add_figure(result: Path, name: str, caption: str) -> None:
    """A one-pixel figure with this caption, as drawn for the result."""
    folder = result / "figures"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.png").write_bytes(PIXEL)
    (folder / f"{name}.json").write_text(json.dumps({"title": "T", "caption": caption}), encoding="utf-8")


def check_own_markup_only(reading: Reading) -> None:
    """Known tags, no handler, no address but our own anchors and images as data, a policy that allows nothing else."""
    assert {tag for tag, _ in reading.tags} <= set(KNOWN.split())
    assert not reading.comments
    anchors = {attributes["id"] for _, attributes in reading.tags if "id" in attributes}
    for tag, attributes in reading.tags:
        assert not any(key.startswith("on") or key in ("srcset", "style", "action") for key in attributes)
        assert ("href" in attributes) == (tag == "a")
        assert tag != "a" or ((attributes["href"] or "")[:1] == "#" and (attributes["href"] or "")[1:] in anchors)
        assert (attributes.get("src") or "data:image/png;base64,").startswith("data:image/png;base64,")
        assert re.fullmatch(r"(k\d+( k\d+)*)?", attributes.get("data-changed") or "")
    policy = next(a["content"] for t, a in reading.tags if a.get("http-equiv") == "Content-Security-Policy") or ""
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-") and "unsafe" not in policy
