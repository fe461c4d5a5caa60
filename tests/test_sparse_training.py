"""Sparse backbones in a run: what their training minimises, what a run folder remembers, and what is loaded from it."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from noise import SETTINGS, steady_run_in, train
from runs import ROOT
from torch import Tensor, nn

import dmoe
from dmoe.artifacts import load_tensors, read_json
from dmoe.backbones import build_backbone
from dmoe.config import (
    CONFIG_FOLDER,
    BackboneConfig,
    ERMConfig,
    ObjectiveConfig,
    TrainingConfig,
    as_inputs,
    load_config,
    objective_of,
)
from dmoe.errors import UserError
from dmoe.model import describe
from dmoe.models.sparse import balance_loss, routings, sparse_layers
from dmoe.objectives import ERM, Outputs
from dmoe.randomness import seed_of
from scripts.make_folder_sample import write_sample

DENSE = "student.backbone={name: small_vit}"
GMOE = "student.backbone={name: small_vit, sparse: {kind: gmoe, experts: 3, blocks: [0, 1], balance_weight: 0.7}}"
EXPERTS = "experts.backbone={name: small_vit, sparse: {kind: emoe, experts: 8, top_k: 3}}"
ERM_ALONE = ERMConfig()
ONE_STEP = TrainingConfig.model_validate({"batch_size": 12, "duration": "1 steps", "optimizer": {"lr": 1e-9}})


class Listening(ERM):
    """Remembers its own part of the loss, and all of it."""

    own, whole, images = 0.0, 0.0, torch.zeros(0)

    def loss(self, batch: Outputs, *, step: int) -> Tensor:
        found = super().loss(batch, step=step)
        assert batch.images is not None
        self.own, self.images = found.item(), batch.images
        return found

    def gradient(self, loss: Callable[..., Tensor], tensors: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> Tensor:
        found = super().gradient(loss, tensors, parameters)
        self.whole = found.item()
        return found


def trained(folder: Path, backbone: str, training: TrainingConfig, objective: ObjectiveConfig = ERM_ALONE):
    run = steady_run_in(folder, backbone)
    network = run.network(run.config.student_backbone, "student", to_train=True)
    members = torch.arange(len(run.source))
    run.train_network(run.folder.stage("any", run.facts()), network, members, training, objective=objective)
    return run, network


@pytest.fixture
def listening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Listening:
    """What every training minimises meanwhile."""
    found = Listening(steady_run_in(tmp_path).dataset.task)
    monkeypatch.setattr("dmoe.run.build_objective", lambda *_, **__: found)
    return found


def test_balance_of_every_sparse_layer_is_added_by_its_weight(tmp_path: Path, listening: Listening) -> None:
    run, network = trained(tmp_path, GMOE, ONE_STEP)
    network.train()
    torch.manual_seed(seed_of(seed_of(run.config.seed, "any"), "dropout", 0))  # as the step began
    with routings(network) as found:
        network(listening.images)
    expected = sum(0.7 * balance_loss(routing).item() for routing in found.values())
    assert len(found) == 2 and expected > 1e-3
    assert listening.whole - listening.own == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("backbone", [DENSE, GMOE.replace("0.7", "0"), "student.backbone={name: small_vit, sparse: {kind: emoe}}"])
def test_networks_without_a_balance_loss_add_nothing(tmp_path: Path, backbone: str, listening: Listening) -> None:
    trained(tmp_path, backbone.replace("kind: emoe", "kind: emoe, experts: 16"), ONE_STEP)
    assert listening.whole == listening.own


def test_balance_makes_experts_be_used_alike(tmp_path: Path) -> None:
    training = TrainingConfig.model_validate({"batch_size": 25, "duration": "150 steps", "optimizer": {"lr": 3e-3}})
    spread = []
    for number, weight in enumerate(("0.0", "10.0")):
        run, network = trained(tmp_path / str(number), GMOE.replace("0.7", weight), training)
        with routings(network) as found:
            network(run.source.images(torch.arange(100)))
        spread.append(sum(routing.load.double().std().item() for routing in found.values()))
    assert spread[1] < 0.6 * spread[0]


def test_training_with_noise_and_dropout_is_the_same_again_and_by_domains_too(tmp_path: Path) -> None:
    training = TrainingConfig.model_validate({"batch_size": 12, "duration": "3 steps", "optimizer": {"lr": 0.01}})
    for objective in (objective_of("erm", {}), objective_of("fish", {"domains": 3, "inner_lr": 0.01})):
        weights = []
        for again in range(2):
            weights.append(trained(tmp_path / f"{objective.name}{again}", GMOE, training, objective)[1].state_dict())
        assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_all_stages_run_and_the_run_folder_gives_the_same_predictions(tmp_path: Path) -> None:
    run = steady_run_in(tmp_path, EXPERTS, GMOE)
    train(run)
    describe(run.folder, run.dataset)
    assert "kind: gmoe" in (tmp_path / "config.yaml").read_text()
    trained_student = load_tensors(tmp_path / "meta" / "weights.safetensors")[0]
    assert trained_student["student.features.blocks.1.mlp.w1"].shape == (3, 64, 256)
    assert load_tensors(tmp_path / "experts" / "expert_00" / "weights.safetensors")[0][
        "model.features.blocks.0.mlp.units"
    ].shape == (8, 32)

    model = dmoe.load(tmp_path)
    assert len(sparse_layers(model.student.features)) == 2
    images = run.dataset.splits["target"].images(torch.arange(10))
    network = run.network(run.config.student_backbone, "other", to_train=False)
    network.load_state_dict({key.removeprefix("student."): t for key, t in trained_student.items() if key.startswith("student.")})
    with torch.no_grad():
        torch.testing.assert_close(model.student.logits(images), network.eval()(images), rtol=1e-6, atol=1e-6)
    adapted = [dmoe.load(tmp_path).adapt(images).predict(images) for _ in range(2)]
    assert torch.equal(*adapted)

    other = steady_run_in(tmp_path, EXPERTS, GMOE.replace("experts: 3", "experts: 2"))
    assert other.student_stage.manifest.exists()
    with pytest.raises(UserError, match=r"sparse\.experts"):
        other.student_stage.finished()


def test_a_dense_backbone_is_recorded_as_before_and_a_sparse_one_with_all_of_its_fields() -> None:
    path = CONFIG_FOLDER / "digits.yaml"
    plain = as_inputs(load_config(path))["experts"]["backbone"]
    assert plain == {"name": "small_conv", "weights": "none", "last_relu": True}
    sparse = as_inputs(load_config(path, [GMOE]))["student"]["backbone"]["sparse"]
    assert sparse == {
        "kind": "gmoe",
        "experts": 3,
        "top_k": 1,
        "router": "cosine",
        "capacity_factor": None,
        "blocks": [0, 1],
        "gate_noise": 1.0,
        "balance_weight": 0.7,
        "dropout": 0.1,
        "drop_path": 0.1,
    }


@pytest.mark.parametrize(
    ("sparse", "told"),
    [
        ("{kind: emoe, top_k: 30}", "sparse must have top_k <= experts, 30 is more than 24"),
        ("{kind: moe}", "sparse.kind must be one of 'gmoe', 'emoe', got 'moe'"),
        ("{experts: 3}", "sparse.kind is missing"),
        ("{kind: gmoe, router: average}", "sparse.router must be one of 'cosine' or 'linear', got 'average'"),
        ("{kind: gmoe, width: 1}", "sparse.width is not a field; known here: capacity_factor, blocks, dropout, drop_path, kind"),
        ("{kind: gmoe, blocks: last}", "sparse.blocks must be last_two, every_two or a list of block numbers, got 'last'"),
        ("{kind: gmoe, blocks: []}", "sparse.blocks must be last_two, every_two or a list of block numbers"),
        ("{kind: gmoe, gate_noise: 0}", "sparse must have balance_weight 0 where gate_noise is 0"),
        ("{kind: gmoe, capacity_factor: 0}", "sparse.capacity_factor must be > 0"),
    ],
)
def test_a_fault_of_the_section_is_told_with_its_field(sparse: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(CONFIG_FOLDER / "digits.yaml", [f"student.backbone={{name: small_vit, sparse: {sparse}}}"])
    assert str(caught.value).startswith(f"command line: student.backbone.{told}")


def test_a_gmoe_by_name_has_the_published_layers_of_its_own_accord_and_is_no_emoe() -> None:
    named = BackboneConfig(name="gmoe_vit_s16")
    layers = sparse_layers(build_backbone(named, image_shape=(3, 32, 32), num_outputs=2).features)
    assert {name: len(layer.w1) for name, layer in layers.items()} == {"blocks.8.mlp": 6, "blocks.10.mlp": 6}
    emoe = BackboneConfig.model_validate({"name": "gmoe_vit_s16", "sparse": {"kind": "emoe"}})
    with pytest.raises(UserError, match=r"^backbone\.sparse\.kind: gmoe_vit_s16 is a gmoe, got emoe"):
        build_backbone(emoe, image_shape=(3, 32, 32), num_outputs=2)


@pytest.mark.slow
def test_run_py_goes_through_all_stages_and_bad_input_is_one_line_and_status_2(tmp_path: Path) -> None:
    write_sample(tmp_path / "pictures", images_per_class=3)
    words = ["run.py", "--dataset", "folders", "--config", "configs/small_pictures.yaml", "--gpu", "-1", "--threads", "1"]
    words += ["--data_dir", str(tmp_path / "pictures"), "data.target_domains=[045_degrees,225_degrees]", "data.workers=0"]
    words += [word for word in SETTINGS if "duration" not in word and "evaluate_every" not in word]
    words += ["experts.training.duration=4 steps", "aggregator.training.duration=4 steps", "student.training.duration=4 steps"]
    words += ["meta.duration=2 steps", EXPERTS]

    def run(*more: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, *words, *more]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)

    ended = run("--run_dir", str(tmp_path / "run"), GMOE)
    assert ended.returncode == 0, ended.stderr
    assert read_json(tmp_path / "run" / "student" / "manifest.json")["inputs"]["backbone"]["sparse"]["kind"] == "gmoe"
    again = run("--run_dir", str(tmp_path / "run"), GMOE)
    assert again.stdout.count("already finished from the same inputs") >= 3
    for change in ("{name: small_vit, sparse: {kind: emoe, experts: 7}}", "{name: small_conv, sparse: {kind: gmoe}}"):
        ended = run("--run_dir", str(tmp_path / "other"), f"student.backbone={change}")
        assert ended.returncode == 2
        assert ended.stderr.count("\n") == 1 and ": backbone.sparse" in f": {ended.stderr}"
