"""An agent as somebody else would write it: no clawrl, no SDK, only what `run_program` tells it of."""

import json
import os
import sys
import urllib.request
from pathlib import Path

task = json.loads(Path(os.environ["TASK_FILE"]).read_text())
messages, seen = task["messages"], {"terminated": False}
while not seen["terminated"]:
    body = json.dumps({"model": os.environ["MODEL"], "messages": messages, "tools": task["tools"]}).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"}
    request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, headers)
    reply = json.load(urllib.request.urlopen(request))["choices"][0]["message"]
    sys.stdout.write(json.dumps(reply) + "\n")
    sys.stdout.flush()
    seen = json.loads(sys.stdin.readline())
    messages += [reply, *seen["messages"]]
