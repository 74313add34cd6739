"""The HTTP interface described as OpenAPI 3.1, from the tables and limits that requests are checked with.

What it forbids is refused. What it allows may still be refused: rules between fields, sizes counted in bytes
and the room left by a prompt have no place in a schema.
"""

from collections import defaultdict
from typing import Any, get_args

from cluster.gateway.auth import ApiKeys
from cluster.gateway.calls import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    LABEL_FIELDS,
    MAX_MESSAGES,
    UNSUPPORTED_FIELDS,
)
from cluster.gateway.core import Gateway
from cluster.gateway.errors import Kind
from cluster.gateway.http_guard import OPEN_PATHS
from cluster.gateway.metrics import CONTENT_TYPE
from cluster.gateway.structured import MAX_TOOLS
from model.chat.messages import Role
from model.sampling_params import (
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_BYTES,
    MAX_STOP_TOKEN_IDS,
    MAX_STOPS,
)

Json = dict[str, Any]

PREFIXES = ("/v1", "")  # DeepSeek's base address has no /v1

_ANYWHERE = (Kind.BAD_HTTP, Kind.SLOW_BODY, Kind.HEADERS, Kind.INTERNAL, Kind.OVERLOADED)
_FOR_ANSWERS = (
    Kind.INVALID_JSON, Kind.INVALID_TYPE, Kind.INVALID_VALUE, Kind.UNSUPPORTED, Kind.MISSING, Kind.CONTEXT,
    Kind.NO_MODEL, Kind.TOO_LARGE, Kind.MEDIA_TYPE, Kind.NUMERICAL, Kind.REPLICA_LOST, Kind.TIMEOUT,
    Kind.SLOW_READER,
)  # fmt: skip

_TEXT: Json = {"type": "string"}
_COUNT: Json = {"type": "integer", "minimum": 0}
_LOGPROB: Json = {"type": "number", "maximum": 0}


def openapi(gateway: Gateway, keys: ApiKeys, version: str) -> Json:
    """The description of this server: its own model, limits and need for keys."""
    paths = {
        "/healthz": _get("Whether the server answers at all.", {"status": {"const": "ok"}}),
        "/readyz": _get("Whether requests can be served now.", {"status": {"const": "ready"}}),
        "/metrics": _shown("Metrics in the text format of Prometheus.", {CONTENT_TYPE: {"schema": _TEXT}}),
        "/version": _get(
            "What runs here.",
            {"version": _TEXT, "model": {"const": gateway.model}, "weights_digest": _hex(64)},
        ),
        "/status": _shown("For operators: the parts of the cluster.", _json({"type": "object"})),
        "/openapi.json": _shown("This description.", _json({"type": "object"})),
    }
    for prefix in PREFIXES:
        paths |= {
            f"{prefix}/models": _shown("The models served here.", _json(_ref("ModelList"))),
            f"{prefix}/models/{{model}}": _model_path(),
            f"{prefix}/chat/completions": _answers("Chat", "ChatCompletion", "Answers a conversation."),
            f"{prefix}/completions": _answers("Completion", "TextCompletion", "Continues a prompt."),
        }
    if keys.are_needed:
        for path in paths.keys() - OPEN_PATHS:
            for operation in paths[path].values():
                operation["responses"] |= _refusals(Kind.NO_KEY)
                operation["security"] = [{"key": []}]
    return {
        "openapi": "3.1.0",
        "info": {"title": "Eightfold", "version": version},
        "paths": paths,
        "components": {
            "schemas": _requests(gateway) | _responses(gateway),
            "headers": {
                "RequestId": {
                    "required": True,
                    "schema": {"type": "string", "pattern": "^req_[0-9a-f]{24}$"},
                },
                "RetryAfter": {"schema": {"type": "string", "pattern": "^[0-9]+$"}},
            },
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


# Paths


def _shown(summary: str, content: Json) -> Json:
    """A path that only shows something."""
    operation = {"summary": summary, "responses": _success(content) | _refusals(*_ANYWHERE)}
    return {"get": operation}


def _get(summary: str, properties: Json) -> Json:
    return _shown(summary, _json(_object(properties)))


def _model_path() -> Json:
    path = _shown("One model.", _json(_ref("Model")))
    path["get"]["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": _TEXT}]
    path["get"]["responses"] |= _refusals(Kind.NO_MODEL)
    return path


def _answers(request: str, response: str, summary: str) -> Json:
    operation = {
        "summary": summary,
        "description": f"With stream: true, server-sent events of {response}Chunk, then [DONE].",
        "requestBody": {"required": True, "content": _json(_ref(f"{request}Request"))},
        "responses": _success(_json(_ref(response)) | _events(f"{response}Chunk"))
        | _refusals(*_ANYWHERE, *_FOR_ANSWERS),
    }
    return {"post": operation}


def _events(chunk: str) -> Json:
    """A stream, described by its events, as is usual before OpenAPI 3.2; a broken one ends with an error."""
    said = {"anyOf": [_ref(chunk), _ref("Error")]}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": said}
    event = {"type": "object", "properties": {"data": {"anyOf": [{"const": "[DONE]"}, data]}}}
    return {"text/event-stream": {"schema": event | {"required": ["data"]}}}


def _success(content: Json) -> Json:
    return {"200": {"description": "As asked.", "headers": _headers(), "content": content}}


def _refusals(*kinds: Kind) -> Json:
    """Responses for rows of the table of refusals, by their status."""
    rows = defaultdict(list)
    for kind in kinds:
        rows[kind.row.http].append(kind.row)
    out: Json = {}
    for status, same in sorted(rows.items()):
        codes, types = (sorted({getattr(row, key) for row in same}) for key in ("code", "type"))
        error = {"properties": {"error": {"properties": {"code": {"enum": codes}, "type": {"enum": types}}}}}
        schema = {"allOf": [_ref("Error"), error]}
        headers = _headers() | ({"retry-after": _ref("RetryAfter", "headers")} if status >= 500 else {})
        out[str(status)] = {"description": ", ".join(codes), "headers": headers, "content": _json(schema)}
    return out


def _headers() -> Json:
    return {"x-request-id": _ref("RequestId", "headers")}


# Requests


def _requests(gateway: Gateway) -> Json:
    common = _common_fields(gateway)
    chat = common | _chat_fields() | {"max_completion_tokens": common["max_tokens"]}
    text = common | _text_fields(gateway)
    assert chat.keys() == CHAT_FIELDS
    assert text.keys() == COMPLETION_FIELDS
    return {
        "Message": _message(),
        "Tool": _tool(),
        "ChatRequest": _request(chat, "messages"),
        "CompletionRequest": _request(text, "prompt"),
    }


def _request(fields: Json, *required: str) -> Json:
    refused = {
        key: {"type": "null", "description": f"Not supported: {why}."}
        for key, why in UNSUPPORTED_FIELDS.items()
        if key not in fields
    }
    labels = {key: {"description": "Has no effect."} for key in LABEL_FIELDS}
    return {
        "type": "object",
        "required": ["model", *required],
        "properties": dict(sorted((fields | refused | labels).items())),
    }


def _common_fields(gateway: Gateway) -> Json:
    facts = gateway.backend.facts
    stop = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_BYTES}
    token_id = {"type": "integer", "minimum": 0, "maximum": facts.config.vocab_size - 1}
    return {
        "frequency_penalty": _number(-2, 2),
        "ignore_eos": _maybe({"type": "boolean"}),
        "logit_bias": _maybe(
            {
                "type": "object",
                "maxProperties": MAX_LOGIT_BIAS,
                "patternProperties": {"^[0-9]{1,9}$": {"type": "number", "minimum": -100, "maximum": 100}},
                "additionalProperties": False,
            }
        ),
        "logprobs": _integer(0, MAX_LOGPROBS),
        "max_tokens": _integer(1, facts.context - 1),
        "min_p": _number(0, 1),
        "model": {"const": gateway.model},
        "n": _integer(1, MAX_CHOICES),
        "presence_penalty": _number(-2, 2),
        "repetition_penalty": _number(0.1, 10),
        "seed": _integer(-(2**63), 2**64 - 1),
        "stop": {"anyOf": [stop, {"type": "array", "items": stop, "maxItems": MAX_STOPS}, {"type": "null"}]},
        "stop_token_ids": _maybe({"type": "array", "items": token_id, "maxItems": MAX_STOP_TOKEN_IDS}),
        "stream": _maybe({"type": "boolean"}) | {"examples": [True]},
        "stream_options": _maybe(
            {"type": "object", "properties": {"include_usage": _maybe({"type": "boolean"})}}
        ),
        "temperature": _number(0, 2),
        "top_k": _integer(0),
        "top_p": _number(0, 1),
    }


def _chat_fields() -> Json:
    return {
        "chat_template_kwargs": _maybe(
            {
                "type": "object",
                "properties": {"thinking": _maybe({"type": "boolean"})},
                "additionalProperties": {"type": "null"},
            }
        ),
        "logprobs": _maybe({"type": "boolean"}) | {"examples": [True]},
        "messages": {
            "type": "array",
            "items": _ref("Message"),
            "minItems": 1,
            "maxItems": MAX_MESSAGES,
            "examples": [[{"role": "user", "content": 'What does "harbor" mean?'}]],
        },
        "parallel_tool_calls": {"enum": [True, None]},
        "response_format": {"anyOf": [_typed("text"), _schema_format(), {"type": "null"}]},
        "thinking": _maybe(_object({"type": {"enum": ["enabled", "disabled"]}}, is_open=True)),
        "tool_choice": {"enum": ["auto", "none", None]},
        "tools": _maybe({"type": "array", "items": _ref("Tool"), "maxItems": MAX_TOOLS}),
        "top_logprobs": _integer(0, MAX_LOGPROBS),
    }


def _text_fields(gateway: Gateway) -> Json:
    last = gateway.backend.facts.config.vocab_size - 1
    ids = {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": last},
        "minItems": 1,
    }
    one = {"type": "array", "items": {"anyOf": [_TEXT, ids]}, "minItems": 1, "maxItems": 1}
    return {"prompt": {"anyOf": [_TEXT, ids, one]}}


def _schema_format() -> Json:
    wrapper = _object({"schema": {"type": "object", "minProperties": 1}}, is_open=True)
    wrapper["properties"]["strict"] = {"enum": [False, None]}
    return _typed("json_schema", json_schema=wrapper)


def _message() -> Json:
    text = [_TEXT, _list(_typed("text", text=_TEXT))]
    others = [role for role in get_args(Role) if role != "assistant"]
    said = _object({"role": {"enum": others}, "content": {"anyOf": text}}, is_open=True)
    said["properties"]["tool_call_id"] = _maybe(_TEXT)
    answered = _object({"role": {"const": "assistant"}}, is_open=True)
    answered["properties"] |= {
        "content": {"anyOf": [*text, {"type": "null"}]},
        "reasoning_content": _maybe(_TEXT),
        "tool_calls": _maybe(_list(_made_call())),
        "prefix": _maybe({"type": "boolean"}),
    }
    return {"anyOf": [said, answered]}


def _made_call() -> Json:
    function = _object({"name": _TEXT, "arguments": {"type": ["string", "object"]}}, is_open=True)
    call = _object({"id": _TEXT, "function": function}, is_open=True)
    call["properties"]["type"] = {"const": "function"}
    return call


def _tool() -> Json:
    function = _object({"name": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}}, is_open=True)
    function["properties"] |= {"description": _maybe(_TEXT), "parameters": _maybe({"type": "object"})}
    tool = _object({"function": function}, is_open=True)
    tool["properties"]["type"] = {"const": "function"}
    return tool


# Responses


def _responses(gateway: Gateway) -> Json:
    head = {
        "created": _COUNT,
        "model": {"const": gateway.model},
        "system_fingerprint": {"const": gateway.fingerprint},
    }
    model = {
        "id": {"const": gateway.model},
        "object": {"const": "model"},
        "created": _COUNT,
        "owned_by": {"const": "eightfold"},
        "context_length": {"const": gateway.backend.facts.context},
    }
    error = {"message": _TEXT, "type": _TEXT, "param": _maybe(_TEXT), "code": _TEXT}
    return {
        "Error": _object({"error": _object(error)}),
        "Model": _object(model),
        "ModelList": _object({"object": {"const": "list"}, "data": _list(_ref("Model"))}),
        "Usage": _usage(),
        "ChatCompletion": _answer(head, "chatcmpl", "chat.completion", _chat_choice(), is_whole=True),
        "ChatCompletionChunk": _answer(head, "chatcmpl", "chat.completion.chunk", _chat_piece()),
        "TextCompletion": _answer(head, "cmpl", "text_completion", _text_choice(), is_whole=True),
        "TextCompletionChunk": _answer(head, "cmpl", "text_completion", _text_choice(is_whole=False)),
    }


def _answer(head: Json, prefix: str, kind: str, choice: Json, is_whole: bool = False) -> Json:
    identity = {"id": {"type": "string", "pattern": f"^{prefix}-[0-9a-f]{{24}}$"}, "object": {"const": kind}}
    fields = identity | head | {"choices": _list(choice)}
    if is_whole:
        return _object(fields | {"usage": _ref("Usage")})
    chunk = _object(fields)
    chunk["properties"]["usage"] = {"anyOf": [_ref("Usage"), {"type": "null"}]}
    return chunk


def _choice(fields: Json, logprobs: Json, reasons: list[str | None]) -> Json:
    index = {"index": {**_COUNT, "maximum": MAX_CHOICES - 1}}
    return _object(index | fields | {"logprobs": _maybe(logprobs), "finish_reason": {"enum": reasons}})


def _chat_choice() -> Json:
    message = _object({"role": {"const": "assistant"}, "content": _maybe(_TEXT), "refusal": {"type": "null"}})
    message["properties"] |= {"reasoning_content": _TEXT, "tool_calls": _list(_call())}
    return _choice({"message": message}, _chat_logprobs(), ["stop", "length", "tool_calls"])


def _chat_piece() -> Json:
    delta = {
        "role": {"const": "assistant"},
        "content": _maybe(_TEXT),
        "reasoning_content": _TEXT,
        "tool_calls": _list(_call(is_piece=True)),
    }
    piece = {"type": "object", "properties": delta, "additionalProperties": False}
    return _choice({"delta": piece}, _chat_logprobs(), ["stop", "length", "tool_calls", None])


def _call(is_piece: bool = False) -> Json:
    function = {"name": _TEXT, "arguments": _TEXT}
    call = {"id": _TEXT, "type": {"const": "function"}, "function": _object(function)}
    if not is_piece:
        return _object(call)
    call["function"]["required"] = ["arguments"]
    return _object({"index": _COUNT} | call) | {"required": ["index", "function"]}


def _text_choice(is_whole: bool = True) -> Json:
    text_logprobs = {
        "tokens": _list(_TEXT),
        "token_logprobs": _list(_LOGPROB),
        "top_logprobs": _list({"type": "object", "additionalProperties": _LOGPROB}),
        "text_offset": _list(_COUNT),
    }
    reasons: list[str | None] = ["stop", "length"] if is_whole else ["stop", "length", None]
    return _choice({"text": _TEXT}, _object(text_logprobs), reasons)


def _chat_logprobs() -> Json:
    byte = {"type": "integer", "minimum": 0, "maximum": 255}
    token = {"token": _TEXT, "logprob": _LOGPROB, "bytes": _list(byte)}
    entries = _list(_object(token | {"top_logprobs": _list(_object(token))}))
    logprobs = _object({"content": entries, "refusal": {"type": "null"}})
    logprobs["properties"]["reasoning_content"] = entries
    return logprobs


def _usage() -> Json:
    counts = (
        "prompt_tokens", "completion_tokens", "total_tokens", "prompt_cache_hit_tokens",
        "prompt_cache_miss_tokens",
    )  # fmt: skip
    details = {
        "prompt_tokens_details": _object({"cached_tokens": _COUNT}),
        "completion_tokens_details": _object({"reasoning_tokens": _COUNT}),
    }
    return _object(dict.fromkeys(counts, _COUNT) | details)


# Words of JSON Schema


def _ref(name: str, kind: str = "schemas") -> Json:
    return {"$ref": f"#/components/{kind}/{name}"}


def _json(schema: Json) -> Json:
    return {"application/json": {"schema": schema}}


def _object(properties: Json, is_open: bool = False) -> Json:
    """An object that has all of these properties and, unless it is open, no others."""
    schema = {"type": "object", "properties": dict(properties), "required": list(properties)}
    return schema if is_open else schema | {"additionalProperties": False}


def _typed(kind: str, **properties: Json) -> Json:
    return _object({"type": {"const": kind}, **properties}, is_open=True)


def _list(items: Json) -> Json:
    return {"type": "array", "items": items}


def _maybe(schema: Json) -> Json:
    """The same, or null, which counts as not sent."""
    return {"anyOf": [schema, {"type": "null"}]}


def _number(low: float, high: float) -> Json:
    return {"type": ["number", "null"], "minimum": low, "maximum": high}


def _integer(low: int, high: int | None = None) -> Json:
    bounds = {"minimum": low} if high is None else {"minimum": low, "maximum": high}
    return {"type": ["integer", "null"], **bounds}


def _hex(digits: int) -> Json:
    return {"type": "string", "pattern": f"^[0-9a-f]{{{digits}}}$"}
