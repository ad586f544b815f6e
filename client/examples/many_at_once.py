"""Many prompts at once, four in flight, each answered as it is done.

python many_at_once.py [host:port]
"""

from __future__ import annotations

import asyncio
import sys

from penstock import AsyncClient, PenstockError

PROMPTS = [f"def part_{n}(self" for n in range(8)]


async def main(target: str = "127.0.0.1:50051") -> None:
    in_flight = asyncio.Semaphore(4)

    async def complete(client: AsyncClient, prompt: str) -> None:
        async with in_flight:
            try:
                text = await client.generate(prompt, max_tokens=16, timeout_s=60).text()
            except PenstockError as error:
                print(f"{prompt!r}: {error.code}: {error}")
            else:
                print(f"{prompt!r}: {text!r}")

    async with AsyncClient(target) as client:
        await asyncio.gather(*[complete(client, prompt) for prompt in PROMPTS])


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
