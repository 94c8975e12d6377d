"""A small server of the completions protocol over a tiny causal language model, with faults on demand.

For: the tests of the teacher behind a server. It answers as vLLM does: GET /v1/models, POST /v1/completions with
`prompt_logprobs`, POST /detokenize where it has a tokenizer.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

Fault = Callable[["Handler", dict[str, Any]], bool]  # changes an answer, or sends its own and returns True


class CompletionsServer:
    """The server, at `url`.

    Args:
        model: a causal language model; served under `name`.
        max_logprobs: the largest `prompt_logprobs` of a request; key: what requests have to bear.

    Attributes:
        faults: by the number of the completion request, from 0, or under None for each.
        requests: (path, body) of what came; seen: the headers of what came.
        slow: seconds of a completion; detokenizes: whether there is /detokenize.
    """

    def __init__(
        self, model: Any, *, name: str = "tiny", max_logprobs: int = 1000, key: str = "", tokenizer: Any = None
    ) -> None:
        self.model, self.name, self.max_logprobs, self.key = model.eval(), name, max_logprobs, key
        self.tokenizer = tokenizer
        self.faults: dict[int | None, Fault] = {}
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.seen: list[dict[str, str]] = []
        self.slow = 0.0
        self.detokenizes = True
        self.lock, self.number = threading.Lock(), -1  # of the last completion request
        handler = type("_Handler", (Handler,), {"of": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # a client that has gone
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    @contextmanager
    def running(self) -> Iterator[CompletionsServer]:
        thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.http.shutdown()
            self.http.server_close()
            thread.join()

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        ids, k = body["prompt"], body["prompt_logprobs"]
        with torch.no_grad():
            log_probs = self.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        entries: list[dict[str, Any] | None] = [None]
        for row, own in zip(log_probs[:-1], ids[1:], strict=True):
            top = row.topk(min(k, len(row))).indices.tolist()
            shown = {own: None, **dict.fromkeys(top)}  # the row's own token first, as vLLM has it
            entries.append({
                str(i): {"logprob": row[i].item(), "rank": int((row > row[i]).sum()) + 1, "decoded_token": self.text(i)}
                for i in shown
            })  # fmt: skip
        choice = {"index": 0, "text": "x", "logprobs": None, "finish_reason": "length", "prompt_logprobs": entries}
        return {"id": "cmpl-1", "object": "text_completion", "model": self.name, "choices": [choice]}

    def text(self, token: int) -> str:
        return f"<{token}>" if self.tokenizer is None else self.tokenizer.decode([token])


class Handler(BaseHTTPRequestHandler):
    """One connection; `of` is the server."""

    of: CompletionsServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.note({})
        if self.path != "/v1/models":
            return self.send({"error": {"message": "Not Found"}}, 404)
        self.send({"object": "list", "data": [{"id": self.of.name, "object": "model", "max_model_len": 4096}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.note(body)
        if self.of.key and self.headers.get("Authorization") != f"Bearer {self.of.key}":
            shown = {"error": f"Unauthorized: {self.headers.get('Authorization')}"}
            return self.send(shown, 401)
        if self.path == "/detokenize" and self.of.tokenizer is not None and self.of.detokenizes:
            return self.send({"prompt": self.of.tokenizer.decode(body["tokens"])})
        if self.path != "/v1/completions":
            return self.send({"detail": "Not Found"}, 404)
        if body["model"] != self.of.name:
            return self.send({"error": {"message": f"The model `{body['model']}` does not exist."}}, 404)
        if body["prompt_logprobs"] > self.of.max_logprobs:
            message = f"Requested prompt logprobs of {body['prompt_logprobs']}, which is greater than max allowed: "
            return self.send({"error": {"message": f"{message}{self.of.max_logprobs}"}}, 400)
        with self.of.lock:
            self.of.number += 1
            fault = self.of.faults.get(self.of.number, self.of.faults.get(None))
            answer = self.of.completion(body)
        time.sleep(self.of.slow)
        if fault is None or not fault(self, answer):
            self.send(answer)

    def note(self, body: dict[str, Any]) -> None:
        self.of.requests.append((self.path, body))
        self.of.seen.append(dict(self.headers))

    def send(self, answer: Any, status: int = 200) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""
