"""A row of a data set becomes one text: its `text`, or the chat, the prompt or the instruction that it holds."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Messages = Sequence[Mapping[str, Any]]
Render = Callable[[Messages, Any], str]  # messages and tools -> one text by a model's chat template, "" without one
ROLES = {"human": "user", "gpt": "assistant", "bard": "assistant", "bing": "assistant", "chatgpt": "assistant"}


def no_template(messages: Messages, tools: Any) -> str:
    """A Render without a chat template."""
    return ""


def _rendered(messages: Messages, tools: Any, render: Render) -> str:
    """A chat by the template, or where there is none as lines "role: content", with reasoning, calls and tools."""
    if text := render(messages, tools):
        return text
    lines = [f"tools: {json.dumps(tools, ensure_ascii=False)}"] if tools else []
    for message in messages:
        said = (message.get(field) for field in ("reasoning_content", "content"))
        calls = [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls") or ()]
        lines.append(
            f"{message['role']}: " + "\n".join([*(one for one in said if isinstance(one, str) and one), *calls])
        )
    return "\n".join(line.rstrip() for line in lines)


def text_of(row: Any, render: Render) -> tuple[str, str]:
    """(text, the field or form that it is of) of a row. Raises ValueError, which says what is missing."""
    if isinstance(row, str):
        return row, "strings"
    if not isinstance(row, dict):
        raise ValueError(f"it is no object but {type(row).__name__}")
    if isinstance(text := row.get("text"), str):
        return text, "field text"
    for field in ("messages", "conversations", "conversation"):
        if isinstance(row.get(field), list) and row[field]:
            return _rendered([_message(one) for one in row[field]], row.get("tools"), render), f"chats in {field}"
    if "completion" in row and "prompt" in row:
        return _of_two(row["prompt"], row["completion"], row.get("tools"), render), "prompt and completion"
    if isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str):
        extra = row.get("input", "")
        if not isinstance(extra, str):
            raise ValueError("its input is no text")
        asked = "\n\n".join(part for part in (row["instruction"], extra) if part)
        chat = [_said("user", asked), _said("assistant", row["output"])]
        return _rendered(chat, None, render), "instruction and output"
    raise ValueError(
        "it has none of the fields text, messages, conversations, prompt and completion, or instruction and output, "
        "but " + (", ".join(map(repr, list(row)[:8])) or "none")
    )


def _of_two(prompt: Any, completion: Any, tools: Any, render: Render) -> str:
    """The text of a prompt and its completion: joined where both are text, a chat where both are messages."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt + completion
    if isinstance(prompt, list) and isinstance(completion, list):
        return _rendered([_message(one) for one in (*prompt, *completion)], tools, render)
    raise ValueError("its prompt and completion are neither two texts nor two lists of messages")


def _message(one: Any) -> dict[str, Any]:
    """A message with role and content, of {role, content, ...} or {from, value}."""
    if isinstance(one, dict) and isinstance(one.get("role"), str):
        return dict(one)
    if isinstance(one, dict) and isinstance(one.get("from"), str) and isinstance(one.get("value"), str):
        role = str(one["from"])
        return _said(ROLES.get(role, role), one["value"])
    raise ValueError("a message of it has neither role and content nor from and value")


def _said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}
