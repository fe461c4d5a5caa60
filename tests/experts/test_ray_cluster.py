"""Experts on a Ray cluster of two nodes, all on this machine: how they are placed, what is told, what survives."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from noise import run_in
from small_experts import EXPERTS, Weights, killing, open_small, weights_of
from told import one_line

from dmoe.errors import UserError
from experts import ray_cluster
from experts.launch import train_all_experts
from experts.process import log_of
from experts.ray_cluster import RayCluster, _check_address, _share


@pytest.mark.parametrize(
    ("nodes", "share"),
    [
        ([{"CPU": 8.0}, {"CPU": 4.0}], (0, 3)),
        ([{"CPU": 64.0}, {"CPU": 32.0, "GPU": 4.0}, {"CPU": 20.0, "GPU": 4.0}], (1, 5)),
        ([{"CPU": 2.0, "GPU": 4.0}], (1, 1)),
    ],
)
def test_expert_gets_a_gpu_with_its_share_of_the_cpus_or_the_configured_cpus(
    nodes: list[dict[str, float]], share: tuple[int, int]
) -> None:
    assert _share(nodes, threads=3) == share


def test_missing_ray_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="--launcher ray: Ray is not installed: pip install ray"):
        RayCluster(run_in(tmp_path), gpu=-1)


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[str]:
    """The address of a cluster of two nodes of one CPU each."""
    pytest.importorskip("ray", reason="Ray is not installed (the extra 'ray')")
    from ray.cluster_utils import Cluster

    cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster.address
    cluster.shutdown()


@pytest.fixture
def cluster(two_nodes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", two_nodes)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_six_experts_on_two_nodes_end_in_the_same_weights_though_a_worker_and_an_expert_are_killed(
    undisturbed: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, on_sigterm = open_small(tmp_path / "run"), signal.getsignal(signal.SIGTERM)
    with (
        killing(tmp_path / "run", 1, at=10, signal=signal.SIGKILL, parent=True),
        killing(tmp_path / "run", 4, at=25, signal=signal.SIGKILL),
    ):
        train_all_experts(run, launcher="ray", gpu=-1)
    assert weights_of(tmp_path / "run") == undisturbed
    said = capsys.readouterr().out
    assert f"experts: {EXPERTS} of {EXPERTS} to train, each on 1 CPU of a Ray cluster of 2 nodes" in said
    assert "expert 4 was ended by signal 9; goes on from its last checkpoint, retry 1 of 2" in said
    assert "expert 1 was lost" not in said  # Ray itself tries again
    assert signal.getsignal(signal.SIGTERM) is on_sigterm


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_worker_that_is_lost_once_too_often_for_ray_is_tried_again_by_the_launcher(
    undisturbed: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "RETRIES_OF_LOST_WORKERS", 0)
    with killing(tmp_path / "run", 2, at=10, signal=signal.SIGKILL, parent=True):
        train_all_experts(open_small(tmp_path / "run"), launcher="ray", gpu=-1)
    assert weights_of(tmp_path / "run") == undisturbed
    assert "expert 2 was lost with its worker; goes on from its last checkpoint, retry 1 of 2" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_folder_that_a_node_does_not_have_is_told(tmp_path: Path) -> None:
    run = run_in(tmp_path / "run")
    launcher = RayCluster(run, gpu=-1)
    try:
        launcher.start([0])
        assert not log_of(run, 0).parent.exists()
        with pytest.raises(UserError, match=r"log\.txt: No such file or directory: all nodes must share the file systems"):
            while True:
                launcher.ended()
    finally:
        launcher.stop()


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_expert_that_is_too_large_for_every_node_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"experts\.threads: 5 CPUs are more than any node of the Ray cluster has"):
        RayCluster(run_in(tmp_path, "experts.threads=5"), gpu=-1)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_stopping_ends_the_processes_of_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wait = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    monkeypatch.setattr(ray_cluster, "command", lambda run, *flags: [sys.executable, "-S", "-c", wait])
    run = run_in(tmp_path)
    log_of(run, 0).parent.mkdir(parents=True)
    launcher = RayCluster(run, gpu=-1)
    launcher.start([0])
    while not (log_of(run, 0).exists() and log_of(run, 0).read_text().endswith("\n")):
        assert launcher.ended() == []
    launcher.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(int(log_of(run, 0).read_text()), 0)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "nowhere.invalid:6379"])
def test_cluster_that_cannot_be_reached_is_told_at_once(address: str) -> None:
    with pytest.raises(UserError) as caught:
        _check_address(address)
    assert one_line(caught).startswith(f"--launcher ray: no cluster at RAY_ADDRESS={address}: ")


@pytest.mark.parametrize("address", ["", "auto", "local", "ray://head:10001"])
def test_other_addresses_are_left_to_ray(address: str) -> None:
    _check_address(address)
