"""All stages of Meta-DMoE on one data set, or its test: read from top to bottom, this file is the method."""

import argparse

from dmoe.command_line import open_run, parser, run_main

EPILOG = """examples:
  python run.py                                      the embedded digits, from nothing to the table
  python run.py --dataset digits meta.inner_lr=0.2 --run_dir runs/small_steps
  python run.py --test                               evaluate the finished run in runs/digits again
  python run.py --test evaluation.support_size=16    with smaller unlabeled batches

A stage that is already finished from the same inputs is skipped; one that was cut off goes on where it stopped."""


def main() -> None:
    options = read_options()
    run = open_run(options, finished=options.test, fresh=not options.resume)

    from dmoe import stages
    from experts.launch import train_all_experts

    if not options.test:
        if not options.load_trained_experts:
            train_all_experts(run, gpu=options.gpu, threads=options.threads)
        experts = stages.load_experts(run)
        tokens = stages.make_tokens(run, experts)
        aggregator = stages.pretrain_aggregator(run, tokens, experts[0].width, only_load=options.load_pretrained_aggregator)
        student = stages.pretrain_student(run, only_load=options.load_pretrained_student)
        stages.meta_train_student(run, tokens, experts, aggregator, student)
    stages.test(run, options.split)


def read_options() -> argparse.Namespace:
    made = parser(__doc__ or "", epilog=EPILOG)
    made.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help="go on in a run folder (default)")
    made.add_argument("--load_trained_experts", action="store_true", help="use the experts that are there; train none")
    made.add_argument("--load_pretrained_aggregator", action="store_true", help="use the pretrained aggregator that is there")
    made.add_argument("--load_pretrained_student", action="store_true", help="use the pretrained student that is there")
    made.add_argument("--test", action="store_true", help="evaluate a finished run, train nothing")
    made.add_argument("--split", choices=("target", "validation"), default="target", help="domains that --test evaluates on")
    return made.parse_intermixed_args()


if __name__ == "__main__":
    run_main(main)
