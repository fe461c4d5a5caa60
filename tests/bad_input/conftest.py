"""A small finished run, made once; and how many bad inputs were tried."""

import shutil
from pathlib import Path

import pytest
from doors import Made, make_pictures, make_run


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    parent = tmp_path_factory.mktemp("bad_input")
    run = Made(parent / "run", parent / "pictures", parent / "checkpoints")
    make_pictures(run.pictures)
    make_run(run.folder, run.pictures)
    run.checkpoints.mkdir()
    for stage in (path.parent for path in run.folder.rglob("manifest.json")):
        for pattern in ("checkpoint*", "best*"):
            for path in stage.glob(pattern):
                path.rename(run.checkpoints / path.name) if stage.name == "student" else path.unlink()
    return run


@pytest.fixture
def whole(made: Made, tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    return Path(shutil.copytree(made.folder, tmp_path / "run"))


@pytest.fixture
def begun(whole: Path, made: Made) -> Path:
    """A run whose student was killed after its second step."""
    shutil.copytree(made.checkpoints, whole / "student", dirs_exist_ok=True)
    for name in ("student/manifest.json", "student/weights.safetensors", "model.json", "results.jsonl"):
        (whole / name).unlink()
    for name in ("meta", "predictions"):
        shutil.rmtree(whole / name)
    return whole


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    tried = {
        report.nodeid
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        if "tests/bad_input/" in report.nodeid and "[" in report.nodeid
    }
    if tried:
        terminalreporter.write_line(f"bad input: {len(tried)} generated ones were tried")
