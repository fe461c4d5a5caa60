"""Which support batches finished runs call suspect: those of unseen domains, which should pass, and made-up ones, which should not.

    python scripts/suspects.py runs/digits

A row a kind of batch, a column a run: suspect batches of all. Batches have as many images as the ranges were learned from, unless
the row says otherwise. Validation domains are judged by ranges that were learned without them; target domains had no part in any.
Below, what watching costs in the first run.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from torch import Tensor

    from dmoe import Model
    from dmoe.data.base import DomainDataset

MADE_UP = 8
"""Batches of each kind that is drawn at random."""

CALLS = 50
"""Timed, of each way to adapt."""

Counts = dict[str, tuple[int, int]]
"""Suspect batches and all batches, by kind."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR")
    options = parser.parse_args()
    from dmoe.command_line import run_main

    run_main(lambda: tell(options.run_dirs))


def tell(folders: Sequence[Path]) -> None:
    print(table({folder.name: suspects(folder) for folder in folders}))
    plain, watched = cost(folders[0])
    print(f"\nCPU seconds of adapting in {folders[0]}: {plain:.4f}, watched {watched:.4f}, {watched / plain:.2f} times as much")


def cost(folder: Path) -> tuple[float, float]:
    """CPU seconds of adapting to a domain, and of doing so watched: medians of calls in turn."""
    import dmoe
    from dmoe.data.registry import load_dataset

    plain, watched = dmoe.load(folder), dmoe.load(folder)
    assert watched.ranges is not None
    plain.ranges = None
    split = load_dataset(plain.config.dataset, plain.config.data).splits["validation"]
    images = split.images(next(iter(split.members.values()))[: watched.ranges.images])
    seconds: dict[dmoe.Model, list[float]] = {plain: [], watched: []}
    for _ in range(CALLS):
        for model, taken in seconds.items():
            began = time.process_time()
            model.adapt(images)
            taken.append(time.process_time() - began)
    return statistics.median(seconds[plain]), statistics.median(seconds[watched])


def table(runs: Mapping[str, Counts]) -> str:
    kinds = dict.fromkeys(kind for counts in runs.values() for kind in counts)
    lines = ["| suspect batches | " + " | ".join(runs) + " |", "|---" * (len(runs) + 1) + "|"]
    for kind in kinds:
        cells = ["{} of {}".format(*counts[kind]) if kind in counts else "-" for counts in runs.values()]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def suspects(folder: Path) -> Counts:
    """Of one finished run."""
    from torch import Tensor

    import dmoe
    from dmoe.data.registry import load_dataset

    model = dmoe.load(folder)
    if model.ranges is None:
        raise dmoe.UserError(f"{folder}: it has no ranges of training episodes: python run.py --run_dir {folder} measures them")
    dataset = load_dataset(model.config.dataset, model.config.data)

    def suspect(images: Tensor) -> bool:
        assert model.ranges is not None
        return bool(model.ranges.judged(model.measure(images), images=len(images)).suspect)

    found: Counts = {"validation domains, each left out": left_out(folder, model, dataset)}
    kinds: dict[str, Callable[[], Sequence[Tensor]]] = {**honest(model, dataset), **made_up(model, dataset)}
    for kind, batches in kinds.items():
        verdicts = [suspect(images) for images in batches()]
        found[kind] = (sum(verdicts), len(verdicts))
    return found


def left_out(folder: Path, model: "Model", dataset: "DomainDataset") -> tuple[int, int]:
    """Batches of each validation domain, judged by what the source domains and the other validation domains tell."""
    from dmoe.artifacts import read_json
    from dmoe.diagnosis import Summary, learned_ranges, summaries
    from dmoe.model import RANGES
    from dmoe.watch_stage import batches_of

    assert model.ranges is not None
    size, split = model.ranges.images, dataset.splits["validation"]
    facts = read_json(folder / "diagnosis" / RANGES)["measured"]["source"]
    source = {name: Summary.from_facts(one) for name, one in facts.items()}
    episodes: dict[int, list[Mapping[str, float]]] = {}
    for domain, index in batches_of(split, size=size, key=(model.config.seed, "diagnosis", "validation")):
        episodes.setdefault(domain, []).append(model.measure(split.images(index)))
    verdicts = []
    for domain, batches in episodes.items():
        others = summaries({other: measured for other, measured in episodes.items() if other != domain})
        ranges = learned_ranges([source, others], images=size)
        verdicts += [ranges.judged(batch, images=size).suspect for batch in batches]
    return sum(verdicts), len(verdicts)


def honest(model: "Model", dataset: "DomainDataset") -> dict[str, Callable[[], Sequence["Tensor"]]]:
    """Batches of unseen domains."""
    import torch
    from torch import Tensor

    from dmoe.randomness import generator

    assert model.ranges is not None
    split, size = dataset.splits["target"], model.ranges.images

    def first(count: int) -> list[Tensor]:
        return [split.images(members[:count]) for members in split.members.values()]

    def every() -> list[Tensor]:
        shuffled = [
            members[torch.randperm(len(members), generator=generator("suspects", domain))]
            for domain, members in split.members.items()
        ]
        return [split.images(batch) for members in shuffled for batch in members.split(size) if len(batch) == size]

    fewer = {
        f"target domains, their first {count} images": lambda count=count: first(count)
        for count in (size // 2, size // 4, size // 8)
    }
    return {f"target domains, their first {size} images": lambda: first(size), "target domains, all batches": every, **fewer}


def made_up(model: "Model", dataset: "DomainDataset") -> dict[str, Callable[[], Sequence["Tensor"]]]:
    """Batches that nobody should adapt to."""
    import torch
    from PIL import Image
    from torch import Tensor

    from dmoe.randomness import generator

    assert model.ranges is not None
    split, size, shape = dataset.splits["target"], model.ranges.images, dataset.image_shape
    first = [split.images(members[:size]) for members in split.members.values()]
    mean, std = torch.cat(first).mean(), torch.cat(first).std()
    random = generator("suspects")

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=random)

    def one_class() -> list[Tensor]:
        found = []
        for members in split.members.values():
            for label in split.labels[members].unique():
                chosen = members[split.labels[members] == label][:size]
                found += [split.images(chosen)] if len(chosen) == size else []
        return found

    def patches(edge: int) -> list[Tensor]:
        """Of scikit-learn's two photographs."""
        from sklearn.datasets import load_sample_images

        photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
        found = []
        for number in range(MADE_UP):
            photograph, cut = photographs[number % len(photographs)], []
            for _ in range(size):
                left, top = (int(torch.randint(limit - edge + 1, (), generator=random)) for limit in photograph.size)
                cut.append(model.transform(photograph.crop((left, top, left + edge, top + edge))))
            found.append(torch.stack(cut))
        return found

    def other_digits() -> list[Tensor]:
        """Scikit-learn's own, 8x8, by another pen and another scanner."""
        from sklearn.datasets import load_digits

        pixels = torch.from_numpy(load_digits().images).float().mul(255 / 16).byte().numpy()
        found = []
        for _ in range(MADE_UP):
            chosen = torch.randperm(len(pixels), generator=random)[:size].tolist()
            found.append(torch.stack([model.transform(Image.fromarray(pixels[number])) for number in chosen]))
        return found

    def two_domains() -> list[Tensor]:
        return [
            torch.cat([ours[: size // 2], theirs[size // 2 :]]) for ours, theirs in zip(first, first[1:] + first[:1], strict=True)
        ]

    kinds: dict[str, Callable[[], Sequence[Tensor]]] = {
        "one image": lambda: [images[:1] for images in first],
        "one image, repeated": lambda: [images[:1].expand(size, -1, -1, -1) for images in first],
        "constant images, one grey": lambda: [
            torch.full((size, *shape), level.item()) for level in mean + std * torch.linspace(-2, 2, 8)
        ],
        "constant images, many greys": lambda: [(mean + std * normal(size, 1, 1, 1)).expand(size, *shape) for _ in range(MADE_UP)],
        "noise, as bright as the images": lambda: [mean + std * normal(size, *shape) for _ in range(MADE_UP)],
        "noise, fainter": lambda: [std / 2 * normal(size, *shape) for _ in range(MADE_UP)],
        "noise, stronger": lambda: [3 * std * normal(size, *shape) for _ in range(MADE_UP)],
        "negatives": lambda: [2 * mean - images for images in first],
    }
    if dataset.task.kind != "regression":
        kinds["one class only"] = one_class
    if not dataset.transform.takes_bands:
        edges = [edge for edge in (14, 56, 224) if edge >= shape[1]]
        kinds |= {f"patches of photographs, {edge} pixels wide": lambda edge=edge: patches(edge) for edge in edges}
        kinds["scikit-learn's digits"] = other_digits
    kinds["half of them from another domain"] = two_domains
    return kinds


if __name__ == "__main__":
    main()
