# SPDX-License-Identifier: Apache-2.0
"""The `fused-inpaint` command: one thin file per verb, whose run function imports what it needs."""

from __future__ import annotations

import argparse
import os
import select
import sys

from .. import __version__
from . import bench, convert, demo, evaluate, info, inpaint, masks, train, upscale, web
from ._common import UserError


def parser() -> argparse.ArgumentParser:
    about = "Image inpainting on fused partial-convolution kernels."
    root = argparse.ArgumentParser(prog="fused-inpaint", description=about)
    root.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = root.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in (info, demo, inpaint, web, convert, masks, train, evaluate, upscale, bench):
        verb.add(verbs)
    return root


def _check_backend() -> None:
    from .. import _backends

    try:
        _backends.require_runnable()
    except (ValueError, _backends.NoBackendError) as error:
        raise UserError(f"FUSED_INPAINT_BACKEND: {error}") from None


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 something the user can put right (one sentence on stderr), 130 interrupted, 141 nobody
    reads the output any more."""
    arguments = parser().parse_args(argv)
    try:
        code = _run(arguments)
        print(end="", flush=True)
    except BrokenPipeError:
        if _is_read():
            raise
        return 141
    return code


def _run(arguments: argparse.Namespace) -> int:
    try:
        if arguments.verb != "info":  # which is asked what is wrong
            _check_backend()
        arguments.run(arguments)
    except UserError as error:
        print(f"fused-inpaint {arguments.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"\nfused-inpaint {arguments.verb}: interrupted, {str(interrupt) or 'nothing written'}", file=sys.stderr)
        return 130
    return 0


def _is_read() -> bool:
    """Whether the output has a reader; `| head` leaves once it has enough."""
    if sys.stdout is None:
        return True
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)  # for errors alone: the other end is closed
    if not output.poll(0):
        return True
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still writes at its end
    return False
