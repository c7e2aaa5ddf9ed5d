"""A TCP proxy that can turn into a black hole: it goes on accepting and reading, and nothing gets through.

A connection that was open when the hole opened never comes back, as behind a firewall that forgot
it: only a client that asks whether the other side is still there will notice. Connections made after
the hole has closed work.
"""

import socket
import threading
from contextlib import suppress

CHUNK = 1 << 16


class Proxy:
    """Forwards connections of a free port of loopback to `target`'s port."""

    def __init__(self, target: int) -> None:
        self._target, self._hole = target, threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def black_hole(self, is_open: bool) -> None:
        """From now on everything disappears, or gets through again."""
        (self._hole.set if is_open else self._hole.clear)()

    def close(self) -> None:
        """Accept no more."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with near, suppress(OSError):
            if self._hole.is_set():
                self._swallow(near)
                return
            with socket.create_connection(("127.0.0.1", self._target), timeout=5) as far:
                far.settimeout(None)
                back = threading.Thread(target=self._pump, args=(far, near), daemon=True)
                back.start()
                self._pump(near, far)
                back.join()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while chunk := source.recv(CHUNK):
                if self._hole.is_set():
                    self._swallow(source)
                    break
                sink.sendall(chunk)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _swallow(source: socket.socket) -> None:
        while source.recv(CHUNK):
            pass
