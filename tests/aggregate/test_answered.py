"""The durable memory of answered rounds, and the two rules that it keeps."""

import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from securesplit.aggregate.answered import Answer, AnswerLog
from securesplit.errors import AggregationAborted, InputError

NAMES = ("amir", "bea", "chloe", "dan")


def answer(session=b"s", number=1, t3=b"t", start=b"", survivors=NAMES):
    return Answer(session * 16, number, t3 * 32, start, survivors)


FIRST, OTHER_SET = answer(), answer(t3=b"u", survivors=NAMES[:3])


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
    log(answer(number=2))
    log(answer(session=b"z"))
    log.close()
    assert path.read_bytes() == FIRST.line() + answer(number=2).line() + answer(session=b"z").line()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("cut", [1, 11, 60, len(OTHER_SET.line()) - 1])
def test_a_torn_line_does_not_spoil_the_later_ones(tmp_path, cut):
    path = tmp_path / "answered"
    path.write_bytes(FIRST.line() + answer(number=7).line()[:cut])
    log = AnswerLog(path)
    log(answer(number=2))
    log.close()
    log = AnswerLog(path)
    for number in (1, 2):
        with pytest.raises(AggregationAborted):
            log(answer(number=number, t3=b"v"))
    log(answer(number=7))  # It had not been answered.
    log.close()


def test_one_update_enters_sums_over_one_set_of_clients(tmp_path):
    log = AnswerLog(tmp_path / "answered")
    log(answer(start=b"x"))
    others = (NAMES[:3], NAMES[1:], (*NAMES, "eve"), ("amir", "eve", "chloe", "dan"), ("eve", "fay", "gus"))
    for number, survivors in enumerate(others, 2):
        with pytest.raises(AggregationAborted) as error:
            log(answer(number=number, start=b"x", survivors=survivors))
        assert error.value.code == "SS-6030"
        log.close()
        log = AnswerLog(tmp_path / "answered")
    log(answer(number=7, start=b"x"))  # The same clients: the same sum once more.
    log(answer(number=8, start=b"y", survivors=NAMES[:3]))  # Another update.
    log(answer(number=9, survivors=NAMES[:3]))  # Noise of its own.
    log.close()


@given(st.lists(st.text(max_size=12), max_size=5), st.binary(max_size=32), st.integers(0, 1 << 60))
def test_a_line_is_read_as_it_was_written(names, start, number):
    made = Answer(b"s" * 16, number, b"t" * 32, start, tuple(names))
    assert Answer.read(made.line()[:-1]) == made
    assert made.line().count(b"\n") == 1


@given(st.binary(max_size=80))
def test_garbage_is_no_answer(line):
    assert Answer.read(line) is None


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
