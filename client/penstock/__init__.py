"""The SDK of Penstock. Needs grpcio and protobuf only.

```python
from penstock import Client

with Client("127.0.0.1:50051") as client:
    for delta in client.generate("def __init__(self", max_tokens=64):
        print(delta, end="", flush=True)
```
"""

from penstock.aio import AsyncClient, AsyncGeneration
from penstock.client import Client, Generation
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
)
from penstock.sampling import Sampling
from penstock.traces import AttemptTrace, RequestTrace, Span
from penstock.types import (
    Delta,
    FinishReason,
    Message,
    ModelDescription,
    PairInfo,
    ServerInfo,
    Stats,
    TokenLogprobs,
    Usage,
    WorkerInfo,
    WorkerRole,
)

__all__ = [
    "AsyncClient",
    "AsyncGeneration",
    "AttemptTrace",
    "AuthenticationError",
    "Client",
    "DeadlineExceededError",
    "Delta",
    "FinishReason",
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
    "Sampling",
    "ServerInfo",
    "Span",
    "Stats",
    "TokenLogprobs",
    "UnavailableError",
    "Usage",
    "WorkerInfo",
    "WorkerRole",
]
