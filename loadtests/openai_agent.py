"""A conversation of the OpenAI Agents SDK: each line of stdin is a question. Runs in an environment that has the SDK.

`python openai_agent.py BASE_URL MODEL chat|responses stream|whole [previous]`. The environment variable TOOLS can
configure an MCP server, as JSON.
"""

import asyncio
import json
import os
import sys
from contextlib import AsyncExitStack

from agents import (
    Agent,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    SQLiteSession,
    function_tool,
    set_tracing_disabled,
)
from agents.mcp import MCPServer, MCPServerStdio, MCPServerStreamableHttp
from openai import AsyncOpenAI

_TURNS = 30


@function_tool
def get_weather(city: str) -> str:
    """Weather of a city."""
    return f"sunny in {city}"


def tool_servers() -> list[MCPServer]:
    """The MCP server configured in the environment, if any."""
    config = json.loads(os.environ.get("TOOLS", "null"))
    if config is None:
        return []
    return [
        MCPServerStreamableHttp(config)
        if "url" in config
        else MCPServerStdio(config, client_session_timeout_seconds=60)
    ]


async def converse(stack: AsyncExitStack, base_url: str, model: str, kind: str, how: str, previous: str = "") -> None:
    """Ask every question and print each final answer."""
    client = AsyncOpenAI(base_url=base_url, api_key="x", max_retries=0)
    model_class = OpenAIChatCompletionsModel if kind == "chat" else OpenAIResponsesModel
    servers = [await stack.enter_async_context(server) for server in tool_servers()]
    agent = Agent(
        name="Terse",
        instructions="Be terse.",
        model=model_class(model, client),
        tools=[get_weather],
        mcp_servers=servers,
    )
    # Each request carries either the history or the id of the previous response.
    kept = {} if previous else {"session": SQLiteSession("conversation")}
    for question in sys.stdin.read().splitlines():
        if how == "stream":
            result = Runner.run_streamed(agent, question, max_turns=_TURNS, **kept)
            async for _ in result.stream_events():
                pass
        else:
            result = await Runner.run(agent, question, max_turns=_TURNS, **kept)
        if previous:
            kept = {"previous_response_id": result.last_response_id, "auto_previous_response_id": True}
        print(result.final_output)


async def main() -> None:
    """Hold the conversation, then close the MCP servers."""
    async with AsyncExitStack() as stack:
        await converse(stack, *sys.argv[1:])


set_tracing_disabled(True)
asyncio.run(main())
