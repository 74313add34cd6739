"""Between our protobuf messages and what the gateway speaks."""

from typing import Any

from cluster.gateway.answer import AnswerEvent, Delta, DrawnToken, Finish, Usage
from cluster.gateway.calls import ChatCall, CompletionCall, chat_call, completion_call
from cluster.gateway.errors import Kind, Refusal
from cluster.gateway.strict_json import parse_object
from cluster.proto.eightfold.v1 import eightfold_pb2 as pb
from model.chat.events import ContentDelta, ReasoningDelta, ToolCallDelta, ToolCallStart

_REASONS = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "tool_calls": pb.FINISH_REASON_TOOL_CALLS,
}


def completion_call_of(request: pb.GenerateRequest) -> CompletionCall:
    """A prompt to continue; refused as over HTTP."""
    body = _common(request.model, request.sampling)
    if request.sampling.HasField("logprobs"):
        body["logprobs"] = request.sampling.logprobs
    match request.WhichOneof("prompt"):
        case "text":
            body["prompt"] = request.text
        case "token_ids":
            body["prompt"] = list(request.token_ids.ids)
    return completion_call(body)


def chat_call_of(request: pb.ChatRequest) -> ChatCall:
    """A conversation to answer; refused as over HTTP."""
    body = _common(request.model, request.sampling)
    if request.sampling.HasField("logprobs"):
        body |= {"logprobs": True, "top_logprobs": request.sampling.logprobs}
    if request.thinking:
        body["thinking"] = {"type": "enabled"}
    if request.tool_choice:
        body["tool_choice"] = request.tool_choice
    if request.response_schema_json:
        schema = _json("response_schema_json", request.response_schema_json)
        body["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema}}
    body["messages"] = [_message(message) for message in request.messages]
    body["tools"] = [_tool(f"tools[{i}]", tool) for i, tool in enumerate(request.tools)]
    return chat_call(body)


def text_response(response_id: str, event: AnswerEvent, *, with_logprobs: bool) -> pb.GenerateResponse:
    """One event of a continued prompt."""
    response = pb.GenerateResponse(id=response_id)
    match event:
        case Delta():
            text = "".join(part.text for part in event.events if isinstance(part, ContentDelta))
            tokens = [_token(token, with_logprobs) for token in event.tokens]
            response.delta.CopyFrom(pb.TextDelta(choice=event.choice, text=text, tokens=tokens))
        case Finish():
            response.finish.CopyFrom(_finish(event))
        case Usage():
            response.usage.CopyFrom(_usage(event))
    return response


def chat_response(response_id: str, event: AnswerEvent, *, with_logprobs: bool) -> pb.ChatResponse:
    """One event of an answer to a conversation."""
    response = pb.ChatResponse(id=response_id)
    match event:
        case Delta():
            response.delta.CopyFrom(_chat_delta(event, with_logprobs))
        case Finish():
            response.finish.CopyFrom(_finish(event))
        case Usage():
            response.usage.CopyFrom(_usage(event))
    return response


def _common(model: str, sampling: pb.Sampling) -> dict[str, Any]:
    body: dict[str, Any] = {}
    if model:
        body["model"] = model
    for key in (
        "max_tokens", "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty",
        "repetition_penalty", "ignore_eos", "seed", "n",
    ):  # fmt: skip
        if sampling.HasField(key):
            body[key] = getattr(sampling, key)
    if sampling.logit_bias:
        body["logit_bias"] = dict(sampling.logit_bias)
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.stop_token_ids:
        body["stop_token_ids"] = list(sampling.stop_token_ids)
    return body


def _message(message: pb.Message) -> dict[str, Any]:
    entry: dict[str, Any] = {"role": message.role, "content": message.content, "prefix": message.prefix}
    for key in ("reasoning_content", "tool_call_id"):
        if message.HasField(key):
            entry[key] = getattr(message, key)
    if message.tool_calls:
        entry["tool_calls"] = [
            {"id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return entry


def _tool(field: str, tool: pb.Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    if tool.parameters_json:
        function["parameters"] = _json(f"{field}.parameters_json", tool.parameters_json)
    return {"type": "function", "function": function}


def _json(field: str, text: str) -> dict[str, Any]:
    try:
        return parse_object(text.encode())
    except Refusal as refusal:
        raise Refusal(Kind.INVALID_VALUE, refusal.message.replace("the body", "the text"), field) from None


def _chat_delta(event: Delta, with_logprobs: bool) -> pb.ChatDelta:
    delta = pb.ChatDelta(choice=event.choice, tokens=[_token(token, with_logprobs) for token in event.tokens])
    for part in event.events:
        match part:
            case ContentDelta(text):
                delta.content += text
            case ReasoningDelta(text):
                delta.reasoning_content += text
            case ToolCallStart(index, call_id, name):
                delta.tool_calls.append(pb.ToolCallDelta(index=index, id=call_id, name=name))
            case ToolCallDelta(index, arguments):
                delta.tool_calls.append(pb.ToolCallDelta(index=index, arguments=arguments))
    return delta


def _token(token: DrawnToken, with_logprobs: bool) -> pb.DrawnToken:
    message = pb.DrawnToken(id=token.token_id)
    if with_logprobs and token.logprobs:
        message.logprob = token.logprobs.logprob
        message.top_logprobs.extend(
            pb.TopLogprob(id=token_id, logprob=logprob) for token_id, logprob in token.logprobs.top
        )
    return message


def _finish(event: Finish) -> pb.Finish:
    return pb.Finish(choice=event.choice, reason=_REASONS[event.reason])


def _usage(event: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=event.prompt_tokens,
        cached_tokens=event.cached_tokens,
        completion_tokens=event.answer_tokens,
        reasoning_tokens=event.reasoning_tokens,
    )
