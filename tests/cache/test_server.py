"""A teacher behind a server: its cache is that of the teacher run here, whatever happens to server and network."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorWithFlattening

from kd_trainer import CachedTeacher, DistillationArguments, DistillationTrainer
from kd_trainer.cache import server as cache_server
from kd_trainer.cache import settings as cache_settings
from kd_trainer.cache.server import API_KEY, ServerTeacher
from kd_trainer.cache.store import CacheError
from tests.cache.test_cached_teacher import losses
from tests.helpers import config_run, launch, tiny
from tests.helpers.completions_server import CompletionsServer
from tests.helpers.script_process import SERVER

ROWS, KEY = tiny.rows("causal_lm", 24), "not-in-any-known-form-of-a-key"
LM = {"kd_reduction": "tokenmean", "kd_temperature": 1.0, "per_device_eval_batch_size": 4, "max_steps": 3}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Retries at once; a shard for each batch; no key and no proxy of this machine."""
    monkeypatch.setattr(cache_server, "_FIRST_WAIT", 0.001)
    monkeypatch.setattr(cache_settings, "SHARD_BYTES", 1)
    for name in (API_KEY, "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server():
    with CompletionsServer(tiny.models("causal_lm")[1]).running() as running:
        yield running


def trainer(out: Path, server: CompletionsServer | None = None, *, teacher: Any = None, **kwargs: Any) -> Any:
    """A run that reads the server's cache, or with kd_run cache fills it; the live teacher where there is no server."""
    if server is not None:
        fields = {"url": server.url, "model": server.name, "top_k": 5, "retries": 2, "timeout": 20.0}
        kwargs = {**{f"teacher_server_{name}": value for name, value in fields.items()}, **kwargs}
        kwargs = {"teacher_cache_dir": str(out / "cache"), **kwargs}
    data, more = kwargs.pop("data", ROWS), {name: kwargs.pop(name) for name in ("processing_class",) if name in kwargs}
    student = kwargs.pop("student", None)
    return DistillationTrainer(
        model=tiny.models("causal_lm")[0] if student is None else student,
        teacher_model=teacher,
        args=tiny.arguments(out / "run", **{**LM, **kwargs}),
        data_collator=kwargs.pop("collator", tiny.pad) if "collator" in kwargs else tiny.pad,
        train_dataset=data,
        **more,
    )


def fill(out: Path, server: CompletionsServer, **kwargs: Any) -> CachedTeacher:
    collator = kwargs.pop("collator", None)
    run = trainer(out, server, kd_run="cache", **kwargs)
    run.data_collator = collator or run.data_collator
    with pytest.raises(SystemExit) as end:
        run.train()
    assert end.value.code == 0
    return CachedTeacher(out / "cache")


def content(folder: Path) -> dict[str, bytes]:
    """Every file that a reader sees, but for the manifests' note of the host, whose port is another one each time."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    found = {name: each for name, each in found.items() if not name.startswith(".")}
    for name in [name for name in found if name.endswith("manifest.json")]:
        manifest = json.loads(found[name])
        del manifest["teacher"]["host"], manifest["sha256"]
        found[name] = json.dumps(manifest).encode()
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The files of a cache that was filled one request at a time, without a fault."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch, CompletionsServer(tiny.models("causal_lm")[1]).running() as running:
        patch.setattr(cache_settings, "SHARD_BYTES", 1)
        fill(folder, running, teacher_server_concurrency=1)
    return content(folder / "cache")


# ---- the same cache, the same training ----


def test_all_of_a_vocabulary_is_the_live_teacher(server, tmp_path):
    fill(tmp_path, server, teacher_server_top_k=tiny.VOCAB, teacher_cache_dtype="float32")
    sent = len(server.requests)
    run = trainer(tmp_path, server, teacher_server_top_k=tiny.VOCAB, teacher_cache_dtype="float32")
    live = trainer(tmp_path, teacher=tiny.models("causal_lm")[1])
    assert losses(run) == pytest.approx(losses(live), rel=1e-5)
    assert tiny.logged(run, "soft_loss") == pytest.approx(tiny.logged(live, "soft_loss"), rel=1e-5)
    assert len(server.requests) == sent, "training reads the cache alone"
    assert isinstance(run.teacher, CachedTeacher)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_the_cache_is_that_of_the_teacher_run_here(k, server, tmp_path):
    found = fill(tmp_path / "server", server, teacher_server_top_k=k, teacher_cache_dtype="float32")
    options = {"teacher_cache_format": "topk", "teacher_cache_k": k, "teacher_cache_dtype": "float32"}
    direct = {"teacher_cache_dir": str(tmp_path / "direct"), **options}
    here = trainer(tmp_path, teacher=tiny.models("causal_lm")[1], **direct).build_teacher_cache()
    one, other = (each.parts["train"].take(list(range(len(ROWS)))) for each in (found, here))
    assert one.signatures.tolist() == other.signatures.tolist()
    assert one.counts.tolist() == other.counts.tolist()
    assert (one.columns["ids"] == other.columns["ids"]).all()
    for name in ("log_probs", "log_tail"):
        a, b = (torch.from_numpy(each.columns[name]).double().exp() for each in (one, other))
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert losses(trainer(tmp_path, teacher=found)) == pytest.approx(losses(trainer(tmp_path, teacher=here)), rel=1e-5)


def test_what_is_sent_and_noted(server, tmp_path):
    cached = fill(tmp_path, server)
    paths = [path for path, _ in server.requests]
    assert paths[:2] == ["/v1/models", "/v1/completions"]
    bodies = [body for path, body in server.requests if path == "/v1/completions"]
    sent = {tuple(body["prompt"]) for body in bodies}
    assert sent <= {tuple(row["input_ids"]) for row in ROWS}, "no padding, no cut"
    labelled = [row for row in ROWS if any(label != -100 for label in row["labels"][1:])]
    assert sent == {tuple(row["input_ids"]) for row in labelled}, "a row without a kept position is not sent"
    assert {(body["model"], body["max_tokens"], body["prompt_logprobs"]) for body in bodies} == {("tiny", 1, 5)}
    host = server.url.removeprefix("http://").removesuffix("/v1")
    noted = {"given": "server", "name": "tiny", "host": host, "parameters": None, "weights": None}
    assert cached.manifest["teacher"] == noted
    assert (cached.format.name, cached.format.k, cached.format.dtype, cached.format.temperature) == (
        "topk",
        5,
        "float16",
        1.0,
    )
    assert "tiny" in cached.describe()
    run = trainer(tmp_path, server)
    assert run.summary()["teacher_parameters"] is None
    run.create_model_card()
    card = (tmp_path / "run/README.md").read_text()
    assert "Distilled from the teacher `tiny` into 3,792 parameters with kd_trainer:" in card


def test_left_padding_and_a_base_url_without_v1(server, tmp_path):
    def left(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(f["input_ids"]) for f in features) + 1
        fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        rows = {n: [[fill] * (longest - len(f[n])) + f[n] for f in features] for n, fill in fills.items()}
        batch = {name: torch.tensor(row) for name, row in rows.items()}
        return batch | {"position_ids": (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)}

    base = server.url.removesuffix("/v1") + "/"
    found = []
    for name, collator in {"right": tiny.pad, "left": left}.items():
        padded = fill(tmp_path / name, server, collator=collator, teacher_server_url=base)
        found.append(padded.parts["train"].take(list(range(len(ROWS)))).columns)
    assert all((found[0][name] == found[1][name]).all() for name in found[0])


def test_the_order_of_the_answers_changes_no_byte(server, whole, tmp_path):
    """One request at a time, and eight of which some come late."""
    server.faults = dict.fromkeys(range(2, 20, 3), _late)
    fill(tmp_path, server, teacher_server_concurrency=8)
    assert content(tmp_path / "cache") == whole
    assert sum(name.endswith(".arrow") for name in whole) == 6


def test_as_many_requests_as_are_allowed_are_under_way(server, tmp_path, monkeypatch):
    under_way, most = [], [0]
    attempt = ServerTeacher._attempt

    def counted(self, path, body):
        under_way.append(path)
        most[0] = max(most[0], len(under_way))
        try:
            return attempt(self, path, body)
        finally:
            under_way.pop()

    monkeypatch.setattr(ServerTeacher, "_attempt", counted)
    server.slow = 0.005
    fill(tmp_path, server, teacher_server_concurrency=6)
    assert 4 < most[0] <= 6, "more than a batch of four rows"


# ---- interruptions ----


def test_a_server_that_stops_midway_leaves_what_resumes_to_the_same_bytes(server, whole, tmp_path):
    for stop in (9, 18):
        server.faults = dict.fromkeys(range(server.number + stop, server.number + 1000), _status(500))
        with pytest.raises(RuntimeError, match="the building goes on"):
            trainer(tmp_path / "cut", server, kd_run="cache", teacher_server_concurrency=1).train()
        begun = list((tmp_path / "cut/cache/train/data").glob("*.arrow"))
        assert 0 < len(begun) < 6
    assert not (tmp_path / "cut/cache/train/manifest.json").exists()
    server.faults, first = {}, server.number
    fill(tmp_path / "cut", server)
    assert server.number - first < len(ROWS), "what was built is not requested again"
    assert content(tmp_path / "cut/cache") == whole


def _killed(out: str, url: str) -> None:
    cache_settings.SHARD_BYTES = 1
    trainer(Path(out), _Named(url), kd_run="cache").train()


class _Named:
    name = "tiny"

    def __init__(self, url: str) -> None:
        self.url = url


@pytest.mark.launch
def test_a_killed_building_resumes_to_the_same_bytes(server, whole, tmp_path):
    """SIGKILL at three moments: the process that fills the cache ends with requests under way."""
    for number in (6, 13, 17):
        process = SERVER.Process(target=_killed, args=(str(tmp_path / "killed"), server.url))
        reached = server.number + number
        server.faults = {reached: lambda handler, answer, process=process: process.kill() or False}
        process.start()
        process.join(60)
        assert process.exitcode == -9
    server.faults = {}
    assert not (tmp_path / "killed/cache/train/manifest.json").exists()
    fill(tmp_path / "killed", server)
    assert content(tmp_path / "killed/cache") == whole


@pytest.mark.launch
def test_two_processes_share_the_rows_and_one_may_be_killed(server, whole, tmp_path):
    """The second process is killed amid its rows; then two go on. The bytes are those of one process."""
    folder, data = str(tmp_path / "two"), tmp_path / "two/cache/train/data"
    with pytest.raises(AssertionError):
        launch.two_processes("server_run.py", folder, server.url, "7", timeout=120)
    assert not (tmp_path / "two/fetched_1").exists()
    assert not (tmp_path / "two/cache/train/manifest.json").exists()
    begun = {shard: shard.stat().st_mtime_ns for shard in data.glob("*.arrow")}
    assert 0 < len(begun) < 6
    launch.two_processes("server_run.py", folder, server.url, timeout=120)
    assert content(tmp_path / "two/cache") == whole
    assert {shard: shard.stat().st_mtime_ns for shard in begun} == begun, "what was built is kept"
    assert all(int((tmp_path / f"two/fetched_{i}").read_text()) > 0 for i in range(2))


def test_another_teacher_under_the_same_name_does_not_go_on_with_a_begun_cache(server, tmp_path):
    server.faults = dict.fromkeys(range(12, 1000), _status(503))
    with pytest.raises(RuntimeError, match="HTTP 503"):
        trainer(tmp_path, server, kd_run="cache", teacher_server_concurrency=1).train()
    server.faults, server.model = {}, tiny.models("causal_lm", seed=5)[1].eval()
    with pytest.raises(CacheError, match="other outputs for rows 0 to 3"):
        trainer(tmp_path, server, kd_run="cache").train()


# ---- faults of the server ----


def _status(status: int, text: str = "out of memory") -> Any:
    def fault(handler: Any, answer: dict[str, Any]) -> bool:
        handler.send({"error": {"message": text}}, status)
        return True

    return fault


def _late(handler: Any, answer: dict[str, Any]) -> bool:
    time.sleep(0.03)
    return False


def _very_late(handler: Any, answer: dict[str, Any]) -> bool:
    time.sleep(0.3)
    return False


def _no_json(handler: Any, answer: dict[str, Any]) -> bool:
    handler.send(b'{"choices": [{"prompt_logp')
    return True


def _closed(handler: Any, answer: dict[str, Any]) -> bool:
    handler.close_connection = True
    return True


def _changed(change: Any) -> Any:
    def fault(handler: Any, answer: dict[str, Any]) -> bool:
        change(answer["choices"][0]["prompt_logprobs"])
        return False

    return fault


def _nan(entries: list[Any]) -> None:
    for entry in entries[1:]:
        next(iter(entry.values()))["logprob"] = math.nan


def _token_lost(entries: list[Any]) -> None:
    entries[:] = [None, *({"0": {"logprob": -1.0}, "1": {"logprob": -2.0}} for _ in entries[1:])]


PASSING = {
    "500": _status(500), "429": _status(429), "time-out": _very_late, "no JSON": _no_json, "closed": _closed,
}  # fmt: skip


@pytest.mark.parametrize("name", PASSING)
def test_a_fault_that_passes_is_retried(name, server, whole, tmp_path):
    server.faults = {server.number + i: PASSING[name] for i in (1, 5, 9)}
    fill(tmp_path / "cut", server, teacher_server_timeout=0.1 if name == "time-out" else 20.0)
    assert content(tmp_path / "cut/cache") == whole


@pytest.mark.parametrize(("name", "words"), [("500", "HTTP 500: .*out of memory"), ("time-out", "ReadTimeout"),
                                             ("no JSON", "no JSON"), ("closed", "RemoteProtocolError")])  # fmt: skip
def test_a_fault_that_stays_is_an_error_after_the_retries(name, words, server, tmp_path):
    server.faults = {None: PASSING[name]}
    run = trainer(tmp_path, server, kd_run="cache", teacher_server_timeout=0.1 if name == "time-out" else 20.0)
    with pytest.raises(RuntimeError, match=f"`teacher_server_url` is .*failed 3 times, the last time with .*{words}"):
        run.train()
    assert server.number == 2
    assert not list(tmp_path.rglob("*.arrow"))


def test_no_server_at_all(server, tmp_path):
    server.url = "http://127.0.0.1:9/v1"  # the port of "discard": nobody listens
    with pytest.raises(RuntimeError, match="/v1/models failed 3 times, the last time with ConnectError"):
        trainer(tmp_path, server, kd_run="cache").train()


WRONG = {
    "a short row": (_changed(lambda e: e.pop()), "prompt_logprobs of"),
    "NaN": (_changed(_nan), "the log-probability nan for token"),
    "without the row's token": (_changed(_token_lost), "log-probabilities for token"),
    "no log-probabilities": (lambda h, a: not a["choices"][0].pop("prompt_logprobs"), "no list 'prompt_logprobs'"),
    "another model": (lambda h, a: bool(a.update(model="gpt")), "an answer of the model 'gpt'; expected one of 'tiny'"),
    "400": (_status(400, "the prompt is longer than the context length"), "HTTP 400 .*longer than .*--max-model-len"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("number", [0, 14])
def test_a_wrong_answer_stops_and_is_not_kept(name, number, server, whole, tmp_path):
    fault, words = WRONG[name]
    server.faults = {number: fault}
    with pytest.raises(ValueError, match=f"^`teacher_server_url` is .*{words}"):
        trainer(tmp_path, server, kd_run="cache").train()
    assert not list(tmp_path.rglob("manifest.json"))
    begun = {f"train/data/{file.name}": file.read_bytes() for file in tmp_path.rglob("*.arrow")}
    assert begun.items() <= whole.items()
    assert number or not begun


def test_max_logprobs_of_the_server(server, tmp_path):
    server.max_logprobs = 4
    with pytest.raises(ValueError, match=r"greater than max allowed: 4.*Start the server with --max-logprobs"):
        trainer(tmp_path, server, kd_run="cache").train()
    fill(tmp_path, server, teacher_server_top_k=4)


def test_a_model_that_the_server_does_not_have(server, tmp_path):
    with pytest.raises(ValueError, match=r"`teacher_server_model` is 'big'; expected a model of .*: 'tiny'"):
        trainer(tmp_path, server, kd_run="cache", teacher_server_model="big").train()
    server.url = server.url.removesuffix("/v1") + "/other/v1"
    with pytest.raises(ValueError, match=r"HTTP 404 for /v1/models.*base URL of a vLLM-compatible server"):
        trainer(tmp_path, server, kd_run="cache").train()


# ---- tokens ----


def tokenizers() -> tuple[Any, Any]:
    texts = ["the quick brown fox jumps over the lazy dog " * 3], ["zebras quiz a jolly wizard by the vortex " * 3]
    return tuple(tiny.byte_level_tokenizer(each, 280, ["<pad>"], pad_token="<pad>") for each in texts)  # type: ignore[return-value]


@pytest.mark.parametrize("detokenizes", [True, False])
def test_the_tokens_are_compared(detokenizes, server, tmp_path):
    """By /detokenize, or by the texts in an answer where a server does not have it."""
    own, other = tokenizers()
    wide = {"vocab_size": len(own)}
    torch.manual_seed(0)
    student, teacher = (type(m)(tiny.llama_config(16, **wide)) for m in tiny.models("causal_lm"))
    server.model, server.tokenizer, server.detokenizes = teacher.eval(), own, detokenizes
    options = {"student": student, "processing_class": own, "teacher_server_top_k": 200}
    data = [{"input_ids": own("the quick brown fox")["input_ids"]} for _ in range(4)]
    data = [{**row, "labels": row["input_ids"], "attention_mask": [1] * len(row["input_ids"])} for row in data]
    fill(tmp_path / "same", server, data=data, **options)
    server.tokenizer = other
    with pytest.raises(ValueError, match="`teacher_server_model` is 'tiny', where token ids stand for other texts"):
        trainer(tmp_path / "other", server, kd_run="cache", data=data, **options).train()


def test_ids_beyond_the_students_vocabulary(server, tmp_path):
    torch.manual_seed(0)
    server.model = type(server.model)(tiny.llama_config(16, vocab_size=64)).eval()
    with pytest.raises(ValueError, match=r"the token id [0-9]+; expected ids below 37, the student's vocabulary"):
        trainer(tmp_path, server, kd_run="cache", teacher_server_top_k=30).train()


# ---- settings ----


def test_training_waits_for_the_cache_and_compares_it(server, tmp_path):
    with pytest.raises(ValueError, match=r"`teacher_server_url` is .* expected None with kd_run 'train' as long as"):
        trainer(tmp_path, server)
    fill(tmp_path, server)
    server.http.shutdown()
    trainer(tmp_path, server, teacher_server_url="http://elsewhere:1/v1").train()  # by its name alone
    for other, words in {
        "teacher_server_model": ("big", "`teacher_server_model` is one with the name 'big'"),
        "teacher_server_top_k": (6, "`teacher_server_top_k` is one with the value 6"),
    }.items():
        value, message = words
        with pytest.raises(CacheError, match=message):
            trainer(tmp_path, server, **{other: value}).train()
    direct = {"teacher_cache_dir": str(tmp_path / "cache")}
    with pytest.raises(CacheError, match="given as a"):
        trainer(tmp_path, teacher=tiny.models("causal_lm")[1], **direct).train()


def test_further_data_is_fetched_after_a_training(server, tmp_path):
    run = trainer(tmp_path, server, kd_run="cache")
    run.build_teacher_cache()
    more = tiny.rows("causal_lm", 6, seed=9)
    run.build_teacher_cache(more, name="more")
    assert len(CachedTeacher(tmp_path / "cache").parts["test-more"]) == 6


SERVED = {
    "teacher_server_url": "http://h:1",
    "teacher_server_model": "m",
    "teacher_cache_dir": "c",
    "kd_temperature": 1.0,
}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"kd_temperature": 2.0}, "`kd_temperature` is 2.0; expected 1 with teacher_server_url"),
        ({"kd_schedule": "linear", "kd_temperature_end": 2.0}, "`kd_temperature_end` is 2.0; expected 1"),
        ({"teacher_server_model": None}, "`teacher_server_model` is None; expected the teacher's name"),
        ({"teacher_cache_dir": None}, "`teacher_cache_dir` is None; expected a folder with teacher_server_url"),
        ({"teacher_cache_format": "hidden"}, "`teacher_cache_format` is 'hidden'; expected 'auto' or 'topk'"),
        ({"teacher_cache_k": 8}, "`teacher_cache_k` is 8; expected no value with teacher_server_url"),
        ({"teacher_server_top_k": 0}, "`teacher_server_top_k` is 0; expected a finite number >= 1"),
        ({"teacher_server_timeout": 0.0}, "`teacher_server_timeout` is 0.0; expected a finite number > 0"),
        ({"teacher_server_retries": -1}, "`teacher_server_retries` is -1"),
        ({"teacher_server_concurrency": 0}, "`teacher_server_concurrency` is 0"),
        ({"teacher_server_url": "h:8000"}, "`teacher_server_url` is 'h:8000'; expected the base URL of a server"),
        ({"teacher_server_url": "http://h:x"}, "expected the base URL of a server"),
        ({"teacher_server_url": "http://h/v1?key=abc"}, "expected a URL with host, port and path alone"),
    ],
)
def test_settings_that_do_not_fit(given, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        DistillationArguments(**{**SERVED, **given})


@pytest.mark.parametrize("name", ["model", "top_k", "timeout", "retries", "concurrency"])
def test_without_a_url_its_settings_mean_nothing(name):
    value = "m" if name == "model" else 3
    with pytest.raises(
        ValueError, match=f"`teacher_server_{name}` is .*; expected no value without teacher_server_url"
    ):
        DistillationArguments(**{f"teacher_server_{name}": value})


@pytest.mark.parametrize(
    "other", [{"teacher": "path"}, {"teacher_model_name_or_path": "path"}, {"teacher_compile": True},
              {"teacher_model_init_kwargs": {"dtype": "bfloat16"}}],
)  # fmt: skip
def test_another_teacher_beside_it(other, server, tmp_path):
    with pytest.raises(ValueError, match="expected nothing beside teacher_server_url"):
        trainer(tmp_path, server, kd_run="cache", **other)


def test_what_a_server_cannot_be_sent(server, tmp_path):
    with pytest.raises(ValueError, match=r"packs several sequences into a row|position_ids"):
        fill(tmp_path / "packed", server, collator=DataCollatorWithFlattening(), data=[
            {"input_ids": row["input_ids"], "labels": row["labels"]} for row in ROWS
        ])  # fmt: skip
    pad = lambda rows: tiny.pad(rows) | {"inputs_embeds": torch.zeros(len(rows), 3, 16)}  # noqa: E731
    with pytest.raises(ValueError, match="one with inputs_embeds"):
        ServerTeacher("http://h:1", "m", timeout=1.0, retries=0, concurrency=1).for_student(
            tiny.models("causal_lm")[0], over_tokens=True
        ).inputs(pad(ROWS[:2]))
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="expected None for the task 'masked_lm'"):
        trainer(tmp_path / "masked", server, kd_run="cache", student=config_run.distilbert(16)).train()


# ---- secrets ----


def test_the_key_is_sent_and_neither_kept_nor_shown(server, tmp_path, monkeypatch, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    server.key, shown = KEY, []
    for key in (None, "wrong-" + KEY):
        if key is not None:
            monkeypatch.setenv(API_KEY, key)
        with pytest.raises(ValueError, match=f"HTTP 401 .*Set the environment variable {API_KEY}") as error:
            trainer(tmp_path, server, kd_run="cache").train()
        shown.append(str(error.value))
    monkeypatch.setenv(API_KEY, KEY)
    server.faults = {6: _status(500, f"bad {KEY}"), 9: _status(400, f"worse {KEY}")}
    with pytest.raises(ValueError, match=r"HTTP 400 .*worse <hidden>") as error:
        trainer(tmp_path, server, kd_run="cache").train()
    server.faults = {}
    fill(tmp_path, server)
    run = trainer(tmp_path, server)
    run.train()
    run.save_model()
    shown += [str(error.value), repr(run.args), run.args.to_json_string(), caplog.text, *capfd.readouterr()]
    assert not [text for text in shown if KEY in text]
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()]
    assert server.seen[-1]["Authorization"] == f"Bearer {KEY}"
    assert os.environ[API_KEY] == KEY


def test_a_password_in_the_url_is_refused_unshown():
    with pytest.raises(
        ValueError, match=r"'http://<hidden>@h:1/v1'.*environment variable KD_TEACHER_SERVER_API_KEY"
    ) as error:
        DistillationArguments(**{**SERVED, "teacher_server_url": f"http://me:{KEY}@h:1/v1"})
    assert KEY not in str(error.value)
    with pytest.raises(ValueError, match="host, port and path alone") as error:
        DistillationArguments(**{**SERVED, "teacher_server_url": f"http://h:1/v1?q={KEY}"})
    assert KEY not in str(error.value)
