"""Fetches images from public addresses only, so that no request makes the server read its own network."""

import asyncio
import ipaddress
import socket

from huggingface_hub.utils import httpx

from transformers_minigpt4.processing.image_utils_minigpt4 import new_http_client


# IPv6 addresses that carry an IPv4 address, which a gateway or the system itself may unwrap: mapped, compatible,
# NAT64 (two prefixes), Teredo, 6to4. Python (3.11) takes some of them for public.
_CARRIERS = tuple(
    map(ipaddress.IPv6Network, ("::ffff:0:0/96", "::/96", "64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16"))
)


def public_client() -> httpx.AsyncClient:
    """A client for [`~processing.image_utils_minigpt4.load_image`] that connects to public addresses only."""
    return new_http_client(_PublicAddresses())


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet, not of this machine, its network or a cloud's metadata."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address) and any(found in network for network in _CARRIERS):
        return False
    return found.is_global and not (found.is_multicast or found.is_reserved or found.is_unspecified)


class _PublicAddresses(httpx.AsyncHTTPTransport):
    """
    Looks a host up once, and connects to the address that it has checked; redirects pass here too.

    Looking it up again to connect could give another address.
    """

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        host, port = request.url.host, request.url.port or {"http": 80, "https": 443}.get(request.url.scheme, 0)
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpx.ConnectError(f"there is no host {host!r}") from error
        addresses = [str(entry[4][0]) for entry in found]
        if not addresses or not all(map(is_public, addresses)):
            raise httpx.ConnectError(f"{host!r} is not a public address, and this server fetches no others")
        # The certificate must still be that of the name.
        extensions = {**request.extensions, "sni_hostname": host}
        checked = httpx.Request(
            request.method,
            request.url.copy_with(host=addresses[0]),
            headers=request.headers,
            stream=request.stream,
            extensions=extensions,
        )
        return await super().handle_async_request(checked)
