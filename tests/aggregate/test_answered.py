"""The durable memory of answered rounds."""

import stat

import pytest

from securesplit.aggregate.answered import RECORD_BYTES, AnswerLog, record_of
from securesplit.errors import AggregationAborted, InputError

FIRST = record_of(b"s" * 16, 1, b"t" * 32)
OTHER_SET = record_of(b"s" * 16, 1, b"u" * 32)


def test_a_round_is_answered_once_also_after_a_restart(tmp_path):
    path = tmp_path / "answered"
    log = AnswerLog(path)
    log(FIRST)
    for _ in range(2):
        with pytest.raises(AggregationAborted) as error:
            log(OTHER_SET)
        assert error.value.code == "SS-6015"
        log.close()
        log = AnswerLog(path)
    log(record_of(b"s" * 16, 2, b"t" * 32))
    log(record_of(b"z" * 16, 1, b"t" * 32))
    log.close()
    assert path.stat().st_size == 3 * RECORD_BYTES
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_torn_record_does_not_shift_the_later_ones(tmp_path):
    path = tmp_path / "answered"
    path.write_bytes(FIRST + OTHER_SET[:11])
    log = AnswerLog(path)
    log(record_of(b"s" * 16, 2, b"t" * 32))
    log.close()
    log = AnswerLog(path)
    for number in (1, 2):
        with pytest.raises(AggregationAborted):
            log(record_of(b"s" * 16, number, b"v" * 32))
    log.close()


def test_what_cannot_be_recorded_is_not_answered(tmp_path):
    log = AnswerLog(tmp_path / "answered")
    log.close()
    with pytest.raises(AggregationAborted) as error:
        log(FIRST)
    assert error.value.code == "SS-6015"


def test_two_processes_cannot_share_the_file(tmp_path):
    log = AnswerLog(tmp_path / "answered")
    with pytest.raises(InputError) as error:
        AnswerLog(tmp_path / "answered")
    assert error.value.code == "SS-1605"
    log.close()


def test_an_unusable_path_is_an_input_error(tmp_path):
    with pytest.raises(InputError) as error:
        AnswerLog(tmp_path / "nowhere" / "answered")
    assert error.value.code == "SS-1605"
