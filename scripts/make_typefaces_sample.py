"""Letters of 64 real typefaces as OUT/typeface/letter/image.png: a data set whose images and domains nobody made for the purpose.

    python scripts/make_typefaces_sample.py data/typefaces

Free typefaces come as packages of npm (15 MB, of the versions below, their sums checked), so Node.js has to be there. A domain is
a typeface in one style, a class a letter: capital and small, bare and under accents, as its designer drew them, at most
MOST_PER_CLASS each, and none twice. Grey PNG files, 28x28, white on black; the same ones wherever Pillow is the same. All letters
of a typeface are drawn at one scale and on one line, so that what is small or thin stays so.

What is not real: nobody has photographed or scanned these letters, they have no noise, and each is alone in the middle.
"""

import argparse
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed

from dmoe.command_line import run_main
from dmoe.errors import UserError

EDGE = 28
"""Of a picture, in pixels."""
TALL, WIDE, DOWN = 22, 26, 2
"""Pixels that nine of ten bare letters do not exceed, and how far they stand below the middle, for the accents' sake."""
MEASURED, FINER = 96, 4
"""Pixels of an em where letters are measured; a picture is drawn so many times as large, and then made smaller."""
MOST_PER_CLASS = 10

BLOCKS = (range(0x41, 0x180), range(0x1E00, 0x1F00))
"""Where Latin letters with and without accents stand in Unicode."""
NO_CHARACTER = "\uf8ff"
"""No typeface here has it; what is drawn in its place is drawn for any that is missing."""

NPM_PATIENCE = 600
"""Seconds to wait for the packages."""

PACKAGES = """
abril-fatface 5.3.0 261304489f1ad9509af041947230865e79ae1e7c75c330b75d42d67a5c4a8aff
alex-brush 5.3.0 f0610b3d9a503360b03b9a332a89ee6476811e3e4a09398979c52d60af0952f7
alfa-slab-one 5.3.0 9a23f35cd084f78793d3375618def5b8a56251df4191edce109a7738b54148b0
amatic-sc 5.3.0 76e588455c315b57c558b8ad2bafd1c91cc7c764a6333f6bb5a3dcc4a35c390c
annie-use-your-telescope 5.3.0 ed1cea10322cff6e760b1c1d2cb3be8b5a3b08ddea41feae31f9f938f39fe1ab
audiowide 5.3.0 d3aeff4a87b2c1370516b0820d88fc94f7a992aed4f5dfca5338c054df3dc10c
bad-script 5.3.0 3b51fb49d57c31345272b0d483be17ec99d67a3e6baf06d462b800fd6d9478cd
bangers 5.3.0 7200b288ad26e3da1dd0a47dfb6f1712c4c327f038d84afe69a682c63a2c102c
berkshire-swash 5.3.0 4cc0bfa3a0d65395c6a9f179bdb4fa8d9565ae0e168dea37fc0640b05786e9c1
birthstone 5.3.0 6113d71122cb2150d5a32d7e05aa6562391908aa99b17725cfb33dac5f86400a
black-ops-one 5.3.0 b4fed39b3bb1fccda1f9d0778add663f7d3fccf9422728a166ce4034d2aba7d5
bodoni-moda 5.3.0 e79339978034bf8891a0f0eb4ef54551b6fd52df3c03bd29de00c1d9a9663406
caveat 5.3.0 ebf746fc0667b9d10fcac7c8604e2ba40a264da85a1c9b48bd679c0af3221293
cinzel-decorative 5.3.0 7c0bbe36d3d9382f4a993ddfa8e5a31d725e35b83a130cc92f54d15a3823e94f
climate-crisis 5.3.0 d80e2a91aff2349a0ebe58004d94ace2e0951e819f8c15c596821649ed95ef58
comfortaa 5.3.0 5c82d14fe6efc746213748a2835b7aa7b6e07409f1611eaee52eb25e0bdfcca6
corinthia 5.3.0 785a69df3232b124fefe93f6e6fe55766c2022af56a4801a8d46caa9092fbcbe
courier-prime 5.3.0 fd204a077d81426e1425baed6d471ad78a8eccca931091e661637bb10b5f2724
covered-by-your-grace 5.3.0 1bd27256356f90c7bc7b463d36c05565ef4b3d655bc56d0dd7b7387114b1308d
dancing-script 5.3.0 e392efa74afec672f1c97f8699a16bb8439c8aca1a367ddb5cd035f11e70e31a
doto 5.3.0 f9e943c8f185ccfc15ea3afd792325fac5eb5ebb361beaf2d21c153ebabca19d
eb-garamond 5.3.0 2e61af0740104953d4fc5cb52a8c6de257ae6d83a4a89e0fd4be2f6132fd40d9
ephesis 5.3.0 adcef6fe3aedceb267c97c1fb342e77d02a483f9331348e74d5a3a680d3b3057
goldman 5.3.0 935dbc16ab8d631c7ea97b433ed9273e2b3879cea209fc45c012ebec3b73d1a9
great-vibes 5.3.0 0bfdc957fa42a6d17288fce79a9299dab14742b77bdbb223c4385739d4035ca9
indie-flower 5.3.0 be380503f1e2c5ef08b8399a28f8cb2f1725527db2cb6aacec3037c2bd1b9083
italianno 5.3.0 05d55abaf566d7c69590e7059a39f9f2ad3227dab588ef7d933bc3a7ca6fc5e4
josefin-sans 5.3.0 a89f83ae9d414f027af83546b84e09ac81e960024dfdeea3bcb491e8ed52a962
kaushan-script 5.3.0 1d665df77f4bcd3fbf106c9adc1405fc1d0ec492270d5c23b597f00da2f6515d
krona-one 5.3.0 cb8ea2879fb7751c6cda122e44a8df84ba5ecb6da7d77e2e14bdfa7c92e93349
licorice 5.3.0 4e973b54d1baee5b46860b35bdd46f82d8a30500930349592fb13eeb97750aba
lobster 5.3.0 4ac6f6ab805b684026cb719f55dd605c892ca5d1db3f32fca88ca554a63b86d7
marck-script 5.3.0 c4e6f14fd3736ec94a872db215192ea7dea04f1315df1385b451c153510575da
medievalsharp 5.3.0 3fb6eb053595f11b9ead1ff863c163027ed1ed7dd68b1d6a41fb84e64596be88
michroma 5.3.0 8e4b794f563bc85a5ffc59287fb46fd17ea1990f601b7abe172f8a5389a701ec
monoton 5.3.0 ca31480b5cbf4bd7d95dbcef0d3b90965685de5b071fa6281cc4fccd586ac06d
montecarlo 5.2.8 e277cf0fbe3d9264585183daaa18fb99b010bf605a949212df94b71356910333
mouse-memoirs 5.2.7 4347212c240ea87bf4ec78ca79f38436cb8ac2c2e80fa59dbc2941978a4a5401
ms-madi 5.3.0 aa34753159245fc9aac7b429183c092254f85aabd7e6bc4c51cf60becf6d3f25
old-standard-tt 5.3.0 21aa9a282a2d5643bb538da8886d69283aeed096d81d31ebc81fd84230564878
oooh-baby 5.3.0 1c76cc3cdaa82e7bdf1b55141d358c36250913d5b1291df4a7e9a42818d742c2
oswald 5.3.0 27bf46420288bb65bd186638cde54686aa8f9d5dc975b1d597dfe81a7dd472cb
pacifico 5.3.0 397f4f0a8a4c44e929cafa4cfede7240f7ac81a922f6779d3fefe2192c67d619
parisienne 5.3.0 b047afa53cca7ace68d1a76407a1a72841d940483877b16373be1beb159c0c74
patrick-hand 5.3.0 c3428d02610c7b8fa92b044cf766f8c30b88bb32a47460b4ac42fa14e0bcdcc0
pinyon-script 5.3.0 7b4064f2c0145016091fee841067f1edd8c06225c575bffde3f4d9232d231dbe
pixelify-sans 5.3.0 003876aaa787e925e6f17bd08901dc9d551bcc8ecbf4420c670497aa44378218
playfair-display 5.3.0 564e61951ecc3e962793cd50395f718cda6350cb934f9000dbe0139c768dc023
poiret-one 5.3.0 ddcb6eb5580182ef2a70c1ebf75ad76a0f748a9f795ac9ca390eda9656f04b75
press-start-2p 5.3.0 7aa0c201772e5099e713f99ce4117c56ebdda85cb4d95b81f22922c13f655e37
rammetto-one 5.3.0 e5c1daf2424944fd5d8a61c4a401ad313cf39061ce6cd4afecd49fc0224f6436
righteous 5.3.0 f1eef6d5e0b87e0cba26208279d468f29139adddc339a98d61fcb8d7e374b4e3
roboto-slab 5.3.0 45d42c2f30be7fa361c673a297cb75e151e977a57905e449d25875adf97e77f5
sacramento 5.3.0 d9214720a61e878d67296a55afec2c372b1e6a9a6a00718e8e343def34911ae3
saira-stencil-one 5.3.0 fa80ae0e57372c67411ca278b0895e07b3717915ed73a7c46fd490c16260e268
shadows-into-light 5.3.0 0885aefd34c65bd79207cffff0771ae0527f227a202bc850f8cf9a12257fc7f1
sigmar-one 5.3.0 bc355ff61b4ae24ee1257ae00a26b3920a2890c249dd3e77ca406a2537433514
special-elite 5.3.0 c4b33d38d9829a962bcb3fe8067ee8ce062c2a936e9e01fc072ddaf9cc897460
spicy-rice 5.3.0 5d10c61f42476a08b9b43d04df85076aea8d1cb0faa2d9367b166ee31552b4e8
titan-one 5.3.0 dae0bf3dd6ca38719172f25c59f4c8437310fb46d86de7f412d863971b1ce5d3
uncial-antiqua 5.3.0 dca445d9576d344e18b1ce58384457ece9007cf2611c68f34b0cbcaab1907b24
vt323 5.3.0 aca9d83456bcebf445920008ac46e275206d48efd8360eb9cc4c6a04d45bcaf0
whisper 5.3.0 f3af599bfba08140178bc90714b48af2772eeea081c161448c627a0188116b6d
yellowtail 5.3.0 11069ff57ef56c675878da73fa19b044286e94dae0001329fcced91d30f0508e
"""
"""Of @fontsource: name, version, SHA-256. Each has 150 different pictures or more; which was all that they were chosen by."""


@dataclass(frozen=True)
class Package:
    """One typeface as npm has it."""

    name: str
    version: str
    sha256: str

    @property
    def file(self) -> str:
        return f"fontsource-{self.name}-{self.version}.tgz"


@dataclass(frozen=True)
class Typeface:
    """A typeface in one style.

    Attributes:
        about: the package's own description: family, licence, whose it is.
        western: the font of characters up to U+00FF.
        extended: the font of those above.
    """

    about: Mapping[str, Any]
    western: bytes
    extended: bytes

    def font(self, character: str, size: float) -> ImageFont.FreeTypeFont:
        """The font that has the character, ``size`` pixels an em."""
        content = self.western if ord(character) <= 0xFF else self.extended
        return ImageFont.truetype(io.BytesIO(content), size, layout_engine=ImageFont.Layout.BASIC)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to give as --data_dir later; new or empty")
    out = parser.parse_args().out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already and is not an empty folder: name another one, or delete it")
    packages = listed(PACKAGES)
    with tempfile.TemporaryDirectory() as folder:
        fetch(packages, Path(folder))
        count = write_sample(out, packages, Path(folder))
    print(f"{out}: {count:,} pictures of {len(packages)} typefaces and 26 letters; next:")
    print(f"python run.py --dataset folders --config configs/typefaces.yaml --run_dir runs/typefaces --data_dir {out}")


def listed(table: str) -> list[Package]:
    """The packages of a table, a line each."""
    return [Package(*line.split()) for line in table.split("\n") if line]


def fetch(packages: Sequence[Package], folder: Path) -> None:
    """Have npm put the packages into a folder.

    Raises:
        UserError: there is no npm, or it could not get one of them.
    """
    asked = [f"@fontsource/{package.name}@{package.version}" for package in packages]
    command = ["npm", "pack", "--loglevel=error", "--fetch-retries=1", *asked]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=NPM_PATIENCE, check=False)
    except FileNotFoundError:
        raise UserError("npm: not found; the typefaces are packages of npm: install Node.js") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"npm: the typefaces were not there after {NPM_PATIENCE} s: is the registry in reach?") from None
    if done.returncode:
        code = re.search(r"code (E\w+)", done.stderr)
        raise UserError(f"npm: could not get the typefaces ({code[1] if code else 'no reason given'}): is the registry in reach?")


def write_sample(out: Path, packages: Sequence[Package], folder: Path) -> int:
    """Write the pictures of all packages in a folder, and whose they are; returns how many.

    Raises:
        UserError: a package is not the one that is listed, or the pictures cannot be written.
    """
    typefaces = {package.name: opened(package, folder) for package in packages}
    count = 0
    try:
        for name, typeface in typefaces.items():
            for letter, character, picture in pictures(typeface):
                path = out / name / letter / f"{ord(character):04x}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)
                count += 1
        (out / "LICENCES.md").write_text(licences(packages, typefaces), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from None
    return count


def opened(package: Package, folder: Path) -> Typeface:
    """The typeface of a package, upright and of regular weight, or of the lightest where it has no regular one.

    Raises:
        UserError: the package is not there, or not what is listed.
    """
    path = folder / package.file
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != package.sha256:
        raise UserError(f"{package.file}: not the package that this script was written for: its SHA-256 differs")
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:

        def member(name: str) -> bytes:
            file = archive.extractfile(f"package/{name}")
            assert file is not None  # the sum was right
            return file.read()

        about = json.loads(member("metadata.json"))
        weight = min(about["weights"], key=lambda weight: (weight != 400, weight))
        western, extended = (member(f"files/{about['id']}-{part}-{weight}-normal.woff") for part in ("latin", "latin-ext"))
    return Typeface(about=about, western=western, extended=extended)


def letter_forms() -> dict[str, list[str]]:
    """The characters of each class A to Z: capital, small, then both under one accent after the other."""
    forms: dict[str, list[tuple[str, str]]] = {}
    for character in (chr(code) for block in BLOCKS for code in block):
        decomposed = unicodedata.normalize("NFD", character)
        bare, accents = decomposed[0], decomposed[1:]
        if bare.isascii() and bare.isalpha() and all(map(unicodedata.combining, accents)):
            forms.setdefault(bare.upper(), []).append((accents, character))
    return {letter: [character for _, character in sorted(found)] for letter, found in sorted(forms.items())}


def pictures(typeface: Typeface) -> Iterator[tuple[str, str, Image.Image]]:
    """Class, character and picture of the letters that a typeface has, at most MOST_PER_CLASS a class, none twice."""
    bare = [typeface.font(c, MEASURED).getbbox(c, anchor="ms") for forms in letter_forms().values() for c in forms[:2]]
    top, bottom = -nine_tenths([-box[1] for box in bare]), nine_tenths([box[3] for box in bare])
    scale = min(TALL / (bottom - top), WIDE / nine_tenths([box[2] - box[0] for box in bare]))
    line = EDGE / 2 + DOWN - scale * (top + bottom) / 2
    size = MEASURED * scale * FINER
    fonts = {"western": typeface.font("A", size), "extended": typeface.font("\u0100", size)}
    missing = {name: bytes(font.getmask(NO_CHARACTER)) for name, font in fonts.items()}
    for letter, forms in letter_forms().items():
        seen: set[bytes] = set()
        for character in forms:
            part = "western" if ord(character) <= 0xFF else "extended"
            mask = fonts[part].getmask(character)
            if mask.getbbox() is None or bytes(mask) == missing[part]:
                continue
            picture = drawn(character, fonts[part], line=line)
            if len(seen) < MOST_PER_CLASS and picture.tobytes() not in seen:
                seen.add(picture.tobytes())
                yield letter, character, picture


def nine_tenths(values: Sequence[float]) -> float:
    """What nine of ten values do not exceed."""
    return sorted(values)[9 * len(values) // 10]


def drawn(character: str, font: ImageFont.FreeTypeFont, *, line: float) -> Image.Image:
    """A character as a grey picture: its ink in the middle, standing on a line so many pixels from the top."""
    large = Image.new("L", (FINER * EDGE, FINER * EDGE))
    left, _, right, _ = font.getbbox(character, anchor="ls")
    place = (FINER * EDGE / 2 - (left + right) / 2, FINER * line)
    ImageDraw.Draw(large).text(place, character, fill=255, font=font, anchor="ls")
    return large.reduce(FINER)


def licences(packages: Sequence[Package], typefaces: Mapping[str, Typeface]) -> str:
    """A table of the packages, their licences and whose the typefaces are."""
    rows = ["# Whose letters these are", "", "| package of npm | version | licence | by |", "|---|---|---|---|"]
    for package in packages:
        licence = typefaces[package.name].about["license"]
        by = " ".join(licence["attribution"].split()).replace("|", "/")
        rows.append(f"| @fontsource/{package.name} | {package.version} | {licence['type']} | {by} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    run_main(main)
