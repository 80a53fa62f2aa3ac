"""The pages of `emu3-jax interleave`: texts and pictures in order, as Markdown, as HTML and as JSON values."""

import html
import pathlib
import typing

from emu3_jax.printable import printable

if typing.TYPE_CHECKING:
    from emu3_jax.generation.pieces import Piece

_CUT_OFF = "(cut off: the document was too long)"
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:48rem;margin:2rem auto;padding:0 1rem;color:#1c1c1e}"
    "img{max-width:100%;min-width:8rem;image-rendering:auto}blockquote{color:#555;border-left:3px solid #ddd;"
    "margin:1rem 0;padding-left:1rem}p,blockquote{white-space:pre-wrap}"
)


class Page:
    """A page that grows piece by piece. Its pictures are saved when they are added.

    Attributes:
        answers: per request, the pieces of the answer as JSON values.
        pictures: number of pictures so far.
        spoken: whether the page shows the requests, as conversations do.
    """

    def __init__(self, stem: str, output: pathlib.Path, *, spoken: bool):
        """Makes an empty page.

        Args:
            stem: name of the page without its ending. The names of its pictures begin with it.
            output: directory of the page.
            spoken: see the class's attributes.
        """
        self.answers: list[list[dict[str, typing.Any]]] = []
        self.spoken = spoken
        self._stem, self._output = stem, output
        self.pictures = 0
        self._markdown: list[str] = []
        self._html: list[str] = []

    def ask(self, prompt: str) -> None:
        """Begins the answer to a request."""
        self.answers.append([])
        self._prompt = prompt
        if self.spoken:
            self._markdown.append("\n".join(f"> {line}" for line in prompt.splitlines()))
            self._html.append(f"<blockquote>{html.escape(prompt)}</blockquote>")

    def add(self, piece: "Piece", directory: pathlib.Path) -> str:
        """Adds a piece of the answer. A picture is saved in `directory`. Returns what a terminal may show of it."""
        from emu3_jax.media.picture_files import save_picture

        answer = self.answers[-1]
        if piece.kind != "picture":
            text = piece.text.strip()
            answer.append({piece.kind: piece.text})
            self._markdown.append(text)
            self._html.append(f"<p>{html.escape(text)}</p>")
            return printable(text, keep="\n")
        if piece.picture is None:  # not even its first row of tokens is complete
            answer.append({"picture": None, "whole": False})
            return ""
        name = f"{self._stem}_{self.pictures}.png"
        self.pictures += 1
        save_picture(piece.picture, directory / name, {"prompt": self._prompt})
        note = "" if piece.whole else _CUT_OFF
        self._markdown.append(f"![]({name})" + (f"\n\n{note}" if note else ""))
        self._html.append(f'<p><img src="{name}" alt=""></p>' + (f"<p>{note}</p>" if note else ""))
        answer.append({"picture": str(self._output / name), "whole": piece.whole})
        return printable(str(self._output / name))

    def markdown(self) -> str:
        """The page as Markdown."""
        return "\n\n".join(self._markdown) + "\n"

    def html(self) -> str:
        """The page as HTML, without scripts. It names its pictures relative to itself."""
        title = html.escape(self._stem)
        head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        return (
            f'<!doctype html>\n<html lang=""><head>{head}</head><body>\n' + "\n".join(self._html) + "\n</body></html>\n"
        )


class Terminal:
    """Shows a document on standard output while it is written."""

    def __init__(self) -> None:
        self._shown = ""  # of the present text

    def grow(self, text: str) -> None:
        """Shows what is new of a text that is being written, given the text so far."""
        text = printable(text.strip(), keep="\n")
        if text.startswith(self._shown):
            print(text[len(self._shown) :], end="", flush=True)
            self._shown = text

    def end(self, shown: str) -> None:
        """Shows a piece, or what is missing of it, and ends the line."""
        known = self._shown if shown.startswith(self._shown) else ""
        if self._shown and not known:
            print(flush=True)
        print(shown[len(known) :], flush=True)
        self._shown = ""
