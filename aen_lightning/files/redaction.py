"""Secrets are taken out of whatever is written: access tokens, passwords, cloud keys, signatures of URLs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REMOVED = "(removed)"

_SECRET_KEY = re.compile(
    r"""(^|_) (
        token | api_?key | access_?key(_id)? | account_?key | private_?key | secret_?key | shared_?key |
        secret | client_?secret | password | passwd | passphrase | pwd | credentials? | authorization | bearer |
        cookie | connection_?string | signing_?key
    ) $""",
    re.IGNORECASE | re.VERBOSE,
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
# a token of a text, not of a login
_VOCABULARY = re.compile(r"(^|_)(bos|eos|sep|pad|unk|cls|mask|separator|special|start|end|stop)_token$")
_SECRET_VALUE = re.compile(
    r"""
    \b hf_[A-Za-z0-9]{16,} | \b api_org_[A-Za-z0-9]{16,} |               # Hugging Face
    \b sk-(?:[a-z]{2,8}-)?[A-Za-z0-9_]{16,} | \b gh[pousr]_[A-Za-z0-9]{16,} | \b github_pat_[A-Za-z0-9_]{20,} |
    \b glpat-[A-Za-z0-9_\-]{16,} | \b xox[abeoprs]-[A-Za-z0-9\-]{10,} |
    \b (?:AKIA|ASIA)[A-Z0-9]{16} \b | \b AIza[A-Za-z0-9_\-]{35} | \b ya29\.[A-Za-z0-9_\-.]{20,} |  # clouds
    \b AccountKey=[A-Za-z0-9+/=]{16,} |
    \b eyJ[A-Za-z0-9_\-]{8,}\.eyJ[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]* |  # a JSON web token
    \b (?:Bearer|Basic)\s+[A-Za-z0-9+/._~\-]{16,}=* |
    -----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY----- [\s\S]* (?:-----END[ ][A-Z ]*PRIVATE[ ]KEY-----|$)
    """,
    re.VERBOSE,
)
_LOGIN = re.compile(r"(?<=://)[^/\s@'\"]+@")
# the part of a URL behind the path, if something in it signs or opens the URL
_SIGNED_QUERY = re.compile(
    r"""(?<= [^\s'"?] ) \? (?= [^\s'"]* (?<= [?&] ) (?:
        x-amz-(?:signature|credential|security-token) | x-goog-(?:signature|credential) | awsaccesskeyid |
        signature | sig | key-pair-id | policy | (?:\w*_)? token | (?:\w*[_\-])? api_?key | key | password | secret
    ) = ) [^\s'"]*""",
    re.IGNORECASE | re.VERBOSE,
)


def is_secret_key(key: str) -> bool:
    """Whether what stands under this key is a secret by its name: ``token``, ``api_key``, ``password``, ..."""
    snake = re.sub(r"[-. ]", "_", _CAMEL.sub("_", key)).lower()
    return _SECRET_KEY.search(snake) is not None and _VOCABULARY.search(snake) is None


def without_secrets_in(text: str) -> str:
    """A text with every access token, password in a URL and signature of a URL taken out."""
    text = _SIGNED_QUERY.sub("", text)
    return _SECRET_VALUE.sub(REMOVED, _LOGIN.sub(f"{REMOVED}@", text))


def without_secrets(value: Any) -> Any:
    """A copy of plain data without secrets.

    Entries whose key names a secret are left out if they hold text, alone or in lists and mappings; numbers,
    flags and None stay (``token: true`` says only that a login is used). In all other text, access tokens,
    passwords in URLs and signatures of URLs are replaced by ``(removed)`` or cut off. Keys come back as text,
    and all else that holds no secret as it is.
    """
    if isinstance(value, Mapping):
        return {
            without_secrets_in(str(k)): without_secrets(v)
            for k, v in value.items()
            if not (is_secret_key(str(k)) and _holds_text(v))
        }
    if isinstance(value, tuple):
        return tuple(without_secrets(v) for v in value)
    if isinstance(value, list | set | frozenset):
        return type(value)(without_secrets(v) for v in value)
    if isinstance(value, str | Path):
        text = without_secrets_in(str(value))
        return value if text == str(value) else text
    return value


def _holds_text(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_text, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return any(map(_holds_text, value))
    return isinstance(value, str | bytes | Path)


_KEY_AND_VALUE = re.compile(
    r"""(?P<key> [\w.\-]+ ) (?P<between> ["']? \s* [:=] [ \t]* )
        (?P<value> "(?:[^"\\\n]|\\.)*" | '[^'\n]*' | (?![|>&*{\["'#]) [^\s,}\]"'][^\n,}\]]* )""",
    re.VERBOSE,
)
_NO_SECRET = ("null", "none", "~", "true", "false", "")


def without_secrets_in_config(text: str) -> str:
    """A config as text, its comments and order kept, without secrets; lines of YAML, JSON or ``key = value``."""

    def redact(match: re.Match[str]) -> str:
        value = match["value"].strip().strip("\"'")
        plain = value.lower() in _NO_SECRET or re.fullmatch(r"[+-]?[\d._]+", value)
        if plain or not is_secret_key(match["key"]):
            return match[0]
        return f"{match['key']}{match['between']}{REMOVED}"

    return without_secrets_in(_KEY_AND_VALUE.sub(redact, text))
