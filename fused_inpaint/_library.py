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
    flops: Callable[[dict[str, Any], Any], int] | None = None,
) -> None:
    """Define one operator: its schema, the shapes of its outputs, its derivative if it has one, and the operations of a
    call by its named arguments and its output, if torch's counter is to count them."""
    name = schema.split("(")[0]
    full = "fused_inpaint::" + name
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(full, fake, lib=library)
    operator = getattr(_registered, name).default
    derivative = None
    if backward is not None:
        assert setup_context is not None
        torch.library.register_autograd(full, backward, setup_context=setup_context, lib=library)
        derivative = _shortcut(operator, backward, setup_context)
    setattr(ops, name, _outside_of_transforms(name, operator, derivative))
    if flops is not None:
        _flop_formulas[getattr(_registered, name)] = _formula(operator, flops)


# What torch itself enters an operator's derivative with; without them, the registered way is the only one. Looked up
# once: a call of a small layer takes no longer than a few dozen of such steps.
_below_autograd: Any = getattr(torch._C, "_AutoDispatchBelowAutograd", None)
_any_requires_grad: Any = getattr(torch._C, "_any_requires_grad", None)
_transforms_active: Any = getattr(torch._C, "_are_functorch_transforms_active", None)
_is_tracing: Any = getattr(torch._C, "_is_tracing", None)
_modes: Any = getattr(torch._C, "_len_torch_dispatch_stack", None)
_mode_stack: Any = getattr(torch.utils._python_dispatch, "_get_current_dispatch_mode_stack", None)
_HAS_SHORTCUT = None not in (_below_autograd, _any_requires_grad, _transforms_active, _is_tracing, _modes)


def is_eager() -> bool:
    """Whether a call is what it seems: nothing compiles, traces, transforms or fakes it."""
    return _HAS_SHORTCUT and not (torch.compiler.is_compiling() or _modes() or _transforms_active() or _is_tracing())


# The types of arguments that autograd sees.
_OF_TENSORS = ("Tensor", "Optional[Tensor]", "List[Tensor]")


def _shortcut(
    operator: Any, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> Callable[[tuple[Any, ...]], Any]:
    """The operator with the same derivative, entered without the dispatcher, for eager calls (`is_eager`).

    `register_autograd` walks through the arguments' structure in Python several times a call, hundreds of microseconds
    where there are lists of tensors: more than the kernels take.
    """
    kinds = [str(argument.type) for argument in operator._schema.arguments]
    # Where tensors are, and whether as a list.
    slots = [(i, kind == "List[Tensor]") for i, kind in enumerate(kinds) if kind in _OF_TENSORS]

    def forward(ctx: Any, arguments: tuple[Any, ...], *_: Any) -> Any:
        with _below_autograd():
            output = operator(*arguments)
        setup_context(ctx=ctx, inputs=arguments, output=output)
        ctx.lengths = [len(arguments[i]) for i, is_list in slots if is_list]
        return output

    def derivative(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        flat = ctx.needs_input_grad
        needs: list[Any] = [False] * len(kinds)
        lengths, at = iter(ctx.lengths), 1
        for i, is_list in slots:
            if is_list:
                end = at + next(lengths)
                needs[i] = list(flat[at:end])
                at = end
            else:
                needs[i] = flat[at]
                at += 1
        ctx.needs_input_grad = needs
        try:
            found = backward(ctx, *grads)
        finally:
            ctx.needs_input_grad = flat
        if not isinstance(found, tuple):
            found = (found,)
        assert len(found) == len(kinds)
        gradients: list[Any] = [None]
        for i, is_list in slots:
            if is_list:
                gradients += found[i]
            else:
                gradients.append(found[i])
        return tuple(gradients)

    name = "Backward_" + operator._schema.name.replace("::", "_")
    methods = {"forward": staticmethod(forward), "backward": staticmethod(derivative)}
    function: Any = type(name, (torch.autograd.Function,), methods)
    # Function's own `apply` looks for functorch's transforms first, which `is_eager` has done.
    apply = super(torch.autograd.Function, function).apply

    def enter(arguments: tuple[Any, ...]) -> Any:
        flat: list[Any] = []
        for i, is_list in slots:
            if is_list:
                flat += arguments[i]
            else:
                flat.append(arguments[i])
        return apply(arguments, *flat)

    return enter


_flop_formulas: dict[Any, Callable[..., int]] = {}


def _formula(operator: Any, flops: Callable[[dict[str, Any], Any], int]) -> Callable[..., int]:
    names = [argument.name for argument in operator._schema.arguments]

    def formula(*arguments: Any, out_val: Any = None, **named: Any) -> int:
        return flops({**dict(zip(names, arguments, strict=False)), **named}, out_val)

    return formula


def _tell_counters() -> None:
    """Let the `FlopCounterMode`s that are active count the operators. A counter takes its formulas when it is made, and
    registering them in its module beforehand would import Triton."""
    for mode in _mode_stack() if _mode_stack is not None else ():
        registry = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if registry is not None:
            registry.update({packet: f for packet, f in _flop_formulas.items() if packet not in registry})


def tangents_exist() -> bool:
    """Whether a tensor may have one: within `forward_ad.dual_level`."""
    return bool(getattr(forward_ad, "_current_level", -1) >= 0)


def _outside_of_transforms(
    name: str, operator: Callable[..., Any], derivative: Callable[[tuple[Any, ...]], Any] | None
) -> Callable[..., Any]:
    """The operator, by its shorter way where that is open, refusing what it has no rule for: tangents, which it would
    drop without a word, and torch.func."""

    def call(*arguments: Any) -> Any:
        if is_eager():
            if derivative is None:
                output = operator(*arguments)
            elif torch.is_grad_enabled() and _any_requires_grad(*arguments):
                output = derivative(arguments)
            else:
                with _below_autograd():
                    output = operator(*arguments)
        else:
            within = not torch.compiler.is_compiling() and _transforms_active is not None and _transforms_active()
            if within and _any(_is_transformed, arguments):
                raise NotImplementedError(
                    f"{name}: tensors must be outside of torch.func's transforms, got one within; "
                    'use_backend("reference") has them'
                )
            if not torch.compiler.is_compiling():
                _tell_counters()
            output = operator(*arguments)
        # What is made of masks has no derivative.
        dual = tangents_exist() and _any(Tensor.is_floating_point, output)
        if dual and _any(lambda t: forward_ad.unpack_dual(t).tangent is not None, arguments):
            raise NotImplementedError(
                f'{name}: tensors must be without tangents, got one with; use_backend("reference") has forward-mode '
                "derivatives"
            )
        return output

    return call


def _any(holds: Callable[[Tensor], bool], given: Any) -> bool:
    """Whether it holds for a tensor among what is given."""
    if isinstance(given, list | tuple):
        return any(_any(holds, one) for one in given)
    return isinstance(given, Tensor) and holds(given)


def _is_transformed(t: Tensor) -> bool:
    functorch = torch._C._functorch
    return functorch.is_gradtrackingtensor(t) or functorch.is_batchedtensor(t)


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
