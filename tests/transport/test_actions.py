"""What a computation may give back, and what a log may say about it."""

from __future__ import annotations

import logging

from securesplit.errors import LocalProtocolError, RemoteProtocolError
from securesplit.transport.actions import Send, Work


def test_a_result_comes_back_as_it_is():
    assert Work(1, lambda: "done").run() == "done"


def test_an_error_of_ours_is_a_result():
    error = RemoteProtocolError("SS-4014", "a gradient arrived for a step that is not pending")

    def fails() -> object:
        raise error

    assert Work(1, fails).run() is error


def test_a_foreign_error_is_named_by_its_type_alone(caplog):
    def fails() -> object:
        raise RuntimeError("the patient's name")

    with caplog.at_level(logging.DEBUG):
        result = Work(1, fails).run()
    assert isinstance(result, LocalProtocolError)
    assert result.code == "SS-4190"
    assert "RuntimeError" in caplog.text
    assert "patient" not in caplog.text + str(result) + result.hint


def test_a_message_is_not_shown_in_a_representation():
    assert "secret" not in repr(Send(1, b"secret"))
