"""`lmray chat`: talk to an endpoint, or to a model and an adapter in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmray.cli.output import AsJson, clean_stdout, emit, say
from lmray.cli.speakers import Speaker, endpoint, in_process
from lmray.errors import ConfigError, LmrayError, did_you_mean

if TYPE_CHECKING:
    from lmray.serve.client import Said

HELP = """\
/model [NAME]   ask another model or adapter from now on; without a name: list them
/system [TEXT]  put TEXT before the conversation; without a text: nothing
/reset          forget what was said
/help           this list
/quit           end, as Ctrl-D does"""
COMMANDS = tuple(line.split()[0] for line in HELP.splitlines())
Target = Annotated[
    str,
    typer.Argument(metavar="URL|MODEL[:ADAPTER]", help="An endpoint, or a model (`artifact:NAME` too) and an adapter."),
]
Question = Annotated[
    str | None,
    typer.Argument(metavar="MESSAGE", help="Ask once. Empty: talk; where stdin is no terminal, its text is asked."),
]
ServedName = Annotated[str | None, typer.Option(help="Which model of the endpoint. Empty: its first.")]
KeyFile = Annotated[
    Path | None, typer.Option(help="File with the endpoint's API key. Empty: the variable LMRAY_API_KEY.")
]


def chat(
    target: Target,
    message: Question = None,
    model: ServedName = None,
    api_key_file: KeyFile = None,
    system: Annotated[str, typer.Option(help="A system message put before the conversation.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0: always the likeliest token.")] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Talk to a model; answers go to stdout as they come. /help there lists what else can be typed."""
    question = message if message is not None or sys.stdin.isatty() else sys.stdin.read().rstrip("\n")
    if question is not None and not question.strip():
        raise ConfigError("chat", "the message is empty", hint='lmray chat TARGET "hello"')
    if question is None and as_json:
        raise ConfigError("--json", "is for one question", hint="give a MESSAGE, or one on stdin")
    sampling = {"max_tokens": max_tokens, "temperature": temperature}
    with clean_stdout(as_json):
        opened = _opened(target, model, api_key_file, sampling)
        with opened as speaker:
            talk = Talk(speaker, speaker.name, system)
            if question is None:
                talk.hold()
                return
            ended = talk.ask(question, _nothing if as_json else _print)
    _report(talk, ended, as_json=as_json)


def _opened(
    target: str, model: str | None, key_file: Path | None, sampling: dict[str, Any]
) -> AbstractContextManager[Speaker]:
    if target.startswith(("http://", "https://")):
        return nullcontext(endpoint(target, model, key_file, **sampling))
    if model or key_file:
        raise ConfigError(f"chat {target}", "--model and --api-key-file are for endpoints", hint="give a URL")
    return in_process(target, **sampling)


@dataclass
class Ended:
    """An answer that is over."""

    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, int] | None = None
    stopped: bool = False
    """By Ctrl-C."""

    def take(self, said: Said) -> None:
        self.text += said.text
        self.finish_reason = said.finish_reason or self.finish_reason
        self.usage = dict(said.usage) if said.usage else self.usage


@dataclass
class Talk:
    """A conversation, with what was said in it."""

    speaker: Speaker
    model: str
    system: str = ""
    said: list[dict[str, str]] = field(default_factory=list)

    def ask(self, question: str, hear: Callable[[str], None]) -> Ended:
        """What the model says to `question`, which `hear` is given as it comes; Ctrl-C ends the answer. A question that
        nothing was said to is not part of the conversation. Raises what the speaker raises."""
        asked = [*self.said, {"role": "user", "content": question}]
        before, ended = [{"role": "system", "content": self.system}] if self.system else [], Ended()
        try:
            with closing(self.speaker.answer(self.model, [*before, *asked])) as pieces:
                for said in pieces:
                    ended.take(said)
                    hear(said.text)
        except KeyboardInterrupt:
            ended.stopped = True
        if ended.text:
            self.said = [*asked, {"role": "assistant", "content": ended.text}]
        return ended

    def hold(self) -> None:
        """Asks what is typed, line by line, until its end; what goes wrong with one question does not end it."""
        with suppress(ImportError):  # line editing, and the lines before on arrow keys, where Python has it
            import readline  # noqa: F401
        say("/help: what else can be typed. Ctrl-C stops an answer, Ctrl-D ends.")
        for line in _typed():
            try:
                if line == "/quit":
                    return
                if line.startswith("/") and not line.startswith("//"):
                    self._do(*line.split(maxsplit=1))
                    continue
                ended = self.ask(line.removeprefix("/") if line.startswith("//") else line, _print)
                print(flush=True)
                if ended.stopped:
                    say("(stopped)")
            except LmrayError as error:
                say(f"error: {error}")

    def _do(self, command: str, text: str = "") -> None:
        match command:
            case "/model":
                self._turn_to(text)
            case "/system":
                self.system = text
            case "/reset":
                self.said = []
            case "/help":
                say(HELP)
            case _:
                hint = did_you_mean(command, COMMANDS) or "// in front sends a message that begins with /"
                raise ConfigError(command, "is no command", allowed=", ".join(COMMANDS), hint=hint)

    def _turn_to(self, name: str) -> None:
        """Raises ConfigError for a name that the speaker does not know."""
        names = self.speaker.names()
        if not name:
            say("\n".join(f"{'*' if one == self.model else ' '} {one}" for one in names))
        elif name.partition("@")[0] not in names:  # versions and stages are answered to and not listed
            raise ConfigError(
                "/model", f"unknown model `{name}`", allowed=", ".join(names), hint=did_you_mean(name, names)
            )
        else:
            self.model = name


def _typed() -> Iterator[str]:
    """Lines from the terminal until it ends; empty ones are passed over, and Ctrl-C empties one."""
    while True:
        prompt = "> " if sys.stdout.isatty() else ""
        if not prompt:  # stdout is data
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = input(prompt).strip()
        except EOFError:
            say("")
            return
        except KeyboardInterrupt:
            say("")
            continue
        if line:
            yield line


def _print(text: str) -> None:
    print(text, end="", flush=True)


def _nothing(text: str) -> None:
    pass


def _report(talk: Talk, ended: Ended, *, as_json: bool) -> None:
    """The end of a single question's answer. Leaves with 130 where it was stopped."""
    told = {
        "status": "stopped" if ended.stopped else "succeeded",
        "model": talk.model,
        "answer": ended.text,
        "finish_reason": ended.finish_reason,
        "usage": ended.usage,
    }
    emit(told, "", as_json=as_json)
    if ended.stopped:
        raise typer.Exit(130)
