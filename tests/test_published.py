"""The public code's checkpoint files: read as they are, written as they are, and nothing in them runs."""

import copy
import os
import pickle
import random
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from told import names, one_line
from torch import Tensor, nn

from dmoe.artifacts import load_into, load_tensors
from dmoe.errors import UserError
from dmoe.models.aggregator import Aggregator
from dmoe.models.networks import Network, build_network
from dmoe.models.torchvision_import import torchvision
from dmoe.published import PublishedFolder, read_domain_split, write_published

SHAPE = (3, 64, 64)
IWILDCAM, CAMELYON = "iwildcam_10experts_seed1", "camelyon_5experts_seed3407"


class Split(nn.Module):
    """torchvision's modules in the student's order: a straight line without what is not a module."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        *features, head = copy.deepcopy(whole).children()
        self.features = nn.Sequential(*features)
        if len(features) == 1:
            self.features.add_module("avg_pool", nn.AdaptiveAvgPool2d(1))
        self.classifier = nn.Sequential(head)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(images).flatten(1))
        return logits


class Attend(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(width, 16, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attend(x, x, x)[0]
        return out


class Feed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        layers = (nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, width), nn.Dropout(0.1))
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Normed(nn.Module):
    def __init__(self, width: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(width), fn


class Layers(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        halves = ([Normed(width, Attend(width)), Normed(width, Feed(width))] for _ in range(depth))
        self.layers = nn.ModuleList(nn.ModuleList(pair) for pair in halves)


class Selector(nn.Module):
    """The aggregator under the names that its files have."""

    def __init__(self, *, width: int, outputs: int, depth: int = 1) -> None:
        super().__init__()
        self.transformer = Layers(width, depth)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, outputs))

    def pooled(self, tokens: Tensor) -> Tensor:
        for half in (module for module in self.transformer.modules() if isinstance(module, Normed)):
            tokens = tokens + half.fn(half.norm(tokens))
        return tokens.mean(dim=1)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.mlp(self.pooled(tokens))
        return logits


def vision(name: str, outputs: int) -> nn.Module:
    """torchvision's network with another head, and batch-norm as after some training."""
    torch.manual_seed(len(name) + outputs)
    net: nn.Module = torchvision().models.get_model(name, weights=None)
    head = "fc" if name.startswith("resnet") else "classifier"
    setattr(net, head, nn.Linear(net.get_submodule(head).in_features, outputs))  # type: ignore[arg-type]
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
            module.num_batches_tracked.fill_(7)  # type: ignore[union-attr]
    return net.eval()


class TinyResNet(nn.Module):
    """torchvision's ResNet, 16 wide everywhere."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        block = torchvision().models.resnet.BasicBlock
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.relu, self.maxpool = nn.ReLU(), nn.MaxPool2d(2)
        self.layer1, self.layer2, self.layer3, self.layer4 = (nn.Sequential(block(16, 16), block(16, 16)) for _ in range(4))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, outputs)


def tiny(outputs: int = 5) -> Network:
    *features, _ = (whole := TinyResNet(outputs)).children()
    return Network(features=nn.Sequential(*features, nn.Flatten()), head=whole.fc).eval()


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return vision("resnet50", 182)


@pytest.fixture(scope="module")
def densenet() -> nn.Module:
    return vision("densenet121", 1)


@pytest.fixture(scope="module")
def selector() -> Selector:
    torch.manual_seed(0)
    return Selector(width=1024, outputs=1).eval()


@pytest.fixture(scope="module")
def iwildcam(resnet: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> PublishedFolder:
    folder = tmp_path_factory.mktemp("iwildcam")
    torch.save(resnet.state_dict(), folder / f"{IWILDCAM}_9_exp_best.pth")
    torch.save(Split(resnet).state_dict(), folder / f"{IWILDCAM}_meta_student_best.pth")
    return PublishedFolder(folder, dataset="iwildcam", experts=10, seed=1)


@pytest.fixture(scope="module")
def camelyon(densenet: nn.Module, selector: Selector, tmp_path_factory: pytest.TempPathFactory) -> PublishedFolder:
    folder = tmp_path_factory.mktemp("camelyon")
    torch.save(densenet.state_dict(), folder / f"{CAMELYON}_0_exp_best.pth")
    torch.save(Split(densenet).state_dict(), folder / f"{CAMELYON}_pretrained_exp_best.pth")
    torch.save(selector.state_dict(), folder / f"{CAMELYON}_meta_selector_best.pth")
    return PublishedFolder(folder, dataset="camelyon", experts=5, seed=3407)


def network(name: str, outputs: int, *, last_relu: bool = True) -> Network:
    return build_network(name, image_shape=SHAPE, num_outputs=outputs, last_relu=last_relu).eval()


@torch.no_grad()
def test_resnet_expert_is_torchvisions_network_and_its_features(iwildcam: PublishedFolder, resnet: nn.Module) -> None:
    ours, x = network("resnet50", 182), torch.randn(2, *SHAPE)
    iwildcam.load_expert(9, ours)
    assert torch.equal(ours(x), resnet(x))
    assert torch.equal(ours.features(x), Split(resnet).features(x).flatten(1))


@torch.no_grad()
def test_resnet_student_is_the_straight_line_of_modules(iwildcam: PublishedFolder, resnet: nn.Module) -> None:
    ours, x = network("resnet50", 182), torch.randn(2, *SHAPE)
    iwildcam.load_student("meta", ours)
    assert torch.equal(ours(x), Split(resnet)(x))


@torch.no_grad()
def test_densenet_expert_with_its_last_relu_is_torchvisions_network(camelyon: PublishedFolder, densenet: nn.Module) -> None:
    ours, x = network("densenet121", 1), torch.randn(2, *SHAPE)
    camelyon.load_expert(0, ours)
    assert torch.equal(ours(x), densenet(x))


@torch.no_grad()
def test_densenet_without_its_last_relu_is_pooled_straight_after_the_last_norm(
    camelyon: PublishedFolder, densenet: nn.Module
) -> None:
    expert, student = (network("densenet121", 1, last_relu=False) for _ in range(2))
    camelyon.load_expert(0, expert)
    camelyon.load_student("pretrained", student)
    line, x = Split(densenet), torch.randn(2, *SHAPE)
    features = line.features(x).flatten(1)
    assert (features < 0).any()
    assert torch.equal(expert.features(x), features)
    assert torch.equal(student.features(x), features)
    assert torch.equal(student(x), line(x))


@torch.no_grad()
def test_aggregator_gives_the_same_targets_and_logits(camelyon: PublishedFolder, selector: Selector) -> None:
    ours, tokens = Aggregator(width=1024, num_outputs=1, depth=1, heads=16, dropout=0.1).eval(), torch.randn(3, 5, 1024)
    camelyon.load_aggregator("meta", ours)
    torch.testing.assert_close(ours(tokens), selector.pooled(tokens), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.logits(tokens), selector(tokens), rtol=1e-5, atol=1e-6)


def test_every_tensor_of_a_file_is_there_under_our_names(iwildcam: PublishedFolder, camelyon: PublishedFolder) -> None:
    resnet50, densenet121 = (list(network(name, 2).state_dict()) for name in ("resnet50", "densenet121"))
    assert len(resnet50) == 320
    assert len(densenet121) == 727
    aggregator = list(Aggregator(width=16, num_outputs=2, depth=1, heads=16, dropout=0.1).state_dict())
    assert len(aggregator) == 16
    assert list(iwildcam.expert(9)) == list(iwildcam.student("meta")) == resnet50
    assert list(camelyon.expert(0)) == list(camelyon.student("pretrained")) == densenet121
    assert list(camelyon.aggregator("meta")) == aggregator


def test_tensors_under_our_names_fit_our_modules(camelyon: PublishedFolder, densenet: nn.Module) -> None:
    ours = network("densenet121", 1)
    load_into(ours, camelyon.expert(0), where="expert")
    assert torch.equal(ours.head.weight, densenet.classifier.weight)  # type: ignore[union-attr,arg-type]


# Which checkpoints a folder holds


def test_files_are_where_their_names_say(iwildcam: PublishedFolder) -> None:
    paths = [
        iwildcam.expert_path(3),
        *(iwildcam.student_path(stage) for stage in ("meta", "pretrained")),
        *(iwildcam.aggregator_path(stage) for stage in ("meta", "pretrained")),
    ]
    endings = ["3_exp", "meta_student", "pretrained_exp", "meta_selector", "pretrained_selector"]
    assert [path.relative_to(iwildcam.folder).as_posix() for path in paths] == [f"{IWILDCAM}_{end}_best.pth" for end in endings]


@pytest.mark.parametrize(
    ("dataset", "experts", "seed"), [("camelyon", 10, 1), ("iwildcam", 5, 1), ("iwildcam", 10, 2), ("iwildca", 10, 1)]
)
def test_checkpoints_of_something_else_are_recognised(iwildcam: PublishedFolder, dataset: str, experts: int, seed: int) -> None:
    with pytest.raises(UserError) as caught:
        PublishedFolder(iwildcam.folder, dataset=dataset, experts=experts, seed=seed)
    expected = f"{iwildcam.folder}: holds {IWILDCAM}, expected {dataset}_{experts}experts_seed{seed}: "
    assert one_line(caught).startswith(expected)


@pytest.mark.parametrize("content", [None, {}, {"weights.pth": b"", "domain_split.pkl": b""}])
def test_a_folder_without_checkpoints_is_told(tmp_path: Path, content: dict[str, bytes] | None) -> None:
    folder = tmp_path / "model"
    if content is not None:
        folder.mkdir()
        for name, data in content.items():
            (folder / name).write_bytes(data)
    with pytest.raises(UserError) as caught:
        PublishedFolder(folder, dataset="fmow", experts=4, seed=42)
    assert one_line(caught).startswith(f"{folder}: ")


def test_a_missing_file_is_named(iwildcam: PublishedFolder) -> None:
    with pytest.raises(UserError, match=f"{IWILDCAM}_4_exp_best.pth: no such weights file"):
        iwildcam.expert(4)


# Faults are told in the file's own words


def saved_expert(folder: Path, tensors: object) -> PublishedFolder:
    torch.save(tensors, folder / f"{IWILDCAM}_0_exp_best.pth")
    return PublishedFolder(folder, dataset="iwildcam", experts=10, seed=1)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"fc.weight": None}, "it lacks fc.weight"),
        ({"fc.weight": None, "fc.bias": None}, "it lacks fc.weight and 1 more"),
        ({"conv1.weight": None}, "it lacks conv1.weight"),
        ({"layer3.1.bn2.running_var": None}, "it lacks layer3.1.bn2.running_var"),
        ({"layer3.2.bn2.running_var": torch.ones(1)}, "it has no place for layer3.2.bn2.running_var"),
        ({"classifier.weight": torch.ones(1)}, "it holds classifier.weight"),
        ({"head.weight": torch.ones(5, 16)}, "it holds head.weight"),
        ({"head.weight": torch.ones(5, 16), "fc.weight": None}, "it holds head.weight"),
        ({"fc.weight": torch.ones(182, 16)}, "fc.weight is [182, 16], the network's is [5, 16]"),
        ({"layer1.0.bn1.bias": torch.ones(17)}, "layer1.0.bn1.bias is [17], the network's is [16]"),
        ({"fc.bias": torch.ones(5).to_sparse()}, "fc.bias is torch.float32, torch.sparse_coo"),
        ({"fc.bias": torch.ones(5, dtype=torch.complex64)}, "fc.bias is torch.complex64"),
        ({"fc.bias": torch.ones(5, device="meta")}, "fc.bias is torch.float32, torch.strided, on meta"),
        ({"fc.\nbias": torch.ones(5)}, r"must hold a state dict, it has a tensor called 'fc.\nbias'"),
        ({7: torch.ones(5)}, "must hold a state dict, it has a tensor called 7"),
    ],
)
def test_a_tensor_that_is_missing_left_over_or_of_another_shape_is_named(
    tmp_path: Path, changes: dict[Any, Tensor | None], told: str
) -> None:
    tensors = {**TinyResNet(5).state_dict(), **changes}
    folder = saved_expert(tmp_path, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    with pytest.raises(UserError) as caught:
        folder.load_expert(0, tiny())
    assert one_line(caught).startswith(f"{folder.expert_path(0)}: {told}")


def test_a_failing_load_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    ours = tiny()
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(UserError):
        saved_expert(tmp_path, {**TinyResNet(5).state_dict(), "fc.bias": torch.ones(6)}).load_expert(0, ours)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


def test_a_file_of_other_classes_is_told_with_the_files_own_name(iwildcam: PublishedFolder) -> None:
    other = network("resnet50", 62)
    with pytest.raises(UserError) as caught:
        iwildcam.load_expert(9, other)
    assert one_line(caught) == f"{iwildcam.expert_path(9)}: fc.weight is [182, 2048], the network's is [62, 2048]"
    with pytest.raises(UserError) as caught:
        iwildcam.load_student("meta", other)
    path = iwildcam.student_path("meta")
    assert one_line(caught) == f"{path}: classifier.0.weight is [182, 2048], the network's is [62, 2048]"


def test_an_expert_of_the_other_family_is_told(iwildcam: PublishedFolder, camelyon: PublishedFolder) -> None:
    resnet, densenet, neither = network("resnet18", 1), network("densenet121", 1), network("small_conv", 1)
    for folder, number, ours, kind in (
        (camelyon, 0, resnet, "DenseNet"),
        (iwildcam, 9, densenet, "ResNet"),
        (iwildcam, 9, neither, "ResNet"),
    ):
        with pytest.raises(UserError) as caught:
            folder.load_expert(number, ours)
        assert one_line(caught).startswith(f"{folder.expert_path(number)}: holds torchvision's {kind}, ")


def test_an_expert_of_another_depth_is_told(iwildcam: PublishedFolder) -> None:
    with pytest.raises(UserError, match=r"has no place for layer1\.0\.conv3\.weight and 197 more"):
        iwildcam.load_expert(9, network("resnet18", 182))


def test_a_student_in_place_of_an_expert_is_told_and_the_other_way_round(iwildcam: PublishedFolder, tmp_path: Path) -> None:
    tmp = saved_expert(tmp_path, torch.load(iwildcam.student_path("meta"), weights_only=True))
    os.link(iwildcam.expert_path(9), tmp.student_path("meta"))
    with pytest.raises(UserError) as caught:
        tmp.expert(0)
    assert "neither torchvision's ResNet nor torchvision's DenseNet" in one_line(caught)
    with pytest.raises(UserError) as caught:
        tmp.student("meta")
    assert "it holds conv1.weight and 319 more: a published student has no tensor of that name" in one_line(caught)


def saved_selector(folder: Path, tensors: object) -> PublishedFolder:
    torch.save(tensors, folder / f"{IWILDCAM}_meta_selector_best.pth")
    return PublishedFolder(folder, dataset="iwildcam", experts=10, seed=1)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"depth": 1}, "holds an aggregator of depth 2: set aggregator.depth=2"),
        ({"heads": 8}, "a published aggregator has 16 heads, though no file tells: set aggregator.heads=16"),
        ({"pooling": "mean"}, "a published aggregator is a transformer: set aggregator.pooling=transformer"),
        ({"output_map": True}, "a published aggregator has no output map: set aggregator.output_map=false"),
        ({"num_outputs": 4}, "mlp.1.weight is [5, 32], the network's is [4, 32]"),
        ({"width": 64}, "transformer.layers.0.0.norm.weight is [32], the network's is [64]"),
    ],
)
def test_an_aggregator_of_other_sizes_is_told(tmp_path: Path, settings: dict[str, Any], told: str) -> None:
    folder = saved_selector(tmp_path, Selector(width=32, outputs=5, depth=2).state_dict())
    ours = Aggregator(**{"width": 32, "num_outputs": 5, "depth": 2, "heads": 16, "dropout": 0.1, **settings})
    with pytest.raises(UserError) as caught:
        folder.load_aggregator("meta", ours)
    assert one_line(caught) == f"{folder.aggregator_path('meta')}: {told}"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"transformer.layers.0.1.fn.net.3.bias": None}, "it lacks transformer.layers.0.1.fn.net.3.bias"),
        ({"transformer.layers.0.1.fn.net.9.bias": torch.ones(1)}, "it has no place for transformer.layers.0.1.fn.net.9.bias"),
        ({"blocks.0.attention.in_proj_bias": torch.ones(96)}, "it holds blocks.0.attention.in_proj_bias"),
    ],
)
def test_a_tensor_of_an_aggregator_is_named_as_in_the_file(tmp_path: Path, changes: dict[str, Tensor | None], told: str) -> None:
    tensors = {**Selector(width=32, outputs=5).state_dict(), **changes}
    folder = saved_selector(tmp_path, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    with pytest.raises(UserError) as caught:
        folder.load_aggregator("meta", Aggregator(width=32, num_outputs=5, depth=1, heads=16, dropout=0.1))
    assert one_line(caught).startswith(f"{folder.aggregator_path('meta')}: {told}")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weights_with_changed_bytes_load_or_are_refused_in_one_line(tmp_path: Path) -> None:
    draw = random.Random(0)
    ours = Aggregator(width=16, num_outputs=2, depth=1, heads=16, dropout=0.1)
    path = tmp_path / f"{IWILDCAM}_meta_selector_best.pth"
    for zipped in (True, False):
        torch.save(Selector(width=16, outputs=2).state_dict(), path, _use_new_zipfile_serialization=zipped)
        folder = PublishedFolder(tmp_path, dataset="iwildcam", experts=10, seed=1)
        content, refused = path.read_bytes(), 0
        for _ in range(400):
            path.write_bytes(mutated(content, draw))
            try:
                folder.load_aggregator("meta", ours)
            except UserError as error:
                assert "\n" not in str(error)
                refused += 1
        assert refused > 50


# domain_split.pkl

GROUPS = [[17, 3], [250, 70_000, 5], [4]]
EXPERT_OF = {17: 0, 3: 0, 250: 1, 70_000: 1, 5: 1, 4: 2}


def split_file(folder: Path, content: bytes) -> Path:
    path = folder / "domain_split.pkl"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("outer", [tuple, list])
def test_a_domain_split_of_any_protocol_is_read(tmp_path: Path, protocol: int, outer: Callable[[Sequence[object]], object]) -> None:
    path = split_file(tmp_path, pickle.dumps(outer([GROUPS, EXPERT_OF]), protocol=protocol))
    assert read_domain_split(path) == (GROUPS, EXPERT_OF)


def test_a_domain_split_of_many_domains_is_read(tmp_path: Path) -> None:
    groups = [list(range(start, 20_000, 10)) for start in range(10)]
    expert_of = {domain: domain % 10 for domain in range(20_000)}
    assert read_domain_split(split_file(tmp_path, pickle.dumps((groups, expert_of)))) == (groups, expert_of)


class Reduced:
    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self._reduced = call, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self._reduced


def dumped(value: object, protocol: int = 4) -> bytes:
    return pickle.dumps(value, protocol=protocol)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_program_in_a_domain_split_is_named_and_does_not_run(tmp_path: Path, protocol: int) -> None:
    witness = tmp_path / "ran"
    path = split_file(tmp_path, dumped((GROUPS, Reduced(os.system, f"touch {witness}")), protocol))
    with pytest.raises(UserError) as caught:
        read_domain_split(path)
    assert one_line(caught).startswith(f"{path}: holds more than lists, dicts and numbers ({os.system.__module__}.system): ")
    assert not witness.exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"cbuiltins\neval\n.", "builtins.eval"),
        (dumped(eval), "builtins.eval"),
        (b"(ios\nsystem\n.", "os.system"),
        (b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94h\x00h\x01\x93.", "os.system"),
        (b"\x80\x04\x8c\x05\x1b[2J\n\x8c\x01x\x93.", r"\x1b[2J\n.x"),
        (dumped((GROUPS, {np.int64(3): 0})), "multiarray.scalar"),
        (dumped(np.zeros(2)), "multiarray._reconstruct"),
        (dumped(OrderedDict(EXPERT_OF)), "collections.OrderedDict"),
        (b"\x82\x01.", "pickle's EXT1"),
        (b"Pabc\n.", "pickle's PERSID"),
        (b"K\x01Q.", "pickle's BINPERSID"),
        (b"K\x01)R.", "pickle's EMPTY_TUPLE"),
        (dumped({1, 2}), "pickle's EMPTY_SET"),
        (dumped(b"abc"), "pickle's SHORT_BINBYTES"),
    ],
)
def test_what_is_no_list_dict_or_number_is_named(tmp_path: Path, content: bytes, named: str) -> None:
    path = split_file(tmp_path, content)
    with pytest.raises(UserError) as caught:
        read_domain_split(path)
    found = re.search(r"holds more than lists, dicts and numbers \((.*)\): ", one_line(caught))
    assert found is not None
    assert found[1].endswith(named)


def test_a_value_of_another_class_has_no_shape_to_hide_in(tmp_path: Path) -> None:
    for content in (dumped((GROUPS, Reduced(dict, EXPERT_OF))), dumped((Reduced(list, GROUPS), EXPERT_OF))):
        with pytest.raises(UserError, match=r"builtins\."):
            read_domain_split(split_file(tmp_path, content))


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02]r\xff\xff\xff\x7f.",  # a memo of 34 GB
        b"]p2147483647\n.",
        b"\x80\x02})" + b"\x85" * 900_000 + b"K\x00s.",  # a key whose hash overflows the C stack
        b"\x80\x02}K\x00" + b"K\x00\x86" * 300_000 + b"K\x00s.",
        b"\x80\x02" + b"]" * 900_000 + b"a" * 899_999 + b".",
        b"(" * 1_000_000 + b".",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x8b\xff\xff\xff\x7f.",
        b"I" + b"9" * 100_000 + b"\n.",
        b"]" + b" " * (1 << 20),
        dumped(([list(range(50_000))] * 50_000, {})),  # sizes multiply
    ],
    ids=range(12),
)
def test_what_would_fill_the_memory_or_the_stack_is_refused_at_once(tmp_path: Path, content: bytes) -> None:
    path, began = split_file(tmp_path, content), time.perf_counter()
    with pytest.raises(UserError) as caught:
        read_domain_split(path)
    assert one_line(caught).startswith(f"{path}: ")
    assert len(one_line(caught)) < 400
    assert time.perf_counter() - began < 5


def test_a_list_in_itself_is_refused(tmp_path: Path) -> None:
    group: list[Any] = []
    group.append(group)
    for content in (dumped((group, {})), dumped(([group], {1: 0})), dumped(group)):
        with pytest.raises(UserError):
            read_domain_split(split_file(tmp_path, content))


@pytest.mark.parametrize(
    "content", [b"", b"\x80", b"not a pickle", b"\x80\x09K\x01.", b"K\x01", b"s.", b"h\x07.", b"I1x\n.", b"\xff" * 50]
)
def test_what_is_no_pickle_is_refused(tmp_path: Path, content: bytes) -> None:
    path = split_file(tmp_path, content)
    with pytest.raises(UserError) as caught:
        read_domain_split(path)
    assert one_line(caught).startswith(f"{path}: damaged, not a whole pickle: ")


def test_a_split_that_is_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    for protocol in (0, 4):
        content = dumped((GROUPS, EXPERT_OF), protocol)
        for kept in range(len(content)):
            with pytest.raises(UserError):
                read_domain_split(split_file(tmp_path, content[:kept]))


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (3, "must hold a list of domains"),
        ([GROUPS], "must hold a list of domains"),
        ([GROUPS, EXPERT_OF, 1], "must hold a list of domains"),
        ((EXPERT_OF, GROUPS), "must hold a list of domains"),
        (([1, 2], {1: 0}), "must hold a list of domains"),
        (("ab", {}), "must hold a list of domains"),
        (([["a"]], {"a": 0}), "no whole number"),
        (([[1.0]], {1.0: 0}), "no whole number"),
        (([[1.0]], {1: 0}), "no whole number"),
        (([[1]], {1.0: 0}), "no whole number"),
        (([[1]], {1: 0.0}), "no whole number"),
        (([[True]], {True: 0}), "no whole number"),
        (([[1]], {1: False}), "no whole number"),
        (([[None]], {None: 0}), "no whole number"),
        (([[1 << 70]], {1 << 70: 0}), "no whole number"),
        (([[[1]]], {1: 0}), "no whole number"),
        (([[1, 2]], {1: 0}), "lists 2 domains, but gives 1 to experts"),
        (([[1]], {1: 0, 2: 0}), "lists 1 domains, but gives 2 to experts"),
        (([[1], [2]], {1: 0, 2: 0}), "contradicts itself about the expert of domain 2"),
        (([[1, 1]], {1: 0, 2: 0}), "contradicts itself about the expert of domain 2"),
        (([[1], [1]], {1: 0, 2: 1}), "contradicts itself about the expert of domain 1"),
    ],
)
def test_what_is_no_split_or_contradicts_itself_is_told(tmp_path: Path, value: object, told: str) -> None:
    path = split_file(tmp_path, dumped(value))
    with pytest.raises(UserError) as caught:
        read_domain_split(path)
    assert one_line(caught).startswith(f"{path}: ")
    assert told in one_line(caught)


def mutated(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        position, kind = draw.randrange(len(changed)), draw.randrange(4)
        if kind == 0:
            changed[position] = draw.randrange(256)
        elif kind == 1:
            changed[position] ^= 1 << draw.randrange(8)
        elif kind == 2:
            del changed[position : position + draw.randint(1, 4)]
        else:
            changed[position:position] = draw.randbytes(draw.randint(1, 4))
        changed = changed or bytearray(b".")
    return bytes(changed)


def test_only_a_split_or_one_line_comes_out_of_any_bytes(tmp_path: Path) -> None:
    draw, read = random.Random(0), 0
    good = [dumped((GROUPS, EXPERT_OF), protocol) for protocol in (0, 2, 4)]
    alphabet = bytes({byte for content in good for byte in content} | set(b"cioRbP}](.tljuseaQ\x81\x82\x85\x86\x87\x8f\x93\x94"))
    for number in range(6000):
        opcodes = bytes(draw.choices(alphabet, k=draw.randint(1, 40))) + b"."
        content = mutated(draw.choice(good), draw) if number % 3 else opcodes
        try:
            groups, expert_of = read_domain_split(split_file(tmp_path, content))
        except UserError as error:
            assert "\n" not in str(error)
            assert str(error).isprintable()
            continue
        read += 1
        assert expert_of == {domain: expert for expert, group in enumerate(groups) for domain in group}
        assert all(type(number) is int for item in expert_of.items() for number in item)
    assert read > 10


def test_partition_is_the_expert_of_each_domain(tmp_path: Path) -> None:
    split_file(tmp_path, dumped((GROUPS, EXPERT_OF)))
    (tmp_path / "fmow_3experts_seed42_0_exp_best.pth").touch()
    (tmp_path / "fmow_4experts_seed42_0_exp_best.pth").touch()
    assert PublishedFolder(tmp_path, dataset="fmow", experts=3, seed=42).partition() == EXPERT_OF
    with pytest.raises(UserError, match=r"domain_split\.pkl: shares the domains among 3 experts, expected 4"):
        PublishedFolder(tmp_path, dataset="fmow", experts=4, seed=42).partition()


def test_partition_is_unknown_without_a_domain_split(iwildcam: PublishedFolder) -> None:
    assert iwildcam.partition() is None


# Writing


def aggregator(width: int, outputs: int, **settings: Any) -> Aggregator:
    return Aggregator(**{"width": width, "num_outputs": outputs, "depth": 1, "heads": 16, "dropout": 0.1, **settings})


def write(folder: Path, experts: list[Network], student: Network, **changes: Any) -> list[Path]:
    selector = aggregator(student.width, student.head.out_features)
    parts = {"aggregator": selector, "pretrained_student": student, "pretrained_aggregator": selector, **changes}
    groups = {domain: domain % len(experts) for domain in (9, 2, 4, 7)}
    return write_published(folder, dataset="pets", seed=7, experts=experts, student=student, groups=groups, **parts)


def raw(path: Path) -> OrderedDict[str, Tensor]:
    loaded: OrderedDict[str, Tensor] = torch.load(path, weights_only=True)
    return loaded


def assert_same_form(ours: OrderedDict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Names, their order, shapes and types."""
    assert type(ours) is OrderedDict
    assert [(name, t.shape, t.dtype) for name, t in ours.items()] == [(name, t.shape, t.dtype) for name, t in theirs.items()]


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
@torch.no_grad()
def test_what_is_written_is_a_file_of_torchvisions_network(tmp_path: Path, name: str) -> None:
    ours, whole, x = network(name, 5, last_relu=False), vision(name, 5), torch.randn(1, *SHAPE)
    files = write(tmp_path, [ours], ours)
    line, selector = Split(whole), Selector(width=ours.width, outputs=5)
    assert_same_form(raw(files[0]), whole.state_dict())
    for path in (files[2], files[4]):
        assert_same_form(raw(path), line.state_dict())
    for path in (files[1], files[3]):
        assert_same_form(raw(path), selector.state_dict())
    whole.load_state_dict(raw(files[0]))
    line.load_state_dict(raw(files[4]))
    assert torch.equal(Split(whole)(x), ours(x))
    assert torch.equal(line(x), ours(x))


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    experts, student, selector = [tiny(), tiny()], tiny(), aggregator(16, 5)
    files = write(tmp_path / "deep" / "out", experts, student, aggregator=selector, pretrained_student=None)
    endings = ["0_exp", "1_exp", "pretrained_selector", "meta_selector", "meta_student"]
    folder = tmp_path / "deep" / "out"
    assert files == [*(folder / f"pets_2experts_seed7_{end}_best.pth" for end in endings), folder / "domain_split.pkl"]
    assert sorted(names(folder)) == sorted(path.name for path in files)
    published = PublishedFolder(folder, dataset="pets", experts=2, seed=7)
    for module, tensors in (
        (experts[1], published.expert(1)),
        (student, published.student("meta")),
        (selector, published.aggregator("meta")),
    ):
        own = module.state_dict()
        assert list(tensors) == list(own)
        assert all(torch.equal(tensors[key], own[key]) for key in own)
    assert published.partition() == {9: 1, 2: 0, 4: 0, 7: 1}


def test_the_domain_split_is_in_their_form(tmp_path: Path) -> None:
    path = write(tmp_path, [tiny(), tiny()], tiny())[-1]
    content: object = pickle.loads(path.read_bytes())
    assert content == ([[2, 4], [9, 7]], {2: 0, 4: 0, 9: 1, 7: 1})


def test_weights_of_other_types_are_written_as_float32(tmp_path: Path) -> None:
    ours = tiny().double().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    tensors = raw(write(tmp_path, [ours], tiny())[0])
    assert_same_form(tensors, TinyResNet(5).state_dict())
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@pytest.mark.parametrize("part", ["expert 1", "the student"])
@pytest.mark.parametrize("name", ["small_conv", "mobilenet_v2", "timm:resnet10t", "densenet121"])
def test_networks_that_the_format_does_not_know_are_refused(tmp_path: Path, part: str, name: str) -> None:
    known, other = tiny(), network(name, 2)
    with pytest.raises(UserError) as caught:
        write(tmp_path, [known, known if part == "the student" else other], other if part == "the student" else known)
    assert one_line(caught).startswith(f"{part}: ")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"output_map": True}, "output map"), ({"heads": 4}, "4 heads"), ({"pooling": "max"}, "no transformer")],
)
@pytest.mark.parametrize("part", ["aggregator", "pretrained_aggregator"])
def test_aggregators_that_the_format_does_not_know_are_refused(
    tmp_path: Path, part: str, settings: dict[str, Any], told: str
) -> None:
    known = tiny()
    with pytest.raises(UserError) as caught:
        write(tmp_path, [known], known, **{part: aggregator(16, 5, **settings)})
    assert told in one_line(caught)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught:
        write(tmp_path / "file", [tiny()], tiny())
    assert one_line(caught).startswith(str(tmp_path / "file")) and "cannot be written" in one_line(caught)


def test_groups_of_experts_that_there_are_not_are_a_bug(tmp_path: Path) -> None:
    known = tiny()
    parts: dict[str, Any] = {"pretrained_student": None, "pretrained_aggregator": None, "aggregator": aggregator(16, 5)}
    with pytest.raises(ValueError, match="there are 1 experts"):
        write_published(tmp_path, dataset="pets", seed=1, experts=[known], student=known, groups={3: 1}, **parts)


def test_nothing_but_tensors_is_in_a_written_file(tmp_path: Path) -> None:
    known = tiny()
    for path in write(tmp_path, [known], known)[:-1]:
        assert load_tensors(path)[1] == {}
