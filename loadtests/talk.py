"""A chat program as anybody would write it: it keeps the history, and knows nothing of windows.

    python -m loadtests.talk SESSION TEXT...

Each TEXT is a turn. The history is in SESSION.json where it runs; `-n` forgets it and sends what is new alone,
as a client may that goes on from a thawed window. The address is CWG_URL.
"""

import json
import os
import sys
from pathlib import Path

from openai import OpenAI


def main(session: str, texts: list[str], *, forget: bool) -> None:
    """Hold the turns, and print of each what the engine counted."""
    url = os.environ.get("CWG_URL", "http://127.0.0.1:8700")
    history = Path(f"{session}.json")
    messages = json.loads(history.read_text()) if history.exists() and not forget else []
    with OpenAI(base_url=f"{url}/s/{session}/v1", api_key="none") as client:
        for text in texts:
            messages.append({"role": "user", "content": text})
            reply = client.chat.completions.create(model="demo", messages=messages, max_tokens=60, temperature=0)
            messages.append({"role": "assistant", "content": reply.choices[0].message.content})
            usage = reply.usage
            assert usage is not None
            cached = (usage.prompt_tokens_details and usage.prompt_tokens_details.cached_tokens) or 0
            print(f"{usage.prompt_tokens} tokens, {cached} of them from the cache; {usage.completion_tokens} of reply")
    history.write_text(json.dumps(messages))


if __name__ == "__main__":
    given = [word for word in sys.argv[1:] if word != "-n"]
    main(given[0], given[1:], forget="-n" in sys.argv)
