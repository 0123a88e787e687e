"""An endpoint for the tests that speaks OpenAI's protocol, on this machine, and can be as bad as endpoints are."""

import json
import time
from collections import deque
from http.server import BaseHTTPRequestHandler

from http_server import LocalServer

FIELDS = {"pred": "yes", "score": 4}


class JudgeServer(LocalServer):
    """Replies to chats.

    say: what to, a function of the last message's text. faults: taken one for each request, `always` is that of all
    others: a status, (status, headers), "cut", "garbage", "empty", "slow", "refuse", or None. no_schema: replies cannot
    be held to a schema. snapshot: of the model, as the replies have it. key: the one that is accepted, if not all are.
    """

    def __init__(self, say=lambda text: json.dumps(FIELDS)):
        self.say, self.faults, self.always = say, deque(), None
        self.no_schema, self.key, self.models = False, None, None
        self.snapshot, self.usage, self.delay = "judge-2024-01-01", (100, 10), 0.0
        self.asked = []  # the bodies of requests, as they came
        self.answered = []  # the texts of those that were answered
        self.times, self.bearers = [], []
        self.open = self.most_open = 0
        super().__init__(_Handler)
        self.base_url = f"{self.url}/v1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    world: JudgeServer

    def log_message(self, *_):
        pass

    def do_POST(self):
        world = self.world
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        with world.lock:
            world.asked.append(body)
            world.times.append(time.monotonic())
            world.bearers.append(self.headers.get("Authorization"))
            world.open += 1
            world.most_open = max(world.most_open, world.open)
            fault = world.faults.popleft() if world.faults else world.always
            fault = fault(text) if callable(fault) else fault
        try:
            self.reply(body, text, fault)
        finally:
            with world.lock:
                world.open -= 1

    def reply(self, body, text, fault):
        world = self.world
        world.stopped.wait(world.delay)
        bearer = self.headers.get("Authorization", "")
        if self.path != "/v1/chat/completions" or (world.models and body["model"] not in world.models):
            self.error(404, f"The model {body['model']} does not exist", "model_not_found")
        elif world.key and bearer != f"Bearer {world.key}":
            self.error(401, f"Incorrect API key provided: {bearer}", "invalid_api_key")
        elif fault == "cut":
            self.answer(200, b'{"choices": [', {"Content-Length": "5000"})
            self.close_connection = True
        elif fault == "hang up":
            self.close_connection = True
        elif fault == "garbage":
            self.answer(200, b"<html>not JSON", {})
        elif fault == "slow":
            world.stopped.wait(30)
            self.close_connection = True
        elif fault == "drip":  # never silent for long, and never done
            self.answer(200, b"", {"Content-Length": "5000"})
            while not world.stopped.wait(0.02):
                self.wfile.write(b" ")
                self.wfile.flush()
        elif fault == "refuse":
            self.error(400, "The content was filtered", "content_filter")
        elif fault == "quota":
            self.error(429, "You exceeded your current quota", "insufficient_quota")
        elif isinstance(fault, tuple):
            self.error(fault[0], f"later, {bearer}", None, fault[1])
        elif isinstance(fault, int):
            self.error(fault, f"no, {bearer}", None)
        elif world.no_schema and "response_format" in body:
            self.error(400, "This response_format type is unavailable now", "invalid_request_error")
        else:
            self.chat(body, text, "" if fault == "empty" else world.say(text))

    def chat(self, body, text, said):
        world = self.world
        snapshot = world.snapshot(text) if callable(world.snapshot) else world.snapshot
        reply = {
            "id": "chat-1",
            "object": "chat.completion",
            "created": 1,
            "model": snapshot,
            "choices": [
                {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}},
            ],
        }
        if world.usage:
            tokens_in, tokens_out = world.usage
            total = tokens_in + tokens_out
            reply["usage"] = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out, "total_tokens": total}
        with world.lock:
            world.answered.append(text)
        self.answer(200, json.dumps(reply).encode(), {})

    def error(self, status, message, code, headers=None):
        content = {"error": {"message": message, "type": "error", "code": code}}
        self.answer(status, json.dumps(content).encode(), headers or {})

    def answer(self, status, data, headers):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
