"""A web server for the tests, on this machine, which can be as bad as servers are."""

import re
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class LocalServer:
    """Answers at `url` by handlers of a class, to which it is known as `world`, until it is closed."""

    def __init__(self, handler):
        self.stopped = threading.Event()
        self.lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), {"world": self}))
        self._http.daemon_threads = True
        self._http.handle_error = lambda *_: None  # a client that hung up
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.stopped.set()
        self._http.shutdown()
        self._http.server_close()


class Server(LocalServer):
    """Serves `files` (path -> bytes); `faults` are taken one for each request, `always` is that of all others."""

    def __init__(self):
        self.files, self.faults, self.always = {}, deque(), None
        self.asked = []  # (path with query, Range or None)
        self.headers = []
        self.connections = 0
        self.then = {}  # path -> what to do when it is asked for next, after its content was taken
        super().__init__(_Handler)

    def ranges(self, path):
        return [asked for name, asked in self.asked if name.partition("?")[0] == path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    world: Server

    def setup(self):
        super().setup()
        self.world.connections += 1

    def log_message(self, *_):
        pass

    def do_GET(self):
        world, path = self.world, self.path.partition("?")[0]
        with world.lock:
            world.asked.append((self.path, self.headers.get("Range")))
            world.headers.append(dict(self.headers))
            fault = world.faults.popleft() if world.faults else world.always
            data = world.files.get(path)
        if fault in ("stall", "hang up"):
            if fault == "stall":
                world.stopped.wait(30)
            self.close_connection = True
            return
        if isinstance(fault, int) or data is None:
            self.answer(fault or 404, b"<html>no</html>", {"Retry-After": "0"} if fault == 429 else {})
            return
        if isinstance(fault, str) and fault.startswith("to "):
            self.answer(302, b"", {"Location": fault[3:]})
            return
        if path in world.then:
            world.then.pop(path)()
        self.file(data, fault)

    def answer(self, status, data, headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        return data

    def file(self, data, fault):
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        mark = {"ETag": f'"{hash(data)}"'} if fault != "no mark" else {}
        start, end = (int(asked[1]), int(asked[2] or len(data) - 1) + 1) if asked else (0, len(data))
        end = min(end, len(data))
        if fault in ("whole", "no length", "whole, cut"):
            status, body, headers = 200, data, {"Content-Length": str(len(data))}
        elif start >= len(data):
            status, body, headers = 416, b"", {"Content-Range": f"bytes */{len(data)}"}
        else:
            status, body = 206, data[start:end]
            shift = 1 if fault == "other bytes" else 0
            headers = {
                "Content-Range": f"bytes {start + shift}-{end - 1}/{len(data)}",
                "Content-Length": str(len(body)),
            }
        if fault == "no length":
            headers, self.close_connection = {"Content-Length": None, "Connection": "close"}, True
        if fault == "compressed":
            headers["Content-Encoding"] = "gzip"
        self.answer(status, b"", {**headers, **mark})
        if fault == "wrong byte":
            body = body[:-1] + bytes([body[-1] ^ 1])
        half = len(body) // 2
        if fault in ("cut", "whole, cut"):
            self.wfile.write(body[:half])
            self.close_connection = True
        elif fault == "stall midway":
            self.wfile.write(body[:half])
            self.world.stopped.wait(30)
        elif fault == "drip":  # for ever, nearly
            for place in range(len(body)):
                self.wfile.write(body[place : place + 1])
                self.wfile.flush()
                if self.world.stopped.wait(0.05):
                    return
        elif fault == "slow":
            block = max(20_000, len(body) // 50)
            for place in range(0, len(body), block):
                self.wfile.write(body[place : place + block])
                time.sleep(0.01)
        else:
            self.wfile.write(body)
