"""The task `embedding`: one vector for a row, pooled of the last hidden state, compared with the teacher's.

For: `kinds.py`, whose table lists it. Formulas stand in `losses/features.py`, the files of sentence-transformers in
`sentence_folder.py`.
Shapes: B rows, S positions, H numbers of a hidden state or an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from ..losses import EMBEDDING_LOSSES, SoftTargetLoss, cosine_loss, normalised
from ..validation import fail
from .inputs import takes_features
from .logits import logits_of
from .sentence_folder import (
    EMBEDDING,
    SentenceEncoder,
    SentenceFolder,
    embeddings_of,
    read_sentence_folder,
    sentence_encoder,
    sentence_folder_of,
    width_of,
    write_sentence_folder,
)
from .task import Task

PROJECTED = "projected_embedding"  # beside the embedding in the outputs: in the teacher's width
PROJECTOR = "embedding"  # its name in the student's `kd_projectors`
_TERMS = {"cosine": "1 - cosine", "mse": "squared error"}


@dataclass(frozen=True)
class EmbeddingTask(Task):
    """Embeddings [B, H]: soft loss of a row 1 - cosine, or mean over H of the squared error. There is no hard loss.

    Args:
        pooling: how the student's last hidden state becomes an embedding; normalises: whether to length 1.
        loss: a name of `EMBEDDING_LOSSES`.
        folder: the sentence-transformers folder that the student came from; None: another model.
    """

    pooling: str = field(default="mean", kw_only=True)
    normalises: bool = field(default=False, kw_only=True)
    loss: str = field(default="cosine", kw_only=True)
    folder: SentenceFolder | None = field(default=None, kw_only=True, compare=False, repr=False)

    softmax: ClassVar[bool] = False
    tempered: ClassVar[bool] = False
    has_hard_loss: ClassVar[bool] = False
    embeds: ClassVar[bool] = True
    mixed_as: ClassVar[str] = ""
    agreement_name: ClassVar[str] = "teacher_cosine"
    unread_weights: ClassVar[tuple[str, ...]] = ("pooler.",)

    def with_settings(self, kd: Any, student: nn.Module, teacher_pooling: str | None) -> EmbeddingTask:
        """The task with the pooling and the loss of the arguments, of the student's folder, or of the teacher.

        Args:
            kd: the distillation arguments. teacher_pooling: None where the teacher has none that is known.
        """
        if takes_features(student):
            if kd.kd_pooling is not None:
                because = "its own Pooling module makes the embeddings"
                expected = "None for a student that is a SentenceTransformer"
                fail("kd_pooling", repr(kd.kd_pooling), expected, "Leave it out.", because=because)
            return replace(self, pooling="", loss=kd.kd_embedding_loss)
        folder = sentence_folder_of(student)
        if folder is not None and folder.has_weights:
            shown = f"the transformer of {folder.path!r}, which has a Dense module after its pooling"
            fix = "Give the student as SentenceTransformer(path)."
            because = "the saved student would have a layer that was not trained with it"
            fail("model", shown, "a model without further layers", fix, because=because)
        pooling = kd.kd_pooling or (folder.pooling if folder else None) or teacher_pooling or "mean"
        normalises = folder is not None and folder.normalises
        return replace(self, pooling=pooling, normalises=normalises, loss=kd.kd_embedding_loss, folder=folder)

    def projected(self, student: Any, teacher: Any) -> tuple[int, int] | None:
        live, manifest = teacher.model, teacher.manifest
        widths = width_of(student), width_of(live) if manifest is None else int(manifest["vocabulary"])
        if None in widths or widths[0] == widths[1]:
            return None
        if takes_features(student):
            shown = f"a SentenceTransformer with embeddings of {widths[0]} numbers"
            fix = "Add a Dense module to that width, which is saved with it. Or give its transformer as the student."
            because = "each of its modules is a part of its forward"
            fail("model", shown, f"{widths[1]}, as the teacher", fix, because=because)
        return cast(tuple[int, int], widths)

    def notes(self, student: Any, teacher: Any) -> list[str]:
        """How the student's embeddings are made, and compared."""
        length = ", normalised" if self.normalises else ""
        notes = [f"{self.pooling} pooling of the student's last hidden state{length}"] if self.pooling else []
        widths = None if teacher is None else self.projected(student, teacher)
        if widths is not None:
            line = "a projector from {} numbers to the teacher's {} is trained, and not saved with the student"
            notes.append(line.format(*widths))
        return notes

    def teacher_folder(self, path: str, init_kwargs: Mapping[str, Any]) -> SentenceFolder | None:
        return read_sentence_folder(path, init_kwargs)

    def teacher_module(self, teacher: nn.Module, folder: SentenceFolder | None = None) -> nn.Module:
        """The teacher with its pooling in its forward: of its sentence-transformers folder, or else the student's."""
        if takes_features(teacher):
            return SentenceEncoder(teacher, None)
        folder = folder or sentence_folder_of(teacher)
        return SentenceEncoder(teacher, self.pooling or "mean") if folder is None else sentence_encoder(teacher, folder)

    def set_teacher(self, teacher: Any) -> None:
        if self.pooling and getattr(teacher, "pooling_of_run", False) and teacher.pooling is not None:
            teacher.pooling = self.pooling

    def teacher_settings(self, teacher: Any) -> dict[str, Any]:
        if teacher.pooling is None:  # its outputs are pooled by modules of its own
            return {}
        return {"pooling": teacher.pooling, "pooling_of_run": teacher.pooling_of_run}

    def save(self, student: nn.Module, output_dir: str) -> None:
        """As a sentence-transformers folder, where the student is of that library or came from such a folder."""
        if takes_features(student):
            student.save_pretrained(output_dir, create_model_card=False)  # type: ignore[operator]
        elif self.folder is not None:
            write_sentence_folder(output_dir, self.folder, self.pooling, cast(int, width_of(student)))

    def load(self, student: nn.Module, folder: str) -> bool:
        if not takes_features(student):
            return False
        saved: Any = type(student)(folder, device="cpu")
        student.load_state_dict(saved.state_dict())
        return True

    @contextmanager
    def pooled(self, student: nn.Module) -> Iterator[None]:
        """Inside, the student's forward returns {"sentence_embedding": [B, H]} alone.

        Inside of the wrapped forward, so that a projector and the unused pooler of a BERT are known to every backend:
        DDP takes for used what the outputs are made of.
        """
        handles = [student.register_forward_hook(self._pool_outputs, with_kwargs=True, prepend=True)]
        if takes_features(student):
            handles.append(student.register_forward_pre_hook(_columns_as_features, with_kwargs=True, prepend=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _pool_outputs(self, student: nn.Module, args: Any, columns: dict[str, Any], outputs: Any) -> dict[str, Tensor]:
        embeddings = embeddings_of(outputs, columns, self.pooling, "model")
        pooled = {EMBEDDING: normalised(embeddings) if self.normalises else embeddings}
        projectors = getattr(student, "kd_projectors", {})
        if PROJECTOR in projectors:
            projector = projectors[PROJECTOR]
            pooled[PROJECTED] = projector(pooled[EMBEDDING].to(projector.weight.dtype))
        return pooled

    def logits(self, outputs: Any, argument: str) -> Tensor:
        """The embeddings [B, H] in pooled outputs; of a student a projection, which is taken out as no prediction.

        A hook of the user's own may have made a tuple of them.
        """
        if not isinstance(outputs, MutableMapping):
            return logits_of(outputs, argument, self.wanted)
        return outputs.pop(PROJECTED, outputs[EMBEDDING])

    def soft_term(self, divergence: str) -> str:
        return _TERMS[self.loss]

    def targets(self, inputs: Mapping[str, Any]) -> None:
        """None: labels have no part in the loss."""
        return None

    def soft_loss_sum(
        self, soft_loss: SoftTargetLoss, student: Tensor, teacher: Tensor, targets: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        return EMBEDDING_LOSSES[self.loss](student, teacher).sum()

    def agreement_sum(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """The sum of the cosines."""
        return (1 - cosine_loss(student.detach(), teacher)).sum()

    def check_shapes(
        self, student: Tensor, teacher: Tensor | None, targets: Tensor | None, common_ids: int | None = None
    ) -> None:
        for argument, embeddings in (("model", student), ("teacher_model", teacher)):
            if embeddings is not None and embeddings.dim() != 2:
                fix = "Let its forward return one vector for each row."
                fail(argument, f"giving embeddings of shape {tuple(embeddings.shape)}", "[batch, width]", fix)
        if teacher is not None and teacher.shape != student.shape:
            shown = f"giving embeddings of shape {tuple(teacher.shape)}"
            fix = "Give models with a config that holds the width, or a student with a layer of its own to that width."
            because = "no projector could be made before the first batch"
            fail("teacher_model", shown, f"the student's shape {tuple(student.shape)}", fix, because=because)


def _columns_as_features(student: nn.Module, args: tuple[Any, ...], columns: dict[str, Any]) -> Any:
    """For a `SentenceTransformer`, which takes one dict; a call that gives it is left as it is."""
    return None if args or "input" in columns else ((columns,), {})
