"""What both entry points share: flags, exit statuses, opening a run. Nothing heavy is imported until the flags are read."""

import argparse
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dmoe.errors import UserError
from dmoe.interruption import Interrupted, heed_signals
from dmoe.machine import choose_device, cores, end_with, keep_freed_memory

if TYPE_CHECKING:
    from dmoe.config import Config
    from dmoe.distributed import World
    from dmoe.published import PublishedFolder
    from dmoe.run import Run
    from dmoe.run_folder import RunFolder

MOST_THREADS = 4096
WRONG_INPUT, INTERRUPTED, PIPE_CLOSED = 2, 130, 141

# Read by the OpenMP runtime when torch is imported: threads that wait spin a little, for speed, and then give up their core;
# without a limit, a machine that does something else besides is many times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


_LOAD_FLAGS = {
    "experts": "load_trained_experts",
    "aggregator": "load_pretrained_aggregator",
    "student": "load_pretrained_student",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message} (-h explains)")


def parser(description: str, *, epilog: str) -> argparse.ArgumentParser:
    """A parser with the flags of both entry points."""
    made = _Parser(description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    made.add_argument("--dataset", metavar="NAME", help="a data set with a file in configs/ (default: digits, embedded)")
    made.add_argument("--config", type=Path, metavar="FILE", help="another YAML file than configs/NAME.yaml")
    made.add_argument("--run_dir", type=Path, metavar="DIR", help="where everything is written (default: runs/NAME)")
    made.add_argument("--data_dir", type=Path, metavar="DIR", help="where the data set lies (default: data); digits needs none")
    made.add_argument("--gpu", type=int, metavar="G", help="use this GPU, -1: none (default: what is there)")
    made.add_argument("--threads", type=int, metavar="T", help="CPU threads (default: all cores)")
    made.add_argument("--seed", type=int, metavar="S", help="another seed than the configuration's")
    made.add_argument("--parent", type=int, help=argparse.SUPPRESS)  # who waits for this process; without it nobody does
    made.add_argument("overrides", nargs="*", metavar="key.sub=value", help="configuration fields, for example meta.inner_lr=0.2")
    return made


def run_dir_of(options: argparse.Namespace) -> Path:
    return options.run_dir or Path("runs") / (options.dataset or (options.config.stem if options.config else "digits"))


def open_run(
    options: argparse.Namespace,
    *,
    finished: bool = False,
    fresh: bool = False,
    claim: bool = True,
    expert: int | None = None,
    world: "World | None" = None,
) -> "Run":
    """Read the configuration, open the data set, share out its domains, check what can be checked, claim the run folder.

    The configuration is the one recorded in the run folder, where there is one and the command line names no other.

    Args:
        finished: the folder must hold a run, unless published checkpoints are tested.
        fresh: refuse a folder that already holds a run.
        claim: make the folder this run's own; otherwise nothing is written.
        expert: the one expert to be trained; the process then takes as many CPU threads as the configuration gives an expert,
            where the command line does not say how many.
        world: the processes that work on the run together; each takes a GPU of its own and its share of the cores.

    Raises:
        UserError: anything about these is wrong.
    """
    from dmoe.run_folder import RunFolder

    if options.parent is not None:
        end_with(options.parent)
    folder = RunFolder(run_dir_of(options))
    config = read_config(options, folder, finished=finished)
    checkpoint_dir: Path | None = getattr(options, "checkpoint_dir", None)
    if checkpoint_dir is not None and not checkpoint_dir.is_dir():
        raise UserError(f"--checkpoint_dir: {checkpoint_dir}: no such folder")

    import torch

    from dmoe.alone import check_alone
    from dmoe.artifacts import write_json
    from dmoe.data.partition import write_partition
    from dmoe.data.registry import Opening, load_dataset
    from dmoe.distributed import ALONE
    from dmoe.published import PublishedFolder
    from dmoe.run import Run
    from dmoe.stages import check

    world = world or ALONE
    device = choose_device(options.gpu, number=world.local_rank)
    share = max(1, cores() // world.local_size)
    threads = options.threads or (config.experts.threads if expert is not None and device == "cpu" else share)
    torch.set_num_threads(threads)
    keep_freed_memory()
    published = None
    if checkpoint_dir is not None:
        published = PublishedFolder(checkpoint_dir, dataset=config.dataset, experts=config.experts.count, seed=config.seed)
    left_out = folder.path / "unreadable.json"
    known = _names_in(left_out) if left_out.exists() else None
    workers = threads if config.data.workers is None else config.data.workers
    opening = Opening(workers=workers, known_unreadable=known, writes=claim)
    dataset = load_dataset(config.dataset, config.data, opening)
    if config.data.workers is None and dataset.in_memory:
        workers = 0
    tests = getattr(options, "test", False)
    domains = dataset.splits["source"].group_domains.unique().tolist()
    where = folder.path / "experts" / "partition.json"
    groups = {} if config.trains_one else _groups(config, domains, where, published, tests=tests)
    run = Run(
        config=config,
        folder=folder,
        dataset=dataset,
        groups=groups,
        device=torch.device(device),
        workers=workers,
        published=published,
        given={name for name, flag in _LOAD_FLAGS.items() if tests or getattr(options, flag, False)},
        world=world,
    )

    def begin() -> None:
        (check_alone if config.trains_one else check)(run, expert=expert, tests=tests)
        if claim:
            folder.claim(config, fresh=fresh)
            if groups and not (tests or where.exists()):  # a test decides nothing for a training that may follow
                write_partition(where, groups, dataset.splits["source"].group_names)
            if config.data.skip_unreadable and known is None:
                write_json(left_out, {"images": list(dataset.unreadable)})

    run.first(begin)
    return run


def _names_in(left_out: Path) -> list[str]:
    """Images that an earlier visit could not read."""
    from dmoe.artifacts import read_json

    names = read_json(left_out).get("images")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{left_out}: damaged, it must list images: delete it, and all of them are read again")
    return names


def read_config(options: argparse.Namespace, folder: "RunFolder", *, finished: bool = False) -> "Config":
    """The configuration that the command line asks for: recorded in the run folder, or a file's, with its overrides.

    Raises:
        UserError: anything about it is wrong.
    """
    from dmoe.config import CONFIG_FOLDER, known_datasets, load_config
    from dmoe.run_folder import CONFIG_FILE

    path = options.config or CONFIG_FOLDER / f"{options.dataset or 'digits'}.yaml"
    recorded = folder.path / CONFIG_FILE
    if finished:
        folder.config()  # says so where this is no run folder
    if finished or (recorded.exists() and not (options.dataset or options.config)):
        path = recorded
    if options.config is None and options.dataset is not None and options.dataset not in known_datasets():
        raise UserError(f"--dataset: {options.dataset!r} is unknown; known: {', '.join(known_datasets())}")
    config = load_config(path, options.overrides, dataset=options.dataset, seed=options.seed, data__dir=_text(options.data_dir))
    check_threads("--threads", options.threads)
    return config


def _groups(
    config: "Config", domains: list[int], recorded: Path, published: "PublishedFolder | None", *, tests: bool
) -> dict[int, int]:
    """The expert of each source domain: as recorded in the run folder, as published, or shared out now.

    For a test it does not matter who learned from what; published groups are then read, but need not fit.
    """
    from dmoe.data.partition import check_partition, partition, read_partition

    if recorded.exists():
        groups = read_partition(recorded)
        check_partition(groups, domains, count=config.experts.count, where=recorded)
    else:
        groups = partition(domains, count=config.experts.count, seed=config.seed, how=config.experts.partition)
    theirs = published.partition() if published is not None else None
    if published is None or theirs is None or tests:
        return groups
    check_partition(theirs, domains, count=config.experts.count, where=published.folder / "domain_split.pkl")
    if recorded.exists() and theirs != groups:
        raise UserError(f"{recorded}: it shares out the domains otherwise than {published.folder}: choose another --run_dir")
    return theirs


def check_threads(flag: str, threads: int | None) -> None:
    """
    Raises:
        UserError: so many CPU threads cannot be.
    """
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        bound = ">= 1" if threads < 1 else f"<= {MOST_THREADS}"
        raise UserError(f"{flag}: must be {bound}, got {threads}")


def run_main(main: Callable[[], None]) -> NoReturn:
    """Run an entry point; the user's mistakes end in one line and status 2, Ctrl-C and SIGTERM in one line and 130 or 143."""
    heed_signals()
    try:
        main()
        status = 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = WRONG_INPUT
    except BrokenPipeError:  # whoever read the output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = PIPE_CLOSED
    except (Interrupted, KeyboardInterrupt) as asked:
        print("interrupted: everything finished so far is kept; the same command goes on from there", file=sys.stderr)
        status = asked.status if isinstance(asked, Interrupted) else INTERRUPTED
    except Exception as error:
        way = _way_out(error)
        if way is None:
            raise
        print(f"error: {UserError(way)}", file=sys.stderr)
        status = WRONG_INPUT
    sys.exit(status)


def _way_out(error: Exception) -> str | None:
    """What to tell of an error that the machine's limits lie behind; None: it is a fault in the program."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return f"{error.filename or 'a file'}: cannot be written: {error.strerror}: make room, the same command goes on"
    if isinstance(error, OSError) and error.filename:
        return f"{os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename}: {error.strerror}"
    import torch

    from dmoe.memory import is_out_of_memory

    if not is_out_of_memory(error):
        return None
    told = " ".join(str(error).split())[:120] or "no more to be had"
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU's memory is too small ({told}): a smaller batch_size of the stage that was at work, or --gpu -1, helps"
    return f"the machine's memory is too small ({told}): smaller images, networks or batch_size of the stage that was at work help"


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
