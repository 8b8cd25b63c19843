# SPDX-License-Identifier: Apache-2.0
"""`fused-inpaint convert`: a published checkpoint to a file of ours, which says itself what network it holds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ._common import MODELS, UserError


def add(verbs: Any) -> None:
    verb = verbs.add_parser(
        "convert",
        help="turn a published checkpoint into a safetensors file of ours",
        description="Read a published checkpoint (nothing in it is run) and write it as safetensors under our own "
        "names, with what built the network. inpaint, train and evaluate take both.",
    )
    verb.add_argument("input", metavar="IN", help="a .pth, .safetensors or .npz file")
    verb.add_argument("--from", dest="source", metavar="NAME", help="whose file it is (guessed from its keys)")
    verb.add_argument("--model", choices=MODELS, help="the network (that of the source)")
    verb.add_argument("--part", choices=("generator", "discriminator"), default="generator")
    verb.add_argument("-o", "--output", required=True, metavar="OUT.safetensors")
    verb.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from .. import models

    target = Path(arguments.output)
    if target.suffix != ".safetensors":
        raise UserError(f"output must end in .safetensors, got {target.name}")
    if not target.resolve().parent.is_dir():
        raise UserError(f"output must be in an existing folder, got {target}")
    if target.resolve() == Path(arguments.input).resolve():
        raise UserError(f"output must be another file than the input, got {target}")
    try:
        key = arguments.model or models.key_of(arguments.input, arguments.source, arguments.part)
        if key is None:
            raise UserError("input must be of a known source, got none that its keys tell: --model and --from say it")
        model = models.load_published(key, arguments.input, arguments.source, arguments.part)
        model.save_pretrained(target)
    except ValueError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"output must be writable, got {target} ({error.strerror})") from None
    count = sum(p.numel() for p in model.parameters())
    print(f"{target}: {key} {arguments.part}, {count / 1e6:.2f} M parameters")
