"""Serves a page on which one draws a digit and watches the prediction change by time step.

Example:
  python -m tools.draw --workdir=runs/notebook

Only this machine can reach the page. Ctrl-C ends the tool. It needs the extra `draw`:
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
    """Classifies a drawing, uint8 [H, W]; raises UserError if it is blank.

    Returns {"image": the prepared image as 784 bytes, "beliefs": [T, C], "class": the prediction}.
    """
    image = images.prepare(drawing, "the drawing")
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

    model = network.config.model
    about = {
        "network": card.describe(model),
        "time_steps": network.sequence_shape[0],
        "read_at": [None if np.isnan(t) else int(t) for t in views.read_at(model).ravel()],
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
    from seqmnist.study import trained

    try:
        listener = socket.create_server((HOST, arguments.port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(
            f"--port={arguments.port} cannot be used ({reason}); choose one from 1024 to 65535"
        ) from None
    network = trained.load(arguments.workdir, arguments.member)
    network.beliefs(np.zeros((1, 28, 28), np.uint8))  # compiles, before anyone waits
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
