"""The SDK of Penstock. Needs grpcio and protobuf only.

```python
from penstock import Client

with Client("127.0.0.1:50051") as client:
    for delta in client.generate("def __init__(self", max_tokens=64):
        print(delta, end="", flush=True)
```
"""

from penstock.aio import AsyncClient, AsyncGeneration
from penstock.aio_batch import AsyncBatch
from penstock.batch import Batch
from penstock.client import Client, Generation
from penstock.cluster import ClusterChange, ClusterLoad, Tokens, WorkerLoad
from penstock.errors import (
    AuthenticationError,
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    PenstockError,
    RequestCancelledError,
    UnavailableError,
    WorkerNotFoundError,
)
from penstock.sampling import Sampling
from penstock.traces import AttemptTrace, Forecast, RequestTrace, Span
from penstock.types import (
    Delta,
    FinishReason,
    Message,
    ModelDescription,
    PairInfo,
    Result,
    ServerInfo,
    Stats,
    TokenLogprobs,
    Usage,
    WorkerInfo,
    WorkerRole,
)

__all__ = [
    "AsyncBatch",
    "AsyncClient",
    "AsyncGeneration",
    "AttemptTrace",
    "AuthenticationError",
    "Batch",
    "Client",
    "ClusterChange",
    "ClusterLoad",
    "DeadlineExceededError",
    "Delta",
    "FinishReason",
    "Forecast",
    "Generation",
    "InternalError",
    "InvalidRequestError",
    "Message",
    "ModelDescription",
    "ModelNotFoundError",
    "OverloadedError",
    "PairInfo",
    "PenstockError",
    "RequestCancelledError",
    "RequestTrace",
    "Result",
    "Sampling",
    "ServerInfo",
    "Span",
    "Stats",
    "TokenLogprobs",
    "Tokens",
    "UnavailableError",
    "Usage",
    "WorkerInfo",
    "WorkerLoad",
    "WorkerNotFoundError",
    "WorkerRole",
]
