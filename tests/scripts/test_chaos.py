"""A run that is killed again and again ends as if nothing had been; the long version is scripts/chaos.py itself."""

import shutil
from pathlib import Path

import pytest
from runs import SMALL

from scripts import chaos

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all, so that there is one undisturbed run."""
    return tmp_path_factory.mktemp("chaos")


@pytest.mark.parametrize(("signal", "kills"), [("KILL", 4), ("TERM", 2)])
def test_run_that_is_killed_at_random_moments_ends_as_if_nothing_had_been(
    out: Path, capsys: pytest.CaptureFixture[str], signal: str, kills: int
) -> None:
    with pytest.raises(SystemExit) as caught:
        chaos.main(["--kills", str(kills), "--signal", signal, "--out", str(out), *SMALL])
    told = capsys.readouterr().out
    assert caught.value.code == 0, told
    assert f"kill {kills} of {kills}" in told and "equal to the bit" in told


def test_differences_are_told(tmp_path: Path) -> None:
    for name in ("one", "other"):
        for stage in ("student", "meta"):
            (tmp_path / name / stage).mkdir(parents=True)
            (tmp_path / name / stage / "weights.safetensors").write_bytes(b"1")
    assert chaos.different(tmp_path / "one", tmp_path / "other") == []
    (tmp_path / "other" / "meta" / "weights.safetensors").write_bytes(b"2")
    shutil.rmtree(tmp_path / "one" / "student")
    differing = ["meta/weights.safetensors differs", "student/weights.safetensors differs"]
    assert chaos.different(tmp_path / "one", tmp_path / "other") == differing


def test_what_is_done_again_is_told(tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log.txt"
    (folder / "experts").mkdir(parents=True)
    manifest = folder / "experts" / "manifest.json"
    manifest.write_text('{"finished": 1}')
    log.write_text("student: going on after step 90 of 100\n")
    kill = chaos.Noted({manifest: chaos.digest_of_file(manifest)}, {folder / "student": 70}, {log: log.stat().st_size})
    with open(log, "a") as file:
        file.write("student: going on after step 70 of 100\n")
    assert kill.twice(log) == []
    worse = chaos.Noted(kill.finished, {folder / "student": 80}, kill.logs)
    assert worse.twice(log) == [f"{folder / 'student'} was at 80, and went on after 70"]
    manifest.write_text('{"finished": 2}')
    assert kill.twice(log) == [f"{manifest.parent} was finished, and made again"]
