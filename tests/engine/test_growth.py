"""How many more blocks running requests will want."""

from hypothesis import given
from hypothesis import strategies as st

from core.request import Request
from core.sampling import SamplingParams
from engine.growth import NUM_BINS, GrowthForecast, OutputLengths, peak_growth

counts = st.integers(1, 5000)


@st.composite
def outputs(draw: st.DrawFn) -> tuple[int, int]:
    """Tokens that a request has drawn, and may draw."""
    allowed = draw(counts)
    return draw(st.integers(1, allowed)), allowed


@given(observed=st.lists(outputs(), max_size=30), output=outputs())
def test_one_that_may_go_on_is_expected_to_and_never_beyond_what_it_may(
    observed: list[tuple[int, int]], output: tuple[int, int]
) -> None:
    lengths = OutputLengths()
    for each in observed:
        lengths.observe(*each)
    drawn, allowed = output
    assert min(1, allowed - drawn) <= lengths.num_expected(drawn, allowed) <= allowed - drawn
    assert lengths.num_expected(0, allowed) >= 1


@given(output=outputs(), num=st.integers(1, 5))
def test_where_all_end_at_one_share_the_next_is_expected_there(output: tuple[int, int], num: int) -> None:
    lengths = OutputLengths()
    for _ in range(num):
        lengths.observe(*output)
    drawn, allowed = output
    least = max(drawn, allowed / 2 ** (NUM_BINS / 2))
    assert drawn <= lengths.num_expected(0, allowed) <= least * 2**0.5 + 1


@given(observed=st.lists(outputs(), min_size=1, max_size=30), allowed=counts)
def test_the_end_that_is_foretold_never_comes_nearer(observed: list[tuple[int, int]], allowed: int) -> None:
    lengths = OutputLengths()
    for each in observed:
        lengths.observe(*each)
    ends = [drawn + lengths.num_expected(drawn, allowed) for drawn in range(min(allowed, 300))]
    assert ends == sorted(ends)


def test_three_of_four_end_within_what_is_foretold_and_the_latest_count_most() -> None:
    lengths = OutputLengths()
    for _ in range(100):
        lengths.observe(1000, 1000)
    for length in [400, 10, 20, 40] * 75:
        lengths.observe(length, 1000)
    assert 40 <= lengths.num_expected(0, 1000) <= 57
    assert 350 <= lengths.num_expected(50, 1000) <= 450  # it has outlived the short ones


growing = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 12), st.integers(0, 3)), max_size=12)


@given(requests=growing)
def test_the_peak_is_never_less_than_what_comes(requests: list[tuple[int, int, int]]) -> None:
    """Played through with blocks of four, each request somewhere in its block (the third number)."""
    peak = peak_growth((own, growth) for own, growth, _ in requests)
    assert 0 <= peak <= sum(growth for _, growth, _ in requests)
    for now in range(4 * 14):
        held = 0
        for own, growth, offset in requests:
            ended = now > 4 * growth + 3 - offset
            held += -own if ended else min(growth, (now + offset) // 4)
        assert held <= peak


@given(prompt=st.integers(1, 50), max_tokens=counts, block_size=st.integers(1, 16), max_model_len=st.integers(51, 400))
def test_one_request_alone_never_wants_more_than_its_full_length(
    prompt: int, max_tokens: int, block_size: int, max_model_len: int
) -> None:
    request = Request("a", [1] * prompt, SamplingParams(max_tokens=max_tokens))
    now = -(-(prompt + 1) // block_size)
    more = GrowthForecast(block_size, max_model_len).num_blocks([(request, now)])
    assert now + more <= max(now, -(-min(prompt + max_tokens, max_model_len) // block_size))
