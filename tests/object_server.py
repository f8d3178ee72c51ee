"""moto's S3 server in a process of its own, for tests: it can be stopped, started, frozen and killed.

As a script it is that process: it obeys `start`, `stop`, `reset` and `count` on its standard input.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections import Counter
from types import TracebackType

from pyarrow import fs

#: For the environment of whoever talks to the server. The instance metadata service of a cloud is not asked.
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "anyone",
    "AWS_SECRET_ACCESS_KEY": "not-to-be-shown",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def reserved_port() -> socket.socket:
    """Nobody listens at its port, and nobody else gets it until this is closed; a server of one's own may."""
    free = socket.socket()
    free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    free.bind(("127.0.0.1", 0))
    return free


class ObjectServer:
    """Serves at `endpoint` (127.0.0.1, a free port). A context manager.

    Args:
        unchecked: so many requests are served whoever sends them, then credentials are checked (moto knows
            none, all are wrong); None never checks.
    """

    def __init__(self, unchecked: int | None = None) -> None:
        self._reserved = reserved_port()  # nobody takes it while the server is stopped
        self.port: int = self._reserved.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._unchecked = unchecked
        self._launch()

    def _launch(self) -> None:
        limit = {} if self._unchecked is None else {"INITIAL_NO_AUTH_ACTION_COUNT": str(self._unchecked)}
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self.port)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, **limit},
        )  # fmt: skip
        self._ask("start")

    def _ask(self, command: str) -> str:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()

    def stop(self) -> None:
        """Refuse connections; the data stays."""
        self._ask("stop")

    def start(self) -> None:
        """Serve again after `stop`."""
        self._ask("start")

    def freeze(self) -> None:
        """Accept connections, answer nothing."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """The data is lost."""
        self._process.kill()
        self._process.communicate()

    def restart(self) -> None:
        """A new, empty server on the same port."""
        self.kill()
        self._launch()

    def reset(self) -> None:
        """Up and empty, whatever was done to it."""
        if self._process.poll() is not None:
            self._launch()
        self.thaw()
        self._ask("start")
        self._ask("reset")

    def requests(self) -> Counter[str]:
        """How many requests of each method were answered."""
        return Counter(json.loads(self._ask("count")))

    def make_bucket(self, name: str = "bucket") -> str:
        """Its URL."""
        self.files().create_dir(name)
        return f"s3://{name}"

    def files(self) -> fs.S3FileSystem:
        return fs.S3FileSystem(
            endpoint_override=self.endpoint, region="us-east-1", allow_bucket_creation=True
        )

    def __enter__(self) -> ObjectServer:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.kill()
        self._reserved.close()


def _serve(port: int) -> None:
    from moto.server import ThreadedMotoServer

    answered: Counter[str] = Counter()

    class Count(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            answered.update(
                m for m in ("GET", "PUT", "HEAD", "POST", "DELETE") if f"{m} /" in record.getMessage()
            )

    werkzeug = logging.getLogger("werkzeug")
    werkzeug.addHandler(Count())
    werkzeug.setLevel(logging.INFO)
    server, answer = None, sys.stdout
    sys.stdout = sys.stderr  # moto prints
    for command in sys.stdin:
        if command.strip() == "start" and server is None:
            server = ThreadedMotoServer("127.0.0.1", port, verbose=True)
            server.start()
        elif command.strip() == "stop" and server is not None:
            server.stop()
            server = None
        elif command.strip() == "reset":
            urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/reset", data=b"").close()
            answered.clear()
        print(json.dumps(answered), file=answer, flush=True)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
