"""Opens a page on which one draws a digit, and watches the belief change row by row.

Example:
  python -m tools.draw --workdir=runs/notebook

It is served to this machine only, until Ctrl-C. Needs the extra `draw`:
  pip install -e '.[draw]'
"""

import contextlib
import pathlib

import numpy as np

from seqmnist.errors import UserError
from seqmnist.study import images
from tools import cli

PAGE = pathlib.Path(__file__).with_suffix(".html")
HOST = "127.0.0.1"
_MOST_BYTES = 1 << 20  # of a drawing


def answer(network, drawing: np.ndarray) -> dict:
    """Reads a drawing, uint8 [H, W].

    Returns:
      {"image": what the network sees, 784 bytes, "beliefs": [T, C], "class": its answer}.

    Raises:
      UserError: there is nothing on it.
    """
    image = images.prepare(drawing, "the drawing")
    beliefs = network.beliefs(image[None])[:, 0]
    return {
        "image": image.ravel().tolist(),
        "beliefs": np.round(beliefs.astype(float), 4).tolist(),
        "class": int(beliefs[-1].argmax()),
    }


def make_app(network):
    """Returns the page and what it asks, as a Starlette application.

    Args:
      network: a `trained.Trained`.
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import FileResponse, JSONResponse
    from starlette.routing import Route

    from seqmnist.networks import views
    from tools import report

    model = network.config.model
    when = views.read_at(model).ravel()
    about = {
        "network": report.describe(model),
        "time_steps": network.sequence_shape[0],
        "read_at": [None if np.isnan(t) else int(t) for t in when],
    }

    async def page(request):
        return FileResponse(PAGE)

    async def say_about(request):
        return JSONResponse(about)

    async def beliefs(request):
        try:
            height, width = (int(request.query_params[name]) for name in ("height", "width"))
            if not (height > 0 and width > 0):
                raise ValueError("no pixels")
            body = b""
            async for part in request.stream():
                body += part
                if len(body) > _MOST_BYTES:
                    raise ValueError("too large")
            drawing = np.frombuffer(body, np.uint8).reshape(height, width)
        except (KeyError, ValueError):
            return JSONResponse({"error": "expected height × width bytes"}, 400)
        try:
            return JSONResponse(await run_in_threadpool(answer, network, drawing))
        except UserError as error:
            return JSONResponse({"error": str(error)}, 422)

    return Starlette(
        routes=[
            Route("/", page),
            Route("/about", say_about),
            Route("/beliefs", beliefs, methods=["POST"]),
        ],
        # A page elsewhere whose name is made to point here is refused.
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])],
    )


def _main(arguments):
    try:
        import uvicorn
    except ModuleNotFoundError:
        raise UserError("this tool needs the extra draw; pip install -e '.[draw]'") from None
    from seqmnist.study import trained

    network = trained.load(arguments.workdir, arguments.member)
    network.beliefs(np.zeros((1, 28, 28), np.uint8))  # compiles, before anyone waits
    server = uvicorn.Server(
        uvicorn.Config(make_app(network), host=HOST, port=arguments.port, log_level="warning")
    )
    try:
        socket = server.config.bind_socket()
    except SystemExit:
        raise UserError(f"--port={arguments.port} is in use; choose another") from None
    address = f"http://{HOST}:{socket.getsockname()[1]}"
    print(f"Draw at {address} (Ctrl-C ends)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.run([socket])
    return {"address": address}


def _make_parser():
    parser = cli.make_parser(__doc__)
    cli.add_workdir_argument(parser)
    parser.add_argument("--port", type=int, default=8000, help="(default: 8000; 0: any)")
    return parser


if __name__ == "__main__":
    cli.run(_make_parser(), _main)
