"""Short form of the fuzzing that `make torture` does at length."""
import logging

import pytest
from fuzz import READERS, try_inputs

EXAMPLES = 40


@pytest.mark.parametrize('name', READERS)
def test_readers(tmp_path, name):
    logging.disable(logging.WARNING)
    try:
        try_inputs(READERS[name], tmp_path, EXAMPLES, derandomize=True)
    finally:
        logging.disable(logging.NOTSET)
