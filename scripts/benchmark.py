"""What it costs, side by side with the published way: one table, ratios taken in one run.

    python scripts/benchmark.py                               every row (about an hour on two cores)
    python scripts/benchmark.py meta_96 agreement             some rows
    python scripts/benchmark.py --json docs/performance.json --markdown docs/performance.md
    python scripts/benchmark.py --device cuda --precision bfloat16 meta_96 meta_224

Each row compares two ways of doing the same work. Each way runs in a process of its own, in turn, several times over, after a
step that warms up; told are medians and ranges of CPU seconds (on a GPU: of seconds by the clock), the wall time beside them, and
the peak memory above what the process held before its first step, as the operating system or the GPU's allocator counts it. The
third side of some rows is the bound: the passes that cannot be left out, by themselves. Waiting threads sleep (OMP_WAIT_POLICY),
on every side. --markdown fills the tables of a page from the rows of --json FILE, with those measured now in their places.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # before torch is imported: waiting threads would count as work

from dmoe.command_line import run_main
from dmoe.errors import UserError
from dmoe.meta.learner import Way
from scripts.benchmarks import agreement, bounds, demo, ours, page, published
from scripts.benchmarks import inputs as given
from scripts.benchmarks.inputs import Setting
from scripts.benchmarks.measuring import Criterion, Make, Place, in_turn, row, told


@dataclass(frozen=True)
class Comparison:
    """Sides that do the same work, and the rows that come of one measurement of them."""

    sides: Mapping[str, Make]
    criteria: Sequence[Criterion]
    repeats: int = 3


WHOLE, IN_FOURS = Way("double_backward"), Way("forward_over_reverse", 4)
AT_96, AT_224 = Setting("resnet50", 96, 24, 16, 10), Setting("resnet50", 224, 24, 16, 10)
PRETRAINING = Setting("resnet50", 224, 32, 1, 10)
STORE, STORE_BATCH = Setting("resnet50", 96, 256, 1, 4), 64
DEMO_SHARE = 0.02
LATENCY = {
    "small_conv": Setting("small_conv", 14, 64, 500, 6, channels=1),
    "resnet18": Setting("resnet18", 224, 32, 64, 3),
    "resnet50": Setting("resnet50", 224, 24, 64, 10),
}

COMPARISONS = [
    Comparison(
        {
            "ours": given.ours(ours.meta_step, AT_96, way=WHOLE),
            "baseline": given.published(published.meta_step, AT_96),
            "bound": given.bound(bounds.meta_passes, AT_96, way=WHOLE),
        },
        [
            Criterion("meta_96", "one meta-step, ResNet-50, N = 10, support 24, query 16, 96x96: published against ours", bar=1.4),
            Criterion(
                "meta_bound",
                "the same step of ours against its unavoidable passes alone",
                against="bound",
                bar=1.15,
                better="below",
            ),
        ],
    ),
    Comparison(
        {
            "ours": given.ours(ours.meta_step, AT_224, way=IN_FOURS),
            "baseline": given.published(published.meta_step, AT_224),
            "bound": given.bound(bounds.meta_passes, AT_224, way=IN_FOURS),
        },
        [
            Criterion("meta_224", "the meta-step at 224x224: published against ours", bar=2.0),
            Criterion("meta_224_memory", "peak memory of the same", unit="GB", bar=0.3, better="below"),
        ],
        repeats=1,
    ),
    Comparison(
        {
            name: given.ours(ours.meta_step, Setting("resnet18", 224, support, 16, 4), way=Way("forward_over_reverse", 8))
            for name, support in (("ours", 128), ("baseline", 16))
        },
        [
            Criterion(
                "support_memory",
                "peak memory of our meta-step, ResNet-18, 224x224, chunks of 8: support 128 (ours) against 16 (baseline)",
                unit="GB",
                bar=1.15,
                better="below",
            )
        ],
        repeats=1,
    ),
    Comparison(
        {
            "ours": given.ours(ours.aggregator_step, PRETRAINING),
            "baseline": given.published(published.aggregator_step, PRETRAINING),
        },
        [
            Criterion(
                "aggregator", "one step of aggregator pretraining, 10 ResNet-50, batch 32, 224x224: published against ours", bar=10
            )
        ],
        repeats=2,
    ),
    Comparison(
        {"ours": demo.ours(share=DEMO_SHARE), "baseline": demo.published(share=DEMO_SHARE)},
        [
            Criterion(
                "demo", f"{DEMO_SHARE:.0%} of the demo's aggregator pretraining and meta-training: published against ours", bar=1.5
            )
        ],
        repeats=2,
    ),
    Comparison(
        {
            "ours": given.ours(ours.token_store, STORE, batch_size=STORE_BATCH),
            "bound": given.bound(bounds.forward_passes, STORE, batch_size=STORE_BATCH),
        },
        [
            Criterion(
                "tokens",
                "token store of 256 images x 4 ResNet-50, 96x96, on disk, against the bare forward passes: images x experts",
                against="bound",
                unit="rate",
                bar=0.9,
                amount=STORE.support * STORE.experts,
            )
        ],
    ),
    Comparison(
        {
            "ours": given.ours(ours.adaptation, Setting("resnet50", 96, 24, 1, 4)),
            "bound": given.bound(bounds.adaptation_passes, Setting("resnet50", 96, 24, 1, 4)),
        },
        [
            Criterion(
                "adapt_bound",
                "adapting to 24 images, ResNet-50, N = 4, 96x96, against the experts' passes and one student gradient alone",
                against="bound",
                bar=1.15,
                better="below",
            )
        ],
    ),
    *(
        Comparison(
            {"ours": given.ours(make, setting)},
            [
                Criterion(
                    f"{kind}_{name}",
                    f"{name}, {setting.size}x{setting.size}: {what}",
                    against="",
                    unit=unit,
                    amount=setting.query,
                )
            ],
        )
        for name, setting in LATENCY.items()
        for kind, make, unit, what in (
            (
                "latency",
                ours.adaptation,
                "milliseconds",
                f"from {setting.support} images to an adapted student, N = {setting.experts}",
            ),
            ("predictions", ours.prediction, "rate by the clock", "images predicted by an adapted student"),
        )
    ),
    Comparison(
        {
            "ours": given.ours(ours.adaptations, LATENCY["small_conv"], domains=16, together=True),
            "baseline": given.ours(ours.adaptations, LATENCY["small_conv"], domains=16, together=False),
        },
        [Criterion("adapt_many", "16 domains of the demo's size adapted to: in one pass (ours) against one after the other")],
    ),
    Comparison(
        {
            "ours": given.ours(ours.meta_step, AT_96, way=WHOLE),
            "baseline": given.published(published.meta_step_by_higher, AT_96),
        },
        [Criterion("higher", "one meta-step as in meta_96, from stored tokens on both sides: the library higher against ours")],
    ),
]
ROWS = [criterion.name for comparison in COMPARISONS for criterion in comparison.criteria] + ["agreement"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; default: all, or none with --fill")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side, in turn")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast, on every side")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there; others that it holds are kept")
    parser.add_argument("--markdown", type=Path, metavar="PAGE", help="fill that page's tables from the rows")
    parser.add_argument("--fill", action="store_true", help="measure nothing: fill PAGE from the rows that FILE holds")
    options = parser.parse_args(arguments)
    for name in options.rows:
        if name not in ROWS:
            raise UserError(f"command line: unknown row {name}; known: {', '.join(ROWS)}")
    known = page.read_rows(options.json) if options.json and options.json.exists() else []
    if not options.fill:
        place = Place(options.device, options.threads, options.precision)
        print(
            f"{place.machine['name']}, {options.threads} threads, torch {place.machine['torch']}, {options.precision}", flush=True
        )
        for facts in measure(options.rows or ROWS, place, rounds=options.rounds):
            print(told(facts), flush=True)
            known = page.with_row(known, facts)
            if options.json:
                page.write_rows(options.json, known)
    if options.markdown:
        page.fill(options.markdown, known)


def measure(names: Sequence[str], place: Place, *, rounds: int) -> Iterable[dict[str, Any]]:
    """The rows of these names, and those that come of the same measurements, as they are found."""
    for comparison in COMPARISONS:
        if any(criterion.name in names for criterion in comparison.criteria):
            sides = in_turn(comparison.sides, rounds=rounds, repeats=comparison.repeats, place=place)
            yield from (row(criterion, sides, place) for criterion in comparison.criteria)
    if "agreement" in names:
        yield from agreement.rows(place)


if __name__ == "__main__":
    run_main(main)
