"""What tests of trained experts compare with."""

import pytest
from small_experts import EXPERTS, Weights, open_small, weights_of

from experts.launch import train_all_experts


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """What the small experts are that train on this machine and to which nothing happens."""
    folder = tmp_path_factory.mktemp("experts") / "undisturbed"
    train_all_experts(open_small(folder), gpu=-1, threads=2)
    weights = weights_of(folder)
    assert len(weights) == EXPERTS
    return weights
