"""A conversation of the OpenAI Agents SDK: each line of the input is a question. Runs in an environment that has it.

`python openai_agent.py BASE_URL MODEL chat|responses stream|whole [previous]`. TOOLS in its environment tells of
a server of MCP, as JSON.
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
    """The server of MCP that the environment tells of, if it does."""
    given = json.loads(os.environ.get("TOOLS", "null"))
    if given is None:
        return []
    return [
        MCPServerStreamableHttp(given) if "url" in given else MCPServerStdio(given, client_session_timeout_seconds=60)
    ]


async def converse(stack: AsyncExitStack, base_url: str, model: str, kind: str, how: str, previous: str = "") -> None:
    """Ask every question and print what the agent says at last."""
    client = AsyncOpenAI(base_url=base_url, api_key="x", max_retries=0)
    made = OpenAIChatCompletionsModel if kind == "chat" else OpenAIResponsesModel
    servers = [await stack.enter_async_context(one) for one in tool_servers()]
    agent = Agent(
        name="Terse",
        instructions="Be terse.",
        model=made(model, client),
        tools=[get_weather],
        mcp_servers=servers,
    )
    # The history is sent each time, or the id of the answer before.
    kept = {} if previous else {"session": SQLiteSession("conversation")}
    for question in sys.stdin.read().splitlines():
        if how == "stream":
            done = Runner.run_streamed(agent, question, max_turns=_TURNS, **kept)
            async for _ in done.stream_events():
                pass
        else:
            done = await Runner.run(agent, question, max_turns=_TURNS, **kept)
        if previous:
            kept = {"previous_response_id": done.last_response_id, "auto_previous_response_id": True}
        print(done.final_output)


async def main() -> None:
    """Converse, and leave no server behind."""
    async with AsyncExitStack() as stack:
        await converse(stack, *sys.argv[1:])


set_tracing_disabled(True)
asyncio.run(main())
