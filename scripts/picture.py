"""The README's picture: what a finished run on the embedded digits sees and says, before and after adapting.

python scripts/picture.py runs/digits docs/digits.png
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

    from dmoe import Model
    from dmoe.data.base import DomainSplit
    from dmoe.models.student import Student

SHOWN_DOMAINS = (90, 271, 330, 451, 631)
SHOWN_IMAGES = 12
RIGHT, WRONG = "#1a7f5a", "#c0392b"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    from dmoe.command_line import run_main

    run_main(lambda: draw(options.run_dir, options.picture))


def draw(run_dir: Path, picture: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    import dmoe
    from dmoe.artifacts import load_tensors, under_prefix
    from dmoe.backbones import build_backbone
    from dmoe.data.registry import load_dataset
    from dmoe.models.student import Student

    model = dmoe.load(run_dir)
    dataset = load_dataset(model.config.dataset, model.config.data)
    split, backbone = dataset.splits["target"], model.config.student_backbone
    network = build_backbone(backbone, image_shape=dataset.image_shape, num_outputs=dataset.task.num_outputs)
    network.load_state_dict(under_prefix("model", load_tensors(run_dir / "student" / "weights.safetensors")[0]))
    erm = Student(features=network.features, head=network.head, task=dataset.task)

    figure = plt.figure(figsize=(13, 1.25 * len(SHOWN_DOMAINS) + 0.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2.3, 1))
    show_images(left, model, erm, split)
    before, after = show_domains(right, model, erm, split)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110, facecolor="white")
    print(f"{picture}: before mean {before:.1f}, after mean {after:.1f}")


def show_images(panel: "SubFigure", model: "Model", erm: "Student", split: "DomainSplit") -> None:
    """Some images of some unseen scanners, each with the prediction before and after."""
    grid = panel.subplots(len(SHOWN_DOMAINS), SHOWN_IMAGES + 1, gridspec_kw={"width_ratios": [2.2] + [1] * SHOWN_IMAGES})
    for row, domain in enumerate(SHOWN_DOMAINS):
        members = split.members[domain]
        images, labels = split.images(members), split.labels[members]
        adapted = model.adapt(images[: model.config.support_size]).logits(images).argmax(1)
        plain = erm.logits(images).argmax(1)
        changed = ((adapted == labels) != (plain == labels)).nonzero().flatten().tolist()
        same = [i for i in range(len(members)) if i not in set(changed)]
        shown = sorted(changed[: SHOWN_IMAGES // 2] + same[: SHOWN_IMAGES - min(len(changed), SHOWN_IMAGES // 2)])
        grid[row, 0].axis("off")
        name = split.domain_names[domain].replace(", ", "\n")
        grid[row, 0].text(1, 0.5, f"{name}\nsays: before → after", ha="right", va="center", fontsize=8.5)
        for column, i in enumerate(shown, start=1):
            axis = grid[row, column]
            axis.imshow(images[i, 0], cmap="gray_r", vmin=-0.3, vmax=1.2, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_color("#bbbbbb")
            for text, guess, place in ((f"{plain[i]}", plain[i], 0.16), (f"{adapted[i]}", adapted[i], 0.84)):
                colour = RIGHT if guess == labels[i] else WRONG
                axis.text(place, 1.03, text, transform=axis.transAxes, ha="center", va="bottom", fontsize=9, color=colour)
            axis.text(0.5, 1.03, "→", transform=axis.transAxes, ha="center", va="bottom", fontsize=8, color="#888888")


def show_domains(panel: "SubFigure", model: "Model", erm: "Student", split: "DomainSplit") -> tuple[float, float]:
    """Accuracy on every unseen scanner; returns the means before and after, in percent."""
    axis = panel.subplots()
    names, before, after = [], [], []
    for domain, members in split.members.items():
        images, labels = split.images(members), split.labels[members]
        student = model.adapt(images[: model.config.support_size])
        names.append(split.domain_names[domain].replace(" degrees", "°").replace(", mirrored", " m"))
        before.append(100 * (erm.logits(images).argmax(1) == labels).double().mean().item())
        after.append(100 * (student.logits(images).argmax(1) == labels).double().mean().item())
    places = range(len(names))
    axis.hlines(places, before, after, color="#cccccc", zorder=1)
    axis.scatter(before, places, color=WRONG, s=22, label="ERM student", zorder=2)
    axis.scatter(after, places, color=RIGHT, s=22, label="adapted", zorder=2)
    axis.set_yticks(places, names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("accuracy on unseen scanners (m: mirrored), %")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.09), ncols=2, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return sum(before) / len(before), sum(after) / len(after)


if __name__ == "__main__":
    main()
