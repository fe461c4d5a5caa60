"""A finished run's weights as the checkpoint files of the paper's public code.

    python scripts/export_published.py runs/iwildcam runs/iwildcam_published

OUT_DIR must be new or empty. The files are named after the run's data set, number of experts and seed.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed

from dmoe.errors import UserError

if TYPE_CHECKING:
    from dmoe.config import BackboneConfig, Config
    from dmoe.models.aggregator import Aggregator
    from dmoe.models.networks import Network
    from dmoe.run_folder import RunFolder


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message} (-h explains)")


def main() -> None:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the folder of a finished run")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="where the files are written")
    options = parser.parse_args()
    from dmoe.run_folder import RunFolder

    run = RunFolder(options.run_dir)
    config = run.config()
    for path in export(run, config, options.out_dir):
        print(path)
    print(f"\nthese files are tested by: {command_to_test(run, config, options.out_dir)}")


def export(run: "RunFolder", config: "Config", folder: Path) -> list[Path]:
    """Write the run's weights into a new folder.

    Returns:
        The files written.

    Raises:
        UserError: the run is not finished, one of its files is missing or damaged, the format has no place for its networks, or
            the folder already holds something.
    """
    from dmoe.data.partition import read_partition
    from dmoe.published import write_published

    if config.meta.target != "aggregator":
        raise UserError(f"{run.path}: trained with meta.target={config.meta.target}: the published files need an aggregator")
    try:
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}") from None
    if taken:
        raise UserError(f"{folder}: already holds something: choose another OUT_DIR")
    weights = Weights(run, config)
    partition = run.path / "experts" / "partition.json"
    groups = read_partition(partition)
    if set(groups.values()) != set(range(config.experts.count)):
        raise UserError(f"{partition}: it must share out the domains to {config.experts.count} experts")
    student = weights.student("meta", "student")
    return write_published(
        folder,
        dataset=config.dataset,
        seed=config.seed,
        experts=[weights.expert(number) for number in range(config.experts.count)],
        student=student,
        aggregator=weights.aggregator("meta", "aggregator", width=student.width),
        pretrained_student=weights.student("student", "model"),
        pretrained_aggregator=weights.aggregator("aggregator", "model", width=student.width),
        groups=groups,
    )


class Weights:
    """The networks of a finished run, each as its stage left it."""

    def __init__(self, run: "RunFolder", config: "Config") -> None:
        """
        Raises:
            UserError: the run is not finished.
        """
        from dmoe.artifacts import read_json
        from dmoe.model import DESCRIPTION

        self._run, self._config = run, config
        path = run.path / DESCRIPTION
        if not path.is_file():
            raise UserError(f"{run.path}: the run is not finished (no {DESCRIPTION}): python run.py --run_dir {run.path}")
        facts = read_json(path)
        try:
            channels, height, width = map(int, facts["transform"]["image_shape"])
            self._num_outputs = int(facts["task"]["num_outputs"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: damaged ({error}): run.py writes it anew") from None
        self._image_shape = channels, height, width

    def expert(self, number: int) -> "Network":
        """As tokens are taken from it."""
        return self._network(self._config.token_backbone, self._run.expert(number, {}).weights, "model")

    def student(self, stage: str, part: str) -> "Network":
        return self._network(self._config.student_backbone, self._run.stage(stage, {}).weights, part)

    def aggregator(self, stage: str, part: str, *, width: int) -> "Aggregator":
        from dmoe.artifacts import load_into, load_tensors, under_prefix
        from dmoe.model import build_aggregator

        path = self._run.stage(stage, {}).weights
        aggregator = build_aggregator(self._config.aggregator, width=width, num_outputs=self._num_outputs)
        load_into(aggregator, under_prefix(part, load_tensors(path)[0]), where=str(path))
        return aggregator

    def _network(self, backbone: "BackboneConfig", path: Path, part: str) -> "Network":
        from dmoe.artifacts import load_into, load_tensors, under_prefix
        from dmoe.backbones import build_backbone

        network = build_backbone(backbone, image_shape=self._image_shape, num_outputs=self._num_outputs)
        load_into(network, under_prefix(part, load_tensors(path)[0]), where=str(path))
        return network


def command_to_test(run: "RunFolder", config: "Config", folder: Path) -> str:
    """The command that tests the exported files."""
    from dmoe.config import CONFIG_FOLDER, load_config
    from dmoe.run_folder import CONFIG_FILE

    shipped = CONFIG_FOLDER / f"{config.dataset}.yaml"
    as_shipped = shipped.is_file() and load_config(shipped) == config
    which = ["--dataset", config.dataset] if as_shipped else ["--config", str(run.path / CONFIG_FILE)]
    return shlex.join(["python", "run.py", *which, "--test", "--checkpoint_dir", str(folder)])


if __name__ == "__main__":
    from dmoe.command_line import run_main

    run_main(main)
