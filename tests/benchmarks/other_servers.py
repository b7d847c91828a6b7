"""Servers that the service is compared with; started by the benchmarks, one kind a process.

    python tests/benchmarks/other_servers.py raw|echo|plain|litserve GRAPH SIZE_PX

raw: ASGI that answers 640 bytes. echo: FastAPI that does. plain: FastAPI around a session, without
batches. litserve: LitServe around it, with batches. The last two take a multipart file `images`.
"""

import io
import socket
import sys
from typing import Any

import litserve
import numpy as np
import uvicorn
from fastapi import FastAPI, Request, UploadFile
from starlette.responses import Response

from tests.benchmarks.served_models import session
from trainer.representation.preprocess import InputContract, prepare

ANSWER = bytes(640)  # 128 float32 values and a header


async def raw(scope: Any, receive: Any, send: Any) -> None:
    """The least that an ASGI application can do with a body."""
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    headers = [(b"content-length", b"640"), (b"content-type", b"application/x-npy")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": ANSWER})


def echo() -> FastAPI:
    """FastAPI with the request read and a response of bytes, and nothing else."""
    app = FastAPI()

    @app.post("/embed")
    async def answer(request: Request) -> Response:
        await request.body()
        return Response(ANSWER, media_type="application/x-npy")

    return app


def plain(graph: str, size_px: int) -> FastAPI:
    """What one writes first: each request decodes and runs the network by itself in a thread."""
    app, encoder, contract = FastAPI(), session(graph), InputContract(size_px=size_px)

    @app.post("/embed")
    def answer(images: UploadFile) -> Response:
        pixels = prepare(images.file.read(), contract)
        row = encoder.run(["embedding"], {"images": pixels[None]})[0]
        buffer = io.BytesIO()
        np.save(buffer, row)
        return Response(buffer.getvalue(), media_type="application/x-npy")

    return app


class Encoder(litserve.LitAPI):
    """At the top of the module: LitServe's worker is a spawned process, which loads it by name."""

    def __init__(self, graph: str, size_px: int, **options: Any) -> None:
        super().__init__(**options)
        self.graph, self.size_px = graph, size_px

    def setup(self, device: str) -> None:
        del device
        self.encoder, self.contract = session(self.graph), InputContract(size_px=self.size_px)

    def decode_request(self, request: Request) -> Any:
        return prepare(request["images"].file.read(), self.contract)

    def batch(self, inputs: Any) -> Any:
        return np.stack(inputs)

    def predict(self, x: Any) -> Any:
        return self.encoder.run(["embedding"], {"images": x})[0]

    def unbatch(self, output: Any) -> Any:
        return list(output)

    def encode_response(self, output: Any) -> Any:
        buffer = io.BytesIO()
        np.save(buffer, output)
        return Response(buffer.getvalue(), media_type="application/x-npy")


def serve_litserve(graph: str, size_px: int, port: int) -> None:
    """One worker, batches of up to 32."""
    api = Encoder(graph, size_px, max_batch_size=32, batch_timeout=0.002, api_path="/embed")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    sys.stdout.write(f"port {port}\n")
    sys.stdout.flush()
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="error")


def main() -> None:
    kind, graph, size_px = sys.argv[1], sys.argv[2], int(sys.argv[3])
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    port = listener.getsockname()[1]
    if kind == "litserve":
        listener.close()
        serve_litserve(graph, size_px, port)
        return
    app: Any = {"raw": lambda: raw, "echo": echo, "plain": lambda: plain(graph, size_px)}[kind]()
    sys.stdout.write(f"port {port}\n")
    sys.stdout.flush()
    config = uvicorn.Config(app, access_log=False, server_header=False, log_level="error")
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
