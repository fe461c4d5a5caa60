"""The paper's ablations: one thing of the method changed at a time, on several seeds.

    python scripts/ablations.py --dataset digits --seeds 1 2 3 --out runs/ablations
    python scripts/ablations.py --dataset digits --groups mask distilled --out runs/ablations meta.inner_lr=0.5

Each setting of each seed is a run of its own in OUT/seed_N/SETTING, on one CPU thread, two at a time by default. The whole method
is OUT/seed_N/full; the other runs begin with copies of its stages as far as their setting has no part in them. What is finished is
not done again. OUT/results.jsonl has a row a setting and seed. Source: Zhong et al., *Meta-DMoE*, NeurIPS 2022, tables 5 to 8.
"""

import argparse
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed

from dmoe.artifacts import write_json_lines
from dmoe.command_line import run_main
from dmoe.compare.tasks import Task, run_tasks
from dmoe.config import CONFIG_FOLDER, Config, known_datasets, load_config
from dmoe.errors import UserError
from dmoe.run_folder import RunFolder
from scripts.summarize import spread

RUN = Path(__file__).resolve().parent.parent / "run.py"

FULL = "full"

SHARED = {
    "experts": ("student",),
    "aggregator": ("experts", "tokens", "student"),
    "meta": ("experts", "tokens", "aggregator", "student"),
}
"""By the section that a setting is of: the stages that have no part in it. run.py refuses a stage of other inputs in any case."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """One thing changed.

    Attributes:
        title: for people.
        overrides: of one section of the configuration.
    """

    group: str
    title: str
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the run's folder."""
        return "_".join(override.partition(".")[2].replace("=", "_").replace(" ", "_") for override in self.overrides)

    @property
    def section(self) -> str:
        return self.overrides[0].partition(".")[0]


SETTINGS = (
    *(Setting("experts", str(count), (f"experts.count={count}",)) for count in (2, 3, 4, 6, 8, 12)),
    *(Setting("aggregator", pooling, (f"aggregator.pooling={pooling}",)) for pooling in ("max", "mean", "transformer")),
    *(
        Setting("parts", f"aggregator {aggregator}, student {student}", overrides)
        for aggregator, student, overrides in (
            ("pretrained", "random", ("meta.duration=0 steps", "meta.student_start=random")),
            ("meta-trained", "random", ("meta.learns=aggregator", "meta.student_start=random")),
            ("pretrained", "meta-trained", ("meta.learns=student", "meta.student_start=pretrained")),
            ("meta-trained", "meta-trained from random", ("meta.learns=both", "meta.student_start=random")),
            ("meta-trained", "meta-trained", ("meta.learns=both", "meta.student_start=pretrained")),
        )
    ),
    *(Setting("distilled", what, (f"meta.distill={what}",)) for what in ("logits", "features", "both")),
    *(Setting("mask", mask, (f"meta.mask={mask}",)) for mask in ("none", "zero", "remove")),
)
GROUPS = tuple(dict.fromkeys(setting.group for setting in SETTINGS))


@dataclass(frozen=True)
class Ablation:
    """A setting on a seed.

    Attributes:
        name: of its folder in the seed's; :data:`FULL` where the setting is that of the whole method.
        config: of its run.
    """

    setting: Setting
    name: str
    seed: int
    config: Config
    overrides: Sequence[str]

    def folder(self, out: Path) -> Path:
        return out / f"seed_{self.seed}" / self.name

    def task(self, out: Path) -> Task:
        words = ["--dataset", self.config.dataset, "--seed", str(self.seed), "--run_dir", str(self.folder(out)), "--threads", "1"]
        return Task([str(RUN), *words, *self.overrides])

    def result(self, out: Path) -> Row | None:
        """What its run reached, if it is finished and was tested by this configuration."""
        try:
            row = RunFolder(self.folder(out)).last_results("target").get("adapted")
        except UserError:
            return None
        return row if row is not None and row["config"] == self.config.model_dump(mode="json") else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--dataset", default="digits", metavar="NAME", help="as in run.py (default: digits)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="S", help="default: 1 2 3")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="default: runs/ablations")
    parser.add_argument("--processes", type=int, default=2, metavar="P", help="runs at a time (default: 2)")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS, metavar="G", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="configuration fields of all runs")
    options = parser.parse_intermixed_args()
    if options.processes < 1 or min(options.seeds) < 0 or len(set(options.seeds)) < len(options.seeds):
        raise UserError("--processes must be 1 at least, and --seeds whole numbers, each once")
    if options.dataset not in known_datasets():
        raise UserError(f"--dataset: {options.dataset!r} is unknown; known: {', '.join(known_datasets())}")
    ablations = [each for seed in options.seeds for each in ablations_of(options.dataset, seed, options.overrides)]
    try:
        work([each for each in ablations if each.setting.group in options.groups], options.out, at_once=options.processes)
    finally:
        rows = write_results(ablations, options.out)  # what is finished of other groups too
    print(table([row for row in rows if row["group"] in options.groups]))


def ablations_of(dataset: str, seed: int, overrides: Sequence[str] = ()) -> list[Ablation]:
    """The settings on a seed; each group has the whole method's own too, which is one run for all of them.

    Raises:
        UserError: a group has no setting that is the whole method's.
    """
    path = CONFIG_FOLDER / f"{dataset}.yaml"
    full = load_config(path, overrides, dataset=dataset, seed=seed)
    own = Setting("experts", str(full.experts.count), (f"experts.count={full.experts.count}",))
    found = []
    for setting in SETTINGS if own in SETTINGS else (own, *SETTINGS):
        both = [*overrides, *setting.overrides]
        config = load_config(path, both, dataset=dataset, seed=seed)
        same = config == full
        found.append(Ablation(setting, FULL if same else setting.name, seed, config, overrides if same else both))
    if {each.setting.group for each in found if each.name == FULL} != set(GROUPS):
        raise UserError("command line: meta.learns and meta.student_start are the settings' own, and cannot be those of all runs")
    return found


def work(ablations: Sequence[Ablation], out: Path, *, at_once: int) -> None:
    """Run what is not finished: the whole method first, whose stages the others begin with."""
    first = {each.seed: each for each in ablations if each.name == FULL}
    run_all(first.values(), out, at_once=at_once)
    others = [each for each in ablations if each.name != FULL and each.result(out) is None]
    for each in others:
        begin(each.folder(out), each.config, like=first[each.seed].folder(out), stages=SHARED[each.setting.section])
    run_all(others, out, at_once=at_once)


def run_all(ablations: Iterable[Ablation], out: Path, *, at_once: int) -> None:
    tasks = {f"seed_{each.seed}_{each.name}": each.task(out) for each in ablations if each.result(out) is None}
    run_tasks(tasks, at_once=at_once, logs=out / "logs", name="ablations")


def begin(folder: Path, config: Config, *, like: Path, stages: Sequence[str]) -> None:
    """Make a run folder that has the stages of another run already."""
    RunFolder(folder).claim(config)
    for stage in stages:
        if not (folder / stage).exists():
            beside = folder / f"{stage}.copy"
            shutil.rmtree(beside, ignore_errors=True)  # of a copy that was cut off
            shutil.copytree(like / stage, beside, ignore=shutil.ignore_patterns("lock"))
            beside.rename(folder / stage)


def write_results(ablations: Sequence[Ablation], out: Path) -> list[Row]:
    """``results.jsonl``: a row an ablation that is finished."""
    found = [(each, each.result(out)) for each in ablations]
    rows = [row_of(each, result, out) for each, result in found if result is not None]
    if rows:
        write_json_lines(out / "results.jsonl", rows)
    return rows


def row_of(ablation: Ablation, result: Row, out: Path) -> Row:
    """A row of a comparison, of what a run's own ``results.jsonl`` says."""
    headline = "r" if result["unit"] == "value" else "accuracy"
    kept = ("dataset", "split", "support_size", "score_support", "seed", "metric", "unit", "mean", "worst", "overall")
    return {
        "kind": "ablation",
        "group": ablation.setting.group,
        "setting": ablation.setting.title,
        "method": "Meta-DMoE",
        "protocol": "per domain",
        "predict": "after",
        **{key: result[key] for key in kept},
        "domains": {name: metrics[headline] for name, metrics in result["domains"].items()},
        "run": str(ablation.folder(out).relative_to(out)),
        "data": result["data"],
        "versions": result["versions"],
    }


def table(rows: Sequence[Row]) -> str:
    """In markdown: mean and standard deviation over seeds of the mean over domains and of the worst domain."""
    if not rows:
        return "no run is finished"
    percent = rows[0]["unit"] == "fraction"
    heading = f"{rows[0]['dataset']}, target domains, {'accuracy in percent' if percent else 'r'}"
    lines = [f"| {heading} | | mean of domains | worst domain | seeds |", "|---|---|---|---|---|"]
    for group, title in dict.fromkeys((row["group"], row["setting"]) for row in rows):
        these = [row for row in rows if (row["group"], row["setting"]) == (group, title)]
        cells = [spread([row[key] for row in these], percent=percent) for key in ("mean", "worst")]
        lines.append(f"| {group} | {title} | {cells[0]} | {cells[1]} | {len(these)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
