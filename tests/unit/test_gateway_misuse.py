"""What a gateway is told wrongly it says at once: nothing is sent or waits, and the consultation's calls go on."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from uuid import UUID

import pytest
from nats.aio.msg import Msg

from cluster.gateway import Accepted, Gateway, RefusedError
from contracts.subjects import EVENTS


class Client:
    """A connection to a stream that stores everything. `asked`: the bodies it was asked to store."""

    is_connected = True
    loop = None
    max_payload = 8 * 1024 * 1024

    def __init__(self) -> None:
        self.asked: list[bytes] = []

    def note_stream(self, *, answers: bool) -> None:
        """There is no other server."""

    async def request(self, subject: str, body: bytes, **_: Any) -> Msg:
        self.asked.append(body)
        data = json.dumps({"stream": EVENTS, "seq": len(self.asked)}).encode()
        return Msg(_client=None, data=data)  # type: ignore[arg-type]


def gateway_of(client: Client, **options: Any) -> Gateway:
    return Gateway(client, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (("{}", "a", "c", "id"), TypeError, "event_bytes is str; give bytes"),
        # The caller may change it before it is sent again.
        ((bytearray(b"{}"), "a", "c", "id"), TypeError, "event_bytes is bytearray"),
        ((b"{}", None, "c", "id"), TypeError, "site is NoneType"),
        # As text it would have a lane of its own, beside that of the same consultation.
        ((b"{}", "a", UUID(int=1), "id"), TypeError, "consultation is UUID"),
        ((b"{}", "a", "c", 7), TypeError, "event_id is int"),
        ((b"{}", "a", "c", ""), ValueError, "event_id is empty"),
        # Servers would see no id, and store a second try of it as another message.
        ((b"{}", "a", "c", "  "), ValueError, "event_id '  ' would change in a header"),
        # They would see those of other messages, and drop this one as a duplicate.
        ((b"{}", "a", "c", " id-1"), ValueError, "event_id ' id-1' would change"),
        ((b"{}", "a", "c", "id\n1"), ValueError, r"event_id 'id\\n1' would change"),
        ((b"{}", "a", "c", "id\ud800"), ValueError, r"event_id 'id\\ud800' would change"),
        ((b"{}", "a", "c", "id", {"deadline_s": "5"}), TypeError, "deadline_s is str; give seconds"),
        ((b"{}", "a", "c", "id", {"deadline_s": float("nan")}), ValueError, "deadline_s is nan"),
        ((b"{}", "", "c", "id"), ValueError, "site is empty"),
        ((b"{}", "a.b", "c", "id"), RefusedError, r"site 'a\.b' is not 1 to 64"),
        ((b"{}", "a", "c d", "id"), RefusedError, "consultation 'c d' is not"),
    ],
    ids=str,
)
async def test_what_could_not_be_kept_apart_or_stored_is_not_sent(
    given: tuple[Any, ...], error: type[Exception], words: str
) -> None:
    client = Client()
    gateway = gateway_of(client)
    with pytest.raises(error, match=words):
        await gateway.publish(*given[:4], **dict(*given[4:]))
    assert client.asked == []
    assert (await gateway.publish(b"{}", "a", "c", "id")).origin == 1


@pytest.mark.parametrize(
    "options", [{"in_flight": 0}, {"in_flight": -1}, {"timeout_s": 0}, {"timeout_s": float("nan")}]
)
async def test_a_gateway_that_could_never_send_or_hear_is_not_made(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} = "):
        gateway_of(Client(), **options)


def test_a_gateway_serves_one_event_loop() -> None:
    client = Client()

    async def made() -> tuple[Gateway, Accepted]:
        gateway = gateway_of(client)
        return gateway, await gateway.publish(b"1", "a", "c", "id-1")

    gateway, accepted = asyncio.run(made())
    assert accepted.origin == 1
    with pytest.raises(RuntimeError, match="another event loop or process"):
        asyncio.run(gateway.publish(b"2", "a", "c", "id-2"))
    assert client.asked == [b"1"]
