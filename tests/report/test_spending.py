"""The account of a site: every figure against sums over the entries by hand, and a page that fetches and runs nothing."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path
from statistics import NormalDist

import pytest
from pydantic import ValidationError

from securesplit.policy.load import load_policy, parse_policy
from securesplit.privacy.calibrate import epsilon_for, epsilon_rdp_for
from securesplit.privacy.ledger import ALL, Charge, Ledger
from securesplit.report.spending import SpendingReport, render_spending, spending
from tests.e2e.house import ROUND, SILENT, policy_text

POLICIES = Path(__file__).parents[2] / "policies"
BALANCED = load_policy(POLICIES / "balanced.toml")
UNIT = 1 << 40
NOISED = parse_policy(
    policy_text(
        SILENT.replace("share = 0.6", "share = 0.5") + "[privacy.updates]\nclip = 1.0\nshare = 0.3\nreleases = 3\n"
    )
)
LEARNING = parse_policy(policy_text(ROUND))


class Page(HTMLParser):
    """Text by element, attributes, and tag balance, by the standard library's parser."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.attributes: list[tuple[str, str, str]] = []
        self.cells: list[list[str]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(source)
        assert self.open == [], "every element is closed"
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "tr":
            self.cells.append([])
        if tag in {"th", "td"}:
            self.cells[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.words.append(data)
        if self.open and {"td", "th"} & set(self.open):
            self.cells[-1][-1] += data


@pytest.fixture
def ledger(tmp_path):
    opened = Ledger(tmp_path / "site" / "ledger", anchors=tmp_path / "anchors")
    yield opened
    opened.close()


def pay(ledger, *entries, policy=BALANCED.digest):
    """``(record, channel, units / 2^40, clip, sigma)`` each."""
    charges = [Charge(r, c, round(u * UNIT), clip, sigma, policy) for r, c, u, clip, sigma in entries]
    ledger.charge(charges, budget=1 << 50, caps=[1000] * len(charges))


# Two records, one cheaper; three tokens charged to all; a reserve for peers.
ENTRIES = (
    ("a", "cut", 0.25, 600.0, 2400.0),
    ("b", "cut", 0.125, 600.0, 2400.0),
    ("b", "cut", 0.25, 600.0, 1200.0),
    (ALL, "decode", 0.03125, 100.0, 900.0),
    (ALL, "decode", 0.03125, 100.0, 900.0),
    (ALL, "decode", 0.03125, 100.0, 900.0),
    (ALL, "peers", 0.5, 100.0, 900.0),
    ("c", "update", 0.0625, 3.0, 30.0),
)


def test_every_figure_is_a_sum_over_the_entries(ledger):
    pay(ledger, *ENTRIES)
    found = spending(ledger, BALANCED)
    everyone = Fraction(3, 32) + Fraction(1, 2)
    worst = Fraction(3, 8) + everyone  # Record b.
    assert found.mu == pytest.approx(math.sqrt(worst))
    assert (found.policy, found.policy_digest, found.unit) == ("balanced", BALANCED.digest, "sequence")
    assert (found.relation, found.delta, found.regime, found.budget_epsilon) == ("replace-one", 1e-5, "frozen", 8.0)
    assert (found.entries, found.adopted, found.head) == (8, 0, ledger.head())
    assert found.policies == ((BALANCED.digest, 8),)
    by_name = {c.channel: c for c in found.channels}
    assert {n: (c.releases, c.records, c.everyone) for n, c in by_name.items()} == {
        "cut": (3, 2, 0),
        "decode": (3, 0, 3),
        "peers": (1, 0, 1),
        "update": (1, 1, 0),
    }
    squares = {"cut": Fraction(3, 8), "decode": Fraction(3, 32), "peers": Fraction(1, 2), "update": Fraction(1, 16)}
    for name, square in squares.items():
        assert by_name[name].mu == pytest.approx(math.sqrt(square)), name
        assert by_name[name].epsilon == pytest.approx(printed(math.sqrt(square), 1e-5), rel=1e-9)
    assert by_name["cut"].sigma_over_clip == (2.0, 4.0)
    assert by_name["decode"].sigma_over_clip == (9.0, 9.0)
    assert found.eps_server == pytest.approx(printed(math.sqrt(worst), 1e-5), rel=1e-9)
    assert found.bits == pytest.approx(float(worst) / 8 / math.log(2))
    assert found.left == pytest.approx(1 - float(worst) / found.budget_mu**2)
    assert printed(found.budget_mu, 1e-5) == pytest.approx(8.0, rel=1e-6)
    normal = NormalDist()
    for ceiling in found.ceilings:
        assert ceiling.ceiling == pytest.approx(normal.cdf(normal.inv_cdf(ceiling.prior) + math.sqrt(worst)))
    assert [c.prior for c in found.ceilings] == [0.01, 0.05, 0.1, 0.3, 0.5]


def printed(mu, delta):
    """The larger of what the two accountants say of a mu."""
    return max(epsilon_for(mu, delta), epsilon_rdp_for(mu, delta))


def test_an_empty_ledger_has_spent_nothing(ledger):
    found = spending(ledger, BALANCED)
    assert (found.mu, found.eps_server, found.left, found.bits, found.channels, found.entries) == (
        0.0,
        0.0,
        1.0,
        0.0,
        (),
        0,
    )
    assert [c.ceiling for c in found.ceilings] == pytest.approx([c.prior for c in found.ceilings])
    page = Page(render_spending(found))
    assert "Nothing yet." in page.text
    assert "ε = 0 of 8" in page.text
    assert "Nothing" not in found.text()


def test_more_than_the_budget_leaves_nothing_and_no_less(ledger):
    """Another policy's charges count, too; the part that is left never falls below nothing."""
    pay(ledger, ("a", "cut", 100.0, 1.0, 1.0), policy="f" * 64)
    found = spending(ledger, BALANCED)
    assert (found.left, found.mu) == (0.0, 10.0)
    assert found.eps_server > 8.0
    render_spending(found)


# ---- against the other clients ---------------------------------------------------------------------------------------


def test_bare_sums_give_no_claim_against_the_other_clients(ledger):
    pay(ledger, ("a", "cut", 0.25, 1.0, 4.0))
    found = spending(ledger, BALANCED)
    assert found.eps_peer is None
    assert "eps_peer: none, no noise" in found.text()
    assert "carry no noise" in Page(render_spending(found)).text


def test_noised_sums_in_frozen_give_the_claim_of_the_sums_alone(ledger):
    pay(ledger, ("a", "cut", 0.25, 1.0, 4.0), (ALL, "update", 0.5, 1.0, 4.0), policy=NOISED.digest)
    found = spending(ledger, NOISED)
    assert found.eps_peer == pytest.approx(printed(math.sqrt(0.5), 1e-5))
    assert found.eps_server == pytest.approx(printed(math.sqrt(0.75), 1e-5))
    assert f"ε = {found.eps_peer:.3g}" in Page(render_spending(found)).text


def test_where_b_learns_the_other_clients_see_what_the_server_sees(ledger):
    pay(ledger, ("a", "cut", 0.25, 1.0, 4.0), ("a", "update", 0.5, 1.0, 4.0), policy=LEARNING.digest)
    found = spending(ledger, LEARNING)
    assert found.eps_peer == found.eps_server > 0


@pytest.mark.parametrize("policy", [NOISED, LEARNING])
def test_runs_under_another_policy_may_have_shared_bare_sums(ledger, policy):
    """A bare sum leaves no entry of its own, so after a run under another policy nothing is claimed against the peers."""
    pay(ledger, (ALL, "update", 0.5, 1.0, 4.0), policy=policy.digest)
    pay(ledger, ("a", "cut", 0.25, 1.0, 4.0))
    found = spending(ledger, policy)
    assert found.eps_peer is None
    assert dict(found.policies) == {policy.digest: 1, BALANCED.digest: 1}
    text = Page(render_spending(found)).text
    assert "Charges were made under 2 policies" in text
    assert BALANCED.digest[:12] in text


def test_labels_have_no_noise_in_clips(ledger):
    """A randomised answer has an epsilon, not a sigma; the column would lie."""
    pay(ledger, ("a", "labels", 0.25, 1.0, 0.4), ("a", "cut", 0.25, 1.0, 4.0), policy=LEARNING.digest)
    found = spending(ledger, LEARNING)
    assert {c.channel: c.sigma_over_clip for c in found.channels} == {"labels": None, "cut": (4.0, 4.0)}
    row = next(cells for cells in Page(render_spending(found)).cells if cells[0] == "labels")
    assert row[4] == "–"


# ---- adoption --------------------------------------------------------------------------------------------------------


def test_a_ledger_that_was_moved_says_so(ledger, tmp_path):
    pay(ledger, ("a", "cut", 0.25, 600.0, 2400.0))
    ledger.close()
    adopted = Ledger.adopt(tmp_path / "site" / "ledger", anchors=tmp_path / "anchors")
    found = spending(adopted, BALANCED)
    adopted.close()
    assert (found.adopted, found.entries) == (1, 2)
    assert [c.channel for c in found.channels] == ["cut"], "an adoption is no release"
    assert found.policies == ((BALANCED.digest, 1),)
    assert "accepted after a move once." in Page(render_spending(found)).text
    assert "adopted (times: 1)" in found.text()


# ---- the page --------------------------------------------------------------------------------------------------------


@pytest.fixture
def report(ledger) -> SpendingReport:
    pay(ledger, *ENTRIES)
    return spending(ledger, BALANCED)


def test_the_page_shows_the_figures(report):
    page = Page(render_spending(report))
    rows = {cells[0]: cells for cells in page.cells}
    assert rows["cut"][1:6] == ["3", "2", "0", "2 to 4", f"{math.sqrt(0.375):.3g}"]
    assert rows["decode"][1:5] == ["3", "0", "3", "9"]
    for ceiling in report.ceilings:
        assert rows[f"{100 * ceiling.prior:.0f} %"][1] == f"{100 * ceiling.ceiling:.1f} %"
    assert report.head in page.text
    assert report.policy_digest in page.text
    assert f"ε = {report.eps_server:.3g} of 8" in page.text
    assert f"{100 * report.left:.1f} %" in page.text
    for word in ("unit: one sequence", "relation: replace-one", "δ = 10⁻⁵", "regime frozen", "8 ledger entries"):
        assert word in page.text


def test_nothing_is_fetched_and_nothing_runs(report):
    source = render_spending(report)
    assert not re.search(r"https?:|//\w|@import|<script|<link|<iframe|<img|javascript:|url\((?!#)", source)
    page = Page(source)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name != "src"
        if name.endswith("href"):
            assert value.startswith("#")
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert ("html", "lang", "en") in page.attributes


def test_markup_in_any_name_stays_text(report):
    evil = "<img src=x onerror=alert(1)> $x^2$ {{ 7 * 7 }}"
    channels = (report.channels[0].model_copy(update={"channel": evil}),)
    changed = report.model_copy(
        update={
            "policy": evil, "unit": evil, "relation": evil, "regime": evil, "head": evil, "policy_digest": evil,
            "channels": channels, "policies": ((evil, 1), ("b", 2)),
        }
    )  # fmt: skip
    source = render_spending(changed)
    assert "<img" not in source
    page = Page(source)
    assert page.text.count(evil) >= 6
    assert not any(name.startswith("on") for _, name, _ in page.attributes)


def test_a_report_is_what_it_says_and_nothing_else(report):
    with pytest.raises(ValidationError):
        SpendingReport.model_validate({**report.model_dump(), "text_of_a_record": "x"})
    with pytest.raises(ValidationError):
        report.mu = 0.0
    again = SpendingReport.model_validate_json(report.model_dump_json())
    assert again == report
    for record in ("a", "b", "c"):
        assert f'"{record}"' not in report.model_dump_json(), "no ledger key of a record stands in a report"


def test_a_policy_without_protection_has_no_account(ledger):
    with pytest.raises(TypeError, match="no ledger"):
        spending(ledger, load_policy(POLICIES / "lab.toml"))
