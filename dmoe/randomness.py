"""Random numbers as a pure function of what they are for.

No generator lives across steps: whoever needs randomness names its purpose, for example
``generator(seed, "episode", step, slot)``. A run that was cut off therefore continues with the very numbers that an
undisturbed run would have drawn, and no random state has to be saved.
"""

import hashlib

import torch

Key = int | str


def seed_of(*key: Key) -> int:
    """A 63-bit seed for this purpose; different keys give unrelated seeds."""
    digest = hashlib.sha256("/".join(f"{type(part).__name__}:{part}" for part in key).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*key: Key) -> torch.Generator:
    """A CPU generator for this purpose, at its beginning."""
    return torch.Generator().manual_seed(seed_of(*key))
