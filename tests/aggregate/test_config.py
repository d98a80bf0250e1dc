"""Round parameters: what is refused, and that every one of them is bound."""

import pytest

from securesplit.aggregate.config import MAX_CLIENTS, RoundConfig, largest_scale
from securesplit.errors import InputError

MANY = tuple(f"c{i:03d}" for i in range(MAX_CLIENTS + 1))

SPARSE = {"roster": MANY[:40], "threshold": 27, "min_clients": 10, "colluders": 4, "scale": 100}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"roster": ("a", "b"), "threshold": 2}, "fewer than 3"),
        ({"roster": MANY, "threshold": 200, "min_clients": 40, "scale": 1}, "at most 256"),
        ({"roster": ("b", "a", "c")}, "sorted"),
        ({"roster": ("a", "a", "c")}, "twice"),
        ({"roster": ("", "a", "c")}, "empty"),
        ({"roster": ("a", "b\n", "c")}, "printable"),
        ({"threshold": 2}, "more than half"),
        ({"threshold": 6}, "more than half"),
        ({"min_clients": 2}, "between 3"),
        ({"min_clients": 6}, "between 3"),
        ({"session_id": b"short"}, "16 bytes"),
        ({"round": -1}, "round number"),
        ({"dim": 0}, "dim"),
        ({"w_max": 0}, "w_max"),
        ({"clip": 0.0}, "clip"),
        ({"clip": float("nan")}, "clip"),
        ({"clip": float("inf")}, "clip"),
        ({"scale": 0}, "2^31"),
        ({"scale": 1 << 41, "ring_bits": 64}, "2^63"),
        ({"ring_bits": 48}, "32 or 64"),
        ({"colluders": 1}, "colluders"),
        ({"colluders": -1}, "colluders"),
        ({"threshold": 5, "colluders": 2}, "fewer than 2"),
        ({"backend": "rot13"}, "backend"),
        ({"prg": "mt19937"}, "prg"),
        ({"backend": "bfv"}, "set blind"),
        ({"backend": "ckks", "blind": True, "ring_bits": 64}, "32-bit"),
        ({"degree": 2, "share_threshold": 2}, "2^-40"),
        ({**SPARSE, "degree": 8, "share_threshold": 5}, "2^-40"),
        ({**SPARSE, "colluders": 3, "degree": 24, "share_threshold": 12}, "withstand"),
        ({"model": "x"}, "SHA-256"),
        ({"frozen": "A" * 64}, "SHA-256"),
    ],
)
def test_an_illegal_round_cannot_be_built(config_of, changes, word):
    with pytest.raises(InputError) as error:
        config_of(**changes)
    assert error.value.code == "SS-1601"
    assert word in error.value.what


def test_all_faults_are_told_at_once(config_of):
    with pytest.raises(InputError) as error:
        config_of(threshold=1, clip=-1.0, dim=0)
    assert len(error.value.details) == 3


def test_the_overflow_rule_is_exact(config_of):
    most = (2**31 - 1) // (5 * 10)
    assert config_of(scale=most).scale == most
    with pytest.raises(InputError):
        config_of(scale=most + 1)


@pytest.mark.parametrize(("n", "w_max"), [(3, 1), (10, 255), (64, 65536), (50, 255)])
def test_the_largest_scale_is_the_largest_power_of_two_that_fits(n, w_max):
    scale = largest_scale(n, w_max)
    assert scale.bit_count() == 1
    assert n * w_max * scale <= 2**31 - 1 < n * w_max * scale * 2


def test_no_scale_fits_absurd_weights():
    with pytest.raises(InputError):
        largest_scale(64, 2**31)


def test_every_field_is_bound_by_the_digest(config_of):
    base = config_of()
    others = [
        config_of(session_id=bytes(16)), config_of(round=2), config_of(roster=("amir", "bea", "chloe", "dan", "fay")),
        config_of(threshold=4), config_of(min_clients=4), config_of(dim=8), config_of(scale=999), config_of(clip=0.25),
        config_of(w_max=9), config_of(model="0" * 64), config_of(frozen="0" * 64), config_of(blind=True),
        config_of(threshold=4, colluders=1), config_of(ring_bits=64), config_of(backend="bfv", blind=True), config_of(prg="chacha20"),
    ]  # fmt: skip
    assert len(others) == len(RoundConfig.__slots__) - 2
    many = {"roster": MANY[:40], "threshold": 27, "min_clients": 10, "colluders": 4, "scale": 100}
    graphs = [config_of(**many, degree=k, share_threshold=t) for k, t in ((0, 0), (24, 12), (25, 12), (24, 13))]
    assert len({c.digest for c in (base, *others, *graphs)}) == len(others) + 5
    assert base.digest == config_of().digest


def test_an_integral_clip_hashes_like_its_float(config_of):
    assert config_of(clip=1).digest == config_of(clip=1.0).digest
