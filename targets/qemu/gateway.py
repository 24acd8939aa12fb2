"""The reference gateway on the host, and the few questions that the campaigns ask it."""

import base64
import http.client
import json
import os
import re
import subprocess
import threading
import time

TOKEN = "image:image-key"


class Gateway:
    """`binary` is a host build with the cargo feature `gateway`. `tls` is (certificate, key)."""

    def __init__(self, binary: str, state: str, tls: tuple[str, str] | None = None):
        command = [binary, "gateway", "--listen", "127.0.0.1:0", "--state", state, "--token", TOKEN]
        if tls:
            command += ["--tls-cert", tls[0], "--tls-key", tls[1]]
        self.log_path = os.path.join(state, "..", "gateway.log")
        self._log = open(self.log_path, "ab")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log)
        line = self.process.stdout.readline().decode()
        found = re.search(r"listening on \S*?(\d+)\s*$", line)
        if not found:
            raise RuntimeError(f"the gateway does not start: {line!r}, see {self.log_path}")
        self.port = int(found.group(1))
        threading.Thread(target=self.process.stdout.read, daemon=True).start()
        self._tls = tls

    def _connection(self) -> http.client.HTTPConnection:
        if not self._tls:
            return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        import ssl

        # The emulated device is what checks certificates here.
        context = ssl._create_unverified_context()
        return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=30, context=context)

    def ask(self, method: str, path: str, body=None):
        connection = self._connection()
        try:
            text = None if body is None else json.dumps(body)
            headers = {} if body is None else {"Content-Type": "application/json"}
            connection.request(method, "/operator/v1/" + path, text, headers)
            response = connection.getresponse()
            answer = response.read()
            if response.status != 200:
                raise RuntimeError(f"{method} {path}: {response.status} {answer[:200]!r}")
            return json.loads(answer)
        finally:
            connection.close()

    def agents(self) -> list[dict]:
        return self.ask("GET", "agents")

    def connected(self) -> dict | None:
        return next((each for each in self.agents() if each["connected_since"]), None)

    def submit(self, command: str) -> str:
        return self.ask("POST", "tasks", {"command": command})["task_id"]

    def task(self, task_id: str) -> dict:
        return self.ask("GET", f"tasks/{task_id}")

    def output(self, task_id: str) -> tuple[dict[str, bytes], dict]:
        """All accepted output of a task that has ended, by stream, and its final."""
        connection = self._connection()
        streams = {"stdout": b"", "stderr": b""}
        try:
            connection.request("GET", f"/operator/v1/tasks/{task_id}/stream")
            for line in connection.getresponse():
                event = json.loads(line)
                if event.get("data_base64") is not None:
                    streams[event["stream"]] += base64.b64decode(event["data_base64"])
                if event.get("final") is not None:
                    return streams, event["final"]
        finally:
            connection.close()
        raise RuntimeError(f"the stream of task {task_id} ends without its final")

    def wait(self, question, what: str, seconds: float):
        """Asks until the answer counts as true."""
        deadline = time.monotonic() + seconds
        while True:
            answer = question()
            if answer:
                return answer
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {seconds:.0f} s: {what}")
            time.sleep(0.05)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)
        self._log.close()
