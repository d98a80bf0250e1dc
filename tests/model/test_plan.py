from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.errors import InputError
from securesplit.model.plan import ROLES, CutPlan


@settings(max_examples=60, deadline=None)
@given(front=st.integers(0, 40), back=st.integers(0, 40), layers=st.integers(1, 60))
def test_spans_are_a_partition_with_a_middle_or_an_error(front, back, layers):
    plan = CutPlan(front, back)
    if front + back >= layers:
        with pytest.raises(InputError, match="SS-1400"):
            plan.spans(layers)
        return
    spans = plan.spans(layers)
    assert [*spans.front, *spans.middle, *spans.back] == list(range(layers))
    assert (len(spans.front), len(spans.back)) == (front, back)
    assert len(spans.middle) >= 1
    for role in ROLES:
        assert all(spans.role_of(layer) == role for layer in spans.of(role))


@pytest.mark.parametrize("bad", [-1, 1.5, True, "2", None])
def test_a_cut_counts_whole_layers(bad):
    with pytest.raises(InputError, match="SS-1400"):
        CutPlan(front=bad)
    with pytest.raises(InputError, match="SS-1400"):
        CutPlan(back=bad)


def test_the_plan_imports_no_torch():
    code = "import sys, securesplit.model.plan, securesplit.model.manifest; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
