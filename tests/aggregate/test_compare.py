"""Records side by side: a server that told clients different things, a client that signed twice, sums that show one client."""

import pytest

from securesplit.aggregate.compare import compare
from securesplit.aggregate.record import RoundRecord
from tests.aggregate.recorded import World, detail, failed, signatures_by, warnings


@pytest.fixture
def world(cohort_of) -> World:
    return World(cohort_of(threshold=4))


@pytest.fixture
def blind(cohort_of) -> World:
    return World(cohort_of(threshold=4, blind=True))


def compared(world: World, *records: RoundRecord):
    return compare([(f"{i}.record", world.report(record)) for i, record in enumerate(records)])


def test_records_of_one_round_agree(world, blind):
    for each in (world, blind):
        alikes = [each.record().alike]
        reports = compare([(m, each.report(each.record(m), alikes=alikes)) for m in ("amir", "bea", "gpu")])
        assert all(failed(report) == set() for report in reports)
        assert {"same configuration", "same survivors", "same sum", "one signature"} <= {
            c.name for c in reports[0].checks
        }


def test_a_record_alone_is_not_compared(world):
    (report,) = compared(world, world.record())
    assert not [check for check in report.checks if check.name.startswith("same")]


def test_a_server_that_told_clients_different_survivors_is_found(world):
    record = world.record("bea")
    told = record.model_copy(update={"survivors": world.cohort.config.roster})
    told = told.model_copy(update={"signatures": signatures_by(world.cohort, told, ("bea", "chloe", "dan", "eve"))})
    told = world.sealed(told, "bea")
    assert failed(world.report(told)) == set()  # Faultless alone: four clients sided with the server.
    reports = compared(world, world.record("amir"), world.record("chloe"), told)
    assert all(failed(report) == {"same survivors", "one signature"} for report in reports)
    said = detail(reports[0], "same survivors")
    assert said.index("amir (0.record), chloe (1.record): amir, bea, chloe, dan") < said.index("bea (2.record)")
    assert detail(reports[0], "one signature").endswith("bea, chloe, dan")


def test_sums_that_differ_are_found_at_all_who_differ(world):
    reports = compared(world, world.record("amir"), world.record("bea", sum_digest=bytes(32)), world.record("gpu"))
    assert all(failed(report) == {"same sum"} for report in reports)
    assert detail(reports[0], "same sum").endswith("bea (1.record): 0000000000000000")


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"members": ("amir", "bea", "chloe", "dan")}, "same members"),
        ({"survivors": ("amir", "bea", "dan", "eve")}, "same survivors"),
    ],
)
def test_sets_that_differ_are_found_though_the_round_was_aborted_for_it(world, changes, check):
    """Honest clients do not agree when the server tells them different sets; their records show who was told what."""
    ended = {"aborted": "SS-6010", "sum_digest": b"", "signatures": ()}
    reports = compared(world, world.record("amir", **ended), world.record("bea", **ended, **changes))
    assert all(failed(report) == {check} for report in reports)
    assert "bea (1.record)" in detail(reports[0], check)


def test_a_forged_record_casts_no_doubt_on_good_ones(world):
    good = world.record("amir")
    other = {"sum_digest": bytes(32), "survivors": ("amir", "bea", "chloe", "eve")}
    nobody = {"certificate": b"", "seal": b""}
    ended = {"aborted": "SS-6010", "signatures": (), "survivors": other["survivors"], "sum_digest": b""}
    forgeries = (
        good.model_copy(update=other), world.record("bea").model_copy(update={"sum_digest": bytes(32)}),
        world.record("gpu", **ended).model_copy(update=nobody), world.record("gpu").model_copy(update=nobody | {"sum_digest": bytes(32)}),
    )  # fmt: skip
    for forged in forgeries:
        reports = compared(world, good, world.record("chloe"), forged)
        assert [failed(report) for report in reports[:2]] == [set(), set()]
    assert [bool(failed(world.report(forged))) for forged in forgeries] == [True, True, False, False]


def test_a_client_that_signed_twice_is_found_even_in_a_record_that_fails(world):
    record = world.record("bea", survivors=world.cohort.config.roster)
    record = record.model_copy(update={"signatures": signatures_by(world.cohort, record, ("dan",))})
    reports = compared(world, world.record("amir"), world.sealed(record, "bea"))
    assert [failed(report) for report in reports] == [{"one signature"}, {"agreement", "one signature"}]
    assert detail(reports[0], "one signature").endswith(": dan")


def test_a_configuration_that_differs_within_a_session_is_found(world, cohort_of):
    other = World(cohort_of(threshold=4, dim=9)).record("bea")
    reports = compared(world, world.record("amir"), other)
    assert all({"same configuration", "same adverts"} <= failed(report) for report in reports)


def test_who_left_early_contradicts_nobody(world):
    early = world.sealed(world.record("eve", survivors=(), signatures=(), sum_digest=b"", aborted="SS-6013"), "eve")
    assert all(failed(report) == set() for report in compared(world, world.record("amir"), early))


def test_sums_that_differ_by_one_client_are_looked_at(cohort_of):
    def round_of(number: int, vanish: dict[str, int], session: int = 0) -> World:
        return World(cohort_of(round=number, session_id=bytes([session]) * 16), vanish)

    first, second, third = round_of(1, {"eve": 2}), round_of(2, {}, 1), round_of(3, {"dan": 2, "eve": 2}, 2)
    again = round_of(2, {"bea": 2}, 3)
    records = [w.record() for w in (first, second, third, again)]
    reports = compare([(str(i), first.report(record)) for i, record in enumerate(records)])
    assert all(failed(report) == set() for report in reports)
    # Sessions are random and rounds count, so the second follows the first; the last is another try of the second.
    assert [warnings(report) for report in reports] == [set(), {"differencing"}, set(), {"differencing"}]
    assert "eve (round 1" in detail(reports[1], "differencing")
    assert "bea (round 2" in detail(reports[1], "differencing")
    assert detail(reports[3], "differencing").count("bea (round 2") == 1
