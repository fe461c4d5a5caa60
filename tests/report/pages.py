"""A page read back: its tables, texts and pictures, without a browser."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

EMPTY = {"meta", "img", "rect", "circle", "path", "line", "br", "link"}


@dataclass
class Element:
    name: str
    attributes: dict[str, str]
    parts: list["Element | str"] = field(default_factory=list)

    def all(self, name: str, **attributes: str) -> list["Element"]:
        """Elements below this one."""
        found = []
        for part in self.parts:
            if isinstance(part, Element):
                wanted = {key.strip("_"): value for key, value in attributes.items()}
                if part.name == name and all(part.attributes.get(key) == value for key, value in wanted.items()):
                    found.append(part)
                found += part.all(name, **attributes)
        return found

    @property
    def text(self) -> str:
        return "".join(part if isinstance(part, str) else part.text for part in self.parts).strip()

    @property
    def own_text(self) -> str:
        """Without what elements inside say."""
        return "".join(part for part in self.parts if isinstance(part, str)).strip()


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {key: value or "" for key, value in attrs})
        self.open[-1].parts.append(element)
        if tag not in EMPTY:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].parts.append(Element(tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag not in EMPTY:
            assert self.open.pop().name == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.open[-1].parts.append(data)


def read(page: str) -> Element:
    """The page as a tree; every element is closed where it should be."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert len(reader.open) == 1, f"<{reader.open[-1].name}> is not closed"
    return reader.open[0]


def section(page: Element, name: str) -> Element:
    (found,) = page.all("section", id=name)
    return found


def table(of: Element) -> tuple[list[str], dict[str, list[str]]]:
    """The names of the columns, and the cells of each row by its name."""
    head = [cell.own_text for cell in of.all("thead")[0].all("th")]
    rows = {row.all("th")[0].own_text: [cell.text for cell in row.all("td")] for row in of.all("tbody")[0].all("tr")}
    return head, rows
