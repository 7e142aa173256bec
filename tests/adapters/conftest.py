import pytest

import causal


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory):
    return causal.write(tmp_path_factory.mktemp("base"))
