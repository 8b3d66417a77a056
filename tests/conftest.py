import os

import pytest
import torch

# before transformers, peft or a kernel is imported: they read these once
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# triton 3.9 warns once where it is left unset
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# tensors of a few kilobytes: a second thread costs more than it does
torch.set_num_threads(1)


_THIRD_PARTY_WARNINGS = [
    # peft reads transformers' old name when it wraps a model
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    # numpy in triton's interpreter: a kernel computes both sides of every tl.where
    "ignore:(divide by zero|invalid value|overflow) encountered in:RuntimeWarning",
]


def pytest_configure(config):
    for line in _THIRD_PARTY_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device():
    """Where kernels run; on a CPU they are interpreted."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def kernels(monkeypatch):
    """The door leads to the Triton kernels."""
    pytest.importorskip("triton")
    monkeypatch.setenv("LIGHTNING_SAGE_KERNELS", "triton")
