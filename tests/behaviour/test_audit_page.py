"""The report of an audit in a browser: wide and narrow, without a complaint or a request."""

import pytest

from audits import HOSTILE, pairs_suite, run_audit
from browser import CHROMIUM, Browser

pytestmark = pytest.mark.slow  # and it needs Chromium


def test_the_report_is_shown_whole_and_acts_on_nothing(model, tmp_path):
    assert CHROMIUM, "install Chromium: this test drives it"
    done = run_audit(model, pairs_suite(tmp_path), tmp_path / "out")
    for size, dark in (((1200, 900), False), ((390, 900), True)):
        profile = tmp_path / f"profile {size[0]}"
        with Browser(profile, size, dark=dark) as browser:
            browser.open(tmp_path / "out" / "report.html")
            assert browser.run("document.documentElement.scrollWidth <= innerWidth")
            text = browser.run("document.body.innerText")
            assert HOSTILE.partition("\u202e")[0] in text and "first text of the pair" in text
            for line in done.not_shown:
                assert line in text
            assert browser.run("document.querySelectorAll('script, img').length") == 0
            assert browser.errors == []
            assert [a for a in browser.requests if not a.endswith("report.html")] == []
