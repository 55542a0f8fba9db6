"""Short form of the fuzzing that `make torture` does at length."""
import logging

import pytest
from fuzz import READERS, check
from hypothesis import HealthCheck, given, settings

EXAMPLES = 60


@pytest.mark.parametrize('name', READERS)
def test_readers(tmp_path, name):
    logging.disable(logging.WARNING)
    reader = READERS[name]

    @settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))
    @given(reader.inputs)
    def run(content):
        check(reader.read, tmp_path, content)

    try:
        run()
    finally:
        logging.disable(logging.NOTSET)
