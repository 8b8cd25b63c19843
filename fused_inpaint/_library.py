# SPDX-License-Identifier: Apache-2.0
"""The operator namespace `torch.ops.fused_inpaint`: schemas live in Python, kernels in csrc/ or beside the op."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

library = torch.library.Library("fused_inpaint", "DEF")
_registered = torch.ops.fused_inpaint


class _Operators:
    """The operators by name, as `torch.ops.fused_inpaint` has them; those with a derivative go a shorter way in eager
    mode (see `_shortcut`)."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_registered, name)


ops = _Operators()


def define(
    schema: str,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Define one operator: its schema, the shapes of its outputs, and its derivative if it has one."""
    name = schema.split("(")[0]
    full = "fused_inpaint::" + name
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(full, fake, lib=library)
    operator = getattr(_registered, name).default
    if backward is not None:
        assert setup_context is not None
        torch.library.register_autograd(full, backward, setup_context=setup_context, lib=library)
        operator = _shortcut(operator, backward, setup_context)
    setattr(ops, name, _without_tangents(name, operator))


# What torch itself enters an operator's derivative with; without them, the registered way is the only one.
_HAS_SHORTCUT = all(
    hasattr(torch._C, name)
    for name in (
        "_AutoDispatchBelowAutograd",
        "_any_requires_grad",
        "_are_functorch_transforms_active",
        "_is_tracing",
        "_len_torch_dispatch_stack",
    )
)


def is_eager() -> bool:
    """Whether a call is what it seems: nothing compiles, traces, transforms or fakes it."""
    return _HAS_SHORTCUT and not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
    )


def _shortcut(operator: Any, backward: Callable[..., Any], setup_context: Callable[..., None]) -> Callable[..., Any]:
    """The operator with the same derivative, entered without the dispatcher.

    `register_autograd` walks through the arguments' structure in Python several times a call, hundreds of microseconds
    where there are lists of tensors: more than the kernels take.
    """
    kinds = [str(argument.type) for argument in operator._schema.arguments]
    lists = [kind == "List[Tensor]" for kind in kinds]
    tensors = [kind in ("Tensor", "Optional[Tensor]") for kind in kinds]
    below_autograd: Any = getattr(torch._C, "_AutoDispatchBelowAutograd", None)  # None: `is_eager` never says so

    def forward(ctx: Any, arguments: tuple[Any, ...], *_: Any) -> Any:
        with below_autograd():
            output = operator(*arguments)
        setup_context(ctx=ctx, inputs=arguments, output=output)
        ctx.lengths = [len(arguments[i]) if is_list else 0 for i, is_list in enumerate(lists)]
        return output

    def derivative(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        flat = ctx.needs_input_grad
        needs: list[Any] = []
        at = 1
        for is_list, is_tensor, length in zip(lists, tensors, ctx.lengths, strict=True):
            if is_list:
                needs.append(list(flat[at : at + length]))
                at += length
            else:
                needs.append(is_tensor and flat[at])
                at += is_tensor
        ctx.needs_input_grad = tuple(needs)
        try:
            found = backward(ctx, *grads)
        finally:
            ctx.needs_input_grad = flat
        if not isinstance(found, tuple):
            found = (found,)
        gradients: list[Any] = [None]
        for is_list, is_tensor, gradient in zip(lists, tensors, found, strict=True):
            if is_list:
                gradients += gradient
            elif is_tensor:
                gradients.append(gradient)
        return tuple(gradients)

    name = "Backward_" + operator._schema.name.replace("::", "_")
    methods = {"forward": staticmethod(forward), "backward": staticmethod(derivative)}
    function: Any = type(name, (torch.autograd.Function,), methods)
    # Function's own `apply` looks for functorch's transforms first, which `is_eager` has done.
    apply = super(torch.autograd.Function, function).apply

    def call(*arguments: Any) -> Any:
        if not is_eager():
            return operator(*arguments)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            flat: list[Any] = []
            for is_list, is_tensor, argument in zip(lists, tensors, arguments, strict=True):
                if is_list:
                    flat += argument
                elif is_tensor:
                    flat.append(argument)
            return apply(arguments, *flat)
        with below_autograd():
            return operator(*arguments)

    return call


def _without_tangents(name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
    """The operator, refusing tangents: it has no forward-mode derivative, and would drop them without a word."""

    def call(*arguments: Any) -> Any:
        output = operator(*arguments)
        # What is made of masks has no derivative.
        if getattr(forward_ad, "_current_level", -1) >= 0 and _is_float(output) and _has_tangent(arguments):
            raise NotImplementedError(
                f'{name}: tensors must be without tangents, got one with; within use_backend("reference") forward-mode '
                "derivatives are computed"
            )
        return output

    return call


def _is_float(output: Any) -> bool:
    if isinstance(output, list | tuple):
        return any(map(_is_float, output))
    return isinstance(output, Tensor) and output.is_floating_point()


def _has_tangent(argument: Any) -> bool:
    if isinstance(argument, list | tuple):
        return any(map(_has_tangent, argument))
    if not isinstance(argument, Tensor):
        return False
    if torch._C._are_functorch_transforms_active():
        # Only the innermost transform's tangent can be asked for, and not of all transforms.
        return torch._C._functorch.is_functorch_wrapped_tensor(argument)
    return forward_ad.unpack_dual(argument).tangent is not None


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
