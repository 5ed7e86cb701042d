"""Nothing that opens an account stands in what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aen_lightning.files.redaction import without_secrets, without_secrets_in, without_secrets_in_config

HF = "hf_" + "aB3" * 8
SIGNED = "https://bucket.s3.amazonaws.com/a/b.parquet?X-Amz-Expires=9&X-Amz-Signature=deadbeef"


@pytest.mark.parametrize(
    "secret",
    [
        HF, "sk-" + "a1" * 12, "ghp_" + "x" * 30, "github_pat_" + "x" * 30, "glpat-" + "x" * 20,
        "AKIA" + "ABCDEFGHIJKLMNOP", "AIza" + "x" * 35, "xoxb-" + "1" * 12, f"eyJ{'a' * 10}.eyJ{'b' * 10}.c",
        "Bearer " + "z" * 24, "AccountKey=" + "q" * 40,
        "-----BEGIN RSA PRIVATE KEY-----\nMIIabc\n-----END RSA PRIVATE KEY-----",
    ],
)  # fmt: skip
def test_what_looks_like_a_key_is_taken_out_wherever_it_stands(secret: str):
    wrapped: dict[str, Any] = {"a": [{"b": (secret, f"--login={secret} x")}], secret: 1}
    assert secret.split()[-1] not in str(without_secrets(wrapped))
    assert without_secrets_in(f"x {secret}") == "x (removed)"


def test_a_secret_under_its_name_is_left_out_whatever_it_looks_like():
    names = ("token", "hf_token", "use_auth_token", "apiKey", "AWS_SECRET_ACCESS_KEY", "password", "client_secret",
             "Authorization", "credentials", "aws_session_token", "connection_string", "access-key")  # fmt: skip
    for name in names:
        for value in ("abc", ["abc"], {"value": "abc"}, Path("abc")):
            assert without_secrets({name: value, "n": 1}) == {"n": 1}


def test_words_of_a_vocabulary_numbers_and_flags_stay():
    plain = {"n_tokens": 5, "max_tokens": "8", "token": True, "password": None, "bos_token": "<s>",
             "sequence_separator_token": "eos", "monkey": "a", "tokens": ["the", "cat"], "secretary": "b"}  # fmt: skip
    assert without_secrets(plain) == plain


def test_urls_keep_their_place_and_lose_what_opens_them():
    assert without_secrets_in(f"see {SIGNED}, or") == "see https://bucket.s3.amazonaws.com/a/b.parquet or"
    assert without_secrets_in("https://me:pw@host/x") == "https://(removed)@host/x"
    azure = "https://a.blob.core.windows.net/c/f.txt?sv=2022&sp=r&sig=abc%3D"
    assert without_secrets([azure]) == ["https://a.blob.core.windows.net/c/f.txt"]
    assert without_secrets_in("https://host/x?page=2&sort=token") == "https://host/x?page=2&sort=token"
    assert without_secrets_in("a/b?c and sig=1") == "a/b?c and sig=1"
    assert without_secrets((None, Path("/a/b"), {3})) == (None, Path("/a/b"), {3})


def test_a_config_keeps_all_but_its_secrets():
    text = (
        f"# lightning\nmodel:\n  lr: 0.1 # fast\n  kwargs: {{token: letmein, device_map: auto, x: [{HF}]}}\n"
        'data:\n  password: "a b"\n  token: null\n  sequence_separator_token: eos\n'
    )
    found = without_secrets_in_config(text)
    assert found == (
        "# lightning\nmodel:\n  lr: 0.1 # fast\n  kwargs: {token: (removed), device_map: auto, x: [(removed)]}\n"
        "data:\n  password: (removed)\n  token: null\n  sequence_separator_token: eos\n"
    )
