"""python -m dmoe.report FOLDER writes FOLDER/report.html; python -m dmoe.report --readme writes the README's tables."""

import argparse
from pathlib import Path

from dmoe.command_line import run_main
from dmoe.console import say
from dmoe.errors import UserError
from dmoe.report.files import write_whole


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m dmoe.report", description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="of a finished run or a comparison")
    parser.add_argument(
        "--readme", action="store_true", help="instead, rewrite the results in README.md from docs/results/*.jsonl of this checkout"
    )
    options = parser.parse_args(arguments)
    if (options.folder is None) != options.readme:
        raise UserError("command line: give either a FOLDER or --readme (-h explains)")
    if options.readme:
        from dmoe.report.readme import rewrite

        return rewrite(Path())
    from dmoe.report.page import build

    path: Path = options.folder / "report.html"
    write_whole(path, build(options.folder))
    say(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    return None


if __name__ == "__main__":
    run_main(main)
