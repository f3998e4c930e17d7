"""The screen of a chat: lines scroll by above the input, which stays at the bottom."""

from __future__ import annotations

import shutil
from collections.abc import Callable

from prompt_toolkit import PromptSession
from prompt_toolkit.filters import Condition
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.styles import Style
from rich.text import Text

from runlane.cli.chat.view import ChatView, Fragments
from runlane.cli.terminal import SafeConsole, for_terminal

ESCAPE_SECONDS = 0.05
"""How long a lone Esc may be the beginning of another key."""

_STYLE = Style.from_dict({"note": "#888888", "ask": "bold"})


class Screen:
    """Reads prompts and keys, and prints the lines of a `view` above them."""

    def __init__(self, on_escape: Callable[[], None], on_up: Callable[[], None]) -> None:
        self.view = ChatView(self._print, lambda: shutil.get_terminal_size().columns)
        self._on_escape = on_escape
        self._on_up = on_up
        self._console = SafeConsole(wrap=False)
        output = create_output()
        if isinstance(output, Vt100_Output):
            # Some terminals do not answer, and the input needs no more than its own rows.
            output.enable_cpr = False
        self._session: PromptSession[str] = PromptSession(
            self._message,
            output=output,
            key_bindings=self._bindings(),
            reserve_space_for_menu=0,
            prompt_continuation="  ",
            erase_when_done=True,  # a prompt is shown when its run starts, also one of others
            refresh_interval=0.5,  # an approval takes a verdict only after a while
            style=_STYLE,
        )
        self._session.default_buffer.on_text_changed += lambda buffer: self.view.typed(buffer.text)
        self._session.app.ttimeoutlen = self._session.app.timeoutlen = ESCAPE_SECONDS

    async def read(self) -> str | None:
        """Reads a prompt; None when the person leaves."""
        self.view.typed("")
        try:
            return await self._session.prompt_async()
        except EOFError:
            return None

    def fill(self, text: str) -> bool:
        """Puts a text into the input; False if there is one."""
        buffer = self._session.default_buffer
        if buffer.text:
            return False
        buffer.text = text
        buffer.cursor_position = len(text)
        return True

    def redraw(self) -> None:
        """Shows the area above the input as it is now."""
        self._session.app.invalidate()

    def _print(self, text: str, style: str) -> None:
        app = self._session.app
        if app.is_running:
            # The terminal stays as it is for keys: in its normal mode, Ctrl-C and Ctrl-D that come
            # during an output would be signals to the process, or lost.
            app.renderer.erase()
            app.invalidate()
        self._console.print(Text(for_terminal(text), style=style))

    def _message(self) -> Fragments:
        return [*self.view.area(), ("class:note", f"{self.view.status()}\n"), ("", "> ")]

    def _can_take_back(self) -> bool:
        return bool(self.view.last_waiting) and not self._session.default_buffer.text

    def _bindings(self) -> KeyBindings:
        keys = KeyBindings()

        @keys.add("enter")
        def _send(event: KeyPressEvent) -> None:
            event.current_buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def _new_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add("escape")
        def _cancel(_: KeyPressEvent) -> None:
            self._on_escape()

        @keys.add("up", filter=Condition(self._can_take_back))
        def _take_back(_: KeyPressEvent) -> None:
            self._on_up()

        @keys.add("c-c")
        def _clear(event: KeyPressEvent) -> None:
            self.view.editing = None
            if event.current_buffer.text:
                event.current_buffer.reset()
                self.view.typed("")
            else:
                event.app.exit(exception=EOFError())

        return keys
