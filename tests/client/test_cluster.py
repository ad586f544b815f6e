"""Tokens, models, load, changes, and what operators ask for."""

from __future__ import annotations

import pytest

from penstock import (
    ClusterChange,
    ClusterLoad,
    InvalidRequestError,
    PairInfo,
    Tokens,
    WorkerInfo,
    WorkerLoad,
    WorkerNotFoundError,
    WorkerRole,
)
from penstock.v1 import admin_pb2
from penstock.v1 import inference_pb2 as pb
from tests.client.conftest import Sdk
from tests.client.fake_server import DEADLINE_S, FakeServer


def test_tokens_of_a_prompt_and_of_a_chat(sdk: Sdk, server: FakeServer) -> None:
    assert sdk.run(lambda client: client.tokenize("hi", return_token_strs=True)) == Tokens((1, 2), ("a", "b"), 2048)
    sdk.run(lambda client: client.tokenize(messages=[{"role": "user", "content": "hi"}], add_special_tokens=True))
    text, chat = server.asked
    assert text == pb.TokenizeRequest(prompt="hi", return_token_strs=True)
    assert (chat.messages.messages[0].content, chat.add_special_tokens) == ("hi", True)


def test_either_a_prompt_or_a_chat(sdk: Sdk) -> None:
    with pytest.raises(InvalidRequestError, match="got neither"):
        sdk.call("tokenize")


def test_text_of_tokens(sdk: Sdk) -> None:
    assert sdk.call("detokenize", [3, 4]) == "3 4"


def test_all_models_are_listed(sdk: Sdk) -> None:
    assert [model.name for model in sdk.call("models")] == ["tiny"]


def test_load_is_told_by_worker(sdk: Sdk, server: FakeServer) -> None:
    server.answers.load.workers.add(worker_id="p0", num_waiting_tokens=9, draining=True)
    assert sdk.call("load") == ClusterLoad(1, 2, (WorkerLoad("p0", 0, 0, 0, 0, 0, 9, 0, True),))


def test_changes_come_until_nobody_watches(sdk: Sdk, server: FakeServer) -> None:
    first = pb.WatchClusterResponse()
    first.workers.add(worker_id="p0", role=pb.WORKER_ROLE_PREFILL, connected=True)
    first.pairs.add(prefill_worker="p0", decode_worker="d0", up=True, transport="shm")
    gone = pb.WatchClusterResponse(gone_workers=["p0"])
    gone.gone_pairs.add(prefill_worker="p0", decode_worker="d0")
    server.answers.changes = [first, gone]
    watching = sdk.start(lambda client: client.watch_cluster())
    worker = WorkerInfo("p0", "", WorkerRole.PREFILL, "", True, False, 0, 0, 0, 0, "")
    pair = PairInfo("p0", "d0", 0, True, "", "shm")
    assert sdk.next_of(watching) == ClusterChange((worker,), (pair,))
    assert sdk.next_of(watching) == ClusterChange(gone_workers=("p0",), gone_pairs=(("p0", "d0"),))
    sdk.close_iterator(watching)
    assert server.cancelled.get(timeout=DEADLINE_S) == "watch"


def test_drain_names_the_worker_and_its_time(sdk: Sdk, server: FakeServer) -> None:
    sdk.run(lambda client: client.drain("w0", deadline_s=5.0))
    sdk.call("drain", "w0")
    assert server.asked == [
        admin_pb2.DrainRequest(worker_id="w0", deadline_s=5.0),
        admin_pb2.DrainRequest(worker_id="w0"),
    ]


def test_a_worker_that_is_unknown_is_not_a_model(sdk: Sdk) -> None:
    with pytest.raises(WorkerNotFoundError, match="'w9'"):
        sdk.call("drain", "w9")


def test_flushed_blocks_are_told_by_worker(sdk: Sdk) -> None:
    assert sdk.call("flush_prefix_cache") == {"w0": 5, "w1": 6}
    assert sdk.call("flush_prefix_cache", "w1") == {"w1": 5}


def test_a_new_policy_tells_the_old_one(sdk: Sdk) -> None:
    assert sdk.call("set_policy", "round_robin") == "before round_robin"
