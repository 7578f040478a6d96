"""A local OpenAI-compatible server, over real HTTP: the test decides what it says and how it fails.

`answer(body) -> str` gives the text; `trouble(number, body)` may return what goes wrong with
request `number` (from 0): a status, (status, headers, body), "close", "hang", "garbage" or None.
"""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from gemma_scope_jax.autointerp.answers import AnswerFile
from gemma_scope_jax.autointerp.explain import explain_features
from gemma_scope_jax.autointerp.judges.chat_client import ChatClient
from gemma_scope_jax.autointerp.judges.endpoint import Endpoint
from gemma_scope_jax.autointerp.judges.endpoint_judge import EndpointJudge

KEY = "sk-a-very-secret-key-0123456789"


class ChatServer:
    def __init__(
        self, answer, trouble=lambda number, body: None, pause=0.0, usage=True, extra=None
    ):
        self.answer, self.trouble, self.pause, self.usage = answer, trouble, pause, usage
        self.extra = extra or (lambda body: {})
        self.bodies, self.headers, self.times = [], [], []
        self.now, self.most, self.lock = 0, 0, threading.Lock()

    def __enter__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                self.send_error(405)

            def do_POST(self):
                with contextlib.suppress(ConnectionError):
                    outer.handle(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.block_on_close = False
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def handle(self, request):
        raw = request.rfile.read(int(request.headers["Content-Length"]))
        body = json.loads(raw)
        assert request.path == "/v1/chat/completions"
        with self.lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.headers.append(dict(request.headers))
            self.times.append(time.monotonic())
            self.now += 1
            self.most = max(self.most, self.now)
        if self.pause:
            time.sleep(self.pause)
        with self.lock:  # before the reply, after which the client may send the next
            self.now -= 1
        self.reply(request, self.trouble(number, body), body)

    def reply(self, request, wrong, body):
        if wrong == "close":
            request.close_connection = True
            request.connection.close()
            return
        if wrong == "hang":
            time.sleep(3.0)
            return
        status, headers, content = 200, {}, None
        if isinstance(wrong, int):
            status, content = wrong, json.dumps({"error": {"message": f"trouble {wrong}"}})
        elif wrong == "garbage":
            content = '{"choices": [{"mess'
        elif wrong == "short":  # fewer bytes than announced
            content, headers = "{}", {"Content-Length": "500"}
            request.close_connection = True
        elif wrong:
            status, headers, content = wrong
        if content is None:
            text = self.answer(body)
            choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            content = {"choices": [{**choice, **self.extra(body)}]}
            if self.usage:
                content["usage"] = {"prompt_tokens": 100, "completion_tokens": 7}
            content = json.dumps(content)
        data = content.encode()
        request.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(data)


def explained(corpus, server, folder, features=(0, 1), scores=("detection",), **options):
    """Run to the end; returns the report and the client."""
    options = {"timeout": 5.0, "key": KEY, "concurrency": 4, **options}
    notes = []
    answers = AnswerFile(folder / "answers.jsonl")
    client = ChatClient(Endpoint(server.url, "judge-1", **options), answers, notes.append)
    client.notes = notes
    judge = EndpointJudge(client)
    try:
        report = explain_features(corpus, judge, list(features), scores, folder, coder="c", width=8)
    finally:
        judge.close()
        answers.close()
    return report, client
