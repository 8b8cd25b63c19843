# SPDX-License-Identifier: Apache-2.0
"""The operator namespace `torch.ops.fused_inpaint`: schemas live in Python, kernels in csrc/ or beside the op."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

library = torch.library.Library("fused_inpaint", "DEF")


def define(
    schema: str,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Define one operator: its schema, the shapes of its outputs, and its derivative if it has one."""
    name = "fused_inpaint::" + schema.split("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(name, fake, lib=library)
    if backward is not None:
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=library)


def implement(name: str, kernel: Callable[..., Any]) -> None:
    """Give an operator a kernel written in Python, for tensors on the GPU and, where tests interpret it, on the CPU."""
    for key in ("CUDA", "CPU"):
        library.impl(name, kernel, key)


def implement_in_triton(package: str, name: str) -> None:
    """Give operator `<name>_triton` the function `name` of the package's triton_impl.py; its first call imports Triton,
    which looks for a GPU driver."""

    def kernel(*arguments: Any) -> Any:
        return getattr(importlib.import_module(".triton_impl", package), name)(*arguments)

    implement(f"{name}_triton", kernel)
