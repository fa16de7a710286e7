"""Embeddings over HTTP: `python examples/http_server.py [PORT]`, then POST {"texts": [...]} to it.

Each request has a thread of its own; requests that wait share the next sweep over the weights.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pipeload


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        try:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, answer = 200, {"embeddings": model.embed(body["texts"]).tolist()}
        except (ValueError, KeyError, TypeError, pipeload.ConfigError) as error:
            status, answer = 400, {"error": str(error)}
        except pipeload.PipeloadError as error:
            status, answer = 500, {"error": str(error)}
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *arguments: object) -> None:
        pass


with pipeload.load("models/exported/minilm", memory_budget="200MB") as model:
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 0), Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()
