"""Reading a configuration: YAML, presets, overrides; and what is wrong with it, in one line."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dmoe.config.sections import Config
from dmoe.errors import UserError, shortened
from dmoe.reading import read_text

CONFIG_FOLDER = Path(__file__).resolve().parent.parent.parent / "configs"

LARGEST_FILE = 1 << 17
"""Bytes of a configuration; a file of that size takes a second or two to be read."""

MERGED_AT_MOST = 10_000
"""Fields of a section that is put together of others by YAML's ``<<``."""


def load_config(path: Path, overrides: Sequence[str] = (), **flags: Any) -> Config:
    """Read a YAML file, choose its preset, apply ``key.sub=value`` overrides and then flags that are not None.

    The file's own values are one preset, named by its field ``preset``; ``presets`` names others and what they change.

    Raises:
        UserError: the file is missing or not YAML, a field is unknown or missing, or a value is out of its range; the line
            names the place, the field and the value.
    """
    content = read_fields(path)
    changes = [_parse(text) for text in overrides]
    try:
        content = _choose_preset(content, dict(changes).get("preset"), str(path))
    except RecursionError:  # two sections, each of which holds itself
        raise UserError(f"{path}: it is nested too deeply") from None
    origins: dict[tuple[str, ...], str] = {}
    for key, value in changes:
        _set(content, tuple(key.split(".")), value, origins)
    for key, value in flags.items():
        if value is not None:
            _set(content, tuple(key.split("__")), value, origins)
    return validate_config(content, str(path), origins)


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a YAML file, unchecked.

    Raises:
        UserError: the file is missing, or not YAML that holds fields.
    """
    try:
        content = _parsed(read_text(path, at_most=LARGEST_FILE))
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration; known: {', '.join(known_datasets())}") from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be read as YAML: {why}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold fields such as 'seed: 1', got {type(content).__name__}")
    return content


class _Loader(yaml.SafeLoader):
    """Plain data, no more of it than the text is long, and no field twice in a section."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._seen: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if id(node) not in self._seen:  # sections that others take in come again, with what they took in themselves
            self._seen.add(id(node))
            names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            twice = [name for name, count in names.items() if count > 1]
            if twice:
                raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} is there twice in one section", node.start_mark)
        super().flatten_mapping(node)
        if len(node.value) > MERGED_AT_MOST:  # sections that take one another in twice double their size each time
            raise yaml.constructor.ConstructorError(None, None, f"more than {MERGED_AT_MOST} merged fields", node.start_mark)


def _parsed(text: str) -> Any:
    """Plain data of YAML.

    Raises:
        ValueError: it is none; in one line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:  # PyYAML checks little
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def validate_config(content: Mapping[str, Any], place: str, origins: Mapping[tuple[str, ...], str] | None = None) -> Config:
    """A Config of plain data; its first fault becomes a UserError that names the place it came from."""
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise UserError(_explain(error, place, origins or {})) from None
    except RecursionError:
        raise UserError(f"{place}: it is nested too deeply") from None


def known_datasets() -> list[str]:
    """Names of data sets for which a configuration is shipped; other configurations there are examples, for ``--config``."""
    paths = CONFIG_FOLDER.glob("*.yaml")
    return sorted(path.stem for path in paths if yaml.safe_load(path.read_text(encoding="utf-8"))["dataset"] == path.stem)


def differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted fields in which two plain configurations differ, as ``meta.inner_lr: 1.0 there, 0.2 here``."""
    found = []
    for key in sorted({*one, *other}):
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a} there, {b} here")
    return found


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The first of :func:`differences` and how many more there are; empty where there are none."""
    found = differences(one, other)
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{found[0]}{more}" if found else ""


def _parse(override: str) -> tuple[str, Any]:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"command line: overrides look like meta.inner_lr=0.2, got {override!r}")
    try:
        return key, _parsed(value)
    except ValueError:
        raise UserError(f"command line: the value of {key} is not valid YAML: {value!r}") from None


def _choose_preset(content: dict[str, Any], asked: str | None, place: str) -> dict[str, Any]:
    presets = content.pop("presets", {})
    if not isinstance(presets, dict) or not all(isinstance(values, dict) for values in presets.values()):
        raise UserError(f"{place}: presets must hold named sets of fields")
    own = content.get("preset", "")
    if asked is None or asked == own:
        return content
    if not isinstance(asked, Hashable) or asked not in presets:
        known = ", ".join(name for name in (own, *presets) if name and isinstance(name, str)) or "none"
        raise UserError(f"command line: preset {asked!r} is unknown in {place}; known there: {known}")
    return _merged(content, presets[asked])


def _merged(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(content)
    for key, value in changes.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _set(content: dict[str, Any], keys: tuple[str, ...], value: Any, origins: dict[tuple[str, ...], str]) -> None:
    section = content
    for key in keys[:-1]:
        inner = section.get(key)
        if inner is not None and not isinstance(inner, dict):
            raise UserError(f"command line: {'.'.join(keys)}: {key} is a single value, it has no fields")
        section[key] = dict(inner or {})  # a copy: two sections may share one by a YAML anchor
        section = section[key]
    section[keys[-1]] = value
    origins[keys] = "command line"


_PHRASES = {
    "greater_than": "must be > {gt}",
    "greater_than_equal": "must be >= {ge}",
    "less_than": "must be < {lt}",
    "less_than_equal": "must be <= {le}",
    "literal_error": "must be one of {expected}",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "bool_parsing": "must be true or false",
    "finite_number": "must be a finite number",
    "union_tag_invalid": "must be one of {expected_tags}",
}


def _explain(error: ValidationError, place: str, origins: Mapping[tuple[str, ...], str]) -> str:
    fault = error.errors()[0]
    keys, section = _walked(fault["loc"])
    if fault["type"].startswith("union_tag"):  # of sections that are told apart by their name or kind
        keys = (*keys, fault["ctx"]["discriminator"].strip("'"))
    for end in range(len(keys), 0, -1):
        if keys[:end] in origins:
            place = origins[keys[:end]]
            break
    name = ".".join(keys)
    if fault["type"] == "extra_forbidden":
        place = next((origin for changed, origin in origins.items() if changed[: len(keys)] == keys), place)
        return f"{place}: {name} is not a field; known here: {', '.join(section.model_fields)}"
    if fault["type"] in ("missing", "union_tag_not_found"):
        return f"{place}: {name} is missing"
    phrase = _PHRASES.get(fault["type"], "{msg}").format(msg=fault["msg"].removeprefix("Value error, "), **fault.get("ctx", {}))
    value = fault["ctx"]["tag"] if fault["type"] == "union_tag_invalid" else fault["input"]
    return f"{place}: {name} {phrase}, got {_shown(value)}"


def _shown(value: Any) -> str:
    """A value from a file, which may be of any size: by YAML's references, larger than memory."""
    if isinstance(value, Mapping | Set) or (isinstance(value, Sequence) and not isinstance(value, str | bytes)):
        return f"{type(value).__name__} of {len(value)}" if value else repr(value)
    return shortened(hex(value) if isinstance(value, int) and abs(value) >= 1 << 999 else repr(value), 200)


def _tag(section: type[BaseModel]) -> Any:
    """What tells a section from others that could stand in its place."""
    return next((section.model_fields[name].default for name in ("kind", "name") if name in section.model_fields), None)


def _walked(location: Sequence[int | str]) -> tuple[tuple[str, ...], type[BaseModel]]:
    """The fields that a fault's location names, and the section that the last of them is in, or would be.

    Where a section is one of several by its name or kind, that is a part of the location too, but no field.
    """
    keys: list[str] = []
    section: type[BaseModel] = Config
    candidates: list[type[BaseModel]] = [Config]
    for key in map(str, location):
        named = [each for each in candidates if len(candidates) > 1 and _tag(each) == key]
        if named:
            candidates = named
            continue
        keys.append(key)
        if candidates:
            section = candidates[0]
        inner = section.model_fields[key].annotation if candidates and key in section.model_fields else None
        either = (inner, *getattr(inner, "__args__", ()))
        candidates = [each for each in either if isinstance(each, type) and issubclass(each, BaseModel)]
    return tuple(keys), section
