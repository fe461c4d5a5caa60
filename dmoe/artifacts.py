"""Files that outlive a process: tensors as safetensors, facts as JSON, each written whole or not at all."""

import hashlib
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dmoe.errors import UserError
from dmoe.reading import open_regular, read_text

ABOUT = "dmoe"
"""The one entry of our own files' metadata, several would come in any order: facts and a sum. Other files need none."""

LARGEST_JSON = 1 << 28
"""Bytes; of our own files the largest names every image that could not be read."""

LARGEST_WEIGHTS = 1 << 40
"""Bytes; nothing we read is as large by far."""


@contextmanager
def written_whole(path: Path, *, keep: Path | None = None) -> Iterator[Path]:
    """A file beside ``path`` to write to; it takes the name ``path`` once it is complete and on disk.

    Args:
        keep: the name that what was at ``path`` takes then.

    Raises:
        UserError: the disk is full, or nothing can be written there; what was at ``path`` is untouched.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            _give_second_name(path, keep)
        beside.replace(path)
        _flush_names(path.parent)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def _give_second_name(path: Path, name: Path) -> None:
    """So that there is a file at ``path`` at every moment; where the file system knows no second names, it moves."""
    second = path.with_name(f".{path.name}.{os.getpid()}.second.part")
    try:
        os.link(path, second)
    except OSError:
        path.replace(name)
    else:
        second.replace(name)


def cannot_write(path: Path, error: Exception) -> UserError:
    """What to tell of an error in writing a file."""
    why = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split()).rpartition("error: ")[2]
    return UserError(f"{path}: cannot be written: {why}: make room there, or write elsewhere; what is finished is kept")


def _flush_names(folder: Path) -> None:
    """A new name is on disk when its folder is."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError:  # some network file systems cannot; they keep names in order by themselves
        pass
    finally:
        os.close(number)


def is_unfinished(path: Path) -> bool:
    """Whether the file is one that :func:`written_whole` is writing, in this process or another, or was when it was killed."""
    return path.name.startswith(".") and (path.suffix == ".part" or path.name.startswith(".tmp"))


def sweep(folder: Path) -> None:
    """Drop what killed processes were writing in a folder that nobody else writes into now."""
    for path in folder.iterdir():
        if is_unfinished(path) and path.is_file():
            path.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    with written_whole(path) as beside:
        beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """An object a line, the file whole or not at all."""
    with written_whole(path) as beside:
        beside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: the file is missing, cut off, or not an object.
    """
    try:
        content = json.loads(read_text(path, at_most=LARGEST_JSON))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, not JSON ({error}): delete it to make it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: damaged, not a JSON object: delete it to make it again")
    return content


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None, *, keep: Path | None = None
) -> None:
    """Write named tensors and a few JSON facts into one safetensors file, with a sum over both.

    Args:
        keep: see :func:`written_whole`.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about: dict[str, Any] = {"facts": dict(facts or {})}
    about["sha256"] = _digest_of_tensors(contiguous, about["facts"])
    with written_whole(path, keep=keep) as beside:
        save_file(contiguous, beside, metadata={ABOUT: json.dumps(about)})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the facts of a safetensors file; a ``.pth`` file of a state dict has no facts.

    Raises:
        UserError: the file is missing, cut off, changed since :func:`save_tensors` wrote it, or holds anything but tensors.
    """
    if path.suffix in (".pth", ".pt"):
        return _load_state_dict(path), {}
    try:
        open_regular(path, at_most=LARGEST_WEIGHTS).close()
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(ABOUT, '{"facts": {}}'))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        changed = (
            isinstance(about, dict) and "sha256" in about and about["sha256"] != _digest_of_tensors(tensors, about.get("facts"))
        )
    except FileNotFoundError:
        raise UserError(f"{path}: no such weights file") from None
    except _DAMAGED as error:
        why = " ".join(str(error).split())
        raise UserError(f"{path}: not a whole safetensors file ({why}): delete it or bring it again") from None
    if not isinstance(about, dict) or not isinstance(facts := about.get("facts"), dict):
        raise UserError(f"{path}: damaged, its facts are no JSON object: delete it or bring it again")
    if changed:
        raise UserError(f"{path}: changed since it was written: delete it or bring it again")
    return tensors, facts


def _digest_of_tensors(tensors: Mapping[str, Tensor], facts: Any) -> str:
    found = hashlib.sha256(json.dumps(facts).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(errors="surrogatepass"))
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


_DAMAGED = (
    OSError,
    SafetensorError,
    zipfile.BadZipFile,
    RuntimeError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
    struct.error,
    pickle.UnpicklingError,
)
"""What reading a file that was cut off or changed may end in."""


def _load_state_dict(path: Path) -> dict[str, Tensor]:
    """Foreign weights: nothing in the file can run, and it unpacks to no more than it is."""
    try:
        with open_regular(path, at_most=LARGEST_WEIGHTS) as file:
            if zipfile.is_zipfile(file):
                packed = [entry for entry in zipfile.ZipFile(file).infolist() if entry.compress_type != zipfile.ZIP_STORED]
                if packed:  # torch.save packs nothing
                    raise ValueError(f"{packed[0].filename} is packed")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such weights file") from None
    except _DAMAGED as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a whole file of plain tensors ({why})") from None
    if isinstance(content, dict) and list(content) == ["model"] and isinstance(content["model"], dict):  # as DeiT is published
        content = content["model"]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: must hold a state dict, named tensors and nothing else")
    for name, tensor in content.items():
        if not isinstance(name, str) or not name.isprintable():
            raise UserError(f"{path}: must hold a state dict, it has a tensor called {ascii(name)[:80]}")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
            raise UserError(f"{path}: {name} is {kind}: expected a plain dense tensor")
    return dict(content)


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Copy tensors into a module, every one of them into its place.

    Raises:
        UserError: a tensor is missing, left over, or of another shape; the line names the first and counts them.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in tensors]
    extra = [name for name in tensors if name not in own]
    if missing or extra:
        kind, names = ("lacks", missing) if missing else ("has no place for", extra)
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UserError(f"{where}: it {kind} {names[0]}{others}: it was made for another network")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise UserError(f"{where}: {name} is {list(tensor.shape)}, the network's is {list(own[name].shape)}")
    module.load_state_dict(dict(tensors))


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def under_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix.``, without it."""
    return {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}


def digest_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_facts(facts: Mapping[str, Any]) -> str:
    """The same for equal plain data, in whatever order."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
