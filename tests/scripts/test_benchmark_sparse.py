"""The benchmark of sparse layers: that its sides do the same work, and what it writes."""

import json
from pathlib import Path

import pytest
import torch

from scripts import benchmark_sparse as benchmark
from scripts.benchmarks.measuring import Place

PLACE = Place("cpu", threads=1)


def test_the_loop_over_experts_says_what_the_layer_says_and_each_expert_is_the_dense_layer() -> None:
    made = benchmark.layers(PLACE)
    made["loop"].layer.load_state_dict(made["ours"].state_dict())  # type: ignore[union-attr, operator]
    x = torch.randn(2, 5, benchmark.WIDTH)
    said = {}
    for name in ("ours", "loop"):
        torch.manual_seed(3)
        said[name] = made[name](x)
    torch.testing.assert_close(said["ours"], said["loop"])
    ratio = (said["ours"] / made["dense"](x)).flatten(0, 1)
    torch.testing.assert_close(ratio, ratio.median(dim=1, keepdim=True).values.expand_as(ratio), rtol=1e-2, atol=1e-3)


def test_rows_of_the_layer_are_told_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "CLUSTERED", {"layers": 2, "width": 8, "hidden": 12, "experts": 3})
    words = ["--parts", "layer", "clusters", "--batch_size", "1", "--repeats", "2", "--json", str(tmp_path / "rows.json")]
    benchmark.main(words)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["name"] for row in rows] == ["layer", "layer", "clusters"]
    assert rows[0]["ratio"] == pytest.approx(rows[0]["ours"] / rows[0]["baseline"])
    assert rows[0]["holds"] == (rows[0]["ratio"] <= 1.35)
    assert rows[1]["bar"] is None
    assert f"| {rows[0]['ratio']:.2f} | 1.35 |" in capsys.readouterr().out
