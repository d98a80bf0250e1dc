"""What ``generate`` prints: claims in the policy's unit, and nothing that a terminal obeys."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from securesplit.cli.generate import _print_as_it_comes
from securesplit.client.generate import Piece
from securesplit.client.sampling import Sampling
from tests.e2e.house import FROZEN, Loopback, build_house, policy_of, policy_text


@pytest.mark.parametrize("unit", ["sequence", "user"])
def test_the_claim_is_in_the_policy_s_unit(tmp_path, command, unit):
    house, privacy = build_house(tmp_path / "house"), FROZEN.replace('unit = "sequence"', f'unit = "{unit}"')
    (house.root / "private.toml").write_text(policy_text(privacy))
    with Loopback(house.core(house.job(), policy_of(privacy)), house.keys) as loop:
        code, out, err = command(
            "generate", "--policy", house.root / "private.toml", "--keys", house.keys / "bob", "--server", loop.url,
            "--prompt", "w4 w5", "--max-new-tokens", 2, "--output", "json",
        )  # fmt: skip
    assert code == 0, err
    said = json.loads(out)
    assert (said["unit"], said["relation"], said["delta"]) == (unit, "replace-one", 1e-5)
    assert 0 < said["epsilon"] < 8


def test_a_stream_shows_nothing_that_a_terminal_obeys(capsys):
    client = SimpleNamespace(
        stream=lambda *_args, **_options: iter([Piece("w3\x1b[2J", 3, None), Piece("", None, "length")])
    )
    _print_as_it_comes(client, "w4", 1, Sampling())
    assert capsys.readouterr().out == "w3\ufffd[2J\n"
