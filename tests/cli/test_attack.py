"""``securesplit attack``: one JSON object, errors as errors."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from attacks.config import config
from securesplit.cli.attack import app
from securesplit.errors import CheckFailed, InputError, LeakageExceeded
from securesplit.model.manifest import read_manifest
from securesplit.model.plan import CutPlan
from securesplit.model.store import load_front
from securesplit.model.writer import write_model
from securesplit.policy.load import load_policy
from securesplit.protocol.codec import encode
from securesplit.protocol.messages import Blob, Forward, Hello
from securesplit.protocol.transcript import Recorder

_HEAD = """
name = "NAME"
purpose = "a policy for the tests of the attacks"
cost = "nothing, since nobody uses it"
[aggregation]
min_clients = 3
min_threshold = 2
blind = true
max_update = 1.0
[limits]
min_front = 0
min_back = 0
max_sequences = 64
buckets = [8]
max_message_bytes = 1048576
[transport]
loopback_only = true
[privacy]
"""
_UNSAFE = 'mechanism = "UnsafeNoPrivacy"\n'
_PRIVATE = """
mechanism = "gaussian"
unit = "sequence"
relation = "replace-one"
epsilon = 1.0
delta = 1e-5
regime = "frozen"
[privacy.activations]
clip = 10.0
share = 1.0
releases = 1
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model directory, and for each policy a recording of un-noised states with its truth."""
    home = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 60,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_key_value_heads=2, initializer_range=0.3)
    )
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(60)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0")
    write_model(model.eval(), CutPlan(front=1, back=1), home / "model", tokenizer=tokenizer)
    tokens = torch.randint(1, 60, (4, 8))
    with torch.inference_mode():
        rows = load_front(home / "model")(tokens).reshape(-1, 16).numpy()
    for name, privacy in (("lab", _UNSAFE), ("strict", _PRIVATE)):
        (home / f"{name}.toml").write_text(_HEAD.replace("NAME", name) + privacy)
        recorder = Recorder(home / name, peer="spiffe://t/a", number=0)
        digest = load_policy(home / f"{name}.toml").digest
        recorder.record(0, 0, encode(Hello(version=1, nonce=bytes(32), policy=digest)))
        blob = Blob(dtype="f32", shape=rows.shape, data=rows.astype("<f4").tobytes())
        recorder.record(0, 1, encode(Forward(step=0, lengths=(8,) * 4, learn=False, hidden=blob)))
        recorder.close()
        policy = load_policy(home / f"{name}.toml").model_dump(mode="json")
        facts = {"policy": policy, "job": None, "model": read_manifest(home / "model").digest, "version": 1}
        (home / name / "transcript.json").write_text(json.dumps(facts))
        lines = (
            {"peer": "spiffe://t/a", "step": 0, "row": i, "tokens": row, "text": " ".join(f"w{t}" for t in row)}
            for i, row in enumerate(tokens.tolist())
        )
        (home / name / "truth.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return home


def call(run, *words, recording="lab"):
    where = ["--transcript", run / recording, "--model", run / "model", "--truth", run / recording / "truth.jsonl"]
    return CliRunner().invoke(app, [str(word) for word in ("run", *where, *words)])


def test_list_names_every_attack():
    done = CliRunner().invoke(app, ["list", "--output", "json"])
    value = json.loads(done.stdout)
    named = {a["name"]: a for a in value["attacks"]}
    assert named.keys() == config().attacks.keys()
    assert all(a["threat"] and a["summary"] and a["published"]["title"] and a["deviations"] for a in named.values())
    assert named["vocabulary-nn"]["published"]["arxiv"] == "2505.18332"
    assert "ICML 2025" in CliRunner().invoke(app, ["list"]).stdout


def test_run_prints_one_json_object(run):
    done = call(run, "--attack", "vocabulary-nn", "--policy", run / "lab.toml", "--output", "json")
    assert done.exception is None, done.exception
    value = json.loads(done.stdout)
    assert (value["worst"], value["ceiling"], value["epsilon"]) == (1.0, 1.0, None)
    assert [a["name"] for a in value["attacks"]] == ["vocabulary-nn"]


def test_a_broken_guarantee_prints_its_figures_and_exits_with_1(run):
    """Rows without any noise under a policy that pays for much of it: neither the noise nor the bound is kept."""
    done = call(run, "--attack", "vocabulary-nn", recording="strict")
    assert isinstance(done.exception, CheckFailed)
    assert (done.exception.code, done.exception.exit_code) == ("SS-1573", 1)
    assert "replace-one" in done.stdout
    assert "1.000" in done.stdout


def test_a_policys_limit_decides_the_exit_status_and_a_report_is_kept(run, tmp_path):
    limited = tmp_path / "limited.toml"
    plain = (run / "lab.toml").read_text()
    limited.write_text(plain + "\n[leakage]\ntoken_recovery = 0.5\nmax_age_days = 30\n")
    done = call(run, "--attack", "vocabulary-nn", "--policy", limited, "--out", tmp_path / "report")
    assert isinstance(done.exception, LeakageExceeded)
    assert (done.exception.code, done.exception.exit_code) == ("SS-7001", 7)
    assert {p.name for p in (tmp_path / "report").iterdir()} == {"report.json", "report.md", "report.html"}
    limited.write_text(plain + '\n[leakage]\ntoken_recovery = 1.0\nmax_age_days = 30\nprofile = "standard"\n')
    part = call(run, "--attack", "vocabulary-nn", "--policy", limited)
    assert (part.exception.code, part.exception.exit_code) == ("SS-7003", 7), (
        "nothing is exceeded, and nothing is shown"
    )
    assert len(part.exception.details) == 3, "one attack, without text, with less effort than the policy asks for"
    again = call(run, "--attack", "vocabulary-nn", "--out", tmp_path / "report")
    assert isinstance(again.exception, InputError)
    assert again.exception.code == "SS-1712"
    read = CliRunner().invoke(app, ["compare", *[str(tmp_path / "report" / "report.json")] * 2, "--output", "json"])
    assert json.loads(read.stdout)["settings"] == []
    made = ["report", "--report", str(tmp_path / "report" / "report.json"), "--out", str(tmp_path / "again")]
    assert CliRunner().invoke(app, made).exit_code == 0
    for words in (["report", "--out", "x"], ["compare", str(limited), str(limited)]):
        assert CliRunner().invoke(app, words).exception.code == "SS-1715"


@pytest.mark.parametrize(
    ("words", "code"),
    [(("--attack", "magic"), "SS-1704"), (("--profile", "huge"), "SS-1704"), (("--policy", "strict.toml"), "SS-1705")],
)
def test_wrong_arguments_are_refused(run, words, code):
    done = call(run, *(run / word if word.endswith(".toml") else word for word in words))
    assert isinstance(done.exception, InputError)
    assert done.exception.code == code
    assert done.stdout == ""
