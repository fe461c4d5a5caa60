"""What sparse layers cost beside the dense ones that do as much, forward and backward, at the sizes of a ViT-S/16.

    python scripts/benchmark_sparse.py
    python scripts/benchmark_sparse.py --parts layer --device cuda --precision bfloat16 --json sparse.json

Parts: ``layer``, a GMoE layer of 6 experts, one for a patch, against the dense layer and against a loop over experts that picks out
each one's patches, in turn in one process; ``step``, whole training steps of GMoE-S/16 (balance loss, noise, dropout) and of
ViT-S/16, both with Adam and drop paths, and their peak memory with networks and optimizers, in processes of their own, in turn;
``clusters``, the balanced clusters of four layers of ViT-B/16's size, 24 experts each. Times are CPU seconds, on a GPU those of the
clock. Figures are medians, with ranges. The memory of the experts' weights, gradients and moments, 0.19 GB, weighs less in larger
batches.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed

from dmoe.backbones import build_backbone
from dmoe.command_line import run_main
from dmoe.config import BackboneConfig
from dmoe.machine import keep_freed_memory
from dmoe.models.sparse import CosineRouter, SparseFFN, balance_of, routings
from dmoe.models.sparse.convert import set_drop_path
from dmoe.models.sparse.ffn import clustered_units, copies
from dmoe.precision import computing_in
from scripts.benchmarks.measuring import Criterion, Place, Step, in_turn, row, spread, told

WIDTH, HIDDEN, TOKENS, EXPERTS = 384, 1536, 197, 6
CLUSTERED = {"layers": 4, "width": 768, "hidden": 3072, "experts": 24}
BARS = {"layer": 1.35, "step": 1.15, "memory": 1.12}
CLASSES, DROP_PATH = 7, 0.1
PARTS = ("layer", "step", "clusters")


class Loop(nn.Module):
    """The same layer with nothing sorted: an expert after the other picks out its tokens."""

    def __init__(self, layer: SparseFFN) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        tokens, layer = x.reshape(-1, x.shape[-1]), self.layer
        assert layer.router is not None
        logits = layer.router(tokens.float())
        noisy = logits + torch.randn_like(logits) / len(layer.w1)
        gates, chosen = noisy.softmax(dim=1).max(dim=1)
        found = torch.zeros_like(tokens)
        for expert in range(len(layer.w1)):
            its = (chosen == expert).nonzero()[:, 0]
            hidden = layer.act(torch.addmm(layer.b1[expert], tokens[its], layer.w1[expert]))
            said = torch.addmm(layer.b2[expert], hidden, layer.w2[expert])
            found = found.index_add(0, its, (said * gates[its, None]).to(found.dtype))
        return found.view_as(x)


def layers(place: Place) -> dict[str, nn.Module]:
    """A dense layer, and sparse ones whose experts are copies of it."""
    torch.manual_seed(0)
    first, second = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
    made: dict[str, nn.Module] = {"dense": nn.Sequential(first, nn.GELU(), second)}
    sparse = [
        SparseFFN(
            copies(first, second, EXPERTS),
            act=nn.GELU(),
            router=CosineRouter(width=WIDTH, experts=EXPERTS),
            top_k=1,
            weighting="probability",
            gate_noise=1.0,
            balance_weight=0.01,
        )
        for _ in range(2)
    ]
    made |= {"ours": sparse[0], "loop": Loop(sparse[1])}
    return {name: module.to(place.at).train() for name, module in made.items()}


def measure_layer(place: Place, *, batch_size: int, repeats: int) -> list[dict[str, Any]]:
    """The layers in turn, a warm-up of each first."""
    torch.set_num_threads(place.threads)
    made, seconds = layers(place), dict[str, list[float]]()
    x = torch.randn(batch_size, TOKENS, WIDTH, device=place.at, requires_grad=True)
    direction = torch.randn_like(x)
    for number in range(repeats + 1):
        for name, module in made.items():
            taken = timed(partial(forward_backward, module, x, direction, place), place)
            if number:
                seconds.setdefault(name, []).append(taken)
    return [
        compared(f"layer, against {what}", seconds["ours"], seconds[name], bar, place)
        for name, what, bar in (("dense", "a dense one", BARS["layer"]), ("loop", "a loop over experts", None))
    ]


def forward_backward(module: nn.Module, x: Tensor, direction: Tensor, place: Place) -> None:
    with computing_in(place.precision, place.at), routings(module) as found:
        said = module(x)
    balance = balance_of(module, found)
    loss = (said.float() * direction).sum()
    (loss if balance is None else loss + balance).backward()


def training_step(name: str, batch_size: int, size: int, place: Place) -> Step:
    """Whole steps of a network by name; it and its optimizer are made by the first one, so that they count in its memory."""
    images = torch.rand(batch_size, 3, size, size, device=place.at)
    labels = torch.arange(batch_size, device=place.at) % CLASSES
    made: list[Any] = []
    keep_freed_memory()  # as in training

    def step() -> None:
        if not made:
            torch.manual_seed(0)
            config = BackboneConfig(name=name)
            network = build_backbone(config, image_shape=(3, size, size), num_outputs=CLASSES).to(place.at).train()
            set_drop_path(list(network.features.blocks), DROP_PATH)
            made.extend((network, torch.optim.Adam(network.parameters(), lr=3e-5, fused=True)))
        network, adam = made
        with computing_in(place.precision, place.at), routings(network.features) as found:
            logits = network(images)
        loss = nn.functional.cross_entropy(logits.float(), labels)
        balance = balance_of(network.features, found)
        (loss if balance is None else loss + balance).backward()
        adam.step()
        adam.zero_grad()

    return step


def measure_step(place: Place, *, batch_size: int, size: int, rounds: int, repeats: int) -> list[dict[str, Any]]:
    names = {"ours": "gmoe_vit_s16", "baseline": "timm:deit_small_patch16_224"}
    sides = in_turn(
        {side: partial(training_step, name, batch_size, size) for side, name in names.items()},
        rounds=rounds,
        repeats=repeats,
        place=place,
    )
    what = f"GMoE-S/16 against ViT-S/16, {batch_size} images of {size}x{size}"
    return [
        row(Criterion("step", f"a training step, {what}", bar=BARS["step"], better="below"), sides, place),
        row(Criterion("memory", f"its peak memory, {what}", unit="GB", bar=BARS["memory"], better="below"), sides, place),
    ]


def measure_clusters(place: Place) -> list[dict[str, Any]]:
    torch.set_num_threads(place.threads)
    torch.manual_seed(0)
    linears = [nn.Linear(CLUSTERED["width"], CLUSTERED["hidden"]) for _ in range(CLUSTERED["layers"])]
    cpu = Place("cpu", place.threads)
    seconds = [timed(partial(clustered_units, linear, CLUSTERED["experts"]), cpu) for linear in linears]
    what = "balanced clusters of {layers} layers of {hidden} rows of width {width}, {experts} each".format(**CLUSTERED)
    facts = {"name": "clusters", "what": what, "ours": sum(seconds), "unit": "CPU seconds", "baseline": None, "ratio": None}
    return [{**facts, "bar": None, "better": "below", "holds": None, "machine": cpu.machine}]


def timed(step: Callable[[], object], place: Place) -> float:
    """CPU seconds of a step, on a GPU seconds by the clock."""
    if place.on_gpu:
        torch.cuda.synchronize(place.at)
    clock = time.perf_counter if place.on_gpu else time.process_time
    began = clock()
    step()
    if place.on_gpu:
        torch.cuda.synchronize(place.at)
    return clock() - began


def compared(what: str, ours: Sequence[float], other: Sequence[float], bar: float | None, place: Place) -> dict[str, Any]:
    """A row as :func:`~scripts.benchmarks.measuring.row` has them, of two lists of seconds taken in turn."""
    ratio = statistics.median(ours) / statistics.median(other)
    return {
        "name": "layer",
        "what": what,
        "ours": statistics.median(ours),
        "baseline": statistics.median(other),
        "range": {"ours": [min(ours), max(ours)], "baseline": [min(other), max(other)]},
        "unit": "seconds" if place.on_gpu else "CPU seconds",
        "ratio": ratio,
        "bar": bar,
        "better": "below",
        "holds": None if bar is None else ratio <= bar,
        "machine": place.machine,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| what | ours | beside it | ratio | at most |", "|---|---|---|---|---|"]
    for facts in rows:
        beside = "" if facts["baseline"] is None else spread(facts["baseline"])
        ratio, bar = ("" if facts[name] is None else f"{facts[name]:.2f}" for name in ("ratio", "bar"))
        lines.append(f"| {facts['what']} | {spread(facts['ours'])} {facts['unit']} | {beside} | {ratio} | {bar} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--batch_size", type=int, default=32, help="images of the layer")
    parser.add_argument("--step_batch_size", type=int, default=32, help="images of a training step")
    parser.add_argument("--size", type=int, default=224, help="edge of the images of a step in pixels")
    parser.add_argument("--repeats", type=int, default=7, help="of each layer, in turn")
    parser.add_argument("--rounds", type=int, default=1, help="processes of each network, in turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    place = Place(options.device, options.threads, options.precision)
    measure: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "layer": partial(measure_layer, place, batch_size=options.batch_size, repeats=options.repeats),
        "step": partial(
            measure_step, place, batch_size=options.step_batch_size, size=options.size, rounds=options.rounds, repeats=2
        ),
        "clusters": partial(measure_clusters, place),
    }
    rows = []
    for part in options.parts:
        for facts in measure[part]():
            rows.append(facts)
            print(told(facts), flush=True)
    print(f"\n{table(rows)}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
