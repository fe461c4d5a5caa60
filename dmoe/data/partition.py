"""Which expert learns from which source domain."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from dmoe.artifacts import write_json
from dmoe.errors import UserError


def partition(domains: Sequence[int], *, count: int, seed: int, how: Literal["shuffled", "interleaved"]) -> dict[int, int]:
    """Give every source domain to one of ``count`` experts; groups are of near-equal size.

    Args:
        domains: numbers of the source domains; their order does not matter.
        seed: of Python's own ``random``, as in the public code; shuffled only.
        how: ``shuffled``: position j of L shuffled domains goes to group floor(j / (L / count)). ``interleaved``: position j of
            the sorted domains goes to group j modulo ``count``, so that neighbours are known to different experts.

    Returns:
        The expert of each domain.

    Raises:
        UserError: there are fewer domains than experts.
    """
    ordered = sorted(domains)
    if len(ordered) < count:
        raise UserError(f"experts.count: {count} experts need as many source domains, the data set has {len(ordered)}")
    if how == "interleaved":
        return {domain: position % count for position, domain in enumerate(ordered)}
    random.Random(seed).shuffle(ordered)
    return {domain: int(position // (len(ordered) / count)) for position, domain in enumerate(ordered)}


def write_partition(path: Path, groups: dict[int, int], names: dict[int, str]) -> None:
    """Record who learns from what, for people to read."""
    experts: dict[str, list[str]] = {}
    for domain, expert in sorted(groups.items()):
        experts.setdefault(f"expert {expert}", []).append(f"{domain} ({names[domain]})" if domain in names else str(domain))
    write_json(path, {name: experts[name] for name in sorted(experts, key=lambda name: int(name.split()[1]))})
