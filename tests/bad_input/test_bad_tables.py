"""CSV files of one's own images, and folders of them, as nobody should make them."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from doors import changes, make_pictures, refusal, state
from test_bad_images import opened, read_all

HEAD = "path,label,domain\n"
ROWS = "".join(
    f"{domain}/{label}/{n}.png,{label},{domain}\n"
    for domain in ("art", "photo", "sketch")
    for label in ("cat", "dog")
    for n in range(4)
)
WHOLE = HEAD + ROWS


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables") / "data"
    make_pictures(folder)
    return folder


def _more(row: str | bytes) -> bytes:
    return WHOLE.encode() + (row if isinstance(row, bytes) else row.encode()) + b"\n"


TABLES: dict[str, bytes] = {
    "empty": b"",
    "one line": HEAD.encode(),
    "no columns": b"\n\n\n",
    "no path": WHOLE.replace("path", "file").encode(),
    "no label": WHOLE.replace("label", "class").encode(),
    "no domain": WHOLE.replace("domain", "place").encode(),
    "semicolons": WHOLE.replace(",", ";").encode(),
    "utf-16": WHOLE.encode("utf-16"),
    "latin-1": _more("é.png,cat,art".encode("latin-1")),
    "bytes": bytes(range(256)) * 10,
    "nul bytes": b"\0" * 10_000,
    "a row too short": _more("x.png,cat"),
    "a row too long": _more("x.png,cat,art,1,2"),
    "an empty label": _more("x.png,,art"),
    "an empty path": _more(",cat,art"),
    "open quotes": _more('"x.png,cat,art'),
    "quotes in the middle": _more('"x"y.png,cat,art'),
    "a line break in a domain": _more('x.png,cat,"a\nb"'),
    "an escape in a label": _more("x.png,\x1b[31mcat,art"),
    "a nul byte in a path": _more("x\0.png,cat,art"),
    "a nul byte in a label": _more("x.png,c\0at,art"),
    "a path twice": _more("art/cat/0.png,cat,art"),
    "a path that is not there": _more("x.png,cat,art"),
    "out of the folder": _more("../../../../../../../../etc/passwd,cat,art"),
    "absolute": _more("/etc/passwd,cat,art"),
    "a device": _more("/dev/zero,cat,art"),
    "a folder": _more("art,cat,art"),
    "the table": _more("images.csv,cat,art"),
    "a huge path": _more("x" * 5000 + ".png,cat,art"),
    "a huge label": _more("art/cat/0.png," + "9" * 5000 + ",art"),
    "a huge domain": _more("x.png,cat," + "9" * 5000),
    "a huge field": _more("x.png,cat," + "a" * 200_000),
    "a huge line": _more(",".join("a" * 100 for _ in range(20_000))),
    "a huge first line": b"a," * 600_000 + b"\n",
    "many columns": _more("x.png,cat,art" + "," * 100_000 + "x"),
    "one domain": (HEAD + "art/cat/0.png,cat,sketch\n").encode(),
    "one class": WHOLE.replace(",dog,", ",cat,").encode(),
    "another split": WHOLE.replace("domain\n", "domain,split\n").replace(",art\n", ",art,train\n").encode(),
    "an unknown split": (HEAD.replace("\n", ",split\n") + ROWS.replace("\n", ",x\x1b\n")).encode(),
}


@pytest.mark.parametrize("how", list(TABLES))
def test_bad_table_is_told(how: str, pictures: Path) -> None:
    table = pictures / "images.csv"
    table.write_bytes(TABLES[how])
    before = state(pictures)
    told = refusal(lambda: read_all(opened(table)))
    outside = {"out of the folder": "etc/passwd", "absolute": "/etc/passwd", "a device": "/dev/zero", "a folder": f"{pictures}/art"}
    assert told is not None and outside.get(how, str(table)) in told
    assert changes(before, state(pictures)) == set()


VALUES = ["nan", "inf", "-inf", "1e39", "1e999", "0x10", "1,5", "one", "9" * 5000, "\x1b", "\u0661e400"]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: ascii(value)[:12])
def test_a_value_that_no_network_can_learn_is_told(value: str, pictures: Path) -> None:
    rows = ROWS.replace(",cat,", ",1,").replace(",dog,", ",2,").replace(",1,", f',"{value}",', 1)
    (pictures / "images.csv").write_text(HEAD + rows)
    told = refusal(lambda: opened(pictures / "images.csv", labels="values"))
    assert told is not None and "line 2: " in told


def _linked(folder: Path) -> None:
    """Thirty folders, each with two links to the next: a billion ways to the last one."""
    for number in range(30):
        (folder / "art" / "cat" / f"{number}").mkdir()
    for number in range(29):
        for name in ("x", "y"):
            (folder / "art" / "cat" / f"{number}" / name).symlink_to(folder / "art" / "cat" / f"{number + 1}")


def _deep(folder: Path) -> None:
    here, back = folder / "art" / "cat", Path.cwd()
    os.chdir(here)
    for _ in range(1200):
        os.mkdir("a")  # noqa: PTH102
        os.chdir("a")
    os.chdir(back)


def _one_file(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "art" / "cat" / name).write_bytes(b"")


TREES: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "a way for every number": (_linked, None),
    "a link to the top": (lambda folder: (folder / "art" / "cat" / "up").symlink_to(folder), None),
    "a link to the system": (lambda folder: (folder / "art" / "cat" / "up").symlink_to("/sys/class"), None),
    "deep": (_deep, "folders deep"),
    "a pipe": (lambda folder: os.mkfifo(folder / "art" / "cat" / "p.png"), None),
    "a link to a pipe": (
        lambda folder: (os.mkfifo(folder / "p"), (folder / "art" / "cat" / "p.png").symlink_to(folder / "p")),
        "not a regular file",
    ),
    "a link to a device": (lambda folder: (folder / "art" / "cat" / "p.png").symlink_to("/dev/zero"), "not a regular file"),
    "a link to nothing": (lambda folder: (folder / "art" / "cat" / "p.png").symlink_to("nothing"), "no such image"),
    "a name with a line break": (_one_file("a\nb\x1b[31m.png"), "a\\nb\\x1b[31m.png: cannot be read"),
    "a name that is no text": (lambda folder: open(os.fsencode(folder) + b"/art/cat/\xff.png", "wb").close(), "cannot be read"),
    "a domain that is no text": (lambda folder: (folder / "art").rename(os.fsdecode(os.fsencode(folder) + b"/\xff")), "not UTF-8"),
    "an image beside classes": (lambda folder: (folder / "art" / "x.png").touch(), "lies in no class folder"),
    "an image as a domain": (lambda folder: (folder / "x.png").mkdir(), None),
}


@pytest.mark.parametrize("how", list(TREES))
def test_odd_folder_of_images_is_read_or_told(how: str, tmp_path: Path) -> None:
    make_pictures(tmp_path / "data")
    damage, expected = TREES[how]
    damage(tmp_path / "data")
    told = refusal(lambda: read_all(opened(tmp_path / "data")))
    assert (told is None) if expected is None else (told is not None and expected in told), told
    if how == "deep":  # nothing else can remove it
        for _ in range(1200):
            inner = tmp_path / "data" / "art" / "cat" / "a"
            (inner / "a").rename(tmp_path / "next") if (inner / "a").exists() else None
            inner.rmdir()
            (tmp_path / "next").rename(inner) if (tmp_path / "next").exists() else None
            if not inner.exists():
                break
