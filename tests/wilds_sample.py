"""Small synthetic WILDS data sets in the stock layout, each written once a session, when a test first asks for it."""

import shutil
from pathlib import Path

from scripts.make_wilds_sample import RELEASES, Options

CLASSES = 6
"""Of iwildcam and rxrx1."""

CONTENTS = {
    "iwildcam": Options(images_per_domain=8, classes=CLASSES, seed=0, size=96),
    "camelyon": Options(images_per_domain=8, classes=CLASSES, seed=0, size=96),
    "rxrx1": Options(images_per_domain=8, classes=CLASSES, seed=0, size=96),
    "fmow": Options(images_per_domain=4, classes=CLASSES, seed=0, size=96),
    "poverty": Options(images_per_domain=4, classes=CLASSES, seed=0, size=96),  # 3,700 images all the same
}


class WildsRoot:
    """A folder to give as ``data.dir``, which fills up with what is asked for. Nobody may change what is in it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, *names: str) -> Path:
        """The folder, with at least these data sets of ours in it."""
        for name in names:
            if not RELEASES[name].folder(self._path).exists():
                RELEASES[name].make(self._path, CONTENTS[name])
        return self._path

    def folder(self, name: str) -> Path:
        """The data set's own folder, for example ``.../iwildcam_v2.0``."""
        return RELEASES[name].folder(self(name))

    def copy(self, name: str, to: Path) -> Path:
        """Another root with this data set alone, to damage; returns the data set's folder there.

        Tables and notes are copies. Images are links: replace them, but do not write into them.
        """
        folder = RELEASES[name].folder(to)
        shutil.copytree(self.folder(name), folder, copy_function=_copy_or_link)
        return folder


def _copy_or_link(source: str, target: str) -> None:
    if source.endswith((".csv", ".txt")):
        shutil.copy(source, target)
    else:
        Path(target).hardlink_to(source)
