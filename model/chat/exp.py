"""The chat encoding of V3.2-Exp, which V3.1 has too.

    BOS system... tools  <｜User｜>text<｜Assistant｜></think>answer EOS  <｜User｜>text<｜Assistant｜><think>

System messages stand in front wherever they were sent. Earlier turns never carry reasoning. A tool's output
is followed by the rest of the assistant's turn, without a new marker; in thinking mode, too, that rest is no
reasoning. The same as the template in the checkpoint's tokenizer_config.json, written out by hand, and with
the tools block, which that template leaves to the caller.
"""

from collections.abc import Sequence
from itertools import dropwhile

from model.chat.markup import (
    ASSISTANT,
    BOS,
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    END_THINK,
    EOS,
    OUTPUT_BEGIN,
    OUTPUT_END,
    THINK,
    TOOL_SEP,
    USER,
    Piece,
    Prompt,
    mark,
    said,
)
from model.chat.messages import Message, Tool, arrange, json_text
from model.chat.preambles import EXP_TOOLS_HEAD, EXP_TOOLS_RULES
from model.errors import RequestError


def render(
    messages: Sequence[Message],
    tools: Sequence[Tool] = (),
    thinking: bool = False,
    add_generation_prompt: bool = True,
) -> Prompt:
    """Renders a conversation.

    Args:
        messages: the conversation; see `arrange` for the rules between them.
        tools: functions that the model may call.
        thinking: whether the answer starts with reasoning.
        add_generation_prompt: end with the marker after which the model speaks.

    Raises:
        RequestError: the encoding has no form for this conversation.
    """
    messages = arrange(messages, to_answer=add_generation_prompt)
    pieces = [mark(BOS), said(_system(messages)), *_tools(tools)]
    after_user = in_reasoning = False
    for i, message in enumerate(messages):
        match message.role:
            case "user":
                pieces += [mark(USER), said(message.content)]
                after_user = True
            case "assistant":
                in_reasoning = thinking and message.prefix and after_user
                pieces += _opening(in_reasoning) if after_user else []
                if in_reasoning:
                    in_reasoning = _reasoning_prefix(f"messages[{i}]", message, pieces)
                else:
                    pieces += _answer(message)
                after_user = False
            case "tool":
                pieces += [mark(OUTPUT_BEGIN), said(message.content), mark(OUTPUT_END)]
                after_user = False
            case "developer":
                problem = "must not be developer: this model's chat encoding has no such role; use system"
                raise RequestError(f"messages[{i}].role", problem)
    if add_generation_prompt and after_user:
        pieces += _opening(thinking)
        in_reasoning = thinking
    return Prompt(tuple(pieces), in_reasoning)


def _system(messages: Sequence[Message]) -> str:
    contents = (message.content for message in messages if message.role == "system")
    # In the template a separator needs something before it, so empty messages in front leave no trace.
    return "\n\n".join(dropwhile(lambda content: not content, contents))


def _opening(thinking: bool) -> list[Piece]:
    return [mark(ASSISTANT + (THINK if thinking else END_THINK))]


def _answer(message: Message) -> list[Piece]:
    """An assistant's turn behind `</think>`."""
    _, closed, answer = message.content.partition(END_THINK)
    pieces = [said(answer if closed else message.content)]
    if message.tool_calls:
        pieces.append(mark(CALLS_BEGIN))
        for call in message.tool_calls:
            pieces += [
                mark(CALL_BEGIN),
                said(call.name),
                mark(TOOL_SEP),
                said(call.arguments),
                mark(CALL_END),
            ]
        pieces.append(mark(CALLS_END))
    return pieces if message.prefix else [*pieces, mark(EOS)]


def _reasoning_prefix(field: str, message: Message, pieces: list[Piece]) -> bool:
    """Adds the beginning of an answer that starts with reasoning; returns whether that is still going on.

    Without `reasoning_content` the content is the reasoning so far, as in the template.
    """
    if END_THINK in message.content:
        raise RequestError(
            f"{field}.content", f"must not contain {END_THINK}; reasoning goes in reasoning_content"
        )
    if message.reasoning_content is None:
        pieces.append(said(message.content))
        return True
    pieces.append(said(message.reasoning_content))
    if not message.content:
        return True
    pieces += [mark(END_THINK), said(message.content)]
    return False


def _tools(tools: Sequence[Tool]) -> list[Piece]:
    if not tools:
        return []
    pieces = [mark("\n\n" + EXP_TOOLS_HEAD)]
    for i, tool in enumerate(tools):
        parameters = json_text(f"tools[{i}].function.parameters", tool.parameters)
        pieces += [
            mark("### "),
            said(tool.name),
            mark("\nDescription: "),
            said(tool.description),
            mark("\n\nParameters: "),
            said(parameters),
            mark("\n\n"),
        ]
    return [*pieces, mark(EXP_TOOLS_RULES)]
