"""Tasks whose whole output is known beforehand, so that any prefix of it can be recognised.

Each says on the console that it runs, at once and without any disk: seen twice, it ran twice.
"""

import random
from dataclasses import dataclass

PAD = "." * 60


@dataclass
class Task:
    name: str
    command: str
    stdout: bytes
    stderr: bytes
    status: str
    task_id: str = ""
    attempt: str = ""


def make(name: str, chance: random.Random) -> Task:
    kind = chance.choice(["many", "many", "slow", "short", "both"])
    said = f"echo RUN {name} >/dev/console; "
    if kind == "short":
        command = said + f"echo {name} out; echo {name} err >&2; exit 3"
        return Task(name, command, f"{name} out\n".encode(), f"{name} err\n".encode(), "failed")
    count = {"many": chance.randint(50, 6000), "slow": chance.randint(5, 60), "both": 600}[kind]
    body = f'echo "{name} $i {PAD}"'
    stderr = b""
    if kind == "slow":
        body += "; sleep 0.1"
    elif kind == "both":
        body += f'; echo "{name} error $i" >&2'
        stderr = "".join(f"{name} error {i}\n" for i in range(count)).encode()
    command = said + f"i=0; while [ $i -lt {count} ]; do {body}; i=$((i+1)); done"
    stdout = "".join(f"{name} {i} {PAD}\n" for i in range(count)).encode()
    return Task(name, command, stdout, stderr, "completed")
