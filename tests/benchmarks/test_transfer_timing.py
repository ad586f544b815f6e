"""The timing of transfers runs, and its rows say what they are."""

from benchmarks.transfer_timing import MIB, TOKENS_PER_MIB, Load, run


def test_a_load_is_as_large_as_it_says() -> None:
    load = Load(3 * TOKENS_PER_MIB, num_layers=4)
    assert load.segment_bytes == 3 * MIB
    assert load.num_bytes == 12 * MIB


def test_every_row_has_its_peer_measured_beside_it() -> None:
    rows = run(num_mib=2, num_repeats=1)
    assert [row.name for row in rows] == [
        "transfer in segments of 1 MiB",
        "read and checksum of 1 MiB",
        "transfer in segments of 2 MiB",
        "read and checksum of 2 MiB",
        "transfers of 8 tiny segments",
    ]
    assert all(row.value > 0 and row.peer is not None and row.peer > 0 for row in rows)
    assert all(row.ok == (row.ratio is not None and row.ratio >= row.target) for row in rows)
