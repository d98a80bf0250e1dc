"""The page: self-contained, escaped, honest; read back by the standard library's parser, not by the template's words."""

from __future__ import annotations

import re
import statistics
from html.parser import HTMLParser

import pytest

from securesplit.report.html import render_html, write_html
from securesplit.report.plots import budget_plot, leakage_plot, loss_plot, phase_plot
from securesplit.report.record import Phase, Report

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Text, attributes and tag balance of a page."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.words: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.headings: list[str] = []
        self.feed(source)
        assert self.open == []
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)
            if self.open and self.open[-1] == "h2":
                self.headings.append(data)


def altered(report: Report, **parts: dict[str, object]) -> Report:
    whole = report.model_dump(mode="json")
    for part, fields in parts.items():
        whole[part].update(fields)
    return Report.model_validate(whole)


@pytest.fixture
def page(report) -> Page:
    return Page(render_html(report))


def test_the_sections(page):
    assert page.headings == [
        "What this run did",
        "What the policy protects",
        "What it costs",
        "What it does not protect",
        "How to check it yourself",
    ]


def test_nothing_is_fetched_and_nothing_runs(report, page):
    source = render_html(report)
    assert not re.search(r"https?:|//\w|@import|<script|<link|<iframe|<img|javascript:", source)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name != "src"
        if name.endswith("href"):
            assert value.startswith("#")
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_text_of_the_run_is_escaped_and_shown(page):
    assert "<script>alert(1)</script>" in page.text
    assert "ward <b>round</b>." in page.text


def test_markup_in_any_name_stays_text(report):
    evil = "<img src=x onerror=alert(1)> $x^2$"
    whole = report.model_dump(mode="json")
    whole["phases"][0]["name"] = whole["model"]["name"] = whole["policy"]["purpose"] = evil
    whole["leakage"]["attack"] = whole["privacy"]["channels"][0]["channel"] = whole["checks"][0]["command"] = evil
    source = render_html(Report.model_validate(whole))
    assert "<img" not in source
    assert Page(source).text.count(evil) >= 7


def test_every_epsilon_carries_unit_relation_and_delta(page):
    places = [m.start() for m in re.finditer(r"ε = \d", page.text)]
    assert len(places) == 8  # The card, two in the sentence, three channels, the sum and the grant.
    for place in places:
        assert re.match(
            r"ε = [\d.]+( of [\d.]+)?[^ε]{0,45}\(unit: one sequence; relation: replace-one; δ = 10⁻⁵\)",
            page.text[place:],
        )


def test_the_best_guess_is_that_of_the_normal_law(page, report):
    expected = statistics.NormalDist().cdf(report.privacy.mu / 2)
    assert f"right at most {100 * expected:.1f} % of the time" in page.text


def test_ids_are_unique_and_every_reference_has_its_target(report, page):
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    source = render_html(report)
    wanted = set(re.findall(r"url\(#([^)]+)\)", source)) | {
        value[1:] for _, name, value in page.attributes if name.endswith("href")
    }
    assert wanted
    assert wanted <= set(ids)


def test_the_drawings_leave_their_colours_to_the_page(report):
    for svg in (
        loss_plot(report.train),
        leakage_plot(report.leakage),
        budget_plot(report.privacy),
        phase_plot(report.phases),
    ):
        assert "#0102" not in svg
        assert "currentColor" in svg
        assert set(re.findall(r"var\((--\w+)\)", svg)) <= {"--faint", "--unprotected", "--protected", "--client"}
        assert not re.findall(r"(?:fill|stroke): #(?!ffffff|000000)\w+", svg)
        assert 'role="img"' in svg


def test_equal_reports_give_equal_pages(report):
    assert render_html(report) == render_html(report)


@pytest.mark.parametrize(
    ("client_only", "protected", "said"),
    [
        (6.0, 5.0, "The server still earns its place: with it the loss is 1.000 nats per token lower"),
        (5.0, 6.0, "the server did harm: the client alone ends 1.000 nats per token lower"),
        (5.0, 5.01, "the server added nothing that can be measured"),
    ],
)
def test_the_cost_is_said_in_words(report, client_only, protected, said):
    train = {"protected": [7.0, protected], "client_only": [8.0, client_only], "final_loss": protected}
    assert said in Page(render_html(altered(report, train=train))).text


@pytest.mark.parametrize(
    ("blind", "noised", "said"),
    [
        (True, False, "the ε above holds against the server, not against the other clients"),
        (True, True, "all clients learned the summed adapters, the server did not"),
        (False, True, "learned the noised sums, which the budget covers"),
        (False, False, "and the server learned the summed adapters without noise: no ε above covers them"),
    ],
)
def test_who_learns_the_sums_is_said(report, blind, noised, said):
    text = Page(render_html(altered(report, aggregation={"blind": blind, "noised": noised}))).text
    assert said in text
    assert ("apart from the sums of updates" in text) == (not blind and not noised)


def test_an_unsafe_run_is_stamped_and_claims_nothing(report):
    nothing = {"epsilon": None, "delta": None, "mu": None, "budget": None, "channels": []}
    fields = report.model_dump(mode="json")
    fields["policy"]["unsafe"] = True
    fields["privacy"].update(nothing)
    fields["leakage"]["protected"]["ceiling"] = None
    text = Page(render_html(Report.model_validate(fields))).text
    assert "UNSAFE" in text
    assert "ε = " not in text
    assert "Without noise there is no guarantee at all." in text


def test_a_high_ceiling_is_called_high(report):
    fields = report.model_dump(mode="json")
    fields["leakage"]["protected"]["ceiling"] = 0.93
    assert "That ceiling is high" in Page(render_html(Report.model_validate(fields))).text
    assert "That ceiling is high" not in Page(render_html(report)).text


def test_a_bare_report_renders(report):
    fields = report.model_dump(mode="json")
    fields.update(phases=[], examples=[], checks=[], generated=None)
    fields["privacy"]["channels"] = []
    fields["leakage"]["unprotected"]["pii_exact"] = fields["leakage"]["protected"]["pii_exact"] = None
    text = Page(render_html(Report.model_validate(fields))).text
    assert "What the server reads" not in text
    assert "without a fault" not in text


def test_a_phase_of_no_time_is_drawn():
    assert "0.0 s" in phase_plot((Phase(name="nothing", seconds=0.0),))


def test_the_page_is_written_in_utf8(report, tmp_path):
    write_html(report, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes().decode("utf-8") == render_html(report)
