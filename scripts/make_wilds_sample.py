"""Small synthetic data sets in the layout of the WILDS package, for trying everything out without the downloads.

    python scripts/make_wilds_sample.py OUT
    python scripts/make_wilds_sample.py OUT --datasets iwildcam camelyon --images_per_domain 64

Stock wilds 2.0.0 opens OUT/iwildcam_v2.0 and its like unchanged: file names, formats and columns are those of the real
releases. The pictures are drawings. Nothing learned or measured on them says anything about the real data.

What the pixels mean. The class is a shape, the domain is a style:

    set       class                                       domain
    iwildcam  one of GLYPHS, somewhere near the middle    location: scenery, light, tone and size of the animal
    camelyon  large dark nuclei in the central 32x32      hospital: colours of the stain; slide: a shade of them, density
    rxrx1     one of GLYPHS, the outline of every cell    cell type: number of cells; experiment: gains, haze, blur, bleeding
    fmow      one of GLYPHS, on top of fields             region: colours of the ground; year: haze, saturation, resolution,
                                                          dark or light shapes
    poverty   wealth: how many cells of a 14x14 grid are  country: level of each band, roughness of the land, strength of
              built up (near the middle where urban),     buildings and lights
              seen in all bands and in the lights

Train, val and test have no domain in common, and the numbers of the train domains have gaps. A domain has as many images as
the command line says, and a source domain some more in id_val and id_test. Two exceptions: one source location of iwildcam
has three, and a country of poverty as many as leave that number of every train country in every fold, after wilds has set
2,000 rows aside.
"""

import argparse
import csv
import itertools
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed

from dmoe.command_line import run_main
from dmoe.errors import UserError

MARKER = "A synthetic sample, written by scripts/make_wilds_sample.py"
"""In the RELEASE file of every folder that this script may replace."""

GLYPHS = (
    "disc",
    "plus",
    "bars",
    "ring",
    "triangle",
    "four dots",
    "crescent",
    "frame",
    "dumbbell",
    "diamond",
    "cross",
    "target",
)
"""Class c is drawn as the c-th. No two are the same up to turns and reflections."""

MIN_IMAGES, SMALL_LOCATION = 4, 3
IN_DISTRIBUTION_FRACTION = 8
"""A source domain has one image in id_val, and one in id_test, for so many in train."""

LOCATIONS = {"train": 12, "val": 4, "test": 4}

SLIDES = {
    **{0: ("004", 4), 4: ("015", 1), 7: ("017", 1), 32: ("062", 2), 35: ("067", 4), 38: ("073", 1)},
    **{41: ("081", 4), 45: ("088", 1), 46: ("089", 3)},
    **{10: ("020", 2), 12: ("021", 3), 16: ("034", 3)},
    **{20: ("040", 2), 23: ("042", 3), 28: ("051", 2)},
}
"""Patient and node of each slide; the hospital is the tens digit of the slide: 0, 3, 4 train, 1 val, 2 test."""

STAINS = {
    0: ((0.86, 0.66, 0.80), (0.45, 0.22, 0.52)),
    1: ((0.94, 0.80, 0.80), (0.56, 0.32, 0.52)),
    2: ((0.73, 0.64, 0.87), (0.31, 0.25, 0.61)),
    3: ((0.90, 0.55, 0.70), (0.50, 0.12, 0.42)),
    4: ((0.84, 0.75, 0.85), (0.38, 0.34, 0.64)),
}
"""Colours of tissue and nuclei at each hospital."""

EXPERIMENTS = {
    **dict.fromkeys(("HEPG2-01", "HEPG2-02", "HUVEC-01", "HUVEC-02", "RPE-01", "RPE-02", "U2OS-01", "U2OS-02"), "train"),
    **dict.fromkeys(("HEPG2-08", "HUVEC-17", "RPE-08"), "val"),
    **dict.fromkeys(("HEPG2-09", "HUVEC-18", "RPE-09", "U2OS-05"), "test"),
}
CELLS_A_SIDE = {"HEPG2": 6, "HUVEC": 4, "RPE": 5, "U2OS": 3}
PLATES, WELL_ROWS, WELL_COLUMNS = 4, "BCDEFGHIJKLMNO", range(2, 24)

CATEGORIES = (
    "airport",
    "crop_field",
    "fountain",
    "lake_or_pond",
    "parking_lot_or_garage",
    "race_track",
    "solar_farm",
    "zoo",
)
"""Those of fmow's 62 that occur."""

YEARS = {"train": (2002, 2004, 2007, 2009, 2010, 2012), "val": (2013, 2014, 2015), "test": (2016, 2017)}
FMOW_SPLITS = {"train": ("train", "val", "test"), "val": ("val",), "test": ("test",)}
"""Under which names of the metadata's ``split`` the years of each of ours are used; wilds leaves out the other names."""

COUNTRIES = (
    ("China", "CN", "CHN", "Asia"),
    ("India", "IN", "IND", "Asia"),
    ("France", "FR", "FRA", "Europe"),
    ("Poland", "PL", "POL", "Europe"),
    ("Kenya", "KE", "KEN", "Africa"),
    ("Nigeria", "NG", "NGA", "Africa"),
    ("Brazil", "BR", "BRA", "Americas"),
    ("United States of America", "US", "USA", "Americas"),
    ("Australia", "AU", "AUS", "Oceania"),
    ("Fiji", "FJ", "FJI", "Oceania"),
)
GROUNDS = {
    "Asia": ((0.32, 0.46, 0.28), (0.52, 0.58, 0.36)),
    "Europe": ((0.22, 0.38, 0.24), (0.44, 0.50, 0.22)),
    "Africa": ((0.66, 0.46, 0.28), (0.78, 0.62, 0.42)),
    "Americas": ((0.34, 0.34, 0.30), (0.56, 0.46, 0.38)),
    "Oceania": ((0.60, 0.30, 0.20), (0.50, 0.46, 0.30)),
    "Other": ((0.62, 0.66, 0.70), (0.80, 0.82, 0.84)),
}
"""The two colours of the fields of each region."""

FOLDS = {
    "A": ("angola", "cote_d_ivoire", "ethiopia", "mali", "rwanda"),
    "B": ("benin", "burkina_faso", "guinea", "sierra_leone", "tanzania"),
    "C": ("cameroon", "ghana", "malawi", "zimbabwe"),
    "D": ("democratic_republic_of_congo", "mozambique", "nigeria", "togo", "uganda"),
    "E": ("kenya", "lesotho", "senegal", "zambia"),
}
"""The test countries of each fold. Its val countries are the test countries of the next one, cyclically."""

SET_ASIDE = 2000
"""Rows of train countries that wilds takes for id_val and id_test, in every fold."""

GRID, BANDS, CELL_PX = 14, 8, 16

Floats = NDArray[np.floating]
Row = dict[str, object]
T = TypeVar("T")


class Options(NamedTuple):
    """What the command line says about the contents."""

    images_per_domain: int
    classes: int
    seed: int
    size: int

    @property
    def held_out(self) -> int:
        """Images of a source domain in each in-distribution split."""
        return max(1, self.images_per_domain // IN_DISTRIBUTION_FRACTION)

    def random(self, *key: str | int) -> np.random.Generator:
        """Random numbers for one purpose."""
        from dmoe.randomness import seed_of

        return np.random.default_rng(seed_of(self.seed, "wilds sample", *key))

    def deck(self, classes: int, *key: str | int) -> Iterator[int]:
        """Endless class numbers: shuffled packs that hold each class once, so that any run of them is nearly balanced."""
        random = self.random("deck", *key)
        return (int(c) for _ in itertools.count() for c in random.permutation(classes))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message} (-h explains)")


def main() -> None:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to give as data.dir, or --data_dir, later")
    parser.add_argument(
        "--datasets", nargs="+", choices=list(RELEASES), default=list(RELEASES), metavar="NAME", help="default: all five"
    )
    parser.add_argument("--images_per_domain", type=int, default=24, metavar="N", help=f"at least {MIN_IMAGES} (default: 24)")
    parser.add_argument("--classes", type=int, default=6, metavar="K", help="of iwildcam and rxrx1 (default: 6)")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--size", type=int, default=448, metavar="PX", help="height of iwildcam's pictures (default: 448)")
    parser.add_argument("--overwrite", action="store_true", help="replace samples that this script wrote, and nothing else")
    given = parser.parse_args()
    if given.images_per_domain < MIN_IMAGES:
        raise UserError(f"--images_per_domain: must be >= {MIN_IMAGES}, got {given.images_per_domain}")
    if not 2 <= given.classes <= len(GLYPHS):
        raise UserError(f"--classes: must be from 2 to {len(GLYPHS)}, got {given.classes}")
    if given.size < 32:
        raise UserError(f"--size: must be >= 32, got {given.size}")
    options = Options(given.images_per_domain, given.classes, given.seed, given.size)
    releases = [RELEASES[name] for name in dict.fromkeys(given.datasets)]
    for release in releases:
        release.check(given.out, overwrite=given.overwrite)
    for release in releases:
        print(release.make(given.out, options), flush=True)


@dataclass(frozen=True)
class Release:
    """One data set of ours.

    Attributes:
        name: on the command line.
        wilds_name: the package's, and the folder's.
        version: the latest that wilds 2.0.0 knows.
        write: draws it into an empty folder and returns the number of images.
    """

    name: str
    wilds_name: str
    version: str
    write: Callable[[Path, Options], int]

    def folder(self, out: Path) -> Path:
        return out / f"{self.wilds_name}_v{self.version}"

    def note(self, folder: Path) -> Path:
        return folder / f"RELEASE_v{self.version}.txt"

    def check(self, out: Path, *, overwrite: bool) -> None:
        """Refuse to touch what is there, unless it is a sample and may be replaced.

        Raises:
            UserError: the folder exists and has to stay.
        """
        folder = self.folder(out)
        if not (folder.exists() or folder.is_symlink()):
            return
        note = self.note(folder)
        if not (note.is_file() and MARKER in note.read_text(errors="replace")):
            raise UserError(f"{folder}: exists, and is not a sample of this script's: choose another OUT")
        if not overwrite:
            raise UserError(f"{folder}: exists: --overwrite replaces it")

    def make(self, out: Path, options: Options) -> str:
        """Write the set beside its place and move it there when complete; returns what there is to say.

        A killed run leaves nothing under the final name, only a hidden folder that may be deleted.

        Raises:
            UserError: it cannot be written.
        """
        began, folder = time.monotonic(), self.folder(out)
        try:
            out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=out) as workplace:
                made = Path(workplace) / "new"
                made.mkdir()
                self.note(made).write_text(f"{MARKER}: drawings, not the real {self.wilds_name}.\n{options}\n")
                images = self.write(made, options)
                megabytes = sum(path.stat().st_size for path in made.rglob("*") if path.is_file()) / 1e6
                if folder.exists():
                    folder.rename(Path(workplace) / "old")
                made.rename(folder)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error}") from None
        return f"{self.name}: {images} images, {megabytes:.1f} MB, {time.monotonic() - began:.1f} s"


# Camera traps


class Camera(NamedTuple):
    """The style of one location.

    Attributes:
        scenery: the empty picture, ``[height, width, 3]`` in [0, 1].
        animal: colour of every animal it sees, ``[3]``.
        reach: median size of an animal, as a fraction of the height.
        bar: height of the strip with the camera's data, in pixels.
    """

    scenery: Floats
    animal: Floats
    reach: float
    bar: int


def write_iwildcam(folder: Path, options: Options) -> int:
    random = options.random("iwildcam")
    numbers = iter(random.permutation(sum(LOCATIONS.values())).tolist())
    names = iter(random.choice(np.arange(1, 553), sum(LOCATIONS.values()), replace=False).tolist())
    decks = {split: options.deck(options.classes, "iwildcam", split) for split in ("train", "val", "test", "id_val", "id_test")}
    rows: list[Row] = []
    (folder / "train").mkdir()
    for split, count in LOCATIONS.items():
        for place in range(count):
            parts = {split: options.images_per_domain}
            if split == "train":
                parts |= {"id_val": options.held_out, "id_test": options.held_out}
                if place == 0:
                    parts = {split: SMALL_LOCATION}
            number, name = next(numbers), next(names)
            camera = camera_of(options.random("iwildcam", "camera", number), options.size)
            for part, images in parts.items():
                for label in itertools.islice(decks[part], images):
                    image_id = str(uuid.UUID(bytes=random.bytes(16), version=4))
                    camera_picture(camera, label, random).save(folder / "train" / f"{image_id}.jpg", quality=85)
                    # the in-distribution splits are of other days than train
                    day = {"id_val": 26, "id_test": 28}.get(part, int(random.integers(1, 26)))
                    clock = ":".join(f"{int(random.integers(limit)):02}" for limit in (24, 60, 60))
                    rows.append(
                        {
                            "split": part,
                            "location_remapped": number,
                            "location": name,
                            "sequence_remapped": len(rows),
                            "seq_id": str(uuid.UUID(bytes=random.bytes(16), version=4)),
                            "frame_num": 0,
                            "image_id": image_id,
                            "filename": f"{image_id}.jpg",
                            "y": label,
                            "category_id": 3 * label,
                            "datetime": f"2013-{int(random.integers(1, 13)):02}-{day:02} {clock}.000",
                        }
                    )
    write_table(folder / "metadata.csv", shuffled(rows, random))
    classes = [{"y": c, "category_id": 3 * c, "name": GLYPHS[c]} for c in range(options.classes)]
    write_table(folder / "categories.csv", classes)
    return len(rows)


def camera_of(random: np.random.Generator, height: int) -> Camera:
    wide, infrared, has_bar = random.random(3) < (0.4, 0.35, 0.4)
    sky, ground, animal = random.uniform(-0.1, 0.1, (3, 3)) * (not infrared)
    light = (0.4, 0.3) if infrared else random.uniform((0.55, 0.15), (0.85, 0.45))
    horizon, texture, contrast, reach = random.uniform((0.15, 0.03, 0.3, 0.5), (0.6, 0.09, 0.5, 0.65))
    bumps, sign = int(random.integers(6, 24)), random.choice((-1, 1))

    width = height * (5 if wide else 4) // 3
    fall = np.linspace(0, 1, height)[:, None] + 0.06 * clouds(random, (height, width), 3) - horizon
    above = 1 / (1 + np.exp(fall / 0.03))[..., None]
    scenery = above * (light[0] + sky) + (1 - above) * (light[1] + ground)
    scenery += texture * clouds(random, (height, width), bumps)[..., None]
    middle = scenery[height // 4 : -height // 4].mean()
    if not 0.05 <= middle + sign * contrast <= 0.95:
        sign = -sign
    colour = np.clip(middle + sign * contrast + animal, 0, 1)
    return Camera(scenery.astype(np.float32), colour.astype(np.float32), float(reach), height // 16 if has_bar else 0)


def camera_picture(camera: Camera, label: int, random: np.random.Generator) -> Image.Image:
    height, width, _ = camera.scenery.shape
    mask = stamp(
        (height, width),
        label,
        size=height * camera.reach * random.uniform(0.9, 1.1),
        row=height * random.uniform(0.46, 0.54),
        column=width * random.uniform(0.45, 0.55),
        angle=random.uniform(-10, 10),
    )[..., None]
    seen = camera.scenery * (1 - 0.9 * mask) + camera.animal * 0.9 * mask
    seen = seen * random.uniform(0.85, 1.1) + grain(random, (height, width), 0.03)[..., None]
    seen[height - camera.bar :] = 0.05
    return picture(seen)


# Histology


def write_camelyon(folder: Path, options: Options) -> int:
    random = options.random("camelyon")
    rows: list[Row] = []
    for slide, (patient, node) in SLIDES.items():
        hospital = slide // 10
        stain = stain_of(options.random("camelyon", "slide", slide), hospital)
        patches = folder / "patches" / f"patient_{patient}_node_{node}"
        patches.mkdir(parents=True)
        held = options.held_out if hospital not in (1, 2) else 0
        deck = options.deck(2, "camelyon", slide)
        # the place of a patch on its slide, in steps of a patch
        places = random.choice(200 * 200, options.images_per_domain + held, replace=False)
        for i, (place, label) in enumerate(zip(places.tolist(), deck, strict=False)):
            x, y = 96 * (place % 200) + 32, 96 * (place // 200) + 32
            image = patch(stain, label, random)
            image.save(patches / f"patch_patient_{patient}_node_{node}_x_{x}_y_{y}.png", compress_level=3)
            rows.append(
                {
                    "patient": patient,
                    "node": node,
                    "x_coord": x,
                    "y_coord": y,
                    "tumor": label,
                    "slide": slide,
                    "center": hospital,
                    # wilds gives the whole of hospitals 1 and 2 to val and test, whatever stands here
                    "split": int(i < held),
                }
            )
    rows = shuffled(rows, random)
    write_table(folder / "metadata.csv", [{"": i, **row} for i, row in enumerate(rows)])
    return len(rows)


class Stain(NamedTuple):
    """The style of one slide: colours ``[3]`` of tissue and nuclei, small nuclei on a patch, blur in pixels."""

    tissue: Floats
    nucleus: Floats
    nuclei: int
    blur: float


def stain_of(random: np.random.Generator, hospital: int) -> Stain:
    shade = random.normal(0, 0.025, 3)
    tissue, nucleus = (np.clip(np.array(colour) + shade, 0, 1).astype(np.float32) for colour in STAINS[hospital])
    return Stain(tissue, nucleus, int(random.integers(18, 40)), float(random.uniform(0.3, 1.2)))


def patch(stain: Stain, label: int, random: np.random.Generator) -> Image.Image:
    """96x96 pixels of tissue."""
    places, radii = random.uniform(0, 96, (stain.nuclei, 2)), random.uniform(1.6, 2.8, stain.nuclei)
    if label:
        places = np.concatenate([places, random.uniform(34, 62, (12, 2))])
        radii = np.concatenate([radii, random.uniform(3.8, 5.5, 12)])
    axis = np.arange(96)
    rows, columns = axis[None, :] - places[:, :1], axis[None, :] - places[:, 1:]
    distance = np.sqrt(rows[:, :, None] ** 2 + columns[:, None, :] ** 2)
    nuclei = np.clip(radii[:, None, None] - distance + 0.5, 0, 1).max(0)[..., None]
    tissue = stain.tissue + 0.03 * clouds(random, (96, 96), 7)[..., None]
    return picture(tissue * (1 - nuclei) + stain.nucleus * nuclei).filter(ImageFilter.GaussianBlur(stain.blur))


# Fluorescence microscopy


class Microscope(NamedTuple):
    """The style of one experiment.

    Attributes:
        cells: rows and columns of cells.
        mixing: from what is stained to the three channels, ``[3, 3]``.
        haze: strength and number of clouds a side of the background.
        blur: in pixels.
    """

    cells: int
    mixing: Floats
    haze: tuple[float, int]
    blur: float


def write_rxrx1(folder: Path, options: Options) -> int:
    random = options.random("rxrx1")
    wells = [f"{row}{column:02}" for row in WELL_ROWS for column in WELL_COLUMNS]
    decks = {split: options.deck(options.classes, "rxrx1", split) for split in ("train", "val", "test")}
    rows: list[Row] = []
    for experiment, split in EXPERIMENTS.items():
        cell_type = experiment.split("-")[0]
        microscope = microscope_of(options.random("rxrx1", "experiment", experiment), cell_type)
        # site 2 of a train experiment is id_test; in the other experiments both sites are in the same split
        count = options.images_per_domain if split == "train" else -(-options.images_per_domain // 2)
        where = sorted(random.choice(PLATES * len(wells), count, replace=False).tolist())
        for place, label in zip(where, decks[split], strict=False):
            plate, well = place // len(wells) + 1, wells[place % len(wells)]
            images = folder / "images" / experiment / f"Plate{plate}"
            images.mkdir(parents=True, exist_ok=True)
            for site in (1, 2):
                cell_picture(microscope, label, random).save(images / f"{well}_s{site}.png", compress_level=3)
                rows.append(
                    {
                        "site_id": f"{experiment}_{plate}_{well}_{site}",
                        "well_id": f"{experiment}_{plate}_{well}",
                        "cell_type": cell_type,
                        "dataset": split,
                        "experiment": experiment,
                        "plate": plate,
                        "well": well,
                        "site": site,
                        "well_type": "treatment",
                        "sirna": f"s{20000 + label}",
                        "sirna_id": label,
                    }
                )
    # in the order of the names, in which wilds numbers the experiments
    write_table(folder / "metadata.csv", sorted(rows, key=lambda row: str(row["site_id"])))
    return len(rows)


def microscope_of(random: np.random.Generator, cell_type: str) -> Microscope:
    gains, bleeding = random.uniform(0.45, 1, 3), random.uniform(0, 0.35, (3, 3))
    np.fill_diagonal(bleeding, 1)
    return Microscope(
        cells=CELLS_A_SIDE[cell_type],
        mixing=(bleeding * gains).astype(np.float32),
        haze=(float(random.uniform(0.03, 0.16)), int(random.integers(2, 8))),
        blur=float(random.uniform(0.3, 2)),
    )


def cell_picture(microscope: Microscope, label: int, random: np.random.Generator) -> Image.Image:
    """256x256 pixels of cells: bodies of the class's shape in red and, weaker, green; round nuclei in blue."""
    pitch = 256 / microscope.cells
    bodies, nuclei = Image.new("L", (256, 256)), Image.new("L", (256, 256))
    for row, column in itertools.product(range(microscope.cells), repeat=2):
        if random.random() < 0.1:
            continue
        top, left = (np.array([row, column]) + 0.5 + random.uniform(-0.12, 0.12, 2)) * pitch
        put(bodies, label, size=pitch * random.uniform(0.8, 1.0), row=top, column=left, angle=random.uniform(0, 360))
        put(nuclei, 0, size=pitch * random.uniform(0.3, 0.4), row=top, column=left)
    body, nucleus = (
        np.asarray(sheet.filter(ImageFilter.GaussianBlur(microscope.blur)), np.float32) / 255 for sheet in (bodies, nuclei)
    )
    stained = np.stack([0.8 * body, 0.55 * body, 0.85 * nucleus], -1)
    strength, clumps = microscope.haze
    haze = strength * (1 + 0.5 * clouds(random, (256, 256), clumps))
    return picture(coarse(stained @ microscope.mixing + haze[..., None]))


# Satellite pictures


class Sensor(NamedTuple):
    """The style of one year: side of a field in pixels, veil of haze, saturation, tone of what was built."""

    field: int
    haze: float
    saturation: float
    tone: float


def write_fmow(folder: Path, options: Options) -> int:
    random = options.random("fmow")
    regions = list(GROUNDS)
    sensors = {year: sensor_of(options.random("fmow", "sensor", year), year) for year in itertools.chain(*YEARS.values())}
    decks: dict[tuple[str, str], Iterator[int]] = {}
    wanted: list[tuple[str, int, str, int]] = []
    for part, years in YEARS.items():
        for year, region in itertools.product(years, regions):
            for split in FMOW_SPLITS[part]:
                deck = decks.setdefault((part, split), options.deck(len(CATEGORIES), "fmow", part, split))
                full = part != "train" or split == "train"
                count = options.images_per_domain if full else options.held_out
                wanted += [(split, year, region, label) for label in itertools.islice(deck, count)]
        # what wilds never uses: sequestered images, and, say, a train image of a test year
        spare = [s for s in ("train", "val", "test") if s not in FMOW_SPLITS[part]]
        for split, year in itertools.product(["seq", *spare], years):
            wanted.append((split, year, str(random.choice(regions)), int(random.integers(len(CATEGORIES)))))

    (folder / "images").mkdir()
    rows: list[Row] = []
    codes = {region: [code for *_, code, place in COUNTRIES if place == region] or ["XKX"] for region in regions}
    for i, (split, year, region, label) in enumerate(shuffled(wanted, random)):
        satellite_picture(sensors[year], region, label, random).save(folder / "images" / f"rgb_img_{i}.png", compress_level=3)
        category = CATEGORIES[label]
        day = f"{year}-{int(random.integers(1, 13)):02}-{int(random.integers(1, 29)):02}"
        clock = ":".join(f"{int(random.integers(limit)):02}" for limit in (24, 60, 60))
        fraction = f".{int(random.integers(1000)):03}" if i % 20 == 7 else ""
        rows.append(
            {
                "split": split,
                "img_filename": f"{category}_{i}_0_rgb.jpg",
                "img_path": f"{split}/{category}/{category}_{i}/{category}_{i}_0_rgb.jpg",
                "spatial_reference": 'GEOGCS["WGS 84",DATUM["WGS_1984",SPHEROID["WGS 84",6378137,298.257223563]]]',
                "epsg": 4326,
                "category": category,
                "visible": True,
                "img_width": 224,
                "img_height": 224,
                "country_code": str(random.choice(codes[region])),
                "cloud_cover": int(random.integers(0, 40)),
                "timestamp": f"{day}T{clock}{fraction}Z",
                "lat": round(float(random.uniform(-50, 60)), 6),
                "lon": round(float(random.uniform(-180, 180)), 6),
                "region": region,
            }
        )
    write_table(folder / "rgb_metadata.csv", rows)
    columns = ("name", "alpha-2", "alpha-3", "region")
    write_table(folder / "country_code_mapping.csv", [dict(zip(columns, country, strict=True)) for country in COUNTRIES])
    return len(rows)


def sensor_of(random: np.random.Generator, year: int) -> Sensor:
    # what is built is light on the ground in every third year: in some of each split
    tone = random.uniform(0.9, 1) if year % 3 == 0 else random.uniform(0, 0.15)
    field = int(random.choice((7, 8, 14, 16, 28)))
    return Sensor(field, float(random.uniform(0, 0.35)), float(random.uniform(0.4, 1.1)), float(tone))


def satellite_picture(sensor: Sensor, region: str, label: int, random: np.random.Generator) -> Image.Image:
    """224x224 pixels: fields in the two colours of the region, and the shape of the class."""
    first, second = (np.array(colour, np.float32) for colour in GROUNDS[region])
    share = random.uniform(0, 1, (224 // sensor.field,) * 2)[..., None]
    fields = first * share + second * (1 - share)
    fields = fields.repeat(sensor.field, 0).repeat(sensor.field, 1)
    size, (row, column) = 224 * random.uniform(0.5, 0.6), 224 * random.uniform(0.45, 0.55, 2)
    built = stamp((224, 224), label, size=size, row=row, column=column, angle=random.uniform(-10, 10))[..., None]
    seen = fields * (1 - built) + sensor.tone * built
    gray = seen.mean(-1, keepdims=True)
    seen = gray + sensor.saturation * (seen - gray)
    return picture(coarse(seen * (1 - sensor.haze) + 0.75 * sensor.haze))


# Landsat and night lights


def write_poverty(folder: Path, options: Options) -> int:
    random = options.random("poverty")
    per_country = rows_per_country(options.images_per_domain)
    (folder / "images").mkdir()
    rows: list[Row] = []
    for country in sorted(itertools.chain(*FOLDS.values())):
        style = options.random("poverty", "country", country)
        year, (lat, lon) = int(style.integers(2009, 2017)), style.uniform((-25, -15), (15, 40))
        urban = random.random(per_country) < 0.35
        wealth = np.where(urban, 0.8, -0.45) + 0.75 * random.normal(size=per_country)
        cells = land(wealth, urban, style=style, random=random)
        for image, is_urban, value in zip(cells, urban.tolist(), wealth.tolist(), strict=True):
            pixels = image.repeat(CELL_PX, 1).repeat(CELL_PX, 2)
            np.savez_compressed(folder / "images" / f"landsat_poverty_img_{len(rows)}.npz", x=pixels)
            rows.append(
                {
                    "lat": round(float(lat + random.normal()), 6),
                    "lon": round(float(lon + random.normal()), 6),
                    "wealthpooled": round(value, 6),
                    "country": country,
                    "year": year,
                    "urban": is_urban,
                    "nl_mean": round(float(image[-1].mean(dtype=np.float64)), 6),
                    "nl_center": float(image[-1, GRID // 2, GRID // 2]),
                    "households": int(random.integers(10, 40)),
                }
            )
    write_table(folder / "dhs_metadata.csv", rows)
    return len(rows)


def rows_per_country(needed: int) -> int:
    """The fewest rows a country for every train country to keep ``needed`` in the train split of every fold.

    The draw is the one of ``wilds.common.utils.subsample_idxs``; rows are sorted by country.
    """
    names = list(FOLDS)

    def left(rows: int) -> int:
        fewest = rows
        for fold, following in zip(names, names[1:] + names[:1], strict=True):
            countries = sum(map(len, FOLDS.values())) - len(FOLDS[fold]) - len(FOLDS[following])
            index = np.arange(countries * rows)
            np.random.default_rng(ord(fold) + 541433).shuffle(index)
            fewest = min(fewest, np.bincount(index[SET_ASIDE:] // rows, minlength=countries).min())
        return int(fewest)

    fewest_train_countries = 13
    return next(rows for rows in itertools.count(SET_ASIDE // fewest_train_countries + needed) if left(rows) >= needed)


def land(
    wealth: NDArray[np.float64], urban: NDArray[np.bool_], *, style: np.random.Generator, random: np.random.Generator
) -> NDArray[np.float16]:
    """Places of one country, ``[n, 8, 14, 14]``, in standard deviations like the real ones, in steps of 1/8.

    Args:
        wealth: ``[n]``.
        urban: ``[n]``.
        style: draws the country's style.
        random: draws everything else.
    """
    level, roughness, strength, lights = style.normal(0, 0.5, BANDS), *style.uniform((0.2, 0.7, 0.7), (0.6, 1.4, 1.4))
    axis = np.arange(GRID) - (GRID - 1) / 2
    from_centre = np.hypot(axis[:, None], axis[None, :])
    chance = random.random((len(wealth), GRID, GRID))
    order = np.where(urban[:, None, None], from_centre + 3 * chance, chance).reshape(len(wealth), -1).argsort(-1).argsort(-1)
    share = 1 / (1 + np.exp(-1.5 * wealth + 1))
    built = (order < np.rint(share * GRID**2)[:, None]).reshape(-1, 1, GRID, GRID).astype(float)
    around = np.pad(built, ((0, 0), (0, 0), (1, 1), (1, 1)))
    glow = sum(around[..., i : i + GRID, j : j + GRID] for i in range(3) for j in range(3)) / 9
    reflects = np.array([1.2, 1.2, 1.2, 0.8, 0.8, 0.5, -0.8, 0])[:, None, None]
    cells: Floats = (
        level[:, None, None] + roughness * random.normal(size=(len(wealth), BANDS, GRID, GRID)) + strength * reflects * built
    )
    cells[:, -1:] = level[-1] + 2.5 * lights * glow
    return (np.rint(8 * cells) / 8).astype(np.float16)


# Drawing


@cache
def glyph(kind: int) -> Image.Image:
    """One of GLYPHS, white on black, 128x128."""
    y, x = np.mgrid[-1:1:128j, -1:1:128j]
    r, square = np.hypot(x, y), np.maximum(abs(x), abs(y))
    corner = np.hypot(abs(x) - 0.5, abs(y) - 0.5)
    inside = {
        "disc": r < 0.72,
        "plus": (np.minimum(abs(x), abs(y)) < 0.24) & (square < 0.9),
        "bars": (abs((y + 0.9) % 0.72 - 0.18) < 0.18) & (square < 0.9),
        "ring": abs(r - 0.68) < 0.19,
        "triangle": (y < 0.7) & (y > 1.9 * abs(x) - 0.9),
        "four dots": corner < 0.33,
        "crescent": (r < 0.88) & (np.hypot(x - 0.4, y) > 0.66),
        "frame": abs(square - 0.72) < 0.15,
        "dumbbell": (np.hypot(abs(x) - 0.58, y) < 0.36) | ((abs(y) < 0.12) & (abs(x) < 0.58)),
        "diamond": abs(x) + abs(y) < 0.9,
        "cross": (np.minimum(abs(x + y), abs(x - y)) < 0.3) & (r < 0.95),
        "target": (r < 0.34) | (abs(r - 0.8) < 0.13),
    }[GLYPHS[kind]]
    return Image.fromarray((255 * inside).astype(np.uint8))


def put(sheet: Image.Image, kind: int, *, size: float, row: float, column: float, angle: float = 0) -> None:
    """Add a glyph to a gray sheet: its size and centre in pixels, its turn in degrees."""
    drawn = glyph(kind).rotate(angle, Image.Resampling.BILINEAR).resize((round(size), round(size)), Image.Resampling.BILINEAR)
    left, top = round(column - size / 2), round(row - size / 2)
    other = Image.new("L", sheet.size)
    other.paste(drawn, (left, top))
    sheet.paste(ImageChops.lighter(sheet, other))


def stamp(shape: tuple[int, int], kind: int, *, size: float, row: float, column: float, angle: float) -> Floats:
    """One glyph alone, ``[height, width]`` in [0, 1]."""
    sheet = Image.new("L", shape[::-1])
    put(sheet, kind, size=size, row=row, column=column, angle=angle)
    return np.asarray(sheet, np.float32) / 255


def clouds(random: np.random.Generator, shape: tuple[int, int], cells: int) -> Floats:
    """Smooth noise ``[height, width]`` of about unit variance, with so many bumps from top to bottom."""
    noise = random.normal(size=(cells, round(cells * shape[1] / shape[0]))).astype(np.float32)
    return np.asarray(Image.fromarray(noise).resize(shape[::-1], Image.Resampling.BICUBIC))


def grain(random: np.random.Generator, shape: tuple[int, int], std: float) -> Floats:
    """Noise ``[height, width]`` in spots of 4x4 pixels."""
    spots = random.normal(0, std, (-(-shape[0] // 4), -(-shape[1] // 4))).astype(np.float32)
    return spots.repeat(4, 0).repeat(4, 1)[: shape[0], : shape[1]]


def coarse(pixels: Floats) -> Floats:
    """Rounded to 32 levels, so that PNG files stay small."""
    return np.rint(pixels * 31) / 31


def picture(pixels: Floats) -> Image.Image:
    """RGB from ``[height, width, 3]`` in [0, 1]."""
    return Image.fromarray(np.rint(255 * np.clip(pixels, 0, 1)).astype(np.uint8))


# Tables


def shuffled(rows: Sequence[T], random: np.random.Generator) -> list[T]:
    return [rows[i] for i in random.permutation(len(rows))]


def write_table(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


RELEASES = {
    release.name: release
    for release in (
        Release("iwildcam", "iwildcam", "2.0", write_iwildcam),
        Release("camelyon", "camelyon17", "1.0", write_camelyon),
        Release("rxrx1", "rxrx1", "1.0", write_rxrx1),
        Release("fmow", "fmow", "1.1", write_fmow),
        Release("poverty", "poverty", "1.1", write_poverty),
    )
}

if __name__ == "__main__":
    run_main(main)
