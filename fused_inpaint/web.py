# SPDX-License-Identifier: Apache-2.0
"""The page of `fused-inpaint web`: a photo, its hole painted by hand, a method, before and after. Needs gradio.

Only a preview of the photo goes to the browser's canvas, and only the painted hole is taken from there: what is filled
and handed back is the uploaded file itself, whose known pixels keep their bits at any size and depth.
"""

import contextlib
import html
import logging
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import images
from .completion import Method

CANVAS, SHOWN = 1024, 1600  # longest side in pixels: of what is painted on, and of what the slider shows
KEPT_SECONDS = 24 * 3600  # uploads and results, while the server runs
# What the page may load. The page needs no other address, and should a later gradio want one, the browser refuses.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'; form-action 'self'"

INTRO = """<h1>Fill a hole in a photo</h1>
<p>Paint over a scratch, a text or a small object; what is painted is replaced, every other pixel stays as it is.
Photos stay on the computer that runs this page.</p>"""
STYLE = """
.gradio-container { width: 100%; max-width: 1240px !important; margin: 0 auto !important; }
#intro h1 { font-size: 1.6rem; font-weight: 650; margin: .4rem 0 .2rem; }
#intro p { margin: 0; opacity: .75; }
#status div.said { border-left: 4px solid var(--primary-500); background: var(--background-fill-secondary);
  border-radius: 6px; padding: .7rem .9rem; overflow-wrap: anywhere; }
#status div.refused { border-color: #dc2626; }
#status div.said p { margin: 0; } #status div.said p + p { margin-top: .35rem; opacity: .75; }
"""


class Stopped(Exception):
    """Raised where the progress of work is told, to end it."""


class Runs:
    """The work of all sessions: one at a time, since each takes all cores; any can be stopped."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._stops: dict[str, threading.Event] = {}

    def begin(self, session: str) -> None:
        self._stops[session] = threading.Event()

    def stop(self, session: str) -> None:
        if session in self._stops:
            self._stops[session].set()

    def stop_all(self) -> None:
        for stop in list(self._stops.values()):
            stop.set()

    def run(self, session: str, work: Callable[[Callable[[float, str], None]], Any], progress: Any) -> Any:
        """What `work` returns. It is given a progress that raises Stopped once the session is stopped."""
        stop = self._stops.setdefault(session, threading.Event())

        def tell(fraction: float, text: str) -> None:
            if stop.is_set():
                raise Stopped
            progress(fraction, desc=text)

        try:
            while not self._turn.acquire(timeout=0.2):
                tell(0.0, "waiting for another picture")
            try:
                tell(0.0, "starting")
                return work(tell)
            finally:
                self._turn.release()
        finally:
            self._stops.pop(session, None)


def preview(photo: images.Photo, longest: int) -> np.ndarray:
    """(H, W, 3) uint8, shrunk to at most `longest` pixels a side; transparency is left out."""
    planes = photo.pixels.reshape(*photo.size, -1)[..., : photo.colours]
    eight_bit = (planes >> 8 if photo.white > 255 else planes).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(eight_bit.repeat(3 // photo.colours, 2)))
    image.thumbnail((longest, longest))
    return np.asarray(image)


def painted_hole(layers: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool of the photo's size: where any layer (h, w, 4), of whatever size, has some paint."""
    hole = np.zeros(size, bool)
    for layer in layers:
        paint = layer[..., 3] > 0
        rows, columns = (np.arange(full) * part // full for full, part in zip(size, paint.shape, strict=True))
        hole |= paint[rows][:, columns]
    return hole


def read_photo(path: str | None) -> images.Photo:
    if path is None:
        raise images.ImageError("There is no photo yet: drop one on field 1, or click there to choose it.")
    return _named(images.read_photo, path)


def complete(
    path: str | None,
    layers: Sequence[np.ndarray],
    mask: str | None,
    method: Method,
    progress: Callable[[float, str], None],
) -> tuple[images.Photo, images.Photo, list[str]]:
    """The photo of a file before and after, and what there is to say: how it was filled, then notes.

    The hole is what is painted in `layers` (h, w, 4) together with what is white in the file `mask`. ImageError says
    what is wrong with any of them in a sentence for the page.
    """
    photo = read_photo(path)
    hole, notes = painted_hole(layers, photo.size), []
    if mask is not None:
        in_file, note = _named(images.read_sharp_hole, mask, photo.size)
        hole, notes = hole | in_file, [note] * bool(note)
    if not hole.any():
        raise images.ImageError("There is no hole yet: paint over what is to be filled, or give a mask that has white.")
    if hole.all():
        raise images.ImageError("The hole must leave some of the photo to fill it from, but it covers all.")
    known = images.known_outside(hole)
    filled, how, more = method(photo.tensor(), known, progress)
    return photo, photo.filled(filled, known), [how, *notes, *more]


def _named(read: Callable[..., Any], path: str, *arguments: Any) -> Any:
    """An error names the file as the user does, not where it was put here."""
    try:
        return read(path, *arguments)
    except images.ImageError as error:
        raise images.ImageError(str(error).replace(path, Path(path).name)) from None


def stored(photo: images.Photo, name: str) -> str:
    """The path of a file of its own. Gradio writes equal pictures to one file, while somebody may be reading it."""
    path = os.path.join(tempfile.mkdtemp(dir=os.environ["GRADIO_TEMP_DIR"]), name)
    images.write_photo(photo, path)
    return path


def said(*sentences: str, refused: bool = False) -> str:
    paragraphs = "".join(f"<p>{html.escape(sentence[:1].upper() + sentence[1:])}</p>" for sentence in sentences)
    return f'<div class="said{" refused" * refused}">{paragraphs}</div>' if sentences else ""


def page(methods: Mapping[str, Method], runs: Runs, largest: int) -> Any:
    """The gr.Blocks. methods: by the names of the choice, the last of which is chosen at first. largest: bytes."""
    import gradio as gr

    def show(path: str | None) -> list[Any]:
        nothing = [None, gr.update(value=None, interactive=False)]
        if path is None:
            return [gr.update(visible=False), None, said(), *nothing]
        try:
            picture = stored(images.Photo(preview(read_photo(path), CANVAS)), "photo.png")
        except images.ImageError as error:
            return [gr.update(visible=False), None, said(str(error), refused=True), *nothing]
        return [gr.update(visible=True), {"background": picture, "layers": [], "composite": picture}, said(), *nothing]

    def begin(request: gr.Request) -> list[Any]:
        runs.begin(str(request.session_hash))
        return [*busy(True), said("Filling ..."), gr.update(interactive=False)]

    def fill(
        path: str | None,
        painted: dict[str, Any] | None,
        mask: str | None,
        name: str,
        request: gr.Request,
        progress: Any = gr.Progress(),  # noqa: B008  gradio finds it by this default
    ) -> list[Any]:
        layers = painted["layers"] if painted else []
        nothing = [None, gr.update(value=None, interactive=False)]
        try:
            before, after, sentences = runs.run(
                str(request.session_hash), lambda tell: complete(path, layers, mask, methods[name], tell), progress
            )
        except Stopped:
            return [said("Stopped."), *nothing]
        except images.ImageError as error:
            return [said(str(error), refused=True), *nothing]
        result = stored(after, f"{Path(path or '').stem}-filled.png")
        pair = tuple(stored(images.Photo(preview(shown, SHOWN)), "shown.png") for shown in (before, after))
        return [said(*sentences), pair, gr.update(value=result, interactive=True)]

    def busy(now: bool) -> list[Any]:
        return [gr.update(interactive=not now), gr.update(interactive=now)]

    def stop(request: gr.Request) -> None:
        runs.stop(str(request.session_hash))

    with gr.Blocks(title="fused_inpaint", analytics_enabled=False, delete_cache=(3600, KEPT_SECONDS)) as blocks:
        gr.HTML(INTRO, elem_id="intro")
        with gr.Row():
            with gr.Column():
                photo = gr.File(label=f"1. A photo, of at most {largest / 2**20:g} MB", elem_id="photo", height=130)
                with gr.Column(visible=False) as steps:
                    editor = gr.ImageEditor(
                        label="2. Paint over what is to be filled",
                        elem_id="editor",
                        sources=(),
                        transforms=(),
                        layers=False,
                        brush=gr.Brush(default_size=15, colors=["#ff2d6f"], color_mode="fixed"),
                        format="png",
                        height=480,
                        buttons=["fullscreen"],
                    )
                    with gr.Accordion("... or give the hole as a mask file, or add one", open=False, elem_id="masks"):
                        mask = gr.File(label="White where to fill, of the photo's size", elem_id="mask", height=110)
                    choices = list(methods)
                    choice = gr.Radio(choices, value=choices[-1], label="3. What fills it", elem_id="method")
                    with gr.Row():
                        fill_button = gr.Button("Fill", variant="primary", elem_id="fill")
                        stop_button = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop")
            with gr.Column():
                slider = gr.ImageSlider(
                    label="Before | after", elem_id="result", format="png", max_height=620, buttons=["fullscreen"]
                )
                status = gr.HTML(elem_id="status")
                download = gr.DownloadButton("Download the PNG", interactive=False, elem_id="download")
        hidden: Any = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        photo.change(show, photo, [steps, editor, status, slider, download], **hidden)
        fill_button.click(begin, None, [fill_button, stop_button, status, download], **hidden).then(
            fill,
            [photo, editor, mask, choice],
            [status, slider, download],
            concurrency_limit=None,
            show_progress_on=slider,
            api_visibility="private",
        ).then(lambda: busy(False), None, [fill_button, stop_button], **hidden)
        stop_button.click(stop, **hidden)
        blocks.unload(stop)
    return blocks


def serve(blocks: Any, runs: Runs, listener: socket.socket, largest: int, ready: Callable[[], None]) -> None:
    """Until SIGINT or SIGTERM, which is raised again when the server has ended."""
    import fastapi
    import gradio as gr
    import uvicorn
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect

    app: Any = gr.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        blocks,
        "",
        theme=gr.themes.Default(primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=STYLE,
        footer_links=[],
        run_history=False,
        max_file_size=largest,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
    )
    host = listener.getsockname()[0]
    if host in ("127.0.0.1", "::1"):
        # A name of elsewhere that resolves to this machine would let that site's scripts in.
        app = TrustedHostMiddleware(app, ["127.0.0.1", "localhost", "[::1]"])

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        with contextlib.suppress(ClientDisconnect):  # an upload that the browser broke off: nobody waits for an answer
            await app(scope, receive, send_with_policy)

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            runs.stop_all()
            # Open pages keep connections that do not end by themselves; uvicorn would print where it cut them.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            super().handle_exit(sig, frame)

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            ready()

    Server(uvicorn.Config(guarded, log_level="warning", timeout_graceful_shutdown=1)).run([listener])
