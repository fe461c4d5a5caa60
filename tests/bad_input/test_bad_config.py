"""Configurations: whatever YAML holds becomes a configuration or one line, and takes no more room than it is long."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from doors import ROOT, enter, refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe.config import load_config, validate_config
from dmoe.errors import UserError

WHOLE = (ROOT / "configs" / "digits.yaml").read_text(encoding="utf-8").partition("presets:")[0]
FIELDS = yaml.safe_load(WHOLE)

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
MERGES = "m0: &m0 {a: 1, b: 2}\n" + "".join(f"m{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}]}}\n" for n in range(1, 40))

TEXTS: dict[str, str] = {
    "laughs": LAUGHS + WHOLE,
    "laughs as a name": LAUGHS + WHOLE.replace("dataset: digits", "dataset: *a11"),
    "laughs as domains": LAUGHS + WHOLE + "data: {target_domains: *a11}\n",
    "laughs as a duration": LAUGHS + WHOLE.replace("400 steps", "*a11"),
    "laughs as a section": LAUGHS + WHOLE + "data: *a11\n",
    "laughs as presets": LAUGHS + WHOLE + "presets: {x: *a11}\n",
    "merges": MERGES + WHOLE,
    "holds itself": "a: &a {b: *a}\n" + WHOLE,
    "a list in itself": "a: &a [*a]\n" + WHOLE.replace("dataset: digits", "dataset: *a"),
    "brackets": "[" * 100_000,
    "deep fields": "".join(" " * n + "a:\n" for n in range(400)),
    "a day that is none": WHOLE.replace("seed: 1", "seed: 2020-13-45"),
    "an empty number": WHOLE.replace("seed: 1", "seed: !!int ''"),
    "an empty fraction": WHOLE.replace("seed: 1", "seed: !!float ''"),
    "no truth": WHOLE.replace("seed: 1", "seed: !!bool maybe"),
    "no time": WHOLE.replace("seed: 1", "seed: !!timestamp noon"),
    "many digits": WHOLE.replace("seed: 1", "seed: " + "9" * 5000),
    "many hexadecimal digits": WHOLE.replace("seed: 1", "seed: 0x" + "f" * 50_000),
    "many digits as a name": WHOLE.replace("dataset: digits", "dataset: 0x" + "f" * 50_000),
    "many digits as text": WHOLE.replace("seed: 1", f"seed: '{'9' * 5000}'"),
    "a program": WHOLE.replace("seed: 1", "seed: !!python/object/apply:os.system ['touch canary']"),
    "a set": WHOLE.replace("seed: 1", "seed: !!set {1, 2}"),
    "bytes": WHOLE.replace("seed: 1", "seed: !!binary aGVsbG8="),
    "a day": WHOLE.replace("dataset: digits", "dataset: 2020-01-01"),
    "a name with a line break": WHOLE + '"a\\nb\\e[31m": 1\n',
    "a value with a line break": WHOLE.replace("dataset: digits", 'dataset: ["a\\nb"]'),
    "a huge name": WHOLE + "a" * 100_000 + ": 1\n",
    "a huge value": WHOLE.replace("seed: 1", "seed: " + "a" * 100_000),
    "names that are numbers": WHOLE + "3: 4\n",
    "names that are nothing": WHOLE + "~: 4\n",
    "names that are lists": WHOLE + "? [a]\n: 4\n",
    "two documents": WHOLE + "---\n" + WHOLE,
    "a tab": WHOLE + "\tx: 1\n",
    "a nul": WHOLE + "x: \0\n",
    "a value": "3",
    "a text": "hello",
    "no presets": WHOLE + "presets: 3\n",
    "a field twice": WHOLE + "seed: 2\n",
    "a field of a section twice": WHOLE + "data: {dir: a, dir: b}\n",
    "a large file": WHOLE + "#" * 200_000,
}


@pytest.mark.parametrize("how", list(TEXTS))
def test_bad_yaml_is_told(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.yaml"
    path.write_text(TEXTS[how], encoding="utf-8")
    told = refusal(lambda: load_config(path))
    assert told is not None and told.startswith(f"{path}: ")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.yaml"]


def test_presets_that_hold_themselves_are_told(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(WHOLE + "data: &a {dir: *a}\npresets: {other: &b {data: &c {dir: *c}}}\n")
    told = refusal(lambda: load_config(tmp_path / "x.yaml", ["preset=other"]))
    assert told is not None and "nested too deeply" in told


OVERRIDES = [
    *("seed", "=1", "seed=2020-13-45", "seed=!!int ''", "seed=" + "9" * 5000, "seed=[[", "preset=[1]", "preset={a: 1}", "preset=3"),
    *("a..b=1", ".=1", "seed.x=1", "seed=\x1b[31m", "seed=-1", "seed=1e400", "seed=.nan", "seed=1" + "0" * 30, "dataset=[]"),
    *("experts.count=1000000000", "experts.threads=1000000000", "aggregator.depth=1000000000", "data.workers=1000000000"),
    *("data.image_size=1000000000", "meta.memory_gb=1e300", "data.decoded_gb=1e300", "tokens.batch_size=1" + "0" * 30),
    *(
        "evaluation.batch_size=1" + "0" * 30,
        "meta.support_size=1" + "0" * 30,
        "meta.duration=1e300 steps",
        "meta.duration=nan steps",
    ),
    *(
        "meta.inner_lr=.inf",
        "student.training.optimizer.warmup=1e308 epochs",
        "data.target_domains=[[a]]",
        "data.target_domains={a: b}",
    ),
    *("data.source_images_per_domain=1" + "0" * 30, "meta.chunk_size=0", "checkpoint_every=1" + "0" * 30, "backbone={}"),
]


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda text: ascii(text)[:40])
def test_bad_override_is_told(override: str, tmp_path: Path) -> None:
    told = refusal(lambda: enter("run", tmp_path / "run", override, "--dry_run"))
    assert told is not None and told.startswith("command line: ")
    assert not (tmp_path / "run").exists()


FLAGS = [["--threads", "0"], ["--threads", "1000000000"], ["--seed", "1" + "0" * 40], ["--seed", "-1"], ["--gpu", "9" * 30]]
FLAGS += [["--dataset", "../x"], ["--dataset", "a\nb"], ["--config", "/dev/zero"], ["--config", "."], ["--checkpoint_dir", "/"]]
FLAGS += [["--test", "--run_dir", "x" * 300], ["--test", "--run_dir", "/dev/null"], ["--gpu", "x\x1b"], ["--colour\n"], ["--split"]]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: ascii(" ".join(flags))[:40])
def test_bad_flag_is_told(flags: list[str], tmp_path: Path) -> None:
    assert refusal(lambda: enter("run", tmp_path / "run", *flags)) is not None
    assert not (tmp_path / "run").exists()


scalars = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=4), st.dates()),
    st.just(5000).map(lambda digits: -(10**digits)),
    st.sampled_from([10**400, 1e308, "1e400 steps", "9" * 5000, "\x1b[31m", "\udcff", "400 steps", ".", "../.."]),
)
plain = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3))


def places(fields: Any, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Of every field and section."""
    below = [place for key, value in fields.items() for place in places(value, (*above, key))] if isinstance(fields, dict) else []
    return [above, *below] if above else below


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(place=st.sampled_from(places(FIELDS)), value=plain)
def test_any_value_in_any_place_is_taken_or_told(place: tuple[str, ...], value: Any) -> None:
    fields = yaml.safe_load(WHOLE)
    section = fields
    for key in place[:-1]:
        section = section[key]
    section[place[-1]] = value
    try:
        config = validate_config(fields, "x.yaml")
    except UserError as error:
        assert str(error).startswith("x.yaml: ") and str(error).isprintable()
    else:
        assert validate_config(config.model_dump(mode="json"), "again") == config


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(content=plain)
def test_any_data_is_no_configuration(content: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.dump(content, allow_unicode=False) if not _too_large(content) else "", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: ") and str(caught.value).isprintable()


def _too_large(content: Any) -> bool:
    """Python writes no whole number of so many digits."""
    if isinstance(content, dict):
        return any(map(_too_large, content.values()))
    return any(map(_too_large, content)) if isinstance(content, list) else isinstance(content, int) and abs(content) > 10**4000


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(text=st.text(alphabet="a:[]{}&*!<>|-?,'\"#% \n\t1.e", max_size=60))
def test_any_text_is_no_configuration(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "text.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: ") and str(caught.value).isprintable()
