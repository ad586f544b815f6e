"""Stop reading when there is enough: the server stops writing, and frees what it held.

python stop_early.py [host:port]
"""

from __future__ import annotations

import sys

from penstock import Client


def main(target: str = "127.0.0.1:50051") -> None:
    with Client(target) as client, client.generate("import ", max_tokens=512) as generation:
        text = ""
        for delta in generation:
            text += delta.text
            if "\n" in text:
                break
        print(text.partition("\n")[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
