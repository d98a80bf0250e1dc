"""Numbers of the round that are not what a client agreed to: at the server, at one client, or at all of them by way of the job."""

from __future__ import annotations

import hashlib

import pytest

from securesplit.aggregate import wire
from securesplit.aggregate.config import Floors, RoundConfig
from securesplit.errors import AggregationAborted, InputError, RemoteProtocolError
from tests.aggregate.hostile.judge import check_secrecy, judge
from tests.aggregate.hostile.kit import DOWN, FORTY, SEVEN, Play, at, config_of

OTHER = hashlib.sha256(b"other").hexdigest()
CHANGES: dict[str, tuple[str, dict[str, object]]] = {
    "lowered threshold": ("plain", {"threshold": 4, "colluders": 0}),
    "lowered min_clients": ("plain", {"min_clients": 4}),
    "lowered colluders": ("plain", {"colluders": 1}),
    "changed scale": ("plain", {"scale": 999}),
    "changed clip": ("plain", {"clip": 0.25}),
    "changed w_max": ("plain", {"w_max": 9}),
    "changed model hash": ("plain", {"model": OTHER}),
    "changed frozen hash": ("plain", {"frozen": OTHER}),
    "changed dim": ("plain", {"dim": 8}),
    "another ring": ("plain", {"ring_bits": 64}),
    "the round made blind": ("plain", {"blind": True}),
    "blind flag off": ("blind", {"blind": False}),
    **({"another stream cipher": ("plain", {"prg": "chacha20"})} if "prg" in RoundConfig.__slots__ else {}),
    "a roster with one client less": ("plain", {"roster": SEVEN[:-1]}),
    "changed degree": ("sparse", {"degree": 16}),
    "changed share threshold": ("sparse", {"degree": 16, "share_threshold": 13}),
    "lowered colluders in the sparse graph": ("sparse", {"threshold": 26, "degree": 15, "share_threshold": 12}),
    "a complete graph for the sparse one": ("sparse", {"degree": 0, "share_threshold": 0}),
}


@pytest.mark.parametrize("stage", range(5))
@pytest.mark.parametrize("what", CHANGES)
def test_a_server_with_other_numbers_gets_nothing(what, stage, record_property):
    """Whole honest rounds under the other numbers give what it says; every client refuses it at every stage."""
    mode, change = CHANGES[what]
    other, play = at(mode, 5, **change), at(mode, stage)
    victims = [n for n in play.config.roster if n in other.config.roster]
    for name in victims:
        delivery = next(d for d in other.shown if (d.to, d.stage) == (name, stage))
        play.tell(*delivery)
    play.queue, play.server.finished = [], True
    ends = judge(play, victims, ("SS-6004",), others=("waits",))
    record_property("hostile", [f"{what} at the server", mode, 1, ends])


@pytest.mark.parametrize("what", [w for w, (_, change) in CHANGES.items() if "roster" not in change])
def test_one_client_with_other_numbers_stands_alone(what, record_property):
    """Whoever tells it: its advert and those of the others do not fit one another, before anybody has shared anything."""
    mode, change = CHANGES[what]
    play = Play(mode)
    odd, c = play.config.roster[2], play.config
    play.clients[odd] = play.client(odd, config=config_of(mode, **change))
    if "dim" in change:
        play.updates[odd] = play.updates[odd].repeat(2)[: c.dim + 1]
    outs = {name: play.advertise(name) for name in c.roster}
    for name, out in outs.items():
        try:
            play.server.receive(name, *out)
        except RemoteProtocolError as error:
            assert (name, error.code) == (odd, "SS-6004")  # noqa: PT017
    for name in c.roster:
        digest = play.clients[name].config.digest
        body = wire.Roster(
            session=c.session_id, round=c.round, cfg=digest, adverts=tuple(out.body for out in outs.values())
        )
        play.tell(name, 0, body)
    play.queue, play.server.finished = [], True
    ends = judge(play, c.roster, ("SS-6004",))
    assert {item.stage for item in play.said} == {0, 15}
    record_property("hostile", [f"{what} at one client", mode, 1, ends])


FLOORS = Floors(min_clients=5, min_threshold=5, max_update=0.5, blind=True, min_colluders=2, min_honest=3)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("lowered threshold", {"threshold": 4, "colluders": 0}),
        ("lowered min_clients", {"min_clients": 4}),
        ("lowered colluders", {"colluders": 1}),
        ("raised clip", {"clip": 0.75}),
        ("blind flag off", {"blind": False}),
        ("more colluders than honest noise allows", {"threshold": 6, "colluders": 3, "min_clients": 5}),
    ],
)
def test_a_job_below_the_floors_finds_no_client(what, change, record_property):
    config = config_of("blind", **change)
    floors = FLOORS if "honest" not in what else Floors(5, 5, 0.5, blind=True, min_colluders=2, min_honest=4)
    play = Play("blind")
    assert play.client("amir", floors=floors if "honest" not in what else FLOORS).state.value == "idle"
    with pytest.raises(AggregationAborted) as error:
        play.client("amir", config=config, floors=floors)
    assert error.value.code == "SS-6001"
    assert play.said == []
    record_property("hostile", [f"{what} in the job", "blind", 1, ["SS-6001"]])


@pytest.mark.parametrize(
    ("what", "mode", "change"),
    [
        ("a threshold of half the roster", "plain", {"threshold": 3, "colluders": 0}),
        ("a threshold that colluders could meet twice", "plain", {"threshold": 4}),
        ("min_clients that colluders fill", "plain", {"min_clients": 3}),
        ("a roster of two", "plain", {"roster": SEVEN[:2], "threshold": 2, "colluders": 0}),
        ("a scale that may wrap", "plain", {"scale": 1 << 30}),
        ("a lowered degree", "sparse", {"degree": 8}),
        ("a lowered share threshold", "sparse", {"share_threshold": 6}),
        ("fewer colluders than a sparse graph must bear", "sparse", {"colluders": 1}),
        ("a roster named twice", "plain", {"roster": (*SEVEN, "gus")}),
        ("a clip that is not finite", "plain", {"clip": float("inf")}),
    ],
)
def test_numbers_that_hide_nobody_make_no_round(what, mode, change, record_property):
    with pytest.raises(InputError) as error:
        config_of(mode, **change)
    assert error.value.code == "SS-1601"
    record_property("hostile", [f"{what} in the job", mode, 1, ["SS-1601"]])


def test_the_numbers_of_both_modes_are_what_the_product_would_choose():
    from securesplit.aggregate.graph import graph_for

    config = config_of("sparse")
    graph = graph_for(40, quorum=25, colluders=4, smallest=8, dropouts=4)
    assert (graph.degree, graph.threshold) == (config.degree, config.share_threshold)
    assert config.roster == FORTY
    play = at("sparse", 5)
    assert set(DOWN) - {15} == {d.stage for d in play.shown}
    check_secrecy(play)
