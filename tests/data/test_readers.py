"""Batches that other processes make ahead, in shared memory."""

import gc
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Value, active_children
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dmoe.data import readers
from dmoe.data.readers import SLOTS, empty, read_ahead
from dmoe.errors import UserError
from tests.told import one_line


@dataclass(frozen=True)
class Pair:
    images: Tensor
    labels: Tensor


def filled(step: int) -> Tensor:
    return empty((1000,), torch.float32).fill_(step)


def open_files() -> int:
    return len(list(Path("/dev/fd").iterdir()))


def is_there(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_batches_come_in_the_order_of_their_steps(processes: int) -> None:
    assert [int(batch[999]) for batch in read_ahead(filled, range(3, 20), processes=processes)] == list(range(3, 20))


def test_a_slow_reader_does_not_hold_up_the_others() -> None:
    slow = Value("i", -1)

    def make(step: int) -> Tensor:
        if slow.value in (-1, os.getpid()):
            slow.value = os.getpid()
            time.sleep(0.2)
        return torch.tensor([step, os.getpid()])

    batches = list(read_ahead(make, range(20), processes=2))
    assert [int(batch[0]) for batch in batches] == list(range(20))
    assert sum(int(batch[1]) == slow.value for batch in batches) < 8


def test_tensors_of_any_kind_arrive_however_nested() -> None:
    def make(step: int) -> list[tuple[str, Pair]]:
        images = empty((2, 3), torch.uint8).fill_(step)
        return [("a", Pair(images, torch.tensor(step + 0.5))), ("b", Pair(torch.ones(0, 4), step < images.T))]

    for step, batch in enumerate(read_ahead(make, range(7), processes=2)):
        expected = make(step)
        for (name, pair), (its_name, its_pair) in zip(batch, expected, strict=True):
            assert name == its_name
            for one, other in ((pair.images, its_pair.images), (pair.labels, its_pair.labels)):
                assert (one.dtype, one.shape) == (other.dtype, other.shape)
                assert torch.equal(one, other)


def test_batches_that_are_kept_do_not_change() -> None:
    kept = list(read_ahead(filled, range(5 * SLOTS), processes=2))
    assert [float(batch.mean()) for batch in kept] == list(range(5 * SLOTS))


def test_one_tensor_of_a_batch_keeps_its_memory() -> None:
    kept = [batch[1][5:] for batch in read_ahead(lambda step: (filled(step), filled(-step)), range(4 * SLOTS), processes=1)]
    assert [float(part.mean()) for part in kept] == [-step for step in range(4 * SLOTS)]


def test_memory_is_used_again_once_nobody_holds_it() -> None:
    places = {batch.data_ptr() for batch in read_ahead(filled, range(40), processes=2)}
    assert len(places) <= 2 * SLOTS


def test_a_reader_makes_its_tensors_where_they_are_found() -> None:
    def make(step: int) -> tuple[Tensor, int]:
        images = empty((4,), torch.float32)
        return images, images.data_ptr()

    for images, address in read_ahead(make, range(4), processes=1):
        assert images.data_ptr() == address  # forks have their memory at the same addresses


def test_a_mistake_of_the_user_crosses_processes_as_one_line() -> None:
    def make(step: int) -> Tensor:
        if step == 5:
            raise UserError("image 5: cannot be read: mend it")
        return filled(step)

    batches = read_ahead(make, range(9), processes=2)
    assert [int(next(batches)[0]) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(UserError) as caught:
        next(batches)
    assert one_line(caught) == "image 5: cannot be read: mend it"
    assert active_children() == []


def test_any_other_error_comes_with_its_place() -> None:
    def make(step: int) -> Tensor:
        return torch.zeros(3)[step + 5]

    with pytest.raises(RuntimeError, match=r"(?s)return torch.zeros\(3\)\[step \+ 5\].*IndexError"):
        list(read_ahead(make, range(3), processes=1))


def test_a_reader_that_is_killed_is_told_in_one_line() -> None:
    def make(step: int) -> Tensor:
        if step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return filled(step)

    with pytest.raises(UserError) as caught:
        list(read_ahead(make, range(9), processes=2))
    assert "ended by signal 9" in one_line(caught)
    assert "data.workers" in one_line(caught)
    assert active_children() == []


def test_readers_that_were_killed_while_nobody_asked_are_told_too() -> None:
    batches = read_ahead(filled, range(99), processes=2)
    next(batches)
    for process in active_children():
        process.kill()
        process.join()
    with pytest.raises(UserError, match="ended by signal 9"):
        list(batches)


@pytest.mark.parametrize("how", ["to the end", "stopped early", "forgotten"])
def test_nothing_is_left_of_readers(how: str) -> None:
    gc.collect()  # what the errors of other tests have kept
    before = open_files()
    batches = read_ahead(filled, range(20), processes=2)
    next(batches)
    assert len(active_children()) == 2
    if how == "to the end":
        list(batches)
    elif how == "stopped early":
        batches.close()  # type: ignore[attr-defined]
    else:
        del batches
    assert active_children() == []
    assert open_files() == before


def test_batches_outlive_their_readers() -> None:
    batches = read_ahead(filled, range(9), processes=2)
    first = next(batches)
    del batches
    assert float(first.sum()) == 0.0


def test_a_batch_that_is_too_large_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "SLOT_BYTES", 1 << 16)
    assert len(list(read_ahead(lambda step: torch.zeros(1 << 14), range(3), processes=1))) == 3
    with pytest.raises(UserError) as caught:
        list(read_ahead(lambda step: torch.zeros((1 << 14) + 1), range(3), processes=1))
    assert "data.workers=0" in one_line(caught)


def test_no_room_for_shared_memory_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "SLOT_BYTES", 1 << 62)
    with pytest.raises(UserError) as caught:
        list(read_ahead(filled, range(3), processes=1))
    assert "data.workers" in one_line(caught)
    assert active_children() == []


def test_readers_compute_after_the_other_process_has_used_all_its_threads() -> None:
    numbers = torch.rand(300, 300)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = (numbers @ numbers).sum()
        for batch in read_ahead(lambda _: (numbers @ numbers).sum(), range(4), processes=2):
            assert torch.allclose(batch, expected)
    finally:
        torch.set_num_threads(before)


def test_the_next_batch_is_taken_while_one_is_in_use() -> None:
    taken = []

    def made() -> Generator[int, None, None]:
        try:
            for step in range(5):
                taken.append(step)
                yield step
        finally:
            taken.append(-1)

    batches = readers._one_ahead(made())
    assert next(batches) == 0
    wait_until(lambda: taken == [0, 1])
    assert [next(batches), next(batches)] == [1, 2]
    batches.close()  # type: ignore[attr-defined]
    assert taken[-1] == -1
    assert list(readers._one_ahead(made())) == [0, 1, 2, 3, 4]


ENDLESS = """
from multiprocessing import active_children
import torch
from dmoe.data.readers import read_ahead
for batch in read_ahead(lambda step: torch.full((9,), step), range(10**9), processes=2):
    if batch[0] == 5:
        print(*(process.pid for process in active_children()), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize(("how", "group"), [(signal.SIGKILL, False), (signal.SIGTERM, False), (signal.SIGINT, True)])
def test_readers_end_with_the_process_that_asks_them(interruptible: None, how: signal.Signals, group: bool) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert program.stdout is not None
    assert program.stderr is not None
    processes = [int(number) for number in program.stdout.readline().split()]
    assert len(processes) == 2
    if group:
        os.killpg(program.pid, how)  # as Ctrl-C does
    else:
        program.send_signal(how)
    try:
        wait_until(lambda: not any(is_there(process) for process in processes))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
    assert program.stderr.read().count("Traceback") == (1 if group else 0)  # that of the asking process
    program.wait()


def wait_until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds
        time.sleep(0.01)


def test_nothing_is_called_when_a_slot_is_returned_for_a_ctrl_c_to_get_lost_in() -> None:
    slot = readers._Slot()
    tensor = slot.lend()
    assert not slot.is_free
    assert slot._lent is not None
    held = slot._lent()
    assert held is not None
    assert [reference.__callback__ for reference in weakref.getweakrefs(held)] == [None]
    part = tensor[:3]
    del held, tensor
    assert not slot.is_free
    del part
    assert slot.is_free
