"""A small tree of pictures OUT/domain/class/image.png to try --dataset folders on, without a download.

    python scripts/make_folder_sample.py /tmp/pictures

The pictures are the embedded digits as ten of their scanners see them, 14x14 grey PNG files: a domain is an angle that the sheet
is turned by. Two of them are there to be tested on: 15 degrees from the nearest others, and what they show are other digits.
Nothing measured on them says anything about photographs.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed

from dmoe.command_line import run_main
from dmoe.data import digits
from dmoe.data.base import DomainSplit
from dmoe.data.digits import Scanner
from dmoe.errors import UserError

SCANNERS = {
    "source": [Scanner(angle, False) for angle in (30, 60, 120, 150, 210, 240, 300, 330)],
    "target": [Scanner(45, False), Scanner(225, False)],
}
MOST_PER_CLASS = digits.DIGITS_PER_CLASS["target"]
"""A scanner of the target split sees no more of a class."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to give as --data_dir later; new or empty")
    parser.add_argument("--images_per_class", type=int, default=100, metavar="N", help="of every domain (default: 100)")
    options = parser.parse_args()
    if not 1 <= options.images_per_class <= MOST_PER_CLASS:
        raise UserError(f"--images_per_class: must be from 1 to {MOST_PER_CLASS}, got {options.images_per_class}")
    count = write_sample(options.out, images_per_class=options.images_per_class)
    targets = ",".join(folder_name(scanner) for scanner in SCANNERS["target"])
    command = "python run.py --dataset folders --config configs/small_pictures.yaml --run_dir runs/small_pictures"
    print(f"{options.out}: {count:,} pictures of {sum(map(len, SCANNERS.values()))} domains and 10 classes; next:")
    print(f"{command} --data_dir {shlex.quote(str(options.out))} 'data.target_domains=[{targets}]'")


def write_sample(out: Path, *, images_per_class: int) -> int:
    """Write all pictures; returns how many.

    Raises:
        UserError: there is something in the folder already, or it cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already and is not an empty folder: name another one, or delete it")
    dataset, count = digits.load(), 0
    try:
        for name, scanners in SCANNERS.items():
            split = dataset.splits[name]
            for scanner in scanners:
                count += write_domain(out / folder_name(scanner), split, scanner, dataset.class_names, images_per_class)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from None
    return count


def write_domain(folder: Path, split: DomainSplit, scanner: Scanner, class_names: Sequence[str], images_per_class: int) -> int:
    """Write the first images of each class that a scanner sees; returns how many."""
    members = split.members[scanner.number]
    chosen = torch.cat([members[split.labels[members] == c][:images_per_class] for c in range(len(class_names))])
    for number, (label, image) in enumerate(zip(split.labels[chosen].tolist(), split.images(chosen), strict=True)):
        path = folder / class_names[label] / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(image).save(path)
    return len(chosen)


def folder_name(scanner: Scanner) -> str:
    return f"{scanner.angle:03d}_degrees"


def picture(image: Tensor) -> Image.Image:
    """An 8-bit grey picture of an image ``[1, H, W]``; noise beyond black and white is cut off."""
    return Image.fromarray((image[0].clamp(0, 1) * 255).round().to(torch.uint8).numpy())


if __name__ == "__main__":
    run_main(main)
