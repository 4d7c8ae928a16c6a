"""Secrets are left out of what is kept, shown or sent: passwords and signatures in URLs."""

import re
from collections.abc import Callable
from typing import Any

REDACTED = "REDACTED"
# USER:PASSWORD@ behind the scheme, also with signs in it that belong escaped; a colon and a number are a port. A Path makes
# one slash of two.
_USER = re.compile(r"(:/{1,2})(?:[^\s/?#\"']+|[^\s/?#\"'@]+:(?!\d+[/?#])[^\s\"']*)@")
# What follows a question mark, but for the sentence's own signs. In an object store a mark without an = is a wildcard.
_END = r"(?=[:,;)\]]*(?:[\s\"'<>]|$))"
_WEB_QUERY = re.compile(rf"(?i)(\bhttps?:/{{1,2}}[^\s?\"'<>]*\?)[^\s\"'<>]+?{_END}")
_QUERY = re.compile(rf"(:/{{1,2}}[^\s?\"'<>]*\?)[^\s\"'<>]*=[^\s\"'<>]*?{_END}")
_FOLDERS = re.compile(r"(?<![\w:/.~}*])(?:file://)?~?/(?:[^/\s\"']+/)*")  # of an absolute path, within a command


def redact(text: str) -> str:
    """The text without the secrets of the URLs in it."""
    text = _USER.sub(rf"\1{REDACTED}@", text)
    for query in (_WEB_QUERY, _QUERY):
        text = query.sub(rf"\1{REDACTED}", text)
    return text


def redacted(value: Any) -> Any:
    """What JSON holds, with every text in it redacted."""
    return _each_text(value, redact)


def shareable(value: Any) -> Any:
    """As `redacted`, and without the folders of absolute paths, which tell of a machine and its users."""
    return _each_text(value, lambda text: _without_folders(redact(text)))


def is_redacted(text: str) -> bool:
    """Whether secrets were left out of a URL in it."""
    return bool(re.search(rf":/{{1,2}}(\S*\?)?{REDACTED}", text))


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _each_text(each, change) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_each_text(each, change) for each in value]
    return value


def _without_folders(text: str) -> str:
    if text.startswith(("/", "~")):
        return text.rstrip("/").rpartition("/")[2]
    return _FOLDERS.sub("", text)
