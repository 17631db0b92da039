"""Follows a run and logs each of its steps to Weights & Biases, from a process of its own.

pip install wandb
python experiments/log_wandb.py runs/spiral-countdown-0 PROJECT
"""

import json
import sys
import time
from pathlib import Path


def rows(path, wait):
    """The rows of a file that grows, each once. After a resume steps may come again: they don't
    here. wait(): called where nothing new is there; ends the file when it returns False."""
    last, place = 0, 0
    while True:
        lines = path.read_bytes()[place:].split(b"\n") if path.exists() else [b""]
        for line in lines[:-1]:
            place += len(line) + 1
            row = json.loads(line)
            if row["step"] > last:
                last = row["step"]
                yield row
        if path.exists() and path.stat().st_size < place:  # a resumed run has cut it
            place = 0
        if not wait():
            return


def flat(row, prefix=""):
    """{"search": {"reward": 1}} -> {"search/reward": 1}"""
    found = {}
    for key, value in row.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}/")
        else:
            found[prefix + key] = value
    return found


def main():
    import wandb

    def wait():
        time.sleep(5)
        return True

    folder = Path(sys.argv[1])
    wandb.init(project=sys.argv[2], name=folder.name)
    for row in rows(folder / "metrics.jsonl", wait):
        wandb.log(flat(row), step=row["step"])


if __name__ == "__main__":
    main()
