"""One method of a comparison on one seed; ``run.py --compare`` starts it for all of them."""

from pathlib import Path

from dmoe.command_line import open_run, parser, run_main
from dmoe.errors import UserError


def main() -> None:
    made = parser(__doc__ or "", epilog="")
    made.add_argument("--method", metavar="KEY", help="which one")
    made.add_argument(
        "--chosen_by", type=Path, metavar="PATH", help="first seed's run folder, or earlier results, which choose the settings"
    )
    made.add_argument("--evidence", type=Path, metavar="FILE", help="write what the report shows beside numbers")
    options = made.parse_intermixed_args()
    run = open_run(options, finished=True, claim=False)

    from dmoe.artifacts import write_json
    from dmoe.compare.candidates import CANDIDATES
    from dmoe.compare.work import compare_one
    from dmoe.report.evidence import gather

    if options.evidence is not None:
        write_json(options.evidence, gather(run))
        return
    if options.method not in CANDIDATES:
        raise UserError(f"--method: {options.method!r} is unknown; use one of {', '.join(CANDIDATES)}")
    compare_one(run, options.method, chosen_by=options.chosen_by or run.folder.path)


if __name__ == "__main__":
    run_main(main)
