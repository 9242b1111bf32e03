"""Whether a node believes the server's certificate, in aiohttp's terms; and what went wrong, in one line, where it doesn't."""

from __future__ import annotations

import asyncio
import ssl
from urllib.parse import urlsplit

import aiohttp

from atoll.errors import RefusedError
from atoll.tls import Trust, speaks_tls


class _Pinned(aiohttp.Fingerprint):
    """Checks the pin of the key, rather than of the whole certificate, before a word is sent."""

    def __init__(self, trust: Trust, url: str) -> None:
        super().__init__(bytes.fromhex(trust.pin or ""))
        self._trust, self._url = trust, url

    def check(self, transport: asyncio.Transport) -> None:
        """Refuse a server whose key has another pin.

        Raises:
            RefusedError: it has.
        """
        if connection := transport.get_extra_info("ssl_object"):
            try:
                self._trust.agrees(connection.getpeercert(binary_form=True), self._url)
            except RefusedError:
                transport.abort()
                raise


def certain(trust: Trust, url: str) -> ssl.SSLContext | aiohttp.Fingerprint | bool:
    """Return what aiohttp is given as `ssl`.

    Raises:
        AtollError: the pin is none, or the CA's file holds no certificate.
    """
    trust.check(url)
    if trust.pin is not None:
        return _Pinned(trust, url)
    return trust.context() if trust.ca else True


async def refusal(url: str, error: BaseException) -> RefusedError | None:
    """Say what a failed connection means where trying again can't help, or None."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        why = getattr(error.certificate_error, "verify_message", "") or error.certificate_error
        return RefusedError(f"{url}: its certificate isn't believed here ({why}): join with the operator's --pin, or a --ca")
    if isinstance(error, ssl.SSLError) and "WRONG_VERSION_NUMBER" in str(error):
        return RefusedError(f"{url}: what answers there speaks no TLS; write its address as http://…, or start it with --tls")
    place = urlsplit(url)
    cut = isinstance(error, (aiohttp.ServerDisconnectedError, aiohttp.ClientResponseError, ConnectionResetError))
    if place.scheme == "http" and cut and await asyncio.to_thread(speaks_tls, place.hostname or "", place.port or 80):
        return RefusedError(f"{url}: what answers there speaks TLS; write its address as https://… and add --pin or --ca")
    return None
