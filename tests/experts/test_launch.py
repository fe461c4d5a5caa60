"""Which experts are trained and which are tried again, by whatever launcher; and real processes that are killed."""

import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from noise import run_in
from small_experts import Weights, killing, open_small, weights_of
from told import one_line

from dmoe.artifacts import write_json
from dmoe.errors import UserError
from dmoe.run import Run
from experts import launch
from experts.launch import train_all_experts
from experts.process import End, log_of


class Scripted:
    """A launcher with a number of places, where each expert's processes end one after the other as is written here."""

    poll_seconds = 0.0
    place = "scripted"

    def __init__(self, run: Run, places: int, statuses: dict[int, list[int | None]]) -> None:
        self.run, self.places, self.statuses = run, places, statuses
        self.started: list[int] = []
        self.running: list[int] = []
        self.stopped = False

    def start(self, numbers: Sequence[int]) -> int:
        started = list(numbers[: self.places - len(self.running)])
        self.started += started
        self.running += started
        return len(started)

    def ended(self) -> list[End]:
        ends = [End(number, self.statuses[number].pop(0)) for number in self.running]
        self.running.clear()
        for end in ends:
            log_of(self.run, end.number).write_text(f"expert {end.number} says {end.status}\n")
            if end.status == 0:
                finish(self.run, end.number)
        return ends

    def stop(self) -> None:
        self.stopped = True


def finish(run: Run, number: int) -> None:
    stage = run.expert_stage(number)
    write_json(stage.manifest, {"inputs": stage.inputs, "files": {}})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return run_in(tmp_path / "run", "experts.count=4")


def launched(run: Run, monkeypatch: pytest.MonkeyPatch, statuses: dict[int, list[int | None]], places: int = 9) -> Scripted:
    scripted = Scripted(run, places, statuses)
    monkeypatch.setattr(launch, "_launcher", lambda *_, **__: scripted)
    return scripted


def test_every_expert_is_started_once_and_no_more_at_a_time_than_there_is_room_for(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted = launched(run, monkeypatch, {number: [0] for number in range(4)}, places=3)
    train_all_experts(run)
    assert scripted.started == [0, 1, 2, 3]
    assert scripted.stopped


def test_finished_expert_is_not_trained_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(run, 2)
    scripted = launched(run, monkeypatch, {number: [0] for number in range(4)})
    train_all_experts(run)
    assert scripted.started == [0, 1, 3]


def test_nothing_is_launched_where_all_are_finished(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        finish(run, number)
    scripted = launched(run, monkeypatch, {})
    train_all_experts(run)
    assert not scripted.stopped


def test_killed_failed_and_lost_experts_are_tried_again_with_a_line_each(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted = launched(run, monkeypatch, {0: [-9, 1, 0], 1: [0], 2: [None, 0], 3: [0]})
    train_all_experts(run)
    assert sorted(scripted.started) == [0, 0, 0, 1, 2, 2, 3]
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if "retry" in line] == [
        "expert 0 was ended by signal 9; goes on from its last checkpoint, retry 1 of 2",
        "expert 2 was lost with its worker; goes on from its last checkpoint, retry 1 of 2",
        "expert 0 failed with status 1; goes on from its last checkpoint, retry 2 of 2",
    ]


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_tries_are_bounded_and_the_others_are_finished(run: Run, monkeypatch: pytest.MonkeyPatch, retries: int) -> None:
    run = run_in(run.folder.path, "experts.count=4", f"experts.retries={retries}")
    scripted = launched(run, monkeypatch, {0: [0], 1: [-9] * 9, 2: [0], 3: [0]}, places=1)
    with pytest.raises(UserError) as caught:
        train_all_experts(run)
    tries = f" after {retries + 1} tries" if retries else ""
    assert one_line(caught) == (
        f"expert 1 was ended by signal 9{tries}; the finished ones are kept. The end of {log_of(run, 1)}: expert 1 says -9"
    )
    assert scripted.started.count(1) == retries + 1
    assert all(run.expert_stage(number).finished() is not None for number in (0, 2, 3))
    assert scripted.stopped


@pytest.mark.parametrize(("status", "said"), [(2, "failed with status 2"), (130, "was interrupted"), (143, "was interrupted")])
def test_users_error_and_interruption_are_not_tried_again(
    run: Run, monkeypatch: pytest.MonkeyPatch, status: int, said: str
) -> None:
    scripted = launched(run, monkeypatch, {0: [status], 1: [0], 2: [status], 3: [0]})
    with pytest.raises(UserError) as caught:
        train_all_experts(run)
    assert one_line(caught).startswith(f"expert 0 {said}, and 1 more; the finished ones are kept.")
    assert scripted.started == [0, 1, 2, 3]


def test_expert_that_ends_well_but_is_not_here_shows_a_file_system_that_is_not_shared(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "SHARED_SECONDS", 0.0)
    scripted = launched(run, monkeypatch, {number: [0] for number in range(4)})
    monkeypatch.setattr(scripted, "ended", lambda: [End(0, 0)])
    with pytest.raises(UserError, match="all nodes must share the file system of the run folder"):
        train_all_experts(run)


@pytest.mark.slow
def test_experts_killed_by_sigkill_go_on_and_end_in_the_same_weights(
    undisturbed: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        killing(tmp_path / "run", 1, at=10, signal=signal.SIGKILL),
        killing(tmp_path / "run", 4, at=25, signal=signal.SIGKILL),
    ):
        train_all_experts(open_small(tmp_path / "run"), gpu=-1, threads=2)
    assert weights_of(tmp_path / "run") == undisturbed
    said = capsys.readouterr().out
    for number in (1, 4):
        assert f"expert {number} was ended by signal 9; goes on from its last checkpoint, retry 1 of 2" in said


@pytest.mark.slow
def test_expert_that_is_terminated_is_left_to_the_next_visit_which_ends_in_the_same_weights(
    undisturbed: Weights, tmp_path: Path
) -> None:
    with (
        killing(tmp_path / "run", 1, at=10, signal=signal.SIGTERM),
        pytest.raises(UserError, match="expert 1 was interrupted; the finished ones are kept"),
    ):
        train_all_experts(open_small(tmp_path / "run"), gpu=-1, threads=2)
    assert sorted(weights_of(tmp_path / "run")) == sorted({*undisturbed} - {"expert_01"})
    train_all_experts(open_small(tmp_path / "run"), gpu=-1, threads=2)
    assert weights_of(tmp_path / "run") == undisturbed
