"""Stream a completion to the terminal, then tell where its time went.

python stream.py [host:port] [prompt]
"""

from __future__ import annotations

import sys

from penstock import Client


def main(target: str = "127.0.0.1:50051", prompt: str = "def __init__(self") -> None:
    with Client(target) as client:
        generation = client.generate(prompt, max_tokens=64, temperature=0)
        for delta in generation:
            print(delta, end="", flush=True)
        print(f"\n\n{generation.finish_reason}, {generation.usage}")
        if generation.stats is not None:
            hidden = generation.stats.overlap_ratio
            share = "no KV was carried" if hidden is None else f"{hidden:.0%} of the KV transfer hidden"
            print(f"{generation.stats.prefill_worker} -> {generation.stats.decode_worker}: {share}")


if __name__ == "__main__":
    main(*sys.argv[1:])
