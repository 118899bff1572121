"""Serves a page on which one draws and watches the prediction change by time step.

Example:
  python -m tools.draw --workdir=runs/notebook

For a network of MNIST's digits, the drawing is prepared as MNIST was. Any other network sees the
whole page as an image of its size, with light and gray strokes on a dark ground. Only this machine
can reach the page. Ctrl-C ends the tool. It needs the extra `draw`:
  pip install -e '.[draw]'
"""

import asyncio
import contextlib
import pathlib
import socket

import numpy as np

from seqmnist.errors import UserError, one_line
from seqmnist.study import images
from tools import cli

PAGE = pathlib.Path(__file__).with_suffix(".html")
HOST = "127.0.0.1"
_MAX_BYTES = 1 << 20  # of a drawing


def classify(network, drawing: np.ndarray) -> dict:
    """Classifies a drawing with dark strokes, uint8 [H, W]; raises UserError if no digit is drawn.

    Returns {"image": the bytes of the prepared image, "beliefs": [T, C], "class": the prediction}.
    """
    # Datasets of drawings have light strokes on a dark ground; a digit's ground is found.
    light = drawing if images.is_of_digits(network.spec) else 255 - drawing
    image = images.prepare(light, "the drawing", network.spec)
    beliefs = network.beliefs(image[None])[:, 0]
    return {
        "image": image.ravel().tolist(),
        "beliefs": np.round(beliefs.astype(float), 4).tolist(),
        "class": int(beliefs[-1].argmax()),
    }


def make_app(network):
    """Returns a Starlette application that serves the page and classifies with a `Trained`."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import FileResponse, JSONResponse
    from starlette.routing import Route

    from seqmnist.networks import views
    from seqmnist.study import card

    model, spec = network.config.model, network.spec
    read_at = views.read_at(model, spec).ravel()
    about = {
        "network": card.describe(model),
        "time_steps": network.sequence_shape[0],
        "read_at": [None if np.isnan(t) else int(t) for t in read_at],
        "is_of_digits": images.is_of_digits(spec),
        **spec.to_dict(),
    }

    async def beliefs(request):
        try:
            height, width = (int(request.query_params[name]) for name in ("height", "width"))
            if not (height > 0 and width > 0):
                raise ValueError("no pixels")
            body = b""
            async for part in request.stream():
                body += part
                if len(body) > _MAX_BYTES:
                    raise ValueError("too large")
            drawing = np.frombuffer(body, np.uint8).reshape(height, width)
        except (KeyError, ValueError, asyncio.CancelledError):  # cancelled: the server stops
            return JSONResponse({"error": "expected height × width bytes"}, 400)
        try:
            return JSONResponse(await run_in_threadpool(classify, network, drawing))
        except UserError as error:
            return JSONResponse({"error": str(error)}, 422)

    return Starlette(
        routes=[
            Route("/", lambda request: FileResponse(PAGE)),
            Route("/about", lambda request: JSONResponse(about)),
            Route("/beliefs", beliefs, methods=["POST"]),
        ],
        # Refuses pages elsewhere whose host name resolves to this machine.
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])],
    )


def _main(arguments):
    try:
        import uvicorn
    except ModuleNotFoundError:
        raise UserError("this tool needs the extra draw; pip install -e '.[draw]'") from None
    try:
        listener = socket.create_server((HOST, arguments.port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(
            f"--port={arguments.port} cannot be used ({reason}); choose one from 1024 to 65535"
        ) from None
    network = cli.load(arguments)
    network.beliefs(np.zeros((1, *network.spec.shape), np.uint8))  # compiles, before anyone waits
    options = {"log_level": "warning", "timeout_graceful_shutdown": 1}
    server = uvicorn.Server(uvicorn.Config(make_app(network), **options))
    address = f"http://{HOST}:{listener.getsockname()[1]}"
    print(f"Draw at {address} (Ctrl-C ends)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    return {"address": address}


def _make_parser():
    parser = cli.make_parser(__doc__)
    cli.add_workdir_argument(parser)
    parser.add_argument("--port", type=int, default=8000, help="(default: 8000; 0: any)")
    return parser


if __name__ == "__main__":
    cli.run(_make_parser(), _main)
