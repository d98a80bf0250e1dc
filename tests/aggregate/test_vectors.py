"""Known answers for SSA-1, tests/vectors/ssa1.json: whole rounds with fixed randomness, and forged messages with codes.

An implementation conforms when, given the randomness, it makes the same bytes, and refuses every forgery with its code.
The oracle below derives the masked vectors from the drawn secrets with SHA-256, HMAC, X25519 and the AES block cipher
alone. After a change of the protocol, write the file anew: ``SSA1_WRITE_VECTORS=1 pytest tests/aggregate/test_vectors.py``.
"""

import hashlib
import hmac
import json
import os
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from securesplit.aggregate import wire
from securesplit.aggregate.config import Floors
from securesplit.errors import SecureSplitError

FILE = Path(__file__).parent.parent / "vectors" / "ssa1.json"
ROSTER = ("amir", "bea", "chloe", "dan")
VANISH = {"dan": wire.MASKED}
SEED = "ssa1-kat"


def vectors() -> dict:
    return json.loads(FILE.read_text())


def rounds(cohort_of, blind: bool, **changes):
    fields = {"roster": ROSTER, "threshold": 3, "min_clients": 3, "dim": 5, "blind": blind, **changes}
    return cohort_of(seed=SEED, **fields)


def as_json(vector):
    return None if vector is None else vector.tolist()


def describe(cohort) -> dict:
    c = cohort.config
    return {
        "config": json.loads(c.canonical()),
        "cfg_hash": c.digest.hex(),
        "clients": {
            n: {
                "identity_seed": hashlib.sha256(b"id|" + n.encode()).hexdigest(),
                "randomness": f"SHAKE-256({SEED}|{n}), read in order",
                "update": cohort.updates[n].tolist(),
                "weight": cohort.weights[n],
                "contribution": cohort.clients[n].contribution.tolist(),
            }
            for n in c.roster
        },
        "up": [{"from": n, "stage": s, "body": b.hex(), "vector": as_json(v)} for n, s, b, v in cohort.up],
        "down": [{"to": n, "stage": s, "body": b.hex(), "vector": as_json(v)} for n, s, b, v in cohort.down],
        "opened": cohort.clients["amir"].result.ring_sum.tolist(),
        "survivors": list(cohort.clients["amir"].result.survivors),
    }


def forgeries(cohort_of) -> list[dict]:
    """Forged deliveries to amir after the honest ones of all earlier stages of the plain round."""
    c = rounds(cohort_of, False).run(vanish=VANISH)
    honest = {s: (b, v) for to, s, b, v in c.down if to == "amir"}
    kinds = [wire.Roster, wire.Routed, wire.Survivors, wire.Bundle, wire.Result]
    roster, routed, survivors, bundle, result = (wire.decode(k, honest[i][0]) for i, k in enumerate(kinds))
    earlier = rounds(cohort_of, False, round=0).run(vanish=VANISH)
    replayed = {s: (b, v) for to, s, b, v in earlier.down if to == "amir"}
    adverts = [wire.decode(wire.Advertise, a) for a in roster.adverts]

    def advert(i, **changes):
        changed = [
            wire.encode(a.model_copy(update=changes)) if j == i else wire.encode(a) for j, a in enumerate(adverts)
        ]
        return roster.model_copy(update={"adverts": tuple(changed)})

    def flipped(box):
        return bytes([box[0] ^ 1]) + box[1:]

    total = honest[4][1]
    cases = [
        ("tampered advert", 0, advert(1, mask_key=bytes([adverts[1].mask_key[0] ^ 1]) + adverts[1].mask_key[1:]), None, "SS-6002"),
        ("wrong roster", 0, advert(3, name="mallory"), None, "SS-6003"),
        ("duplicate keys", 0, advert(2, share_key=adverts[1].share_key), None, "SS-6003"),
        ("own advert missing", 0, roster.model_copy(update={"adverts": roster.adverts[1:]}), None, "SS-6003"),
        ("too few adverts", 0, roster.model_copy(update={"adverts": roster.adverts[:2]}), None, "SS-6010"),
        ("tampered share", 1, routed.model_copy(update={"sealed": ((routed.sealed[0][0], flipped(routed.sealed[0][1])), *routed.sealed[1:])}), None, "SS-6007"),
        ("members without self", 1, routed.model_copy(update={"members": routed.members[1:]}), None, "SS-6008"),
        ("overlap of survivors and dropped", 2, survivors.model_copy(update={"survivors": ROSTER, "dropped": ("dan",)}), None, "SS-6009"),
        ("survivors without self", 2, survivors.model_copy(update={"survivors": ("bea", "chloe", "dan"), "dropped": ("amir",)}), None, "SS-6008"),
        ("survivors below min_clients", 2, survivors.model_copy(update={"survivors": ("amir", "bea"), "dropped": ("chloe", "dan")}), None, "SS-6010"),
        ("fewer signatures than the threshold", 3, bundle.model_copy(update={"signatures": bundle.signatures[:2]}), None, "SS-6010"),
        ("second unmask request", 4, None, None, "SS-6005"),
        ("result over other survivors", 4, result.model_copy(update={"survivors": ROSTER}), total, "SS-6008"),
        ("impossible result", 4, result, total + np.uint32(1 << 30), "SS-6011"),
        *((f"replayed round, stage {s}", s, replayed[s][0], replayed[s][1], "SS-6006") for s in range(5)),
    ]  # fmt: skip
    out = []
    for name, after, forged, vector, code in cases:
        # None stands for the stage-3 bundle once more, after it was answered.
        stage, body = (3, bundle) if forged is None else (after, forged)
        data = body if isinstance(body, bytes) else wire.encode(body)
        out.append(
            {
                "name": name,
                "after_stages": after,
                "stage": stage,
                "body": data.hex(),
                "vector": as_json(vector),
                "code": code,
            }
        )
    return out


FLOORS = [
    {"name": "lowered threshold", "floors": {"min_clients": 3, "min_threshold": 4, "max_update": 1.0, "blind": False}, "code": "SS-6001"},
    {"name": "lowered min_clients", "floors": {"min_clients": 4, "min_threshold": 3, "max_update": 1.0, "blind": False}, "code": "SS-6001"},
    {"name": "raised clip", "floors": {"min_clients": 3, "min_threshold": 3, "max_update": 0.4, "blind": False}, "code": "SS-6001"},
    {"name": "sum visible", "floors": {"min_clients": 3, "min_threshold": 3, "max_update": 1.0, "blind": True}, "code": "SS-6001"},
]  # fmt: skip


@pytest.mark.skipif(not os.environ.get("SSA1_WRITE_VECTORS"), reason="writes the vectors; only on request")
def test_write_the_vectors(cohort_of):
    plain, blind = (rounds(cohort_of, b).run(vanish=VANISH) for b in (False, True))
    told = {
        "protocol": "ssa-1",
        "plain": describe(plain),
        "blind": describe(blind),
        "forgeries": forgeries(cohort_of),
        "floors": FLOORS,
    }
    FILE.write_text(json.dumps(told, indent=1) + "\n")


@pytest.mark.parametrize("kind", ["plain", "blind"])
def test_the_same_randomness_gives_the_same_bytes(cohort_of, kind):
    cohort = rounds(cohort_of, kind == "blind").run(vanish=VANISH)
    assert describe(cohort) == vectors()[kind]


# The oracle: nothing of securesplit below.


def length_prefixed(parts):
    return b"".join(len(p).to_bytes(4, "big") + p for p in parts)


def hkdf(secret, salt, label, *parts):
    info = label.encode() + b"|" + length_prefixed([p.encode() for p in parts])
    return hmac.digest(hmac.digest(salt, secret, "sha256"), info + b"\x01", "sha256")


def transcript(label, previous, parts):
    return hashlib.sha256(label.encode() + b"|" + length_prefixed([previous, *parts])).digest()


def stream(key, count):
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    out = b"".join(block.update(i.to_bytes(16, "big")) for i in range(-(-count // 4)))
    return [int.from_bytes(out[4 * k : 4 * k + 4], "little") for k in range(count)]


@pytest.mark.parametrize("kind", ["plain", "blind"])
def test_masked_vectors_and_sums_follow_from_first_principles(kind):
    import msgpack

    known = vectors()[kind]
    cfg_text = json.dumps(known["config"], sort_keys=True, separators=(",", ":")).encode()
    cfg = hashlib.sha256(b"ssa-1/cfg|" + cfg_text).digest()
    assert cfg.hex() == known["cfg_hash"]
    drawn = {n: hashlib.shake_256(f"{SEED}|{n}".encode()).digest(128) for n in ROSTER}
    mask_sk = {n: X25519PrivateKey.from_private_bytes(hkdf(r[:32], cfg, "ssa-1/mask-sk")) for n, r in drawn.items()}
    adverts = {m["from"]: bytes.fromhex(m["body"]) for m in known["up"] if m["stage"] == 0}
    for n, body in adverts.items():
        advert = msgpack.unpackb(body)
        assert advert["mask_key"] == mask_sk[n].public_key().public_bytes_raw()
        assert (
            advert["share_key"] == X25519PrivateKey.from_private_bytes(drawn[n][64:96]).public_key().public_bytes_raw()
        )
        assert advert["commit_self"] == hashlib.sha256(b"ssa-1/cb|" + drawn[n][32:64]).digest()
        assert advert["commit_group"] == (
            hashlib.sha256(b"ssa-1/cg|" + drawn[n][96:]).digest() if kind == "blind" else b""
        )
    t1 = transcript("ssa-1/adv", cfg, [adverts[n] for n in sorted(adverts)])
    t2 = transcript("ssa-1/u2", t1, [n.encode() for n in ROSTER])
    group = hkdf(b"".join(drawn[n][96:] for n in ROSTER), t2, "ssa-1/group")
    words = known["config"]["dim"] + 1
    masked = {m["from"]: m["vector"] for m in known["up"] if m["stage"] == 2}
    assert sorted(masked) == ["amir", "bea", "chloe"]
    blinds = [0] * words
    for n, vector in masked.items():
        total = list(known["clients"][n]["contribution"])
        keys = [(1, hkdf(drawn[n][32:64], t2, "ssa-1/self", n))]
        if kind == "blind":
            keys.append((1, hkdf(group, t2, "ssa-1/blind", n)))
            blinds = [a + b for a, b in zip(blinds, stream(keys[-1][1], words), strict=True)]
        for other in ROSTER:
            if other != n:
                shared = mask_sk[n].exchange(
                    X25519PublicKey.from_public_bytes(mask_sk[other].public_key().public_bytes_raw())
                )
                keys.append((1 if n < other else -1, hkdf(shared, t2, "ssa-1/pair", *sorted((n, other)))))
        for sign, key in keys:
            total = [(a + sign * b) % 2**32 for a, b in zip(total, stream(key, words), strict=True)]
        assert total == vector
    plain = [sum(known["clients"][n]["contribution"][k] for n in masked) % 2**32 for k in range(words)]
    assert known["opened"] == plain
    sent = next(m["vector"] for m in known["down"] if m["stage"] == 4)
    assert sent == [(a + b) % 2**32 for a, b in zip(plain, blinds, strict=True)]
    assert (sent == plain) is (kind == "plain")


def names(part):
    return [case["name"] for case in vectors()[part]] if FILE.exists() else []


@pytest.mark.parametrize("name", names("forgeries"))
def test_forgeries_are_refused_with_their_code(cohort_of, name):
    case = next(case for case in vectors()["forgeries"] if case["name"] == name)
    known, cohort = vectors()["plain"], rounds(cohort_of, False)
    amir = cohort.clients["amir"]
    amir.contribute(cohort.updates["amir"], cohort.weights["amir"])
    amir.advertise()
    for message in known["down"]:
        if message["to"] == "amir" and message["stage"] < case["after_stages"]:
            amir.receive(message["stage"], bytes.fromhex(message["body"]))
    vector = None if case["vector"] is None else np.array(case["vector"], dtype=np.uint32)
    with pytest.raises(SecureSplitError) as error:
        amir.receive(case["stage"], bytes.fromhex(case["body"]), vector)
    assert error.value.code == case["code"]
    assert amir.result is None


@pytest.mark.parametrize("name", names("floors"))
def test_rounds_below_the_floors_are_refused(cohort_of, name):
    case = next(case for case in vectors()["floors"] if case["name"] == name)
    with pytest.raises(SecureSplitError) as error:
        rounds(cohort_of, False).client("amir", floors=Floors(**case["floors"]))
    assert error.value.code == case["code"]
