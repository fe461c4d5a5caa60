"""The token store: exact, resumable, rebuilt when its inputs change."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dmoe.data.base import DomainSplit
from dmoe.errors import UserError
from dmoe.models.expert_pool import ExpertPool
from dmoe.models.networks import SmallConv
from dmoe.run_folder import Stage
from dmoe.tokens import Storage, TokenStore, build_store

IMAGES, BATCH, WIDTH, LOST_AT_MOST = 300, 4, 8, 20
"""The last: batches since the last note of how far it got."""


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmoe.tokens.BLOCK_IMAGES", LOST_AT_MOST * BATCH)


class KilledError(Exception):
    """Stands for a process that ends here."""


class Pictures(DomainSplit):
    def __init__(self) -> None:
        self._images = torch.rand(IMAGES, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        self.labels = self.domains = self.group_domains = torch.zeros(IMAGES, dtype=torch.int64)
        self.domain_names = {0: "all"}

    def images(self, index: Tensor, *, view: Tensor | None = None, draw: int | None = None) -> Tensor:
        assert draw is None, "tokens are of the stored view"
        return self._images[index]


class CountingPool(ExpertPool):
    """Counts the images that it is shown; after ``stop_after`` of them its process is killed."""

    def __init__(self, experts: Iterator[nn.Module], stop_after: int = IMAGES) -> None:
        super().__init__(experts)
        self.seen, self._stop_after = 0, stop_after

    def forward(self, images: Tensor) -> Tensor:
        if self.seen + len(images) > self._stop_after:
            raise KilledError
        self.seen += len(images)
        return super().forward(images)


def pool(stop_after: int = IMAGES) -> CountingPool:
    torch.manual_seed(0)
    return CountingPool((SmallConv(image_shape=(1, 8, 8), width=WIDTH) for _ in range(3)), stop_after)


def build(folder: Path, experts: ExpertPool, *, storage: Storage = "float32", **inputs: object) -> TokenStore:
    return build_store(
        Stage(folder, {"seed": 1, **inputs}),
        storage=storage,
        split=Pictures(),
        pool=experts,
        width=WIDTH,
        batch_size=BATCH,
        device=torch.device("cpu"),
    )


def kill_after(folder: Path, images: int) -> CountingPool:
    experts = pool(stop_after=images)
    with pytest.raises(KilledError):
        build(folder, experts)
    return experts


@pytest.fixture
def live() -> Tensor:
    """Tokens of all images, computed live in the same batches."""
    experts, split = pool(), Pictures()
    return torch.cat([experts(split.images(index)) for index in torch.arange(IMAGES).split(BATCH)])


def test_stored_tokens_are_live_tokens_to_the_bit(tmp_path: Path, live: Tensor) -> None:
    store = build(tmp_path, pool())
    assert store[torch.arange(IMAGES)].dtype == torch.float32
    assert torch.equal(store[torch.arange(IMAGES)], live)


def test_tokens_come_in_the_order_that_is_asked_for(tmp_path: Path, live: Tensor) -> None:
    index = torch.tensor([299, 0, 17, 17])
    assert torch.equal(build(tmp_path, pool())[index], live[index])


def test_store_has_a_token_of_every_expert_for_every_image(tmp_path: Path) -> None:
    store = build(tmp_path, pool())
    assert len(store) == IMAGES
    assert store[torch.tensor([5, 6])].shape == (2, 3, WIDTH)


def test_tokens_in_use_can_be_changed_without_changing_the_store(tmp_path: Path, live: Tensor) -> None:
    store = build(tmp_path, pool())
    store[torch.arange(10)].zero_()
    assert torch.equal(store[torch.arange(10)], live[:10])


def test_finished_store_is_opened_without_asking_an_expert(tmp_path: Path, live: Tensor) -> None:
    build(tmp_path, pool())
    again = pool()
    assert torch.equal(build(tmp_path, again)[torch.arange(IMAGES)], live)
    assert again.seen == 0


def test_store_is_rebuilt_when_its_inputs_change(tmp_path: Path) -> None:
    build(tmp_path, pool())
    torch.manual_seed(1)
    others = CountingPool(SmallConv(image_shape=(1, 8, 8), width=WIDTH) for _ in range(3))
    store = build(tmp_path, others, seed=2)
    assert others.seen == IMAGES
    first = torch.arange(BATCH)
    assert torch.equal(store[first], ExpertPool(others.experts)(Pictures().images(first)))


def test_half_built_store_is_not_taken_for_a_whole_one(tmp_path: Path, live: Tensor) -> None:
    kill_after(tmp_path, 10 * BATCH)
    assert torch.equal(build(tmp_path, pool())[torch.arange(IMAGES)], live)


@pytest.mark.parametrize("batches", [0, 1, 21, 50, 74])
def test_killed_building_goes_on_without_repeating_what_is_there(tmp_path: Path, live: Tensor, batches: int) -> None:
    kill_after(tmp_path, batches * BATCH)
    again = pool()
    assert torch.equal(build(tmp_path, again)[torch.arange(IMAGES)], live)
    assert again.seen <= IMAGES - max(0, batches - LOST_AT_MOST) * BATCH


def test_building_that_is_killed_twice_keeps_what_both_visits_did(tmp_path: Path, live: Tensor) -> None:
    first = kill_after(tmp_path, 23 * BATCH)
    second = kill_after(tmp_path, 45 * BATCH)
    again = pool()
    assert torch.equal(build(tmp_path, again)[torch.arange(IMAGES)], live)
    assert again.seen <= IMAGES - (first.seen + second.seen) + 2 * LOST_AT_MOST * BATCH


def test_half_built_store_of_other_inputs_is_begun_anew(tmp_path: Path) -> None:
    kill_after(tmp_path, 60 * BATCH)
    again = pool()
    build(tmp_path, again, seed=2)
    assert again.seen == IMAGES


def test_half_built_store_whose_file_is_gone_is_begun_anew(tmp_path: Path, live: Tensor) -> None:
    kill_after(tmp_path, 60 * BATCH)
    (tmp_path / "tokens.npy").unlink()
    assert torch.equal(build(tmp_path, pool())[torch.arange(IMAGES)], live)


def test_store_whose_file_is_gone_is_built_anew(tmp_path: Path, live: Tensor) -> None:
    build(tmp_path, pool())
    (tmp_path / "tokens.npy").unlink()
    assert torch.equal(build(tmp_path, pool())[torch.arange(IMAGES)], live)


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:-1], lambda content: content[:50], lambda content: b"", lambda content: b"\0" * len(content)],
    ids=["one byte short", "cut off in the header", "empty", "zeros"],
)
def test_damaged_file_is_told_in_one_line_with_what_to_do(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    build(tmp_path, pool())
    path = tmp_path / "tokens.npy"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError) as caught:
        build(tmp_path, pool())
    message = str(caught.value)
    assert message.startswith(f"{path}: damaged")
    assert f"delete {tmp_path} to make it again" in message
    assert "\n" not in message


def test_file_of_another_shape_is_told_in_one_line(tmp_path: Path) -> None:
    build(tmp_path, pool())
    torch.manual_seed(0)
    fewer = CountingPool(SmallConv(image_shape=(1, 8, 8), width=WIDTH) for _ in range(2))
    with pytest.raises(UserError) as caught:
        build(tmp_path, fewer)
    assert str(caught.value).startswith(f"{tmp_path / 'tokens.npy'}: holds (300, 1, 3, 8) float32, expected (300, 1, 2, 8)")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("storage", "digits"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_short_storage_rounds_and_halves_the_file(tmp_path: Path, storage: Storage, digits: float) -> None:
    whole, short = build(tmp_path / "whole", pool()), build(tmp_path / "short", pool(), storage=storage)
    every = torch.arange(IMAGES)
    assert short[every].dtype == torch.float32
    assert not torch.equal(short[every], whole[every])
    torch.testing.assert_close(short[every], whole[every], rtol=digits, atol=1e-6)
    sizes = [(tmp_path / name / "tokens.npy").stat().st_size - 128 for name in ("whole", "short")]
    assert sizes[0] == 2 * sizes[1] == 4 * IMAGES * 3 * WIDTH
    assert torch.equal(build(tmp_path / "short", pool(0), storage=storage)[every], short[every])


def test_tokens_too_large_for_float16_are_told(tmp_path: Path) -> None:
    experts = pool()
    for expert in experts.experts:
        expert[-1].weight.data.mul_(1e8)
    with pytest.raises(UserError, match=r"^tokens.storage: float16 cannot hold tokens as large as \d.*: use float32$"):
        build(tmp_path, experts, storage="float16")


class SmallMemory(CountingPool):
    """A GPU that holds two images at a time."""

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(images)


def test_images_that_do_not_fit_at_once_go_in_halves_and_it_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    small = SmallMemory(SmallConv(image_shape=(1, 8, 8), width=WIDTH) for _ in range(3))
    found = build(tmp_path / "small", small)[torch.arange(IMAGES)]
    assert capsys.readouterr().out.count("4 images at a time do not fit") == 1
    torch.testing.assert_close(found, build(tmp_path / "large", pool())[torch.arange(IMAGES)], rtol=1e-4, atol=1e-6)


def test_one_image_that_does_not_fit_is_told(tmp_path: Path) -> None:
    class NoMemory(CountingPool):
        def forward(self, images: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    experts = NoMemory(SmallConv(image_shape=(1, 8, 8), width=WIDTH) for _ in range(3))
    with pytest.raises(UserError, match=r"^tokens.batch_size: the GPU's memory is too small for one image"):
        build(tmp_path, experts)


def test_full_disk_is_told_and_with_room_again_the_store_is_built(small_disk: Path, live: Tensor) -> None:
    (small_disk / "filler").write_bytes(b"0" * ((1 << 20) - 20_000))
    with pytest.raises(UserError) as caught:
        build(small_disk / "tokens", pool())
    message = str(caught.value)
    assert message.startswith(f"{small_disk / 'tokens' / 'tokens.npy'}: cannot be written: No space left") and "\n" not in message
    (small_disk / "filler").unlink()
    assert torch.equal(build(small_disk / "tokens", pool())[torch.arange(IMAGES)], live)


def test_disk_that_fills_up_on_the_way_costs_a_block_at_most(small_disk: Path, live: Tensor) -> None:
    """The file itself has its room from the beginning; notes have not."""

    class Filling(CountingPool):
        def forward(self, images: Tensor) -> Tensor:
            if self.seen == 30 * BATCH:
                fill(small_disk / "filler")
            return super().forward(images)

    torch.manual_seed(0)
    filling = Filling(SmallConv(image_shape=(1, 8, 8), width=WIDTH) for _ in range(3))
    with pytest.raises(UserError, match="No space left"):
        build(small_disk / "tokens", filling)
    (small_disk / "filler").unlink()
    again = pool()
    assert torch.equal(build(small_disk / "tokens", again)[torch.arange(IMAGES)], live)
    assert again.seen == IMAGES - 20 * BATCH


def fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"0" * 512)


def flip_a_bit(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_damaged_block_of_a_finished_store_is_computed_again(
    tmp_path: Path, live: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path, pool())
    flip_a_bit(tmp_path / "tokens.npy", -7)
    again = pool()
    assert torch.equal(build(tmp_path, again)[torch.arange(IMAGES)], live)
    assert again.seen == IMAGES % (LOST_AT_MOST * BATCH)  # the last block
    assert "1 of 4 blocks" in capsys.readouterr().out
    assert torch.equal(build(tmp_path, pool(0))[torch.arange(IMAGES)], live)


def test_damaged_block_of_a_half_built_store_is_computed_again(tmp_path: Path, live: Tensor) -> None:
    kill_after(tmp_path, 45 * BATCH)
    flip_a_bit(tmp_path / "tokens.npy", 200)
    again = pool()
    assert torch.equal(build(tmp_path, again)[torch.arange(IMAGES)], live)
    assert again.seen == IMAGES - 20 * BATCH  # one of the two blocks that were there
