"""When certificates and credentials run out: our own, as their files say now, and servers', as they show them now.

A renewed one counts from the next look on, whether or not the connection that there is was made with it.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import urlsplit

import msgspec

from contracts.budgets import GREETING
from contracts.errors import SettingsError
from stages.runtime.access import OPEN, Access, Servers
from stages.runtime.tasks import run_blocking, side_by_side

DEFAULT_PORT: Final = 4222
AHEAD_S_MAX: Final = 14 * 86400
"""A certificate of months is due that long before it expires: in time for somebody's holidays."""
AHEAD_SHARE: Final = 0.2
"""What lasts for hours or days is due when so much of its time is left: whoever renews it did not."""


class Paper(NamedTuple):
    """Something that expires. Both in seconds since the epoch."""

    begins_s: float
    ends_s: float

    @property
    def due_s(self) -> float:
        """When it should have been renewed, at the latest."""
        return self.ends_s - min(AHEAD_S_MAX, AHEAD_SHARE * (self.ends_s - self.begins_s))


def own_papers(access: Access) -> dict[str, Paper]:
    """By the setting that names the file. Blocks. What is no certificate or JWT, or does not expire, is left out.

    Of several certificates counts the first to end where all are shown together (`nats_cert_file`), and the last where
    one is enough (`nats_ca_file`): there an authority and its successor lie side by side.
    """
    found = {}
    if access.ca_file and (certificates := _certificates(access.ca_file)):
        found["nats_ca_file"] = max(certificates, key=lambda paper: paper.ends_s)
    if access.cert_file and (certificates := _certificates(access.cert_file)):
        found["nats_cert_file"] = min(certificates, key=lambda paper: paper.ends_s)
    if access.creds_file and (paper := _credentials(access)) is not None:
        found["nats_creds_file"] = paper
    return found


async def papers_of(servers: Servers) -> dict[str, Paper]:
    """Our own as `own_papers`, and by ``host:port`` those that `servers` show. What cannot be had is left out.

    Nobody is asked where neither files nor URLs speak of TLS or credentials.
    """
    urls, access = servers
    if access == OPEN and not any(_asks_for_tls(url, access) for url in urls):
        return {}
    found = await run_blocking(own_papers, access)
    try:
        greeted = await side_by_side(*(greet(url, access) for url in urls))
    except SettingsError:
        return found
    for url, answer in zip(urls, greeted, strict=True):
        if answer is not None and answer.certificate is not None:
            found[urlsplit(url).netloc.rpartition("@")[2]] = answer.certificate
    return found


def _certificates(file: str) -> list[Paper]:
    from cryptography import x509

    try:
        certificates = x509.load_pem_x509_certificates(Path(file).read_bytes())
    except (OSError, ValueError):
        return []
    return [Paper(one.not_valid_before_utc.timestamp(), one.not_valid_after_utc.timestamp()) for one in certificates]


class _Claims(msgspec.Struct):
    iat: float = 0.0
    exp: float = 0.0


def _credentials(access: Access) -> Paper | None:
    try:
        credentials = Access(creds_file=access.creds_file).read().credentials
        jwt = b"" if credentials is None else credentials.jwt
        part = jwt.split(b".")[1]
        claims = msgspec.json.decode(base64.urlsafe_b64decode(part + b"=" * (-len(part) % 4)), type=_Claims)
    except (SettingsError, IndexError, ValueError, msgspec.MsgspecError):
        return None
    return Paper(claims.iat, claims.exp) if claims.exp else None


class Greeted(NamedTuple):
    """How a server answers.

    Attributes:
        name: its own.
        certificate: that it shows; None where it does not speak TLS.
        problem: why no TLS connection can be made to it; empty where it can, or where it speaks none.
    """

    name: str
    certificate: Paper | None = None
    problem: str = ""


class _Greeting(msgspec.Struct):
    server_name: str
    tls_required: bool = False
    tls_available: bool = False


async def greet(url: str, access: Access | None = None) -> Greeted | None:
    """Has the server at `url` greet, and with `access` show its certificate; None when it does not in `GREETING`.

    Raises:
        SettingsError: as `Access.read`.
    """
    address = urlsplit(url)
    try:
        async with asyncio.timeout(GREETING.s):
            reader, writer = await asyncio.open_connection(address.hostname, address.port or DEFAULT_PORT)
            try:
                line = await reader.readline()
                greeting = msgspec.json.decode(line.removeprefix(b"INFO "), type=_Greeting)
                if access is None or not (
                    greeting.tls_required or (greeting.tls_available and _asks_for_tls(url, access))
                ):
                    return Greeted(greeting.server_name)
                context = await run_blocking(lambda: access.read().tls or ssl.create_default_context())
                try:
                    await writer.start_tls(context, server_hostname=address.hostname)
                except ssl.SSLCertVerificationError as error:
                    return Greeted(greeting.server_name, problem=f"certificate refused: {error.verify_message}")
                except (ssl.SSLError, ConnectionError) as error:
                    return Greeted(greeting.server_name, problem=f"no TLS: {getattr(error, 'reason', '') or error!r}")
                shown = writer.get_extra_info("peercert")
                ends, begins = (ssl.cert_time_to_seconds(shown[name]) for name in ("notAfter", "notBefore"))
                return Greeted(greeting.server_name, Paper(begins, ends))
            finally:
                writer.close()
    except (OSError, ValueError, msgspec.MsgspecError):
        return None


def _asks_for_tls(url: str, access: Access) -> bool:
    return access.encrypted or urlsplit(url).scheme == "tls"
