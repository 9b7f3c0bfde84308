"""What the benchmarks share: the model (once per way of holding it), prompts, and how many rounds. See `make bench`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rsteer_interp.backends import load_backend
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.linear_kernel import prefers_onednn
from rsteer_interp.batch import Batch, Tokens
from rsteer_interp.prompts import load_prompts
from tests.benchmarks.fitted import Fitted, fit
from tests.benchmarks.unshared import unshared
from tests.tiny_models import save_tiny

SETS = ("political_sensitive", "political_matched", "harmful", "general")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-model", default="demo", help="model to measure; tiny: a random one, to try the cases out")
    parser.addoption("--bench-rounds", type=int, default=3, help="rounds of every comparison")
    parser.addoption("--bench-nnsight", default="", help="a Python that has nnsight, transformers and torch")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What the numbers depend on and nothing else: no host name."""
    cpu = machine_info.get("cpu", {}).get("brand_raw", "unknown processor")
    machine_info.clear()
    machine_info |= {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "model": config.getoption("--bench-model"),
        "dtype": "float32",
        "kernel": "oneDNN" if prefers_onednn() else "PyTorch's default",
    }


@pytest.fixture(scope="session")
def rounds(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--bench-rounds"))


@pytest.fixture(scope="session")
def model_name(request: pytest.FixtureRequest) -> Iterator[str]:
    """The model as `load_backend` takes it."""
    name = request.config.getoption("--bench-model")
    with tempfile.TemporaryDirectory() as folder:
        yield str(save_tiny("llama", Path(folder))) if name == "tiny" else name


@pytest.fixture(scope="session")
def backend(model_name: str) -> Backend:
    return load_backend(model_name, "hooks", dtype="fp32", device="cpu")


@pytest.fixture(scope="session")
def small(model_name: str) -> Backend | None:
    """A smaller model for the growth with size; none beside a tiny one."""
    return load_backend("demo-small", "hooks", dtype="fp32", device="cpu") if model_name == "demo" else None


@pytest.fixture(scope="session")
def lens(model_name: str) -> Any:
    """The same weights inside TransformerLens."""
    return load_backend(model_name, "transformerlens", dtype="fp32", device="cpu")


@pytest.fixture(scope="session")
def rows(backend: Backend) -> list[Tokens]:
    """64 short chat prompts of the built-in sets."""
    texts = [text for name in SETS for text in load_prompts(name).split("select").sample(16, 0).texts]
    return backend.template().encode_all(texts)


@pytest.fixture(scope="session")
def fitted(backend: Backend) -> Fitted:
    return fit(backend)


@pytest.fixture(scope="session")
def long_batch(backend: Backend) -> Batch:
    """8 prompts of 256 tokens without a common beginning."""
    return backend.batch(unshared(8, 256, 190))
