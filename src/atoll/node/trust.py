"""Whether a node believes the server's certificate, in aiohttp's terms; and what went wrong, in one line, where it doesn't."""

from __future__ import annotations

import asyncio
import ssl
from urllib.parse import urlsplit

import aiohttp

from atoll.errors import RefusedError
from atoll.tls import OtherPinError, Trust, asks_for_a_certificate, speaks_tls


def certain(trust: Trust, url: str) -> ssl.SSLContext | bool:
    """Return what aiohttp is given as `ssl`.

    Raises:
        AtollError: the pin is none, or a file holds no certificate.
    """
    trust.check(url)
    return trust.context(url) if any(trust) else True


async def refusal(url: str, error: BaseException) -> RefusedError | None:
    """Say what a failed connection means where trying again can't help, or None."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        if isinstance(error.certificate_error, OtherPinError):
            return RefusedError(str(error.certificate_error.strerror))
        why = getattr(error.certificate_error, "verify_message", "") or error.certificate_error
        return RefusedError(f"{url}: its certificate isn't believed here ({why}): join with the operator's --pin, or a --ca")
    if isinstance(error, ssl.SSLError) and "WRONG_VERSION_NUMBER" in str(error):
        return RefusedError(f"{url}: what answers there speaks no TLS; write its address as http://…, or start it with --tls")
    place = urlsplit(url)
    cut = isinstance(error, (aiohttp.ServerDisconnectedError, aiohttp.ClientResponseError, ConnectionResetError))
    if place.scheme == "http" and cut and await asyncio.to_thread(speaks_tls, place.hostname or "", place.port or 80):
        return RefusedError(f"{url}: what answers there speaks TLS; write its address as https://… and add --pin or --ca")
    lost = cut or isinstance(error, (ssl.SSLError, aiohttp.ClientOSError))
    if (
        place.scheme == "https"
        and lost
        and await asyncio.to_thread(asks_for_a_certificate, place.hostname or "", place.port or 443)
    ):
        return RefusedError(
            f"{url}: lets in only who shows a certificate of its CA: --certificate FILE, which its operator makes"
        )
    return None
