"""A minimal chat program: it keeps the history, and knows nothing about windows.

    python -m loadtests.talk SESSION TEXT...

Each TEXT is a turn. The history is kept in SESSION.json in the current directory; `-n` ignores it and sends only the
new messages, as a client may that continues from a thawed window. The gateway's URL is CWG_URL.
"""

import json
import os
import sys
from pathlib import Path

from openai import OpenAI


def main(session: str, texts: list[str], *, forget: bool) -> None:
    """Send the turns, and print the token counts of each."""
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
    session, *texts = [word for word in sys.argv[1:] if word != "-n"]
    main(session, texts, forget="-n" in sys.argv)
