"""ComfyUI for the modules that import it at their top, and one reader for all tests."""

import pytest
from pack import use_comfyui

use_comfyui()


@pytest.fixture(scope="session")
def reader():
    from digits_read import Reader

    return Reader()
