"""Your own pictures: folders domain/class/image, or a CSV file that lists them.

Data-set order, by which a domain's first images are those that are adapted to: rows of a CSV file as they stand there; images in
folders by the SHA-256 of their path below the data set's folder. By name they would come class after class, and the first ones
would all be of one class.
"""

import csv
import difflib
import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, TextIO

import torch
from torch import Tensor

from dmoe.data.base import DomainDataset, DomainSplit
from dmoe.data.decoded import DecodedImages, Keeping
from dmoe.data.files import ImageFiles, kept, missing, unreadable
from dmoe.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Augmentation, ImageTransform
from dmoe.errors import UserError
from dmoe.randomness import generator
from dmoe.tasks import Task, TaskKind

SUFFIXES = frozenset((".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"))
"""Of files that are taken for images, in any case."""

COLUMNS = ("path", "label", "domain")
SPLIT_WORDS = {
    **dict.fromkeys(("source", "train"), "source"),
    **dict.fromkeys(("validation", "val"), "validation"),
    **dict.fromkeys(("target", "test"), "target"),
}
"""What the column ``split`` of a CSV file may hold."""

REPORTED: Mapping[TaskKind, Mapping[str, str]] = {
    "multiclass": {"accuracy": "accuracy", "macro_f1": "macro F1"},
    "regression": {"r": "r", "mse": "mean squared error"},
}

NAMED_AT_MOST = 12
"""Domains in an error message."""

CLASS_DEPTH, DEEPEST = 2, 64
"""Folders between the data set's and a class folder, and an image."""

LONGEST_LINE, LONGEST_NAME, LONGEST_PATH = 1 << 20, 255, 4096
"""Characters: of a line in a CSV file, of a class or domain, of a path."""


@dataclass(frozen=True)
class Listing:
    """Images in data-set order, each with what is known of it without opening it.

    Attributes:
        where: the folder or the CSV file.
        root: what ``paths`` are below of.
        labels: of each image: its class, or a number.
        splits: of each image, where the CSV file says it; empty: domains decide.
        lines: of each image, in the CSV file; empty where there is none.
    """

    where: Path
    root: Path
    paths: list[str]
    labels: list[str]
    domains: list[str]
    splits: list[str]
    lines: list[int]

    @property
    def domain_names(self) -> list[str]:
        """In the order of their numbers."""
        return _sorted(self.domains)


def load(
    source: Path,
    *,
    target_domains: Sequence[str],
    validation_domains: Sequence[str],
    validation_fraction: float,
    labels: Literal["classes", "values"],
    image_size: int,
    channels: Literal[1, 3],
    augmentation: Augmentation,
    seed: int,
    skip_unreadable: bool,
    known_unreadable: Sequence[str] | None,
    workers: int,
    keeping: Keeping | None = None,
) -> DomainDataset:
    """Open folders ``source/domain/class/image``, or a CSV file with columns path, label, domain and perhaps split.

    Images may lie deeper than their class folder. Paths in a CSV file start at its folder, where they are not absolute.

    Args:
        target_domains: to be tested on; to be left empty where a column ``split`` decides.
        validation_domains: to choose on. None, and no validation rows in a column ``split``: a part of the images of every
            source domain is held out, "training-domain validation" of Gulrajani & Lopez-Paz, ICLR 2021.
        validation_fraction: that part.
        labels: ``values`` of a CSV file make it a regression.
        augmentation: of source images.
        seed: of the images that are held out.
        skip_unreadable: read every image once, and leave out those that cannot be read.
        known_unreadable: those that an earlier reading found, in place of another one.
        workers: processes to read images with.
        keeping: of decoded images; None: they are decoded each time.

    Raises:
        UserError: the images, their labels or their domains cannot be found or do not make a data set; one line says why.
    """
    if labels == "values" and source.is_dir():
        raise UserError(f"data.labels: values are read from a CSV file, {source} is a folder: use classes")
    listing = read_listing(source)
    roles = _roles(listing, target_domains=target_domains, validation_domains=validation_domains)
    _refuse_shared_domains(listing, roles)
    numbers, class_names = _values(listing) if labels == "values" else _classes(listing)
    task = Task("multiclass", num_outputs=len(class_names)) if class_names else Task("regression", num_outputs=1)

    transform = ImageTransform((channels, image_size, image_size))
    if channels == 3:
        transform = ImageTransform(transform.image_shape, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    bad = _unreadable(listing, transform, skip=skip_unreadable, known=known_unreadable, workers=workers)
    rows = _rows(listing, roles, bad, fraction=validation_fraction, seed=seed)
    _check_labels(listing, rows, numbers, class_names)

    names = listing.domain_names
    domain_of = {name: number for number, name in enumerate(names)}
    decoded = DecodedImages(keeping, root=listing.root, paths=listing.paths, transform=transform) if keeping is not None else None
    splits: dict[str, DomainSplit] = {
        name: ImageFiles(
            root=listing.root,
            paths=[listing.paths[row] for row in chosen],
            labels=numbers[chosen],
            domains=torch.tensor([domain_of[listing.domains[row]] for row in chosen]),
            domain_names=dict(enumerate(names)),
            transform=transform,
            augmentation=augmentation if name == "source" else "none",
            decoded=decoded,
            rows=chosen,
        )
        for name, chosen in rows.items()
    }
    return DomainDataset(
        name="folders",
        splits=splits,
        task=task,
        transform=transform,
        class_names=class_names,
        fingerprint=_fingerprint(listing, rows, transform, augmentation),
        reported=REPORTED[task.kind],
        in_memory=False,
        unreadable=bad,
        decoded=decoded,
    )


def read_listing(source: Path) -> Listing:
    """What a folder or a CSV file lists; no image is opened.

    Raises:
        UserError: it cannot be read, or lists no images.
    """
    if source.is_dir():
        return _listing_of_folder(source)
    layout = "folders DIR/domain/class/image, or a file.csv with columns path,label,domain"
    if not source.exists():
        raise UserError(f"{source}: no such folder or file; --data_dir (data.dir) takes {layout}")
    if source.suffix.lower() != ".csv" or not source.is_file():
        raise UserError(f"{source}: neither a folder nor a .csv file; --data_dir (data.dir) takes {layout}")
    return _listing_of_table(source)


def _listing_of_folder(folder: Path) -> Listing:
    layout = f"the layout is {folder}/domain/class/image"
    found: list[tuple[str, bytes, str]] = []
    for path in _images_below(folder, "", ()):
        domain, *deeper = path.split("/")
        if len(deeper) == 1:
            raise UserError(f"{folder / path}: lies in no class folder; {layout}")
        if deeper:
            found.append((domain, hashlib.sha256(os.fsencode(path)).digest(), path))
    if not found:
        raise UserError(f"{folder}: holds no images ({' '.join(sorted(SUFFIXES))}) in class folders; {layout}")
    place = {domain: number for number, domain in enumerate(_sorted(domain for domain, _, _ in found))}
    paths = [path for _, _, path in sorted(found, key=lambda one: (place[one[0]], one[1]))]
    domains, labels = (list(names) for names in zip(*(path.split("/")[:2] for path in paths), strict=True))
    for name in _sorted([*domains, *labels]):
        if os.fsencode(name) != name.encode(errors="replace"):
            raise UserError(f"{folder}: the name of the folder {name!r} is not UTF-8: rename it")
    return Listing(folder, folder, paths, labels, domains, [], [])


def _images_below(
    folder: Path, path: str, above: tuple[tuple[int, int], ...], seen: set[tuple[int, int]] | None = None
) -> Iterator[str]:
    """Paths of all images below a folder, after ``path``.

    Links to folders are followed, but for those that lead back to where one came from, and below a class folder each folder is
    taken once: a few links could make more paths than there are bytes. What systems hide is left out. A link that leads nowhere is
    taken for an image if its name is one's: it is to be found and told, not to be missed.

    Args:
        above: the folders that one came through, as the system numbers them.
        seen: those below the same class folder that were looked into; None: this one is above.
    """
    depth = len(above)
    if depth > DEEPEST:
        raise UserError(f"{folder}: more than {DEEPEST} folders deep; the layout is domain/class/image")
    try:
        status = folder.stat()
        with os.scandir(folder) as listed:
            entries = [entry for entry in listed if not entry.name.startswith(".") and entry.name != "__MACOSX"]
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed: {error.strerror}") from None
    here = (status.st_dev, status.st_ino)
    if here in above or (seen is not None and here in seen):
        return
    seen = {here} if seen is None and depth == CLASS_DEPTH else seen
    if seen is not None:
        seen.add(here)
    for entry in sorted(entries, key=lambda entry: entry.name):
        if Path(entry.path).is_dir():
            yield from _images_below(folder / entry.name, f"{path}{entry.name}/", (*above, here), seen)
        elif PurePosixPath(entry.name).suffix.lower() in SUFFIXES and (entry.is_symlink() or entry.is_file()):
            yield f"{path}{entry.name}"


def _listing_of_table(table: Path) -> Listing:
    header, rows = _rows_of_table(table)
    absent = [name for name in COLUMNS if name not in header]
    if absent:
        raise UserError(
            f"{table}: has no column {', '.join(absent)}; its first line is {','.join(header)[:200]!r}, "
            f"it must name {', '.join(COLUMNS)}, separated by commas"
        )
    if not rows:
        raise UserError(f"{table}: holds no rows below its first line")
    columns: dict[str, list[str]] = {name: [] for name in (*COLUMNS, *(["split"] if "split" in header else []))}
    for line, fields in rows.items():
        if any(fields[len(header) :]):
            raise UserError(
                f"{table}: line {line}: has {len(fields)} fields, the first line {len(header)}: put quotes round commas"
            )
        for name, values in columns.items():
            place = header.index(name)
            if place >= len(fields) or not fields[place]:
                raise UserError(f"{table}: line {line}: its {name} is empty")
            text, longest = fields[place], LONGEST_PATH if name == "path" else LONGEST_NAME
            if len(text) > longest or _CONTROL.search(text):
                why = f"is longer than {longest} characters" if len(text) > longest else "holds a line break or control character"
                raise UserError(f"{table}: line {line}: its {name} {why}: mend the quotes of that row")
            values.append(text)
    lines = list(rows)
    paths = [str(PurePosixPath(path)) for path in columns["path"]]
    first: dict[str, int] = {}
    for path, line in zip(paths, lines, strict=True):
        if first.setdefault(path, line) != line:
            raise UserError(f"{table}: line {line}: {path} is in line {first[path]} already: list every image once")
    splits = _known_splits(table, columns["split"], lines) if "split" in columns else []
    return Listing(table, table.parent, paths, columns["label"], columns["domain"], splits, lines)


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def _rows_of_table(table: Path) -> tuple[list[str], dict[int, list[str]]]:
    """The column names in lower case, and the fields of each row that is not blank, by its line in the file."""
    line = 0
    rows: dict[int, list[str]] = {}
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(_short_lines(file), strict=True, skipinitialspace=True)
            for fields in reader:
                line, texts = reader.line_num, [text.strip() for text in fields]
                if any(texts):
                    rows[line] = texts
    except UnicodeDecodeError:
        raise UserError(f"{table}: not UTF-8 after line {line}: save it as CSV UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{table}: after line {line}: {error}: mend the quotes of that row") from None
    except OSError as error:
        raise UserError(f"{table}: cannot be read: {error.strerror}") from None
    if not rows:
        raise UserError(f"{table}: empty; it needs a first line with the columns {','.join(COLUMNS)}")
    header = rows.pop(next(iter(rows)))
    return [name.lower() for name in header], rows


def _short_lines(file: TextIO) -> Iterator[str]:
    while line := file.readline(LONGEST_LINE + 1):
        if len(line) > LONGEST_LINE:
            raise csv.Error(f"a line of more than {LONGEST_LINE} characters")
        yield line


def _known_splits(table: Path, words: list[str], lines: list[int]) -> list[str]:
    splits = []
    for word, line in zip(words, lines, strict=True):
        if word.lower() not in SPLIT_WORDS:
            raise UserError(f"{table}: line {line}: the split {word!r} is unknown; known: {', '.join(SPLIT_WORDS)}")
        splits.append(SPLIT_WORDS[word.lower()])
    return splits


def _roles(listing: Listing, *, target_domains: Sequence[str], validation_domains: Sequence[str]) -> list[str]:
    """The split of each image; validation images are not held out yet."""
    if listing.splits:
        for field, names in (("target_domains", target_domains), ("validation_domains", validation_domains)):
            if names:
                raise UserError(
                    f"data.{field}: {listing.where} has a column split, which decides: leave it empty, or drop the column"
                )
        for needed in ("source", "target"):
            if needed not in listing.splits:
                words = " or ".join(word for word, split in SPLIT_WORDS.items() if split == needed)
                raise UserError(f"{listing.where}: no row has {words} in its column split, it needs some")
        return listing.splits

    known = listing.domain_names
    if not target_domains:
        raise UserError(
            f"data.target_domains: name at least one of the domains to be tested on; {listing.where} holds {_some(known)}"
        )
    for field, names in (("target_domains", target_domains), ("validation_domains", validation_domains)):
        for name in names:
            if name not in known:
                raise UserError(f"data.{field}: {name!r} is no domain of {listing.where}; {_meant(name, listing, known)}")
    for name in validation_domains:
        if name in target_domains:
            raise UserError(f"data.validation_domains: {name!r} is a target domain too: a domain to choose on cannot be tested on")
    role_of = {**dict.fromkeys(validation_domains, "validation"), **dict.fromkeys(target_domains, "target")}
    if len(role_of) == len(known):
        raise UserError(f"data.target_domains: no domain of {listing.where} is left to learn from; it holds {_some(known)}")
    return [role_of.get(domain, "source") for domain in listing.domains]


def _meant(name: str, listing: Listing, known: Sequence[str]) -> str:
    if name in listing.labels and not listing.lines:
        return f"it is a folder one level deeper: perhaps --data_dir is to be {listing.where / known[0]}"
    near = difflib.get_close_matches(name, known, n=1)
    return f"{f'did you mean {near[0]!r}? ' if near else ''}it holds {_some(known)}"


def _refuse_shared_domains(listing: Listing, roles: Sequence[str]) -> None:
    tested = {domain for domain, role in zip(listing.domains, roles, strict=True) if role == "target"}
    for row, (domain, role) in enumerate(zip(listing.domains, roles, strict=True)):
        if role != "target" and domain in tested:
            raise UserError(
                f"{listing.where}: line {listing.lines[row]}: the domain {domain!r} has {role} rows and target ones: "
                "target domains must be unseen"
            )


def _classes(listing: Listing) -> tuple[Tensor, list[str]]:
    """Class numbers ``[n]`` int64, and the names of all classes, whichever domains have them."""
    names = _sorted(listing.labels)
    number_of = {name: number for number, name in enumerate(names)}
    return torch.tensor([number_of[label] for label in listing.labels]), names


def _values(listing: Listing) -> tuple[Tensor, list[str]]:
    """Labels as they are, ``[n]`` float32, and no names."""
    values = []
    for text, line in zip(listing.labels, listing.lines, strict=True):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not abs(value) <= torch.finfo(torch.float32).max:
            raise UserError(
                f"{listing.where}: line {line}: the label {text!r} is not a number: mend it, or use data.labels=classes"
            )
        values.append(value)
    return torch.tensor(values, dtype=torch.float32), []


def _unreadable(listing: Listing, transform: ImageTransform, *, skip: bool, known: Sequence[str] | None, workers: int) -> list[str]:
    """Images to leave out; one that a table lists and that is not there is an error, unless leaving out was asked for."""
    if skip:
        return list(known) if known is not None else unreadable(listing.root, listing.paths, transform, workers=workers)
    absent = missing(listing.root, listing.paths) if listing.lines else []
    if absent:
        line, path = listing.lines[absent[0]], listing.root / listing.paths[absent[0]]
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        way = "data.skip_unreadable=true leaves such images out"
        raise UserError(f"{listing.where}: line {line}: {path} is not there{more}; {way}")
    return []


def _rows(listing: Listing, roles: Sequence[str], bad: Sequence[str], *, fraction: float, seed: int) -> dict[str, list[int]]:
    """Image numbers of each split, ascending."""
    left_out = set(bad)
    usable = kept(len(roles), [row for row, path in enumerate(listing.paths) if path in left_out]).tolist()
    rows = {split: [row for row in usable if roles[row] == split] for split in ("source", "validation", "target")}
    if "validation" not in roles:
        held_out = _held_out(listing.domains, rows["source"], fraction=fraction, seed=seed)
        rows["validation"] = sorted(held_out)
        rows["source"] = [row for row in rows["source"] if row not in held_out]
    for split, chosen in rows.items():
        if not chosen:
            why = f" once the {len(bad)} that cannot be read are left out" if bad else ""
            raise UserError(f"{listing.where}: the {split} split has no image{why}: add some, or share out the domains otherwise")
    return rows


def _held_out(domains: Sequence[str], source: Sequence[int], *, fraction: float, seed: int) -> set[int]:
    """Source images to validate on: of every domain the same part, though at least one, and not all."""
    members: dict[str, list[int]] = {}
    for row in source:
        members.setdefault(domains[row], []).append(row)
    held_out: set[int] = set()
    for domain, rows in members.items():
        count = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
        order = torch.randperm(len(rows), generator=generator(seed, "validation", domain))
        held_out.update(rows[place] for place in order[:count].tolist())
    return held_out


def _check_labels(listing: Listing, rows: dict[str, list[int]], labels: Tensor, class_names: Sequence[str]) -> None:
    learned = labels[rows["source"]].unique()
    if len(learned) < 2:
        which = f"of the class {class_names[int(learned)]!r}" if class_names else f"labelled {float(learned)}"
        raise UserError(f"{listing.where}: all source images are {which}: there is nothing to tell apart")
    tested = labels[rows["target"]].unique()
    if class_names and not torch.isin(tested, learned).any():
        theirs, ours = (_some([class_names[label] for label in found.tolist()]) for found in (tested, learned))
        raise UserError(f"{listing.where}: the target domains share no class with the source domains: {theirs}; and {ours}")


def _fingerprint(listing: Listing, rows: dict[str, list[int]], transform: ImageTransform, augmentation: Augmentation) -> str:
    """Sizes of the files stand for their content: to read all of them would take as long as an epoch."""
    digest = hashlib.sha256(repr((transform, augmentation)).encode())
    for split, chosen in rows.items():
        for row in chosen:
            path = listing.paths[row]
            facts = (split, path, _size(listing.root / path), listing.labels[row], listing.domains[row])
            digest.update(repr(facts).encode())
    return digest.hexdigest()


def _size(path: Path) -> int:
    """In bytes; -1 where there is no such file."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _sorted(names: Iterable[str]) -> list[str]:
    """Each once, as people sort them: 2 comes before 10."""

    def key(name: str) -> tuple[list[tuple[int, str]], str]:
        parts = re.split(r"(\d+)", name)  # text and numbers by turns
        return [(int(part), "") if part.isdecimal() else (0, part) for part in parts], name

    return sorted(set(names), key=key)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED_AT_MOST} others" if len(names) > NAMED_AT_MOST else ""
    return ", ".join(names[:NAMED_AT_MOST]) + more
