"""One connection: uvicorn's protocol, with limits on peers that do not send and peers that do not read."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

from dlx.serve.options import Options


def protocol(options: Options) -> type[H11Protocol]:
    """uvicorn's class of connections, with the options' time limits: a subclass, as it offers no other way in."""

    class Wire(H11Protocol):
        """Closes a connection whose headers trickle in, and drops one whose answer is not read."""

        _late: asyncio.TimerHandle | None = None
        _stuck: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._expect()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._expect()

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self._late, self._stuck):
                if timer is not None:
                    timer.cancel()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            if self._stuck is None:
                self._stuck = self.loop.call_later(options.write_timeout_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._stuck is not None:
                self._stuck.cancel()
                self._stuck = None

        def _expect(self) -> None:
            """Time runs while no request is in progress, from the first byte, or the connection, on."""
            busy = self.cycle is not None and not self.cycle.response_complete
            if busy and self._late is not None:
                self._late.cancel()
                self._late = None
            elif not busy and self._late is None:
                self._late = self.loop.call_later(options.header_timeout_s, self.transport.close)

    return Wire
