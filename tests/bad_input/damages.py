"""Ways to damage a file, each a function of the file alone."""

import os
import random
from collections.abc import Callable
from pathlib import Path

Damage = Callable[[Path], object]


def _cut(part: float) -> Damage:
    return lambda path: path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])


def _flipped(seed: int, count: int = 4) -> Damage:
    def damage(path: Path) -> None:
        content, draw = bytearray(path.read_bytes()), random.Random(f"{path.name} {seed}")
        for _ in range(count):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)

    return damage


def _holds(content: bytes) -> Damage:
    return lambda path: path.write_bytes(content)


def _replaced(make: Callable[[Path], object]) -> Damage:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def _huge(path: Path) -> None:
    with open(path, "ab") as file:
        os.truncate(file.fileno(), 1 << 42)  # takes no room on the disk


CUT: dict[str, Damage] = {f"cut to {part}": _cut(part) for part in (0, 0.01, 0.5, 0.99)}
FLIPPED: dict[str, Damage] = {f"flipped {seed}": _flipped(seed) for seed in range(6)}
KINDS: dict[str, Damage] = {
    "a folder": _replaced(Path.mkdir),
    "a pipe": _replaced(os.mkfifo),
    "a link to a device": _replaced(lambda path: path.symlink_to("/dev/zero")),
    "a link to itself": _replaced(lambda path: path.symlink_to(path)),
    "huge": _huge,
}
TEXTS: dict[str, Damage] = {
    "other encoding": _holds('{"a": "é"}'.encode("utf-16")),
    "bytes": _holds(bytes(range(256))),
    "nested": _holds(b"[" * 100_000),
    "nested fields": _holds(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "many digits": _holds(b'{"a": ' + b"9" * 5000 + b"}"),
    "not a number": _holds(b"NaN"),
    "a list": _holds(b"[1, 2]"),
    "no fields": _holds(b"{}"),
    "unknown fields": _holds(b'{"a\\nb\\u001b[31m": null}'),
}
ALL = {**CUT, **FLIPPED, **KINDS, **TEXTS}
