"""A plausible report for the tests."""

from __future__ import annotations

import pytest

from securesplit.report.record import (
    Aggregation,
    Budget,
    ChannelSpend,
    Check,
    Data,
    Example,
    Generated,
    Leakage,
    Model,
    Phase,
    PolicyNote,
    Privacy,
    Protected,
    Recovery,
    Report,
    Tls,
    Traffic,
    Train,
)

NOTE = "Derek Byrne, born 02/09/1934, came in with a kidney stone. Treated with ibuprofen and kept on the renal ward."


@pytest.fixture
def report() -> Report:
    return sample()


def sample() -> Report:
    return Report(
        release="0.1.0",
        created="2026-11-21T10:00:00+00:00",
        seconds=243.7,
        clients=3,
        data=Data(synthetic=True, records=36),
        model=Model(name="smollm2-135m", front=2, middle=26, back=2),
        policy=PolicyNote(
            name="balanced",
            digest="ab" * 32,
            purpose="For teams that fine-tune on records of people and want a budget that holds against the server.",
            cost="The server's part learns slowly; expect a loss between the client alone and the unprotected split.",
            unsafe=False,
        ),
        train=Train.of(unprotected=(4.02, 2.71, 2.18), protected=(6.91, 5.72, 5.33), client_only=(8.84, 6.1, 5.52)),
        privacy=Privacy(
            epsilon=7.43,
            delta=1e-5,
            unit="sequence",
            relation="replace-one",
            mu=1.58,
            budget=Budget(epsilon=8.0, mu=1.666),
            channels=(
                ChannelSpend(channel="cut", releases=72, mu=1.2, epsilon=5.41),
                ChannelSpend(channel="gradient", releases=72, mu=0.9, epsilon=3.87),
                ChannelSpend(channel="decode", releases=24, mu=0.5, epsilon=1.97),
            ),
        ),
        aggregation=Aggregation(rounds=2, exact=True, blind=True, noised=False),
        leakage=Leakage(
            attack="vocabulary matching",
            unprotected=Recovery(token_recovery=0.997, ci95=(0.991, 1.0), prior=0.052, pii_exact=0.98, tokens=571),
            protected=Protected(
                token_recovery=0.061, ci95=(0.041, 0.083), prior=0.052, pii_exact=0.0, tokens=571, ceiling=0.49
            ),
        ),
        tls=Tls(version="TLSv1.3", cipher="TLS_AES_256_GCM_SHA384"),
        traffic=Traffic(bytes_up=182_000_000, bytes_down=179_500_000, client_resident_bytes=812_000_000),
        phases=tuple(
            Phase(name=n, seconds=s)
            for n, s in (
                ("provision", 1.2),
                ("unprotected split", 61),
                ("protected split", 88),
                ("client only", 24),
                ("generate", 6.5),
                ("attack", 58.9),
            )
        ),
        generated=Generated(prompt="Question: what was given? Answer:", text=" ibuprofen and a ward <b>round</b>."),
        examples=(
            Example(run="unprotected", truth=NOTE, recovered=NOTE),
            Example(
                run="protected",
                truth=NOTE,
                recovered="the of , , and in ; the with a to % the <script>alert(1)</script> of was 19 the",
            ),
        ),
        checks=(
            Check(
                command="securesplit attack run --transcript demo-out/transcripts/protected --model smollm2-135m --truth demo-out/transcripts/protected/truth.jsonl",
                shows="Play the server against the protected traffic again:",
            ),
            Check(
                command="securesplit policy check policies/balanced.toml",
                shows="See that the policy is the one named here, by its digest:",
            ),
        ),
    )
