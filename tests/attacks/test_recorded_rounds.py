"""The product's own rounds: which releases show one record can be told from what crossed, held-out records included."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest

from attacks.link import link_releases
from attacks.view import PublicFacts
from securesplit.privacy.plan import plan_for
from securesplit.server.engine import Engine
from tests.e2e.house import ROUND, build_house, policy_of
from tests.e2e.test_rounds import train_all


@pytest.mark.parametrize("rounds", [2, 3])
def test_fresh_releases_of_real_rounds_are_linked(tmp_path, monkeypatch, rounds):
    """Three clients, two held-out records each, which are evaluated before the first round and after every one."""
    seen = defaultdict(list)
    real = Engine.forward

    def spy(self, batches, *, learn):
        for sent in batches:
            flat, start = sent.hidden.reshape(-1, sent.hidden.shape[-1]), 0
            for row, length in enumerate(sent.lengths):
                rows = flat[start : start + length].detach().numpy().copy()
                seen[sent.client].append((sent.step, row, learn, rows))
                start += length
        return real(self, batches, learn=learn)

    monkeypatch.setattr(Engine, "forward", spy)
    house = build_house(tmp_path / "house")
    text = ROUND.replace("releases = 3", f"releases = {rounds + 1}").replace("releases = 2", f"releases = {rounds}")
    policy, job = policy_of(text), house.job(rounds=rounds, epochs=1)
    outcome = train_all(house, house.core(job, policy), policy, count=10)
    assert not outcome.errors
    lines = [json.loads(line) for line in (house.root / "alice.truth").read_text().splitlines()]
    truth = {(line["step"], line["row"]): tuple(line["tokens"]) for line in lines}
    facts = PublicFacts(policy=policy, model="0" * 64, passes=rounds, job=job)
    sigma = plan_for(policy.privacy, rows=1).cut.sigma

    def right(releases):
        """Share of alice's releases that were linked with all fresh ones of the same record, and no other."""
        shares = []
        for learn in (False, True):
            mine = [r for r in releases if r[2] == learn]
            passes = facts.passes_of(learn=learn)
            links = link_releases([rows for *_, rows in mine], passes, sigma=sigma)
            for i, linked in enumerate(links):
                words = {truth[mine[j][0], mine[j][1]] for j in linked}
                shares.append(
                    len(linked) == passes and len({mine[j][3].tobytes() for j in linked}) == passes and len(words) == 1
                )
                assert truth[mine[i][0], mine[i][1]] in words or not shares[-1]
        return sum(shares) / len(shares)

    # The spy sees connections and not names; alice's is the one whose steps the truth explains best.
    known = [releases for releases in seen.values() if {(s, r) for s, r, *_ in releases} == set(truth)]
    assert known
    assert max(map(right, known)) == 1.0
