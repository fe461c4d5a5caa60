"""A run on disk: what is finished, from which inputs, and where it lies.

A stage owns a folder. It is finished when its ``manifest.json`` is there, which names the stage's inputs (the part of the
configuration it depends on, and digests of what it was made from), the digests of its files, and its figures.
"""

import fcntl
import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from dmoe.artifacts import digest_of_facts, digest_of_file, is_unfinished, read_json, write_json, written_whole
from dmoe.config import HOW_EXPERTS_ARE_LAUNCHED, Config, first_difference, validate_config
from dmoe.console import say
from dmoe.errors import UserError

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
        self.refuse_other_inputs(manifest.get("inputs", {}), self.manifest)
        for name, digest in manifest.get("files", {}).items():
            path = self.folder / Path(name).name
            fault = "missing" if not path.is_file() else "changed or cut off" if digest_of_file(path) != digest else ""
            if fault:
                raise UserError(f"{path}: {fault} since it was written: bring it back, or delete {self.folder} to redo it")
        return manifest

    def refuse_other_inputs(self, inputs: Mapping[str, Any], path: Path) -> None:
        """Raise a UserError unless ``inputs``, read from ``path``, are this stage's own."""
        other = first_difference(inputs, self.inputs)
        if other:
            raise UserError(
                f"{path}: made from other inputs, {other}: choose another --run_dir, or delete {self.folder} to redo it"
            )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Work on the stage while no other process does; waits for one that does, and says so.

        The system lets go of the lock when the process ends, however it ends.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = open(self.folder / "lock", "a")
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written: {error.strerror}: choose another --run_dir") from None
        with lock as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"{self.name}: another process is at work in {self.folder}; waiting for it to end")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def finish(self, *, files: list[Path], figures: Mapping[str, Any]) -> dict[str, Any]:
        """Declare the stage done."""
        manifest = {
            "stage": self.name,
            "inputs": dict(self.inputs),
            "files": {path.name: digest_of_file(path) for path in files},
            "figures": dict(figures),
            "versions": versions(),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_json(self.manifest, manifest)
        return manifest


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
        try:
            with written_whole(recorded) as beside:
                beside.write_text(yaml.safe_dump(ours, sort_keys=False), encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}: choose another --run_dir") from None

    def config(self) -> Config:
        """The configuration that the run was made by.

        Raises:
            UserError: this is not a run folder.
        """
        path = self.path / CONFIG_FILE
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError:
            raise UserError(f"{self.path}: not a run folder (no {CONFIG_FILE}): run.py makes one") from None
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"{path}: damaged: {' '.join(str(error).split())}") from None
        return validate_config(content if isinstance(content, dict) else {}, str(path))

    def stage(self, name: str, inputs: Mapping[str, Any]) -> Stage:
        """The stage of that name (a path below the folder)."""
        return Stage(self.path / name, inputs)

    def expert(self, number: int, inputs: Mapping[str, Any]) -> Stage:
        return self.stage(f"experts/expert_{number:02d}", inputs)

    @property
    def results(self) -> Path:
        return self.path / "results.jsonl"

    def append_result(self, row: Mapping[str, Any]) -> None:
        """Add a line to ``results.jsonl``, unless the very same result is there already."""
        if self.results.exists() and json.dumps(row) in self.results.read_text(encoding="utf-8").splitlines():
            return
        with open(self.results, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _locked(config: dict[str, Any]) -> dict[str, Any]:
    """What may not change between two visits to one folder: all but how it is tested, where data lie and how fast it goes."""
    data = {key: value for key, value in config["data"].items() if key not in ("dir", "workers", "decoded_gb", "decoded_dir")}
    experts = {key: value for key, value in config["experts"].items() if key not in HOW_EXPERTS_ARE_LAUNCHED}
    meta = {key: value for key, value in config["meta"].items() if key != "memory_gb"}
    kept = {key: value for key, value in config.items() if key not in ("evaluation", "checkpoint_every")}
    return {**kept, "data": data, "experts": experts, "meta": meta}


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in ("dmoe", "torch", "torchvision", "timm", "numpy", "pillow", "wilds", "mlxtend"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
