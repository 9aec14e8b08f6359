"""``python -m dynamo_kvtc.bench.events_worker URL EVENTS SINGLES SEED``: the other process of ``bench/events.py``."""

import sys

from dynamo_kvtc.bench.events import worker

if __name__ == "__main__":
    worker(sys.argv[1], *map(int, sys.argv[2:5]))
