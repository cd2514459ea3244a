"""Commands that answer: one prompt, a file of them, or a talk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from dlx.cli import loading
from dlx.cli.flags import ENGINE, NONE, PLAIN, SAMPLING, Call, Given, asked, flags, taking
from dlx.cli.notices import complain, notice, set_logging
from dlx.errors import DlxError, RequestError

if TYPE_CHECKING:
    from dlx.llm import LLM, Message

Json = Annotated[bool, Parameter(help="Print an answer and its figures as one JSON object.")]


@taking(engine=flags(ENGINE), sampling=flags(SAMPLING))
def generate(
    prompt: Annotated[str | None, Parameter(help="The prompt; - reads it from stdin.")] = None,
    /,
    *,
    jsonl: Annotated[Path | None, Parameter(help="File of prompts instead, a JSON object a line; - is stdin.")] = None,
    out: Annotated[Path | None, Parameter(help="Where answers to --jsonl go; else stdout.")] = None,
    raw: Annotated[bool, Parameter(help="Send a prompt as it is, without the chat template.")] = False,
    json: Json = False,
    engine: Given = NONE,
    sampling: Given = NONE,
    call: Call = PLAIN,
) -> int:
    """Answer one prompt, or all of a JSONL file."""
    set_logging(call.debug)
    if (prompt is None) is (jsonl is None):
        raise RequestError("nothing to answer, or twice; give a prompt, or --jsonl FILE")
    if out is not None and jsonl is None:
        raise RequestError("--out is where answers to --jsonl go; give both")
    found = asked(call, engine, sampling, {"max_num_seqs": 1} if jsonl is None else None)
    if jsonl is not None:
        from dlx.cli.batch import answered

        return answered(found, jsonl, out, raw)

    from dlx.live import tell

    text = loading.prompted(prompt or "")
    with loading.load(found) as llm:
        tell(llm, text if raw else [{"role": "user", "content": text}], found.sampling, as_json=json)
    return 0


@taking(engine=flags(ENGINE), sampling=flags(SAMPLING))
def chat(
    *,
    url: Annotated[str | None, Parameter(help="Talk with the server there instead of loading a model.")] = None,
    api_key: Annotated[str | None, Parameter(help="The server's key; else $DLX_API_KEY.")] = None,
    json: Json = False,
    engine: Given = NONE,
    sampling: Given = NONE,
    call: Call = PLAIN,
) -> None:
    """Talk, turn by turn: /reset forgets, /exit leaves."""
    from dlx.live import tell

    set_logging(call.debug)
    found = asked(call, engine, sampling, {"max_num_seqs": 1})
    if url is None:
        with loading.load(found) as llm:
            params = found.sampling
            talk(lambda turn: tell(llm, turn, params, as_json=json).text, lambda t: trimmed(llm, t, params.max_tokens))
        return
    if engine.values():
        flag = ENGINE.knobs[min(engine.values())].flag
        raise RequestError(f"{flag} is a matter of the server at {url}; leave it out")
    if not url.startswith(("http://", "https://")):
        raise RequestError(f"--url {url} is not allowed; use http://HOST:PORT")

    from dlx.cli import remote

    key = found.key if api_key is None else api_key
    said = {name: one.value for name, one in found.values["sampling"].items()}
    talk(lambda turn: remote.tell(url.rstrip("/").removesuffix("/v1"), key, turn, said, as_json=json))


def talk(tell: Callable[[list[Message]], str], trim: Callable[[list[Message]], list[Message]] = list) -> None:
    """Ask for lines and answer them until there are no more; a turn that fails is forgotten.

    tell  shows the answer to all turns so far, and returns it
    trim  the turns that there is room for
    """
    from dlx.live import ask

    messages: list[Message] = []
    notice("/reset forgets, /exit leaves")
    while (line := ask()) not in (None, "/exit"):
        if line == "/reset":
            messages = []
            notice("forgotten")
        elif line:
            try:
                turn = trim([*messages, {"role": "user", "content": loading.checked(line)}])
                messages = [*turn, {"role": "assistant", "content": tell(turn)}]
            except DlxError as error:
                complain(error)


def trimmed(llm: LLM, turn: list[Message], max_tokens: int) -> list[Message]:
    """The turn without its oldest exchanges, as far as the model's length cannot hold them and an answer."""
    kept, longest = turn, llm.engine.worker.max_len
    while len(kept) > 1 and len(llm.tokenizer.chat(kept)) + max_tokens > longest:
        kept = kept[2:]
    if len(kept) < len(turn):
        gone = (len(turn) - len(kept)) // 2
        notice(f"oldest exchanges forgotten: {gone}; talk and --max-tokens must fit into {longest} tokens")
    return kept
