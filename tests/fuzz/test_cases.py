import budget
import campaign
import pytest


@pytest.mark.filterwarnings("ignore:.* share their objects")  # of random batches, too
@pytest.mark.parametrize("name", campaign.CASES)
def test_cases(name):
    """Two seconds of each kind of case, with `--thorough` five; campaign.py runs more."""
    ran, failed = campaign.run(name, 0, 10**6, seconds=5 if budget.thorough else 2)
    assert ran > 0
    assert failed == []
