"""Teacher outputs on disk: formats, files, reading, building."""

from .build import Reader, build_shards, encode_batch, translate_os_errors
from .cached_teacher import EVAL, TEST, TRAIN, CachedTeacher, as_cached_teacher, check_tokens_kept, open_part, part_of
from .collator import CachedCollator
from .formats import DTYPES, FORMATS, TOKEN_LOG_PROBS, card, format_of, outputs_differ
from .identity import mixture_identity, teacher_identity, tokenizer_identity
from .manifest import CacheError, check_links, check_settings, head_of
from .server import ServerTeacher, as_server_teacher, check_server_settings
from .server_reader import ServerReader
from .settings import (
    compare_settings,
    compute_precision,
    consecutive_rows,
    data_and_collator,
    known_by_position,
    labels_of,
    sample_rows,
    settings_of,
)
from .signed_collator import NumberedRows, SignedBatch, SignedCollator, signed_collator_of, with_row_ids
from .store import (
    BUILDING,
    DATA,
    HEAD,
    Rows,
    Store,
    begin,
    clean,
    finish,
    first_rows,
    is_finished,
    read_manifest,
    reopen,
    written_shards,
)
from .teacher_reader import TeacherReader

__all__ = [
    "BUILDING",
    "DATA",
    "DTYPES",
    "EVAL",
    "FORMATS",
    "HEAD",
    "TEST",
    "TOKEN_LOG_PROBS",
    "TRAIN",
    "CacheError",
    "CachedCollator",
    "CachedTeacher",
    "NumberedRows",
    "Reader",
    "Rows",
    "ServerReader",
    "ServerTeacher",
    "SignedBatch",
    "SignedCollator",
    "Store",
    "TeacherReader",
    "as_cached_teacher",
    "as_server_teacher",
    "begin",
    "build_shards",
    "card",
    "check_links",
    "check_server_settings",
    "check_settings",
    "check_tokens_kept",
    "clean",
    "compare_settings",
    "compute_precision",
    "consecutive_rows",
    "data_and_collator",
    "encode_batch",
    "finish",
    "first_rows",
    "format_of",
    "head_of",
    "is_finished",
    "known_by_position",
    "labels_of",
    "mixture_identity",
    "open_part",
    "outputs_differ",
    "part_of",
    "read_manifest",
    "reopen",
    "sample_rows",
    "settings_of",
    "signed_collator_of",
    "teacher_identity",
    "tokenizer_identity",
    "translate_os_errors",
    "with_row_ids",
    "written_shards",
]
