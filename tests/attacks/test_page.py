"""Reports that people read: nothing is fetched, hostile text stays text, and a real browser draws them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest

from attacks.compare import compare
from attacks.folder import write_folder, write_sweep_folder
from attacks.markdown import markdown, sweep_markdown
from attacks.page import page, sweep_page
from attacks.report import (
    Baselines,
    Bounds,
    Check,
    Example,
    Piece,
    Point,
    Report,
    Result,
    Setting,
    Untested,
    require_below_ceiling,
    require_noise,
    require_within_limits,
)
from attacks.sweep import Done, Sweep
from attacks.threat import Threat
from securesplit.errors import CheckFailed, InputError, LeakageExceeded

HOSTILE = '</script><img src=x onerror="document.title=1">&lt; | `'


def result(name="vocabulary-map", value=0.4, **changes):
    stated = {
        "name": name, "threat": "a server", "value": value, "value_ci95": (value - 0.05, value + 0.05), "value_prior": 0.05,
        "token_recovery": value, "ci95": (value - 0.05, value + 0.05), "prior": 0.05, "seconds": 1.5, "sequences": 4,
        "tokens": 40, "ceiling": 0.6,
    }  # fmt: skip
    return Result(**(stated | changes))


def curve():
    points = tuple(Point(fpr=f, tpr=t) for f, t in ((0.0, 0.1), (0.01, 0.3), (1.0, 1.0)))
    return result(
        "membership-loss", 0.8, measure="membership", channel="O6", token_recovery=None, ci95=None, roc=points,
        tpr_at_001=0.3, tpr_at_0001=0.1, ceiling=0.9,
    )  # fmt: skip


@pytest.fixture
def report():
    def make(*attacks, hostile=False, **changes):
        attacks = attacks or (result("ridge", 0.1), result(), curve())
        text = HOSTILE if hostile else "Anna Muster, 040 123"
        pieces = (Piece(text=text, pii=True, right=True), Piece(text=" came", pii=False, right=False))
        stated = {
            "attacks": attacks, "worst": 0.4, "worst_attack": "vocabulary-map", "kappa": 0.2, "ceiling": 0.6, "epsilon": 8.0,
            "delta": 1e-5, "mu": 1.57, "unit": "sequence", "relation": "replace-one", "policy": "balanced",
            "policy_digest": "ab" * 32, "profile": "smoke",
            "setting": Setting(
                transcript="cd" * 32, model="ef" * 32, policy="balanced", policy_digest="ab" * 32, mechanism="01" * 32,
                cut=(2, 2), codec="f32", sigma=700.0, clip=560.0, releases=1, profile="smoke", threat=Threat(), asked=(),
                seed=0, created="2026-11-22T08:00:00+00:00",
            ),
            "baselines": Baselines(
                uniform=2e-5, unigram=0.05, positional=0.1, lm_free=0.02, lm_forced=0.3, lm_bits=5.5, nearest_text=0.12
            ),
            "bounds": Bounds(
                kappa=0.2, ceiling=0.6, membership_ceiling=0.87, certified_floor=None, capacity_bits=1.2, token_bits=15.6
            ),
            "untested": (Untested(name="hijack", why="the threat model is passive"),),
            "checks": (Check(name="O1 energy", statistic=0.9, threshold=0.7, passed=True),), "flags": (),
            "examples": (
                Example(truth=text + " came", recovered=text, attack="vocabulary-map", truth_pieces=pieces, recovered_pieces=pieces),
            ),
        }  # fmt: skip
        return Report(**(stated | changes))

    return make


@pytest.fixture
def sweep(report):
    cells = tuple(
        Done(
            digest=f"{i}", policy=policy, epsilon=epsilon, cut=(front, 2), codec="f32", releases=1, seed=seed,
            loss=3.0 + i / 10, initial_loss=4.0, report=report(worst=0.1 * i).model_copy(update={"examples": ()}),
        )
        for i, (policy, epsilon, front, seed) in enumerate(
            [("lab", None, 1, 0), ("lab", None, 2, 0), ("balanced", 8.0, 1, 0), ("balanced", 8.0, 2, 0), ("balanced", 8.0, 2, 1)]
        )
    )  # fmt: skip
    return Sweep(name="tiny", created="2026-11-22T08:00:00+00:00", cells=cells)


def test_hostile_text_stays_text_and_nothing_is_fetched(report):
    made = page(report(hostile=True, policy="balanced"))
    assert "<img" not in made
    assert made.count("<script") == 2, "the data and the page's own script"
    assert not re.search(r'(src|href)\s*=\s*"', made)
    assert "default-src 'none'" in made
    assert "unsafe-inline" not in made


def test_the_figures_are_on_the_pages(report):
    for made in (page(report()), markdown(report())):
        for words in ("balanced", "vocabulary-map", "0.400", "0.600", "hijack", "cd" * 32, "sequence", "replace-one"):
            assert words in made
    assert "Anna Muster" in page(report())


def test_failed_checks_of_the_noise_stand_first_and_in_bold(report):
    passed = Check(name="O1 energy", statistic=0.9, threshold=0.75, passed=True)
    failed = Check(name="O3 reuse", statistic=0.1234, threshold=0.625, passed=False)
    made = markdown(report(checks=(passed, failed)))
    rows = [line for line in made.splitlines() if line.startswith(("| O1 energy", "| **O3 reuse"))]
    assert rows == ["| **O3 reuse** | **0.123** | **0.625** | **NO** |", "| O1 energy | 0.900 | 0.750 | yes |"]
    assert made.index("O3 reuse") < made.index("Setting")
    assert "noise that arrived" not in markdown(report(checks=())).lower()


def test_under_unit_token_no_ceiling_is_claimed(report):
    made = markdown(report(result(ceiling=None), unit="token", ceiling=1.0))
    assert "no ceiling is computed" in made
    assert "exceeds" not in made


def test_texts_are_written_only_when_asked(report, tmp_path):
    write_folder(report(), tmp_path / "bare", texts=False)
    write_folder(report(), tmp_path / "whole", texts=True)
    bare = {p.name: p.read_text() for p in (tmp_path / "bare").iterdir()}
    whole = {p.name: p.read_text() for p in (tmp_path / "whole").iterdir()}
    assert bare.keys() == whole.keys() == {"report.json", "report.md", "report.html"}
    assert not any("Anna" in text for text in bare.values())
    assert "Anna" in whole["report.md"]
    assert "Anna" in whole["report.html"]
    assert "Anna" not in whole["report.json"]
    assert (tmp_path / "whole").stat().st_mode & 0o077 == 0, "private texts are for their owner"
    again = Report.from_json(bare["report.json"])
    assert again.model_copy(update={"examples": report().examples}) == report()


def test_a_folder_is_never_overwritten_or_half_written(report, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError) as caught:
        write_folder(report(), tmp_path / "out", texts=False)
    assert caught.value.code == "SS-1712"

    def full(*_, **__):
        raise OSError("full")

    monkeypatch.setattr("pathlib.Path.rename", full)
    with pytest.raises(InputError):
        write_folder(report(), tmp_path / "other", texts=False)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_published_schema_is_what_the_report_is(report, pytestconfig):
    schema = json.loads((pytestconfig.rootpath / "docs" / "attack-report.schema.json").read_text())
    made = json.loads(report().to_json())
    assert made.keys() == schema["properties"].keys()
    assert set(schema["required"]) <= made.keys()
    assert made["attacks"][0].keys() == schema["$defs"]["Result"]["properties"].keys()
    script = pytestconfig.rootpath / "scripts" / "write-attack-schema"
    space: dict[str, object] = {"__name__": "schema", "__file__": str(script)}
    exec(compile(script.read_text(), str(script), "exec"), space)
    assert space["schema"]() == (pytestconfig.rootpath / "docs" / "attack-report.schema.json").read_text()


def test_judgements(report):
    require_below_ceiling(report())
    with pytest.raises(CheckFailed) as caught:
        require_below_ceiling(report(result(value=0.7, sequences=5)))
    assert (caught.value.code, caught.value.exit_code) == ("SS-1570", 1)
    require_noise(report())
    with pytest.raises(CheckFailed) as caught:
        require_noise(report(checks=(Check(name="O1 reuse", statistic=0.1, threshold=0.7, passed=False),)))
    assert caught.value.code == "SS-1573"
    require_within_limits(report(), token_recovery=0.4, pii_exact=None, membership=0.8)
    with pytest.raises(LeakageExceeded) as over:
        require_within_limits(report(), token_recovery=0.39, pii_exact=None, membership=0.79)
    assert (over.value.exit_code, len(over.value.details)) == (7, 2)


@pytest.mark.parametrize(
    ("limits", "change", "word"),
    [
        ({"pii_exact": 0.5}, {}, "personal data"),
        ({"membership": 0.9}, {"attacks": (result(),)}, "membership AUC"),
        ({"token_recovery": 0.9}, {"attacks": (curve(),), "worst": 0.0}, "token recovery"),
        ({"token_recovery": 0.9, "profile": "standard"}, {}, "profile"),
        ({"token_recovery": 0.9}, {"asked": ("ridge",)}, "by name"),
        ({"token_recovery": 0.9}, {"threat": Threat(text="none")}, "no text"),
        ({"token_recovery": 0.9}, {"threat": Threat(weights="none")}, "weights"),
    ],
)
def test_a_limit_that_cannot_be_judged_is_no_pass(report, limits, change, word):
    change = dict(change)
    attacks = change.pop("attacks", ())
    worst = {"worst": change.pop("worst")} if "worst" in change else {}
    made = report(*attacks, **worst)
    made = made.model_copy(update={"setting": made.setting.model_copy(update=change)})
    stated = {"token_recovery": None, "pii_exact": None, "membership": None, **limits}
    with pytest.raises(LeakageExceeded) as caught:
        require_within_limits(made, **stated)
    assert (caught.value.code, caught.value.exit_code, len(caught.value.details)) == ("SS-7003", 7, 1)
    assert word in caught.value.details[0]


def test_the_named_share_of_a_sum_counts_against_the_limit_of_tokens(report):
    bag = result("update-bag", 0.95, measure="bag", channel="O5", token_recovery=None, ci95=None)
    with pytest.raises(LeakageExceeded, match="more than"):
        require_within_limits(report(result(), bag), token_recovery=0.5, pii_exact=None, membership=None)


def test_no_labelled_data_is_no_figure(report):
    assert report().pii_exact is None
    assert report(result(pii_exact=0.0)).pii_exact == 0.0


def test_a_ceiling_is_judged_by_the_floor_and_only_on_a_sample(report):
    require_below_ceiling(report(result(value=0.7, sequences=4)))
    require_below_ceiling(report(result(value=0.7, sequences=50, floor=0.59)))
    require_below_ceiling(report(result(value=1.0, sequences=50, floor=0.9, ceiling=None)))
    with pytest.raises(CheckFailed):
        require_below_ceiling(report(result(value=0.7, sequences=50, floor=0.61)))


def test_a_comparison_says_what_changed_and_what_is_chance(report):
    a, b = report(), report(result("ridge", 0.12), result(value=0.9), worst=0.9)
    found = compare(a, b)
    by_name = {d.name: d for d in found.attacks}
    assert by_name["vocabulary-map"].change == pytest.approx(0.5)
    assert by_name["vocabulary-map"].clear is True
    assert by_name["ridge"].clear is False
    assert by_name["membership-loss"].after is None
    assert found.settings == ()


@pytest.fixture(scope="module")
def browser():
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium on this machine")

    def show(path):
        done = subprocess.run(
            [found, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--virtual-time-budget=3000",
             f"--user-data-dir={path.parent / 'profile'}", "--dump-dom", path.as_uri()],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        return done.stdout

    return show


def test_a_browser_draws_the_report(report, tmp_path, browser):
    (tmp_path / "r.html").write_text(page(report(hostile=True)))
    drawn = browser(tmp_path / "r.html")
    assert 'data-drawn="yes"' in drawn, "the script ran to its end under the page's own policy"
    assert drawn.count('class="span"') == 3, "one interval for each attack"
    assert 'class="curve"' in drawn
    assert "<title>1</title>" not in drawn


def test_every_epsilon_of_a_sweep_has_its_meaning(sweep):
    claim = "at delta 1e-05, unit sequence, replace-one"
    assert [done.budget for done in sweep.cells] == ["none"] * 2 + [f"8 {claim}"] * 3
    rows = [line for line in sweep_markdown(sweep).splitlines() if line.startswith("| balanced")]
    assert len(rows) == 2
    assert all(f"| 8 {claim} |" in row for row in rows)
    made = sweep_page(sweep)
    assert made.count(f'<td class="n">8</td><td>{claim}</td>') == 3
    assert made.count('<td class="n">none</td><td>no bound</td>') == 2
    assert f'"meanings": "{claim}"' in made


def test_a_browser_draws_the_sweep(sweep, tmp_path, browser):
    write_sweep_folder(sweep, tmp_path / "out")
    drawn = browser(tmp_path / "out" / "report.html")
    assert 'data-drawn="yes"' in drawn
    assert drawn.count('class="dot"') == 5
    assert drawn.count('class="cell"') == 4, "two cuts by two budgets; seeds are one cell"
