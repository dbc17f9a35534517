import pytest

from tessera.kernels.linear import _launch, _reference


@pytest.fixture
def on_kernels(monkeypatch):
    """Called with "kernel": the custom ops of this test run the Triton kernels, whatever the device."""

    def choose(serve):
        for step in ("state", "apply", "rows", "gradient") if serve == "kernel" else ():
            monkeypatch.setattr(_reference, step, getattr(_launch, step))

    return choose
