"""Which expert learns from which source domain."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from dmoe.artifacts import read_json, write_json
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


def write_partition(path: Path, groups: Mapping[int, int], names: Mapping[int, str]) -> None:
    """Record who learns from what."""
    experts = [[domain for domain in sorted(groups) if groups[domain] == expert] for expert in range(max(groups.values()) + 1)]
    known = {str(domain): names[domain] for domain in sorted(groups) if domain in names}
    write_json(path, {"experts": experts, "names": known})


def read_partition(path: Path) -> dict[int, int]:
    """The expert of each domain, from a file that :func:`write_partition` wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    experts = read_json(path).get("experts")
    if not isinstance(experts, list) or not all(isinstance(e, list) and all(type(d) is int for d in e) for e in experts):
        raise UserError(f"{path}: damaged, it must list the domains of each expert: delete it to make it again")
    groups = {domain: expert for expert, domains in enumerate(experts) for domain in domains}
    if len(groups) != sum(map(len, experts)):
        raise UserError(f"{path}: damaged, a domain belongs to two experts: delete it to make it again")
    return groups


def check_partition(groups: Mapping[int, int], domains: Sequence[int], *, count: int, where: Path) -> None:
    """Make sure that groups from a file are of these domains and so many experts.

    Raises:
        UserError: they are not.
    """
    experts = len(set(groups.values()))
    if experts != count or set(groups.values()) != set(range(count)):
        raise UserError(f"{where}: it shares out domains to {experts} experts, experts.count is {count}")
    ours, theirs = set(domains), set(groups)
    if ours - theirs:
        raise UserError(f"{where}: made for other data: it gives domain {min(ours - theirs)} to no expert")
    if theirs - ours:
        raise UserError(f"{where}: made for other data: it shares out domain {min(theirs - ours)}, which is not in this data set")
