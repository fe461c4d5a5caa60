"""One expert of one data set, for any scheduler to start on any GPU. It is written into the run folder that run.py uses."""

from dmoe.command_line import open_run, parser, run_main

EPILOG = """example, one line a GPU, then the rest:
  python train_single_expert.py --dataset digits --gpu 0 --expert_idx 0
  python train_single_expert.py --dataset digits --gpu 1 --expert_idx 1
  ...
  python run.py --dataset digits --load_trained_experts"""


def main() -> None:
    made = parser(__doc__ or "", epilog=EPILOG)
    made.add_argument("--expert_idx", type=int, required=True, metavar="I", help="which expert, from 0")
    options = made.parse_intermixed_args()
    run = open_run(options, expert=options.expert_idx)

    from experts.training import train_expert

    train_expert(run, options.expert_idx)


if __name__ == "__main__":
    run_main(main)
