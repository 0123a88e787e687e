"""A stand-in for a W&B server on this machine: as much of it as wandb's own client needs to write runs' histories."""

import gzip
import json
from http.server import BaseHTTPRequestHandler

from http_server import LocalServer


class WandbServer(LocalServer):
    """Keeps the lines of each run's history at the places the client puts them, as W&B does.

    `fault`: None, a status that answers everything, "silent" (accepts and never answers), "silent later" (knows who
    asks, and then is silent), "nobody" (knows nobody) or "page" (answers with something else).
    """

    def __init__(self):
        self.runs = {}  # id -> {"history": {place: row}, "settings": the last values given}
        self.fault = None
        self.asked = []
        super().__init__(_Handler)

    def history(self, run):
        """The rows of a run in order."""
        return [row for _, row in sorted(self.runs[run]["history"].items())]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    world: WandbServer

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer({})

    def do_PUT(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer({})

    def do_POST(self):
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            data = gzip.decompress(data)
        asked = {} if "json" not in self.headers.get("Content-Type", "") else json.loads(data or b"{}")
        query = asked.get("query", "")
        name = query.replace("(", " ").split()[1] if query else self.path
        self.world.asked.append(name)
        fault = self.world.fault
        if fault == "silent" or (fault == "silent later" and "Viewer" not in name and "viewer" not in name):
            self.world.stopped.wait(60)
            self.close_connection = True
            return
        if fault in ("nobody", "page"):
            self.answer({"data": {"viewer": None}} if fault == "nobody" else ["a proxy's page"])
            return
        if isinstance(fault, int):
            self.answer({"errors": [{"message": "no"}]}, fault)
            return
        with self.world.lock:
            if query:
                known = self.graph(name, asked.get("variables") or {})
                self.answer({"data": known} if known else {"errors": [{"message": f"{name} is not known here"}]})
            elif self.path.endswith("file_stream"):
                self.stream(self.path.split("/")[-2], asked)
                self.answer({"exitcode": None, "limits": {}})
            else:
                self.answer({})

    def graph(self, name, given):
        if name == "Viewer":
            me = {
                "id": "1",
                "entity": "me",
                "username": "me",
                "email": "me@here",
                "flags": "{}",
                "teams": {"edges": []},
            }
            return {"viewer": me}
        if name == "RunResumeStatus":
            run = self.world.runs.get(given["name"])
            return {
                "model": {
                    "id": "p",
                    "name": "project",
                    "entity": {"id": "1", "name": "me"},
                    "bucket": run and self.bucket(given["name"], run),
                }
            }
        if name == "UpsertBucket":
            run = self.world.runs.setdefault(given["name"], {"history": {}, "settings": {}})
            run["settings"].update({key: value for key, value in given.items() if value is not None})
            return {"upsertBucket": {"bucket": self.bucket(given["name"], run), "inserted": True}}
        if name == "CreateRunFiles":
            files = [
                {"name": file, "uploadUrl": f"{self.world.url}/upload", "__typename": "File"} for file in given["files"]
            ]
            return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}
        return {}

    def bucket(self, name, run):
        rows = [json.dumps(row) for _, row in sorted(run["history"].items())]
        return {
            "id": name,
            "name": name,
            "displayName": name,
            "description": None,
            "config": "{}",
            "sweepName": None,
            "historyLineCount": len(rows),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps(rows[-1:]),
            "eventsTail": "[]",
            "summaryMetrics": rows[-1] if rows else "{}",
            "wandbConfig": '{"t": 1}',
            "tags": [],
            "project": {"id": "p", "name": given_project(run), "entity": {"id": "1", "name": "me"}},
        }

    def stream(self, run, asked):
        part = asked.get("files", {}).get("wandb-history.jsonl")
        for number, line in enumerate(part["content"] if part else []):
            self.world.runs[run]["history"][part["offset"] + number] = json.loads(line)

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def given_project(run):
    return run["settings"].get("project", "project")
