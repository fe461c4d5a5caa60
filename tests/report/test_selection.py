"""Expert selection inside a student: its numbers by worked-out cases, what is gathered from a network, and what a page draws."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_comparison import plain_rows, png, write_rows
from noise import run_in, steady_run_in, train
from pages import Element, read, section, table
from sklearn.metrics import normalized_mutual_info_score
from sparse_settings import GMOE as SIX_EXPERTS
from sparse_settings import four_blocks
from torch import Tensor, nn

import dmoe
from dmoe import testing
from dmoe.alone import train_alone
from dmoe.data.base import DomainDataset
from dmoe.data.transforms import ImageTransform
from dmoe.errors import UserError
from dmoe.model import describe
from dmoe.models.networks import build_network
from dmoe.models.sparse import SparseSettings, make_sparse, routings, sparse_layers
from dmoe.report import svg
from dmoe.report.evidence import gather
from dmoe.report.page import build
from dmoe.report.selection import Layer, agreement, information, selection_from
from dmoe.report.selection_evidence import chosen_experts, gather_selection, grid_of
from dmoe.report.selection_page import styles_of
from dmoe.report.shown import read_evidence

GMOE = replace(SIX_EXPERTS, experts=4, dropout=0.1)
BACKBONE = "student.backbone={name: small_vit, sparse: {kind: gmoe, experts: 4, blocks: [0, 1]}}"


def sparse_features(settings: SparseSettings = GMOE, shape: tuple[int, int, int] = (1, 4, 4)) -> nn.Module:
    torch.manual_seed(0)
    return make_sparse(four_blocks(shape), settings).eval()


class Rigged(nn.Module):
    """Sends all patches of an image to the expert that its first pixel names."""

    def __init__(self, features: nn.Module, *, experts: int, patches: int) -> None:
        super().__init__()
        self.experts, self.patches = experts, patches
        self.asked = torch.zeros(0, dtype=torch.long)
        features.register_forward_pre_hook(self._look)

    def _look(self, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        self.asked = given[0][:, 0, 0, 0].round().long().repeat_interleave(self.patches)

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.one_hot(self.asked, self.experts).to(tokens.dtype)


def rigged_run(folder: Path, experts_of: dict[int, int]) -> tuple[nn.Module, DomainDataset]:
    """A network, and images whose domain says by its number which expert all of their patches go to."""
    run = run_in(folder)
    for split in run.dataset.splits.values():

        def images(index: Tensor, split: Any = split, **_: Any) -> Tensor:
            asked = torch.tensor([experts_of.get(domain, 0) for domain in split.domains[index].tolist()])
            return asked.float().view(-1, 1, 1, 1).expand(-1, 1, 4, 4)

        split.images = images  # type: ignore[method-assign]
    features = sparse_features()
    for layer in sparse_layers(features).values():
        layer.router = Rigged(features, experts=4, patches=4)
    return features, replace(run.dataset, transform=ImageTransform((1, 4, 4), per_image=True))


def page_of(folder: Path, selection: dict[str, Any] | None) -> Element:
    write_rows(folder, plain_rows())
    (folder / "evidence.json").write_text(json.dumps({"selection": selection}))
    return read(build(folder))


def facts(*, experts: int = 4, layers: int = 2, pictures: int = 3) -> dict[str, Any]:
    """Made up, as :func:`gather_selection` would write it."""
    random = np.random.default_rng(0)

    def spread(domains: int) -> dict[str, Any]:
        rows = random.dirichlet(np.ones(experts), domains + 1).tolist()
        numbers = {"agreement": 0.75, "by_domain": 0.125, "by_class": 0.25, "with_source": None}
        return {"load": rows[0], "domains": [f"place {n}" for n in range(domains)], "shares": rows[1:], **numbers}

    def picture(number: int) -> dict[str, Any]:
        chosen = random.integers(0, experts, (layers, 6)).tolist()
        return {"domain": f"place {number}", "truth": "cat", "image": png(random.integers(0, 256, (6, 4))), "chosen": chosen}

    made = [
        {"name": f"blocks.{n}.mlp", "experts": experts, "top_k": 1, "splits": {"source": spread(3), "target": spread(2)}}
        for n in range(layers)
    ]
    return {"network": "The student", "layers": made, "grid": [3, 2], "pictures": [picture(n) for n in range(pictures)]}


def test_agreement_of_worked_out_shares() -> None:
    assert agreement([[1, 0], [0, 1]]) == 0
    assert agreement([[0.3, 0.7], [0.3, 0.7]]) == pytest.approx(1)
    assert agreement([[0.5, 0.5, 0], [0.25, 0.25, 0.5]]) == pytest.approx(0.5)
    assert agreement([[1, 0], [0, 1], [0, 1]]) == pytest.approx(1 / 3)
    assert agreement([[1, 0]]) is None
    assert agreement([[1, 0]], [[1, 0], [0.5, 0.5]]) == pytest.approx(0.75)


@pytest.mark.parametrize("kind", ["any", "told", "independent", "one expert"])
def test_information_is_that_of_another_library(kind: str) -> None:
    random = np.random.default_rng(1)
    rows, experts = random.integers(0, 5, 300), random.integers(0, 3, 300)
    if kind == "any":
        experts = np.where(random.random(300) < 0.5, rows % 3, experts)
    elif kind == "told":
        experts = (rows + 2) % 5
    elif kind == "one expert":
        experts[:] = 1
    counts = np.zeros((5, 6))
    np.add.at(counts, (rows, experts), 1)
    assert information(counts) == pytest.approx(normalized_mutual_info_score(rows, experts), abs=1e-12)


def test_there_is_no_information_of_one_row() -> None:
    assert information(np.array([[3, 4], [0, 0]])) is None
    assert information(np.zeros((2, 2))) is None


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("capacity_factor", [None, 0.5])
def test_choices_are_those_that_the_layers_made(top_k: int, capacity_factor: float | None) -> None:
    features = sparse_features(replace(GMOE, top_k=top_k, capacity_factor=capacity_factor))
    images = torch.randn(6, 1, 4, 4)
    with torch.no_grad(), routings(features) as found:
        features(images)
    chosen = chosen_experts(features, images, batch_size=6)
    for name, routing in found.items():
        assert torch.equal(chosen[name].counts.sum(dim=0), routing.load)
        assert torch.equal(chosen[name].first.flatten(), routing.experts[:, 0])
        assert chosen[name].first.shape == (6, 4)
    if capacity_factor is None:
        apart = chosen_experts(features, images, batch_size=4)
        assert all(torch.equal(apart[name].counts, one.counts) for name, one in chosen.items())


def test_class_tokens_are_no_patches() -> None:
    torch.manual_seed(0)
    settings = replace(GMOE, blocks=(1, 10))
    features = build_network("timm:deit_tiny_patch16_224", image_shape=(3, 32, 48), num_outputs=2, sparse=settings).features.eval()
    assert grid_of(features) == (2, 3)
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad(), routings(features) as found:
        features(images)
    chosen = chosen_experts(features, images, batch_size=2)
    for name, routing in found.items():
        assert len(routing.experts) == 2 * 7
        assert torch.equal(chosen[name].first, routing.experts.view(2, 7)[:, 1:])
        assert chosen[name].counts.sum(dim=1).tolist() == [6, 6]


def test_shares_add_up_to_1_for_every_layer_split_and_domain(tmp_path: Path) -> None:
    dataset = steady_run_in(tmp_path).dataset
    gathered = gather_selection(sparse_features(), dataset, network="it", batch_size=7)
    found = selection_from(json.loads(json.dumps(gathered)))
    assert [layer.name for layer in found.layers] == ["blocks.0.mlp", "blocks.2.mlp"]
    assert found.grid == (2, 2)
    assert next((one.domain, len(one.chosen), len(one.chosen[0])) for one in found.pictures) == ("domain 20", 2, 4)
    assert [one.domain for one in found.pictures].count("domain 20") == 2 and len(found.pictures) == 6
    for layer in found.layers:
        assert {name: len(one.domains) for name, one in layer.splits.items()} == {"source": 5, "validation": 3, "target": 5}
        for name, one in layer.splits.items():
            assert [sum(row) for row in [one.load, *one.shares]] == pytest.approx([1.0] * (len(one.domains) + 1), abs=1e-4)
            assert one.load == pytest.approx(np.mean(one.shares, axis=0), abs=1e-4)  # all domains have equally many images
            assert (one.with_source is None) == (name == "source")


def test_a_network_without_sparse_layers_has_nothing_to_tell(tmp_path: Path) -> None:
    dense = build_network("small_vit", image_shape=(1, 4, 4), num_outputs=3).features.eval()
    assert gather_selection(dense, run_in(tmp_path).dataset, network="it", batch_size=7) is None


def test_values_have_no_classes(tmp_path: Path) -> None:
    found = gather_selection(sparse_features(), run_in(tmp_path, kind="regression").dataset, network="it", batch_size=50)
    assert found is not None
    assert all(one["by_class"] is None for layer in found["layers"] for one in layer["splits"].values())
    assert found["pictures"][0]["truth"].startswith("0.")


def test_domains_that_share_no_expert_do_not_agree_and_are_drawn_in_the_colours_of_theirs(tmp_path: Path) -> None:
    experts_of = {20: 3, 21: 0, 22: 1, 23: 2, 24: 3}
    features, dataset = rigged_run(tmp_path, experts_of)
    gathered = gather_selection(features, dataset, network="it", batch_size=7)
    assert gathered is not None
    for layer in gathered["layers"]:
        target, source = layer["splits"]["target"], layer["splits"]["source"]
        assert target["shares"] == np.eye(4)[[3, 0, 1, 2, 3]].tolist()
        assert [agreement([target["shares"][0], target["shares"][n]]) for n in (1, 4)] == [0.0, 1.0]
        assert target["agreement"] == pytest.approx(0.1)  # one of ten pairs
        assert target["by_domain"] == pytest.approx(normalized_mutual_info_score(range(5), [3, 0, 1, 2, 3]), abs=1e-5)
        assert source["shares"] == np.eye(4)[[0] * 5].tolist()
        assert (source["agreement"], source["by_domain"]) == (1.0, 0.0)
        assert target["with_source"] == pytest.approx(0.2)
    part = section(page_of(tmp_path, gathered), "selection")
    drawn = part.all("svg", role="img")[:2]
    for picture in drawn:
        colours = [
            (group.all("title")[0].text, {one.attributes["class"] for one in group.all("rect")}) for group in picture.all("g")
        ]
        assert colours == [(f"expert {e + 1}", {f"fill patch s{e}"}) for e in [3, 3, 0, 1, 2, 3]]
        assert "picture 2: expert 4 4; picture 3: expert 1 4;" in picture.attributes["aria-label"]
    head, rows = table(part)
    place = head.index("agreement of target domains") - 1
    assert [cells[place] for cells in rows.values()] == ["0.10", "0.10"]


def test_patches_are_drawn_where_they_lie(tmp_path: Path) -> None:
    chosen = [0, 0, 2, 1, 2, 2]  # 2 rows, 3 columns
    picture = read(svg.patches([svg.Panel(png(np.zeros((2, 3))), chosen)], grid=(2, 3), styles={0: 0, 1: 1, 2: 2}, label="it"))
    image = picture.all("image")[1].attributes
    x, y, width, height = (float(image[name]) for name in ("x", "y", "width", "height"))
    assert width / height == pytest.approx(3 / 2)
    covered = np.full((2, 3), -1)
    for group in picture.all("g"):
        expert = int(group.all("title")[0].text.split()[1]) - 1
        for one in group.all("rect"):
            place = {name: float(one.attributes[name]) for name in ("x", "y", "width", "height")}
            column, length = round((place["x"] - x) / width * 3), round(place["width"] / width * 3)
            row = round((place["y"] - y) / height * 2)
            assert (covered[row, column : column + length] == -1).all()
            covered[row, column : column + length] = expert
    assert covered.flatten().tolist() == chosen
    frame = [float(edge) for edge in picture.all("svg")[0].attributes["viewbox"].split()[2:]]
    assert y + height <= frame[1] + 1 and x + width <= frame[0]


def test_of_many_experts_those_that_were_chosen_most_have_colours() -> None:
    layer = Layer("blocks.0.mlp", 24, 4, {})
    chosen = [[expert for expert in range(10, 24) for _ in range(expert)]]
    assert styles_of(layer, chosen) == {expert: style for style, expert in enumerate(range(16, 24))}
    assert styles_of(layer, [[23, 5]]) == {5: 0, 23: 1}
    assert styles_of(Layer("blocks.0.mlp", 8, 1, {}), [[7]]) == {expert: expert for expert in range(8)}


def test_the_page_shows_what_evidence_says_and_only_where_there_is_some(tmp_path: Path) -> None:
    made = facts()
    page = page_of(tmp_path, made)
    part = section(page, "selection")
    assert "#selection" in [one.attributes["href"] for one in page.all("nav")[0].all("a")]
    charts = part.all("svg", role="img")
    assert len(charts) == 4
    assert [len(one.all("image")) for one in charts] == [6, 6, 0, 0]
    for chart, layer in zip(charts[2:], made["layers"], strict=True):
        for split in layer["splits"].values():
            assert ", ".join(f"{100 * share:.0f}" for share in split["load"]) in chart.attributes["aria-label"]
        for domain, row in zip(layer["splits"]["target"]["domains"], layer["splits"]["target"]["shares"], strict=True):
            assert f"{domain}: {', '.join(f'{100 * share:.0f}' for share in row)}" in chart.attributes["aria-label"]
    assert "2: place 1, truly cat" in part.text
    assert len(part.all("ul", class_="legend")[0].all("li")) == 4
    for name, details in zip(("blocks.0", "blocks.1"), part.all("details"), strict=True):
        assert name in details.all("summary")[0].text
        assert len(table(details)[1]) == 7
    assert not page_of(tmp_path, None).all("section", id="selection")


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": []},
        {"layers": facts()["layers"] * 33},
        {"layers": facts(experts=3)["layers"]},
        {"grid": None},
        {"grid": [2, 2]},
        {"grid": [3.0, 2]},
        {"grid": [100_000, 100_000]},
        {"pictures": facts(pictures=7)["pictures"]},
        {"pictures": facts(layers=1)["pictures"]},
        {"pictures": [{**facts()["pictures"][0], "image": "AAAA"}]},
        {"pictures": [{**facts()["pictures"][0], "chosen": [[0, 1, 2, 3, 0, -1]] * 2}]},
        {"layers": [{**one, "splits": {}} for one in facts()["layers"]]},
        {"layers": [{**one, "splits": [1]} for one in facts()["layers"]]},
        {"layers": [{**one, "top_k": 5} for one in facts()["layers"]]},
        {"layers": [{**one, "experts": True} for one in facts()["layers"]]},
        {"layers": [{**one, "splits": {"target": {**one["splits"]["target"], "load": [2, 0, 0, 0]}}} for one in facts()["layers"]]},
        {"layers": [{**one, "splits": {"target": {**one["splits"]["target"], "agreement": "1"}}} for one in facts()["layers"]]},
    ],
)
def test_damaged_evidence_of_selection_is_told(tmp_path: Path, changes: dict[str, Any]) -> None:
    (tmp_path / "evidence.json").write_text(json.dumps({"selection": {**facts(), **changes}}))
    with pytest.raises(UserError, match=r"evidence\.json: damaged"):
        read_evidence(tmp_path / "evidence.json")


def test_names_from_evidence_stay_text(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\"'>{{ 7 * 7 }}"
    made = json.loads(json.dumps({**facts(), "network": hostile}).replace("place", json.dumps(hostile)[1:-1]))
    for layer in made["layers"]:
        layer["name"] = hostile
    page_of(tmp_path, made)
    assert "<script" not in build(tmp_path)


def test_of_a_whole_run_it_is_the_student_before_adapting(tmp_path: Path) -> None:
    run = steady_run_in(tmp_path, BACKBONE)
    train(run)
    describe(run.folder, run.dataset)
    features = dmoe.load(tmp_path).student.features
    name, size = "The student, before adapting,", run.config.evaluation.batch_size
    assert gather(run)["selection"] == gather_selection(features, run.dataset, network=name, batch_size=size)


def test_a_network_trained_alone_has_evidence_and_its_page(tmp_path: Path) -> None:
    run = replace(steady_run_in(tmp_path, "method=erm", BACKBONE), groups={})
    run.folder.claim(run.config)
    train_alone(run)
    found = gather(run)
    assert (found["attention"], found["examples"]) == (None, [])
    assert "student" in found["curves"]
    testing.test(run)
    (tmp_path / "evidence.json").write_text(json.dumps(found))
    part = section(read(build(tmp_path)), "selection")
    assert part.text.count("The network has layers of several experts") == 1
    assert len(part.all("svg", role="img")) == 4
