"""A web server and a mail server on this machine, for tests: fast, slow, failing, hanging, redirecting."""

from __future__ import annotations

import datetime as dt
import email
import ipaddress
import json
import ssl
import threading
import time
from email.message import EmailMessage
from email.policy import default
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult

from tests.object_server import reserved_port

#: In the URL of every webhook here: nothing that is written or printed may hold it.
SECRET = "T0PS3CR3T-hook"
PASSWORD = "hunter2-is-secret"


class HttpServer:
    """Answers with the next of `answers`, the last one again and again: a status, (status, headers), or
    "hang". `got` holds what was posted. A context manager.

    Args:
        after: nothing is answered before this is set.
    """

    def __init__(
        self, *answers: Any, after: threading.Event | None = None, certificate: Path | None = None
    ) -> None:
        self.answers = list(answers) or [200]
        self.got: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self._released = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.times.append(time.monotonic())
                answer = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                if answer == "hang":
                    outer._released.wait()
                    self.close_connection = True
                    return
                if after is not None:
                    after.wait(60)
                status, headers = answer if isinstance(answer, tuple) else (answer, {})
                if 200 <= status < 300:
                    outer.got.append(json.loads(body))
                    outer.headers.append(dict(self.headers))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        scheme = "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
            scheme = "https"
        self.url = f"{scheme}://127.0.0.1:{self._server.server_address[1]}/services/{SECRET}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> HttpServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    @property
    def alerts(self) -> list[tuple[str, str, str]]:
        """Run, severity and problem of everything that arrived in our own form, in order."""
        return [(a["run"], a["severity"], a["problem"]) for message in self.got for a in message["alerts"]]


class MailServer:
    """Takes mail. `answers`: what it says to each one's content, the last one again and again. A context
    manager.

    Args:
        refused: addresses that it does not take. login: it wants one. starttls: it offers it.
    """

    def __init__(
        self, *answers: str, refused: tuple[str, ...] = (), login: bool = False,
        starttls: Path | None = None, delay: float = 0.0,
    ) -> None:  # fmt: skip
        self.mails: list[EmailMessage] = []
        self.to: list[list[str]] = []
        self.logins: list[tuple[str, str]] = []
        self._answers, self._refused, self._delay = list(answers) or ["250 OK"], refused, delay
        options: dict[str, Any] = {}
        if login:
            options |= {"authenticator": self._check, "auth_required": True}
        if starttls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(starttls)
            options |= {"tls_context": context}
        self._reserved = reserved_port()
        self.port: int = self._reserved.getsockname()[1]
        self._controller = Controller(
            self, hostname="127.0.0.1", port=self.port, ready_timeout=60.0, **options
        )

    def __enter__(self) -> MailServer:
        self._controller.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._controller.stop()
        self._reserved.close()

    def _check(self, server: Any, session: Any, envelope: Any, mechanism: str, data: Any) -> AuthResult:
        self.logins.append((data.login.decode(), data.password.decode()))
        return AuthResult(success=data.password.decode() == PASSWORD, handled=False)

    async def handle_RCPT(self, server: Any, session: Any, envelope: Any, address: str, options: Any) -> str:
        if address in self._refused:
            return f"550 no {address} here"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        import asyncio

        await asyncio.sleep(self._delay)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if answer.startswith("2"):
            mail = email.message_from_bytes(envelope.content, policy=default)
            assert isinstance(mail, EmailMessage)
            self.mails.append(mail)
            self.to.append(list(envelope.rcpt_tos))
        return answer


def certificate(path: Path) -> Path:
    """A key and a self-signed certificate for 127.0.0.1, in one PEM file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = dt.datetime.now(dt.timezone.utc)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(address, critical=False)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(secret + signed.public_bytes(serialization.Encoding.PEM))
    return path
