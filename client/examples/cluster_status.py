"""What a server serves, how busy it is, and on which workers.

python cluster_status.py [host:port]
"""

from __future__ import annotations

import sys

from penstock import Client, UnavailableError


def main(target: str = "127.0.0.1:50051") -> int:
    with Client(target) as client:
        try:
            info, model = client.server_info(), client.model()
        except UnavailableError as error:
            print(error, file=sys.stderr)
            return 1
    print(f"Penstock {info.version}, up {info.uptime_s:.0f} s: {info.num_running} running, {info.num_queued} queued")
    print(f"{model.name}: {model.architecture}, up to {model.max_model_len} tokens")
    for worker in info.workers:
        state = "draining" if worker.draining else "connected" if worker.connected else "lost"
        print(f"  {worker.worker_id}: {worker.role} on {worker.device}, {state}, {worker.num_free_blocks} blocks free")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
