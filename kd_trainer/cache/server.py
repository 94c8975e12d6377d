"""`ServerTeacher`: a teacher behind a vLLM-compatible completions server, which fills a `topk` cache and no more.

`server_rows.py` knows what is in a request and an answer; this file sends them, retries, and checks on first contact
that the server has the model, the log-probabilities and the tokens. Secrets: the key of `KD_TEACHER_SERVER_API_KEY`
goes into the header of each request and nowhere else.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NoReturn

import torch
from torch import nn

from ..losses import TopK
from ..redaction import scrub
from ..tasks import ROW_ID, TEACHER_PREFIX, Task, accepted_inputs
from ..teachers import Classes, TeacherOutput
from ..validation import check_number, fail, message, quoted
from .server_rows import MalformedAnswer, PromptRow, decoded_tokens, top_k_of

API_KEY = "KD_TEACHER_SERVER_API_KEY"
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0  # seconds before the first retry, doubled each time, and at most
_SENT = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
_COMPARED_IDS = 512  # of the vocabulary, evenly spread, whose texts are compared


def check_url(url: Any) -> None:
    """Raises ValueError unless it is a plain base URL without secrets."""
    try:
        parts = urllib.parse.urlsplit(url if isinstance(url, str) else "")
        plain = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        plain = False
    if not plain:
        fail("teacher_server_url", repr(url), "the base URL of a server", "Write it as http://host:8000/v1.")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        shown = repr(parts._replace(query="", fragment="").geturl())
        fix = f"Leave out user, password, ? and #; an API key is read from the environment variable {API_KEY}."
        fail("teacher_server_url", shown, "a URL with host, port and path alone", fix)


def check_server_settings(kd: Any) -> None:
    """Raises ValueError where the `teacher_server_*` fields of `DistillationArguments` fit neither each other nor the
    other fields."""
    if kd.teacher_server_url is None:
        for entry in dataclasses.fields(kd):
            value = getattr(kd, entry.name)
            if entry.name.startswith("teacher_server_") and value != entry.default:
                fix = "Set teacher_server_url, or leave it out."
                fail(entry.name, quoted(value), "no value without teacher_server_url", fix)
        return
    check_url(kd.teacher_server_url)
    check_number("teacher_server_timeout", kd.teacher_server_timeout, low=0, open_low=True)
    for name, low in {"teacher_server_top_k": 1, "teacher_server_retries": 0, "teacher_server_concurrency": 1}.items():
        check_number(name, getattr(kd, name), low=low)
    if not isinstance(kd.teacher_server_model, str) or not kd.teacher_server_model.strip():
        fix = "Set it to a name that the server lists at /v1/models."
        fail("teacher_server_model", quoted(kd.teacher_server_model), "the teacher's name on the server", fix)
    if kd.teacher_cache_dir is None:
        fail("teacher_cache_dir", None, "a folder with teacher_server_url", "Set it to where the cache is kept.")
    for name in ("kd_temperature", "kd_temperature_end"):
        if getattr(kd, name) not in (None, 1):
            because = "a server's prompt_logprobs are of temperature 1, and k of them give no other temperature"
            fail(name, getattr(kd, name), "1 with teacher_server_url", "Set it to 1.", because=because)
    if kd.teacher_cache_format not in ("auto", "topk"):
        expected = "'auto' or 'topk' with teacher_server_url"
        fail("teacher_cache_format", repr(kd.teacher_cache_format), expected, "Leave it out.")
    if kd.teacher_cache_k is not None:
        fix = "Set teacher_server_top_k instead."
        fail("teacher_cache_k", repr(kd.teacher_cache_k), "no value with teacher_server_url", fix)


class ServerTeacher:
    """A kind of teacher whose outputs are fetched while a cache is built; training reads the cache.

    Args:
        url: base URL, with or without /v1 at its end.
        model: its name on the server.
        timeout: seconds of a request.
        retries: of a request that failed in a way that may pass.
        concurrency: requests under way at once.
    """

    live: None = None
    model: None = None
    manifest: None = None
    routes: None = None
    compiled = is_student = has_own_weights = sharded = False
    note = ""
    start_tokens: None = None
    accepted = frozenset(_SENT[:2])

    def __init__(self, url: str, model: str, *, timeout: float, retries: int, concurrency: int) -> None:
        check_url(url)
        base = url.rstrip("/")
        self.url = base if base.endswith("/v1") else f"{base}/v1"
        self.name, self.timeout, self.retries, self.concurrency = model, timeout, retries, concurrency
        self.parts: dict[str, Any] = {}
        self._student: nn.Module | None = None
        self._client: Any = None
        self._secrets: list[str] = []
        self._stop = threading.Event()  # set where the client was closed

    # ---- a kind of teacher ----

    @property
    def members(self) -> tuple[ServerTeacher, ...]:
        return (self,)

    def describe(self) -> str:
        """One line for the start block."""
        return f"{self.name} behind {self.url}"

    def identity(self) -> dict[str, Any]:
        """`name` and `parameters`, which the server does not tell, and more for the manifest."""
        host = urllib.parse.urlsplit(self.url).netloc
        return {"given": "server", "name": scrub(self.name), "host": host, "parameters": None, "weights": None}

    def prepare(self, device: torch.device, accelerator: Any = None) -> None:
        """Nothing is run here."""

    def for_student(self, student: nn.Module, *, over_tokens: bool) -> ServerTeacher:
        """Itself; it notes the columns that the student reads and a server cannot be sent."""
        self._student = student
        return self

    def compare_classes(self, student: nn.Module, task: Task | None = None, **options: Any) -> Classes | None:
        """None: the classes are tokens."""
        return None

    def check_objective(self, divergence: str, temperatures: Sequence[float], standardize: bool = False) -> None:
        """Nothing: training checks the cache."""

    def output(self, batch: Mapping[str, Any], *args: Any, **kwargs: Any) -> TeacherOutput | None:
        """None: the server is not called outside of the building."""
        return None

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The columns of a batch that say what is sent.

        Raises:
            ValueError: the student reads a column that cannot be sent, such as pixel_values.
        """
        read = accepted_inputs(self._student) if self._student is not None else frozenset()
        own = [name for name in batch if name.startswith(TEACHER_PREFIX) and name != ROW_ID]
        lost = sorted([*own, *(name for name in batch if name in read and name not in _SENT)])
        if lost or "input_ids" not in batch:
            shown = f"one with {', '.join(lost)}" if lost else "one without input_ids"
            fix = "Collate one plain sequence of text a row, or run the teacher itself (teacher_model_name_or_path)."
            fail("data_collator", shown, "batches of input_ids, which is all that teacher_server_url sends", fix)
        return {name: batch[name] for name in _SENT[:3] if name in batch}

    # ---- HTTP ----

    def connect(self) -> None:
        """Opens the client, with the key in its headers."""
        key = os.environ.get(API_KEY, "").strip()
        if not (key.isascii() and key.isprintable()):
            fail(API_KEY, "a value with characters that a header cannot have", "printable ASCII", "Set it again.")
        self.release()
        http, headers = _http_library(), {"Authorization": f"Bearer {key}"} if key else {}
        limits = http.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        self._secrets, self._stop = [key] if key else [], threading.Event()
        self._client = http.Client(headers=headers, timeout=self.timeout, limits=limits)

    def release(self, student: nn.Module | None = None) -> None:
        """Closes the client; requests under way end."""
        self._stop.set()
        client, self._client = self._client, None
        if client is not None:
            client.close()

    @contextmanager
    def released(self) -> Iterator[None]:
        """Releases it at the end, also after an error."""
        try:
            yield
        finally:
            self.release()

    def request(self, path: str, content: Mapping[str, Any] | None, check: Callable[[Any], Any]) -> Any:
        """`check(answer)` of the JSON at a path of the server; POST where there is content.

        Raises:
            ValueError: the server refuses the request (4xx), with its message; `check` raised `MalformedAnswer`.
            RuntimeError: all attempts ended with 5xx, a time-out, no connection or no JSON.
        """
        failure = ""
        for attempt in range(self.retries + 1):
            if attempt and self._stop.wait(min(_FIRST_WAIT * 2 ** (attempt - 1), _LONGEST_WAIT)):
                break
            answer, failure = self._attempt(path, content)
            if not failure:
                try:
                    return check(answer)
                except MalformedAnswer as error:
                    fix = "Serve the model with vLLM, its logprobs as they are by default."
                    fail("teacher_server_url", f"{self.url!r}, which returned {error.found}", error.expected, fix)
        shown = f"{self.url!r}, where {path} failed {self.retries + 1} times, the last time with {failure}"
        fix = "See the server's log, or raise teacher_server_timeout or teacher_server_retries."
        fix += " The complete shards stay: run again, and the building goes on."
        expected = f"a server that responds within {self.timeout:g} seconds"
        raise RuntimeError(message("teacher_server_url", shown, expected, fix))

    def _attempt(self, path: str, content: Mapping[str, Any] | None) -> tuple[Any, str]:
        """(JSON, ""), or (None, the reason) where another attempt may succeed."""
        http, client = _http_library(), self._client
        if client is None:
            return None, "the end of the building"
        try:
            answer = client.request("GET" if content is None else "POST", self._root(path), json=content)
        except (http.HTTPError, http.StreamError, RuntimeError) as error:  # RuntimeError: the client was closed
            return None, scrub(f"{type(error).__name__}: {error}", self._secrets)
        status = answer.status_code
        if status == 200:
            try:
                return json.loads(answer.content), ""
            except ValueError:
                return None, f"no JSON: {self._shown(answer)[:80]!r}"
        if status in (408, 425, 429) or status >= 500:
            return None, f"HTTP {status}: {self._shown(answer)}"
        return self._fail_status(path, status, self._shown(answer))

    def _shown(self, answer: Any) -> str:
        """The beginning of a body, cut after its secrets are replaced."""
        return scrub(answer.text[:10_000].strip(), self._secrets)[:600]

    def _root(self, path: str) -> str:
        """/v1/... of the base URL, other paths beside it."""
        return self.url.removesuffix("/v1") + path

    def _fail_status(self, path: str, status: int, text: str) -> NoReturn:
        fix = "See the message of the server."
        if status in (401, 403):
            fix = f"Set the environment variable {API_KEY} to the server's key."
        elif "logprobs" in text:
            fix = "Start the server with --max-logprobs of teacher_server_top_k or more, or lower teacher_server_top_k."
        elif any(words in text for words in ("context length", "max_model_len", "max_tokens must be at least")):
            fix = "Start the server with a --max-model-len above the longest row, or shorten the rows."
        elif status in (404, 405):
            fix = "Give the base URL of a vLLM-compatible server, such as http://host:8000/v1."
        shown = f"{self.url!r}, which returned HTTP {status} for {path}: {text}"
        fail("teacher_server_url", shown, "a server that accepts the request", fix)

    # ---- first contact, and each row ----

    def probe(self, row: PromptRow, k: int, classes: int, tokenizer: Any) -> None:
        """Connects, and checks the model's name, the log-probabilities of a row and the tokens; raises as `request`."""
        self.connect()
        listed = self.request("/v1/models", None, _model_names)
        if self.name not in listed:
            expected = f"a model of {self.url!r}: {', '.join(map(repr, listed))}"
            fail("teacher_server_model", repr(self.name), expected, "Set it to one of these.")
        texts = self.complete(row, k, lambda answer: top_k_of(answer, row, k, classes) and decoded_tokens(answer))
        if tokenizer is not None:
            self._compare_tokens(tokenizer, texts)

    def _compare_tokens(self, tokenizer: Any, texts: Mapping[int, str]) -> None:
        """Raises ValueError where ids mean other tokens on the server, as far as it gives texts of them.

        Args:
            texts: of the tokens in an answer; compared where the server has no /detokenize.
        """
        count = len(tokenizer)
        ids = sorted({i * count // _COMPARED_IDS for i in range(_COMPARED_IDS)})
        try:
            whole = self.request("/detokenize", {"model": self.name, "tokens": ids}, _prompt_text)
            differ = _without_spaces(whole) != _without_spaces(tokenizer.decode(ids))
        except ValueError:
            differ = any(i < count and _differs(tokenizer.decode([i]), text) for i, text in texts.items())
        if differ:
            shown = f"{self.name!r}, where token ids stand for other texts than in processing_class"
            fix, because = "Serve a teacher with the student's tokenizer.", "the server reads the student's token ids"
            fail("teacher_server_model", shown, "a model with the student's tokens", fix, because=because)

    def fetch(self, row: PromptRow, k: int, classes: int) -> TopK:
        """See `top_k_of`; raises as `request`."""
        return self.complete(row, k, lambda answer: top_k_of(answer, row, k, classes))

    def complete(self, row: PromptRow, k: int, read: Callable[[Any], Any]) -> Any:
        """`read(answer)` of the log-probabilities of a row."""

        def check(answer: Any) -> Any:
            model = answer.get("model") if isinstance(answer, Mapping) else None
            if model not in (None, self.name):
                raise MalformedAnswer(f"an answer of the model {model!r}", f"one of {self.name!r}")
            return read(answer)

        content = {"model": self.name, "prompt": row.ids, "max_tokens": 1, "prompt_logprobs": k}
        return self.request("/v1/completions", content, check)


def _model_names(answer: Any) -> list[str]:
    data = answer.get("data") if isinstance(answer, Mapping) else None
    if not isinstance(data, list) or not all(isinstance(each, Mapping) and "id" in each for each in data):
        raise MalformedAnswer("no list 'data' of models with an id", "the list of models")
    return [str(each["id"]) for each in data]


def _prompt_text(answer: Any) -> str:
    text = answer.get("prompt") if isinstance(answer, Mapping) else None
    if not isinstance(text, str):
        raise MalformedAnswer("no text 'prompt'", "the text of tokens")
    return text


def _without_spaces(text: str) -> str:
    """Without spaces and broken characters, which versions of a tokenizer treat differently."""
    return "".join(text.replace("\ufffd", "").split())


def _differs(own: str, other: str) -> bool:
    """Whether two texts are certainly of different tokens; servers mark spaces and bytes in their ways."""
    return own.strip().isascii() and own.strip().isalnum() and own.strip() != other.strip(" \u0120\u2581")


def _http_library() -> Any:
    """The HTTP library of huggingface_hub: httpx2, in older versions httpx."""
    try:
        return import_module("httpx2")
    except ImportError:
        return import_module("httpx")


def as_server_teacher(given: Any) -> ServerTeacher | None:
    """The given teacher where it is behind a server."""
    return given if isinstance(given, ServerTeacher) else None
