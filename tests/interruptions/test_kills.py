"""A run that is killed before any file operation, or halfway through any write, and resumed, ends as one that was not.

All scripts that train. disk.py says how. Nothing here depends on how fast the machine is.
"""

import pytest

from tests.interruptions.cases import Case, assert_equal, undisturbed

pytestmark = pytest.mark.slow


def test_a_kill_before_every_file_operation(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    expected, disk = undisturbed(case)
    assert len(disk.moments) > 20
    for moment in disk.moments:
        moment.restore(case.results)
        status = case.run()
        assert status == 0, (moment.before, status, capsys.readouterr().err[-500:])
        assert_equal(case.outcome(), expected, f"killed before {moment.before}: ")
