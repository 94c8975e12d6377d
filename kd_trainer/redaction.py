"""Secrets (tokens, keys, passwords) removed from values before they reach a file, log, card or message."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

HIDDEN = "<hidden>"

_WORDS = frozenset({"password", "passwd", "passphrase", "pwd", "secret", "secrets"})
_WORDS |= {"credential", "credentials", "authorization", "cookie"}
_KEYS_OF = frozenset({"api", "access", "private", "secret", "auth", "account", "encryption", "ssh", "signing"})
_KEYS_OF |= {"subscription"}
# Words of a tokenizer's special tokens, which are no secrets.
_OF_TEXT = frozenset({"bos", "eos", "pad", "unk", "sep", "cls", "mask", "image", "audio", "video", "start", "end"})
_OF_TEXT |= {"prefix", "suffix", "special", "boi", "eoi"}

_VALUES = re.compile(
    r"(?<![\w/\\.-])(?:(?:hf|api_org)_[A-Za-z0-9_-]{6,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}"
    r"|github_pat_\w{16,}|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)(?![\w/\\])"
)
_IN_URL = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
_BEARER = re.compile(r"(?i)\b(bearer) +[A-Za-z0-9._~+/-]{12,}=*")
_NAMED = re.compile(
    r"""(?ix) (?<![\w-])
    (?P<name>["']?(?:\w+[_-])*(?:token|key|password|passwd|passphrase|pwd|secret|apikey|authorization|credentials?)
    ["']? \s*[:=]\s*)
    (?P<value>"[^"]*"? | '[^']*'? | (?<==)(?!True\b|False\b|None\b|null\b)[^\s&"',;)}\]]+)"""
)


def is_secret_name(name: Any) -> bool:
    """Whether a value of this name is a secret: `token`, `hf_token`, `api_key`, `password` and the like."""
    if not isinstance(name, str):
        return False
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.strip("-'\" ")).lower()
    words = [word for word in re.split(r"[^a-z0-9]+", spaced) if word]
    if not words:
        return False
    if words[-1] in ("token", "authtoken", "accesstoken", "apitoken", "hftoken"):
        return not _OF_TEXT.intersection(words)
    if words[-1] in ("key", "keys"):
        return bool(_KEYS_OF.intersection(words))
    return words == ["auth"] or "apikey" in words or bool(_WORDS.intersection(words))


def scrub(text: str, secrets: Collection[str] = ()) -> str:
    """The text with everything that looks like a secret replaced: hub tokens, user names in URLs, `password=...`.

    Args:
        secrets: known secrets, see `secrets_in`.
    """
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _IN_URL.sub(HIDDEN, _VALUES.sub(HIDDEN, text))
    text = _BEARER.sub(lambda found: f"{found[1]} {HIDDEN}", text)

    def named(found: re.Match) -> str:
        if not is_secret_name(found["name"].strip().rstrip(":=").strip()):
            return found[0]
        quote = found["value"][0] if found["value"][0] in "\"'" else ""
        return found["name"] + quote + HIDDEN + quote

    return _NAMED.sub(named, text)


def hidden(value: Any, name: Any = None) -> Any:
    """The value (called `name`, if given) with every secret in it replaced, at any depth; other objects unchanged."""
    if is_secret_name(name) and not (value is None or isinstance(value, bool) or value == ""):
        return HIDDEN
    if isinstance(value, str):
        cleaned = scrub(value)
        return value if cleaned == value else cleaned  # a subclass of str stays one
    if isinstance(value, bytes):
        text = value.decode("latin-1")
        return value if scrub(text) == text else HIDDEN
    if isinstance(value, Mapping):
        return {key: hidden(each, key) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        names = [None, *(each if isinstance(each, str) and each.startswith("--") else None for each in value)]
        shown = [
            hidden(each, key) for key, each in zip(names, value, strict=False)
        ]  # also for the words of a command line
        return shown if isinstance(value, list) else tuple(shown)
    if isinstance(value, (set, frozenset)):
        return {hidden(each) for each in value}
    return value


def secrets_in(value: Any, name: Any = None) -> Iterator[str]:
    """The texts that `hidden` replaces because of their names, at any depth."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from secrets_in(each, key if name is None or is_secret_name(key) else name)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for each in value:
            yield from secrets_in(each, name)
    elif isinstance(value, str) and len(value) >= 4 and is_secret_name(name):
        yield value


class SecretiveDict(dict):
    """A dict whose repr and pickle hold no secrets; the values themselves are kept, also in a copy."""

    def __repr__(self) -> str:
        return repr(hidden(dict(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (hidden(dict(self)),)

    def __copy__(self) -> SecretiveDict:
        return SecretiveDict(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> SecretiveDict:
        return SecretiveDict({key: copy.deepcopy(each, memo) for key, each in self.items()})
