"""Teacher outputs on disk: format, store, reading, building."""

from .asking import TeacherReader
from .build import ask, build_shards, translate_os_errors
from .cached_teacher import EVAL, TEST, TRAIN, CachedTeacher, given_cache, open_part, part_of
from .collator import CachedCollator
from .formats import DTYPES, FORMATS, card, far_apart, format_of
from .identity import teacher_identity, tokenizer_identity
from .manifest import CacheError, check_links, check_settings, head_of
from .reading import NumberedRows, Read, Reading, numbered, reading_of
from .settings import (
    as_read,
    class_names,
    compare_settings,
    computed,
    features_of,
    known_by_position,
    rows_of,
    settings_of,
)
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

__all__ = [
    "BUILDING",
    "DATA",
    "DTYPES",
    "EVAL",
    "FORMATS",
    "HEAD",
    "TEST",
    "TRAIN",
    "CacheError",
    "CachedCollator",
    "CachedTeacher",
    "NumberedRows",
    "Read",
    "Reading",
    "Rows",
    "Store",
    "TeacherReader",
    "as_read",
    "ask",
    "begin",
    "build_shards",
    "card",
    "check_links",
    "check_settings",
    "class_names",
    "clean",
    "compare_settings",
    "computed",
    "far_apart",
    "features_of",
    "finish",
    "first_rows",
    "format_of",
    "given_cache",
    "head_of",
    "is_finished",
    "known_by_position",
    "numbered",
    "open_part",
    "part_of",
    "read_manifest",
    "reading_of",
    "reopen",
    "rows_of",
    "settings_of",
    "teacher_identity",
    "tokenizer_identity",
    "translate_os_errors",
    "written_shards",
]
