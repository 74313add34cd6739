"""Fixed texts that the models were trained on, kept to the letter.

They are DeepSeek's, not ours:
  DSML_* come from `encoding/encoding_dsv32.py` of the DeepSeek-V3.2 repository,
  EXP_TOOLS_* from the chat-template section of the DeepSeek-V3.1 model card.
Copyright (c) 2023 DeepSeek, published under the MIT License, whose notice must stay with every copy of them.
"""

DSML_TOOLS = (
    "## Tools\n"
    "You have access to a set of tools you can use to answer the user's question.\n"
    'You can invoke functions by writing a "<{dsml_token}function_calls>" block like the following as '
    "part of your reply to the user:\n"
    "<{dsml_token}function_calls>\n"
    '<{dsml_token}invoke name="$FUNCTION_NAME">\n'
    '<{dsml_token}parameter name="$PARAMETER_NAME" '
    'string="true|false">$PARAMETER_VALUE</{dsml_token}parameter>\n'
    "...\n"
    "</{dsml_token}invoke>\n"
    '<{dsml_token}invoke name="$FUNCTION_NAME2">\n'
    "...\n"
    "</{dsml_token}invoke>\n"
    "</{dsml_token}function_calls>\n"
    "String and scalar parameters should be specified as is without any escaping or quotes, while "
    'lists and objects should use JSON format. The "string" attribute should be set to "true" for '
    'string type parameters and "false" for other types (numbers, booleans, arrays, objects).\n'
    "If the thinking_mode is enabled, then after function results you should strongly consider "
    "outputting a thinking block. Here is an example:\n"
    "<{dsml_token}function_calls>\n"
    "...\n"
    "</{dsml_token}function_calls>\n"
    "<function_results>\n"
    "...\n"
    "</function_results>\n"
    "{thinking_start_token}...thinking about results{thinking_end_token}\n"
    "Here are the functions available in JSONSchema format:\n"
    "<functions>\n"
    "{tool_schemas}\n"
    "</functions>\n"
)

DSML_SCHEMA = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"

DSML_DEVELOPER = "# The user's message is: "

EXP_TOOLS_HEAD = "## Tools\nYou have access to the following tools:\n\n"

EXP_TOOLS_RULES = (
    "IMPORTANT: ALWAYS adhere to this exact format for tool use:\n"
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments"
    "<｜tool▁call▁end｜>{additional_tool_calls}<｜tool▁calls▁end｜>\n"
    "\n"
    "Where:\n"
    "- `tool_call_name` must be an exact match to one of the available tools\n"
    "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
    "- For multiple tool calls, chain them directly without separators or spaces"
)
