"""YAML, then overrides, then flags; and errors that name place, field and value in one line."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from dmoe.config import CONFIG_FOLDER, Config, Duration, as_inputs, differences, known_datasets, load_config, validate_config
from dmoe.errors import UserError


def training() -> dict[str, Any]:
    return {"batch_size": 64, "duration": "400 steps", "optimizer": {"lr": 0.003}}


CONTENT: dict[str, Any] = {
    "dataset": "digits",
    "experts": {"count": 6, "backbone": {"name": "small_conv"}, "training": training()},
    "aggregator": {"training": training()},
    "student": {"training": training()},
    "meta": {
        "duration": "20 steps",
        "support_size": 64,
        "query_size": 32,
        "inner_lr": 0.5,
        "student": {"lr": 0.001},
        "aggregator": {"lr": 0.001},
    },
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**CONTENT, "seed": 4}), encoding="utf-8")
    return path


def fault(path: Path, *overrides: str, **flags: Any) -> str:
    """The one line that refuses a configuration."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides, **flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("shipped", sorted(CONFIG_FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configuration_is_valid(shipped: Path) -> None:
    assert load_config(shipped).dataset in known_datasets()


def test_known_data_sets_are_those_with_a_configuration_of_their_name() -> None:
    assert known_datasets() == ["camelyon", "digits", "fmow", "folders", "iwildcam", "poverty", "rxrx1"]


WILDS = ("camelyon", "fmow", "iwildcam", "poverty", "rxrx1")


@pytest.mark.parametrize("name", WILDS)
def test_presets_differ_in_what_the_papers_text_and_its_code_differ_in(name: str) -> None:
    path = CONFIG_FOLDER / f"{name}.yaml"
    code, text = load_config(path), load_config(path, ["preset=paper"])
    assert (code.preset, text.preset) == ("reference", "paper")
    assert (code.meta.mask, text.meta.mask) == ("remove", "zero")
    assert (code.meta.inner_loss, text.meta.inner_loss) == ("mean_square", "norm")
    assert code.meta.domains_per_update == 1 < text.meta.domains_per_update
    assert (text.meta.inner_lr, text.meta.student.lr, text.meta.aggregator.lr) == (3e-4, 3e-5, 3e-5)
    assert str(text.meta.duration) == "15 epochs"
    assert text.experts.training.optimizer.lr == 1e-4
    assert not text.meta.restart_optimizers and code.meta.restart_optimizers == (name in ("iwildcam", "camelyon", "fmow"))
    assert (code.evaluation.score_support, text.evaluation.score_support) == (True, False)


@pytest.mark.parametrize("name", WILDS)
def test_published_settings_of_the_experts(name: str) -> None:
    """METHOD, section 5: experts, batch, learning rate, L2, epochs, support, query, inner learning rate, seed."""
    published = {
        "iwildcam": (10, 16, 3e-5, 0, "12 epochs", 24, 16, 3e-4, 1),
        "camelyon": (5, 32, 1e-3, 1e-2, "5 epochs", 64, 32, 1e-3, 3407),
        "rxrx1": (3, 75, 1e-4, 1e-5, "90 epochs", 75, 48, 1e-4, 1000),
        "fmow": (4, 64, 1e-4, 0, "30 epochs", 64, 48, 1e-4, 42),
        "poverty": (3, 64, 1e-3, 0, "200 epochs", 64, 48, 1e-3, 1),
    }
    config = load_config(CONFIG_FOLDER / f"{name}.yaml")
    training, adam = config.experts.training, config.experts.training.optimizer
    found = (config.experts.count, training.batch_size, adam.lr, adam.l2, str(training.duration))
    episode = (config.meta.support_size, config.meta.query_size, config.meta.inner_lr, config.seed)
    assert (*found, *episode) == published[name]


def test_values_of_a_preset_are_merged_into_those_of_the_file(path: Path) -> None:
    presets = {"other": {"preset": "other", "meta": {"inner_lr": 0.25}}}
    path.write_text(yaml.safe_dump({**CONTENT, "preset": "own", "presets": presets}), encoding="utf-8")
    own, other = load_config(path), load_config(path, ["preset=other"])
    assert own == load_config(path, ["preset=own"])
    assert other.meta.inner_lr == 0.25
    assert other.model_copy(update={"preset": "own", "meta": own.meta}) == own
    assert load_config(path, ["meta.inner_lr=2", "preset=other"]).meta.inner_lr == 2, "the command line wins over a preset"


def test_unknown_preset_is_told_with_the_known_ones(path: Path) -> None:
    path.write_text(yaml.safe_dump({**CONTENT, "preset": "own", "presets": {"other": {}}}), encoding="utf-8")
    assert fault(path, "preset=mine").endswith("known there: own, other")


@pytest.mark.parametrize(("given", "names"), [("[photo, 4]", ("photo", "4")), ("photo", ("photo",)), ("7", ("7",))])
def test_domains_are_names_even_where_they_look_like_numbers(path: Path, given: str, names: tuple[str, ...]) -> None:
    assert load_config(path, [f"data.target_domains={given}"]).data.target_domains == names


def test_defaults_fill_what_the_file_leaves_out(path: Path) -> None:
    config = load_config(path)
    assert (config.meta.inner_steps, config.evaluation.score_support, config.aggregator.heads) == (1, True, 16)


def test_file_wins_over_defaults(path: Path) -> None:
    assert load_config(path).seed == 4


def test_override_wins_over_file(path: Path) -> None:
    config = load_config(path, ["seed=5", "meta.inner_lr=0.2"])
    assert (config.seed, config.meta.inner_lr) == (5, 0.2)


def test_flag_wins_over_override(path: Path) -> None:
    assert load_config(path, ["seed=5"], seed=6).seed == 6


def test_flag_that_was_not_given_changes_nothing(path: Path) -> None:
    assert load_config(path, ["seed=5"], seed=None).seed == 5


def test_flag_reaches_a_field_of_a_section(path: Path) -> None:
    assert load_config(path, data__dir="/somewhere").data.dir == Path("/somewhere")


def test_last_override_of_a_field_wins(path: Path) -> None:
    assert load_config(path, ["seed=5", "seed=7"]).seed == 7


def test_override_keeps_the_other_fields_of_its_section(path: Path) -> None:
    assert load_config(path, ["meta.inner_lr=0.2"]).meta.support_size == 64


def test_override_makes_a_section_that_the_file_does_not_have(path: Path) -> None:
    assert load_config(path, ["evaluation.support_size=8"]).support_size == 8


def test_support_size_of_evaluation_is_that_of_training_unless_set(path: Path) -> None:
    assert load_config(path).support_size == 64


def test_number_in_scientific_notation_without_a_dot_is_a_number(path: Path) -> None:
    assert load_config(path, ["meta.inner_lr=3e-4"]).meta.inner_lr == 3e-4


def test_override_value_may_hold_an_equals_sign(path: Path) -> None:
    assert load_config(path, ["data.dir=/a=b"]).data.dir == Path("/a=b")


def test_override_null_takes_the_default_of_an_optional_field(path: Path) -> None:
    assert load_config(path, ["evaluation.support_size=null"]).evaluation.support_size is None


def test_override_of_a_section_that_the_file_shares_by_an_anchor_changes_that_section_alone(path: Path) -> None:
    once = training()
    shared = yaml.safe_dump(CONTENT | {"student": {"training": once}, "aggregator": {"training": once}})
    assert "*id001" in shared
    path.write_text(shared, encoding="utf-8")
    config = load_config(path, ["student.training.batch_size=8"])
    assert (config.student.training.batch_size, config.aggregator.training.batch_size) == (8, 64)


def test_configuration_cannot_be_changed(path: Path) -> None:
    config = load_config(path)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 2  # type: ignore[misc]


def test_configuration_survives_being_written_and_read(path: Path) -> None:
    config = load_config(path, ["meta.duration=0.25 epochs", "data.dir=/x", "student.backbone.name=resnet18"])
    written = yaml.safe_dump(config.model_dump(mode="json"))
    assert validate_config(yaml.safe_load(written), "again") == config


@pytest.mark.parametrize(
    ("text", "steps"),
    [("400 steps", 400), ("1 step", 1), ("2 epochs", 50), ("1 epoch", 25), ("0.5 epochs", 12), ("0 steps", 0), ("1e3 steps", 1000)],
)
def test_duration_counts_steps(text: str, steps: int) -> None:
    assert Duration.parse(text).steps(25) == steps


@pytest.mark.parametrize("text", ["400", "steps", "400steps", "-1 steps", "nan steps", "inf epochs", "4 hours", "", None, 12])
def test_duration_needs_a_count_and_a_unit(path: Path, text: Any) -> None:
    with pytest.raises(ValueError, match="400 steps"):
        Duration.parse(text)


@pytest.mark.parametrize("text", ["400 steps", "0.5 epochs", "1234567 steps", "0.3333333333 epochs"])
def test_duration_survives_being_written_and_read(text: str) -> None:
    duration = Duration.parse(text)
    assert Duration.parse(str(duration)) == duration


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("experts.count=1", "command line: experts.count must be >= 2, got 1"),
        ("meta.inner_lr=0", "command line: meta.inner_lr must be > 0.0, got 0"),
        ("meta.inner_lr=.nan", "command line: meta.inner_lr must be a finite number, got nan"),
        ("aggregator.dropout=1.0", "command line: aggregator.dropout must be < 1.0, got 1.0"),
        ("meta.student.decay_per_epoch=1.5", "command line: meta.student.decay_per_epoch must be <= 1.0, got 1.5"),
        ("experts.count=six", "command line: experts.count must be a whole number, got 'six'"),
        ("experts.count=2.5", "command line: experts.count must be a whole number, got 2.5"),
        ("meta.inner_lr=fast", "command line: meta.inner_lr must be a number, got 'fast'"),
        ("evaluation.score_support=perhaps", "command line: evaluation.score_support must be true or false, got 'perhaps'"),
        ("meta.mask=hide", "command line: meta.mask must be one of 'remove', 'zero' or 'none', got 'hide'"),
        ("experts.slurm_options=[gpu]", "command line: experts.slurm_options must be options of sbatch, each '--name=value'"),
        ('experts.slurm_options=["--x=1\\n2"]', "command line: experts.slurm_options must be options of sbatch"),
        ("student.training.duration=400", "command line: student.training.duration must be a number and a unit"),
    ],
)
def test_value_out_of_range_or_of_another_type_is_told_with_field_and_value(path: Path, override: str, said: str) -> None:
    assert fault(path, override).startswith(said)


def test_infinite_value_is_refused(path: Path) -> None:
    assert "meta.inner_lr" in fault(path, "meta.inner_lr=.inf")


@pytest.mark.parametrize(
    ("override", "name", "known"),
    [
        ("colour=red", "colour", "known here: dataset, preset, seed"),
        ("meta.inner_rate=1", "meta.inner_rate", "inner_lr"),
        ("student.training.optimizer.rate=1", "student.training.optimizer.rate", "known here: lr, l2"),
        ("student.backbone.size=1", "student.backbone.size", "known here: name, weights"),
        ("evaluation.mode=1", "evaluation.mode", "known here: support_size"),
    ],
)
def test_unknown_field_is_told_with_the_known_ones(path: Path, override: str, name: str, known: str) -> None:
    overrides = [override, "student.backbone.name=small_conv"] if "backbone" in override else [override]
    message = fault(path, *overrides)
    assert message.startswith(f"command line: {name} is not a field; ")
    assert known in message


def test_fault_in_the_file_names_the_file(path: Path) -> None:
    path.write_text(yaml.safe_dump({**CONTENT, "seed": -1}), encoding="utf-8")
    assert fault(path, "meta.inner_lr=0.2") == f"{path}: seed must be >= 0, got -1"


def test_unknown_field_in_the_file_names_the_file(path: Path) -> None:
    path.write_text(yaml.safe_dump({**CONTENT, "sede": 1}), encoding="utf-8")
    assert fault(path).startswith(f"{path}: sede is not a field; known here: dataset, preset, seed")


def test_fault_of_a_flag_names_the_command_line(path: Path) -> None:
    assert fault(path, seed=-3) == "command line: seed must be >= 0, got -3"


def test_missing_field_is_told(path: Path) -> None:
    meta = {key: value for key, value in CONTENT["meta"].items() if key != "support_size"}
    path.write_text(yaml.safe_dump({**CONTENT, "meta": meta}), encoding="utf-8")
    assert fault(path) == f"{path}: meta.support_size is missing"


def test_single_value_in_place_of_a_section_is_told(path: Path) -> None:
    assert fault(path, "meta=5").startswith("command line: meta ")


def test_field_below_a_single_value_is_told(path: Path) -> None:
    assert "seed is a single value" in fault(path, "seed.more=1")


@pytest.mark.parametrize("text", ["meta.inner_lr", "=3", "meta.inner_lr:0.2"])
def test_override_without_key_and_value_is_told(path: Path, text: str) -> None:
    assert fault(path, text) == f"command line: overrides look like meta.inner_lr=0.2, got {text!r}"


def test_override_whose_value_is_not_yaml_is_told(path: Path) -> None:
    assert fault(path, "meta.inner_lr=[1,").startswith("command line: the value of meta.inner_lr is not valid YAML: '[1,'")


@pytest.mark.parametrize("content", [b"seed: [1,\n  b: }", b"\xff\xfe\x00"])
def test_file_that_is_not_yaml_is_told(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert fault(path).startswith(f"{path}: cannot be read as YAML: ")


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "just words\n"])
def test_file_without_fields_is_told(path: Path, content: str) -> None:
    path.write_text(content, encoding="utf-8")
    assert fault(path).startswith(f"{path}: must hold fields such as 'seed: 1', got ")


def test_missing_file_is_told_with_the_known_ones(tmp_path: Path) -> None:
    message = fault(tmp_path / "none.yaml")
    assert message.startswith(f"{tmp_path / 'none.yaml'}: no such configuration; known: ")
    assert "digits" in message


def test_folder_in_place_of_the_file_is_told(tmp_path: Path) -> None:
    assert str(tmp_path) in fault(tmp_path)


def test_differences_are_dotted_fields_with_both_values() -> None:
    one = {"seed": 1, "meta": {"inner_lr": 1.0, "same": 2}}
    other = {"seed": 1, "meta": {"inner_lr": 0.2, "same": 2}, "more": True}
    assert differences(one, other) == ["meta.inner_lr: 1.0 there, 0.2 here", "more: None there, True here"]


def test_every_field_of_the_optimizer_has_a_docstring() -> None:
    training = Config.model_fields["student"].annotation.model_fields["training"].annotation  # type: ignore[union-attr]
    described = training.model_fields["batch_size"].description  # type: ignore[union-attr]
    assert described == "Images in a step."


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("aggregator.pooling=median", "aggregator.pooling must be one of 'transformer', 'mean' or 'max', got 'median'"),
        ("meta.distill=neither", "meta.distill must be one of 'features', 'logits' or 'both', got 'neither'"),
        ("meta.learns=[both]", "meta.learns must be one of 'both', 'aggregator' or 'student', got list of 1"),
        ("meta.student_start=null", "meta.student_start must be one of 'pretrained' or 'random', got None"),
    ],
)
def test_a_value_that_an_ablation_does_not_know_is_told(path: Path, override: str, told: str) -> None:
    assert fault(path, override) == f"command line: {told}"


def test_zeros_have_no_logits_to_distill(path: Path) -> None:
    told = fault(path, "meta.target=zeros", "meta.distill=both")
    assert told == "command line: meta.distill must be features where meta.target is zeros, got 'both'"


def test_later_fields_at_their_defaults_are_no_inputs_and_others_are(path: Path) -> None:
    plain = as_inputs(load_config(path))
    assert list(plain["aggregator"]) == ["depth", "heads", "dropout", "output_map", "training"]
    assert not {"distill", "learns", "student_start"} & set(plain["meta"])
    assert list(plain["student"]) == ["backbone", "training"]
    assert "objective" not in plain["experts"]
    changes = ["aggregator.pooling=max", "meta.distill=logits", "meta.learns=student", "meta.student_start=random"]
    changes += ["student.objective.name=mmd", "experts.objective.name=swad"]
    changed = as_inputs(load_config(path, changes))
    assert changed["experts"]["objective"]["name"] == "swad"
    assert changed["aggregator"]["pooling"] == "max"
    assert changed["student"]["objective"] == {"name": "mmd", "penalty": 1.0, "domains": 4}
    assert [changed["meta"][name] for name in ("distill", "learns", "student_start")] == ["logits", "student", "random"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["name=mmd", "penalty=-1"], "student.objective.penalty must be >= 0.0, got -1"),
        (["name=mmd", "width=3"], "student.objective.width is not a field; known here: domains, name, penalty"),
        (["name=swad", "tolerance=0.5"], "student.objective.tolerance must be >= 1.0, got 0.5"),
        (["name=coral", "domains=1"], "student.objective.domains must be >= 2, got 1"),
    ],
)
def test_a_fault_of_an_objective_is_told_with_its_fields(path: Path, changes: list[str], told: str) -> None:
    assert fault(path, *(f"student.objective.{change}" for change in changes)) == f"command line: {told}"


def test_an_unknown_objective_is_told_with_the_known_ones(path: Path) -> None:
    told = fault(path, "student.objective.name=best")
    assert told.startswith("command line: student.objective.name must be one of 'erm', 'coral', ") and told.endswith(", got 'best'")


def test_fields_of_an_objective_need_its_name(path: Path) -> None:
    assert fault(path, "student.objective.penalty=3") == f"{path}: student.objective.name is missing"
