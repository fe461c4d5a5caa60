"""The letters of typefaces: what is drawn, which letters, whose they are, and what is said where they cannot be had."""

import hashlib
import io
import json
import os
import stat
import subprocess
import sys
import tarfile
import unicodedata
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmoe.config import load_config
from dmoe.data import folders
from dmoe.errors import UserError
from scripts.make_typefaces_sample import (
    DOWN,
    EDGE,
    MOST_PER_CLASS,
    PACKAGES,
    TALL,
    Package,
    Typeface,
    fetch,
    letter_forms,
    listed,
    opened,
    pictures,
    write_sample,
)
from tests.told import names, one_line

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "scripts" / "make_typefaces_sample.py"
ABOUT = {
    "id": "dejavu",
    "weights": [700, 400],
    "license": {"type": "Bitstream-Vera", "attribution": "Copyright (c) 2003\nBitstream, Inc. | DejaVu changes"},
}


def dejavu(kind: str = "DejaVuSans") -> bytes:
    matplotlib = pytest.importorskip("matplotlib", reason="its DejaVu fonts are drawn")
    return (Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{kind}.ttf").read_bytes()


def with_characters(changed: dict[str, str | None]) -> bytes:
    """DejaVu Sans with other glyphs for some characters: another character's, or none."""
    fonts = pytest.importorskip("fontTools.ttLib", reason="makes fonts that lack letters")
    font, out = fonts.TTFont(io.BytesIO(dejavu())), io.BytesIO()
    glyphs = dict(font.getBestCmap())
    for table in font["cmap"].tables:
        for character, other in changed.items():
            if other is None:
                table.cmap.pop(ord(character), None)
            elif ord(character) in table.cmap:
                table.cmap[ord(character)] = glyphs[ord(other)]
    font.save(out)
    return out.getvalue()


def typeface(content: bytes) -> Typeface:
    return Typeface(about=ABOUT, western=content, extended=content)


@cache
def drawn() -> dict[str, dict[str, np.ndarray]]:
    """Pictures of DejaVu Sans, by class and character."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for letter, character, picture in pictures(typeface(dejavu())):
        assert (picture.mode, picture.size) == ("L", (EDGE, EDGE))
        found.setdefault(letter, {})[character] = np.asarray(picture)
    return found


def packed(folder: Path, name: str, content: bytes, *, weights: tuple[int, ...] = (700, 400), drawn_by: int = 400) -> Package:
    """A package as npm has it, whose font is in the files of one weight alone."""
    package = Package(name, "1.0.0", "")
    members = {"metadata.json": json.dumps({**ABOUT, "weights": weights}).encode()}
    members |= {f"files/dejavu-{part}-{drawn_by}-normal.woff": content for part in ("latin", "latin-ext")}
    with tarfile.open(folder / package.file, "w:gz") as archive:
        for path, data in members.items():
            info = tarfile.TarInfo(f"package/{path}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return replace(package, sha256=hashlib.sha256((folder / package.file).read_bytes()).hexdigest())


def pretend_npm(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    npm = folder / "npm"
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def ink(picture: np.ndarray) -> tuple[int, int, int, int]:
    """First and last row and column of it that are half white or more."""
    rows, columns = (np.flatnonzero((picture > 127).any(axis=axis)) for axis in (1, 0))
    return rows[0], rows[-1], columns[0], columns[-1]


def test_the_forms_of_a_letter_are_capital_and_small_bare_first() -> None:
    forms = letter_forms()
    assert list(forms) == [chr(code) for code in range(ord("A"), ord("Z") + 1)]
    assert [found[:2] for found in forms.values()] == [[letter, letter.lower()] for letter in forms]
    assert forms["C"][2:6] == ["Ć", "ć", "Ĉ", "ĉ"]  # acute U+0301, circumflex U+0302
    for letter, found in forms.items():
        assert {unicodedata.normalize("NFD", character)[0].upper() for character in found} == {letter}
    assert not {"ß", "Æ", "ø", "ł"} & {character for found in forms.values() for character in found}  # no letter and an accent


def test_a_class_has_so_many_pictures_at_most_and_none_twice() -> None:
    every = [picture.tobytes() for found in drawn().values() for picture in found.values()]
    assert list(drawn()) == list(letter_forms())
    assert max(map(len, drawn().values())) == MOST_PER_CLASS
    for found in drawn().values():
        assert len({picture.tobytes() for picture in found.values()}) == len(found)
    assert len(every) > 150


def test_letters_are_white_on_black_in_the_middle() -> None:
    for letter in "HOTX":
        picture = drawn()[letter][letter]
        assert picture[0, 0] == 0
        assert picture.max() > 240
        weights = picture.sum(axis=0) / picture.sum()
        assert weights @ np.arange(EDGE) == pytest.approx((EDGE - 1) / 2, abs=0.6)  # these four are symmetric, or nearly


def test_letters_of_a_typeface_stand_on_one_line_at_one_scale() -> None:
    font = pytest.importorskip("fontTools.ttLib", reason="tells how high letters are").TTFont(io.BytesIO(dejavu()))
    glyphs = {character: font["glyf"][font.getBestCmap()[ord(character)]] for character in "HxEzp"}
    height = {character: ink(drawn()[character.upper()][character]) for character in glyphs}
    assert len({height[character][1] for character in "HxEz"}) == 1
    scale = (height["H"][1] - height["H"][0] + 1) / glyphs["H"].yMax
    assert height["x"][1] - height["x"][0] + 1 == pytest.approx(scale * glyphs["x"].yMax, abs=1)
    assert height["p"][1] - height["H"][1] == pytest.approx(-scale * glyphs["p"].yMin, abs=1)


def test_most_bare_letters_fill_the_height_and_leave_room_for_accents() -> None:
    bare = np.maximum.reduce([found[character] for letter, found in drawn().items() for character in (letter, letter.lower())])
    top, bottom, _, _ = ink(bare)
    assert TALL - 1 <= bottom - top + 1 <= TALL + 2  # one letter in ten may stand out
    assert (top + bottom) / 2 == pytest.approx((EDGE - 1) / 2 + DOWN, abs=1)
    assert ink(drawn()["E"]["É"])[0] < ink(drawn()["E"]["E"])[0]


def test_small_letters_that_look_like_capitals_are_left_out() -> None:
    found = {character for _, character, _ in pictures(typeface(with_characters({"o": "O", "ó": "Ó"})))}
    assert {"O", "Ó", "ò"} <= found
    assert not {"o", "ó"} & found


def test_letters_that_a_typeface_lacks_are_not_drawn() -> None:
    lacking = with_characters({"Q": None, "q": None, "ć": None, "À": None})
    found = {(letter, character) for letter, character, _ in pictures(typeface(lacking))}
    assert not {("Q", "Q"), ("Q", "q"), ("C", "ć"), ("A", "À")} & found
    assert {("C", "Ć"), ("A", "à")} <= found


def test_characters_beyond_latin_1_come_from_the_second_font() -> None:
    mixed = Typeface(about=ABOUT, western=dejavu(), extended=dejavu("DejaVuSans-Bold"))
    found = {character: np.asarray(picture) for _, character, picture in pictures(mixed)}
    assert np.array_equal(found["é"], drawn()["E"]["é"])
    assert found["Ć"].sum() > 1.2 * drawn()["C"]["Ć"].sum()


def test_a_tree_of_pictures_says_whose_they_are_and_opens_as_a_data_set(tmp_path: Path) -> None:
    kinds = {"sans": "DejaVuSans", "serif": "DejaVuSerif", "mono": "DejaVuSansMono"}
    packages = [packed(tmp_path, name, dejavu(kind)) for name, kind in kinds.items()]
    count = write_sample(tmp_path / "out", packages, tmp_path)
    assert write_sample(tmp_path / "again", packages, tmp_path) == count
    assert sorted(names(tmp_path / "out")) == ["LICENCES.md", "mono", "sans", "serif"]
    told = (tmp_path / "out" / "LICENCES.md").read_text().splitlines()[4:]
    by = "Copyright (c) 2003 Bitstream, Inc. / DejaVu changes"
    assert told == [f"| @fontsource/{name} | 1.0.0 | Bitstream-Vera | {by} |" for name in kinds]
    for path in (tmp_path / "out").rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "out")).read_bytes()
    with Image.open(tmp_path / "out" / "sans" / "E" / "00e9.png") as picture:
        assert np.array_equal(np.asarray(picture), drawn()["E"]["é"])

    dataset = folders.load(
        tmp_path / "out",
        target_domains=["serif"],
        validation_domains=["mono"],
        validation_fraction=0.2,
        labels="classes",
        image_size=14,
        channels=1,
        augmentation="none",
        seed=0,
        skip_unreadable=False,
        known_unreadable=None,
        workers=0,
    )
    assert dataset.class_names == list(letter_forms())
    assert sum(map(len, dataset.splits.values())) == count


@pytest.mark.parametrize(("weights", "drawn_by"), [((700, 300, 400), 400), ((700, 300), 300)])
def test_the_regular_weight_is_drawn_or_else_the_lightest(tmp_path: Path, weights: tuple[int, ...], drawn_by: int) -> None:
    package = packed(tmp_path, "sans", b"a font", weights=weights, drawn_by=drawn_by)
    assert opened(package, tmp_path).western == b"a font"


@pytest.mark.parametrize("fault", ["other", "absent"])
def test_a_package_that_is_not_the_listed_one_is_refused(tmp_path: Path, fault: str) -> None:
    package = packed(tmp_path, "sans", b"a font")
    path = tmp_path / package.file
    path.write_bytes(path.read_bytes() + b"\0") if fault == "other" else path.unlink()
    with pytest.raises(UserError) as caught:
        write_sample(tmp_path / "out", [package], tmp_path)
    assert one_line(caught).startswith("fontsource-sans-1.0.0.tgz: not the package")
    assert not (tmp_path / "out").exists()


def test_npm_is_asked_for_each_package_in_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_npm(tmp_path, monkeypatch, 'printf "%s\\n" "$@" > asked')
    fetch([Package("lobster", "5.3.0", ""), Package("vt323", "5.2.8", "")], tmp_path)
    assert (tmp_path / "asked").read_text().split()[-2:] == ["@fontsource/lobster@5.3.0", "@fontsource/vt323@5.2.8"]


def test_a_registry_out_of_reach_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_npm(tmp_path, monkeypatch, 'printf "npm error code ENOTFOUND\\nnpm error syscall getaddrinfo\\n" >&2; exit 1')
    done = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: npm: could not get the typefaces (ENOTFOUND): is the registry in reach?\n"
    assert not (tmp_path / "out").exists()


def test_a_machine_without_npm_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError) as caught:
        fetch(listed(PACKAGES), tmp_path)
    assert one_line(caught) == "npm: not found; the typefaces are packages of npm: install Node.js"


def test_what_is_there_already_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    done = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path}: is there already")
    assert names(tmp_path) == ["mine.txt"]


def test_packages_are_in_alphabetical_order_each_with_its_sum() -> None:
    packages = listed(PACKAGES)
    assert [package.name for package in packages] == sorted({package.name for package in packages})
    assert {len(bytes.fromhex(package.sha256)) for package in packages} == {32}
    assert len({package.sha256 for package in packages}) == len(packages) == 64


def test_the_configuration_tests_on_the_third_and_sixth_of_every_eight_and_chooses_on_the_eighth() -> None:
    order, data = [package.name for package in listed(PACKAGES)], load_config(ROOT / "configs" / "typefaces.yaml").data
    assert list(data.validation_domains) == order[7::8]
    assert list(data.target_domains) == sorted(order[2::8] + order[5::8])
