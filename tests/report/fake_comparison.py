"""A made-up comparison folder: every method, protocol and part that a report can show. The numbers are drawn, not measured."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SUPPORT = 64
SIZES = (4, 8, 16, 32, 64, 128)
DOMAINS = [f"{angle} degrees{mirrored}" for angle in range(5, 360, 45) for mirrored in ("", ", mirrored")]
MEANS = {
    "ERM": 0.80,
    "ERM, batch statistics": 0.785,
    "ERM, mixed statistics": 0.80,
    "TENT": 0.795,
    "SHOT-IM": 0.81,
    "T3A": 0.80,
    "MEMO": 0.805,
    "LAME": 0.79,
    "EATA": 0.797,
    "SAR": 0.796,
    "ARM-CML": 0.83,
    "ARM-BN": 0.82,
    "ARM-LL": 0.81,
    "CORAL": 0.79,
    "IRM": 0.78,
    "Meta-DMoE": 0.87,
    "Meta-DMoE before adapting": 0.68,
    "Meta-DMoE, target of zeros": 0.845,
    "oracle: told the domain": 0.93,
}
IMAGES = 320
STREAMS = ("per batch", "continual", "mixed stream", "label-skewed stream")
ABLATIONS = {
    "experts": {"1 expert": 0.84, "3 experts": 0.86, "12 experts": 0.872},
    "aggregator": {"mean": 0.85, "max": 0.845},
    "parts": {"aggregator alone": 0.83, "student alone": 0.86},
    "distilled": {"logits": 0.84},
    "mask": {"none": 0.86},
}


def rows(*, seeds: int = 5, domains: int = 16) -> list[dict[str, Any]]:
    random = np.random.default_rng(7)
    names = DOMAINS[:domains]
    hard = random.normal(0, 0.012, domains)
    found = []
    for seed in range(1, seeds + 1):

        def row(method: str, mean: float, *, seed: int = seed, **more: Any) -> dict[str, Any]:
            values = (mean + hard + random.normal(0, 0.004) + random.normal(0, 0.008, domains)).clip(0, 1).round(4)
            return {
                "kind": "test",
                "method": method,
                "paper": "" if method.startswith("Meta") else "Somebody et al., 2099",
                "dataset": "digits",
                "split": "target",
                "protocol": "per domain",
                "support_size": SUPPORT,
                "score_support": True,
                "predict": "after",
                "images": None,
                "settings": {"lr": 0.001, "steps": 10} if method not in ("ERM", "Meta-DMoE") else {},
                "seed": seed,
                "metric": "accuracy",
                "unit": "fraction",
                "overall": {"accuracy": float(values.mean())},
                "mean": float(values.mean()),
                "worst": float(values.min()),
                "domains": dict(zip(names, values.tolist(), strict=True)),
                "cost": {
                    "training_cpu_seconds": 300.0 + random.normal(),
                    "adapt_ms": 12.0 + random.normal(),
                    "predictions_per_second": 21000.0,
                    "peak_mb": 31.0,
                },
                "run": f"seed_{seed}",
                "data": "0123456789abcdef" * 4,
                "versions": {"python": "3.11.7", "torch": "2.13.0"},
                **more,
            }

        for method, mean in MEANS.items():
            found.append(row(method, mean))
            if method in ("ERM", "Meta-DMoE", "TENT", "SHOT-IM", "ARM-CML", "T3A"):
                found += [row(method, mean - 0.3 / size + 0.3 / 64, support_size=size) for size in SIZES if size != SUPPORT]
            if not method.startswith(("oracle", "Meta-DMoE b")):
                found.append(row(method, mean + 0.002, score_support=False))
                found.append(row(method, mean - 0.4, protocol="support from another domain"))
                found += [row(method, mean - 0.03 * n, protocol=stream, images=IMAGES) for n, stream in enumerate(STREAMS)]
                found.append(row(method, mean - 0.05, protocol="continual", images=IMAGES, predict="before"))
        for group, settings in ABLATIONS.items():
            found += [row("Meta-DMoE", m, kind="ablation", group=group, setting=s) for s, m in settings.items()]
        for method in ("TENT", "SHOT-IM", "T3A") if seed == 1 else ():
            for number, lr in enumerate((0.0001, 0.001, 0.01)):
                score = float(0.8 - 0.01 * abs(number - 1) + random.normal(0, 0.001))
                trial = {"kind": "trial", "method": method, "trial": number, "settings": {"lr": lr, "steps": 10}}
                found.append(
                    {**trial, "split": "validation", "score": score, "seed": seed, "dataset": "digits", "run": f"seed_{seed}"}
                )
    return found


def evidence(*, domains: int = 16) -> dict[str, Any]:
    random = np.random.default_rng(8)
    names = DOMAINS[:domains]
    weights = random.dirichlet(np.ones(6) * 4, domains)
    examples = []
    for number in range(48):
        after = int(random.integers(10))
        examples.append(
            {
                "domain": names[number // 6 % domains],
                "image": png(random.integers(0, 256, (14, 14))),
                "truth": str(number % 10),
                "before": str(after if number % 6 > 2 else int(random.integers(10))),
                "after": str(number % 10 if number % 3 else after),
            }
        )
    experts = [f"{30 * n} degrees; {30 * n + 90} degrees; {30 * n + 180} degrees" for n in range(6)]
    return {
        "attention": {"experts": experts, "domains": names, "weights": weights.tolist()},
        "examples": examples,
        "curves": curves(),
    }


def curves() -> dict[str, list[list[float]]]:
    random = np.random.default_rng(9)
    stages = {f"experts/expert_{n:02d}": (200, 0.5) for n in range(6)} | {"aggregator": (300, 0.6), "student": (1000, 0.78)}
    stages |= {"meta": (500, 0.88)}
    return {
        name: [[step * k, float(top * (1 - 0.4 / k) + random.normal(0, 0.01))] for k in range(1, 5)]
        for name, (step, top) in stages.items()
    }


def png(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def write_rows(folder: Path, made: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return folder


def write_comparison(folder: Path, *, seeds: int = 5, domains: int = 16) -> Path:
    write_rows(folder, rows(seeds=seeds, domains=domains))
    (folder / "evidence.json").write_text(json.dumps(evidence(domains=domains)), encoding="utf-8")
    run = folder / "seed_1"
    for stage, scores in curves().items():
        (run / stage).mkdir(parents=True, exist_ok=True)
        (run / stage / "manifest.json").write_text(json.dumps({"stage": stage, "figures": {"scores": scores, "cpu_seconds": 7.5}}))
    (run / "config.yaml").write_text("dataset: digits\nseed: 1\nmeta:\n  inner_lr: 1.0\n")
    return folder


def plain_rows() -> list[dict[str, Any]]:
    """As a run writes them without a comparison: no kind, no protocol, all metrics of every domain."""
    found = []
    for method, mean in {"ERM student": 0.77, "batch statistics": 0.75, "before adapting": 0.67, "adapted": 0.88}.items():
        domains = {name: {"macro_f1": 0.1, "accuracy": mean + 0.001 * n} for n, name in enumerate(DOMAINS)}
        values = [metrics["accuracy"] for metrics in domains.values()]
        found.append(
            {
                "method": method,
                "dataset": "digits",
                "split": "target",
                "seed": 1,
                "replicate": "seed:1",
                "metric": "accuracy",
                "reported": {"accuracy": "accuracy"},
                "unit": "fraction",
                "overall": {"accuracy": mean, "macro_f1": 0.1},
                "mean": sum(values) / len(values),
                "worst": min(values),
                "domains": domains,
                "support_size": SUPPORT,
                "score_support": True,
                "weights": {"weights.safetensors": "ab"},
                "config": {"dataset": "digits", "seed": 1},
                "data": "0123456789abcdef" * 4,
                "versions": {"python": "3.11.7"},
            }
        )
    return found
