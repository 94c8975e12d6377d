"""`ServerReader`: the outputs of a `ServerTeacher` for the batches of a cache, many rows at once and in order.

For: `build.py`, where it stands beside `TeacherReader`. Letters: B rows, S positions, N kept positions, V classes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..losses import TopK
from ..tasks import Task, classes_of
from ..teachers import tokenizer_of
from ..validation import fail
from .formats import Format, put, room_for
from .server import ServerTeacher
from .server_rows import PromptRow, fail_packed, prompt_rows
from .signed_collator import SignedBatch
from .store import Rows
from .teacher_reader import Dimensions


class ServerReader:
    """Fetches the outputs of a teacher behind a server at the kept positions of batches.

    Args:
        student: its output layer has the vocabulary.
        processing_class: its tokens are compared with the server's; None: they are not.
        k: classes to keep; at most V - 1 are, whose rest is the last class.

    Raises:
        ValueError: the task is not causal_lm, or the size of the vocabulary is unknown.
    """

    output_head: None = None

    def __init__(self, teacher: ServerTeacher, task: Task, student: nn.Module, processing_class: Any, k: int) -> None:
        self.teacher, self.task, self._tokenizer = teacher, task, tokenizer_of(processing_class)
        if not task.left_to_right:
            expected = f"None for the task {task.name!r}: prompt_logprobs are of causal language models"
            fix = "Run the teacher itself (teacher_model_name_or_path)."
            fail("teacher_server_url", repr(teacher.url), expected, fix)
        classes = classes_of(student, task) or (None if self._tokenizer is None else len(self._tokenizer))
        if classes is None:
            shown, fix = f"a {type(student).__name__} whose vocabulary has no known size", "Pass processing_class."
            fail("model", shown, "a model with an output layer over tokens", fix)
        self.classes, self.k = classes, min(k, classes - 1)
        self._pool = ThreadPoolExecutor(teacher.concurrency)
        self._ahead: deque[list[Future[TopK]]] = deque()  # of the batches that `in_order` has yet to return

    def dimensions(self, inputs: Mapping[str, Any], mask: Tensor) -> Dimensions:
        """The student's vocabulary; probes the server with a row of the batch."""
        row = next((row for row in prompt_rows(inputs, mask) if row.kept), None)
        row = row or PromptRow(inputs["input_ids"][0, :2].tolist(), [0])
        self.teacher.probe(row, self.k, self.classes, self._tokenizer)
        return Dimensions([self.classes], "float32")

    def logits(self, inputs: Mapping[str, Any], mask: Tensor) -> NoReturn:
        """Raises ValueError: logits are needed where rows are packed, see `check_packed_rows`."""
        fail_packed()

    def columns(self, kept: Format, inputs: Mapping[str, Any], mask: Tensor, uniform: Tensor) -> dict[str, Tensor]:
        """The columns of the format for a batch: the next one of `in_order`, or one that is requested now."""
        requests = self._ahead.popleft() if self._ahead else self._request(inputs, mask)
        found = [request.result() for request in requests]
        columns = room_for(kept, sum(len(each.ids) for each in found), torch.empty(0, kept.classes))
        if found:
            put(TopK(*map(torch.cat, zip(*found, strict=True))), columns)
        return columns

    def _request(self, inputs: Mapping[str, Any], mask: Tensor) -> list[Future[TopK]]:
        rows = [row for row in prompt_rows(inputs, mask) if row.kept]
        return [self._pool.submit(self.teacher.fetch, row, self.k, self.classes) for row in rows]

    def in_order(
        self, batches: Iterable[tuple[int, SignedBatch]], rows_of: Callable[[SignedBatch], Rows]
    ) -> Iterator[tuple[int, Callable[[], Rows]]]:
        """(shard, what returns the rows) of each batch in their order, with `concurrency` requests under way."""
        waiting: deque[tuple[int, Callable[[], Rows]]] = deque()
        for index, signed in batches:
            waiting.append((index, partial(rows_of, signed)))
            self._ahead.append(self._request(signed.batch, signed.mask))
            # Twice the concurrency: when a request ends, the next one is there.
            while sum(map(len, self._ahead)) > 2 * self.teacher.concurrency:
                yield waiting.popleft()
        yield from waiting
