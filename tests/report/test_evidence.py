"""Evidence of a finished run: what is chosen and drawn, and that a page takes it."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dmoe.adaptation import Adapter
from dmoe.command_line import open_run, parser
from dmoe.data.transforms import ImageTransform
from dmoe.meta.learner import ZeroTarget
from dmoe.models.aggregator import Aggregator
from dmoe.report.checked import LARGEST_EDGE
from dmoe.report.evidence import attention_to_experts, chosen, gather
from dmoe.report.page import build
from dmoe.report.pictures import png_of, spread_out
from dmoe.report.shown import curves_of, read_evidence
from dmoe.testing import _finished_run
from tests.bad_input.doors import make_pictures, make_run


def adapter(aggregator: nn.Module, experts: int = 3) -> Adapter:
    def features() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8))

    made = [features() for _ in range(experts)]
    return Adapter(features=features(), head=nn.Linear(8, 2), experts=made, aggregator=aggregator, inner_lr=0.1)


def small_aggregator() -> Aggregator:
    return Aggregator(width=8, num_outputs=2, depth=2, heads=2, dropout=0.0).eval()


def seen(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def test_attention_is_a_share_of_each_expert_and_does_not_depend_on_the_batch_size() -> None:
    model, images = adapter(small_aggregator()), torch.randn(6, 1, 4, 4)
    found = attention_to_experts(model, images, batch_size=6)
    assert found is not None
    assert len(found) == 3
    assert sum(found) == pytest.approx(1)
    assert attention_to_experts(model, images, batch_size=4) == pytest.approx(found, rel=1e-5)


def test_attention_falls_on_the_expert_whose_key_is_asked_for() -> None:
    """Experts whose tokens are constant; keys and queries such that all of them ask for the last one's."""
    aggregator = Aggregator(width=2, num_outputs=2, depth=1, heads=1, dropout=0.0).eval()
    block = aggregator.blocks[0].attention
    with torch.no_grad():
        block.in_proj_weight.zero_()
        block.in_proj_bias.zero_()
        block.in_proj_bias[0] = 30.0  # every query is (30, 0)
        block.in_proj_weight[2, 0] = 1.0  # a key is its token's first number

    class Says(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, images: Tensor) -> Tensor:
            return torch.tensor([self.value, -self.value]).expand(len(images), 2)

    student = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    experts = [Says(-1.0), Says(-1.0), Says(1.0)]
    model = Adapter(features=student, head=nn.Linear(2, 2), experts=experts, aggregator=aggregator, inner_lr=0.1)
    assert attention_to_experts(model, torch.zeros(2, 1, 2, 2), batch_size=2) == pytest.approx([0, 0, 1], abs=1e-6)


@pytest.mark.parametrize(
    "aggregator", [ZeroTarget(), Aggregator(width=8, num_outputs=2, depth=1, heads=1, dropout=0.0, pooling="mean")]
)
def test_without_a_transformer_there_is_no_attention(aggregator: nn.Module) -> None:
    assert attention_to_experts(adapter(aggregator), torch.randn(2, 1, 4, 4), batch_size=2) is None


def test_half_of_the_examples_are_the_first_that_changed() -> None:
    changed = torch.tensor([False, True, False, True, True, True, False, False])
    assert chosen(changed, 4) == [0, 1, 2, 3]
    assert chosen(changed, 8) == list(range(8))
    assert chosen(torch.tensor([False] * 5 + [True]), 4) == [0, 1, 2, 5]
    assert chosen(torch.tensor([True] * 5 + [False]), 4) == [0, 1, 2, 5]
    assert chosen(torch.zeros(2, dtype=torch.bool), 4) == [0, 1]


def test_domains_are_spread_from_the_first_to_the_last() -> None:
    assert spread_out(list(range(9)), 3) == [0, 4, 8]
    assert spread_out([5, 6], 3) == [5, 6]


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_is_the_picture_it_was_made_of(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    transform = ImageTransform((channels, 5, 7), mean=(0.4,) * channels, std=(0.2,) * channels)
    picture = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    np.testing.assert_array_equal(seen(png_of(transform(picture), transform)).reshape(pixels.shape), pixels)


def test_images_without_a_known_inverse_go_from_dark_to_bright() -> None:
    per_image = ImageTransform((1, 4, 4), per_image=True)
    bands = ImageTransform((8, 4, 4), mean=(0.0,) * 8, std=(1.0,) * 8)
    for transform, image in ((per_image, torch.randn(1, 4, 4)), (bands, 100 * torch.randn(8, 4, 4))):
        found = seen(png_of(image, transform))
        assert (found.shape, found.min(), found.max()) == ((4, 4), 0, 255)
        assert found.flatten().argmax() == image[0].flatten().argmax()
    assert seen(png_of(torch.ones(1, 4, 4), per_image)).max() == 0


def test_large_images_are_made_small() -> None:
    found = seen(png_of(torch.rand(3, 300, 200), ImageTransform((3, 300, 200))))
    assert found.shape == (LARGEST_EDGE, 64, 3)


@pytest.mark.slow
def test_a_finished_run_has_evidence_that_its_page_takes(tmp_path: Path) -> None:
    folder, pictures = tmp_path / "run", tmp_path / "pictures"
    make_pictures(pictures)
    make_run(folder, pictures)
    run = open_run(parser("", epilog="").parse_args(["--run_dir", str(folder), "--gpu", "-1", "--threads", "1"]), claim=False)
    facts = gather(run)
    (folder / "evidence.json").write_text(json.dumps(facts))
    found, target = read_evidence(folder / "evidence.json"), run.dataset.splits["target"]
    assert found.attention is not None
    assert (list(found.attention.domains), len(found.attention.experts)) == (["sketch"], 2)
    assert [sum(row) for row in found.attention.weights] == pytest.approx([1.0], abs=1e-4)
    assert found.curves == curves_of(folder)
    assert {"experts/expert_00", "experts/expert_01", "student", "meta"} <= set(found.curves or {})
    assert len(found.examples) == len(target) == 8
    trained, images = _finished_run(run), target.images(torch.arange(8))
    assert trained.plain is not None
    students = trained.plain, trained.adapter.adapt(images[: run.config.support_size])
    names = run.dataset.class_names
    before, after = ([names[int(guess)] for guess in student.logits(images).argmax(1)] for student in students)
    expected = [
        (png_of(image, run.dataset.transform), names[int(truth)], one, other)
        for image, truth, one, other in zip(images, target.labels, before, after, strict=True)
    ]
    assert sorted((one.image, one.truth, one.before, one.after) for one in found.examples) == sorted(expected)
    assert build(folder).count("data:image/png;base64,") == 8
