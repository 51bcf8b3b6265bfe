"""A stand-in for the hub on 127.0.0.1: serves bytes from memory, whole or from a position on, and remembers what was asked."""
import hashlib
import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

for _name in ("NO_PROXY", "no_proxy"):  # a proxy of this machine must not be asked for what is on it; children inherit this
    os.environ[_name] = ",".join(filter(None, [os.environ.get(_name), "127.0.0.1"]))


class Hub:
    "`with Hub({'/owner/name/resolve/main/file': bytes}) as hub`: an HTTP server at `hub.url` in a thread."

    def __init__(self, files, *, announce=None, pause=0.):
        self.files = files
        self.announce = announce or {}  # {path: SHA-256 to claim}, where it is not the true one
        self.pause = pause  # seconds between pieces of 16 kB
        self.log, self.sent = [], 0  # (method, path, first byte asked for, authorization); bytes of bodies

    def __enter__(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                self.answer(body=True)

            def answer(self, body):
                asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
                start = int(asked[1]) if asked else 0
                hub.log.append((self.command, self.path, start, self.headers.get("Authorization")))
                data = hub.files.get(self.path)
                if data is None:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound")
                    self.end_headers()
                    return
                self.send_response(206 if asked else 200)
                if asked:
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                self.send_header("Content-Length", str(len(data) - start))
                self.send_header("X-Repo-Commit", "0" * 40)
                digest = hub.announce.get(self.path) or hashlib.sha256(data).hexdigest()
                self.send_header("X-Linked-ETag", f'"{digest}"')
                self.send_header("X-Linked-Size", str(len(data)))
                self.end_headers()
                for at in range(start, len(data) if body else 0, 2**14):
                    self.wfile.write(data[at:at + 2**14])
                    hub.sent += len(data[at:at + 2**14])
                    time.sleep(hub.pause)

            def log_message(self, *words):
                pass

            def handle(self):
                try:
                    super().handle()
                except ConnectionError:  # the client was killed
                    pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()
