"""A run on disk: what is finished, from which inputs, and where it lies.

A stage owns a folder. It is finished when its ``manifest.json`` is there, which names the stage's inputs (the part of the
configuration it depends on, and digests of what it was made from), the digests of its files, and its figures.
"""

import fcntl
import getpass
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from dmoe.artifacts import (
    LARGEST_JSON,
    cannot_write,
    digest_of_facts,
    digest_of_file,
    is_unfinished,
    read_json,
    sweep,
    write_json,
    written_whole,
)
from dmoe.config import HOW_EXPERTS_ARE_LAUNCHED, Config, first_difference, read_fields, validate_config
from dmoe.console import say
from dmoe.errors import UserError
from dmoe.reading import open_regular

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class Stage:
    """One stage's folder.

    Attributes:
        inputs: plain data; equal inputs give equal results.
    """

    folder: Path
    inputs: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def key(self) -> str:
        """A digest of the inputs."""
        return digest_of_facts(self.inputs)

    @property
    def weights(self) -> Path:
        return self.folder / "weights.safetensors"

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.json"

    def finished(self) -> dict[str, Any] | None:
        """The manifest of the finished stage, or None where it is still to be done.

        Raises:
            UserError: it was finished from other inputs, or its files are gone or damaged.
        """
        if not self.manifest.exists():
            return None
        manifest = read_json(self.manifest)
        if not isinstance(inputs := manifest.get("inputs"), dict):
            raise UserError(f"{self.manifest}: damaged (inputs): delete {self.folder} to redo it")
        self.refuse_other_inputs(inputs, self.manifest)
        self.refuse_damaged(manifest)
        return manifest

    def files(self, manifest: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The digests of the stage's files, by their names.

        Raises:
            UserError: the manifest has none.
        """
        files = (read_json(self.manifest) if manifest is None else manifest).get("files")
        if not isinstance(files, dict):
            raise UserError(f"{self.manifest}: damaged (files): delete {self.folder} to redo it")
        return files

    def refuse_damaged(self, manifest: Mapping[str, Any]) -> None:
        """Raise a UserError unless all files are as the manifest has them."""
        files = self.files(manifest)
        there = {path.name: path for path in self.folder.iterdir() if path.is_file()}
        sizes = manifest.get("bytes", {})  # another size tells at once
        for name, digest in files.items():
            path, fault = there.get(name), ""
            if path is None:
                fault = "missing"
            elif (isinstance(sizes, dict) and sizes.get(name) not in (None, path.stat().st_size)) or digest_of_file(path) != digest:
                fault = "changed or cut off"
            if fault:
                where = self.folder / Path(name).name
                raise UserError(f"{where}: {fault} since it was written: bring it back, or delete {self.folder} to redo it")

    def refuse_other_inputs(self, inputs: Mapping[str, Any], path: Path) -> None:
        """Raise a UserError unless ``inputs``, read from ``path``, are this stage's own."""
        other = first_difference(inputs, self.inputs)
        if other:
            raise UserError(
                f"{path}: made from other inputs, {other}: choose another --run_dir, or delete {self.folder} to redo it"
            )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Work on the stage while no other process does; waits for one that does, and says whose it is.

        The system lets go of the lock when the process ends, however it ends. What was being written when it did is dropped.

        Raises:
            UserError: the folder cannot be written.
        """
        with alone_in(self.folder, self.name):
            sweep(self.folder)
            yield

    def finish(self, *, files: list[Path], figures: Mapping[str, Any]) -> dict[str, Any]:
        """Declare the stage done."""
        manifest = {
            "stage": self.name,
            "inputs": dict(self.inputs),
            "files": {path.name: digest_of_file(path) for path in files},
            "bytes": {path.name: path.stat().st_size for path in files},
            "figures": dict(figures),
            "versions": versions(),
            "finished": _now(),
        }
        write_json(self.manifest, manifest)
        return manifest


@contextmanager
def alone_in(folder: Path, name: str) -> Iterator[None]:
    """Work in a folder while no other process does; waits for one that does, and says whose it is.

    Raises:
        UserError: the folder cannot be written.
    """
    path = folder / "lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(path, "a+", encoding="utf-8", errors="replace", opener=_not_elsewhere)
    except OSError as error:
        raise cannot_write(folder, error) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = " ".join(lock.read(200).split()) or "another process"
            say(f"{name}: {owner} is at work in {folder}; waiting for it to end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        with suppress(OSError):  # a full disk leaves no room even for a name
            lock.truncate(0)
            lock.write(f"process {os.getpid()} of {_user()} on {platform.node()}, since {_now()}\n")
            lock.flush()
        yield


def _not_elsewhere(path: str, flags: int) -> int:
    """A link in a run folder from somebody else may lead to any file of this user's."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


class RunFolder:
    """All stages of one run.

    Attributes:
        path: the folder itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def claim(self, config: Config, *, fresh: bool = False) -> None:
        """Make the folder this configuration's own, or go on in it.

        Args:
            fresh: refuse a folder that already holds a run.

        Raises:
            UserError: the folder holds something that is not a run, another configuration's run, or cannot be written.
        """
        ours = config.model_dump(mode="json")
        recorded = self.path / CONFIG_FILE
        # Looked at first: the next moment, another process of the same run may have claimed the folder.
        taken = self.path.exists() and (not self.path.is_dir() or any(not is_unfinished(entry) for entry in self.path.iterdir()))
        if recorded.exists():
            if fresh:
                raise UserError(f"{self.path}: already holds a run: choose another --run_dir, or leave --no-resume away")
            other = first_difference(_locked(self.config().model_dump(mode="json")), _locked(ours))
            if other:
                raise UserError(f"{self.path}: made by another configuration, {other}: choose another --run_dir")
            return
        if taken:
            raise UserError(f"{self.path}: not a run folder (no {CONFIG_FILE}): choose another --run_dir")
        with written_whole(recorded) as beside:
            beside.write_text(yaml.safe_dump(ours, sort_keys=False), encoding="utf-8")

    def config(self) -> Config:
        """The configuration that the run was made by.

        Raises:
            UserError: this is not a run folder.
        """
        path, there = self.path / CONFIG_FILE, False
        with suppress(OSError):  # no such name is possible
            there = path.is_file()
        if not there:
            raise UserError(f"{self.path}: not a run folder (no {CONFIG_FILE}): run.py makes one")
        return validate_config(read_fields(path), str(path))

    def stage(self, name: str, inputs: Mapping[str, Any]) -> Stage:
        """The stage of that name (a path below the folder)."""
        return Stage(self.path / name, inputs)

    def expert(self, number: int, inputs: Mapping[str, Any]) -> Stage:
        return self.stage(f"experts/expert_{number:02d}", inputs)

    @property
    def results(self) -> Path:
        return self.path / "results.jsonl"

    def last_results(self, split: str) -> dict[str, dict[str, Any]]:
        """The newest row of each method on a split, in the order in which the methods first came.

        Raises:
            UserError: there are none, or a line is damaged.
        """
        try:
            lines = self.results.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise UserError(f"{self.results}: cannot be read: {error.strerror}: run.py --test writes it") from None
        found: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                if row["split"] == split:
                    found[row["method"]] = row
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(f"{self.results}: line {number}: damaged: delete that line") from None
        if not found:
            raise UserError(f"{self.results}: holds no result on the {split} split: run.py --test --split {split} makes them")
        return found

    def append_result(self, row: Mapping[str, Any]) -> None:
        """Add a line to ``results.jsonl``, unless the very same result is there already."""
        line = json.dumps(row)
        with alone_in(self.path, "results"):
            try:
                with open_regular(self.results, at_most=LARGEST_JSON) as file:
                    there = file.read()
            except FileNotFoundError:
                there = b""
            except OSError as error:
                raise cannot_write(self.results, error) from None
            if line.encode() not in there.split(b"\n"):
                with written_whole(self.results) as beside:
                    beside.write_bytes(there + (b"\n" if there and not there.endswith(b"\n") else b"") + line.encode() + b"\n")


def _locked(config: dict[str, Any]) -> dict[str, Any]:
    """What may not change between two visits to one folder: all but how it is tested, where data lie and how fast it goes."""
    data = {key: value for key, value in config["data"].items() if key not in ("dir", "workers", "decoded_gb", "decoded_dir")}
    experts = {key: value for key, value in config["experts"].items() if key not in HOW_EXPERTS_ARE_LAUNCHED}
    meta = {key: value for key, value in config["meta"].items() if key != "memory_gb"}
    kept = {key: value for key, value in config.items() if key not in ("evaluation", "compare", "checkpoint_every")}
    return {**kept, "data": data, "experts": experts, "meta": meta}


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return f"user {os.getuid()}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def seconds_in(folder: Path) -> float | None:
    """CPU seconds that the finished stages in a folder took, itself and all below it; None: there are none."""
    manifests = sorted(folder.glob("**/manifest.json"))
    return sum(float(read_json(manifest)["figures"]["cpu_seconds"]) for manifest in manifests) if manifests else None


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in ("dmoe", "torch", "torchvision", "timm", "numpy", "pillow", "wilds", "mlxtend"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
