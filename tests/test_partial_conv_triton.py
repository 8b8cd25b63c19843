# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the partial convolution without a GPU: in Triton's interpreter, and compiled for sm_80, sm_90.

The interpreter replaces parts of Triton for a whole process, so its tests run in processes of their own: by
`test_interpreter`, or by TRITON_INTERPRET=1 pytest on this file.
"""

import dataclasses
import importlib.metadata
import importlib.util
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cases import CASES, Case, assert_close, named, sample
from torch import Tensor

from fused_inpaint.baselines import ENCODER_KERNELS, ENCODER_WIDTHS
from fused_inpaint.ops.partial_conv import reference

ROOT = Path(__file__).parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SPEC = importlib.util.find_spec("triton")
TOOLS = Path(SPEC.origin).parent / "backends" / "nvidia" / "bin" if SPEC and SPEC.origin else Path()
MISSING = "" if SPEC else "Triton is not installed"


def no_interpreter() -> str:
    if MISSING:
        return MISSING
    version = importlib.metadata.version("triton")
    old = tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < (3, 7, 1)
    return f"the interpreter of Triton {version} fails on loops whose bounds are known at run time only" if old else ""


interpreted = pytest.mark.skipif(
    bool(no_interpreter()) or not INTERPRETED,
    reason=no_interpreter() or "needs TRITON_INTERPRET=1; test_interpreter runs it",
)

if INTERPRETED and not no_interpreter():
    from fused_inpaint.ops import triton_common
    from fused_inpaint.ops.partial_conv import triton_impl

Pair = tuple[int, int]
TILE = (64, 16, 32, 4, 2, 1)  # block_m, block_n, block_k, warps, stages, split


class Result(NamedTuple):
    y: Tensor  # (N, O, H', W')
    count: Tensor  # (N or 1, 1, H', W')
    mask: Tensor  # (N or 1, 1, H', W')


class Call(NamedTuple):
    """The arguments of one call, from which the reference's are made, too."""

    x: list[Tensor]
    masks: list[Tensor]
    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    geometry: tuple[Any, ...]  # upsample, stride, padding, dilation, groups
    epilogue: tuple[str, float]

    def expected(self) -> Result:
        """In float64."""
        upsample, stride, padding, dilation, _ = self.geometry
        channels = [x.size(1) for x in self.x]
        masks = [(m != 0).to(torch.uint8) for m in self.masks]
        kernel = self.weight.shape[2:]
        count, mask = reference.partial_window(masks, channels, upsample, kernel, stride, padding, dilation)
        y = reference.partial_conv2d(
            [x.double() for x in self.x],
            masks,
            count,
            self.weight.double(),
            None if self.bias is None else self.bias.double(),
            None if self.scale is None else self.scale.double(),
            *self.geometry,
            [0] * len(self.x),
            *self.epilogue,
        )
        return Result(y, count, mask)

    def actual(self, fold: bool = False, count: Tensor | None = None) -> Result:
        arguments = (self.weight, self.bias, self.scale, *self.geometry, *self.epilogue, fold)
        return Result(*triton_impl.partial_conv2d(self.x, self.masks, count, *arguments))


def call_of(case: Case, dtype: torch.dtype, scaled: bool = False) -> Call:
    """NaN and infinities lie under the holes."""
    s = sample(case, dtype)
    masks = s.masks
    if masks is None:
        masks = [torch.ones(1, 1, *x.shape[2:], dtype=torch.uint8) for x in s.x]
    scale = torch.linspace(-1, 2, case.outputs) if scaled else None
    bias = None if s.bias is None else s.bias.detach()
    geometry = (case.upsample, case.stride, case.padding, case.dilation, case.groups)
    epilogue = (case.activation, 0.01 if case.activation == "leaky_relu" else 0.0)
    return Call([x.detach() for x in s.x], masks, s.weight.detach(), bias, scale, geometry, epilogue)


def check(actual: Result, expected: Result, dtype: torch.dtype, rtol: float) -> None:
    """Equal counts and mask, exact zeros, and the output within the tolerance; the output's dtype and layout."""
    assert torch.equal(actual.count, expected.count)
    assert torch.equal(actual.mask != 0, expected.mask != 0)
    assert_close(actual.y, expected.y, rtol, what="y")
    assert actual.y.dtype == dtype and actual.y.is_contiguous(memory_format=torch.channels_last)
    assert not actual.y[(expected.count == 0).expand_as(actual.y)].any()


def wrong_pixel(result: Result, by: float) -> Result:
    y = result.y.clone()
    y[0, 0, y.size(2) // 2, y.size(3) // 2] += by * y.abs().max()
    return result._replace(y=y)


@pytest.mark.parametrize("rtol", [1e-5, 2**-7], ids=["float32", "bfloat16"])
def test_check_rejects(rtol: float) -> None:
    """A comparison that cannot fail proves nothing."""
    expected = call_of(named("plain"), torch.float32).expected()
    good = expected._replace(y=expected.y.float().contiguous(memory_format=torch.channels_last))
    check(good, expected, torch.float32, rtol)
    check(wrong_pixel(good, 0.5 * rtol), expected, torch.float32, rtol)
    count = expected.count.clone()
    count[-1, 0, -1, -1] += 1
    bad = [
        wrong_pixel(good, 1.5 * rtol),
        wrong_pixel(good, float("nan")),
        good._replace(count=count),
        good._replace(mask=1 - expected.mask),
        good._replace(y=good.y.contiguous()),
    ]
    for result in bad:
        with pytest.raises(AssertionError):
            check(result, expected, torch.float32, rtol)


@pytest.fixture
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    """Small tiles, or those that the test names, in place of the table's; float32 as such, and poisoned memory."""
    chosen = triton_common.Config(*getattr(request, "param", TILE))
    monkeypatch.setattr(triton_impl, "configuration", lambda *size: chosen)
    monkeypatch.setattr(triton_common, "precision", lambda dtype: "ieee")


SPLIT = (64, 16, 16, 4, 2, 3)
SMALL = (16, 32, 64, 4, 2, 1)
FAT = Case("fat", (40,), (6, 7), outputs=17, masks=("box",), activation="leaky_relu")
BOTH = Case("fat_and_thin", (20, 3), (6, 8), (2, 1), outputs=17, masks=("random", "box"), activation="relu")
# Of the cases that all backends share: what this kernel is asked for.
SHARED = [case for case in CASES if case.norm is None and len(case.channels) <= 2]
OWN = [
    FAT,
    dataclasses.replace(FAT, name="fat_strided", stride=(2, 3), dilation=(2, 1), padding=(2, 0), size=(11, 9)),
    dataclasses.replace(FAT, name="fat_groups", outputs=6, groups=2, planes="nc", channels=(48,), batch=1),
    dataclasses.replace(FAT, name="fat_kernel7", channels=(17,), kernel=(7, 7), padding=(3, 3), outputs=3),
    dataclasses.replace(FAT, name="fat_channel_masks", planes="1c", masks=("random",)),
    dataclasses.replace(FAT, name="fat_kernel1", kernel=(1, 1), padding=(0, 0), outputs=1),
    Case("large_kernel", (2,), (3, 4), outputs=3, kernel=(9, 7), padding=(4, 4)),
    Case("large_kernel_channel_masks", (2,), (3, 4), outputs=1, kernel=(9, 7), padding=(4, 4), planes="nc"),
    Case("long_row", (13,), (3, 14), outputs=3, kernel=(1, 11), padding=(0, 5)),
    dataclasses.replace(BOTH, name="fat_and_thin_folded", fold=True),
    dataclasses.replace(BOTH, name="fat_and_thin_direct", fold=False),
    dataclasses.replace(BOTH, name="thin_below_fat_folded", channels=(3, 20), upsample=(1, 2), fold=True),
    dataclasses.replace(BOTH, name="fat_channel_masks_folded", planes="nc", fold=True),
    dataclasses.replace(BOTH, name="fat_kernel5_folded", kernel=(5, 5), padding=(2, 2), fold=True),
    dataclasses.replace(BOTH, name="not_foldable", stride=(2, 2), fold=True),
]


@interpreted
@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("case", [*SHARED, *OWN], ids=lambda case: case.name)
def test_float32(case: Case) -> None:
    call = call_of(case, torch.float32, scaled=case.name.startswith("fat"))
    check(call.actual(bool(case.fold)), call.expected(), torch.float32, 5e-5 if case.fold else 1e-5)


@interpreted
@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("fold", [False, True], ids=["direct", "folded"])
@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [
        # One rounding is half an eps; the interpreter cuts bfloat16 off instead, which is as much as two.
        pytest.param(torch.bfloat16, 2**-7, id="bfloat16"),
        pytest.param(torch.float16, 2**-10, id="float16"),
    ],
)
def test_half_types(fold: bool, dtype: torch.dtype, rtol: float) -> None:
    call = call_of(BOTH, dtype, scaled=True)
    check(call.actual(fold), call.expected(), dtype, rtol)


@interpreted
@pytest.mark.parametrize("tile", [SPLIT, SMALL], ids=["split", "small"], indirect=True)
@pytest.mark.parametrize("fold", [False, True], ids=["direct", "folded"])
def test_tiles(tile: None, fold: bool) -> None:
    """Whatever the tiles; and twice the same bits."""
    call = call_of(BOTH, torch.float32, scaled=True)
    first, second = call.actual(fold), call.actual(fold)
    check(first, call.expected(), torch.float32, 5e-5)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@interpreted
@pytest.mark.parametrize("tile", [SPLIT], ids=["split"], indirect=True)
@pytest.mark.parametrize(
    "case",
    [
        FAT,
        *(case for case in OWN if case.name in ("fat_groups", "fat_kernel7", "fat_channel_masks", "large_kernel")),
        *map(named, ("shared_mask", "all_hole", "one_pixel_map", "kernel7_stride2", "up_both_folded")),
    ],
    ids=lambda case: case.name,
)
def test_split(tile: None, case: Case) -> None:
    call = call_of(case, torch.float32)
    check(call.actual(bool(case.fold)), call.expected(), torch.float32, 5e-5)


@interpreted
@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("tile", [TILE, SPLIT], ids=["whole", "split"], indirect=True)
@pytest.mark.parametrize("name", ["relu", "shared_channel_masks", "up_folded"])
def test_given_count(name: str) -> None:
    """It is taken as it is, and handed back; the mask is left to who made it."""
    case = named(name)
    call = call_of(case, torch.float32)
    expected = call.expected()
    result = call.actual(bool(case.fold), expected.count)
    assert result.count is expected.count and result.mask.numel() == 0
    check(result._replace(mask=expected.mask), expected, torch.float32, 5e-5)
    doubled = call.actual(bool(case.fold), 2 * expected.count)
    bias = 0.0 if call.bias is None else call.bias.view(1, -1, 1, 1)
    linear = call._replace(epilogue=("none", 0.0))
    half = (linear.expected().y - bias) / 2 + bias
    half = torch.where(expected.count > 0, half.relu() if case.activation == "relu" else half, 0.0)
    assert_close(doubled.y, half, 5e-5)


@interpreted
@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_mask_dtypes(dtype: torch.dtype) -> None:
    """Anything but 0 is valid; the new mask has the dtype of the first."""
    call = call_of(named("two_sources"), torch.float32)
    call = call._replace(masks=[(m * (1 if dtype == torch.bool else 3)).to(dtype) for m in call.masks])
    result = call.actual()
    check(result, call.expected(), torch.float32, 1e-5)
    assert result.mask.dtype == dtype and ((result.mask == 0) | (result.mask == 1)).all()


@interpreted
@pytest.mark.usefixtures("tile")
def test_parameter_dtypes_and_layouts() -> None:
    """Bias and scale in the sources' dtype; sources and weight in any layout."""
    call = call_of(FAT, torch.bfloat16, scaled=True)
    assert call.bias is not None and call.scale is not None
    expected = call._replace(bias=call.bias.bfloat16(), scale=call.scale.bfloat16()).expected()
    turned = call.x[0].permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    spread = torch.stack([call.weight, torch.full_like(call.weight, torch.nan)], 2)[:, :, 0]
    call = call._replace(x=[turned], weight=spread, bias=call.bias.bfloat16(), scale=call.scale.bfloat16())
    check(call.actual(), expected, torch.bfloat16, 2**-7)


@interpreted
@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu"])
def test_valid_nan_stays(activation: str) -> None:
    """Only holes are selected away: what a valid pixel holds reaches the output, through every activation."""
    call = call_of(dataclasses.replace(named("one_valid_pixel"), activation=activation), torch.float32)
    (x,), (mask,) = call.x, call.masks
    call = call._replace(x=[torch.where(mask == 1, torch.nan, x)])
    result = call.actual()
    seen = (result.count > 0).expand_as(result.y)
    assert result.y[seen].isnan().all() and seen.any() and not result.y[~seen].any()


@interpreted
def test_launches(monkeypatch: pytest.MonkeyPatch, tile: None) -> None:
    """One, but for a split or a fold; none for an empty batch."""
    launched: list[str] = []
    launch = triton_common.launch

    def counting(kernel: Any, *arguments: Any, **options: Any) -> None:
        launched.append(kernel.fn.__name__)
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(triton_common, "launch", counting)

    def launches(name: str, fold: bool = False) -> list[str]:
        launched.clear()
        call_of(named(name), torch.float32).actual(fold)
        return launched

    assert launches("plain") == ["convolve_kernel"]
    assert launches("up_folded", fold=True) == ["fold_kernel", "convolve_kernel"]
    assert launches("empty_batch") == []
    split = triton_common.Config(*SPLIT)
    monkeypatch.setattr(triton_impl, "configuration", lambda *size: split)
    assert launches("plain") == ["convolve_kernel", "reduce_kernel"]


@interpreted
def test_table_on_small_maps(poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table's own choice, not a test's."""
    monkeypatch.setattr(triton_common, "precision", lambda dtype: "ieee")
    for case in (FAT, dataclasses.replace(BOTH, fold=True)):
        call = call_of(case, torch.float32)
        check(call.actual(bool(case.fold)), call.expected(), torch.float32, 5e-5)


@interpreted
def test_tuner(monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    """A candidate is compared before it is timed, and a measured rule goes before the predictions."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tune_triton
    from workload import Layer

    # What the tuner sets for its own process is put back.
    monkeypatch.setattr(triton_impl, "configuration", triton_impl.configuration.__wrapped__)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    table = triton_impl.configuration
    problem = tune_triton.Problem(Layer("dec2", 16, 3, 5, 3, 8, True), 2, "ieee", True)
    configs = [TILE, SPLIT]
    assert tune_triton.verify(problem, configs, "cpu") == ["", ""]
    expected = tune_triton.expected
    monkeypatch.setattr(tune_triton, "expected", lambda given: (1.001 * expected(given)[0], expected(given)[1]))
    faults = tune_triton.verify(problem, configs, "cpu")
    assert all("its output differs by 0.001 of the largest value" in fault for fault in faults)

    sizes = problem.sizes
    assert sizes == {"rows": 32, "depth": 4 * 16 + 9 * 3, "outputs": 5}
    rule = tune_triton.rule(problem, SPLIT, 12.5)
    former = triton_impl._RULES
    predicted = table("ieee", True, **sizes)
    rules = tune_triton.merged([rule], tune_triton.merged([{**rule, "us": 99.0}], former))
    assert rules == [rule, *former]
    monkeypatch.setattr(triton_impl, "_RULES", rules)
    assert table("ieee", True, **sizes) == SPLIT != predicted
    assert table("ieee", True, **{**sizes, "rows": 63}) == SPLIT != table("ieee", True, **{**sizes, "rows": 64})
    assert all(table(p, fold, **sizes) for p in ("half", "tf32", "ieee") for fold in (False, True))


@pytest.mark.skipif(torch.cuda.is_available() or INTERPRETED, reason="there is a GPU to tune for, or an interpreter")
def test_tuner_without_gpu() -> None:
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "tune_triton.py"], capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "tune_triton: a CUDA GPU must be there to time kernels on, torch finds none\n"


@pytest.mark.skipif(
    bool(no_interpreter()) or INTERPRETED, reason=no_interpreter() or "this process is the one that it would start"
)
def test_interpreter() -> None:
    """All of the above, in two processes."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("FUSED_INPAINT_BACKEND", None)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k"]
    running = [
        subprocess.Popen(
            [*command, half], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for half in ("test_float32", "not test_float32")
    ]
    for process, least in zip(running, (60, 35), strict=True):
        output, _ = process.communicate()
        assert process.returncode == 0, output[-6000:]
        passed = re.search(r"(\d+) passed", output)
        assert passed is not None and int(passed[1]) >= least, output[-2000:]


class Compiled(NamedTuple):
    """A kernel as a layer of the U-Net launches it."""

    layer: str
    kernel: str
    options: dict[str, Any]
    cubin: int  # bytes
    shared: int  # bytes
    spilled: int  # bytes
    wgmma: bool
    mma: bool
    wide_copies: bool  # from global to shared memory, 16 bytes at once
    conversions: int  # of a tensor's layout, in loops that copy so


def unet() -> Iterator[tuple[str, list[int], list[int], int, int, int, int]]:
    """(name, channels, upsample, outputs, kernel, stride, side of the output) of each layer at 512 x 512."""
    widths = [3, *(64 * factor for factor in ENCODER_WIDTHS)]
    for i, kernel in enumerate(ENCODER_KERNELS):
        yield f"enc{i + 1}", [widths[i]], [1], widths[i + 1], kernel, 2, 256 >> i
        yield f"dec{i + 1}", [widths[i + 1], widths[i]], [2, 1], widths[i], 3, 1, 512 >> i


class Driver:
    """Of a GPU that is not there: enough for Triton's launcher to compile what it would launch."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # what is compiled is kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


def inspect(layer: str, kernel: Any, options: dict[str, Any], built: Any) -> Compiled:
    ptx = built.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # The kernels have no arrays of their own, so that local memory and stack are spilled registers.
    spilled = [int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)]
    assert spilled, usage
    loops = re.findall(r"scf\.for .*?scf\.yield", built.asm["ttgir"], re.DOTALL)
    return Compiled(
        layer,
        kernel.fn.__name__,
        options,
        len(built.asm["cubin"]),
        built.metadata.shared,
        sum(spilled),
        "wgmma.mma_async" in ptx,
        "mma.sync" in ptx,
        re.search(r"cp\.async\.cg\.shared\.global .*0x10", ptx) is not None,
        sum(loop.count("ttg.convert_layout") for loop in loops if "async_copy_global_to_local" in loop),
    )


def compile_layers(part: str, dtype: torch.dtype, precision: str, capability: int) -> list[Compiled]:
    """What the encoder's ("enc") or the decoder's layers launch at batch 1 and 16, each kernel once."""
    from triton.runtime.driver import driver

    from fused_inpaint.ops import triton_common
    from fused_inpaint.ops.partial_conv import triton_impl

    driver.set_active(Driver(capability))
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    found: dict[str, Compiled] = {}
    layer = ""

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        built = kernel.warmup(*arguments, grid=grid, **options, enable_fp_fusion=True)
        if built.hash not in found:
            found[built.hash] = inspect(layer, kernel, options, built)

    triton_common.launch = launch
    like: Any = {"dtype": dtype, "device": "meta", "memory_format": torch.channels_last}
    # Both are compiled for both parts, but not both in every dtype.
    given = (part == "dec") == (capability == 90)
    for batch in (1, 16):
        for name, channels, upsample, outputs, kernel, stride, side in unet():
            if not name.startswith(part):
                continue
            layer = f"{name} x {batch}"
            sides = [side * stride // up for up in upsample]
            x = [torch.empty(batch, c, s, s, **like) for c, s in zip(channels, sides, strict=True)]
            masks = [torch.empty(1, 1, s, s, dtype=torch.uint8, device="meta") for s in sides]
            weight = torch.empty(outputs, sum(channels), kernel, kernel, **like)
            constant = torch.empty(outputs, device="meta")
            count = torch.empty(1, 1, side, side, dtype=torch.int32, device="meta") if given else None
            pairs = [(value, value) for value in (stride, kernel // 2, 1)]
            rest = (upsample, *pairs, 1, "leaky_relu", 0.2, True)
            triton_impl.partial_conv2d(x, masks, count, weight, constant, constant, *rest)
    return list(found.values())


TARGETS = [
    # Every dtype, both architectures and each of the table's choices; all pairs would take twice the time.
    pytest.param(torch.bfloat16, "half", 90, id="bfloat16-sm_90"),
    pytest.param(torch.float16, "half", 80, id="float16-sm_80"),
    pytest.param(torch.float32, "tf32", 90, id="tf32-sm_90"),
    pytest.param(torch.float32, "ieee", 80, id="float32-sm_80"),
]
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # that one block may have
NO_PTXAS = MISSING or ("" if (TOOLS / "ptxas").exists() else "this Triton comes without ptxas")


def no_line_numbers() -> None:
    """Without them the kernels compile in half the time, to the same instructions."""
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"


@pytest.fixture(scope="module")
def compiled() -> Iterator[dict[str, list[Future[list[Compiled]]]]]:
    """By precision and architecture; two processes compile, and this one never loads Triton."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), initializer=no_line_numbers) as pool:
        yield {
            str(target.id): [pool.submit(compile_layers, part, *target.values) for part in ("dec", "enc")]
            for target in TARGETS
        }


@pytest.mark.skipif(bool(NO_PTXAS) or INTERPRETED, reason=NO_PTXAS or "Triton's interpreter is on in this process")
@pytest.mark.parametrize(("dtype", "precision", "capability"), TARGETS)
def test_compiles(
    compiled: dict[str, list[Future[list[Compiled]]]],
    request: pytest.FixtureRequest,
    dtype: torch.dtype,
    precision: str,
    capability: int,
) -> None:
    """What the table chooses for the U-Net's layers, ahead of time: machine code that fits, and spills nothing."""
    results = [result for part in compiled[request.node.callspec.id] for result in part.result()]
    assert {result.kernel for result in results} == {"convolve_kernel", "reduce_kernel", "fold_kernel"}
    for result in results:
        assert result.cubin > 0, result
        assert result.shared <= SHARED_MEMORY[capability], result
        # The tiles are Hopper's, where tl.dot reads its operands from shared memory; before, they take registers.
        assert result.spilled <= (0 if capability == 90 else 256), result
    convolutions = [result for result in results if result.kernel == "convolve_kernel"]
    assert len(convolutions) > 8
    for result in convolutions:
        wgmma = capability == 90 and result.options["BLOCK_M"] >= 64
        assert (result.wgmma, result.mma) == ((False, False) if precision == "ieee" else (wgmma, not wgmma)), result
        if result.options["WALK0"] == "chunks":
            assert result.wide_copies and result.conversions == 0, result
