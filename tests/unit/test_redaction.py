"""What is taken out before anything is written: credentials and nothing like them, and a deployment's own."""

import dataclasses
import json
import time

import numpy as np
import pytest

from clawrl.config import PrivacySection
from clawrl.errors import ConfigError
from clawrl.serving.redaction import DEFAULT, REDACTED, Redactor
from clawrl.serving.sessions import digest
from clawrl.testing import ScriptedPolicy
from clawrl.types import NOT_KEPT, Feedback, NextState

A20, A36, A40 = "a1B2" * 5, "a1B2" * 9, "a1B2" * 10
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nIBAAKC\n-----END RSA PRIVATE KEY-----"
SECRETS = {
    "openai": f"sk-{A40}",
    "openai project": f"sk-proj-{A20}_{A20}-x",
    "anthropic": f"sk-ant-api03-{A40}",
    "github": f"ghp_{A36}",
    "github app": f"ghs_{A36}",
    "github fine-grained": f"github_pat_11{A20}_{A40}",
    "slack": "xoxb-" + "123456789012-" + A20,  # in two, so that scanners of this repository stay calm
    "aws": "AKIA" + "IOSFODNN7EXAMPLE",
    "aws session": "ASIA" + "IOSFODNN7EXAMPLE",
    "google": "AIza" + "Sy" + "a1-_" * 8 + "b",
    "hugging face": f"hf_{A36}",
    "private key": PEM,
    "openssh key": PEM.replace("RSA", "OPENSSH"),
    "pgp key": PEM.replace("RSA PRIVATE KEY", "PGP PRIVATE KEY BLOCK"),
    "bearer": f"Bearer {A20}==",
    "bearer, small": f"bearer {A20}.{A20}",
    "json web token": f"eyJ{A20}.eyJ{A20}.{A20}",
}
INNOCENT = {
    "a word with sk-": "sk-learn and scikit-learn",
    "a long word with sk-": "sk-learn-compatible-estimators-everywhere",
    "a long word with sk- and a number after it": "sk-learn-compatible-estimators-everywhere/2.0",
    "sk- within a word": f"task-{A20} risk-{A20}",
    "short sk-": "sk-abc123",
    "short ghp_": "ghp_" + "a1B2" * 8,
    "a variable": "hf_token = hf_hub_download(repo_id, filename)",
    "xox": "xoxo, xoxb-something",
    "small letters after AKIA": "AKIAiosfodnn7example",
    "AKIA of another length": "AKIAIOSFODNN7EXAMPLES" + "AKIAIOSFODNN7",
    "AIza of another length": "AIza" + "a" * 34,
    "public key": PEM.replace("PRIVATE", "PUBLIC"),
    "bearer of news": "the bearer of extraordinarily good news",
    "bearer of a long word": "Bearer responsibilities-of-the-office",
    "eyJ": "eyJhbGciOi is how a token begins",
    "a version": "eyJ1.2.3",
    "sha and uuid": "9b74c9897bac770ffc029102a200c5de 123e4567-e89b-12d3-a456-426614174000",
}


def redactor(**settings) -> Redactor:
    return Redactor(PrivacySection.model_validate(settings))


@pytest.mark.parametrize("name", SECRETS)
def test_a_credential_is_taken_out_and_its_surroundings_stay(name):
    secret = SECRETS[name]
    for before, after in (("my key is ", ", thanks"), ('{"key":"', '"}'), ("KEY=", "\nnext"), ("«", "»"), ("", "")):
        assert redactor().text(before + secret + after) == before + REDACTED + after


@pytest.mark.parametrize("name", INNOCENT)
def test_what_only_looks_like_one_stays(name):
    assert redactor().text(f"see {INNOCENT[name]} there") == f"see {INNOCENT[name]} there"


def test_a_key_that_was_cut_off_goes_to_the_end():
    assert redactor().text("here: " + PEM[:50]) == "here: " + REDACTED


def test_within_json_arguments_the_json_stays_valid():
    arguments = json.dumps({"path": "id_rsa", "content": PEM, "headers": {"Authorization": f"Bearer {A20}"}})
    cleaned = json.loads(redactor().text(arguments))
    assert cleaned == {"path": "id_rsa", "content": REDACTED, "headers": {"Authorization": REDACTED}}


def test_every_default_pattern_has_a_hit_here():
    for pattern in DEFAULT:
        assert any(pattern.shape.search(secret) for secret in SECRETS.values()), pattern.name


def test_every_hint_is_part_of_all_its_pattern_can_match():
    """A hint that is not would hide secrets from their pattern."""
    for secret in SECRETS.values():
        for pattern in DEFAULT:
            if pattern.shape.search(secret):
                assert any(hint in secret for hint in pattern.hints), pattern.name


def test_long_texts_are_quick():
    text = "The quick brown fox jumps over sk-lazy dogs, Bearer of eyJ news. " * 20_000  # 1.3 MB
    started = time.thread_time()
    assert redactor().text(text) == text
    assert time.thread_time() - started < 1.0


@pytest.mark.parametrize(
    "start",
    [
        *(
            "sk-",
            "xoxb-",
            "bearer ",
            "bearer/",
            "Bearer",
            "-eyJ",
            "-eyJabcdefgh",
            "eyJabcdefgh.",
            "hf_",
            "ghp_",
            "AIza-",
        ),
        *("github_pat_", "AKIA-", "-----BEGIN ", "-----BEGIN PRIVATE KEY ", "-----BEGIN PRIVATE KEY----------END "),
    ],
)
def test_a_text_that_is_all_beginnings_is_quick(start):
    text = "PRIVATE KEY Bearer " + start * (200_000 // len(start))
    started = time.thread_time()
    redactor().text(text)
    assert time.thread_time() - started < 1.0


def test_patterns_of_ones_own_replace_the_default():
    mine = redactor(redact=[r"\d{4}-\d{4}", "(?i)ann"])
    assert mine.text(f"Ann's card 1234-5678, sk-{A40}") == f"{REDACTED}'s card {REDACTED}, sk-{A40}"
    assert redactor(redact=[]).text(SECRETS["aws"]) == SECRETS["aws"]


def shout(text: str) -> str:
    if "wrong" in text:
        raise ValueError(text)
    return None if "nothing" in text else text.upper()  # type: ignore[return-value]


NO_FUNCTION = 3


def test_a_function_of_ones_own_comes_after_the_patterns():
    assert redactor(redactor="test_redaction:shout").text(f"say {SECRETS['aws']}") == "SAY [REDACTED]"


def test_where_the_function_fails_nothing_of_the_text_is_left(caplog):
    mine = redactor(redactor="test_redaction:shout")
    assert mine.value(["fine", "wrong", "nothing"]) == ["FINE", REDACTED, REDACTED]
    assert "wrong" not in caplog.text


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("no_such_module:f", "cannot be imported"),
        ("json:no_such_function", "cannot be imported"),
        ("test_redaction:NO_FUNCTION", "is no function"),
    ],
)
def test_a_useless_function_is_told_before_anything_starts(path, reason):
    with pytest.raises(ConfigError, match=f"privacy.redactor='{path}' {reason}"):
        redactor(redactor=path)


SECRET = SECRETS["aws"]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": f'{{"key":"{SECRET}"}}'}}


@pytest.mark.parametrize(
    "hidden",
    [
        {"messages": ({"role": "user", "content": f"use {SECRET}"},)},
        {"messages": ({"role": "user", "content": [{"type": "text", "text": SECRET}]},)},
        {"messages": ({"role": "assistant", "content": None, "tool_calls": [CALL]},)},
        {"tools": ({"type": "function", "function": {"name": "f", "description": SECRET}},)},
        {"template": {"documents": [SECRET]}},
        {"reply": {"role": "assistant", "content": f"it is {SECRET}"}},
        {"reply": {"role": "assistant", "content": None, "tool_calls": [CALL]}},
    ],
    ids=["words", "parts", "earlier call", "tools", "template", "reply", "call"],
)
def test_a_redacted_turn_keeps_no_tokens_but_its_digests(hidden):
    turn = dataclasses.replace(ScriptedPolicy().turn([{"role": "user", "content": "hello"}]), **hidden)
    cleaned = redactor().record(turn)
    assert SECRET not in repr(cleaned)
    assert cleaned.capture is NOT_KEPT
    assert (cleaned.id, cleaned.conversation, cleaned.request) == (turn.id, turn.conversation, turn.request)
    [name] = hidden
    assert digest([{"role": "user", "content": str(getattr(cleaned, name))}])  # still plain JSON


def test_a_clean_turn_stays_as_it_is():
    turn = ScriptedPolicy().turn([{"role": "user", "content": "hello"}])
    assert redactor().record(turn) is turn
    assert np.isfinite(turn.capture.logprobs).all()


def test_next_states_and_feedback_are_cleaned():
    state = NextState("t", "tool", ({"role": "tool", "content": SECRET},), False, 1.0)
    assert redactor().record(state).messages == ({"role": "tool", "content": REDACTED},)
    said = Feedback("f", "t", "ann", None, f"never show {SECRET}", 1.0)
    assert redactor().record(said).text == f"never show {REDACTED}"
    assert redactor().record(dataclasses.replace(said, text=None, score=1)).text is None


def test_roles_and_types_are_no_words():
    assert redactor(redact=["user|text"]).value({"role": "user", "type": "text", "text": "user text"}) == {
        "role": "user",
        "type": "text",
        "text": f"{REDACTED} {REDACTED}",
    }
