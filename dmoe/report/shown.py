"""What a page shows beside numbers: ``evidence.json``, and what lies in run folders. It is checked before it is shown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmoe.errors import UserError
from dmoe.report.checked import small_png, sure
from dmoe.report.files import name_of, object_in, text_of
from dmoe.report.rows import number_of
from dmoe.report.selection import Selection, selection_from

MOST_EXAMPLES = 48
MOST_CELLS = 40_000
MOST_STAGES = 64
MOST_POINTS = 2_000

Curve = Sequence[tuple[float, float]]
"""(steps done, validation score)."""


@dataclass(frozen=True)
class Attention:
    """How much the aggregator makes of each expert, by domain.

    Attributes:
        experts: N names, of what they learned from.
        weights: ``[domains, N]``.
    """

    experts: Sequence[str]
    domains: Sequence[str]
    weights: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Example:
    """An image of a target domain.

    Attributes:
        image: a PNG in base64.
        before, after: what was predicted by the plain student, and by the adapted one.
    """

    domain: str
    image: str
    truth: str
    before: str
    after: str


@dataclass(frozen=True)
class Evidence:
    """All of it; what is not known is None or empty."""

    attention: Attention | None = None
    examples: Sequence[Example] = ()
    curves: Mapping[str, Curve] | None = None
    selection: Selection | None = None


def read_evidence(path: Path) -> Evidence:
    """What ``evidence.json`` holds; nothing where there is none.

    Raises:
        UserError: it is damaged, or an image in it is no small PNG.
    """
    if not path.exists():
        return Evidence()
    facts = object_in(path, way="a comparison makes it")
    try:
        attention = _attention(facts["attention"]) if facts.get("attention") else None
        examples = [_example(one) for one in facts.get("examples") or []]
        if len(examples) > MOST_EXAMPLES:
            raise ValueError(f"{len(examples)} examples, expected {MOST_EXAMPLES} at most")
        curves = {name_of(stage): _curve(points) for stage, points in (facts.get("curves") or {}).items()}
        if len(curves) > MOST_STAGES:
            raise ValueError(f"curves of {len(curves)} stages, expected {MOST_STAGES} at most")
        selection = selection_from(facts["selection"]) if facts.get("selection") else None
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}): delete it; the page can do without") from None
    return Evidence(attention, examples, curves or None, selection)


def run_folders(folder: Path) -> list[Path]:
    """The run folders of a comparison by seed; a plain run is its own."""
    seeds = sorted((path for path in folder.glob("seed_*") if path.is_dir()), key=lambda path: (len(path.name), path.name))
    return seeds or [folder]


def curves_of(run: Path) -> dict[str, Curve]:
    """Validation scores by step of every stage of a run that was judged on the way, from the manifests.

    Raises:
        UserError: a manifest is damaged.
    """
    found: dict[str, Curve] = {}
    patterns = ("*/manifest.json", "experts/*/manifest.json", "compare/*/full/manifest.json")
    for path in sorted(path for pattern in patterns for path in run.glob(pattern))[:MOST_STAGES]:
        figures = object_in(path, way="the stage makes it").get("figures", {})
        try:
            curve = _curve(figures.get("scores") or [])
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{path}: damaged ({type(error).__name__}: {error}): delete {path.parent} to redo it") from None
        if curve:
            found[path.parent.relative_to(run).as_posix().removesuffix("/full")] = curve
    return found


def config_text(run: Path) -> str | None:
    """The configuration of a run as it was written; None where there is none. A link might lead to what is not to be shown."""
    path = run / "config.yaml"
    return text_of(path, way="run.py makes it") if path.exists() and not path.is_symlink() else None


def _attention(facts: Mapping[str, Any]) -> Attention:
    experts, domains = [name_of(one) for one in facts["experts"]], [name_of(one) for one in facts["domains"]]
    if not experts or not domains or len(experts) * len(domains) > MOST_CELLS:
        raise ValueError(f"attention of {len(domains)} domains to {len(experts)} experts")
    weights = [[sure(value) for value in row] for row in facts["weights"]]
    if len(weights) != len(domains) or any(len(row) != len(experts) for row in weights):
        raise ValueError("attention weights are not [domains, experts]")
    return Attention(experts, domains, weights)


def _example(facts: Mapping[str, Any]) -> Example:
    return Example(
        domain=name_of(facts["domain"]),
        image=small_png(facts["image"]),
        truth=name_of(facts["truth"]),
        before=name_of(facts["before"]),
        after=name_of(facts["after"]),
    )


def _curve(points: Sequence[Sequence[Any]]) -> Curve:
    if len(points) > MOST_POINTS:
        raise ValueError(f"a curve of {len(points)} points, expected {MOST_POINTS} at most")
    return [(sure(step), known) for step, score in points if (known := number_of(score)) is not None]
