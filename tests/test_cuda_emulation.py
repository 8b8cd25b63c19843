# SPDX-License-Identifier: Apache-2.0
"""The CUDA emulation of tests/cuda_emulation: it runs kernels, and it shows the faults it is there for."""

import subprocess
import sys

import pytest
import torch
from cuda_emulation import build
from torch import Tensor

SOURCE = build.HERE / "harness.cu"

pytestmark = pytest.mark.skipif(bool(build.missing()), reason=build.missing() or "available")


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    torch.ops.load_library(build.build([SOURCE]))


@pytest.fixture(params=["forward", "reverse"], autouse=True)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(build.ORDER, request.param)
    return request.param


def run(kernel: str, x: Tensor, fault: str = "", threads: int = 256) -> Tensor:
    return torch.ops.cuda_emulation.run(kernel, fault, threads, x)


def bf16_values(n: int) -> tuple[Tensor, Tensor]:
    """Small integers, whose sums are exact, and the sum of each 256 of them."""
    x = torch.randint(-8, 9, (n,)).to(torch.bfloat16)
    padded = torch.nn.functional.pad(x.float(), (0, -n % 256))
    return x, padded.view(-1, 256).sum(1)


def test_vector_add(poisoned: None) -> None:
    x = torch.randn(4 * 1000)
    torch.testing.assert_close(run("add", x), x + x, rtol=0, atol=0)


def test_block_reduction(poisoned: None) -> None:
    x, expected = bf16_values(5000)
    torch.testing.assert_close(run("block_sum", x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("threads", [1, 48, 256])
def test_dynamic_shared_memory(poisoned: None, threads: int) -> None:
    x = torch.randn(6 * threads)
    expected = x.view(-1, threads).flip(1).flatten()
    torch.testing.assert_close(run("reverse_tiles", x, threads=threads), expected, rtol=0, atol=0)


def test_warp_calls(poisoned: None) -> None:
    lane = torch.arange(64) % 32
    down = torch.where(lane % 16 < 13, lane + 3, lane)
    up = torch.where(lane % 8 > 0, lane - 1, lane)
    constant = [torch.full((64,), value) for value in (11, 1, 1)]
    expected = torch.stack([lane // 8 * 8 + (lane + 1) % 8, up, down, lane ^ 5, *constant, lane], 1).float()
    torch.testing.assert_close(run("warp_calls", lane, threads=64).view(64, 8), expected, rtol=0, atol=0)


def test_missing_barrier_before_a_read(order: str) -> None:
    # The fault shows where a reader comes before the writer: warp 0 reads what all the others write.
    x, expected = bf16_values(1024)
    actual = run("block_sum", x, "no_barrier")
    assert actual.isnan().all() if order == "forward" else torch.equal(actual, expected)


def test_missing_barrier_before_a_write() -> None:
    x = torch.randn(512)
    assert not torch.equal(run("reverse_tiles", x, "no_barrier"), x.view(-1, 256).flip(1).flatten())


def test_unwritten_output(poisoned: None) -> None:
    x = torch.randn(4 * 1000)
    actual = run("add", x, "unwritten")
    assert actual[-4:].isnan().all()
    torch.testing.assert_close(actual[:-4], (x + x)[:-4], rtol=0, atol=0)


def test_unwritten_shared_memory() -> None:
    assert run("block_sum", bf16_values(1024)[0], "unwritten").isnan().all()


@pytest.mark.parametrize(
    ("kernel", "fault", "threads", "message"),
    [
        ("block_sum", "exits", 256, r"divergent barrier: thread \(\d+, 0, 0\) waits in __shfl_down_sync at .* exited"),
        ("block_sum", "diverges", 256, r"divergent barrier: .* waits in __syncthreads at .* waits in __syncthreads at"),
        ("block_sum", "partial_mask", 256, r"__syncwarp at .*harness.cu:\d+: only full masks are emulated"),
        ("block_sum", "", 240, r"__shfl_down_sync at .* reads lane 16 of a warp of 16 threads"),
        ("reverse_tiles", "", 20_000, r"a block of \(20000, 1, 1\) threads cannot be launched"),
        ("reverse_tiles", "", 1024, r"a grid of \(0, 1, 1\) blocks cannot be launched"),
        ("reverse_tiles", "too_much_shared", 250, r"51200 bytes of shared memory are too many"),
    ],
)
def test_refusals(kernel: str, fault: str, threads: int, message: str) -> None:
    x = torch.ones(1000).to(torch.bfloat16 if kernel == "block_sum" else torch.float32)
    with pytest.raises(RuntimeError, match=f"cuda emulation: .*{message}.*in block .* launched at .*harness.cu"):
        run(kernel, x, fault, threads)
    # The next launch does not suffer from what the failed one left behind.
    values, expected = bf16_values(1000)
    torch.testing.assert_close(run("block_sum", values), expected, rtol=0, atol=0)


# kernel, fault, what the sanitizers say
SANITIZED = [
    ("add", "", ""),
    ("block_sum", "", ""),
    ("reverse_tiles", "", ""),
    ("add", "off_by_one", "AddressSanitizer: heap-buffer-overflow"),
    ("block_sum", "shared_off_by_one", "index 8 out of bounds for type 'float [8]'"),
    ("reverse_tiles", "shared_off_by_one", "AddressSanitizer: heap-buffer-overflow"),
    ("block_sum", "local_off_by_one", "AddressSanitizer: stack-buffer-overflow"),
]

# Importing torch takes seconds and a report ends its process, so each case runs in a fork.
SANITIZED_PROGRAM = """
import os, sys, torch
torch.ops.load_library(sys.argv[1])
for case in sys.argv[2:]:
    order, kernel, fault = case.split(":")
    print("CASE", case, file=sys.stderr, flush=True)
    if os.fork() == 0:
        os.environ["FUSED_INPAINT_EMULATION_ORDER"] = order
        x = torch.ones(2000, dtype=torch.bfloat16 if kernel == "block_sum" else torch.float32)
        torch.ops.cuda_emulation.run(kernel, fault, 250 if kernel == "reverse_tiles" else 256, x)
        print("FINISHED", file=sys.stderr, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def reports() -> dict[str, str]:
    """What each case of SANITIZED wrote, in either order."""
    library = build.build([SOURCE], sanitize=True)
    cases = [f"{order}:{kernel}:{fault}" for order in ("forward", "reverse") for kernel, fault, _ in SANITIZED]
    command = [sys.executable, "-c", SANITIZED_PROGRAM, str(library), *cases]
    done = subprocess.run(command, env=build.environment(library, sanitize=True), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(part.split("\n", 1) for part in done.stderr.split("CASE ")[1:])


@pytest.mark.parametrize(("kernel", "fault", "report"), SANITIZED)
def test_sanitizers(reports: dict[str, str], order: str, kernel: str, fault: str, report: str) -> None:
    actual = reports[f"{order}:{kernel}:{fault}"]
    if report:
        assert report in actual and "harness.cu" in actual and "FINISHED" not in actual
    else:
        assert actual == "FINISHED\n"
