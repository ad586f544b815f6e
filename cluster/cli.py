"""The `penstock` command: flags are generated from frozen dataclasses, and every subcommand has `--json`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from benchmarks.serve.options import BenchCompare, BenchServe
from cluster.config import ClusterConfig, load_config
from cluster.connection import Connection
from cluster.keys import KeysAdd
from core.errors import ConfigError, PenstockError

DEFAULT_TARGET = "127.0.0.1:50051"
EMBEDDED_MODEL = Path(__file__).resolve().parent.parent / "models" / "penstock-tiny"
DEMO_PROMPT = '''class Stack:
    """A last-in, first-out stack of items."""

    def __init__(self'''


@dataclass(frozen=True, slots=True)
class Demo:
    """Start a cluster on this machine, send one prompt through it, and say what happened."""

    prompt: Annotated[str, tyro.conf.Positional] = DEMO_PROMPT
    """The text to go on with."""
    model: Path = EMBEDDED_MODEL
    """Folder of a Hugging Face checkpoint; by default the embedded model."""
    max_tokens: int = 96
    temperature: float = 0.7
    """0 is greedy."""
    seed: int = 0
    launcher: Literal["ray", "subprocess"] = "ray"
    json: bool = False
    """Print one JSON object instead of text and table."""


@dataclass(frozen=True, slots=True)
class Serve:
    """Start a cluster and serve until ctrl-C. `--config cluster.yaml` sets the defaults of all other flags."""

    cluster: Annotated[ClusterConfig, tyro.conf.arg(name="")]
    config: Path | None = None
    """A cluster.yaml (docs/cluster.yaml lists every field)."""
    json: bool = False
    """Print the endpoints as one JSON object."""


@dataclass(frozen=True, slots=True)
class Generate:
    """Send a prompt to a running cluster and print the text as it comes."""

    prompt: Annotated[str, tyro.conf.Positional]
    """The text to go on with, or the user's message with --chat."""
    target: str = DEFAULT_TARGET
    """host:port of the router's gRPC."""
    connection: Annotated[Connection, tyro.conf.arg(name="")] = field(default_factory=Connection)
    chat: bool = False
    """Send the prompt as a message, through the model's chat template."""
    max_tokens: int | None = None
    temperature: float | None = None
    """0 is greedy."""
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    json_schema: str | None = None
    """The text must be JSON that fits this schema."""
    regex: str | None = None
    """The text must match."""
    choice: tuple[str, ...] = ()
    """The text must be one of these."""
    timeout_s: float | None = None
    json: bool = False
    """Print one JSON object instead of streaming text."""


@dataclass(frozen=True, slots=True)
class Status:
    """Show the workers and pairs of a running cluster."""

    target: str = DEFAULT_TARGET
    """host:port of the router's gRPC."""
    connection: Annotated[Connection, tyro.conf.arg(name="")] = field(default_factory=Connection)
    json: bool = False


@dataclass(frozen=True, slots=True)
class Trace:
    """Show where the time of one request went, running or finished, as a timeline."""

    request_id: Annotated[str, tyro.conf.Positional]
    """As `generate --json` prints it, or the id of an answer of the OpenAI API."""
    target: str = DEFAULT_TARGET
    """host:port of the router's gRPC."""
    connection: Annotated[Connection, tyro.conf.arg(name="")] = field(default_factory=Connection)
    json: bool = False


@dataclass(frozen=True, slots=True)
class Explain:
    """Show why one request went to the workers it went to, attempt by attempt."""

    request_id: Annotated[str, tyro.conf.Positional]
    """As `generate --json` prints it, or the id of an answer of the OpenAI API."""
    target: str = DEFAULT_TARGET
    """host:port of the router's gRPC."""
    connection: Annotated[Connection, tyro.conf.arg(name="")] = field(default_factory=Connection)
    json: bool = False


@dataclass(frozen=True, slots=True)
class Bench:
    """Load a running cluster with random prompts and report latencies and throughput.

    `penstock bench serve` is the load tool proper: open loop, recorded traces, SLOs, any OpenAI-compatible server;
    `penstock bench compare` shows two of its results side by side. `penstock bench engine` needs no cluster: it
    measures the engine beside its peers on this machine.
    """

    target: str = DEFAULT_TARGET
    """host:port of the router's gRPC."""
    num_requests: int = 64
    max_concurrency: int = 8
    """Requests in flight at once; not used with --rate."""
    rate: float | None = None
    """Requests per second, Poisson; by default as fast as --max-concurrency lets them."""
    prompt_tokens: int = 128
    output_tokens: int = 32
    seed: int = 0
    timeout_s: float = 120.0
    json: bool = False


@dataclass(frozen=True, slots=True)
class BenchEngine:
    """Measure the engine beside its peers on this machine, all with as many threads. See benchmarks/engine.py."""

    quick: bool = False
    """Within 50 s: one model, one short turn, no vLLM."""
    models: tuple[str, ...] = ("llama-120m", "qwen3moe-300m")
    """Folders of $PENSTOCK_PEERS/models; the embedded model where that is not set."""
    rounds: int = 5
    """At most; fewer where 20 minutes are over."""
    threads: int = 2
    output: Path | None = None
    """A file for the results with all their samples."""
    json: bool = False
    """Print one JSON object instead of a table."""


BENCHES: dict[str, type[BenchEngine | BenchServe | BenchCompare]] = {
    "engine": BenchEngine,
    "serve": BenchServe,
    "compare": BenchCompare,
}
KEYS: dict[str, Callable[..., KeysAdd]] = {"add": KeysAdd}
BenchCommand = BenchEngine | BenchServe | BenchCompare
Subcommand = Demo | Serve | Generate | Status | Trace | Explain | Bench
Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Serve, tyro.conf.subcommand("serve")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Status, tyro.conf.subcommand("status")]
    | Annotated[Trace, tyro.conf.subcommand("trace")]
    | Annotated[Explain, tyro.conf.subcommand("explain")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return run(parse(arguments))
    except PenstockError as error:
        print(f"penstock: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130


def parse(arguments: list[str]) -> Subcommand | BenchCommand | KeysAdd:
    """The command with its values; exits with usage where flags are wrong. Raises ConfigError."""
    if arguments[:1] == ["bench"] and (kind := BENCHES.get("".join(arguments[1:2]))):
        return tyro.cli(kind, args=arguments[2:], prog=f"penstock bench {arguments[1]}")
    if arguments[:1] == ["keys"]:
        command: KeysAdd = tyro.extras.subcommand_cli_from_dict(KEYS, args=arguments[1:], prog="penstock keys")
        return command
    if arguments[:1] == ["serve"] and (config := _config_flag(arguments)):
        default = Serve(load_config(config), config=config)
        return tyro.cli(Serve, args=arguments[1:], default=default, prog="penstock serve")
    return tyro.cli(Command, args=arguments, prog="penstock")


def run(command: Subcommand | BenchCommand | KeysAdd) -> int:
    """Import what the command needs and nothing else: `status` loads neither Ray nor torch."""
    match command:
        case Demo():
            from cluster.demo import demo

            return demo(command)
        case Serve():
            from cluster.serve import serve

            return serve(command)
        case KeysAdd():
            from cluster import keys

            return keys.add(command)
        case BenchEngine():
            from benchmarks import engine

            return engine.command(
                engine.Options.of(
                    models=command.models,
                    num_rounds=command.rounds,
                    num_threads=command.threads,
                    quick=command.quick,
                ),
                command.output,
                as_json=command.json,
            )
        case BenchServe():
            from benchmarks.serve.command import bench_serve

            return bench_serve(command)
        case BenchCompare():
            from benchmarks.serve.command import bench_compare

            return bench_compare(command)
        case _:
            from cluster import remote

            return remote.run(command)


def _config_flag(arguments: list[str]) -> Path | None:
    """The value of `--config`, which must be read before the other flags: it sets their defaults."""
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if flag == "--config" and value:
            return Path(value)
        if flag.startswith("--config="):
            return Path(flag.removeprefix("--config="))
    return None


if __name__ == "__main__":
    sys.exit(main())
