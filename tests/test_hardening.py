# SPDX-License-Identifier: Apache-2.0
"""What strangers do to a library: any arguments, hostile files, threads, forks, and ten thousand calls."""

import multiprocessing
import os
import pickle
import random
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_inpaint import models, ops, use_backend
from fused_inpaint.models import registry

# FUSED_INPAINT_FUZZ=5000 is the nightly size.
EXAMPLES = int(os.environ.get("FUSED_INPAINT_FUZZ", "300"))

Call = tuple[Callable[..., Tensor], list[Tensor]]


def sizes(rng: random.Random) -> tuple[int, int, int]:
    return rng.choice([1, 1, 2, 3]), rng.choice([1, 2, 5, 9, 16]), rng.choice([1, 3, 8, 13])


def mask_of(rng: random.Random, *size: int) -> Tensor:
    kind = rng.choice(["random", "ones", "zeros", "pixel"])
    if kind == "random":
        return (torch.rand(size) > rng.random()).float()
    mask = torch.full(size, float(kind == "ones"))
    if kind == "pixel":
        mask.view(-1)[rng.randrange(mask.numel())] = 1
    return mask.to(rng.choice([torch.uint8, torch.bool, torch.float32]))


def laid(rng: random.Random, t: Tensor) -> Tensor:
    """In one of the layouts that a tensor may come in."""
    kind = rng.choice(["contiguous", "channels_last", "sliced", "transposed"])
    if kind == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if kind == "sliced":
        wide = torch.randn(*t.shape[:-1], 2 * t.size(-1))
        wide[..., ::2] = t
        return wide[..., ::2]
    return t.transpose(2, 3).contiguous().transpose(2, 3) if kind == "transposed" else t


def partial_conv(rng: random.Random) -> Call:
    n, h, w = sizes(rng)
    groups = rng.choice([1, 1, 2])
    channels, outputs = groups * rng.choice([1, 3, 8]), groups * rng.choice([1, 4, 9])
    kernel, dilation = rng.choice([1, 2, 3, 5]), rng.choice([1, 1, 2])
    padding = dilation * (kernel - 1) // 2 + rng.choice([0, 1])
    if min(h, w) + 2 * padding < dilation * (kernel - 1) + 1:
        padding += dilation * (kernel - 1)
    mask = mask_of(rng, rng.choice([1, n]), rng.choice([1, channels]), h, w)
    x = torch.randn(n, channels, h, w).masked_fill((mask == 0).expand(n, channels, h, w), torch.nan)
    options = {"activation": rng.choice(["none", "relu", "leaky_relu"])}
    stride = rng.choice([1, 2])

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.partial_conv2d(x, mask, weight, bias, stride, padding, dilation, groups, **options)[0]

    return call, [laid(rng, x), torch.randn(outputs, channels // groups, kernel, kernel), torch.randn(outputs)]


def region_norm(rng: random.Random) -> Call:
    n, h, w = sizes(rng)
    channels = rng.choice([1, 5, 16])
    mask = mask_of(rng, rng.choice([1, n]), rng.choice([1, channels]), h, w)
    options = {
        "stats": rng.choice(["batch", "instance"]),
        "shared_bias": rng.random() < 0.5,
        "activation": rng.choice(["none", "relu", "leaky_relu"]),
        "eps": 0.1,
    }

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.region_norm(x, mask, weight, bias, **options)

    return call, [laid(rng, torch.randn(n, channels, h, w)), torch.randn(2, channels), torch.randn(2, channels)]


def region_conv(rng: random.Random) -> Call:
    n, h, w = sizes(rng)
    channels, outputs, kernel = rng.choice([1, 4]), rng.choice([1, 6]), rng.choice([1, 3])
    select, mode = rng.choice(["output", "input"]), rng.choice(["zeros", "replicate"])
    mask = mask_of(rng, rng.choice([1, n]), 1, h, w)
    two = 2 * channels if select == "input" else channels
    size = (outputs, two, kernel, kernel) if select == "input" else (2, outputs, channels, kernel, kernel)
    options = {"select": select, "padding_mode": mode, "activation": rng.choice(["none", "elu"])}

    def call(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        return ops.region_conv2d((x, y) if select == "input" else x, mask, weight, None, 1, kernel // 2, **options)

    x, y = (laid(rng, torch.randn(n, channels, h, w)) for _ in range(2))
    return call, [x, y, torch.randn(size)]


def gated_blend(rng: random.Random) -> Call:
    n, h, w = sizes(rng)
    size = (n, rng.choice([1, 7, 16]), h, w)
    return ops.gated_blend, [laid(rng, torch.randn(size)) for _ in range(3)]


def pyramid(rng: random.Random) -> Call:
    n, h, w = sizes(rng)
    dilations = [rng.choice([1, 2, 3, 11]) for _ in range(rng.choice([1, 2, 4]))]
    mode = "reflect" if max(dilations) < min(h, w) else rng.choice(["replicate", "zeros"])
    channels, outputs = rng.choice([1, 3, 16]), len(dilations) * rng.choice([1, 4, 16])

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.pyramid_conv2d(x, weight, bias, dilations, padding_mode=mode)

    return call, [laid(rng, torch.randn(n, channels, h, w)), torch.randn(outputs, channels, 3, 3), torch.randn(outputs)]


def gram(rng: random.Random) -> Call:
    n, h, w = sizes(rng)
    size, over = (n, rng.choice([1, 3, 16]), h, w), rng.choice(["channels", "positions"])
    return lambda a, b: ops.gram_l1(a, b, over=over), [laid(rng, torch.randn(size)) for _ in range(2)]


def results(call: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor | None) -> list[Tensor]:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    y = call(*leaves)
    found = torch.autograd.grad(y, leaves, torch.ones_like(y) if grad is None else grad, allow_unused=True)
    return [y.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True))]


@pytest.mark.parametrize("make", [partial_conv, region_norm, region_conv, gated_blend, pyramid, gram])
def test_any_arguments(make: Callable[[random.Random], Call], one_thread: None, poisoned: None) -> None:
    """Values and gradients in float64, of random shapes, layouts and options."""
    for seed in range(EXAMPLES // 6):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        call, leaves = make(rng)
        leaves = [leaf.double() for leaf in leaves]
        found = results(call, leaves, None)
        with use_backend("reference"):
            expected = results(call, leaves, None)
        for at, (one, other) in enumerate(zip(found, expected, strict=True)):
            scale = other.abs().max().clamp(min=1) if other.numel() else 1
            assert not other.numel() or (one - other).abs().max() <= 1e-10 * scale, f"{make.__name__} {seed}: {at}"


class Hostile:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


NOT_TENSORS = "path must be a checkpoint of nothing but tensors, got "


def test_files_that_run_code_do_not(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for name in ("plain.pth", "torch.pth"):
        if name == "plain.pth":
            (tmp_path / name).write_bytes(pickle.dumps({"model": Hostile(str(mark))}))
        else:
            torch.save({"model": Hostile(str(mark))}, tmp_path / name)
        for key in ("pconv", "aot_gan"):
            with pytest.raises(ValueError, match=NOT_TENSORS):
                models.load_published(key, tmp_path / name)
    assert not mark.exists()


DAMAGED = r"path must be a whole checkpoint \(.pth, .safetensors, .npz\), got "


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    model = models.build_model("pconv", levels=2, width=4)
    model.save_pretrained(tmp_path / "a.safetensors")
    torch.save(model.state_dict(), tmp_path / "a.pth")
    for name in ("a.safetensors", "a.pth"):
        whole = (tmp_path / name).read_bytes()
        for kept in (0, 7, 100, len(whole) // 2, len(whole) - 1):
            path = tmp_path / f"cut{name[1:]}"
            path.write_bytes(whole[:kept])
            with pytest.raises(ValueError, match=DAMAGED):
                models.load_published("pconv", path)
    (tmp_path / "page.pth").write_text("Please log in to download this file")
    with pytest.raises(ValueError, match=DAMAGED):
        models.load_published("pconv", tmp_path / "page.pth")
    # A header that promises more than there is.
    (tmp_path / "big.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match=DAMAGED):
        models.load_published("pconv", tmp_path / "big.safetensors")
    with zipfile.ZipFile(tmp_path / "zip.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10_000_000)
    with pytest.raises(ValueError, match=NOT_TENSORS):
        models.load_published("pconv", tmp_path / "zip.pth")


def block(seed: int) -> Tensor:
    """One of each op, forward and backward."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 8, 16, 16, generator=g).requires_grad_()
    mask = (torch.rand(2, 1, 16, 16, generator=g) > 0.5).float()
    weight = torch.randn(8, 8, 3, 3, generator=g)
    y = ops.partial_conv2d(x, mask, weight, padding=1)[0]
    y = ops.region_norm(y, mask)
    y = ops.gated_blend(x, y, ops.pyramid_conv2d(x, weight, None, (1, 2)))
    (gradient,) = torch.autograd.grad(y.square().sum() + ops.gram_l1(y, x, over="positions").sum(), x)
    return gradient


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("key", registry.MODELS)
def test_networks_of_no_picture(key: str, grad: bool) -> None:
    model = models.build_model(key).eval()
    with torch.set_grad_enabled(grad):
        image = model(torch.rand(0, 3, 40, 56), torch.ones(0, 1, 40, 56)).image
        assert image.shape == (0, 3, 40, 56)
    if grad:
        image.sum().backward()
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_threads_at_once() -> None:
    """Python's threads share the kernels and their scratch memory."""
    expected = [block(seed) for seed in range(4)]
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(10):
            if not torch.allclose(block(seed), expected[seed], rtol=1e-4, atol=1e-4):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _child(connection: Any) -> None:
    torch.set_num_threads(1)
    connection.send(block(1).numpy())


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_ops_in_worker_processes(method: str) -> None:
    """As data workers use them; a fork after the parent's threads have run."""
    torch.set_num_threads(2)
    expected = block(1)
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender,))
    process.start()
    assert receiver.poll(60), "the worker hangs"
    found = torch.from_numpy(receiver.recv())
    process.join(10)
    assert process.exitcode == 0 and torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_memory_stays(one_thread: None) -> None:
    x, weight = torch.randn(1, 4, 8, 8), torch.randn(4, 4, 3, 3)
    mask = torch.ones(1, 1, 8, 8)

    def calls(number: int) -> None:
        for _ in range(number):
            ops.partial_conv2d(x, mask, weight, padding=1)
            ops.region_norm(x, mask)
            ops.gated_blend(x, x, x)
            ops.pyramid_conv2d(x, weight, None, (1, 2))
            ops.gram_l1(x, x, over="positions")

    with torch.no_grad():
        calls(300)
        before = resident()
        calls(2000)  # ten thousand in all
    assert resident() - before < 8e6
