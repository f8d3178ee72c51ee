"""E-mail by SMTP."""

from __future__ import annotations

import contextlib
import smtplib
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from email.errors import MessageError
from email.message import EmailMessage
from email.utils import formatdate, make_msgid, parseaddr

from .channels import TIMEOUT, Channel, Undelivered, secret
from .message import Message, cut
from .settings import ConfigError, Table
from .webhook import network_words

PORTS = {"starttls": 587, "ssl": 465, "none": 25}
_HERE = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Email(Channel):
    """`security`: STARTTLS after a plain greeting, TLS from the start ("ssl"), or none. `user`: empty where
    nobody logs in."""

    host: str
    port: int
    security: str
    sender: str
    to: tuple[str, ...]
    user: str = ""
    password_env: str = ""

    @classmethod
    def of(cls, name: str, table: Table) -> Email:
        """As the settings file says."""
        security = table.choice("security", list(PORTS), "starttls")
        host, user = table.text("host"), table.text("user", "")
        password = table.variable("password_env", "")
        if bool(user) != bool(password):
            raise ConfigError(f"{table.where} needs user and password_env, or neither")
        if user and security == "none" and host not in _HERE:
            raise ConfigError(
                f'{table.where} would send the password unprotected: use security = "starttls" or "ssl"'
            )
        sender, to = table.text("from"), table.texts("to", needed=True)
        for key, address in (("from", sender), *(("to", one) for one in to)):
            if "@" not in parseaddr(address)[1] or "\n" in address or "\r" in address:
                raise table.wrong(key, "addresses such as ana@example.org", address)
        return cls(
            name, host, table.whole("port", PORTS[security], 1, 65535), security, sender, to, user, password
        )

    def words(self) -> str:
        """What it is."""
        return f"e-mail to {', '.join(self.to)} by {self.host}:{self.port} ({self.security})"

    def variables(self) -> Sequence[str]:
        """The password."""
        return [self.password_env] if self.password_env else []

    def send(self, message: Message, timeout: float = TIMEOUT) -> str:
        """Hand it to the mail server, which may refuse some of the addresses."""
        password = secret(self.password_env) if self.password_env else ""
        try:
            mail = self._mail(message)
            with contextlib.closing(self._connect(timeout)) as server:
                if self.user:
                    server.login(self.user, password)
                refused = server.send_message(mail)
                with contextlib.suppress(OSError, smtplib.SMTPException):  # it has taken the mail
                    server.quit()
            return f"{len(refused)} of {len(self.to)} addresses were refused" if refused else ""
        except smtplib.SMTPResponseException as answer:
            login = isinstance(answer, smtplib.SMTPAuthenticationError)
            words = " (it refuses the login)" if login else ""
            failure = Undelivered(
                f"the mail server answered {answer.smtp_code}{words}", lasting=answer.smtp_code >= 500
            )
        except smtplib.SMTPRecipientsRefused as refusal:
            codes = {code for code, _ in refusal.recipients.values()}
            failure = Undelivered("the mail server refuses every address", lasting=min(codes) >= 500)
        except smtplib.SMTPNotSupportedError:
            failure = Undelivered("the mail server offers no STARTTLS, or no login", lasting=True)
        except (smtplib.SMTPException, OSError, ValueError, MessageError) as error:
            cause = error.__context__ if isinstance(error, smtplib.SMTPServerDisconnected) else None
            failure = Undelivered(network_words(cause or error, timeout))
        raise failure

    def _connect(self, timeout: float) -> smtplib.SMTP:
        # The name of this machine, as the default asks the name service for it, without a time limit.
        name = socket.gethostname()
        if self.security == "ssl":
            context = ssl.create_default_context()
            return smtplib.SMTP_SSL(self.host, self.port, name, timeout=timeout, context=context)
        server = smtplib.SMTP(self.host, self.port, name, timeout=timeout)
        try:
            if self.security == "starttls":
                server.starttls(context=ssl.create_default_context())
        except BaseException:
            server.close()
            raise
        return server

    def _mail(self, message: Message) -> EmailMessage:
        mail = EmailMessage()
        mail["Subject"] = cut(f"[layerwatch] {message.title}", 200)
        mail["From"], mail["To"] = self.sender, ", ".join(self.to)
        mail["Date"] = formatdate(localtime=True)
        mail["Message-ID"] = make_msgid(domain=parseaddr(self.sender)[1].rpartition("@")[2])
        mail["Auto-Submitted"] = "auto-generated"  # RFC 3834: nobody's absence note answers it
        mail.set_content(f"{message.title}\n\n{message.text()}\n")
        return mail
