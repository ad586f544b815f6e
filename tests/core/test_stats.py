"""Request statistics: the share of a transfer that compute hid."""

import pytest

from core.stats import RequestStats


@pytest.mark.parametrize(
    ("transfer_s", "transfer_exposed_s", "ratio"),
    [(4.0, 1.0, 0.75), (4.0, 0.0, 1.0), (1.0, 4.0, 0.0), (0.0, 0.0, None), (None, None, None), (4.0, None, None)],
)
def test_overlap_ratio_is_the_hidden_share_or_none(
    transfer_s: float | None, transfer_exposed_s: float | None, ratio: float | None
) -> None:
    assert RequestStats(transfer_s=transfer_s, transfer_exposed_s=transfer_exposed_s).overlap_ratio == ratio
