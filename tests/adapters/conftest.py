import pytest

import models


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory):
    return models.write_llama(tmp_path_factory.mktemp("base"))
