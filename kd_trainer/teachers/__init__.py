"""Who provides the teacher's distribution: loading, sharding, running a teacher, and whether it fits the student."""

from .adapter_off import AdapterOffTeacher, adapter_modules, adapter_parameters
from .alignment import align_teacher_tokens
from .columns import NO_CHUNK, TeacherCollator, add_teacher_inputs, of_next, predicts_teacher_token
from .compatibility import Classes, class_names, class_order, listed, match_classes, tokenizer_of
from .errors import check_ids, check_padding, positions_of
from .live import ADAPTER_OFF, LiveTeacher
from .load import load_teacher
from .outputs import COLUMN_PREFIX, Sparse, TeacherOutput, TokenLogProbs
from .routes import Routes
from .several import (
    SeveralTeachers,
    cache_prefix,
    check_mixed,
    columns_of,
    keys_of,
    labels_of,
    mixed_hidden,
    naming,
    routed,
)
from .sharding import HALVES, layer_classes, reshard
from .shared_memory import check_separate, watch_shared_buffers
from .students import student_from_teacher
from .teacher import Teacher

__all__ = [
    "ADAPTER_OFF",
    "COLUMN_PREFIX",
    "HALVES",
    "NO_CHUNK",
    "AdapterOffTeacher",
    "Classes",
    "LiveTeacher",
    "Routes",
    "SeveralTeachers",
    "Sparse",
    "Teacher",
    "TeacherCollator",
    "TeacherOutput",
    "TokenLogProbs",
    "adapter_modules",
    "adapter_parameters",
    "add_teacher_inputs",
    "align_teacher_tokens",
    "cache_prefix",
    "check_ids",
    "check_mixed",
    "check_padding",
    "check_separate",
    "class_names",
    "class_order",
    "columns_of",
    "keys_of",
    "labels_of",
    "layer_classes",
    "listed",
    "load_teacher",
    "match_classes",
    "mixed_hidden",
    "naming",
    "of_next",
    "positions_of",
    "predicts_teacher_token",
    "reshard",
    "routed",
    "student_from_teacher",
    "tokenizer_of",
    "watch_shared_buffers",
]
