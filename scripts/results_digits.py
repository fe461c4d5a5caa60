"""The results table of the README: the whole run and its controls on the embedded digits, over several seeds.

    python scripts/results_digits.py --seeds 1 2 3 4 5 --out runs/results_digits

Each seed is a run of its own in OUT/seed_N, on one CPU thread, two at a time by default; finished parts are not done again.
Target domains are only ever tested on. Two controls are trained beside each run: an ERM student that is given the CPU time
of all training stages together, and the same meta-training with the target replaced by zeros.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SUPPORT_SIZES = (8, 16, 32, 64, 128)
REUSED = ("experts", "tokens", "aggregator", "student")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--out", type=Path, default=Path("runs/results_digits"))
    parser.add_argument("--processes", type=int, default=2, help="seeds at a time")
    parser.add_argument("--only_seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="configuration fields")
    options = parser.parse_intermixed_args()
    if options.only_seed is not None:
        return one_seed(options.out / f"seed_{options.only_seed}", options.only_seed, options.overrides)

    def process(seed: int) -> int:
        options.out.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, "--only_seed", str(seed), "--out", str(options.out), *options.overrides]
        with open(options.out / f"seed_{seed}.log", "ab") as log:
            return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode

    with ThreadPoolExecutor(options.processes) as pool:
        failed = [seed for seed, status in zip(options.seeds, pool.map(process, options.seeds), strict=True) if status]
    if failed:
        sys.exit(f"seeds {failed} failed: see {options.out}/seed_N.log")
    rows = [json.loads(line) for seed in options.seeds for line in (options.out / f"seed_{seed}" / "table.jsonl").open()]
    print(markdown(rows))
    return None


def one_seed(folder: Path, seed: int, overrides: list[str]) -> None:
    """Train, control and test one seed; writes ``table.jsonl`` into its folder."""
    whole_run(folder, seed, overrides)
    zeros = folder.with_name(f"{folder.name}_zeros")
    if not zeros.exists():
        for part in REUSED:
            shutil.copytree(folder / part, zeros / part)
        text = (folder / "config.yaml").read_text()
        (zeros / "config.yaml").write_text(text.replace("target: aggregator", "target: zeros"))
    whole_run(zeros, seed, [*overrides, "meta.target=zeros"])

    import torch

    from dmoe import model
    from dmoe.baselines.batch_statistics import BatchStatistics
    from dmoe.baselines.unadapted import Unadapted
    from dmoe.config import Duration
    from dmoe.evaluation import Evaluation
    from dmoe.models.student import Student
    from dmoe.stages import pretrain_student

    run = open_run(folder)
    erm = pretrain_student(run, only_load=True)
    task, adapter = run.dataset.task, model.load(folder)
    adapter.ranges = None  # too few images, and those of another domain, are meant to be adapted to here

    seconds = cpu_seconds(folder)
    training = run.config.student.training
    steps = round(training.duration.steps(len(run.source) // training.batch_size) * sum(seconds.values()) / seconds["student"])
    settings = training.model_copy(update={"duration": Duration(steps, "steps")})
    stage = run.folder.stage("long_erm", run.facts("student", steps=steps))
    long_erm = run.network(run.config.student_backbone, "student", to_train=True)
    print(f"ERM for as long as everything together: {steps} steps, {json.dumps(seconds)}", flush=True)
    run.train_network(stage, long_erm, torch.arange(len(run.source)), settings)

    def student(network: torch.nn.Module) -> Student:
        return Student(features=network.features, head=network.head, task=task)  # type: ignore[arg-type]

    domains = list(run.dataset.splits["target"].members)
    wrong = {domain: domains[(number + 5) % len(domains)] for number, domain in enumerate(domains)}
    evaluations: dict[str, Evaluation] = {
        "ERM student": run.evaluate(Unadapted(student(erm)), "target"),
        "ERM student, batch statistics": run.evaluate(BatchStatistics(student(erm)), "target"),
        "ERM student, trained as long as everything together": run.evaluate(Unadapted(student(long_erm)), "target"),
        "the same, batch statistics": run.evaluate(BatchStatistics(student(long_erm)), "target"),
        "meta-trained student before adapting": run.evaluate(Unadapted(adapter.student), "target"),
        **{
            f"**adapted, support {size}**" if size == run.config.support_size else f"adapted, support {size}": run.evaluate(
                adapter, "target", support_size=size
            )
            for size in SUPPORT_SIZES
        },
        "adapted, support not scored": run.evaluate(adapter, "target", score_support=False),
        "control: support from another target domain": run.evaluate(adapter, "target", support_from=wrong),
        "control: meta-trained and adapted with target zero": run.evaluate(model.load(zeros), "target"),
    }
    with open(folder / "table.jsonl", "w", encoding="utf-8") as file:
        for method, evaluation in evaluations.items():
            row = {"seed": seed, "method": method, "mean": evaluation.mean, "worst": evaluation.worst, "cpu_seconds": seconds}
            file.write(json.dumps(row) + "\n")


def whole_run(folder: Path, seed: int, overrides: list[str]) -> None:
    command = [
        sys.executable,
        str(ROOT / "run.py"),
        "--dataset",
        "digits",
        "--seed",
        str(seed),
        "--run_dir",
        str(folder),
        "--threads",
        "1",
    ]
    subprocess.run([*command, *overrides], check=True)


def open_run(folder: Path):  # type: ignore[no-untyped-def]
    from dmoe.command_line import open_run as open_with
    from dmoe.command_line import parser

    return open_with(parser("", epilog="").parse_args(["--run_dir", str(folder), "--threads", "1"]))


def cpu_seconds(folder: Path) -> Mapping[str, float]:
    """CPU seconds of each training stage, from the manifests."""
    found: dict[str, float] = {}
    for manifest in sorted(folder.glob("*/**/manifest.json")):
        stage = manifest.relative_to(folder).parts[0]
        found[stage] = found.get(stage, 0.0) + json.loads(manifest.read_text())["figures"]["cpu_seconds"]
    return {stage: round(found[stage], 1) for stage in ("experts", "tokens", "aggregator", "student", "meta")}


def markdown(rows: list[dict]) -> str:  # type: ignore[type-arg]
    """Mean and standard deviation over seeds, a row a method."""
    lines = ["| on the 16 target domains, accuracy in percent | mean | worst domain |", "|---|---|---|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for key in ("mean", "worst"):
            values = [100 * row[key] for row in rows if row["method"] == method]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {method} | {cells[0]} | {cells[1]} |")
    seeds = sorted({row["seed"] for row in rows})
    return "\n".join([*lines, "", f"Mean ± standard deviation over {len(seeds)} seeds ({', '.join(map(str, seeds))})."])


if __name__ == "__main__":
    main()
