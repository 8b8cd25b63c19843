# SPDX-License-Identifier: Apache-2.0
"""The kernel that a layer gets, by table and predicates, as on a machine with a GPU."""

import pytest
import torch

from fused_inpaint import NoBackendError, _backends, use_backend
from fused_inpaint.ops.partial_conv import routes

FAT = routes.Call("cuda", torch.bfloat16, 1, 256, 256, [3, 3], [1, 1], [1, 1], 1, 65536, False, False, False)
THIN = FAT._replace(channels=3, outputs=64, kernel=[7, 7])
DEEP = FAT._replace(channels=512, outputs=512, rows=64)


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "triton"):
        monkeypatch.setitem(_backends._MISSING, name, "")
        monkeypatch.setitem(_backends.DEVICE, name, "cuda")


@pytest.mark.parametrize(
    "call, kernel",
    [
        (FAT, "vendor"),
        (THIN, "triton"),
        (THIN._replace(stride=[2, 2]), "vendor"),
        (FAT._replace(outputs=3), "triton"),
        (FAT._replace(outputs=3, upsampled=True), "vendor"),
        (THIN._replace(dtype=torch.float32), "direct"),
        (THIN._replace(dtype=torch.float32, rows=16 * 65536), "vendor"),
        (THIN._replace(dtype=torch.float64), "vendor"),
        (DEEP, "triton"),
        (DEEP._replace(dtype=torch.float32), "vendor"),
        (DEEP._replace(batch_statistics=True), "vendor"),
        (DEEP._replace(sources=3), "vendor"),
    ],
)
def test_table(call: routes.Call, kernel: str) -> None:
    with use_backend("auto"):
        assert routes.choose("partial_conv2d", call) == kernel


def test_without_triton_the_next_rule_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_backends._MISSING, "triton", "it is not installed")
    with use_backend("auto"):
        assert routes.choose("partial_conv2d", THIN) == "direct"
        assert routes.choose("partial_conv2d", DEEP) == "vendor"


def test_without_the_library_triton_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_backends._MISSING, "cuda", "it was not built")
    with use_backend("auto"):
        assert routes.choose("partial_conv2d", FAT) == "triton"
        assert routes.choose("partial_conv2d", FAT._replace(dtype=torch.float64)) == "reference"


@pytest.mark.parametrize("call, cuda", [(FAT, "vendor"), (THIN, "direct"), (DEEP, "vendor")])
def test_forced(call: routes.Call, cuda: str) -> None:
    for backend, kernel in (("cuda", cuda), ("triton", "triton"), ("reference", "reference")):
        with use_backend(backend):
            assert routes.choose("partial_conv2d", call) == kernel


def test_compiled_graphs_do_not_depend_on_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with use_backend("auto"):
        assert routes.choose("partial_conv2d", DEEP) == "vendor"
        assert routes.choose("partial_conv2d", THIN) == "triton"


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"dtype": torch.float64}, "it computes in float32, not float64"),
        ({"sources": 3}, "it takes one or two sources, got 3"),
        ({"device": "cpu"}, "it runs on CUDA tensors, these are on cpu"),
    ],
)
def test_a_forced_backend_refuses_in_words(changes: dict, reason: str) -> None:
    sentence = f"^partial_conv2d: backend must be able to run this call, got triton: {reason}$"
    with use_backend("triton"), pytest.raises(NoBackendError, match=sentence):
        routes.choose("partial_conv2d", FAT._replace(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": 5, "outputs": 5},
        {"groups": 3},
        {"kernel": [9, 9]},
        {"dilation": [4, 4]},
        {"stride": [1, 3]},
        {"folded": True},
    ],
)
def test_the_direct_kernel_is_for_thin_layers_with_small_windows(changes: dict) -> None:
    assert routes.refusal("direct", THIN) == ""
    assert routes.refusal("direct", THIN._replace(**changes)) != ""


def test_products() -> None:
    assert THIN.products == 65536 * 64 * 3 * 49
    assert FAT._replace(groups=256).products == 65536 * 256 * 9
