# SPDX-License-Identifier: Apache-2.0
"""`fused-inpaint web`: a page in the browser, on this machine, on which a hole is painted and filled."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib.util
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ._common import MODELS, UserError, positive_float

if TYPE_CHECKING:
    from ..completion import Method


def add(verbs: Any) -> None:
    verb = verbs.add_parser(
        "web",
        help="a page in the browser: paint the hole of a photo, see before and after",
        description="Serve a page on which one loads a photo, paints its hole and has it filled, by internal learning "
        "or by the networks of --weights. Photos stay on this machine, and nothing is left of them when the server "
        "ends (Ctrl-C). Needs gradio: pip install 'fused-inpaint[web]'.",
    )
    verb.add_argument("--host", default="127.0.0.1", help="address to listen on; others open it to them (%(default)s)")
    verb.add_argument("--port", type=_port, default=7860, help="0 takes any that is free (%(default)s)")
    verb.add_argument("--open", action="store_true", help="open the page in the browser")
    verb.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="[KEY=]FILE",
        help=f"a checkpoint, ours or a published one, to choose on the page; may be given again. KEY is the network in "
        f"it (what the file says, else pconv): {', '.join(MODELS)}",
    )
    verb.add_argument("--seconds", type=positive_float, default=60.0, help="time of internal learning (%(default)s)")
    verb.add_argument(
        "--max-size",
        type=positive_float,
        default=100.0,
        metavar="MB",
        help="of an upload, 2^20 bytes each (%(default)g)",
    )
    verb.set_defaults(run=run)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 65535, got {text}")
    return int(text)


def run(arguments: argparse.Namespace) -> None:
    if importlib.util.find_spec("gradio") is None:
        raise UserError("gradio must be installed, it makes the page: pip install 'fused-inpaint[web]'")
    with _listener(arguments.host, arguments.port) as listener, _own_folder(), _ended_by_signals():
        methods = _methods(arguments)
        from .. import web

        runs, largest = web.Runs(), round(arguments.max_size * 2**20)
        host, port = listener.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"

        def ready() -> None:
            print(f"{address} (Ctrl-C ends it)", flush=True)
            if arguments.open:
                import webbrowser

                webbrowser.open(address)

        web.serve(web.page(methods, runs, largest), runs, listener, largest, ready)


def _methods(arguments: argparse.Namespace) -> dict[str, Method]:
    """By the names that the page shows."""
    from .. import completion

    seconds = arguments.seconds
    methods: dict[str, Method] = {
        f"Internal learning: from this photo alone, at most {seconds:g} s": completion.InternalLearning(seconds)
    }
    for given in arguments.weights:
        key, _, file = given.partition("=")
        if key not in MODELS:
            key, file = "", given
        try:
            # A photo may be of any size, and a hole larger than a tile: each hole with its surroundings.
            network = completion.Network(file, key or None, "crop")
        except ValueError as error:
            raise UserError(str(error)) from None
        methods[f"{network.key}: {file}"] = network
    return methods


def _listener(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port must be free, got {port}, which is in use; --port 0 takes any that is free"
            ) from None
        if error.errno == errno.EACCES:
            raise UserError(
                f"port must be one that you may use, got {port}; from 1024 on they are free to all"
            ) from None
        raise UserError(f"host must be an address of this machine, got {host} ({error.strerror})") from None


@contextlib.contextmanager
def _own_folder() -> Iterator[None]:
    """All temporary files go into a folder that is gone afterwards; and gradio and what it brings keep to themselves.

    gradio reads these when it is imported.
    """
    with tempfile.TemporaryDirectory(prefix="fused-inpaint-web-") as folder:
        # gradio imports matplotlib where it is installed, which would put folders into the home.
        os.environ["MPLCONFIGDIR"] = folder
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
        former, tempfile.tempdir = tempfile.tempdir, folder
        try:
            yield
        finally:
            tempfile.tempdir = former


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM ends it as Ctrl-C does, with nothing left behind; and neither is an error of a server."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        print("\nended", file=sys.stderr)
    finally:
        signal.signal(signal.SIGTERM, former)
