"""Reading and writing ranges of positions across blocks."""

import random
from itertools import pairwise

import pytest
import torch

from core.errors import ConfigError, IntegrityError
from core.kv_layout import KVLayout
from engine.kv_storage import HostKV, KVStorage
from kernels.paged_kv import PagedKV, PagedLatent, token_views

LAYOUT = KVLayout("m", "f", num_layers=2, num_kv_heads=3, head_size=4, block_size=5, dtype="float32")
LAYOUTS = [
    LAYOUT,
    KVLayout("m", "f", 2, 1, 6, 16, "bfloat16"),
    KVLayout("m", "f", 2, 2, 8, 3, "float16"),
    KVLayout("m", "f", 2, 3, 4, 5, "int8"),
    KVLayout("m", "f", 2, 1, 10, 4, "float32", kind="latent"),
    KVLayout("m", "f", 2, 1, 10, 4, "bfloat16", kind="latent"),
]


def payload(layout: KVLayout, num_tokens: int, device: torch.device) -> torch.Tensor:
    """Any bytes."""
    size = num_tokens * layout.bytes_per_token_per_layer
    return torch.randint(256, (size,), dtype=torch.uint8, device=device)


def whole(storage: KVStorage) -> torch.Tensor:
    """[L, num_blocks, S, N]: the bytes of all that is there."""
    views = [[view.contiguous().view(torch.uint8).flatten(2) for view in token_views(each)] for each in storage.layers]
    return torch.stack([torch.cat(each, dim=2) for each in views])


@pytest.fixture(params=LAYOUTS, ids=lambda layout: f"{layout.kind}-{layout.dtype}")
def layout(request: pytest.FixtureRequest) -> KVLayout:
    shape: KVLayout = request.param
    return shape


def test_what_is_written_is_read(layout: KVLayout, device: torch.device) -> None:
    """Two requests over shuffled blocks, written piece by piece, read in other pieces, as one token at a time says."""
    storage, rng = KVStorage(layout, 9, device), random.Random(0)
    alone = KVStorage(layout, 1, device)
    size = layout.block_size
    for table in ((7, 0, 3, 8), (5, 1)):
        tokens = [payload(layout, 1, device) for _ in range(size * len(table))]

        def joined(start: int, end: int, tokens: list[torch.Tensor] = tokens) -> torch.Tensor:
            """The payload of several tokens, made from those of one."""
            pieces = [split(layout, token) for token in tokens[start:end]]
            return torch.cat([torch.cat(part) for part in zip(*pieces, strict=True)])

        cuts = sorted({0, len(tokens), *(rng.randrange(len(tokens)) for _ in range(3))})
        for start, end in pairwise(cuts):
            storage.write(1, table, start, end, joined(start, end))
        for _ in range(20):
            start, end = sorted(rng.sample(range(len(tokens) + 1), 2))
            assert torch.equal(storage.read(1, table, start, end), joined(start, end))
    alone.write(0, (0,), 0, 1, tokens[0])
    assert torch.equal(alone.read(0, (0,), 0, 1), tokens[0])


def split(layout: KVLayout, token: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """K, V and their scales, or the latent."""
    if layout.kind == "latent":
        return (token,)
    scales = 4 * layout.num_kv_heads if layout.dtype == "int8" else 0
    vectors = token.numel() // 2 - scales
    return torch.split(token, [vectors, vectors, scales, scales] if scales else [vectors, vectors])


def test_other_layers_and_blocks_are_left_alone(layout: KVLayout, device: torch.device) -> None:
    storage = KVStorage(layout, 4, device)
    storage.write(1, (2,), 1, 3, payload(layout, 2, device) | 1)
    touched = whole(storage).bool()
    assert not touched[0].any()
    assert touched[1].any(dim=2).nonzero().tolist() == [[2, 1], [2, 2]]
    assert bool(touched[1, 2, 1:3].all())


def test_a_payload_is_k_then_v_then_their_scales(device: torch.device) -> None:
    storage = KVStorage(KVLayout("m", "f", 1, 2, 4, 3, "int8"), 3, device)
    (kv,) = storage.layers
    assert isinstance(kv, PagedKV)
    assert kv.k_scale is not None
    assert kv.v_scale is not None
    kv.k[1, 1, :, 2] = torch.tensor([1, 2, 3, 4])
    kv.v[1, 0, 2] = torch.tensor([5, 6, 7, 8])
    kv.k_scale[1, :, 2] = torch.tensor([0.5, 0.25])
    kv.v_scale[1, :, 2] = torch.tensor([2.0, 4.0])
    data = storage.read(0, (2, 1), 5, 6)
    assert data[:16].tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0]
    assert data[16:].view(torch.float32).tolist() == [0.5, 0.25, 2.0, 4.0]


def test_some_heads_may_be_read_and_written_without_the_others(device: torch.device) -> None:
    storage, table = KVStorage(KVLayout("m", "f", 1, 3, 4, 2, "int8"), 3, device), (2, 0)
    everything = payload(storage.layout, 3, device)
    storage.write(0, table, 0, 3, everything)
    k, v, k_scale, v_scale = (part.view(3, 3, 4) for part in torch.split(everything, 36))
    last = torch.cat([part[:, 1:].flatten() for part in (k, v, k_scale, v_scale)])
    assert torch.equal(storage.read(0, table, 0, 3, (1, 3)), last)
    copy = KVStorage(storage.layout, 3, device)
    copy.write(0, table, 0, 3, last, (1, 3))
    assert torch.equal(copy.read(0, table, 0, 3, (1, 3)), last)
    assert not copy.read(0, table, 0, 3, (0, 1)).any()


def test_heads_that_are_not_there_are_refused(device: torch.device) -> None:
    with pytest.raises(IntegrityError, match=r"KV heads \[2, 4\) are not within 3"):
        KVStorage(LAYOUT, 4, device).read(0, (1,), 0, 3, (2, 4))


def test_what_is_read_is_a_copy(layout: KVLayout, device: torch.device) -> None:
    storage = KVStorage(layout, 4, device)
    copy = storage.read(0, (1, 2), 2, 4)
    storage.write(0, (1, 2), 2, 4, payload(layout, 2, device) | 1)
    assert copy.count_nonzero() == 0


def test_a_block_may_be_read_by_a_table_with_other_cuts(layout: KVLayout, device: torch.device) -> None:
    storage, size = KVStorage(layout, 4, device), layout.block_size
    storage.write(0, (3, 1), 0, 2 * size, payload(layout, 2 * size, device))
    assert torch.equal(storage.read(0, (1,), 0, size), storage.read(0, (3, 1), size, 2 * size))


@pytest.mark.parametrize(("start", "end"), [(0, 11), (-1, 3), (4, 3), (10, 12)])
def test_positions_outside_of_the_table_are_refused(start: int, end: int, device: torch.device) -> None:
    with pytest.raises(IntegrityError, match="not within 2 blocks of 5"):
        KVStorage(LAYOUT, 4, device).read(0, (1, 2), start, end)


def test_an_empty_range_is_empty(layout: KVLayout, device: torch.device) -> None:
    storage, end = KVStorage(layout, 4, device), layout.block_size
    empty = storage.read(0, (1, 2), end, end)
    assert empty.shape == (0,)
    storage.write(0, (1, 2), end, end, empty)
    assert not whole(storage).any()


@pytest.mark.parametrize("bad", [torch.zeros(287, dtype=torch.uint8), torch.zeros(72), torch.zeros(2, 144).byte()])
def test_a_payload_of_another_size_or_type_is_refused(bad: torch.Tensor, device: torch.device) -> None:
    with pytest.raises(IntegrityError, match=r"must be uint8 \[288\]"):
        KVStorage(LAYOUT, 4, device).write(0, (1,), 0, 3, bad)


def test_a_payload_may_lie_elsewhere_at_any_address(layout: KVLayout, device: torch.device) -> None:
    storage, tokens = KVStorage(layout, 4, device), payload(layout, 3, torch.device("cpu"))
    shifted = torch.cat((tokens.new_zeros(1), tokens))[1:]
    storage.write(0, (1,), 0, 3, shifted)
    assert torch.equal(storage.read(0, (1,), 0, 3).cpu(), tokens)


def test_a_latent_cache_holds_one_vector_a_token(device: torch.device) -> None:
    (layer, _) = KVStorage(KVLayout("m", "f", 2, 1, 10, 4, "float32", kind="latent"), 3, device).layers
    assert isinstance(layer, PagedLatent)
    assert layer.latent.shape == (3, 4, 10)


def test_a_latent_cache_of_int8_is_refused(device: torch.device) -> None:
    with pytest.raises(ConfigError, match="use bfloat16"):
        KVStorage(KVLayout("m", "f", 2, 1, 10, 4, "int8", kind="latent"), 3, device)


def test_what_is_taken_out_comes_back_bit_for_bit_in_other_blocks(layout: KVLayout, device: torch.device) -> None:
    storage = KVStorage(layout, 9, device)
    host = HostKV(storage, 6)
    for layer in range(layout.num_layers):
        storage.write(layer, range(9), 0, 9 * layout.block_size, payload(layout, 9 * layout.block_size, device))
    before = whole(storage)
    host.take_out((7, 0, 3), (1, 2, 5))
    host.take_out((4, 8), (0, 3))
    for layer in range(layout.num_layers):  # others write there
        storage.write(layer, range(9), 0, 9 * layout.block_size, payload(layout, 9 * layout.block_size, device))
    changed = whole(storage)
    host.put_back((2, 6, 0), (2, 3, 5))
    after = whole(storage)
    assert torch.equal(after[:, [2, 6, 0]], before[:, [0, 8, 3]])
    others = [1, 3, 4, 5, 7, 8]
    assert torch.equal(after[:, others], changed[:, others])
