"""The five WILDS data sets of the paper, by the stock ``wilds`` package: its files, splits and metrics.

What differs between them is one row of ``KINDS``. Source of the choices: Zhong et al. 2022 and its public code; Koh et al.,
*WILDS*, ICML 2021.
"""

import contextlib
import hashlib
import io
import math
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dmoe.console import say
from dmoe.data.base import DomainDataset, DomainSplit
from dmoe.data.decoded import DecodedImages, Keeping
from dmoe.data.files import ImageFiles, kept, missing, unreadable
from dmoe.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Augmentation, ImageTransform
from dmoe.data.wilds_import import fractional_seconds, wilds
from dmoe.errors import UserError
from dmoe.tasks import Task, TaskKind

SPLITS = {"source": "train", "validation": "val", "target": "test", "id_validation": "id_val", "id_target": "id_test"}
"""Our names and those of the stock package. The last two hold other images of the source domains; some data sets lack them."""

NEEDED_SPLITS = ("source", "validation", "target")


@dataclass(frozen=True)
class Kind:
    """What sets one WILDS data set apart.

    Attributes:
        stock_name: what the stock package calls it.
        group_field: metadata column by which images are given to experts.
        domain_fields: metadata columns that together make the domain of an episode, and of a target.
        size: edge of an image in pixels.
        normalisation: ``imagenet``; ``image``: each on its own; ``none``.
        paths: the files of all images, below the data set's folder.
        layout: of that folder, for people who copy it by hand.
        reported: keys of the stock package's metrics, the first one to select by, each with its usual name.
    """

    stock_name: str
    task: TaskKind
    group_field: str
    domain_fields: Sequence[str]
    size: int
    paths: Callable[[Any], list[str]]
    layout: str
    reported: Mapping[str, str]
    metadata: str = "metadata.csv"
    channels: int = 3
    normalisation: Literal["imagenet", "image", "none"] = "imagenet"
    augmentation: Augmentation = "none"
    class_names: Callable[[Any], list[str]] = field(default=lambda stock: [str(number) for number in range(stock.n_classes)])


def _iwildcam_classes(stock: Any) -> list[str]:
    path = Path(stock.data_dir) / "categories.csv"
    if not path.is_file():
        return [str(number) for number in range(stock.n_classes)]
    import pandas

    try:
        table = pandas.read_csv(path)
        names = {int(y): str(name) for y, name in zip(table["y"], table["name"], strict=True)}
    except (OSError, ValueError, KeyError, OverflowError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}: bring back that of the release") from None
    return [names.get(number, str(number)) for number in range(stock.n_classes)]


def _fmow_classes(stock: Any) -> list[str]:
    return [name for name, _ in sorted(stock.category_to_idx.items(), key=lambda item: item[1])]


KINDS = {
    "iwildcam": Kind(
        stock_name="iwildcam",
        task="multiclass",
        group_field="location",
        domain_fields=("location",),
        size=448,
        paths=lambda stock: [f"train/{name}" for name in stock._input_array],
        layout="metadata.csv, train/*.jpg",
        reported={"F1-macro_all": "macro F1", "acc_avg": "accuracy"},
        class_names=_iwildcam_classes,
    ),
    "camelyon": Kind(
        stock_name="camelyon17",
        task="binary",
        group_field="slide",
        domain_fields=("slide",),
        size=96,
        paths=lambda stock: list(stock._input_array),
        layout="metadata.csv, patches/patient_*/*.png",
        reported={"acc_avg": "accuracy"},
        class_names=lambda stock: ["normal", "tumor"],
    ),
    "rxrx1": Kind(
        stock_name="rxrx1",
        task="multiclass",
        group_field="experiment",
        domain_fields=("experiment",),
        size=256,
        normalisation="image",
        augmentation="turns",
        paths=lambda stock: list(stock._input_array),
        layout="metadata.csv, images/EXPERIMENT/Plate*/*.png",
        reported={"acc_avg": "accuracy"},
    ),
    "fmow": Kind(
        stock_name="fmow",
        task="multiclass",
        group_field="year",
        domain_fields=("region", "year"),
        size=224,
        paths=lambda stock: [f"images/rgb_img_{number}.png" for number in stock.full_idxs],
        layout="rgb_metadata.csv, country_code_mapping.csv, images/rgb_img_*.png",
        reported={"acc_worst_region": "worst-region accuracy", "acc_avg": "accuracy"},
        metadata="rgb_metadata.csv",
        class_names=_fmow_classes,
    ),
    "poverty": Kind(
        stock_name="poverty",
        task="regression",
        group_field="country",
        domain_fields=("country",),
        size=224,
        channels=8,
        normalisation="none",
        paths=lambda stock: [f"images/landsat_poverty_img_{number}.npz" for number in range(len(stock))],
        layout="dhs_metadata.csv, images/landsat_poverty_img_*.npz",
        reported={"r_wg": "worst-group r", "r_all": "r"},
        metadata="dhs_metadata.csv",
        class_names=lambda stock: [],
    ),
}


def load(
    name: str,
    *,
    root: Path,
    fold: Literal["A", "B", "C", "D", "E"] = "A",
    image_size: int | None = None,
    skip_unreadable: bool = False,
    known_unreadable: Sequence[str] | None = None,
    workers: int = 0,
    download: bool = True,
    keeping: Keeping | None = None,
) -> DomainDataset:
    """Open a WILDS data set, or download it first where it is not there.

    Args:
        root: the folder of the stock layout, which holds for example ``iwildcam_v2.0``.
        fold: of poverty's countries; the others have one split.
        image_size: another edge than the data set's own, in pixels.
        skip_unreadable: read every image once, and leave out those that cannot be read.
        known_unreadable: those that an earlier reading found, in place of another one.
        workers: processes to read images with.
        download: fetch what is not there; otherwise say what would be fetched, and end.
        keeping: of decoded images; None: they are decoded each time.

    Raises:
        UserError: the files are missing and cannot be downloaded, are of another version, or do not fit the stock package.
    """
    kind = KINDS[name]
    stock = _open_stock(name, kind, root, {"fold": fold} if name == "poverty" else {}, download=download)
    folder = Path(stock.data_dir)
    size = image_size or kind.size
    transform = ImageTransform((kind.channels, size, size), per_image=kind.normalisation == "image")
    if kind.normalisation == "imagenet":
        transform = replace(transform, mean=IMAGENET_MEAN, std=IMAGENET_STD)

    paths = kind.paths(stock)
    bad = _unreadable(folder, paths, transform, skip=skip_unreadable, known=known_unreadable, workers=workers)
    numbers = {path: number for number, path in enumerate(paths)} if bad else {}
    usable = kept(len(paths), [numbers[path] for path in bad if path in numbers])

    split_of = torch.from_numpy(np.asarray(stock.split_array, dtype=np.int64))
    number_of = stock.split_dict
    rows = {ours: usable[split_of[usable] == number_of[name]] for ours, name in SPLITS.items() if name in number_of}
    for ours in NEEDED_SPLITS:
        if not len(rows[ours]):
            where, way = folder / kind.metadata, "bring back that of the release"
            raise UserError(f"{where}: the {SPLITS[ours]} split holds no images, and so no domains: {way}")
    domains, names = _domains(stock, kind.domain_fields)
    group_domains, group_names = _domains(stock, [kind.group_field])
    labels = stock.y_array.flatten()
    task = Task(kind.task, num_outputs=int(stock.n_classes) if kind.task == "multiclass" else 1)
    decoded = DecodedImages(keeping, root=folder, paths=paths, transform=transform) if keeping is not None else None
    splits: dict[str, DomainSplit] = {
        ours: ImageFiles(
            root=folder,
            paths=[paths[row] for row in chosen.tolist()],
            labels=labels[chosen],
            domains=domains[chosen],
            group_domains=group_domains[chosen],
            group_names=group_names,
            domain_names=names,
            transform=transform,
            augmentation=kind.augmentation if ours == "source" else "none",
            decoded=decoded,
            rows=chosen.tolist(),
        )
        for ours, chosen in rows.items()
        if len(chosen)
    }
    return DomainDataset(
        name=name,
        splits=splits,
        task=task,
        transform=transform,
        class_names=kind.class_names(stock),
        fingerprint=_fingerprint(folder, kind, stock.version, fold if name == "poverty" else "", transform, bad),
        official_metrics=_official_metrics(stock, rows, kind),
        selection_metric=next(iter(kind.reported)),
        reported=kind.reported,
        official_name=kind.stock_name,
        official_splits=SPLITS,
        replicate=f"fold:{fold}" if name == "poverty" else "",
        in_memory=False,
        unreadable=bad,
        decoded=decoded,
    )


def _open_stock(name: str, kind: Kind, root: Path, choices: Mapping[str, Any], *, download: bool) -> Any:
    try:
        package = wilds()
        versions = _stock_class(kind.stock_name)._versions_dict
    except ImportError as error:
        raise UserError(f"{name}: the package wilds cannot be imported ({error}): pip install wilds") from None
    version = max(versions, key=lambda text: [int(part) for part in text.split(".")])
    folder = root / f"{kind.stock_name}_v{version}"
    release = folder / f"RELEASE_v{version}.txt"
    way = f"the stock layout is {folder}/{{{release.name}, {kind.layout}}}"
    said = io.StringIO()
    downloads = not release.is_file()
    if downloads:
        others = sorted(path.name for path in root.glob(f"{kind.stock_name}_v*") if path.name != folder.name)
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder}: not a whole copy of {kind.stock_name} {version}, {release.name} is missing: {way}")
        if others:
            raise UserError(f"{root}: holds {', '.join(others)}, but version {version} is needed: {way}")
        url, gigabytes = versions[version]["download_url"], versions[version]["compressed_size"] / 1e9
        if not download:
            raise UserError(f"{name}: not found in {root}; a run fetches {gigabytes:.0f} GB from {url} into {folder}, or {way}")
        say(f"{name}: not found in {root}; downloading {gigabytes:.0f} GB from {url} into {folder} (another place: --data_dir)")
    try:
        with contextlib.redirect_stdout(said), fractional_seconds(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return package.get_dataset(dataset=kind.stock_name, root_dir=str(root), download=True, **choices)
    except Exception as error:  # the stock package checks little: whatever is wrong with the files comes as any error
        if not release.is_file():
            why = said.getvalue().partition("Exception:")[2].strip() or str(error)
            raise UserError(f"{name}: could not be downloaded ({' '.join(why.split())[:200]}); copy it by hand: {way}") from None
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: the stock wilds package cannot read it: {type(error).__name__}: {why}; {way}") from None
    finally:
        if downloads and not release.is_file():  # part of an archive would be taken for all of it
            shutil.rmtree(folder, ignore_errors=True)


def _stock_class(stock_name: str) -> Any:
    import importlib

    classes = {"camelyon17": "Camelyon17Dataset", "iwildcam": "IWildCamDataset", "rxrx1": "RxRx1Dataset"}
    classes |= {"fmow": "FMoWDataset", "poverty": "PovertyMapDataset"}
    return getattr(importlib.import_module(f"wilds.datasets.{stock_name}_dataset"), classes[stock_name])


def _unreadable(
    folder: Path, paths: Sequence[str], transform: ImageTransform, *, skip: bool, known: Sequence[str] | None, workers: int
) -> list[str]:
    """Images to leave out; a missing one is an error, unless leaving out was asked for."""
    if skip and known is not None:
        return list(known)
    absent = missing(folder, paths)
    if absent and not skip:
        more = f", and {len(absent) - 1} others" if len(absent) > 1 else ""
        way = "bring them back, or let data.skip_unreadable=true leave them out"
        raise UserError(f"{folder / paths[absent[0]]}: the metadata has a row for it, but there is no such image{more}: {way}")
    return unreadable(folder, paths, transform, workers=workers) if skip else []


def _domains(stock: Any, fields: Sequence[str]) -> tuple[Tensor, dict[int, str]]:
    """Domain numbers of all images, and their names; several columns are combined as the stock package's groupers do."""
    number, factor = torch.zeros(len(stock), dtype=torch.int64), 1
    columns = [stock.metadata_array[:, stock.metadata_fields.index(name)].long() for name in fields]
    for column in columns:
        number += factor * column
        factor *= int(column.max()) + 1
    known = stock.metadata_map or {}

    def name_of(field_name: str, value: int) -> str:
        return str(known[field_name][value]) if field_name in known else f"{field_name} {value}"

    names = {}
    first_rows = np.unique(number.numpy(), return_index=True)[1]
    for row in first_rows.tolist():
        parts = [name_of(name, int(column[row])) for name, column in zip(fields, columns, strict=True)]
        names[int(number[row])] = ", ".join(parts)
    return number, names


def _official_metrics(stock: Any, rows: Mapping[str, Tensor], kind: Kind) -> Callable[[str, Tensor, Tensor], dict[str, float]]:
    def metrics(split: str, index: Tensor, predictions: Tensor) -> dict[str, float]:
        chosen = rows[split][index]
        labels = stock.y_array[chosen]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # r of equal values is not a number
            try:
                found, _ = stock.eval(predictions.view_as(labels), labels, stock.metadata_array[chosen])
            except (RuntimeError, IndexError):  # r of one image, or the least r where no group has any
                if kind.task != "regression":
                    raise
                return dict.fromkeys(kind.reported, math.nan)
        return {key: float(value) for key, value in found.items()}

    return metrics


def _fingerprint(folder: Path, kind: Kind, version: str, fold: str, transform: ImageTransform, bad: Sequence[str]) -> str:
    """The releases do not change, so their metadata stand for the pixels."""
    digest = hashlib.sha256()
    for table in sorted(folder.glob("*.csv")):
        digest.update(table.read_bytes())
    digest.update(repr((kind.stock_name, version, fold, transform, sorted(bad))).encode())
    return digest.hexdigest()
