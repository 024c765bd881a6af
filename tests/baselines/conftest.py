"""The pair that all tests of the baselines train."""

import pytest
from baseline_pair import Pair
from tiny import save_pair


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    return Pair(save_pair(folder / "student", 0), save_pair(folder / "teacher", 1))
