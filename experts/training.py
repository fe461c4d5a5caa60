"""One expert, trained on the images of its own group of source domains."""

from collections.abc import Mapping

import torch

from dmoe.loop import tidy
from dmoe.run import Run


def train_expert(run: Run, number: int) -> None:
    """Train expert ``number`` into the run folder, or go on training it; a finished one is left as it is.

    Prints a line now and then, from which whoever started it can tell how far it is.
    """
    config = run.config.experts
    stage = run.expert_stage(number)
    with stage.alone():
        if stage.finished() is not None:
            print(f"{stage.name}: already finished from the same inputs ({stage.folder})", flush=True)
            return
        expert = run.network(config.backbone, "expert", number, to_train=True)
        members = torch.where(run.own_expert == number)[0]
        progress = run.train_network(stage, expert, members, config.training, _print_progress, objective=config.objective)
        stage.finish(files=[stage.weights], figures=progress.figures())
        tidy(stage)
    print(f"{stage.name}: {progress.summary()} ({stage.folder})", flush=True)


def _print_progress(done: int, steps: int, values: Mapping[str, float]) -> None:
    print(f"step {done}/{steps}  loss {values['loss']:.4f}", flush=True)
