"""Each kind of refusal has the status that programs know, and OpenAI's form; answers hide nothing in their frame."""

from __future__ import annotations

import json

import pytest

from securesplit.client.chat.toll import Price
from securesplit.client.chat.turn import Turn
from securesplit.client.endpoint.admission import NotKnown
from securesplit.client.endpoint.told import Answer, fault_json, models_json, status_of
from securesplit.client.sampling import Sampling
from securesplit.errors import (
    BudgetExhausted,
    CheckFailed,
    ConnectionFailed,
    InputError,
    PolicyDenied,
    RemoteProtocolError,
)
from securesplit.policy.meaning import Meaning
from securesplit.transport.http import Late

PRICE = Price(before=1.0, after=2.0, budget=8.0, meaning=Meaning(1e-5, "sequence", "replace-one"), tokens_left=3)


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InputError("SS-1272", "x"), 400, "invalid_request_error"),
        (InputError("SS-1222", "x"), 400, "invalid_request_error"),
        (NotKnown("SS-1274", "x"), 401, "authentication_error"),
        (InputError("SS-1274", "x"), 403, "permission_error"),
        (PolicyDenied("SS-2010", "x"), 403, "permission_error"),
        (InputError("SS-1279", "x"), 404, "not_found_error"),
        (Late("SS-1271", "x"), 408, "timeout_error"),
        (InputError("SS-1273", "x"), 413, "invalid_request_error"),
        (InputError("SS-1277", "x"), 429, "rate_limit_error"),
        (BudgetExhausted("SS-5001", "x"), 429, "rate_limit_error"),
        (CheckFailed("SS-1003", "x"), 500, "server_error"),
        (RemoteProtocolError("SS-4010", "x"), 502, "server_error"),
        (ConnectionFailed("SS-3020", "x"), 503, "server_error"),
    ],
)
def test_a_refusal_has_its_status_and_openai_s_form(error, status, kind):
    assert status_of(error) == status
    told = fault_json(error, status)["error"]
    assert told == {"message": "x", "type": kind, "param": None, "code": error.code}


def test_faults_and_hint_are_one_message():
    error = InputError("SS-1272", "two faults", hint="Do.", details=("n: is 1", "tools: not here"))
    told = fault_json(error, 400)["error"]
    assert (told["message"], told["param"]) == ("two faults; n: is 1; tools: not here. Do.", "n")


@pytest.mark.parametrize("chat", [True, False])
def test_every_event_is_one_line_of_json_whatever_the_text(chat):
    turn = Turn((1, 2, 3), ("x",), dropped=1, max_new_tokens=2, sampling=Sampling(), price=PRICE, ends=None)
    answer = Answer("id", 5, "m", chat, turn)
    for text in ("a\n\ndata: [DONE]\n\n", "\u2028 😀 \ud800", '"}'):
        event = answer.piece(text)
        assert event.startswith(b"data: ")
        assert event.count(b"\n") == 2
        choice = json.loads(event[6:])["choices"][0]
        said = choice["delta"]["content"] if chat else choice["text"]
        assert said == text.encode("utf-8", "replace").decode()
    whole = json.loads(answer.whole("t", "stop", 2))
    assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert whole["securesplit"] == {
        "dropped_turns": 1, "epsilon": 2.0, "budget": 8.0, "delta": 1e-5, "unit": "sequence", "relation": "replace-one",
        "tokens_left": 3,
    }  # fmt: skip
    assert json.loads(answer.closing("length")[6:])["securesplit"] == whole["securesplit"]


def test_models():
    one = json.loads(models_json("m", 5, alone=True))
    assert json.loads(models_json("m", 5, alone=False)) == {"object": "list", "data": [one]}


def test_a_fault_of_the_whole_body_names_no_field():
    for detail in ("the body is no JSON, or names a field twice", "body: Invalid JSON: here"):
        error = InputError("SS-1272", "x", hint="Do.", details=(detail,))
        assert fault_json(error, 400)["error"]["param"] is None
