"""All stages of Meta-DMoE on one data set, or its test: read from top to bottom, this file is the method."""

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmoe.command_line import MOST_THREADS, check_threads, open_run, parser, read_config, run_dir_of, run_main
from dmoe.errors import UserError

if TYPE_CHECKING:
    from dmoe.distributed import World
    from dmoe.run import Run

EPILOG = """examples:
  python run.py                                      the embedded digits, from nothing to the table
  python run.py --dataset digits meta.inner_lr=0.2 --run_dir runs/small_steps
  python run.py --test                               evaluate the finished run in runs/digits again
  python run.py --test evaluation.support_size=16    with smaller unlabeled batches
  python run.py --dataset iwildcam --data_dir data --dry_run
  python run.py --dataset iwildcam --data_dir data --launcher slurm 'experts.slurm_options=["--partition=gpu"]'
  python run.py --dataset iwildcam --data_dir data --test --checkpoint_dir model/iwildcam
  python run.py --compare --seeds 1 2 3              beside TENT, T3A, CORAL, ARM, ...: results.jsonl and report.html
  python run.py --method erm student.objective.name=coral            one network alone, tested unadapted
  python run.py --dataset folders --data_dir PACS --method erm --protocol domainbed --seeds 0 1 2    each domain left out
  torchrun --nproc_per_node=8 run.py --dataset iwildcam --data_dir data meta.domains_per_update=8

A stage that is already finished from the same inputs is skipped; one that was cut off goes on where it stopped."""


def main() -> None:
    options = read_options()
    if options.compare:
        return compare(options)
    if options.protocol is not None:
        return leave_out(options)

    from dmoe.distributed import joined

    with joined() as world:
        work(options, world)
    return None


def work(options: argparse.Namespace, world: "World") -> None:
    tests_a_run = options.test and options.checkpoint_dir is None
    run = open_run(options, finished=tests_a_run, fresh=not options.resume, claim=not options.dry_run, world=world)

    from dmoe import plan, testing
    from dmoe.alone import train_alone

    if not options.test:
        run.first(lambda: plan.show(run))
        if options.dry_run:
            return
        if run.config.trains_one:
            train_alone(run, only_load=options.load_pretrained_student)
        else:
            train_all(run, options)
    testing.test(run, options.split, published=run.published if options.test else None)


def train_all(run: "Run", options: argparse.Namespace) -> None:
    """The stages of Meta-DMoE."""
    from dmoe import stages
    from dmoe.meta_stage import meta_train_student
    from dmoe.watch_stage import measure_ranges
    from experts.launch import train_all_experts

    if not options.load_trained_experts:
        threads = options.expert_threads or options.threads
        run.first(partial(train_all_experts, run, launcher=options.launcher, gpu=options.gpu, threads=threads))
    experts = stages.load_experts(run)
    tokens = stages.make_tokens(run, experts)
    aggregator = stages.pretrain_aggregator(run, tokens, experts[0].width, only_load=options.load_pretrained_aggregator)
    student = stages.pretrain_student(run, only_load=options.load_pretrained_student)
    meta_train_student(run, tokens, experts, aggregator, student)
    run.first(partial(measure_ranges, run, tokens))


def compare(options: argparse.Namespace) -> None:
    """Everything for each seed, in processes of their own, and beside it what a user would try instead."""
    from dmoe.compare import comparison
    from dmoe.report import __main__ as report
    from dmoe.run_folder import RunFolder

    folder = options.run_dir or run_dir_of(options).with_name(f"{run_dir_of(options).name}_compared")
    config = read_config(options, RunFolder(folder / comparison.name_of(options.seeds[0])))
    if config.trains_one:
        raise UserError("--compare: it makes whole runs: method must be meta_dmoe; ERM and objectives are among its methods")
    machine = _machine(options)
    # Where there are more processes than runs, nothing else can be done at first.
    beside = max(1, options.processes // len(options.seeds))
    experts = {"--expert_threads": min(MOST_THREADS, machine["--threads"] * beside)}
    comparison.compare(
        folder,
        options.seeds,
        run=[__file__, *_words(_what(options) | experts)],
        flags=[*_words(machine), *options.overrides],
        at_once=options.processes,
        methods=config.compare.methods,
        chosen_by=options.chosen_by,
    )
    report.main([str(folder)])


def leave_out(options: argparse.Namespace) -> None:
    """Each domain left out in turn, for each seed, in processes of their own."""
    from dmoe import domainbed
    from dmoe.run_folder import RunFolder

    domainbed.leave_out(
        options.run_dir,
        read_config(options, RunFolder(options.run_dir)),
        options.seeds,
        run=[__file__, *_words(_what(options)), *_words(_machine(options))],
        overrides=options.overrides,
        at_once=options.processes,
    )


def _what(options: argparse.Namespace) -> dict[str, object]:
    return {"--dataset": options.dataset, "--config": options.config}


def _machine(options: argparse.Namespace) -> dict[str, Any]:
    """Flags of each of the processes that share this machine."""
    from dmoe.machine import cores

    threads = options.threads or max(1, cores() // options.processes)
    return {"--data_dir": options.data_dir, "--gpu": options.gpu, "--threads": threads}


def _words(flags: Mapping[str, object]) -> list[str]:
    return [word for flag, value in flags.items() if value is not None for word in (flag, str(value))]


def read_options() -> argparse.Namespace:
    made = parser(__doc__ or "", epilog=EPILOG)
    made.add_argument(
        "--method",
        choices=("meta_dmoe", "erm"),
        help="meta_dmoe: all stages (default); erm: one network alone by student.objective, tested unadapted (default folder: "
        "runs/NAME_erm)",
    )
    made.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help="go on in a run folder (default)")
    made.add_argument("--dry_run", action="store_true", help="say what would happen, how long it takes and how much it writes")
    made.add_argument(
        "--launcher",
        choices=("local", "ray", "slurm"),
        default="local",
        help="where experts train: on this machine (default), a Ray cluster, or as an array job of Slurm",
    )
    made.add_argument(
        "--expert_threads", type=int, metavar="T", help="CPU threads of all experts on this machine together (default: --threads)"
    )
    made.add_argument("--load_trained_experts", action="store_true", help="use the experts that are there; train none")
    made.add_argument("--load_pretrained_aggregator", action="store_true", help="use the pretrained aggregator that is there")
    made.add_argument("--load_pretrained_student", action="store_true", help="use the pretrained student that is there")
    made.add_argument("--test", action="store_true", help="evaluate a finished run, train nothing")
    made.add_argument(
        "--compare", action="store_true", help="do it for several seeds, and test beside it what one would try instead"
    )
    made.add_argument(
        "--protocol",
        choices=("domainbed",),
        help="domainbed: leave out each domain of --dataset folders in turn, or each of data.target_domains, and choose on a fifth "
        "of the images of the others, drawn anew by each seed",
    )
    made.add_argument("--seeds", type=int, nargs="+", default=[1], metavar="S", help="of --compare and --protocol (default: 1)")
    made.add_argument(
        "--chosen_by", type=Path, metavar="FILE", help="of --compare: results.jsonl that settings are taken from, to try none anew"
    )
    made.add_argument("--processes", type=int, default=2, metavar="P", help="of --compare and --protocol, at once (default: 2)")
    made.add_argument("--split", default="target", metavar="SPLIT", help="what --test evaluates on: target, validation, ...")
    made.add_argument(
        "--checkpoint_dir",
        type=Path,
        metavar="DIR",
        help="checkpoints of the paper's authors, for --test or --load_...",
    )
    options = made.parse_intermixed_args()
    loads = options.load_trained_experts or options.load_pretrained_aggregator or options.load_pretrained_student
    several = "--compare" if options.compare else "--protocol" if options.protocol is not None else None
    if options.compare and options.protocol is not None:
        raise UserError("--compare: it does not go with --protocol")
    if several and (options.test or loads or options.dry_run or options.checkpoint_dir is not None):
        raise UserError(f"{several}: it makes whole runs; --test, --dry_run, --load_... and --checkpoint_dir do not go with it")
    if options.processes < 1 or min(options.seeds, default=-1) < 0 or len(set(options.seeds)) < len(options.seeds):
        raise UserError(f"{several or '--compare'}: --processes must be 1 at least, and --seeds whole numbers, each once")
    check_threads("--expert_threads", options.expert_threads)
    if options.chosen_by is not None and not (options.compare and options.chosen_by.is_file()):
        raise UserError(f"--chosen_by: {options.chosen_by}: it needs --compare, and must be a file of results")
    if options.checkpoint_dir is not None and not (options.test or loads):
        raise UserError("--checkpoint_dir: it needs --test, or one of the --load flags that says what to take from there")
    if options.method is not None:
        options.overrides.append(f"method={options.method}")
    kind = ("_erm" if options.method == "erm" else "") + ("_domainbed" if options.protocol is not None else "")
    if kind and options.run_dir is None and not options.compare:
        options.run_dir = run_dir_of(options).with_name(f"{run_dir_of(options).name}{kind}")
    return options


if __name__ == "__main__":
    run_main(main)
