# SPDX-License-Identifier: Apache-2.0
"""Seeds, poisoned memory and the backends a test runs on."""

import os
import signal
from collections.abc import Iterator

import pytest
import torch
from cases import KERNELS
from hypothesis import settings

from fused_inpaint import _backends, _extension, use_backend
from fused_inpaint.ops import checks
from fused_inpaint.ops.partial_conv import plan, routes

# A shell's background job ignores Ctrl-C, and so would the commands that tests send it to.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The vendor's float32 would be TF32 on a GPU, which is not what the tolerances are for.
torch.backends.cudnn.allow_tf32 = False
# The kernels' bfloat16 is tested on every processor, also where users would be given float32 instead.
checks.EMULATED = {torch.float16}
# cuBLAS is deterministic only with a workspace chosen before its first call.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# The same examples everywhere, in CI too.
settings.register_profile("suite", derandomize=True, database=None, deadline=None)
settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is the CPU's own is left out on a GPU, and under the emulation of its kernels (tests/cuda_emulation)."""
    for item in items:
        if item.get_closest_marker("cpu_only"):
            params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
            name = str(params.get("backend")).partition("_")[0]
            if _extension.emulated() or _backends.DEVICE.get(name) == "cuda":
                item.add_marker(pytest.mark.skip(reason="the GPU's kernels do not have it"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty, in Python and in C++, gives NaN (integers: the largest), so that an unwritten value shows."""
    former = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(former[0])
    torch.utils.deterministic.fill_uninitialized_memory = former[1]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For thousands of tiny calls, where waking a second thread costs more than the call."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["reference", *KERNELS])
def backend(request: pytest.FixtureRequest, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of each backend usable here in turn, selected for the test's duration, with poisoned memory.

    Those that are not are skipped once each, with the reason, by test_backends.py::test_usable.
    """
    name, _, vendor = request.param.partition("_")
    if vendor:
        monkeypatch.setattr(routes, "_LAYERS", [])
        monkeypatch.setattr(plan, "_plans", {})
    with use_backend(name):
        yield name


@pytest.fixture
def traceable(backend: str) -> None:
    """For networks that pad by replication: torch's deterministic form of that on a GPU imports a module, which dynamo
    does not trace."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device(backend: str) -> torch.device:
    """Where the backend's tensors live."""
    return torch.device(_backends.DEVICE[backend])
