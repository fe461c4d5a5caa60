"""What an expert's process is called with, and what its end means."""

from pathlib import Path

import pytest
from noise import run_in

from experts.process import End, command, last_lines, steps_done


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (1, "expert 3 failed with status 1"),
        (2, "expert 3 failed with status 2"),
        (-9, "expert 3 was ended by signal 9"),
        (-15, "expert 3 was interrupted"),
        (143, "expert 3 was interrupted"),
        (130, "expert 3 was interrupted"),
        (None, "expert 3 was lost with its worker"),
    ],
)
def test_end_is_told_in_words(status: int | None, said: str) -> None:
    assert str(End(3, status)) == said


@pytest.mark.parametrize("status", [1, -9, -11, None])
def test_what_may_go_better_next_time_may_be_tried_again(status: int | None) -> None:
    assert End(0, status).may_be_tried_again


@pytest.mark.parametrize("status", [0, 2, 130, 143, -2, -15])
def test_end_that_was_wanted_or_would_come_again_may_not(status: int) -> None:
    assert not End(0, status).may_be_tried_again


def test_command_passes_on_what_is_not_in_the_recorded_configuration(tmp_path: Path) -> None:
    run = run_in(tmp_path, "data.dir=/data", "data.workers=3", "checkpoint_every=7", "experts.retries=9")
    words = command(run, "--expert_idx", "1")
    assert words[1].endswith("train_single_expert.py")
    assert words[2:6] == ["--run_dir", str(tmp_path), "--expert_idx", "1"]
    assert words[words.index("--data_dir") + 1] == "/data"
    assert {"data.workers=3", "checkpoint_every=7"} < set(words)
    assert not any("retries" in word for word in words)


def test_log_tells_how_far_a_training_is(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert (steps_done(log), last_lines(log, 1)) == (0, [])
    log.write_text("step 20/60  loss 2.1\nstep 40/60  loss 1.9\n\n")
    assert (steps_done(log), last_lines(log, 1)) == (40, ["step 40/60  loss 1.9"])
