"""What both entry points share: flags, exit statuses, opening a run. Nothing heavy is imported until the flags are read."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dmoe.errors import UserError
from dmoe.machine import choose_device, cores

if TYPE_CHECKING:
    from dmoe.stages import Run

WRONG_INPUT, INTERRUPTED = 2, 130

# Read by the OpenMP runtime when torch is imported: threads that wait spin a little, for speed, and then give up their core;
# without a limit, a machine that does something else besides is many times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message} (-h explains)")


def parser(description: str, *, epilog: str) -> argparse.ArgumentParser:
    """A parser with the flags of both entry points."""
    made = _Parser(description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    made.add_argument("--dataset", metavar="NAME", help="a data set with a file in configs/ (default: digits, embedded)")
    made.add_argument("--config", type=Path, metavar="FILE", help="another YAML file than configs/NAME.yaml")
    made.add_argument("--run_dir", type=Path, metavar="DIR", help="where everything is written (default: runs/NAME)")
    made.add_argument("--data_dir", type=Path, metavar="DIR", help="where the data set lies; the embedded one needs none")
    made.add_argument("--gpu", type=int, metavar="G", help="use this GPU, -1: none (default: what is there)")
    made.add_argument("--threads", type=int, metavar="T", help="CPU threads (default: all cores)")
    made.add_argument("--seed", type=int, metavar="S", help="another seed than the configuration's")
    made.add_argument("overrides", nargs="*", metavar="key.sub=value", help="configuration fields, for example meta.inner_lr=0.2")
    return made


def run_dir_of(options: argparse.Namespace) -> Path:
    return options.run_dir or Path("runs") / (options.dataset or (options.config.stem if options.config else "digits"))


def open_run(options: argparse.Namespace, *, finished: bool = False, fresh: bool = False, expert: int | None = None) -> "Run":
    """Read the configuration, open the data set, share out its domains, check what can be checked, claim the run folder.

    The configuration is the one recorded in the run folder, where there is one and the command line names no other.

    Args:
        finished: the folder must hold a run.
        fresh: refuse a folder that already holds a run.
        expert: the one expert to be trained; the process then takes as many CPU threads as the configuration gives an expert,
            where the command line does not say how many.

    Raises:
        UserError: anything about these is wrong.
    """
    from dmoe.config import CONFIG_FOLDER, known_datasets, load_config
    from dmoe.run_folder import CONFIG_FILE, RunFolder

    folder = RunFolder(run_dir_of(options))
    path = options.config or CONFIG_FOLDER / f"{options.dataset or 'digits'}.yaml"
    recorded = folder.path / CONFIG_FILE
    if finished:
        folder.config()  # says so where this is no run folder
    if finished or (recorded.exists() and not (options.dataset or options.config)):
        path = recorded
    if options.config is None and not path.exists():
        raise UserError(f"--dataset: {options.dataset!r} is unknown; known: {', '.join(known_datasets())}")
    config = load_config(path, options.overrides, dataset=options.dataset, seed=options.seed, data__dir=_text(options.data_dir))
    device = choose_device(options.gpu)

    import torch

    from dmoe.data.partition import partition, write_partition
    from dmoe.data.registry import load_dataset
    from dmoe.stages import Run, check

    if options.threads is not None and options.threads < 1:
        raise UserError(f"--threads: must be >= 1, got {options.threads}")
    threads = config.experts.threads if expert is not None and device == "cpu" else cores()
    torch.set_num_threads(options.threads or threads)
    dataset = load_dataset(config.dataset, config.data)
    source = dataset.splits["source"]
    groups = partition(
        source.group_domains.unique().tolist(), count=config.experts.count, seed=config.seed, how=config.experts.partition
    )
    run = Run(config=config, folder=folder, dataset=dataset, groups=groups, device=torch.device(device))
    check(run, expert=expert)
    folder.claim(config, fresh=fresh)
    written = folder.path / "experts" / "partition.json"
    if not written.exists():
        write_partition(written, groups, dict(source.domain_names))
    return run


def run_main(main: Callable[[], None]) -> NoReturn:
    """Run an entry point; the user's mistakes end in one line and status 2, Ctrl-C in one line and status 130."""
    try:
        main()
        status = 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = WRONG_INPUT
    except KeyboardInterrupt:
        print("interrupted: everything finished so far is kept; the same command goes on from there", file=sys.stderr)
        status = INTERRUPTED
    sys.exit(status)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
