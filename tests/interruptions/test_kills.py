"""A run that is killed before any file operation, or halfway through any write, and resumed, ends as one that was not.

All scripts that train. disk.py says how. Nothing here depends on how fast the machine is.
"""

from itertools import takewhile

import pytest

from tests.interruptions.cases import Case, assert_equal, undisturbed
from tests.interruptions.disk import watch

pytestmark = pytest.mark.slow


def test_a_kill_before_every_file_operation(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    expected, disk = undisturbed(case)
    assert len(disk.moments) > 20
    for moment in disk.moments:
        moment.restore(case.results)
        status = case.run()
        assert status == 0, (moment.before, status, capsys.readouterr().err[-500:])
        assert_equal(case.outcome(), expected, f"killed before {moment.before}: ")


def test_a_kill_while_a_run_is_replaced(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    """The run before is whole, or is no run any more. Both have the same options, so the outcome is known."""
    assert case.run() == 0
    expected, resuming = case.outcome(), case.line
    dash = "-" if "-resume" in case.line else "--"
    case.line = [word for word in case.line if word not in ("-resume", "--resume", "auto")] + [f"{dash}overwrite"]
    with watch(case.results) as disk:
        assert case.run() == 0
    replacing, case.line = case.line, resuming
    moments = list(takewhile(lambda moment: ".new" not in moment.before, disk.moments))  # until the new run's first file
    assert len(moments) > 3
    for moment in moments:
        moment.restore(case.results)
        status = case.run()
        if status == 2:  # there is a rest that cannot be continued: it says so, and can be replaced
            assert capsys.readouterr().err.count("\n") == 1, moment.before
            status = Case(case.script, replacing, case.results).run()
        assert status == 0, (moment.before, capsys.readouterr().err[-500:])
        assert_equal(case.outcome(), expected, f"killed before {moment.before}: ")
