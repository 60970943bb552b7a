"""A conversation of the OpenAI Agents SDK: each line of the input is a question. Runs in an environment that has it.

`python openai_agent.py BASE_URL MODEL chat|responses stream|whole [previous]`
"""

import asyncio
import sys

from agents import (
    Agent,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    SQLiteSession,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI


@function_tool
def get_weather(city: str) -> str:
    """Weather of a city."""
    return f"sunny in {city}"


async def converse(base_url: str, model: str, kind: str, how: str, previous: str = "") -> None:
    """Ask every question and print what the agent says at last."""
    client = AsyncOpenAI(base_url=base_url, api_key="x", max_retries=0)
    made = OpenAIChatCompletionsModel if kind == "chat" else OpenAIResponsesModel
    agent = Agent(name="Terse", instructions="Be terse.", model=made(model, client), tools=[get_weather])
    # The history is sent each time, or the id of the answer before.
    kept = {} if previous else {"session": SQLiteSession("conversation")}
    for question in sys.stdin.read().splitlines():
        if how == "stream":
            done = Runner.run_streamed(agent, question, **kept)
            async for _ in done.stream_events():
                pass
        else:
            done = await Runner.run(agent, question, **kept)
        if previous:
            kept = {"previous_response_id": done.last_response_id, "auto_previous_response_id": True}
        print(done.final_output)


set_tracing_disabled(True)
asyncio.run(converse(*sys.argv[1:]))
