"""A real terminal: a private tmux server whose screen is read and whose keys are typed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import shutil
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from pipeline import until

needs_tmux = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
PROMPT = "ready> "
LIMIT_S = 90.0


class Terminal:
    """A shell in a tmux window of its own server."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    async def tmux(self, *arguments: str) -> str:
        """Runs a tmux command; what it printed. Fails with what it complained of."""
        process = await asyncio.create_subprocess_exec(
            *("tmux", "-S", str(self._socket), "-f", os.devnull, *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=os.environ | {"LC_ALL": "C.UTF-8"},
        )
        out, err = await process.communicate()
        assert process.returncode == 0, err.decode()
        return out.decode()

    async def type(self, text: str) -> None:
        """Types a line and Enter."""
        await self.tmux("send-keys", "-l", text)
        await self.tmux("send-keys", "Enter")

    async def press(self, key: str) -> None:
        """Presses a key, by tmux's name for it."""
        await self.tmux("send-keys", key)

    async def fictl(self, *arguments: str) -> None:
        """Types a `fictl` command."""
        await self.type(shlex.join([sys.executable, "-m", "cluster", *arguments]))

    async def resize(self, width: int, height: int) -> None:
        """Gives the window another size."""
        await self.tmux("resize-window", "-x", str(width), "-y", str(height))

    async def screen(self) -> str:
        """What a person sees."""
        return await self.tmux("capture-pane", "-p")

    async def sees(self, pattern: str, limit_s: float = LIMIT_S) -> str:
        """Waits until the screen, its lines joined by single spaces, matches; gives it line by line as it was then."""
        seen = ""

        async def matches() -> str:
            nonlocal seen
            seen = await self.screen()
            return seen if re.search(pattern, " ".join(seen.split())) else ""

        try:
            return str(await until(matches, pattern, limit_s))
        except AssertionError as error:
            raise AssertionError(f"{error}; the screen:\n{seen}") from None

    async def told(self, what: str) -> str:
        """A tmux variable of the window, e.g. ``#{alternate_on}``."""
        return (await self.tmux("display-message", "-p", what)).strip()

    async def child(self) -> int:
        """The process id of the command that the shell runs."""
        return _children(await self.told("#{pane_pid}"))[0]


def _children(pid: str) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextlib.asynccontextmanager
async def terminal(width: int, height: int) -> AsyncIterator[Terminal]:
    """A shell with the prompt `PROMPT`; its server is gone when the block ends."""
    with tempfile.TemporaryDirectory(prefix="fi-tmux-") as directory:
        window = Terminal(Path(directory) / uuid.uuid4().hex[:8])
        size = ("-x", str(width), "-y", str(height))
        shell = ("env", f"PS1={PROMPT}", "TERM=screen-256color", "bash", "--norc", "--noprofile")
        # A size that is told goes before what the terminal says of itself; parallel test processes are told one.
        told = [name for name in os.environ if name.startswith("FI_") or name in ("COLUMNS", "LINES")]
        cleared = [part for name in told for part in ("-u", name)]
        await window.tmux("new-session", "-d", *size, shlex.join([shell[0], *cleared, *shell[1:]]))
        try:
            await window.sees(re.escape(PROMPT.strip()))
            yield window
        finally:
            await window.tmux("kill-server")
