"""The checkpoint files of the paper's public code: read as ours, written as theirs.

One folder holds the checkpoints of a data set; the number of experts and the seed are in the files' names only. Weights are
state dicts in ``.pth`` files, ``domain_split.pkl`` tells which source domain belongs to which expert.
"""

import io
import pickle
import pickletools
import re
import struct
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from dmoe.artifacts import load_into, load_tensors, written_whole
from dmoe.errors import UserError
from dmoe.models.aggregator import Aggregator
from dmoe.models.networks import Network, PooledDenseNet

TrainingStage = Literal["meta", "pretrained"]

HEADS = 16
"""Of every published aggregator's attention; no tensor tells it."""

DOMAIN_SPLIT = "domain_split.pkl"


class Naming:
    """The published names of one kind of file, and ours: beginnings that are exchanged, the rest of a name is the same.

    Attributes:
        title: what such a file holds, for messages.
    """

    def __init__(self, title: str, beginnings: Mapping[str, str], *, mark: str = "") -> None:
        """
        Args:
            beginnings: ours by the published; ``{}`` stands for a number.
            mark: a published beginning that no other kind has.
        """
        self.title = title
        self._mark = mark
        self._to_ours = _rules(beginnings.items())
        self._to_published = _rules((ours, published) for published, ours in beginnings.items())

    def ours(self, published: str) -> str | None:
        """Our name of a published one; None where this kind of file has no such tensor."""
        return _exchanged(published, self._to_ours)

    def published(self, ours: str) -> str | None:
        """The published name of one of ours; None where this kind of file has no such tensor."""
        return _exchanged(ours, self._to_published)

    def marks(self, published: Iterable[str]) -> bool:
        """Whether these names are of this kind."""
        return any(name.startswith(self._mark) for name in published)

    def fits(self, network: Network) -> bool:
        """Whether a network of ours can be written as this kind."""
        names = [self.published(name) for name in network.state_dict()]
        return None not in names and self.marks(name for name in names if name is not None)

    def renamed(self, tensors: Mapping[str, Tensor], *, where: str) -> dict[str, Tensor]:
        """Published tensors under our names.

        Raises:
            UserError: a name is none of this kind; the line names the first and counts them.
        """
        our_names = {name: self.ours(name) for name in tensors}
        foreign = [name for name, ours in our_names.items() if ours is None]
        if foreign:
            others = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise UserError(f"{where}: it holds {foreign[0]}{others}: {self.title} has no tensor of that name")
        return {ours: tensors[name] for name, ours in our_names.items() if ours is not None}


_Rules = Sequence[tuple[re.Pattern[str], str]]


def _rules(beginnings: Iterable[tuple[str, str]]) -> _Rules:
    return [(re.compile(r"(\d+)".join(map(re.escape, before.split("{}")))), after) for before, after in beginnings]


def _exchanged(name: str, rules: _Rules) -> str | None:
    for pattern, beginning in rules:
        if found := pattern.match(name):
            return beginning.format(*found.groups()) + name[found.end() :]
    return None


RESNET = Naming(
    "torchvision's ResNet",
    {
        "conv1.": "features.0.",
        "bn1.": "features.1.",
        **{f"layer{number}.": f"features.{3 + number}." for number in range(1, 5)},
        "fc.": "head.",
    },
    mark="layer1.",
)
DENSENET = Naming(
    "torchvision's DenseNet",
    {"features.": "features.0.", "classifier.": "head."},
    mark="features.denseblock1.",
)
STUDENT = Naming("a published student", {"features.": "features.", "classifier.0.": "head."})
AGGREGATOR = Naming(
    "a published aggregator",
    {
        "transformer.layers.{}.0.norm.": "blocks.{}.attention_norm.",
        "transformer.layers.{}.0.fn.attend.": "blocks.{}.attention.",
        "transformer.layers.{}.1.norm.": "blocks.{}.perceptron_norm.",
        "transformer.layers.{}.1.fn.net.": "blocks.{}.perceptron.",
        "mlp.": "head.",
    },
)

BACKBONES = (RESNET, DENSENET)
"""What experts can be."""


class PublishedFolder:
    """The checkpoints that the paper's authors published for one data set.

    Attributes:
        folder: where they lie.
        name: how each of them begins.
    """

    def __init__(self, folder: Path, *, dataset: str, experts: int, seed: int) -> None:
        """
        Raises:
            UserError: there is no such folder, or it holds no checkpoint of that data set, number of experts and seed; the
                line says of which ones it does.
        """
        self.folder = folder
        self.name = _name(dataset, experts, seed)
        self._experts = experts
        try:
            files = [path.name for path in folder.iterdir()]
        except OSError as error:
            raise UserError(f"{folder}: no folder of checkpoints: {error.strerror}") from None
        found = sorted({match[1] for name in files if (match := _FILE.fullmatch(name))})
        if not found:
            raise UserError(f"{folder}: holds no published checkpoints, expected {self.expert_path(0).name} and so on")
        if self.name not in found:
            way = f"give the folder of {self.name}, or --dataset, experts.count and --seed that fit"
            raise UserError(f"{folder}: holds {', '.join(found[:3])}, expected {self.name}: {way}")

    def expert_path(self, number: int) -> Path:
        return self.folder / _expert_file(self.name, number)

    def student_path(self, stage: TrainingStage) -> Path:
        return self.folder / _student_file(self.name, stage)

    def aggregator_path(self, stage: TrainingStage) -> Path:
        return self.folder / _aggregator_file(self.name, stage)

    def expert(self, number: int) -> dict[str, Tensor]:
        """The tensors of an expert, under the names of our :class:`Network`.

        Raises:
            UserError: the file is missing or damaged, or holds a tensor that an expert does not have. The same for student and
                aggregator.
        """
        path = self.expert_path(number)
        tensors = _read(path)
        return _backbone(tensors, path).renamed(tensors, where=str(path))

    def student(self, stage: TrainingStage) -> dict[str, Tensor]:
        """The tensors of the student, under the names of our :class:`Network`."""
        path = self.student_path(stage)
        return STUDENT.renamed(_read(path), where=str(path))

    def aggregator(self, stage: TrainingStage) -> dict[str, Tensor]:
        """The tensors of the aggregator, under the names of our :class:`Aggregator`."""
        path = self.aggregator_path(stage)
        return AGGREGATOR.renamed(_read(path), where=str(path))

    def load_expert(self, number: int, network: Network) -> None:
        """Fill a network with an expert, features and head.

        Raises:
            UserError: as :meth:`expert`; or a tensor is missing, left over or of another shape. Tensors are named as in the
                file. The same for student and aggregator.
        """
        path = self.expert_path(number)
        tensors = _read(path)
        naming = _backbone(tensors, path)
        if not naming.fits(network):
            raise UserError(f"{path}: holds {naming.title}, experts.backbone is another network")
        _fill(network, tensors, naming, path)

    def load_student(self, stage: TrainingStage, network: Network) -> None:
        """Fill a network with the student."""
        path = self.student_path(stage)
        _fill(network, _read(path), STUDENT, path)

    def load_aggregator(self, stage: TrainingStage, aggregator: Aggregator) -> None:
        """Fill an aggregator, whose depth and heads must be the published ones too."""
        path = self.aggregator_path(stage)
        tensors = _read(path)
        if not aggregator.blocks:
            raise UserError(f"{path}: {AGGREGATOR.title} is a transformer: set aggregator.pooling=transformer")
        if aggregator.output_map is not None:
            raise UserError(f"{path}: {AGGREGATOR.title} has no output map: set aggregator.output_map=false")
        if _heads(aggregator) != HEADS:
            raise UserError(f"{path}: {AGGREGATOR.title} has {HEADS} heads, though no file tells: set aggregator.heads={HEADS}")
        depth = len({layer[1] for name in tensors if (layer := _LAYER.match(name))})
        if depth not in (0, len(aggregator.blocks)):
            raise UserError(f"{path}: holds an aggregator of depth {depth}: set aggregator.depth={depth}")
        _fill(aggregator, tensors, AGGREGATOR, path)

    def partition(self) -> dict[int, int] | None:
        """The expert of each source domain; None where the folder does not tell.

        Raises:
            UserError: as :func:`read_domain_split`, or the domains are shared among another number of experts.
        """
        path = self.folder / DOMAIN_SPLIT
        if not path.exists():
            return None
        groups, expert_of = read_domain_split(path)
        if len(groups) != self._experts:
            raise UserError(f"{path}: shares the domains among {len(groups)} experts, expected {self._experts}: {_BRING}")
        return expert_of


_FILE = re.compile(r"(.+_\d+experts_seed\d+)_(?:\d+_exp|pretrained_(?:exp|selector)|meta_(?:student|selector))_best\.pth")
_LAYER = re.compile(r"transformer\.layers\.(\d+)\.")
_BRING = "bring the file that belongs to these checkpoints; testing does without any"


def _name(dataset: str, experts: int, seed: int) -> str:
    return f"{dataset}_{experts}experts_seed{seed}"


def _expert_file(name: str, number: int) -> str:
    return f"{name}_{number}_exp_best.pth"


def _student_file(name: str, stage: TrainingStage) -> str:
    return f"{name}_{'meta_student' if stage == 'meta' else 'pretrained_exp'}_best.pth"


def _aggregator_file(name: str, stage: TrainingStage) -> str:
    return f"{name}_{stage}_selector_best.pth"


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, under their own names."""
    tensors, _ = load_tensors(path)
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() or tensor.dtype == torch.int64):
            raise UserError(f"{path}: {name} is {tensor.dtype}: expected float32 or int64")
    return tensors


def _backbone(published: Iterable[str], path: Path) -> Naming:
    for naming in BACKBONES:
        if naming.marks(published):
            return naming
    known = " nor ".join(naming.title for naming in BACKBONES)
    raise UserError(f"{path}: neither {known}: an expert is one of these, with torchvision's names")


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], naming: Naming, path: Path) -> None:
    naming.renamed(tensors, where=str(path))
    load_into(_AsPublished(module, naming), tensors, where=str(path))


class _AsPublished(nn.Module):
    """A module whose tensors go by their published names, so that what :func:`load_into` says is about the file."""

    def __init__(self, module: nn.Module, naming: Naming) -> None:
        super().__init__()
        self._module, self._naming = module, naming

    def state_dict(self) -> dict[str, Tensor]:  # type: ignore[override]
        return _as_published(self._module, self._naming)

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:  # type: ignore[override]
        self._module.load_state_dict(self._naming.renamed(tensors, where=self._naming.title))


def _as_published(module: nn.Module, naming: Naming) -> OrderedDict[str, Tensor]:
    return OrderedDict((naming.published(name) or name, tensor) for name, tensor in module.state_dict().items())


class _PlainUnpickler(pickle.Unpickler):
    """Makes nothing but what the language itself has."""

    def __init__(self, content: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(content))
        self._path = path

    def find_class(self, module: str, name: str) -> NoReturn:
        _refuse(self._path, f"{module}.{name}")

    def persistent_load(self, identifier: Any) -> NoReturn:
        _refuse(self._path, "a persistent id")


def _refuse(path: Path, what: str) -> NoReturn:
    # The name comes from the file: no line breaks, no control characters of a terminal.
    raise UserError(f"{path}: holds more than lists, dicts and numbers ({ascii(what)[1:-1][:100]}): {_BRING}")


_LARGEST = 1 << 20
"""Bytes of a domain split; a domain takes ten or so."""

_GLOBALS = {"GLOBAL", "STACK_GLOBAL", "INST"}
_OPCODES = {
    *("PROTO", "FRAME", "MARK", "STOP", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET"),
    *("NONE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "NEWTRUE", "NEWFALSE", "FLOAT", "BINFLOAT"),
    *("STRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "TUPLE", "TUPLE2"),
}


def read_domain_split(path: Path) -> tuple[list[list[int]], dict[int, int]]:
    """``domain_split.pkl``: the source domains of each expert, and the expert of each source domain.

    It is a pickle, which could hold a program. Nothing of it runs: a file that is not plain lists, dicts and numbers is refused.

    Raises:
        UserError: the file is missing, damaged, larger than 1 MiB, holds anything else, or contradicts itself.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(_LARGEST + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > _LARGEST:
        raise UserError(f"{path}: larger than {_LARGEST} bytes, too large for a domain split: {_BRING}")
    try:
        _check_opcodes(content, path)
        value = _PlainUnpickler(content, path).load()
    except (
        *(pickle.UnpicklingError, EOFError, LookupError, ValueError, AttributeError, TypeError),
        *(MemoryError, OverflowError, RecursionError, struct.error),
    ):
        raise UserError(f"{path}: damaged, not a whole pickle: {_BRING}") from None
    fault = _fault_of_split(value)
    if fault:
        raise UserError(f"{path}: {fault}: {_BRING}")
    groups, expert_of = value
    return groups, expert_of


def _check_opcodes(content: bytes, path: Path) -> None:
    """Refuse what would harm the unpickler itself.

    A memo index is an allocation of that many places, and the hash of a deeply nested tuple overflows the C stack.
    """
    tuples = 0
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in _GLOBALS:
            return  # the unpickler gets no further than here, and says which one it is
        tuples += opcode.name.startswith("TUPLE")
        if opcode.name not in _OPCODES or tuples > 1:
            _refuse(path, f"pickle's {opcode.name}")
        if opcode.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > len(content):
            _refuse(path, f"pickle's {opcode.name} {argument}")


def _fault_of_split(value: Any) -> str:
    """What is wrong with the content of a domain split; empty where nothing is."""
    match value:
        case (list(groups), dict(expert_of)) if all(isinstance(group, list) for group in groups):
            pass
        case _:
            return "must hold a list of domains for each expert, and a dict from domain to expert"
    listed = sum(map(len, groups))  # first, because a list may be there a million times without taking space
    if listed != len(expert_of):
        return f"lists {listed} domains, but gives {len(expert_of)} to experts"
    if not all(map(_is_number, chain(*groups, expert_of, expert_of.values()))):
        return "has a domain or an expert that is no whole number of 64 bits"
    by_list = {domain: expert for expert, group in enumerate(groups) for domain in group}
    contradicted = [domain for domain, expert in expert_of.items() if by_list.get(domain) != expert]
    return f"contradicts itself about the expert of domain {contradicted[0]}" if contradicted else ""


def _is_number(value: Any) -> bool:
    return type(value) is int and -(1 << 63) <= value < 1 << 63


def write_published(
    folder: Path,
    *,
    dataset: str,
    seed: int,
    experts: Sequence[Network],
    student: Network,
    aggregator: Aggregator,
    pretrained_student: Network | None,
    pretrained_aggregator: Aggregator | None,
    groups: Mapping[int, int],
) -> list[Path]:
    """Write a trained model as the public code would have.

    Args:
        experts: features and heads, as tokens are taken from them; ResNets or DenseNets of torchvision.
        student: meta-trained.
        aggregator: meta-trained.
        pretrained_student: as it was before; None: no such file, which testing does not need.
        pretrained_aggregator: likewise.
        groups: the expert of each source domain.

    Returns:
        The files written: those of the experts, of the pretrained, of the meta-trained, and the domain split.

    Raises:
        UserError: the format does not know such a network or aggregator (nothing is written then), or the folder cannot be
            written.
        ValueError: ``groups`` has other experts than ``experts``.
    """
    if not set(groups.values()) <= set(range(len(experts))):
        raise ValueError(f"there are {len(experts)} experts, the groups are of {sorted(set(groups.values()))}")
    name = _name(dataset, len(experts), seed)
    stages: list[tuple[TrainingStage, Network | None, Aggregator | None]] = [
        ("pretrained", pretrained_student, pretrained_aggregator),
        ("meta", student, aggregator),
    ]
    files: dict[str, OrderedDict[str, Tensor]] = {}
    for number, expert in enumerate(experts):
        files[_expert_file(name, number)] = _as_published(expert, _writable_network(expert, f"expert {number}"))
    for stage, network, selector in stages:
        if selector is not None:
            _check_writable(selector)
            files[_aggregator_file(name, stage)] = _as_published(selector, AGGREGATOR)
        if network is not None:
            _writable_network(network, "the student")
            files[_student_file(name, stage)] = _as_published(network, STUDENT)
    members = [[domain for domain, expert in groups.items() if expert == number] for number in range(len(experts))]
    split = (members, {domain: number for number, group in enumerate(members) for domain in group})
    for file_name, tensors in files.items():
        with written_whole(folder / file_name) as beside, open(beside, "wb") as file:
            torch.save(OrderedDict((key, _plain(tensor)) for key, tensor in tensors.items()), file)
    with written_whole(folder / DOMAIN_SPLIT) as beside:
        beside.write_bytes(pickle.dumps(split, protocol=4))
    return [folder / file_name for file_name in (*files, DOMAIN_SPLIT)]


def _writable_network(network: Network, who: str) -> Naming:
    """The kind of expert file that a network fits."""
    for naming in BACKBONES:
        if naming.fits(network):
            features = network.features
            if isinstance(features, PooledDenseNet) and any(isinstance(part, nn.ReLU) for part in features):
                raise UserError(
                    f"{who}: its features end in a ReLU, those of the public code's DenseNets do not, and readers of the "
                    "files would get other numbers: what was trained with tokens.last_relu=false can be written"
                )
            return naming
    known = " or ".join(naming.title for naming in BACKBONES)
    raise UserError(f"{who}: the published format holds {known} only, this is another backbone")


def _check_writable(aggregator: Aggregator) -> None:
    if not aggregator.blocks:
        raise UserError("the aggregator is no transformer, and the published format has no place for others: aggregator.pooling")
    if aggregator.output_map is not None:
        raise UserError("the aggregator has an output map, for which the published format has no place: aggregator.output_map")
    if _heads(aggregator) != HEADS:
        way = f"readers of the published format take {HEADS}, which no file tells them: aggregator.heads"
        raise UserError(f"the aggregator has {_heads(aggregator)} heads; {way}")


def _heads(aggregator: Aggregator) -> int:
    return next(int(module.num_heads) for module in aggregator.modules() if isinstance(module, nn.MultiheadAttention))


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
