"""On PYTHONPATH, Python loads this in every process of a run: a connection that leaves this machine is noted and refused."""

import os
import socket
from typing import Any

_LOG = os.environ.get("RANKD_TEST_CONNECTIONS", os.devnull)
_connect, _connect_ex, _getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo
_HERE = ("127.", "::1", "localhost", "0.0.0.0")


def _refuse_outbound(what: str, host: Any) -> None:
    name = host.decode() if isinstance(host, bytes) else str(host)
    if host is not None and not name.startswith(_HERE) and name != socket.gethostname():
        with open(_LOG, "a", encoding="utf-8") as log:
            log.write(f"{os.getpid()} {what} {name}\n")
        raise ConnectionRefusedError(f"{what} {name}: refused by the test")


class _Socket(socket.socket):
    def connect(self, address: Any) -> None:
        if self.family != socket.AF_UNIX:
            _refuse_outbound("connect", address[0])
        return _connect(self, address)

    def connect_ex(self, address: Any) -> int:
        if self.family != socket.AF_UNIX:
            _refuse_outbound("connect", address[0])
        return _connect_ex(self, address)


def _lookup(host: Any, *rest: Any, **options: Any) -> Any:
    _refuse_outbound("look-up", host)
    return _getaddrinfo(host, *rest, **options)


socket.socket = _Socket  # type: ignore[misc]
socket.getaddrinfo = _lookup  # type: ignore[assignment]
