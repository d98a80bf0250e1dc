"""baseline.html: names in any script, and nothing of a name becomes markup."""

from __future__ import annotations

import warnings

from securesplit.report.comparison import CurveLine, comparison_page


def test_a_row_s_name_may_be_in_any_script_and_stays_text():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = comparison_page(
            title="t",
            about="a",
            head=["model"],
            rows=[["无噪声"]],
            curves=[CurveLine("无噪声", (2.0, 1.0)), CurveLine("<b>", (2.0, 1.5))],
        )
    assert page.count("无噪声") >= 2, "in the table and in the drawing"
    assert "<b>" not in page
